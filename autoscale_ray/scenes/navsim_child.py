"""The child process that turns NAVSIM's metric caches, synthetic scenes and submissions into plain arrays.

Facts of the formats: a metric cache is an xz-packed pickle of one `MetricCache`. Version 1 (NAVSIM branch v1.1)
holds polygons of the tracks for 51 steps of 0.1 s, version 2 (NAVSIM 2) the tracked objects of 41 steps, the past,
the human's future and the red lights of every step. Boxes keep their four corners front left, rear left, rear
right, front right. Enumerations are pickled as class and value, `PDMOccupancyMap` and its kin by their arguments.

Shape legend: A tracks, T steps of 0.1 s, n states, L objects of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from autoscale_ray.scenes import pickle_child
from autoscale_ray.scenes.navsim_pickle import (
    Record,
    Rings,
    argument,
    decode_wkb,
    items,
    load,
    number,
    take,
    text,
    whole,
)
from autoscale_ray.scenes.pickle_child import Refused

NUM_STEPS = {"v1": 51, "v2": 41}
_RED_LIGHT = "red_light"
_MAX_TRACKS = 20_000


def plain_file(content: bytes) -> object:
    """Return the plain values of a metric cache, a synthetic scene or a submission, with its ``kind``.

    Raises:
        Refused: With the reason.
    """
    root = load(content)
    if type(root).__name__ == "MetricCache" and isinstance(root, Record):
        return {"kind": "metric_cache", **_metric_cache(root)}
    if isinstance(root, dict) and "scene_metadata" in root:
        return {"kind": "synthetic_scene", **_synthetic_scene(root)}
    if isinstance(root, dict) and any(str(key).endswith("predictions") for key in root):
        return {"kind": "submission", **_submission(root)}
    raise Refused(f"neither metric cache, synthetic scene nor submission, but {type(root).__name__}")


serve = partial(pickle_child.serve, read=plain_file)


def _metric_cache(cache: Record) -> dict[str, object]:
    version = "v2" if "future_tracked_objects" in cache.state else "v1"
    observation = take(cache, "MetricCache", "observation")
    reference_us, reference = _ego_states(
        argument(take(cache, "MetricCache", "trajectory"), "InterpolatedTrajectory", 0)
    )
    times_us, states = _ego_states([take(cache, "MetricCache", "ego_state")])
    values: dict[str, object] = {
        "version": version,
        "vehicle": _vehicle(take(cache, "MetricCache", "ego_state")),
        "start_us": int(times_us[0]),
        "ego_state": states[0],
        "reference_times_us": reference_us,
        "reference_poses": reference[:, :3],
        "centreline": _poses(argument(take(cache, "MetricCache", "centerline"), "PDMPath", 0)),
        "route_lane_ids": [
            text(lane, "route lane")
            for lane in items(take(cache, "MetricCache", "route_lane_ids"), "route_lane_ids")
        ],
        **_map(take(cache, "MetricCache", "drivable_area_map")),
    }
    if version == "v1":
        return {**values, **_tracks_of_polygons(observation), **_lights([])}
    return {
        **values,
        **_tracks_of_objects(items(take(observation, "PDMObservation", "_detections_tracks"), "tracks")),
        **_lights(take(observation, "PDMObservation", "_occupancy_maps_tl") or []),
        **_past_and_human(cache),
        "log_name": text(take(cache, "MetricCache", "log_name"), "log_name"),
        "is_synthetic": whole(
            argument(take(cache, "MetricCache", "scene_type"), "SceneFrameType", 0), "scene_type"
        )
        == 1,
    }


def _past_and_human(cache: Record) -> dict[str, object]:
    past = argument(take(cache, "MetricCache", "past_human_trajectory"), "InterpolatedTrajectory", 0)
    past_us, past_states = _ego_states(past)
    human = take(cache, "MetricCache", "human_trajectory")
    poses = None if human is None else _numbers(take(human, "Trajectory", "poses"), "human_trajectory")
    return {"past_times_us": past_us, "past_states": past_states[:, :7], "human_poses": poses}


def _numbers(value: object, name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise Refused(f"{name} must be numbers")
    return array.astype(np.float64)


def _ego_states(states: object) -> tuple[np.ndarray, np.ndarray]:
    """Return times in us (n,) and rear-axle states (n, 11) in the scorer's order."""
    found = items(states, "states")
    if not found:
        raise Refused("no ego states")
    times = [whole(take(take(state, "EgoState", "_time_point"), "TimePoint", "time_us"), "time_us")
             for state in found]  # fmt: skip
    return np.array(times, dtype=np.int64), np.array([_ego_state(state) for state in found])


def _ego_state(state: object) -> list[float]:
    footprint = take(state, "EgoState", "_car_footprint")
    x, y, yaw = _pose(take(footprint, "CarFootprint", "_center"))
    _, front, rear, _ = _vehicle(state)
    shift = (front + rear) / 2.0 - rear
    motion = take(state, "EgoState", "_dynamic_car_state")
    velocity = _vector(take(motion, "DynamicCarState", "_rear_axle_velocity_2d"))
    acceleration = _vector(take(motion, "DynamicCarState", "_rear_axle_acceleration_2d"))
    steering = number(take(state, "EgoState", "_tire_steering_angle"), "steering angle")
    turning = [
        number(take(motion, "DynamicCarState", name), name)
        for name in ("_tire_steering_rate", "_angular_velocity", "_angular_acceleration")
    ]
    rear_axle = [x - shift * float(np.cos(yaw)), y - shift * float(np.sin(yaw)), yaw]
    return [*rear_axle, *velocity, *acceleration, steering, *turning]


def _vehicle(state: object) -> list[float]:
    """Return width, front length, rear length and wheel base."""
    vehicle = take(take(state, "EgoState", "_car_footprint"), "CarFootprint", "_vehicle_parameters")
    return [number(argument(vehicle, "VehicleParameters", place), "vehicle size") for place in (0, 1, 2, 4)]


def _pose(pose: object) -> list[float]:
    kind = "ProgressStateSE2" if type(pose).__name__ == "ProgressStateSE2" else "StateSE2"
    return [number(take(pose, kind, name), name) for name in ("x", "y", "heading")]


def _poses(path: object) -> np.ndarray:
    return np.array([_pose(pose) for pose in items(path, "centerline")]).reshape(-1, 3)


def _vector(vector: object) -> list[float]:
    return [number(take(vector, "StateVector2D", name), name) for name in ("_x", "_y")]


def _map(drivable: object) -> dict[str, object]:
    tokens, layers, polygons = (
        items(argument(drivable, "PDMDrivableMap", place), "drivable_area_map") for place in range(3)
    )
    if not len(tokens) == len(layers) == len(polygons):
        raise Refused("drivable_area_map with lists of different lengths")
    codes = [whole(argument(layer, "SemanticMapLayer", 0), "map layer") for layer in layers]
    return {
        "polygon_tokens": [text(token, "polygon token") for token in tokens],
        "polygon_layers": np.array(codes, dtype=np.int64),
        **_flat_rings("polygon", [decode_wkb(polygon) for polygon in polygons]),
    }


def _flat_rings(name: str, polygons: Sequence[Rings]) -> dict[str, object]:
    """Lay the rings of polygons end to end: vertices, sizes, polygon of each ring, and whether a hole."""
    rows = [
        (ring, polygon, place > 0)
        for polygon, parts in enumerate(polygons)
        for rings in parts
        for place, ring in enumerate(rings)
    ]
    return {
        f"{name}_xy": np.concatenate([np.zeros((0, 2)), *[row[0] for row in rows]]),
        f"{name}_ring_sizes": np.array([len(row[0]) for row in rows], dtype=np.int64),
        f"{name}_of_ring": np.array([row[1] for row in rows], dtype=np.int64),
        f"{name}_is_hole": np.array([row[2] for row in rows], dtype=bool),
    }


def _lights(steps: object) -> dict[str, object]:
    """Return the red connectors, their rings and the steps at which they are red."""
    number_of: dict[str, int] = {}
    polygons: list[Rings] = []
    red: list[tuple[int, int]] = []
    frames = items(steps, "traffic lights")[: NUM_STEPS["v2"]]
    for step, frame in enumerate(frames):
        parts = items(frame, "traffic lights")
        if len(parts) != 2:
            raise Refused("traffic lights must be pairs of tokens and polygons")
        for token, polygon in zip(items(parts[0], "tokens"), items(parts[1], "polygons"), strict=True):
            if text(token, "light") not in number_of:
                number_of[token] = len(polygons)
                polygons.append(decode_wkb(polygon))
            red.append((number_of[token], step))
    red_RT = np.zeros((len(polygons), NUM_STEPS["v2"]), dtype=bool)
    red_RT[tuple(np.array(red, dtype=np.int64).reshape(-1, 2).T)] = True
    return {"red_tokens": list(number_of), "red_steps": red_RT, **_flat_rings("red", polygons)}


class _TrackTable:
    """Boxes of tracks by step, filled one sighting after another; the first one gives size, type and speed."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._number_of: dict[str, int] = {}
        self._first: list[list[float]] = []
        self._seen: list[tuple[int, int, list[float]]] = []

    def see(self, token: str, step: int, pose: list[float], first: Callable[[], list[float]]) -> None:
        if token not in self._number_of:
            if len(self._number_of) >= _MAX_TRACKS:
                raise Refused(f"more than {_MAX_TRACKS} tracks")
            self._number_of[token] = len(self._first)
            self._first.append(first())
        self._seen.append((self._number_of[token], step, pose))

    def arrays(self) -> dict[str, object]:
        num_tracks = len(self._first)
        poses_AT3 = np.zeros((num_tracks, self._num_steps, 3))
        present_AT = np.zeros((num_tracks, self._num_steps), dtype=bool)
        for track, step, pose in self._seen:
            if present_AT[track, step]:
                raise Refused("a track that stands twice in one step")
            poses_AT3[track, step], present_AT[track, step] = pose, True
        return {
            "track_tokens": list(self._number_of),
            "track_first": np.array(self._first, dtype=np.float64).reshape(-1, 6),
            "track_poses": poses_AT3,
            "track_present": present_AT,
        }


def _object(tracked: object) -> tuple[str, Record]:
    """Return the track token of a tracked object and the object."""
    kind = type(tracked).__name__
    if kind not in ("Agent", "StaticObject", "SceneObject") or not isinstance(tracked, Record):
        raise Refused(f"{kind} where a tracked object must be")
    metadata = take(tracked, kind, "_metadata")
    return text(take(metadata, "SceneObjectMetadata", "track_token"), "track token"), tracked


def _first_sighting(tracked: Record) -> list[float]:
    """Return type code, length, width, height and velocity of an object; a static one has none."""
    kind = type(tracked).__name__
    code = whole(argument(take(tracked, kind, "_tracked_object_type"), "TrackedObjectType", 0), "type")
    box = take(tracked, kind, "_box")
    size = [number(take(box, "OrientedBox", name), name) for name in ("_length", "_width", "_height")]
    velocity = _vector(take(tracked, kind, "_velocity")) if kind == "Agent" else [0.0, 0.0]
    return [float(code), *size, *velocity]


def _frame_objects(frame: object) -> list[object]:
    tracked = take(take(frame, "DetectionsTracks", "tracked_objects"), "TrackedObjects", "tracked_objects")
    return items(tracked, "tracked objects")


def _tracks_of_objects(frames: Sequence[object]) -> dict[str, object]:
    num_steps = NUM_STEPS["v2"]
    if len(frames) < num_steps:
        raise Refused(f"{len(frames)} steps of tracked objects where {num_steps} must be")
    table = _TrackTable(num_steps)
    for step, frame in enumerate(frames[:num_steps]):
        for tracked in _frame_objects(frame):
            token, record = _object(tracked)
            box = take(record, type(record).__name__, "_box")
            table.see(
                token, step, _pose(take(box, "OrientedBox", "_center")), partial(_first_sighting, record)
            )
    return table.arrays()


def _tracks_of_polygons(observation: object) -> dict[str, object]:
    maps = items(take(observation, "PDMObservation", "_occupancy_maps"), "occupancy maps")
    objects = take(observation, "PDMObservation", "_unique_objects")
    num_steps = NUM_STEPS["v1"]
    if len(maps) < num_steps or not isinstance(objects, dict):
        raise Refused(f"{len(maps)} occupancy maps where {num_steps} must be")
    table = _TrackTable(num_steps)
    for step, occupancy in enumerate(maps[:num_steps]):
        tokens, polygons = (items(argument(occupancy, "PDMOccupancyMap", place), "map") for place in (0, 1))
        for token, polygon in zip(tokens, polygons, strict=True):
            if text(token, "track").startswith(_RED_LIGHT):
                continue
            if token not in objects:
                raise Refused(f"track {token[:40]} without an object")
            table.see(token, step, _box_pose(polygon), partial(_first_sighting, _object(objects[token])[1]))
    return table.arrays()


def _box_pose(polygon: object) -> list[float]:
    """Return centre and yaw of a box known by its corners."""
    parts = decode_wkb(polygon)
    corners = parts[0][0] if len(parts) == 1 and len(parts[0]) == 1 else np.zeros((0, 2))
    if len(corners) != 4:
        raise Refused(f"a track polygon of {len(corners)} corners where a box has 4")
    x, y = corners.mean(axis=0)
    along_x, along_y = corners[0] + corners[3] - corners[1] - corners[2]
    return [float(x), float(y), float(np.arctan2(along_y, along_x))]


def _submission(root: dict[Any, Any]) -> dict[str, object]:
    """Return [token, poses] of every prediction of a submission, both stages of a two-stage one together.

    A stage is one mapping; NAVSIM's merging of submissions puts that of every planner side by side.
    """
    found, num_merged = [], 0
    for key, parts in root.items():
        if not str(key).endswith("predictions"):
            continue
        num_merged = max(num_merged, len(items(parts, "predictions")))
        for part in items(parts, "predictions"):
            if not isinstance(part, dict):
                raise Refused("predictions must be mappings from token to trajectory")
            found += [
                [text(token, "token"), _numbers(take(value, "Trajectory", "poses"), "poses")]
                for token, value in part.items()
            ]
    return {"trajectories": found, "num_merged": num_merged}


def _synthetic_scene(root: dict[Any, Any]) -> dict[str, object]:
    """Return a synthetic scene with its extended tracks and lights as plain frames."""
    frames = root.get("frames")
    if not isinstance(frames, list) or not isinstance(root["scene_metadata"], dict):
        raise Refused("a synthetic scene must have a mapping scene_metadata and a list frames")
    kept = ("token", "timestamp", "roadblock_ids", "traffic_lights", "annotations", "ego_status")
    return {
        "scene_metadata": root["scene_metadata"],
        "frames": [
            {key: _frame_value(frame.get(key)) for key in kept} for frame in frames if isinstance(frame, dict)
        ],
        "extended_tracks": [_extended_frame(frame) for frame in root.get("extended_detections_tracks") or []],
        "extended_lights": [
            _extended_lights(frame) for frame in root.get("extended_traffic_light_data") or []
        ],
    }


def _frame_value(value: object) -> object:
    """Return a value of a frame; an array of objects becomes a list."""
    if isinstance(value, dict):
        return {key: _frame_value(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind == "O" else value


def _extended_frame(frame: object) -> list[list[object]]:
    """Return [token, type, length, width, height, vx, vy, x, y, yaw] of each object, in map axes."""
    rows = []
    for tracked in _frame_objects(frame):
        token, record = _object(tracked)
        center = take(take(record, type(record).__name__, "_box"), "OrientedBox", "_center")
        rows.append([token, *_first_sighting(record), *_pose(center)])
    return rows


def _extended_lights(frame: object) -> list[list[object]]:
    """Return [connector, is red] of each light."""
    lights = items(take(frame, "TrafficLightStatuses", "traffic_lights"), "traffic lights")
    return [
        [
            _connector(take(light, "TrafficLightStatusData", "lane_connector_id")),
            whole(argument(take(light, "TrafficLightStatusData", "status"), "TrafficLightStatusType", 0), "status")
            == 2,
        ]
        for light in lights
    ]  # fmt: skip


def _connector(value: object) -> int:
    """Return the id of a lane connector, a number or its digits: logs and nuPlan's maps write it either way."""
    return (
        int(value)
        if isinstance(value, str) and value.isdecimal() and len(value) < 19
        else whole(value, "lane_connector_id")
    )
