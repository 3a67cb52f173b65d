"""Features of one object relative to another, and places relative to the route.

Shape legend: M objects, N scenes, R route vertices kept for a scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoscale_ray.scenes.batch import SceneBatch

POSITION_SCALE_M = 20.0
SPEED_SCALE_MPS = 10.0
NUM_ROUTE_VERTICES = 64
RELATIVE_MOTION = ("ahead", "left", "closing_x", "closing_y", "nearness", "inverse_ttc", "headway")
INVERSE_TTC_LIMIT_PER_S = 2.0
HEADWAY_LIMIT_S = 8.0


def relative_motion(observer_M5: Tensor, other_M5: Tensor) -> Tensor:
    """Describe another object in the observer's heading frame.

    nearness = exp(-distance / 20 m); inverse_ttc = closing speed / distance, in [0, 2] 1/s, so that an object that
    never meets the observer has 0 and no division by a small closing speed is needed; headway = distance / observer
    speed, in [0, 8] s, divided by 8 (docs/graph_rae.md, features).

    Args:
        observer_M5: x, y, yaw, vx, vy in one common frame; m, rad, m/s.
        other_M5: The same for the other object.

    Returns:
        Float32 (M, 7), order of RELATIVE_MOTION, values of order one.
    """
    offset_M2 = other_M5[:, :2] - observer_M5[:, :2]
    velocity_M2 = other_M5[:, 3:5] - observer_M5[:, 3:5]
    distance_M = offset_M2.norm(dim=1).clamp(min=0.1)
    closing_M = -(offset_M2 * velocity_M2).sum(1) / distance_M
    speed_M = observer_M5[:, 3:5].norm(dim=1)
    local_M4 = torch.cat([rotated(offset_M2, observer_M5[:, 2]) / POSITION_SCALE_M,
                          rotated(velocity_M2, observer_M5[:, 2]) / SPEED_SCALE_MPS], dim=1)  # fmt: skip
    nearness_M = torch.exp(-distance_M / POSITION_SCALE_M)
    inverse_ttc_M = (closing_M / distance_M).clamp(0, INVERSE_TTC_LIMIT_PER_S)
    headway_M = (distance_M / speed_M.clamp(min=0.1)).clamp(max=HEADWAY_LIMIT_S) / HEADWAY_LIMIT_S
    return torch.cat([local_M4, torch.stack([nearness_M, inverse_ttc_M, headway_M], dim=1)], dim=1)


def rotated(vector_M2: Tensor, yaw_M: Tensor) -> Tensor:
    """Express vectors (last axis) in frames turned by `yaw_M` (rad); leading axes broadcast."""
    cos_M, sin_M = yaw_M.cos(), yaw_M.sin()
    x_M, y_M = vector_M2.unbind(-1)
    return torch.stack([cos_M * x_M + sin_M * y_M, cos_M * y_M - sin_M * x_M], dim=-1)


@dataclass(frozen=True, slots=True)
class Route:
    """Route centre lines, thinned to at most R vertices and padded with their last vertex."""

    points_NR3: Tensor
    """x m, y m, yaw rad."""
    arclength_NR: Tensor
    """Metres from the first vertex; +inf on padding."""
    known_N: Tensor
    """False for a scene without a centre line; its places are then relative to the ego's x axis."""
    ego_s_N: Tensor
    """Metres from the first vertex to the projection of the ego at t = 0, the origin of the scene frame."""


def route_of(batch: SceneBatch) -> Route:
    """Thin the centre lines of a batch to a fixed number of vertices.

    Args:
        batch: N scenes.
    """
    lengths_N = batch.centerline_offsets.diff()
    known_N = lengths_N > 0
    kept_N1 = lengths_N.clamp(min=1, max=NUM_ROUTE_VERTICES)[:, None]
    slot_R = torch.arange(NUM_ROUTE_VERTICES, device=lengths_N.device)
    last_N1 = (lengths_N - 1).clamp(min=0)[:, None]
    local_NR = (slot_R * last_N1 / (kept_N1 - 1).clamp(min=1)).round().long()
    local_NR = torch.minimum(local_NR, last_N1)
    line_C3 = torch.cat([batch.centerline_C3, batch.centerline_C3.new_zeros(1, 3)])
    points_NR3 = line_C3[(batch.centerline_offsets[:-1, None] + local_NR).clamp(max=len(line_C3) - 1)]
    points_NR3 = torch.where(known_N[:, None, None], points_NR3, 0.0)
    steps_NR = torch.nn.functional.pad(points_NR3[:, :, :2].diff(dim=1).norm(dim=2), (1, 0))
    arclength_NR = steps_NR.cumsum(1).masked_fill(slot_R >= kept_N1, torch.inf)
    origin_N2 = points_NR3.new_zeros(len(known_N), 2)
    ego_N3 = _project(origin_N2, torch.arange(len(known_N), device=known_N.device), points_NR3, arclength_NR)
    return Route(points_NR3, arclength_NR, known_N, ego_N3[:, 0])


def route_coordinates(points_M2: Tensor, owner_M: Tensor, route: Route) -> Tensor:
    """Project points onto their scene's route.

    The nearest vertex gives the tangent frame: s = s_vertex + along, d = across (left positive).

    Args:
        points_M2: Scene frame, m.
        owner_M: Scene of each point, int64.
        route: Routes of the scenes.

    Returns:
        Float32 (M, 3): s (m, from the ego's own projection), d (m), route yaw there (rad).
    """
    place_M3 = _project(points_M2, owner_M, route.points_NR3, route.arclength_NR)
    return torch.cat([place_M3[:, :1] - route.ego_s_N[owner_M, None], place_M3[:, 1:]], dim=1)


def _project(points_M2: Tensor, owner_M: Tensor, route_NR3: Tensor, arclength_NR: Tensor) -> Tensor:
    # |p - v|^2 = |p|^2 - 2 p.v + |v|^2; the first term does not change which vertex is nearest.
    vertices_MR2 = route_NR3[owner_M, :, :2]
    square_NR = route_NR3[:, :, :2].square().sum(2).masked_fill(arclength_NR.isinf(), torch.inf)
    cost_MR = square_NR[owner_M] - 2 * torch.einsum("mrc,mc->mr", vertices_MR2, points_M2)
    nearest_M = cost_MR.argmin(dim=1)
    vertex_M3 = route_NR3[owner_M, nearest_M]
    along_M2 = rotated(points_M2 - vertex_M3[:, :2], vertex_M3[:, 2])
    s_M = arclength_NR[owner_M, nearest_M] + along_M2[:, 0]
    return torch.stack([s_M, along_M2[:, 1], vertex_M3[:, 2]], dim=1)


def route_ahead(route: Route, distances_m: tuple[float, ...]) -> Tensor:
    """Return the route at fixed distances ahead of the ego.

    Args:
        route: Routes of N scenes.
        distances_m: Distances along the route from the ego's projection.

    Returns:
        Float32 (N, len(distances_m), 3): x, y, yaw of the first vertex at or beyond each distance, else the last.
    """
    wanted_NP = route.ego_s_N[:, None] + route.arclength_NR.new_tensor(distances_m)
    index_NP = torch.searchsorted(route.arclength_NR.contiguous(), wanted_NP.contiguous())
    last_N1 = route.arclength_NR.isfinite().sum(1, keepdim=True) - 1
    index_NP = torch.minimum(index_NP, last_N1)
    return route.points_NR3.gather(1, index_NP[:, :, None].expand(-1, -1, 3))
