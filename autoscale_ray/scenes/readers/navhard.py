"""Read navhard's synthetic scenes: one pickle a scene, rendered around the log of a real one, with a shifted ego.

Facts of the format: frames every 0.5 s up to 0 s, boxes in the ego's axes; what the other objects and the lights do
afterwards stands in ``extended_detections_tracks`` and ``extended_traffic_light_data`` (nuPlan objects in map axes).
The ego itself has no future, so a scene can be scored but is a scene of a pool only where its frames reach to 4 s.
The scene's token is that of the frame at 0 s; ``corresponding_original_initial_token`` names the real scene.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.readers.metric_cache import CHILD, open_reader
from autoscale_ray.scenes.readers.navsim import checked_files
from autoscale_ray.scenes.readers.navsim_scenes import Source, cut_scenes
from autoscale_ray.scenes.readers.nuplan_map import open_map
from autoscale_ray.scenes.readers.openscene import OpensceneLog, log_of
from autoscale_ray.scenes.readers.reader import Reader, SceneTables
from autoscale_ray.scenes.readers.scene_filter import SceneFilter
from autoscale_ray.scenes.safe_pickle import PickleReader, shared_reader
from autoscale_ray.scenes.schema import AGENT_TYPES, NUM_PLAN_FRAMES
from autoscale_ray.scenes.trust import member_names, read_member

SOURCE = "navhard"
_META_FOLDER = "openscene_meta_datas"
"""Of the same download: short lists of frames for the cameras, no logs."""
STEP_US = 500_000
_CITY_NAMES = {"las_vegas": "us-nv-las-vegas-strip"}
_EGO_TYPE = len(AGENT_TYPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticScene:
    """One synthetic scene as a log in map coordinates; frames after the last recorded one hold the ego's last state."""

    log: OpensceneLog
    token: str
    num_history: int
    num_recorded: int
    """Frames with an ego of their own."""
    origin_token: str | None


def scene_units(path: Path) -> list[str]:
    """Return the pickles of synthetic scenes; the lists of frames beside them are left out."""
    return [name for name in member_names(path, ".pkl") if _META_FOLDER not in PurePosixPath(name).parts]


def read_scene(reader: PickleReader, path: Path, unit: str) -> SyntheticScene:
    """Read one synthetic scene.

    Args:
        reader: Result of `open_reader`.
        path: Folder, archive or file.
        unit: One of `scene_units`.

    Raises:
        InputRejectedError: The pickle is refused or malformed; names the element and the rule.
    """
    values = reader.read(read_member(path, unit), unit)
    if values.get("kind") != "synthetic_scene":
        raise InputRejectedError(unit, "must be a synthetic scene", values.get("kind"))
    metadata, frames = values["scene_metadata"], values["frames"]
    num_history = metadata.get("num_history_frames")
    if num_history not in (4, 5) or num_history > len(frames):
        raise InputRejectedError(
            f"{unit}: num_history_frames", f"must be 4 or 5 of {len(frames)} frames", num_history
        )  # fmt: skip
    location = str(metadata.get("map_name"))
    shared = {"log_name": metadata.get("log_name"), "map_location": _CITY_NAMES.get(location, location)}
    recorded = [_frame(frame, shared, f"{unit}: frame {number}") for number, frame in enumerate(frames)]
    extended = _extended(recorded[-1], values["extended_tracks"], values["extended_lights"], unit)
    origin = metadata.get("corresponding_original_initial_token")
    return SyntheticScene(
        log=log_of(recorded + extended, unit),
        token=str(recorded[num_history - 1]["token"]),
        num_history=num_history,
        num_recorded=len(recorded),
        origin_token=origin if isinstance(origin, str) and origin else None,
    )


def _frame(frame: Mapping[str, Any], shared: Mapping[str, object], where: str) -> dict[str, Any]:
    """Turn a frame into the form of an OpenScene log; `log_of` checks the values.

    Poses are taken as map poses whatever ``in_global_frame`` says, as NAVSIM takes them; others would find no route.
    """
    status, boxes = (_mapping(frame, key, where) for key in ("ego_status", "annotations"))
    pose = _numbers(status, "ego_pose", 3, where)
    motion = [*_numbers(status, "ego_velocity", 2, where), *_numbers(status, "ego_acceleration", 2, where)]
    return {
        **shared,
        "token": frame.get("token"),
        "timestamp": frame.get("timestamp"),
        "roadblock_ids": frame.get("roadblock_ids"),
        "traffic_lights": frame.get("traffic_lights"),
        "driving_command": status.get("driving_command"),
        "ego2global_translation": [*pose[:2], 0.0],
        "ego2global_rotation": [np.cos(pose[2] / 2.0), 0.0, 0.0, np.sin(pose[2] / 2.0)],
        "ego_dynamic_state": motion,
        "anns": {
            "gt_boxes": boxes.get("boxes"),
            "gt_names": boxes.get("names"),
            "gt_velocity_3d": boxes.get("velocity_3d"),
            "track_tokens": boxes.get("track_tokens"),
        },
    }


def _mapping(frame: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = frame.get(key)
    if not isinstance(value, dict):
        raise InputRejectedError(f"{where}: {key}", "must be a mapping")
    return value


def _numbers(values: Mapping[str, Any], key: str, count: int, where: str) -> list[float]:
    array = np.asarray(values.get(key))
    if array.shape != (count,) or array.dtype.kind not in "iuf":
        raise InputRejectedError(f"{where}: {key}", f"must hold {count} numbers")
    return [float(value) for value in array]


def _extended(
    last: Mapping[str, Any], tracks: Sequence[Any], lights: Sequence[Any], where: str
) -> list[dict[str, Any]]:
    """Return frames after the last one: objects and lights as given, the ego where it last stood."""
    w, z = last["ego2global_rotation"][0], last["ego2global_rotation"][3]
    origin = np.array([*last["ego2global_translation"][:2], 2.0 * np.arctan2(z, w)])
    frames = []
    for number, rows in enumerate(tracks):
        if not isinstance(last["timestamp"], int):
            raise InputRejectedError(
                f"{where}: timestamp", "must be a time in microseconds", last["timestamp"]
            )
        frames.append(
            {
                **last,
                "token": f"{last['token']}+{number + 1}",
                "timestamp": last["timestamp"] + STEP_US * (number + 1),
                "traffic_lights": lights[number] if number < len(lights) else [],
                "anns": _in_ego_axes(rows, origin, f"{where}: extended_detections_tracks {number}"),
            }
        )
    return frames


def _in_ego_axes(rows: Sequence[Sequence[Any]], origin: np.ndarray, where: str) -> dict[str, object]:
    """Turn objects in map axes into the annotations of a log."""
    codes = [int(row[1]) for row in rows]
    if any(not 0 <= code <= _EGO_TYPE for code in codes):
        raise InputRejectedError(where, f"types must be 0 to {_EGO_TYPE}")
    # Length, width, height, vx, vy, x, y, yaw.
    values = np.array([row[2:] for row in rows], dtype=np.float64).reshape(-1, 8)
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    turn = np.array([[cos, -sin], [sin, cos]])
    places = (values[:, 5:7] - origin[:2]) @ turn
    count = len(values)
    return {
        "gt_boxes": np.column_stack([places, np.zeros(count), values[:, :3], values[:, 7] - origin[2]]),
        "gt_names": [AGENT_TYPES[code] if code < _EGO_TYPE else "ego" for code in codes],
        "gt_velocity_3d": np.column_stack([values[:, 3:5] @ turn, np.zeros(count)]),
        "track_tokens": [str(row[0]) for row in rows],
    }


def cut_scene(scene: SyntheticScene, maps: Path, unit: str, domain: str = "synthetic") -> SceneTables:
    """Cut the one window of a synthetic scene: a row to be scored, whether or not the ego has a future.

    Raises:
        InputRejectedError: Too few frames, or the map is refused.
    """
    needed = scene.num_history + NUM_PLAN_FRAMES
    if len(scene.log.tokens) < needed:
        raise InputRejectedError(
            f"{unit}: frames", f"objects must be known for {needed} frames", len(scene.log.tokens)
        )
    chosen = SceneFilter(
        num_history_frames=scene.num_history,
        num_future_frames=NUM_PLAN_FRAMES,
        tokens=frozenset([scene.token]),
    )
    source = Source(
        unit=unit, name=SOURCE, domain=domain, naming=lambda log_name, _: (log_name, scene.origin_token)
    )
    return cut_scenes(scene.log, open_map(maps, scene.log.location), chosen, source)


def scoring_tables(path: Path, maps: Path, wanted: Sequence[str]) -> Iterator[tuple[str, pa.Table | str]]:
    """Yield the rows of wanted synthetic scenes by token; the reason in place of a row that was refused.

    A file that cannot be read has no token to be found by; its reason comes under its name.

    Args:
        path: Folder, archive or file with synthetic scenes.
        maps: Folder with nuPlan maps.
        wanted: Tokens.
    """
    tokens = set(wanted)
    with open_reader() as reader:
        for unit in scene_units(path):
            name = PurePosixPath(unit).stem
            try:
                scene = read_scene(reader, path, unit)
                name = scene.token
                if scene.token not in tokens:
                    continue
                for table, refused in cut_scene(scene, maps, unit):
                    for row in refused.to_pylist():
                        yield scene.token, f"{unit}: {row['rule']} (found {row['value']})"
                    if len(table):
                        yield scene.token, table
            except InputRejectedError as error:
                yield name, str(error) if unit in error.where else f"{unit}: {error}"


def read_scenes(files: Mapping[str, Path], path: Path, unit: str, domain: str) -> SceneTables:
    """Yield the scene of one pickle for a pool.

    Args:
        files: ``maps``.
        path: Folder, archive or file.
        unit: One of `scene_units`.
        domain: ``synthetic``.

    Raises:
        InputRejectedError: The pickle or its map is refused, or the ego has no future.
    """
    scene = read_scene(shared_reader(CHILD), path, unit)
    needed = scene.num_history + NUM_PLAN_FRAMES
    if scene.num_recorded < needed:
        rule = "ego must be recorded for 4 s to stand in a pool; score it with `autoscale score --navhard`"
        raise InputRejectedError(f"{unit}: frames", rule, f"{scene.num_recorded} of {needed} frames")
    return cut_scene(scene, files["maps"], unit, domain)


def _with_files(files: Mapping[str, Path]) -> Reader:
    checked_files(files, ("maps",), "navhard")
    return replace(READER, read_scenes=partial(read_scenes, files))


READER = Reader(units=scene_units, with_files=_with_files)
