"""Compiled roll-out of PDM-Closed's proposals; the same rules as `idm.unroll`."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from autoscale_ray.evaluation import idm as rules
from autoscale_ray.evaluation.kernels_geometry import box_meets_ring

NUM_STEPS, NUM_SPEEDS = rules.NUM_STEPS, len(rules.SPEED_FRACTIONS)
FORECAST_STEP, STEP_S = rules.FORECAST_STEP, rules.STEP_S
FRACTIONS = np.array(rules.SPEED_FRACTIONS)
MIN_GAP_M, HEADWAY_S, MIN_PROGRESS_M = rules.MIN_GAP_M, rules.HEADWAY_S, rules.MIN_PROGRESS_M
MAX_ACCELERATION, MAX_DECELERATION = rules.MAX_ACCELERATION, rules.MAX_DECELERATION
EXPONENT = rules.SPEED_EXPONENT
COMFORT = 2.0 * math.sqrt(MAX_ACCELERATION * MAX_DECELERATION)


@njit(cache=True, nogil=True, error_model="numpy")
def _pose_at(progress, vertices, along, pose):
    """Fill pose (3,) at an arc length of one path."""
    at = min(max(progress, MIN_PROGRESS_M), along[-1])
    right = min(max(np.searchsorted(along, at), 1), len(along) - 1)
    span = along[right] - along[right - 1]
    for axis in range(3):
        slope = (vertices[right, axis] - vertices[right - 1, axis]) / span
        pose[axis] = slope * (at - along[right - 1]) + vertices[right - 1, axis]
    pose[2] = math.atan2(math.sin(pose[2]), math.cos(pose[2]))


@njit(cache=True, nogil=True, error_model="numpy")
def _to_edges(points, ring):
    """Return the smallest squared distance of some points to the edges of a ring."""
    best = np.inf
    for first in range(len(ring)):
        second = first + 1 if first + 1 < len(ring) else 0
        ex, ey = ring[second, 0] - ring[first, 0], ring[second, 1] - ring[first, 1]
        squared = max(ex * ex + ey * ey, 1e-300)
        for point in range(len(points)):
            rx, ry = points[point, 0] - ring[first, 0], points[point, 1] - ring[first, 1]
            share = min(max((rx * ex + ry * ey) / squared, 0.0), 1.0)
            px, py = rx - share * ex, ry - share * ey
            best = min(best, px * px + py * py)
    return best


@njit(cache=True, nogil=True, error_model="numpy")
def _gap(pose, vehicle, ring, corners):
    """Return the distance between the ego's box at a pose and a ring, 0 where they share a point."""
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    cx, cy = pose[0] + vehicle[2] * cos, pose[1] + vehicle[2] * sin
    for corner in range(4):
        along = vehicle[0] if corner == 0 or corner == 3 else -vehicle[0]
        left = vehicle[1] if corner < 2 else -vehicle[1]
        corners[corner, 0], corners[corner, 1] = cx + along * cos - left * sin, cy + along * sin + left * cos
    if box_meets_ring(cx, cy, cos, sin, vehicle[0], vehicle[1], 0, len(ring), ring):
        return 0.0
    return math.sqrt(min(_to_edges(corners, ring), _to_edges(ring, corners)))


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest_ahead(pose, progress, forecast, path, vehicle, offsets, vertices, ahead_of, in_corridor, ranks):
    """Return the obstacle to follow and its gap, (-1, 0) without one and (-2, 0) where unknown ranks decide."""
    best, nearest, is_tie = np.inf, -1, False
    corners = np.empty((4, 2))
    for obstacle in range(len(offsets) - 1):
        if not in_corridor[path, obstacle, forecast] or ahead_of[path, obstacle, forecast] <= progress:
            continue
        ring = vertices[forecast, offsets[obstacle] : offsets[obstacle + 1]]
        gap = _gap(pose, vehicle, ring, corners)
        if gap == best and nearest >= 0:
            is_tie = True
            if len(ranks) and ranks[forecast, obstacle] < ranks[forecast, nearest]:
                nearest = obstacle
        elif gap < best:
            best, nearest, is_tie = gap, obstacle, False
    if nearest < 0:
        return -1, 0.0
    return (-2, 0.0) if is_tie and not len(ranks) else (nearest, best)


@njit(cache=True, nogil=True, error_model="numpy")
def _follow(leader, speed, progress, target):
    """Return the next speed of the intelligent driver model."""
    wanted = MIN_GAP_M + speed * HEADWAY_S + speed * (speed - leader[1]) / COMFORT
    gap = max(leader[0] - progress - leader[2], MIN_GAP_M)
    free = 1.0 - (speed / target) ** EXPONENT
    acceleration = MAX_ACCELERATION * (free - (wanted / gap) ** 2)
    return speed + STEP_S * min(max(acceleration, -MAX_DECELERATION), MAX_ACCELERATION)


@njit(cache=True, nogil=True, error_model="numpy")
def unroll_proposals(
    paths,
    along,
    starts,
    speed,
    limit,
    vehicle,
    offsets,
    vertices,
    yaw,
    speeds,
    is_light,
    ahead_of,
    in_corridor,
    ranks,
    poses,
):
    """Fill poses (15, 41, 3); return False where equal gaps need `ranks`, which then must be given.

    `vertices` (B, V, 2) holds all obstacles' rings per forecast, obstacle o from offsets[o] on; `ranks` is (B, O) or
    (0, 0).
    """
    num_paths = len(starts)
    progress, velocity = np.empty((num_paths, NUM_SPEEDS)), np.full((num_paths, NUM_SPEEDS), speed)
    leaders, shared = np.zeros((num_paths, NUM_SPEEDS, 3)), np.empty(3)
    for path in range(num_paths):
        progress[path] = starts[path]
        for fast in range(NUM_SPEEDS):
            _pose_at(starts[path], paths[path], along[path], poses[path * NUM_SPEEDS + fast, 0])
    for step in range(1, NUM_STEPS):
        for path in range(num_paths):
            shared[:] = (
                0.0  # one row per path: stale entries carry over between its proposals, as in the original
            )
            for fast in range(NUM_SPEEDS):
                row, at = path * NUM_SPEEDS + fast, progress[path, fast]
                leader = leaders[path, fast]
                if step % FORECAST_STEP == 0:
                    pose, forecast = poses[row, step - 1], step // FORECAST_STEP
                    nearest, gap = _nearest_ahead(
                        pose, at, forecast, path, vehicle, offsets, vertices, ahead_of, in_corridor, ranks
                    )
                    if nearest == -2:
                        return False
                    if nearest < 0:
                        shared[0], shared[2] = along[path, -1], vehicle[0]
                    else:
                        shared[0] = at + gap
                        if not is_light[nearest]:
                            shared[1] = speeds[nearest] * math.cos(yaw[nearest] - pose[2])
                    leader[:] = shared
                progress[path, fast] = at + STEP_S * velocity[path, fast]
                velocity[path, fast] = _follow(leader, velocity[path, fast], at, FRACTIONS[fast] * limit)
                _pose_at(progress[path, fast], paths[path], along[path], poses[row, step])
    return True
