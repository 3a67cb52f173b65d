"""Read Argoverse 2: sensor logs (cuboids and ego poses) and motion forecasting scenarios, with their vector
maps.

Facts of the formats: sensor cuboids stand in the ego frame, whose origin is the rear axle; ten annotated
frames a second. Forecasting tracks have no sizes, so boxes are typical ones of their kind. Neighbour lanes
may run the other way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.parquet import read_feather, read_parquet
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import MAX_COORDINATE_M, Recording, Track, gather_tracks, recorder_track
from autoscale_ray.scenes.road_map import Area, Lane, RoadMap, make_road_map, pair_borders
from autoscale_ray.scenes.trust import read_file

FRAME_INTERVAL_S = 0.1
EGO_SIZE_M = (4.87, 1.85, 2.85)
"""Length, width and wheelbase of a Ford Fusion Hybrid."""
_VEHICLES = ("VEHICLE", "BUS", "TRUCK", "TRAILER", "MOTORCYCLE", "RAILED")
_SENSOR_KINDS = {
    "PEDESTRIAN": "pedestrian",
    "OFFICIAL_SIGNALER": "pedestrian",
    "BICYCLE": "bicycle",
    "BICYCLIST": "bicycle",
    "CONSTRUCTION_CONE": "traffic_cone",
    "CONSTRUCTION_BARREL": "traffic_cone",
}
_FORECAST_BOXES = {
    "vehicle": ("vehicle", 4.6, 1.9),
    "bus": ("vehicle", 11.0, 2.6),
    "motorcyclist": ("vehicle", 2.1, 0.8),
    "cyclist": ("bicycle", 1.8, 0.6),
    "riderless_bicycle": ("bicycle", 1.8, 0.6),
    "pedestrian": ("pedestrian", 0.6, 0.6),
}


def sensor_units(path: Path) -> list[str]:
    """Return the folders that hold annotations.feather."""
    return sorted(str(file.parent.relative_to(path)) for file in path.rglob("annotations.feather"))


def read_sensor(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one sensor log; the ego car is the recorder.

    Raises:
        InputRejectedError: A file of the log is missing or malformed.
    """
    folder = path / name
    log = folder.name if name != "." else path.resolve().name
    boxes = _columns(
        read_feather(folder / "annotations.feather"), _BOX_COLUMNS, f"{log}: annotations.feather"
    )
    poses = _columns(
        read_feather(folder / "city_SE3_egovehicle.feather"), _POSE_COLUMNS, f"{log}: city_SE3_egovehicle"
    )
    times = np.unique(boxes["timestamp_ns"])
    frames = np.round((times - times[0]) / (FRAME_INTERVAL_S * 1e9)).astype(np.int64)
    if len(np.unique(frames)) < len(frames):
        raise InputRejectedError(f"{log}: annotations.feather", "timestamps must be 0.1 s apart")
    order = np.argsort(poses["timestamp_ns"])
    at = np.searchsorted(poses["timestamp_ns"][order], times)
    if (at == len(order)).any() or (
        poses["timestamp_ns"][order][np.minimum(at, len(order) - 1)] != times
    ).any():
        raise InputRejectedError(f"{log}: city_SE3_egovehicle", "must hold a pose for every annotated time")
    ego = {name: column[order][at] for name, column in poses.items()}
    ego_F3 = np.column_stack([ego["tx_m"], ego["ty_m"], _yaw(_matrices(ego))])
    tracks = [recorder_track(ego_F3, frames, *EGO_SIZE_M), *_box_tracks(boxes, times, frames, ego)]
    yield Recording(
        name=log,
        log_id=f"argoverse2/{log}",
        source="argoverse2/sensor",
        tracks=gather_tracks(tracks),
        frame_interval_s=FRAME_INTERVAL_S,
        start_us=int(times[0]) // 1000,
        road=_road(folder / "map", log),
    )


_POSE_COLUMNS = ("timestamp_ns", "qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
_BOX_COLUMNS = (*_POSE_COLUMNS, "track_uuid", "category", "length_m", "width_m")
_FORECAST_COLUMNS = (
    "track_id", "object_type", "timestep", "position_x", "position_y", "heading", "velocity_x", "velocity_y",
)  # fmt: skip


def _columns(table: pa.Table, names: tuple[str, ...], where: str) -> dict[str, np.ndarray]:
    """Return columns as arrays, numbers checked."""
    missing = [name for name in names if name not in table.column_names]
    if missing or len(table) == 0:
        raise InputRejectedError(where, "must have rows and its columns", missing)
    arrays = {}
    for name in names:
        column = table[name]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            arrays[name] = np.array(column.to_pylist(), dtype=str)
        elif pa.types.is_integer(column.type) or column.type in (pa.float32(), pa.float64()):
            arrays[name] = column.to_numpy()
        else:
            raise InputRejectedError(where, f"column {name} must hold numbers or texts", str(column.type))
        if column.null_count:
            raise InputRejectedError(where, f"column {name} must have no empty cell")
        if arrays[name].dtype.kind == "f" and not (np.abs(arrays[name]) <= MAX_COORDINATE_M).all():
            raise InputRejectedError(where, f"column {name} must be finite, at most {MAX_COORDINATE_M:.0e}")
    if "qw" in names:
        norm = np.linalg.norm([arrays[name] for name in ("qw", "qx", "qy", "qz")], axis=0)
        if not (np.abs(norm - 1.0) <= 1e-3).all():
            raise InputRejectedError(
                where, "quaternions must have length 1", float(norm[np.abs(norm - 1.0).argmax()])
            )
    return arrays


def _matrices(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the rotation matrices (n, 3, 3) of unit quaternions."""
    w, x, y, z = (columns[name] for name in ("qw", "qx", "qy", "qz"))
    return np.stack([
        1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
        2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
        2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y),
    ], axis=-1).reshape(-1, 3, 3)  # fmt: skip


def _yaw(matrices: np.ndarray) -> np.ndarray:
    return np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])


def _box_tracks(
    boxes: Mapping[str, np.ndarray], times: np.ndarray, frames: np.ndarray, ego: Mapping[str, np.ndarray]
) -> Iterator[Track]:
    at = np.searchsorted(times, boxes["timestamp_ns"])
    turns = _matrices(ego)[at]
    local = np.column_stack([boxes["tx_m"], boxes["ty_m"], boxes["tz_m"]])
    city = np.einsum("nij,nj->ni", turns, local)[:, :2] + np.column_stack([ego["tx_m"], ego["ty_m"]])[at]
    poses = np.column_stack([city, _yaw(turns @ _matrices(boxes))])
    for key, name in enumerate(np.unique(boxes["track_uuid"])):
        rows = np.flatnonzero(boxes["track_uuid"] == name)
        rows = rows[np.argsort(frames[at[rows]])]
        category = str(boxes["category"][rows[0]])
        vehicle = any(word in category for word in _VEHICLES) and category != "MOTORCYCLIST"
        yield Track(
            key=key,
            kind="vehicle" if vehicle else _SENSOR_KINDS.get(category, "generic_object"),
            length_m=float(np.median(boxes["length_m"][rows])),
            width_m=float(np.median(boxes["width_m"][rows])),
            frames=frames[at[rows]],
            poses=poses[rows],
            can_be_ego=vehicle,
        )


def forecasting_units(path: Path) -> list[str]:
    """Return the names of the scenario Parquet files."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("scenario_*.parquet"))


def read_forecasting(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one forecasting scenario.

    Raises:
        InputRejectedError: The scenario or its map is missing or malformed.
    """
    file = path / name
    scenario = file.stem.removeprefix("scenario_")
    columns = _columns(read_parquet(file, list(_FORECAST_COLUMNS)), _FORECAST_COLUMNS, file.name)
    tracks = []
    for number, key in enumerate(np.unique(columns["track_id"])):
        rows = np.flatnonzero(columns["track_id"] == key)
        rows = rows[np.argsort(columns["timestep"][rows])]
        kind, length, width = _FORECAST_BOXES.get(
            str(columns["object_type"][rows[0]]), ("generic_object", 1.0, 1.0)
        )
        frames = columns["timestep"][rows].astype(np.int64)
        if (np.diff(frames) <= 0).any():
            raise InputRejectedError(f"{file.name}: track {key}", "must occur once in a time step")
        tracks.append(
            Track(
                key=number,
                kind=kind,
                length_m=length,
                width_m=width,
                frames=frames,
                poses=np.column_stack([columns[c][rows] for c in ("position_x", "position_y", "heading")]),
                velocities=np.column_stack([columns[c][rows] for c in ("velocity_x", "velocity_y")]),
                can_be_ego=str(columns["object_type"][rows[0]]) in ("vehicle", "bus"),
            )
        )
    yield Recording(
        name=scenario,
        log_id=f"argoverse2/{scenario}",
        source="argoverse2/motion_forecasting",
        tracks=gather_tracks(tracks),
        frame_interval_s=FRAME_INTERVAL_S,
        road=_road(file.parent, scenario),
    )


def _road(folder: Path, log: str) -> RoadMap:
    files = sorted(folder.glob("log_map_archive_*.json"))
    if len(files) != 1:
        raise InputRejectedError(f"{log}: map", "must have one log_map_archive_*.json", len(files))
    where = f"{log}: {files[0].name}"
    try:
        content = json.loads(read_file(files[0]))
        segments = {str(key): segment for key, segment in content["lane_segments"].items()}
        lanes = [
            _lane(key, segment, segments, where) for key, segment in segments.items() if _for_cars(segment)
        ]
        areas = [
            Area(layer="roadblock", ring=_ring(area["area_boundary"], where))
            for area in content.get("drivable_areas", {}).values()
        ]
        areas += [
            Area(
                layer="crosswalk",
                ring=np.concatenate([_ring(c["edge1"], where), _ring(c["edge2"], where)[::-1]]),
            )
            for c in content.get("pedestrian_crossings", {}).values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, InputRejectedError):
            raise
        raise InputRejectedError(where, "must be a vector map", f"{type(error).__name__}: {error}") from None
    return make_road_map(lanes, areas)


def _for_cars(segment: Mapping[str, Any]) -> bool:
    return segment["lane_type"] in ("VEHICLE", "BUS")


def _lane(key: str, segment: Mapping[str, Any], segments: Mapping[str, Any], where: str) -> Lane:
    left, right = pair_borders(
        _ring(segment["left_lane_boundary"], where), _ring(segment["right_lane_boundary"], where)
    )
    return Lane(
        key=key,
        left=left,
        right=right,
        successors=tuple(str(number) for number in segment["successors"]),
        left_neighbour=_same_way(segment, segments.get(str(segment["left_neighbor_id"]))),
        right_neighbour=_same_way(segment, segments.get(str(segment["right_neighbor_id"]))),
        is_connector=bool(segment["is_intersection"]),
    )


def _same_way(segment: Mapping[str, Any], other: Mapping[str, Any] | None) -> str | None:
    if other is None or not _for_cars(other):
        return None
    ways = []
    for lane in (segment, other):
        line = lane["left_lane_boundary"]
        ways.append(math.atan2(line[-1]["y"] - line[0]["y"], line[-1]["x"] - line[0]["x"]))
    return str(other["id"]) if math.cos(ways[0] - ways[1]) > 0.0 else None


def _ring(points: Any, where: str) -> np.ndarray:
    ring = np.array([[point["x"], point["y"]] for point in points], dtype=np.float64)
    if len(ring) < 2 or not np.isfinite(ring).all():
        raise InputRejectedError(where, "boundaries must have finite points, at least 2")
    return ring


SENSOR_READER = Reader(units=sensor_units, read=read_sensor)
FORECASTING_READER = Reader(units=forecasting_units, read=read_forecasting)
