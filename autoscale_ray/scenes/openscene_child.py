"""The child process that opens OpenScene logs from outside: it hands over only what the reader uses.

Most of a log are the entries of eight cameras, which no scene of a pool holds; see `pickle_child` for the guards.
"""

from __future__ import annotations

from functools import partial

from autoscale_ray.scenes import pickle_child

FRAME_KEYS = (
    "token", "timestamp", "log_name", "map_location", "roadblock_ids", "ego2global_translation", "ego2global_rotation",
    "ego_dynamic_state", "traffic_lights", "driving_command", "anns",
)  # fmt: skip
ANNOTATION_KEYS = ("gt_boxes", "gt_names", "gt_velocity_3d", "track_tokens")


def used_values(content: bytes) -> object:
    """Return the frames of a log with the keys that are used; what is no list of frames is returned as it is.

    Raises:
        Refused: With the reason.
    """
    frames = pickle_child.plain_values(content)
    if not isinstance(frames, list):
        return frames
    return [_kept(frame, FRAME_KEYS) for frame in frames]


def _kept(value: object, keys: tuple[str, ...]) -> object:
    if not isinstance(value, dict):
        return value
    kept = {key: value[key] for key in keys if key in value}
    return kept | ({"anns": _kept(kept["anns"], ANNOTATION_KEYS)} if "anns" in kept else {})


serve = partial(pickle_child.serve, read=used_values)
