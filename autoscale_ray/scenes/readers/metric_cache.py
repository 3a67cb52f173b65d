"""Read NAVSIM's metric caches, versions 1 and 2: one packed pickle a scene, `<log>/unknown/<token>/metric_cache.pkl`.

The child process of `navsim_child` takes the pickle apart; this module checks what came back and brings it into
the order of the scorer. A map polygon becomes one closed chain of vertices: its outer ring, and for every hole or
further part a way there and the same way back, which even-odd tests do not see.

Shape legend: A tracks, T steps of 0.1 s (51 or 41), G polygons, R red polygons, V vertices, n reference states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.safe_pickle import PickleReader
from autoscale_ray.scenes.schema import AGENT_TYPES, POLYGON_LAYERS
from autoscale_ray.scenes.trust import member_names, read_member

FILE_NAME = "metric_cache.pkl"
CHILD = "autoscale_ray.scenes.navsim_child"
MAX_SPEED_MPS = 75.0
MAX_HISTORY_US = 60_000_000
HORIZON_US = 4_000_000
_TIME_SLACK_US = 10
_SAME_STATE = 1e-6
_EGO_TYPE = 7
_LAYERS = {
    17: "roadblock", 0: "lane", 11: "lane_connector", 1: "intersection", 15: "carpark_area", 5: "carpark_area",
}  # fmt: skip
"""nuPlan's map layers that the scorer reads; its layer 5, drivable area, counts as a car park does."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MetricCache:
    """What one metric cache holds, in map coordinates (m, s, rad; float64)."""

    token: str
    """Name of the scene: of the cache's folder."""
    version: str
    """``v1`` or ``v2``; each gives its own score and not the other."""
    log_name: str
    is_synthetic: bool
    vehicle: tuple[float, float, float, float]
    """Width, length ahead of and behind the rear axle, wheel base."""
    start_us: int
    ego_state: np.ndarray
    """(11,) rear axle x, y, yaw, vx, vy, ax, ay, steering angle and rate, yaw rate and acceleration."""
    past_times_us: np.ndarray | None
    past_states: np.ndarray | None
    """(4, 7) the first seven of the state above; version 2."""
    human_poses: np.ndarray | None
    """(8, 3) relative to the rear axle; version 2, original scenes."""
    reference_times_us: np.ndarray
    reference_poses: np.ndarray
    """(n, 3) PDM-Closed, rear axle."""
    centreline: np.ndarray
    """(C, 3)."""
    polygon_layer: np.ndarray
    """(G,) codes of POLYGON_LAYERS."""
    polygon_on_route: np.ndarray
    polygon_offsets: np.ndarray
    polygon_xy: np.ndarray
    """(V, 2) closed chains for even-odd tests; see the module."""
    red_steps: np.ndarray
    """(R, T)."""
    red_offsets: np.ndarray
    red_xy: np.ndarray
    track_type: np.ndarray
    """(A,) codes of AGENT_TYPES."""
    track_size: np.ndarray
    """(A, 3) length, width, height."""
    track_velocity: np.ndarray
    """(A, 2) at the first sighting, map axes; NaN where the log has none."""
    track_poses: np.ndarray
    """(A, T, 3) box centre and yaw; 0 where not present."""
    track_present: np.ndarray
    """(A, T)."""


def cache_names(path: Path) -> dict[str, str]:
    """Return the cache files of a folder, a zip archive or one file, by the token of their scene.

    Raises:
        InputRejectedError: No cache there, or two of one scene.
    """
    names: dict[str, str] = {}
    for name in member_names(path, ".pkl"):
        if Path(name).name != FILE_NAME:
            continue
        token = Path(name).parent.name or path.resolve().parent.name
        if token in names:
            raise InputRejectedError(f"{path}: {name}", "must be the only cache of its scene", names[token])
        names[token] = name
    if not names:
        raise InputRejectedError(str(path), f"must hold files {FILE_NAME}")
    return names


def open_reader() -> PickleReader:
    """Return a reader whose child understands NAVSIM's pickles."""
    return PickleReader(child=CHILD)


def read_metric_cache(reader: PickleReader, path: Path, name: str, token: str) -> MetricCache:
    """Read and check one metric cache.

    Args:
        reader: Result of `open_reader`.
        path: Folder, archive or file.
        name: Member, as `cache_names` gives it.
        token: Name of the scene.

    Raises:
        InputRejectedError: Naming the file and the rule.
    """
    where = str(path / name) if path.is_dir() else str(path)
    values = reader.read(read_member(path, name), where)
    if values.get("kind") != "metric_cache":
        raise InputRejectedError(where, "must be a metric cache", values.get("kind"))
    return metric_cache(values, token, where)


def metric_cache(values: Mapping[str, Any], token: str, where: str) -> MetricCache:
    """Check the plain values of a metric cache and order them; see `read_metric_cache`."""
    _check_ego(values, where)
    _check_reference(values, where)
    _check_tracks(values, where)
    known = np.array([int(code) in _LAYERS for code in values["polygon_layers"]], dtype=bool)
    chains = _chains(values, "polygon", len(known))
    known &= np.diff(chains[0]) > 0
    layers = np.array([POLYGON_LAYERS.index(_LAYERS.get(int(code), "lane")) for code in values["polygon_layers"]],
                      dtype=np.int64)  # fmt: skip
    is_lane = np.isin(layers, [POLYGON_LAYERS.index(name) for name in ("lane", "lane_connector")])
    named = np.isin(np.array(values["polygon_tokens"], dtype=str), values["route_lane_ids"])
    offsets, xy = _kept(chains, known)
    red_of_part, red_offsets, red_xy = _red_parts(values, where)
    for name, points in (("drivable_area_map", xy), ("traffic lights", red_xy)):
        _require(bool(np.isfinite(points).all()), f"{where}: {name}", "must be finite")
    first = values["track_first"]
    return MetricCache(
        token=token,
        version=values["version"],
        log_name=values.get("log_name", ""),
        is_synthetic=values.get("is_synthetic", False),
        vehicle=tuple(values["vehicle"]),
        start_us=values["start_us"],
        ego_state=values["ego_state"],
        past_times_us=values.get("past_times_us"),
        past_states=values.get("past_states"),
        human_poses=values.get("human_poses"),
        reference_times_us=values["reference_times_us"],
        reference_poses=values["reference_poses"],
        centreline=values["centreline"],
        polygon_layer=layers[known],
        polygon_on_route=(named & is_lane)[known],
        polygon_offsets=offsets,
        polygon_xy=xy,
        red_steps=values["red_steps"][red_of_part],
        red_offsets=red_offsets,
        red_xy=red_xy,
        track_type=np.where(first[:, 0] == _EGO_TYPE, 0, first[:, 0]).astype(np.int64),
        track_size=first[:, 1:4],
        track_velocity=first[:, 4:6],
        track_poses=values["track_poses"],
        track_present=values["track_present"],
    )


def _require(holds: bool, where: str, rule: str, value: object = None) -> None:
    if not holds:
        raise InputRejectedError(where, rule, value)


def _check_ego(values: Mapping[str, Any], where: str) -> None:
    state, place = values["ego_state"], f"{where}: ego_state"
    _require(bool(np.isfinite(state).all()), place, "must be finite")
    speed = float(np.hypot(state[3], state[4]))
    _require(speed <= MAX_SPEED_MPS, place, f"speed must be at most {MAX_SPEED_MPS:.0f} m/s", speed)
    sizes = np.array(values["vehicle"])
    _require(bool((np.isfinite(sizes) & (sizes > 0)).all()), place, "vehicle sizes must be positive")
    line = values["centreline"]
    _require(
        len(line) >= 2 and bool(np.isfinite(line).all()), f"{where}: centerline", "must be a finite line"
    )
    _require(bool(np.ptp(line[:, :2], axis=0).any()), f"{where}: centerline", "must not be one point")
    human, past = values.get("human_poses"), values.get("past_states")
    if human is not None:
        good = human.shape == (8, 3) and bool(np.isfinite(human).all())
        _require(good, f"{where}: human_trajectory", "must be 8 finite poses", human.shape)
    if past is not None:
        _check_past(values["past_times_us"], past, values, f"{where}: past_human_trajectory")


def _check_past(times_us: np.ndarray, states: np.ndarray, values: Mapping[str, Any], place: str) -> None:
    _require(len(states) == 4 and bool(np.isfinite(states).all()), place, "must be 4 finite states")
    _require(bool((np.diff(times_us) > 0).all()), place, "times must grow")
    span_us = int(times_us[-1] - times_us[0])
    _require(100_000 < span_us <= MAX_HISTORY_US, place, "must span 0.1 to 60 s", span_us)
    same = abs(states[-1] - values["ego_state"][:7]).max() <= _SAME_STATE
    _require(bool(same) and times_us[-1] == values["start_us"], place, "must end with ego_state")


def _check_reference(values: Mapping[str, Any], where: str) -> None:
    times_us, poses, place = values["reference_times_us"], values["reference_poses"], f"{where}: trajectory"
    _require(bool(np.isfinite(poses).all()), place, "must be finite")
    _require(len(times_us) >= 2 and bool((np.diff(times_us) > 0).all()), place, "times must grow")
    _require(times_us[0] == values["start_us"], place, "must start at the time of ego_state", times_us[0])
    covers = times_us[-1] - times_us[0] >= HORIZON_US - _TIME_SLACK_US
    _require(bool(covers), place, "must last 4 s", int(times_us[-1] - times_us[0]))


def _check_tracks(values: Mapping[str, Any], where: str) -> None:
    first, place = values["track_first"], f"{where}: observation"
    codes = first[:, 0]
    _require(bool(((codes >= 0) & (codes <= _EGO_TYPE)).all()), place, f"types must be 0 to {_EGO_TYPE}")
    assert len(AGENT_TYPES) == _EGO_TYPE
    _require(bool(np.isfinite(values["track_poses"]).all()), place, "poses must be finite")
    size = first[:, 1:4]
    _require(bool((np.isfinite(size) & (size > 0)).all()), place, "boxes must have positive sizes")


def _chains(values: Mapping[str, Any], name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Join the rings of each polygon to one closed chain; return offsets (count + 1) and vertices."""
    owner, sizes = values[f"{name}_of_ring"], values[f"{name}_ring_sizes"]
    rings = np.split(values[f"{name}_xy"], np.cumsum(sizes)[:-1]) if len(sizes) else []
    parts: list[list[np.ndarray]] = [[] for _ in range(count)]
    for polygon, ring in zip(owner, rings, strict=True):
        chain = parts[polygon]
        if not chain:
            chain.append(ring)
            continue
        # The way to the further ring is walked there and back, so that even-odd tests do not see it.
        start = chain[0][:1]
        chain += [*([start] if len(chain) == 1 else []), ring, ring[:1], start]
    joined = [np.concatenate([np.zeros((0, 2)), *chain]) for chain in parts]
    return np.cumsum([0, *map(len, joined)]), np.concatenate([np.zeros((0, 2)), *joined])


def _kept(chains: tuple[np.ndarray, np.ndarray], keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets, xy = chains
    sizes = np.diff(offsets)
    return np.cumsum([0, *sizes[keep]]), xy[np.repeat(keep, sizes)]


def _red_parts(values: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the light of each part of a red polygon, and the parts as rings; a hole is refused."""
    _require(
        not values["red_is_hole"].any(), f"{where}: traffic lights", "connector polygons must have no holes"
    )
    return values["red_of_ring"], np.cumsum([0, *values["red_ring_sizes"]]), values["red_xy"]


def read_submission(path: Path) -> dict[str, np.ndarray]:
    """Read a NAVSIM submission pickle: the predicted poses (n, 3) of every scene by token, both stages together.

    Raises:
        InputRejectedError: Naming the file and the rule.
    """
    with open_reader() as reader:
        values = reader.read(read_member(path, path.name), str(path))
    _require(values.get("kind") == "submission", str(path), "must be a NAVSIM submission", values.get("kind"))
    rule = "must be of one planner: submissions that were merged are scored one by one"
    _require(values["num_merged"] <= 1, str(path), rule, f"{values['num_merged']} in one file")
    found: dict[str, np.ndarray] = {}
    for token, poses in values["trajectories"]:
        _require(token not in found, str(path), "must predict each scene once", token)
        found[token] = poses
    return found
