"""Read NAVSIM/OpenScene log pickles: one list of 2 Hz frames a log.

Facts of the format: poses are those of the rear axle in UTM metres; the heading is the yaw of a roll-pitch-yaw product
(rotation x, then y, then z of the turned axes). Boxes and velocities stand in the ego frame and are turned by the
heading alone. A velocity may be NaN. An empty list of roadblocks, or the one text ``None``, means that the frame has no
route.

Shape legend: F frames of the log, A boxes over all frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.safe_pickle import shared_reader
from autoscale_ray.scenes.schema import AGENT_TYPES, DRIVING_COMMANDS
from autoscale_ray.scenes.trust import read_member

MAX_FRAMES = 20_000
MAX_NUMBER = 1e9
_TYPE_OF = {name: number for number, name in enumerate(AGENT_TYPES)}
_EGO_NAME = "ego"
_NO_ROUTE = ("None",)
"""What OpenScene writes where nuPlan's scene has null for its roadblocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpensceneLog:
    """One log in map coordinates."""

    name: str
    location: str
    tokens: tuple[str, ...]
    times_us: np.ndarray
    poses_F3: np.ndarray
    """Rear axle x, y, yaw."""
    dynamics_F4: np.ndarray
    """vx, vy, ax, ay in the body frame at the rear axle."""
    command_F: np.ndarray
    """Index into DRIVING_COMMANDS."""
    routes: tuple[tuple[str, ...], ...]
    """Roadblock ids of every frame."""
    red: tuple[tuple[int, ...], ...]
    """Ids of lane connectors whose light is red, of every frame."""
    box_offsets: np.ndarray
    """(F+1,) first box of each frame."""
    box_track_A: np.ndarray
    """Number of the track within the log."""
    box_type_A: np.ndarray
    box_size_A2: np.ndarray
    """Length, width."""
    box_states_A5: np.ndarray
    """Centre x, y, yaw, vx, vy in map axes; the velocity is NaN where the log has none."""
    is_doubled_F: np.ndarray
    """Frames in which a track stands twice; its boxes there are left out."""


_CHILD = "autoscale_ray.scenes.openscene_child"


def read_log(path: Path, unit: str) -> OpensceneLog:
    """Read one log.

    Args:
        path: Folder, archive or file.
        unit: Name of the pickle in it.

    Raises:
        InputRejectedError: The pickle is refused, or a frame of it is malformed; names frame and key.
    """
    return log_of(shared_reader(_CHILD).read(read_member(path, unit), unit), unit)


def log_of(frames: Any, where: str) -> OpensceneLog:
    """Turn the plain values of a log pickle into arrays.

    Args:
        frames: List of frame mappings.
        where: File name for messages.

    Raises:
        InputRejectedError: Malformed; names frame and key.
    """
    if not isinstance(frames, list) or not frames:
        raise InputRejectedError(where, "must hold a list of frames")
    if len(frames) > MAX_FRAMES:
        raise InputRejectedError(where, f"must hold at most {MAX_FRAMES} frames", len(frames))
    poses_F3, dynamics_F4 = _poses(frames, where)
    return OpensceneLog(
        name=_shared(frames, "log_name", where),
        location=_shared(frames, "map_location", where),
        tokens=tuple(_each(frames, "token", where, _text)),
        times_us=np.array(_each(frames, "timestamp", where, _time), dtype=np.int64),
        poses_F3=poses_F3,
        dynamics_F4=dynamics_F4,
        command_F=np.array(_each(frames, "driving_command", where, _command), dtype=np.int8),
        routes=tuple(_each(frames, "roadblock_ids", where, _roadblocks)),
        red=tuple(_each(frames, "traffic_lights", where, _red_connectors)),
        **_boxes(frames, poses_F3, where),
    )


def _each(frames: Sequence[Any], key: str, where: str, convert: Callable[[Any, str], Any]) -> list[Any]:
    values = []
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or key not in frame:
            raise InputRejectedError(f"{where}: frame {number}", f"must have the key {key}")
        values.append(convert(frame[key], f"{where}: frame {number}: {key}"))
    return values


def _shared(frames: Sequence[Any], key: str, where: str) -> str:
    values = set(_each(frames, key, where, _text))
    if len(values) > 1:
        raise InputRejectedError(f"{where}: {key}", "must be the same in every frame", sorted(values)[:3])
    return values.pop()


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or len(value) > 200 or not value.isprintable():
        raise InputRejectedError(where, "must be a text", value)
    return value


def _time(value: Any, where: str) -> int:
    number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 62:
        raise InputRejectedError(where, "must be a time in microseconds", number)
    return number


def _numbers(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return a float64 array of a shape, -1 standing for any length; NaN for numbers that are not finite."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros(0, dtype="U1")
    # An empty list has no width of its own.
    array = array.reshape(0, *shape[1:]) if array.size == 0 and shape[0] == -1 else array
    fits = array.ndim == len(shape) and all(
        want in (-1, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in "biuf":
        text = " x ".join("n" if size < 0 else str(size) for size in shape)
        raise InputRejectedError(where, f"must hold {text} numbers", f"{array.dtype} {array.shape}")
    numbers = array.astype(np.float64)
    # What cannot be a place, speed or size becomes NaN, which the gates refuse, before it overflows on the way there.
    numbers[~(np.abs(numbers) < MAX_NUMBER)] = np.nan
    return numbers


def _command(value: Any, where: str) -> int:
    """Return the place of the only 1, ``unknown`` where there is no such; NAVSIM hands these numbers on unread."""
    one_hot = _numbers(value, (len(DRIVING_COMMANDS),), where)
    is_one_hot = np.isin(one_hot, (0.0, 1.0)).all() and one_hot.sum() == 1.0
    return int(one_hot.argmax()) if is_one_hot else DRIVING_COMMANDS.index("unknown")


def _roadblocks(value: Any, where: str) -> tuple[str, ...]:
    items = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    if not isinstance(items, list) or not all(isinstance(item, (str, int)) for item in items):
        raise InputRejectedError(where, "must be a list of roadblock ids", value)
    ids = tuple(map(str, items))
    return () if ids == _NO_ROUTE else ids


def is_fid(text: str) -> bool:
    """Tell whether a text is the number of an object of a map, one of 63 bits."""
    return text.isdecimal() and len(text) < 19


def _red_connectors(value: Any, where: str) -> tuple[int, ...]:
    pairs = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(pairs, list):
        raise InputRejectedError(where, "must be a list of (lane connector, is red)", value)
    red = []
    for pair in pairs:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not is_fid(str(pair[0]))
            or isinstance(pair[1], list)
            or np.size(pair[1]) != 1
        ):
            raise InputRejectedError(where, "must be a list of (lane connector, is red)", pair)
        if bool(pair[1]):
            red.append(int(pair[0]))
    return tuple(red)


def _poses(frames: Sequence[Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    def column(key: str, width: int) -> np.ndarray:
        return np.stack(_each(frames, key, where, lambda value, place: _numbers(value, (width,), place)))

    position_F3 = column("ego2global_translation", 3)
    w, x, y, z = column("ego2global_rotation", 4).T
    norm = np.sqrt(w * w + x * x + y * y + z * z)
    bad = np.flatnonzero(np.abs(norm - 1.0) > 0.01)  # a frame with NaN passes and is left to the gates
    if len(bad):
        raise InputRejectedError(
            f"{where}: frame {bad[0]}: ego2global_rotation", "must be a unit quaternion", norm[bad[0]]
        )
    yaw = np.arctan2(2.0 * (w * z - x * y), norm**2 - 2.0 * (y * y + z * z))
    return np.column_stack([position_F3[:, :2], yaw]), column("ego_dynamic_state", 4)


def _boxes(frames: Sequence[Any], poses_F3: np.ndarray, where: str) -> dict[str, np.ndarray]:
    parts = _each(frames, "anns", where, _annotations)
    counts = np.array([len(part[0]) for part in parts], dtype=np.int64)
    boxes_A7, velocities_A3 = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    names_A, tracks_A = ([name for part in parts for name in part[k]] for k in (2, 3))
    frame_A = np.repeat(np.arange(len(frames)), counts)
    known = np.array([name != _EGO_NAME for name in names_A], dtype=bool)
    unknown = next((name for name in names_A if name not in _TYPE_OF and name != _EGO_NAME), None)
    if unknown is not None:
        raise InputRejectedError(
            f"{where}: anns: gt_names", f"must be one of {', '.join(AGENT_TYPES)}", unknown
        )
    frame_A, boxes_A7, velocities_A3 = frame_A[known], boxes_A7[known], velocities_A3[known]
    track_A = np.unique(np.array(tracks_A, dtype=str)[known], return_inverse=True)[1].astype(np.int64)
    single_A = _single(frame_A, track_A)
    is_doubled_F = np.bincount(frame_A[~single_A], minlength=len(frames)) > 0
    type_A = np.array([_TYPE_OF[name] for name in names_A if name != _EGO_NAME], dtype=np.int8)[single_A]
    frame_A, boxes_A7, velocities_A3 = frame_A[single_A], boxes_A7[single_A], velocities_A3[single_A]
    pose_A3 = poses_F3[frame_A]
    cos, sin = np.cos(pose_A3[:, 2]), np.sin(pose_A3[:, 2])
    turned = [
        np.stack([cos * values[:, 0] - sin * values[:, 1], sin * values[:, 0] + cos * values[:, 1]], axis=1)
        for values in (boxes_A7, velocities_A3)
    ]
    states = [turned[0] + pose_A3[:, :2], wrap_angle(boxes_A7[:, 6] + pose_A3[:, 2])[:, None], turned[1]]
    return {
        "box_offsets": np.searchsorted(frame_A, np.arange(len(frames) + 1)),
        "box_track_A": track_A[single_A],
        "box_type_A": type_A,
        "box_size_A2": boxes_A7[:, 3:5],
        "box_states_A5": np.concatenate(states, axis=1),
        "is_doubled_F": is_doubled_F,
    }


def _annotations(value: Any, where: str) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    if not isinstance(value, Mapping):
        raise InputRejectedError(where, "must be a mapping")
    missing = [key for key in ("gt_boxes", "gt_names", "gt_velocity_3d", "track_tokens") if key not in value]
    if missing:
        raise InputRejectedError(where, f"must have the key {missing[0]}")
    boxes = _numbers(value["gt_boxes"], (-1, 7), f"{where}: gt_boxes")
    velocities = _numbers(value["gt_velocity_3d"], (-1, 3), f"{where}: gt_velocity_3d")
    names, tracks = (_texts(value[key], f"{where}: {key}") for key in ("gt_names", "track_tokens"))
    lengths = {
        "gt_boxes": len(boxes),
        "gt_velocity_3d": len(velocities),
        "gt_names": len(names),
        "track_tokens": len(tracks),
    }
    if len(set(lengths.values())) != 1:
        raise InputRejectedError(where, "must have as many boxes as names, velocities and tracks", lengths)
    return boxes, velocities, names, tracks


def _texts(value: Any, where: str) -> list[str]:
    items = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InputRejectedError(where, "must be a list of texts")
    return items


def _single(frame_A: np.ndarray, track_A: np.ndarray) -> np.ndarray:
    """Tell which boxes (bool, A) are the only one of their track in their frame."""
    key_A = frame_A * (int(track_A.max(initial=0)) + 1) + track_A
    _, place_A, counts = np.unique(key_A, return_inverse=True, return_counts=True)
    return counts[place_A] == 1


def filled_velocities(log: OpensceneLog) -> np.ndarray:
    """Return the states of all boxes with missing velocities taken from the track's positions (A, 5).

    The difference to the track's next and previous boxes over the time between them, one-sided at its ends; 0 for a
    track that is seen once.
    """
    states = log.box_states_A5.copy()
    missing = ~np.isfinite(states[:, 3:]).all(axis=1)
    if not missing.any():
        return states
    frame_A = np.repeat(np.arange(len(log.tokens)), np.diff(log.box_offsets))
    order = np.lexsort((frame_A, log.box_track_A))
    track, time_s = log.box_track_A[order], log.times_us[frame_A[order]] / 1e6
    rows = np.arange(len(order))
    low = np.where((rows > 0) & (track == np.roll(track, 1)), rows - 1, rows)
    high = np.where((rows < len(rows) - 1) & (track == np.roll(track, -1)), rows + 1, rows)
    elapsed = np.where(high > low, time_s[high] - time_s[low], math.inf)
    difference = (states[order[high], :2] - states[order[low], :2]) / np.where(
        elapsed > 0, elapsed, math.inf
    )[:, None]
    at = np.empty(len(order), dtype=np.int64)
    at[order] = rows
    states[missing, 3:] = difference[at[missing]]
    return states
