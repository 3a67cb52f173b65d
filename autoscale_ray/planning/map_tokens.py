"""Lane tokens: the few lanes around the ego, as short pieces in the route frame; map and time 0 s only.

Shape legend: N scenes, L lanes of all scenes, Q polygons, W polygon vertices, K lane slots of a scene, P
piece points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.planning.agent_tokens import POSITION_SCALE_M, nearest_elements
from autoscale_ray.planning.frenet import project
from autoscale_ray.planning.polylines import closest_to_origin, interpolate, make_polylines
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import CURRENT_FRAME

PIECE_BEHIND_M = 10.0
PIECE_AHEAD_M = 50.0
NUM_PIECE_POINTS = 6
ROUTE_BONUS_M = 5.0
MAX_STOP_M = 60.0
NUM_LANE_FEATURES = 4 * NUM_PIECE_POINTS + 8
"""Feature 0 is 1 in a filled slot; an empty slot is all 0. Then x and y of the piece points, scene frame."""


def lane_tokens(batch: SceneBatch, route_NR3: Tensor, num_slots: int) -> Tensor:
    """Describe the lanes nearest to the ego, lanes of the route first by a bonus of 5 m.

    A lane is cut to the piece from 10 m behind to 50 m beyond its point nearest to the ego and resampled at 6
    points.

    Args:
        batch: N scenes.
        route_NR3: Their routes.
        num_slots: Lanes kept in a scene.

    Returns:
        tokens_NKF.
    """
    if len(batch.lane_width_L) == 0:
        return route_NR3.new_zeros(len(batch), num_slots, NUM_LANE_FEATURES)
    lanes = make_polylines(batch.lane_points_V2, batch.lane_point_offsets)
    distance_L, arc_L = closest_to_origin(lanes)
    rank_L = distance_L - ROUTE_BONUS_M * batch.lane_on_route_L.float()
    index_NK = nearest_elements(rank_L, batch.lane_offsets, num_slots)
    start_L = (arc_L - PIECE_BEHIND_M).clamp(min=0.0)
    end_L = torch.minimum(arc_L + PIECE_AHEAD_M, lanes.length_L)
    steps_P = torch.linspace(0.0, 1.0, NUM_PIECE_POINTS, device=route_NR3.device)
    piece_LP2 = interpolate(lanes, start_L[:, None] + (end_L - start_L)[:, None] * steps_P)
    slot_NK = index_NK.clamp(min=0)
    parts = [_piece(piece_LP2[slot_NK], route_NR3), _attributes(batch, end_L - start_L)[slot_NK]]
    tokens_NKF = torch.cat(parts, -1)
    return torch.where((index_NK >= 0)[..., None], tokens_NKF, 0.0)


def _piece(piece_NKP2: Tensor, route_NR3: Tensor) -> Tensor:
    s_NM, d_NM, _ = project(route_NR3, piece_NKP2.flatten(1, 2))
    shape = piece_NKP2.shape[:3]
    places = [piece_NKP2[..., axis] / POSITION_SCALE_M for axis in (0, 1)]
    slot = torch.ones_like(places[0][..., :1])
    return torch.cat([slot, *places, s_NM.view(shape) / 30, d_NM.view(shape) / 8], -1).clamp(-3.0, 3.0)


def _attributes(batch: SceneBatch, length_L: Tensor) -> Tensor:
    width_L, limit_L = batch.lane_width_L, batch.lane_speed_limit_L
    return torch.stack(
        [
            width_L.nan_to_num() / 4,
            width_L.isfinite().float(),
            limit_L.nan_to_num() / 10,
            limit_L.isfinite().float(),
            batch.lane_on_route_L.float(),
            length_L / 30,
            red_lanes(batch).float(),
        ],
        -1,
    )


def red_lanes(batch: SceneBatch) -> Tensor:
    """Return which lanes (L, bool) belong to a connector whose light is red now."""
    red_L = torch.zeros(len(batch.lane_width_L), dtype=torch.bool, device=batch.lane_width_L.device)
    red_Q = batch.polygon_red_QT[:, CURRENT_FRAME] & (batch.polygon_lane_Q >= 0)
    first_lane_Q = batch.lane_offsets[batch.polygon_row_Q]
    red_L[(first_lane_Q + batch.polygon_lane_Q)[red_Q]] = True
    return red_L


def stop_line_distance(batch: SceneBatch, route_NR3: Tensor) -> Tensor:
    """Measure how far along the route the first red connector of the route begins.

    Args:
        batch: N scenes.
        route_NR3: Their routes.

    Returns:
        distance_N in m from the ego's foot point (s = 0), inf without a red connector ahead within 60 m.
    """
    red_Q = batch.polygon_red_QT[:, CURRENT_FRAME] & batch.polygon_on_route_Q
    owner_W = row_of(batch.polygon_point_offsets)
    points_W = red_Q[owner_W]
    scene_W = batch.polygon_row_Q[owner_W[points_W]]
    s_W1, _, _ = project(route_NR3[scene_W], batch.polygon_points_W2[points_W][:, None])
    entry_Q = torch.full((len(red_Q),), torch.inf, device=route_NR3.device)
    entry_Q = entry_Q.scatter_reduce(0, owner_W[points_W], s_W1[:, 0], "amin")
    ahead_Q = torch.where((entry_Q > 0) & (entry_Q < MAX_STOP_M), entry_Q, torch.inf)
    distance_N = torch.full((len(batch),), torch.inf, device=route_NR3.device)
    return distance_N.scatter_reduce(0, batch.polygon_row_Q, ahead_Q, "amin")
