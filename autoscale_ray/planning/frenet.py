"""The route frame: positions as (s, d) along the route centre line instead of (x, y).

A route is stored as R points at 1 m spacing, s = -20 ... 140 m, where s = 0 is the centre-line point nearest
to the ego's rear axle at 0 s. Between points position and heading are interpolated linearly,

    c(s) = lerp(points, s),  psi(s) = lerp(yaw, s),  p(s, d) = c(s) + d * (-sin psi(s), cos psi(s)),

and `project` solves (p - c(s)) . (cos psi(s), sin psi(s)) = 0, so that `unproject` undoes it up to rounding
for every point nearer to the route than its radius of curvature.

Shape legend: N scenes, R route points, M positions of a scene, C centre-line vertices of all scenes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoscale_ray.planning.polylines import closest_to_origin, interpolate, make_polylines

NUM_ROUTE_POINTS = 161
ROUTE_SPACING_M = 1.0
ROUTE_BEHIND_M = 20.0
NUM_FOOT_STEPS = 8
MAX_FOOT_STEP_M = 2.0


def wrap_angle(angle: Tensor) -> Tensor:
    """Return the angle in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def make_routes(centerline_C3: Tensor, offsets_N1: Tensor) -> Tensor:
    """Resample the route centre lines around the ego at 1 m.

    Args:
        centerline_C3: x, y in m and yaw in rad (unused: headings come from the resampled points), scene
            frame.
        offsets_N1: int64 first vertex of each scene; every scene has at least two distinct vertices.

    Returns:
        route_NR3: x, y in m and unwrapped heading in rad.
    """
    polylines = make_polylines(centerline_C3[:, :2], offsets_N1)
    _, arc_N = closest_to_origin(polylines)
    grid_R = torch.arange(NUM_ROUTE_POINTS, device=centerline_C3.device) * ROUTE_SPACING_M - ROUTE_BEHIND_M
    points_NR2 = interpolate(polylines, arc_N[:, None] + grid_R)
    chord_NR2 = torch.cat(
        [
            points_NR2[:, 1:2] - points_NR2[:, :1],
            points_NR2[:, 2:] - points_NR2[:, :-2],
            points_NR2[:, -1:] - points_NR2[:, -2:-1],
        ],
        1,
    )
    yaw_NR = torch.atan2(chord_NR2[..., 1], chord_NR2[..., 0])
    turn_NR = torch.cat([yaw_NR[:, :1], wrap_angle(yaw_NR.diff(dim=1))], 1)
    return torch.cat([points_NR2, turn_NR.cumsum(1)[..., None]], 2)


def route_pose(route_NR3: Tensor, s_NM: Tensor) -> Tensor:
    """Return x, y and heading of the route at s; beyond the ends it goes straight on.

    Args:
        route_NR3: Routes from `make_routes`.
        s_NM: Arc length from the ego's foot point in m.

    Returns:
        pose_NM3 in m, m, rad (heading unwrapped).
    """
    position_NM = (s_NM + ROUTE_BEHIND_M) / ROUTE_SPACING_M
    low_NM = position_NM.floor().clamp(0, NUM_ROUTE_POINTS - 2)
    index_NM3 = low_NM.long()[..., None].expand(*s_NM.shape, 3)
    low_NM3, high_NM3 = route_NR3.gather(1, index_NM3), route_NR3.gather(1, index_NM3 + 1)
    fraction_NM = position_NM - low_NM
    weight_NM3 = torch.stack([fraction_NM, fraction_NM, fraction_NM.clamp(0.0, 1.0)], -1)
    return low_NM3 + weight_NM3 * (high_NM3 - low_NM3)


def project(route_NR3: Tensor, points_NM2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Express points in the route frame.

    Args:
        route_NR3: Routes from `make_routes`.
        points_NM2: Positions in the scene frame in m.

    Returns:
        s_NM (m along the route), d_NM (m to the left of it) and route_yaw_NM (rad, unwrapped) at the foot
        point.
    """
    nearest_NM = torch.cdist(points_NM2, route_NR3[..., :2], compute_mode="use_mm_for_euclid_dist").argmin(-1)
    s_NM = nearest_NM * ROUTE_SPACING_M - ROUTE_BEHIND_M
    # Beyond its ends the route is straight: one step leads there, however far it is.
    along_NM = _offset(points_NM2, route_pose(route_NR3, s_NM))[0]
    beyond_NM = torch.where(nearest_NM == 0, along_NM.clamp(max=0.0), along_NM.clamp(min=0.0))
    s_NM = s_NM + beyond_NM * ((nearest_NM == 0) | (nearest_NM == NUM_ROUTE_POINTS - 1))
    for _ in range(NUM_FOOT_STEPS):
        along_NM = _offset(points_NM2, route_pose(route_NR3, s_NM))[0]
        s_NM = s_NM + along_NM.clamp(-MAX_FOOT_STEP_M, MAX_FOOT_STEP_M)
    pose_NM3 = route_pose(route_NR3, s_NM)
    return s_NM, _offset(points_NM2, pose_NM3)[1], pose_NM3[..., 2]


def _offset(points_NM2: Tensor, pose_NM3: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far points lie ahead of poses and to the left of them, (N, M) in m each."""
    offset_NM2 = points_NM2 - pose_NM3[..., :2]
    cos_NM, sin_NM = pose_NM3[..., 2].cos(), pose_NM3[..., 2].sin()
    return (
        offset_NM2[..., 0] * cos_NM + offset_NM2[..., 1] * sin_NM,
        offset_NM2[..., 1] * cos_NM - offset_NM2[..., 0] * sin_NM,
    )


def project_poses(route_NR3: Tensor, poses_NM3: Tensor) -> Tensor:
    """Express poses (x, y, yaw) in the route frame as (s, d, yaw relative to the route in [-pi, pi)).

    Args:
        route_NR3: Routes from `make_routes`.
        poses_NM3: Poses in the scene frame in m, m, rad.

    Returns:
        route_poses_NM3 in m, m, rad.
    """
    s_NM, d_NM, route_yaw_NM = project(route_NR3, poses_NM3[..., :2])
    return torch.stack([s_NM, d_NM, wrap_angle(poses_NM3[..., 2] - route_yaw_NM)], -1)


def unproject_poses(route_NR3: Tensor, route_poses_NM3: Tensor) -> Tensor:
    """Express route-frame poses (s, d, relative yaw) in the scene frame; the inverse of `project_poses`.

    Args:
        route_NR3: Routes from `make_routes`.
        route_poses_NM3: Poses in m, m, rad.

    Returns:
        poses_NM3: x, y in m and yaw in [-pi, pi).
    """
    pose_NM3 = route_pose(route_NR3, route_poses_NM3[..., 0])
    yaw_NM, d_NM = pose_NM3[..., 2], route_poses_NM3[..., 1]
    x_NM = pose_NM3[..., 0] - d_NM * yaw_NM.sin()
    y_NM = pose_NM3[..., 1] + d_NM * yaw_NM.cos()
    return torch.stack([x_NM, y_NM, wrap_angle(yaw_NM + route_poses_NM3[..., 2])], -1)
