"""Read ScenarioNet scenario descriptions (.pkl; nuScenes, Waymo, nuPlan and others converted by it).

Facts of the format: ten frames a second; ``state`` holds position, heading, velocity, length, width and valid
by frame; the recording car is ``metadata.sdc_id``. In nuScenes conversions its position is the rear axle (as
nuScenes' ego pose is), its length and width are exchanged, velocities are 0 where unknown (so poses are
differenced), and lanes have no links (so they are joined where ends meet).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import (
    REAR_AXLE_TO_CENTER_SHARE,
    Recording,
    Track,
    gather_tracks,
    no_lights,
)
from autoscale_ray.scenes.road_map import (
    Area,
    Lane,
    RoadMap,
    direction,
    is_apart,
    make_road_map,
    offset_borders,
)
from autoscale_ray.scenes.safe_pickle import read_pickle
from autoscale_ray.scenes.trust import member_names

LANE_WIDTH_M = 4.0
JOINT_M = 0.5
JOINT_ANGLE_RAD = math.radians(40.0)
NEIGHBOUR_M = (2.0, 5.0)
_NOT_SCENARIOS = ("dataset_summary.pkl", "dataset_mapping.pkl")
_KINDS = {
    "VEHICLE": "vehicle",
    "PEDESTRIAN": "pedestrian",
    "CYCLIST": "bicycle",
    "TRAFFIC_CONE": "traffic_cone",
    "TRAFFIC_BARRIER": "barrier",
}


def units(path: Path) -> list[str]:
    """Return the names of the scenario pickles."""
    return [name for name in member_names(path, ".pkl") if Path(name).name not in _NOT_SCENARIOS]


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one scenario file.

    Raises:
        InputRejectedError: The pickle is refused, or an element of the description is missing or malformed.
    """
    yield recording_of(read_pickle(path, name), name)


def recording_of(scenario: Any, name: str) -> Recording:
    """Turn a scenario description into a recording.

    Args:
        scenario: Plain values of the pickle.
        name: File name for messages.

    Raises:
        InputRejectedError: An element is missing or malformed.
    """
    try:
        return _recording(scenario, name)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, InputRejectedError):
            raise
        rule = "must be a scenario description"
        raise InputRejectedError(name, rule, f"{type(error).__name__}: {error}") from None


def _recording(scenario: Any, name: str) -> Recording:
    metadata, tracks, features = (
        _mapping(scenario, key, name) for key in ("metadata", "tracks", "map_features")
    )
    rate = metadata.get("sample_rate", 0.1)
    interval_s = float(rate) if 0.01 <= float(rate) <= 0.5 else 0.1
    dataset = str(metadata.get("dataset", "unknown"))
    recorder = str(metadata.get("sdc_id"))
    found = [
        _track(number, key, value, dataset, recorder, name)
        for number, (key, value) in enumerate(tracks.items())
    ]
    road = _road(features, name)
    scene = str(scenario.get("id") or Path(name).stem)
    return Recording(
        name=scene,
        log_id=f"scenarionet/{dataset}/{scene}",
        source=f"scenarionet/{dataset}",
        tracks=gather_tracks([track for track in found if track is not None]),
        frame_interval_s=interval_s,
        road=road,
        red_FL=_red_lights(scenario.get("dynamic_map_states"), road, int(scenario.get("length") or 0)),
        tags=(str(metadata.get("map")),) if metadata.get("map") else (),
    )


def _mapping(value: Any, key: str, name: str) -> Mapping[Any, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise InputRejectedError(f"{name}: {key}", "must be a mapping")
    return found


def _track(number: int, key: object, value: Any, dataset: str, recorder: str, name: str) -> Track | None:
    where = f"{name}: track {key}"
    state = _mapping(value, "state", where)
    valid = _values(state, "valid", where, 1)[:, 0] > 0
    columns = [
        _values(state, field, where, width)
        for field, width in (("position", 2), ("heading", 1), ("velocity", 2))
    ]
    if len({len(valid), *map(len, columns)}) != 1:
        raise InputRejectedError(where, "states must have one length")
    if not valid.any():
        return None
    position, heading, velocity = (column[valid] for column in columns)
    length, width = (_size(state, field, valid, where) for field in ("length", "width"))
    kind = _KINDS.get(str(value.get("type")), "generic_object")
    is_recorder = str(key) == recorder
    if kind == "vehicle" and length < width:
        length, width = width, length
    if is_recorder and dataset == "nuscenes":
        forward = np.column_stack([np.cos(heading[:, 0]), np.sin(heading[:, 0])])
        position = position + REAR_AXLE_TO_CENTER_SHARE * length * forward
    return Track(
        key=number,
        kind=kind,
        length_m=length,
        width_m=width,
        frames=np.flatnonzero(valid),
        poses=np.column_stack([position, heading]),
        velocities=None if dataset == "nuscenes" else velocity,
        can_be_ego=kind == "vehicle",
        is_recorder=is_recorder,
    )


def _values(state: Mapping[Any, Any], field: str, where: str, width: int) -> np.ndarray:
    """Return a state column as (T, width) numbers, further columns dropped."""
    array = np.asarray(state.get(field))
    if array.dtype.kind not in "biuf" or array.ndim not in (1, 2):
        raise InputRejectedError(where, f"{field} must be an array of numbers")
    array = array.reshape(len(array), array.shape[1] if array.ndim > 1 else 1).astype(np.float64)
    if array.shape[1] < width:
        raise InputRejectedError(where, f"{field} must have {width} columns", array.shape[1])
    return array[:, :width]


def _size(state: Mapping[Any, Any], field: str, valid: np.ndarray, where: str) -> float:
    values = _values(state, field, where, 1)[:, 0]
    sane = values[(values > 0.0) & (valid if len(values) == len(valid) else True)]
    return float(np.median(sane)) if len(sane) else 0.0


def _road(features: Mapping[Any, Any], name: str) -> RoadMap:
    lines = {
        str(key): value
        for key, value in features.items()
        if isinstance(value, dict)
        and str(value.get("type")).startswith("LANE")
        and "BIKE" not in str(value.get("type"))
    }
    centers = {key: _points(value, "polyline", f"{name}: {key}") for key, value in lines.items()}
    centers = {key: center for key, center in centers.items() if len(center) >= 2}
    rings = {
        key: _points(lines[key], "polygon", f"{name}: {key}") for key in centers if "polygon" in lines[key]
    }
    following = _following(centers) if not any("exit_lanes" in value for value in lines.values()) else {}
    beside = _beside({key: center for key, center in centers.items() if not rings or key in rings})
    lanes, areas = [], []
    for key, center in centers.items():
        has_ring = key in rings and len(rings[key]) >= 3
        left, right = offset_borders(center, LANE_WIDTH_M / 2.0, LANE_WIDTH_M / 2.0)
        exits = lines[key].get("exit_lanes")
        exits = following.get(key, []) if exits is None or len(exits) == 0 else exits
        lanes.append(
            Lane(
                key=key,
                left=left,
                right=right,
                center=center,
                successors=tuple(map(str, exits)),
                left_neighbour=beside.get(key),
                # Where a source has polygons for its lanes, the lanes without one run through intersections.
                is_connector=(not has_ring) if rings else None,
                has_border=not has_ring,
            )
        )
        if has_ring:
            areas += [Area(layer=layer, ring=rings[key], lane=key) for layer in ("lane", "roadblock")]
    areas += [
        Area(layer="crosswalk", ring=_points(value, "polygon", f"{name}: {key}"))
        for key, value in features.items()
        if isinstance(value, dict) and value.get("type") == "CROSSWALK" and np.ndim(value.get("polygon")) == 2  # pyright: ignore[reportArgumentType]
    ]
    return make_road_map(lanes, areas)


def _points(feature: Mapping[Any, Any], field: str, where: str) -> np.ndarray:
    points = np.asarray(feature.get(field))
    if points.ndim != 2 or points.dtype.kind not in "iuf" or points.shape[1] < 2:
        raise InputRejectedError(where, f"{field} must be an array of points")
    points = points[:, :2].astype(np.float64)
    if not np.isfinite(points).all():
        raise InputRejectedError(where, f"{field} must be finite")
    if field == "polyline":
        return points[is_apart(points)]
    closed = len(points) > 1 and np.array_equal(points[0], points[-1])
    return points[:-1] if closed else points


def _following(centers: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Join lanes whose end and start meet within `JOINT_M` in about one direction."""
    if not centers:
        return {}
    keys = list(centers)
    ends, starts = (np.array([centers[key][at] for key in keys]) for at in (-1, 0))
    leave = np.array([direction(centers[key][-2:]) for key in keys])
    enter = np.array([direction(centers[key][:2]) for key in keys])
    near = np.linalg.norm(ends[:, None] - starts[None], axis=2) <= JOINT_M
    aligned = np.abs(wrap_angle(leave[:, None] - enter[None])) <= JOINT_ANGLE_RAD
    joined = near & aligned & ~np.eye(len(keys), dtype=bool)
    return {keys[row]: [keys[k] for k in np.flatnonzero(joined[row])] for row in range(len(keys))}


def _beside(centers: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Find the left neighbour of each lane: one in the same direction whose start and end lie beside its
    own."""
    if not centers:
        return {}
    keys = list(centers)
    starts, ends = (np.array([centers[key][at] for key in keys]) for at in (0, -1))
    heading = np.array([direction(centers[key][[0, -1]]) for key in keys])
    normal = np.column_stack([-np.sin(heading), np.cos(heading)])
    forward = np.column_stack([np.cos(heading), np.sin(heading)])
    beside = np.abs(wrap_angle(heading[:, None] - heading[None])) <= math.radians(15.0)
    for points in (starts, ends):
        offset = points[None] - points[:, None]
        across = np.einsum("abk,ak->ab", offset, normal)
        along = np.abs(np.einsum("abk,ak->ab", offset, forward))
        beside &= (across >= NEIGHBOUR_M[0]) & (across <= NEIGHBOUR_M[1]) & (along <= 8.0)
    return {keys[row]: keys[int(np.argmax(beside[row]))] for row in np.flatnonzero(beside.any(axis=1))}


def _red_lights(states: Any, road: RoadMap, num_frames: int) -> np.ndarray | None:
    if not isinstance(states, dict) or not states or num_frames < 1:
        return None
    number = road.lane_number
    lights = [
        (str(light.get("lane", key)), light) for key, light in states.items() if isinstance(light, dict)
    ]
    red = [(number[lane], _is_red(light)) for lane, light in lights if lane in number]
    # What the file says of its length need not be so.
    red_FL = no_lights(road, min(num_frames, max((1, *(len(red_F) for _, red_F in red)))))
    for lane, red_F in red:
        red_F = red_F[: len(red_FL)]
        red_FL[: len(red_F), lane] = red_F
    return red_FL


def _is_red(light: Mapping[Any, Any]) -> list[bool]:
    values = light.get("state", {}).get("object_state")
    states = values if isinstance(values, (list, np.ndarray)) else []
    return ["RED" in str(state) or "STOP" in str(state) for state in states]


READER = Reader(units=units, read=read)
