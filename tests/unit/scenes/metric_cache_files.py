"""Write files in the documented layout of NAVSIM: metric caches of both versions, synthetic scenes, submissions.

The classes carry the module names, attribute names and ways of pickling that nuPlan's and NAVSIM's classes have, and
nothing else; they are importable under those names only while something is pickled.
"""

from __future__ import annotations

import enum
import itertools
import lzma
import pathlib
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import shapely

TYPES = ("VEHICLE", "PEDESTRIAN", "BICYCLE", "TRAFFIC_CONE", "BARRIER", "CZONE_SIGN", "GENERIC_OBJECT", "EGO")
LAYERS = {"LANE": 0, "INTERSECTION": 1, "LANE_CONNECTOR": 11, "CARPARK_AREA": 15, "ROADBLOCK": 17}
LAYER_OF_CODE = ("ROADBLOCK", "LANE", "LANE_CONNECTOR", "INTERSECTION", "CARPARK_AREA")
PACIFICA = (1.1485 * 2.0, 4.049, 1.127, 1.67, 3.089, "pacifica", "gen1", 1.777)
REAR_AXLE_TO_CENTER_M = 5.176 / 2 - 1.127

_STATE = "nuplan.common.actor_state."
_PDM = "navsim.planning.simulation.planner.pdm_planner."
_MODULES = {
    "TimePoint": _STATE + "state_representation",
    "StateSE2": _STATE + "state_representation",
    "StateVector2D": _STATE + "state_representation",
    "EgoState": _STATE + "ego_state",
    "CarFootprint": _STATE + "car_footprint",
    "OrientedBox": _STATE + "oriented_box",
    "DynamicCarState": _STATE + "dynamic_car_state",
    "VehicleParameters": _STATE + "vehicle_parameters",
    "Agent": _STATE + "agent",
    "StaticObject": _STATE + "static_object",
    "SceneObjectMetadata": _STATE + "scene_object",
    "TrackedObjects": _STATE + "tracked_objects",
    "TrackedObjectType": _STATE + "tracked_objects_types",
    "SemanticMapLayer": "nuplan.common.maps.maps_datatypes",
    "TrafficLightStatusType": "nuplan.common.maps.maps_datatypes",
    "TrafficLightStatusData": "nuplan.common.maps.maps_datatypes",
    "TrafficLightStatuses": "nuplan.common.maps.maps_datatypes",
    "DetectionsTracks": "nuplan.planning.simulation.observation.observation_type",
    "InterpolatedTrajectory": "nuplan.planning.simulation.trajectory.interpolated_trajectory",
    "TrajectorySampling": "nuplan.planning.simulation.trajectory.trajectory_sampling",
    "Trajectory": "navsim.common.dataclasses",
    "SceneFrameType": "navsim.common.enums",
    "MetricCache": "navsim.planning.metric_caching.metric_cache",
    "MapParameters": "navsim.planning.metric_caching.metric_cache",
    "PDMObservation": _PDM + "observation.pdm_observation",
    "PDMOccupancyMap": _PDM + "observation.pdm_occupancy_map",
    "PDMDrivableMap": _PDM + "observation.pdm_occupancy_map",
    "PDMPath": _PDM + "utils.pdm_path",
}
_BY_ARGUMENTS = (
    "VehicleParameters",
    "InterpolatedTrajectory",
    "PDMOccupancyMap",
    "PDMDrivableMap",
    "PDMPath",
)
_ENUMS: dict[str, Any] = {
    "TrackedObjectType": enum.IntEnum("TrackedObjectType", {name: code for code, name in enumerate(TYPES)}),
    "SemanticMapLayer": enum.IntEnum("SemanticMapLayer", LAYERS),
    "SceneFrameType": enum.IntEnum("SceneFrameType", {"ORIGINAL": 0, "SYNTHETIC": 1}),
    "TrafficLightStatusType": enum.IntEnum("TrafficLightStatusType", {"GREEN": 0, "YELLOW": 1, "RED": 2}),
}


def _by_arguments(self: Any, _: object) -> tuple[type, tuple[Any, ...]]:
    return type(self), self.arguments


def _class(name: str) -> type:
    if name in _ENUMS:
        return _ENUMS[name]
    return type(name, (), {"__reduce_ex__": _by_arguments} if name in _BY_ARGUMENTS else {})


CLASSES: dict[str, Any] = {name: _class(name) for name in _MODULES}
for _name, _module in _MODULES.items():
    CLASSES[_name].__module__ = _module


def make(kind: str, *arguments: object, **state: object) -> Any:
    """Return an object of a class with arguments (for those pickled by them) or attributes."""
    made = object.__new__(CLASSES[kind])
    made.__dict__.update(state)
    if kind in _BY_ARGUMENTS:
        made.arguments = arguments
    return made


@contextmanager
def importable(classes: Mapping[str, type] = CLASSES) -> Iterator[None]:
    """Make the classes importable under their own module names."""
    modules: dict[str, types.ModuleType] = {}
    for name, found in classes.items():
        parts = found.__module__.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            modules.setdefault(path, types.ModuleType(path))
        setattr(modules[found.__module__], name, found)
    before = {path: sys.modules.get(path) for path in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for path, module in before.items():
            if module is None:
                del sys.modules[path]
            else:
                sys.modules[path] = module


def dumps(value: object) -> bytes:
    with importable():
        return pickle.dumps(value, protocol=5)


def packed(value: object) -> bytes:
    return lzma.compress(dumps(value), preset=0)


def pose(x: float, y: float, yaw: float) -> Any:
    return make("StateSE2", x=x, y=y, heading=yaw)


def vector(x: float, y: float) -> Any:
    return make("StateVector2D", _x=x, _y=y, _array=np.array([x, y]))


def ego_state(time_us: int, state: np.ndarray) -> Any:
    """Return an ego state from rear axle x, y, yaw, vx, vy, ax, ay; nuPlan keeps the box centre."""
    x, y, yaw, vx, vy, ax, ay = (float(value) for value in state)
    shift = REAR_AXLE_TO_CENTER_M
    center = pose(x + shift * np.cos(yaw), y + shift * np.sin(yaw), yaw)
    vehicle = make("VehicleParameters", *PACIFICA)
    sizes = {"_length": 5.176, "_width": PACIFICA[0], "_height": PACIFICA[-1]}
    cached = {"rear_axle": pose(x, y, yaw), "geometry": shapely.box(x - 1, y - 1, x + 1, y + 1)}
    return make(
        "EgoState",
        _car_footprint=make("CarFootprint", _center=center, _vehicle_parameters=vehicle, **sizes, **cached),
        _dynamic_car_state=make(
            "DynamicCarState",
            _rear_axle_to_center_dist=shift,
            _angular_velocity=0.0,
            _angular_acceleration=0.0,
            _rear_axle_velocity_2d=vector(vx, vy),
            _rear_axle_acceleration_2d=vector(ax, ay),
            _tire_steering_rate=0.0,
        ),
        _tire_steering_angle=0.0,
        _is_in_auto_mode=True,
        _time_point=make("TimePoint", time_us=int(time_us)),
    )


def corners(x: float, y: float, yaw: float, length: float, width: float) -> shapely.Polygon:
    """Return a box as nuPlan draws it: front left, rear left, rear right, front right."""
    along, left = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    center = np.array([x, y])
    return shapely.Polygon([center + a * along * length / 2 + b * left * width / 2 for a, b in signs])


def tracked(kind: int, token: str, box: tuple[float, ...], size: np.ndarray, velocity: np.ndarray) -> Any:
    x, y, yaw = (float(value) for value in box)
    length, width, height = (float(value) for value in size)
    oriented = make(
        "OrientedBox", _center=pose(x, y, yaw), _length=length, _width=width, _height=height,
        geometry=corners(x, y, yaw, length, width),
    )  # fmt: skip
    common = {
        "_metadata": make(
            "SceneObjectMetadata", timestamp_us=0, token=token, track_id=None, track_token=token
        ),
        "instance_token": None,
        "_tracked_object_type": _ENUMS["TrackedObjectType"](kind),
        "_box": oriented,
    }
    if kind > 2:
        return make("StaticObject", **common)
    motion = {"_velocity": vector(*map(float, velocity)), "_angular_velocity": None}
    past = {
        "_predictions": None,
        "_past_trajectory": None,
        "_initial_time_stamp": make("TimePoint", time_us=0),
    }
    return make("Agent", **common, **motion, **past)


def tracks_at_10_hz(
    states_AF5: np.ndarray, mask_AF: np.ndarray, num_steps: int
) -> list[list[tuple[int, np.ndarray]]]:
    """Return (agent, state) of every step: linear between sightings; one seen once stands at all steps."""
    frames: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(num_steps)]
    num_frames = (num_steps - 1) // 5 + 1
    for agent, (states, mask) in enumerate(
        zip(states_AF5[:, :num_frames], mask_AF[:, :num_frames], strict=True)
    ):
        seen = np.flatnonzero(mask)
        if not len(seen):
            continue
        steps = np.arange(num_steps) if len(seen) == 1 else np.arange(5 * seen[0], 5 * seen[-1] + 1)
        columns = states[seen].copy()
        columns[:, 2] = np.unwrap(columns[:, 2])
        between = np.stack([np.interp(steps / 5, seen, column) for column in columns.T], axis=1)
        for step, state in zip(steps, between, strict=True):
            frames[step].append((agent, state))
    return frames


def detections(frame: list[tuple[int, np.ndarray]], kinds: np.ndarray, sizes: np.ndarray) -> Any:
    found = [
        tracked(int(kinds[agent]), f"track{agent:04d}", tuple(state[:3]), sizes[agent], state[3:])
        for agent, state in frame
    ]
    return make("DetectionsTracks", tracked_objects=make("TrackedObjects", tracked_objects=found))


def observation(version: str, scene: Mapping[str, np.ndarray], polygons: list[Any]) -> Any:
    num_steps = 51 if version == "v1" else 41
    frames = [
        detections(frame, scene["agent_type"], scene["agent_dims"])
        for frame in tracks_at_10_hz(scene["agent_states"], scene["agent_mask"], num_steps)
    ]
    unique: dict[str, Any] = {}
    for frame in frames:
        for found in frame.tracked_objects.tracked_objects:
            unique.setdefault(found._metadata.track_token, found)
    lights = [_lights(scene, polygons, step // 5) for step in range(num_steps)]
    maps = []
    for frame, (tokens, rings) in zip(frames, lights, strict=True):
        found = frame.tracked_objects.tracked_objects
        extra = ([], []) if version == "v1" else (tokens, list(rings))
        shapes = [item._box.geometry for item in found] + extra[1]
        names = [item._metadata.track_token for item in found] + extra[0]
        maps.append(make("PDMOccupancyMap", names, _objects(shapes) if extra[0] else shapes, 10))
    state = {"_occupancy_maps": maps, "_unique_objects": unique, "_initialized": True, "_map_radius": 100}
    if version == "v2":
        state |= {"_detections_tracks": frames, "_occupancy_maps_tl": lights}
    return make("PDMObservation", _sample_interval=0.1, _collided_track_ids=[], **state)


def _lights(scene: Mapping[str, np.ndarray], polygons: list[Any], frame: int) -> tuple[list[str], Any]:
    red = np.flatnonzero(scene["poly_red"][:, frame] & scene["poly_on_route"])
    return [f"red_light_{index}" for index in red], _objects([polygons[index] for index in red])


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def metric_cache(
    version: str,
    scene: Mapping[str, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    token: str = "token",
    polygons: list[Any] | None = None,
) -> Any:
    """Return a metric cache of a golden scene.

    Args:
        version: v1 or v2.
        scene: Arrays of one scene, named as in the golden inputs.
        reference: Times (n,) in us and poses (n, 3) of PDM-Closed.
        token: Name of the scene.
        polygons: Map polygons in place of the scene's own.
    """
    start_us = int(scene["hist_t_us"][-1])
    rings = polygons or rings_of(scene)
    layers = [_ENUMS["SemanticMapLayer"](LAYERS[LAYER_OF_CODE[code]]) for code in scene["poly_layer"]]
    tokens = [str(index) for index in range(len(rings))]
    states = [ego_state(time, np.array([*point, 0, 0, 0, 0])) for time, point in zip(*reference, strict=True)]
    fields: dict[str, Any] = {
        "file_path": pathlib.PurePosixPath("/exp/metric_cache/log/unknown") / token / "metric_cache.pkl",
        "trajectory": make("InterpolatedTrajectory", states),
        "ego_state": ego_state(start_us, scene["hist_states"][-1]),
        "observation": observation(version, scene, rings),
        "centerline": make("PDMPath", [pose(*map(float, point)) for point in scene["cl_xyh"]]),
        "route_lane_ids": [tokens[index] for index in np.flatnonzero(scene["poly_on_route"])],
        "drivable_area_map": make("PDMDrivableMap", tokens, layers, rings, 10),
    }
    if version == "v2":
        fields |= _v2_fields(scene, fields["observation"])
    return make("MetricCache", **fields)


def rings_of(scene: Mapping[str, np.ndarray]) -> list[Any]:
    """Return the map polygons of a golden scene."""
    offsets, xy = scene["poly_offsets"], scene["poly_xy"]
    return [shapely.Polygon(xy[low:high]) for low, high in itertools.pairwise(offsets)]


def _v2_fields(scene: Mapping[str, np.ndarray], observed: Any) -> dict[str, Any]:
    past = [
        ego_state(time, state) for time, state in zip(scene["hist_t_us"], scene["hist_states"], strict=True)
    ]
    sampling = make("TrajectorySampling", num_poses=8, time_horizon=4.0, interval_length=0.5)
    return {
        "log_name": "2021.06.09.17.23.18_veh-38_00773_01140",
        "timepoint": make("TimePoint", time_us=int(scene["hist_t_us"][-1])),
        "scene_type": _ENUMS["SceneFrameType"](0),
        "human_trajectory": make("Trajectory", poses=scene["human_poses"], trajectory_sampling=sampling),
        "past_human_trajectory": make("InterpolatedTrajectory", past),
        "past_detections_tracks": observed._detections_tracks[:1],
        "current_tracked_objects": observed._detections_tracks[:1],
        "future_tracked_objects": observed._detections_tracks[1:],
        "map_parameters": make("MapParameters", map_root="maps", map_version="v1", map_name="sg-one-north"),
    }


def golden_arrays(inputs: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """Return the arrays of one golden scene."""
    agents, rings = inputs["agent_scene"] == row, np.flatnonzero(inputs["poly_scene"] == row)
    low, high = rings[0], rings[-1] + 1
    offsets = inputs["poly_offsets"][low : high + 1]
    first, last = inputs["cl_offsets"][row : row + 2]
    return {
        **{name: inputs[name][row] for name in ("hist_t_us", "hist_states", "human_poses")},
        **{name: inputs[name][agents] for name in ("agent_type", "agent_dims", "agent_states", "agent_mask")},
        **{name: inputs[name][low:high] for name in ("poly_layer", "poly_on_route", "poly_red")},
        "poly_offsets": offsets - offsets[0],
        "poly_xy": inputs["poly_xy"][offsets[0] : offsets[-1]],
        "cl_xyh": inputs["cl_xyh"][first:last],
    }


def golden_reference(
    outputs: Mapping[str, np.ndarray], place: int, start_us: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return PDM-Closed of a golden scene at the times at which the official code sampled it, and 1 s more."""
    sampled_us = ((np.arange(0.0, 4.1, 0.1)[:41] + start_us * 1e-6) * 1e6).astype(np.int64)
    times_us = np.maximum(sampled_us, start_us)
    poses = outputs["pdm_poses"][place]
    later = np.arange(1, 11)
    return (
        np.concatenate([times_us, times_us[-1] + 100_000 * later]),
        np.concatenate([poses, poses[-1] + later[:, None] * (poses[-1] - poses[-2])]),
    )


def write_cache(folder: Path, token: str, content: bytes, log: str = "log") -> Path:
    """Write a cache file where NAVSIM would."""
    path = folder / log / "unknown" / token / "metric_cache.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path
