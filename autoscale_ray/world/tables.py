"""Arrow tables of driven scenes, columns at once: one group of scenes has one topology, so most columns are
dense.

Shape legend: N scenes, A agent slots, T frames, L lanes, Q polygons, V and W vertices, C centreline vertices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.schema import (
    FRAME_TIMES_S,
    LINK_KINDS,
    NUM_FRAMES,
    POLYGON_LAYERS,
    SCENE_SCHEMA,
)
from autoscale_ray.world.paths import FIRST_STATION_M, strip
from autoscale_ray.world.roads import CROSS_SIGNAL, EGO_SIGNAL, Road
from autoscale_ray.world.simulation import Driven, current_pose
from autoscale_ray.world.situation import (
    EGO_LENGTH_M,
    EGO_REAR_AXLE_TO_CENTER_M,
    EGO_WHEELBASE_M,
    EGO_WIDTH_M,
    Situation,
)

LANE_LAYER, CONNECTOR_LAYER = POLYGON_LAYERS.index("lane"), POLYGON_LAYERS.index("lane_connector")
CENTERLINE_STATIONS_M = np.arange(-20, 121, 2)
assert LINK_KINDS == ("successor", "left", "right")


@dataclass(frozen=True, slots=True)
class Identity:
    """Names and places of N scenes; nothing in them tells the family."""

    scene_id: list[str]
    log_id: list[str]
    origin_id: list[str | None]
    domain: str
    source: str
    timestamp_us_N: np.ndarray
    map_pose_N3: np.ndarray


def scene_table(driven: Driven, identity: Identity) -> pa.Table:
    """Return the scenes as rows of `SCENE_SCHEMA`, every coordinate in the ego's frame at t = 0."""
    num = driven.situation.num_scenes
    columns = {**_identity_columns(identity), **_ego_columns(driven), **_agent_columns(driven)}
    columns |= _map_columns(driven)
    columns["route_speed_limit_mps"] = driven.situation.road.limit_N
    columns["driving_command"] = np.full(num, driven.situation.command)
    arrays = [_array(columns[field.name], field.type, num) for field in SCENE_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCENE_SCHEMA)


def _array(values, column_type: pa.DataType, num: int) -> pa.Array:
    """Return a column; a dense array is cut into equal lists, (counts, values) into lists of those lengths."""
    if not pa.types.is_list(column_type):
        if isinstance(values, np.ndarray):
            values = values.astype(column_type.to_pandas_dtype())
        return pa.array(values, type=column_type)
    if isinstance(values, tuple):
        counts, flat = values
        offsets = np.concatenate([[0], np.cumsum(counts)])
    else:
        flat = values.reshape(-1)
        offsets = np.arange(num + 1) * (flat.size // num)
    item = column_type.value_type
    inner = pa.array(flat.reshape(-1).astype(item.to_pandas_dtype()), type=item)
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), inner, type=column_type)


def _identity_columns(identity: Identity) -> dict[str, object]:
    num = len(identity.scene_id)
    return {
        "scene_id": identity.scene_id,
        "log_id": identity.log_id,
        "origin_id": identity.origin_id,
        "prev_scene_id": [None] * num,
        "domain": [identity.domain] * num,
        "source": [identity.source] * num,
        "timestamp_us": identity.timestamp_us_N,
        "origin_x_m": identity.map_pose_N3[:, 0],
        "origin_y_m": identity.map_pose_N3[:, 1],
        "origin_yaw_rad": identity.map_pose_N3[:, 2],
        "expert_quality": np.full(num, np.nan),
        "tags": np.empty((num, 0), dtype=str),
    }


def _ego_columns(driven: Driven) -> dict[str, np.ndarray]:
    num = driven.situation.num_scenes
    sizes = {
        "ego_length_m": EGO_LENGTH_M,
        "ego_width_m": EGO_WIDTH_M,
        "ego_wheelbase_m": EGO_WHEELBASE_M,
        "ego_rear_axle_to_center_m": EGO_REAR_AXLE_TO_CENTER_M,
    }
    states = driven.ego_states_NT7.copy()
    origin = current_pose(driven)
    states[..., :2] = to_ego(states[..., :2], origin)
    states[..., 2] = wrap_angle(states[..., 2] - origin[:, 2, None])
    times_us = np.round(FRAME_TIMES_S * 1e6).astype(np.int64)
    return {name: np.full(num, value) for name, value in sizes.items()} | {
        "ego_times_us": np.broadcast_to(times_us, (num, NUM_FRAMES)),
        "ego_states": states,
        "ego_valid": np.ones((num, NUM_FRAMES), bool),
    }


def to_ego(points: np.ndarray, origin_N3: np.ndarray) -> np.ndarray:
    """Move points (N, ..., 2) into the frames of `origin_N3` (x, y, yaw)."""
    shape = (-1,) + (1,) * (points.ndim - 2)
    x, y = points[..., 0] - origin_N3[:, 0].reshape(shape), points[..., 1] - origin_N3[:, 1].reshape(shape)
    cos, sin = np.cos(origin_N3[:, 2]).reshape(shape), np.sin(origin_N3[:, 2]).reshape(shape)
    return np.stack([x * cos + y * sin, y * cos - x * sin], axis=-1)


def _agent_columns(driven: Driven) -> dict[str, object]:
    traffic, origin = driven.situation.traffic, current_pose(driven)
    states = driven.agent_states_NAT5.copy()
    valid_NAT = driven.agent_valid_NAT
    states[..., :2] = to_ego(states[..., :2], origin)
    states[..., 2] = wrap_angle(states[..., 2] - origin[:, 2, None, None])
    still = np.zeros_like(origin)
    still[:, 2] = origin[:, 2]
    states[..., 3:] = to_ego(states[..., 3:], still)
    states = np.where(valid_NAT[..., None], states, 0.0)
    # Nearest first, as perception lists them: the order of the slots would tell who matters.
    seen_NA = np.any(valid_NAT, axis=-1)
    order = np.argsort(np.where(seen_NA, _distance(driven), np.inf), axis=1, kind="stable")
    row = np.arange(len(order))[:, None]
    kept = np.take_along_axis(seen_NA, order, axis=1)
    size = np.stack([traffic.length, traffic.width], axis=-1)
    counts_N = kept.sum(axis=1)
    return {
        "agent_type": (counts_N, traffic.kind[row, order][kept]),
        "agent_track": (counts_N, np.broadcast_to(np.arange(kept.shape[1]), kept.shape)[kept]),
        "agent_size": (counts_N * 2, size[row, order][kept]),
        "agent_states": (counts_N * NUM_FRAMES * 5, states[row, order][kept]),
        "agent_valid": (counts_N * NUM_FRAMES, valid_NAT[row, order][kept]),
    }


def _distance(driven: Driven) -> np.ndarray:
    here = current_pose(driven)[:, None, :2]
    return np.linalg.norm(driven.agent_states_NAT5[:, :, 4, :2] - here, axis=-1)


def _map_columns(driven: Driven) -> dict[str, np.ndarray]:
    situation, origin = driven.situation, current_pose(driven)
    road, num = situation.road, situation.num_scenes
    lanes = road.lanes
    points = np.concatenate([lane.points_NP2 for lane in lanes], axis=1)
    lane_sizes = [lane.points_NP2.shape[1] for lane in lanes]
    on_route = np.array([lane.on_route for lane in lanes])
    widening = np.array([lane.widening_m for lane in lanes])
    centre = road.paths_NMS3[:, 0, (CENTERLINE_STATIONS_M - FIRST_STATION_M).astype(int)].copy()
    centre[..., :2] = to_ego(centre[..., :2], origin)
    centre[..., 2] = wrap_angle(centre[..., 2] - origin[:, 2, None])
    return {
        "lane_points": to_ego(points, origin),
        "lane_offsets": _same(np.concatenate([[0], np.cumsum(lane_sizes)]), num),
        "lane_width_m": road.width_N[:, None] + widening,
        "lane_speed_limit_mps": np.broadcast_to(road.limit_N[:, None], (num, len(lanes))),
        "lane_on_route": _same(on_route, num),
        "lane_links": _same(np.array(road.links), num),
        "centerline": centre,
        **_polygon_columns(situation, origin),
    }


def _same(values: np.ndarray, num: int) -> np.ndarray:
    return np.broadcast_to(values, (num, *values.shape))


def _polygon_columns(situation: Situation, origin: np.ndarray) -> dict[str, np.ndarray]:
    road, num = situation.road, situation.num_scenes
    rings, layers = [], []
    for lane in road.lanes:
        half_N = 0.5 * (road.width_N + lane.widening_m)
        rings.append(strip(lane.points_NP2, half_N, -half_N))
        layers.append(CONNECTOR_LAYER if lane.connector else LANE_LAYER)
    rings += [area.points_NW2 for area in road.areas]
    layers += [area.layer for area in road.areas]
    num_lanes, num_polygons = len(road.lanes), len(rings)
    lane_number = np.where(np.arange(num_polygons) < num_lanes, np.arange(num_polygons), -1)
    on_route = np.array([lane.on_route for lane in road.lanes] + [False] * len(road.areas))
    return {
        "polygon_points": to_ego(np.concatenate(rings, axis=1), origin),
        "polygon_offsets": _same(np.concatenate([[0], np.cumsum([ring.shape[1] for ring in rings])]), num),
        "polygon_layer": _same(np.array(layers), num),
        "polygon_lane": _same(lane_number, num),
        "polygon_on_route": _same(on_route, num),
        "polygon_red": red_frames(situation, road, num_polygons),
    }


def red_frames(situation: Situation, road: Road, num_polygons: int) -> np.ndarray:
    """Return which polygons are red when (N, Q, T); the crossing road is red while the ego is not."""
    red = np.zeros((situation.num_scenes, num_polygons, NUM_FRAMES), bool)
    if situation.signal is None:
        return red
    ego_red_NT = situation.signal.red_until_s_N[:, None] > FRAME_TIMES_S
    for number, lane in enumerate(road.lanes):
        if lane.signal == EGO_SIGNAL:
            red[:, number] = ego_red_NT
        elif lane.signal == CROSS_SIGNAL:
            red[:, number] = ~ego_red_NT
    return red
