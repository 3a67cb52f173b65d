"""Plane curves for many scenes at once: stations along a path, offsets to its left, strips around it.

A path is sampled every metre of *station* (arc length), so a pose at any station is one linear interpolation.

Shape legend: N scenes, M paths of a scene, S stations, P vertices, K anything evaluated per scene.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter1d

FIRST_STATION_M = -70.0
NUM_STATIONS = 221
STATIONS_S = FIRST_STATION_M + np.arange(NUM_STATIONS)
"""Stations of every path: -70 ... 150 m, one metre apart."""
_ROW_GAP_M = 1e5
_SMOOTH_M = 5


def path_from_curvature(curvature_NS: np.ndarray) -> np.ndarray:
    """Integrate a curvature profile into poses that start at the origin, heading along x, at station 0.

    yaw(s) = integral of kappa, (x, y)(s) = integral of (cos yaw, sin yaw), trapezoidal at one metre.

    Args:
        curvature_NS: Curvature in 1/m at `STATIONS_S`, positive to the left.

    Returns:
        Poses (N, S, 3): x, y in m, yaw in rad.
    """
    zero = int(-FIRST_STATION_M)
    yaw_NS = _cumulative(curvature_NS)
    yaw_NS -= yaw_NS[:, zero : zero + 1]
    middle_yaw_NS = yaw_NS[:, :-1] + 0.5 * np.diff(yaw_NS, axis=1)
    steps = np.stack([np.cos(middle_yaw_NS), np.sin(middle_yaw_NS)], axis=-1)
    points = np.concatenate([np.zeros_like(steps[:, :1]), np.cumsum(steps, axis=1)], axis=1)
    points -= points[:, zero : zero + 1]
    return np.concatenate([points, yaw_NS[..., None]], axis=-1)


def _cumulative(values_NS: np.ndarray) -> np.ndarray:
    middle = 0.5 * (values_NS[:, :-1] + values_NS[:, 1:])
    return np.concatenate([np.zeros_like(middle[:, :1]), np.cumsum(middle, axis=1)], axis=1)


def path_through(points_NP2: np.ndarray) -> np.ndarray:
    """Sample a polyline every metre, its first vertex at `FIRST_STATION_M`, rounding corners in curvature.

    The last direction goes on beyond the end. Two moving averages of 5 m turn the jump in curvature where two
    pieces meet into a ramp, as a driver does; without it every turn would break the comfort bounds.

    Args:
        points_NP2: Vertices in m, first and last pieces straight.

    Returns:
        Poses (N, S, 3).
    """
    sampled_NS2 = resample(points_NP2, np.arange(NUM_STATIONS, dtype=float))
    smooth_NS2 = uniform_filter1d(uniform_filter1d(sampled_NS2, _SMOOTH_M, axis=1), _SMOOTH_M, axis=1)
    ends = np.r_[0:_SMOOTH_M, NUM_STATIONS - _SMOOTH_M : NUM_STATIONS]
    smooth_NS2[:, ends] = sampled_NS2[:, ends]
    sampled_NS2 = resample(smooth_NS2, np.arange(NUM_STATIONS, dtype=float))
    steps = np.gradient(sampled_NS2, axis=1)
    yaw_NS = np.unwrap(np.arctan2(steps[..., 1], steps[..., 0]), axis=1)
    return np.concatenate([sampled_NS2, yaw_NS[..., None]], axis=-1)


def resample(points_NP2: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Return the points of polylines at given arc lengths; beyond the end the last piece goes straight on.

    All rows are laid end to end on one increasing axis, so a single `np.interp` serves every scene.

    Args:
        points_NP2: Vertices in m.
        lengths_S: Arc lengths >= 0 in m from the first vertex, the same for every scene.

    Returns:
        Points (N, S, 2).
    """
    last = points_NP2[:, -1]
    ahead = last - points_NP2[:, -2]
    ahead = ahead / np.linalg.norm(ahead, axis=-1, keepdims=True)
    extended = np.concatenate([points_NP2, (last + ahead * (lengths_S[-1] + 1.0))[:, None]], axis=1)
    along = np.concatenate(
        [np.zeros((len(extended), 1)), np.cumsum(np.linalg.norm(np.diff(extended, axis=1), axis=-1), axis=1)],
        axis=1,
    )
    row_start = _ROW_GAP_M * np.arange(len(extended))[:, None]
    where = (lengths_S[None] + row_start).ravel()
    axis = (along + row_start).ravel()
    columns = [np.interp(where, axis, extended[..., i].ravel()).reshape(len(extended), -1) for i in (0, 1)]
    return np.stack(columns, axis=-1)


def bezier(start_N3: np.ndarray, end_N3: np.ndarray, num_points: int) -> np.ndarray:
    """Return a cubic Bezier curve between two poses; a quarter turn comes out as a near-circular arc.

    Args:
        start_N3: First pose x, y, yaw.
        end_N3: Last pose.
        num_points: Vertices P >= 2.

    Returns:
        Points (N, P, 2).
    """
    reach = 0.39 * np.linalg.norm(end_N3[:, :2] - start_N3[:, :2], axis=-1)[:, None]
    p0, p3 = start_N3[:, :2], end_N3[:, :2]
    p1, p2 = p0 + reach * _direction(start_N3[:, 2]), p3 - reach * _direction(end_N3[:, 2])
    u = np.linspace(0.0, 1.0, num_points)[None, :, None]
    ends = (1 - u) ** 3 * p0[:, None] + u**3 * p3[:, None]
    return ends + 3 * u * (1 - u) ** 2 * p1[:, None] + 3 * u**2 * (1 - u) * p2[:, None]


def _direction(yaw: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)


def line(start_N2: np.ndarray, end_N2: np.ndarray, num_points: int) -> np.ndarray:
    """Return `num_points` evenly spaced points (N, P, 2) from start to end."""
    u = np.linspace(0.0, 1.0, num_points)[None, :, None]
    return start_N2[:, None] + u * (end_N2 - start_N2)[:, None]


def rotate_quarter(points: np.ndarray, quarters: int) -> np.ndarray:
    """Rotate points (..., 2) about the origin by a number of quarter turns to the left, exactly."""
    x, y = points[..., 0], points[..., 1]
    turned = ((x, y), (-y, x), (-x, -y), (y, -x))[quarters % 4]
    return np.stack(turned, axis=-1)


def offset_polyline(points_NP2: np.ndarray, offset_N: float | np.ndarray) -> np.ndarray:
    """Shift polylines to their left by `offset_N` metres (negative: right)."""
    # Second order at the ends: the borders of two pieces of a bend must meet, a wedge is not drivable.
    steps = np.gradient(points_NP2, axis=1, edge_order=min(2, points_NP2.shape[1] - 1))
    steps /= np.maximum(np.linalg.norm(steps, axis=-1, keepdims=True), 1e-9)
    left = np.stack([-steps[..., 1], steps[..., 0]], axis=-1)
    return points_NP2 + np.asarray(offset_N, dtype=float).reshape(-1, 1, 1) * left


def offset_poses(poses_NP3: np.ndarray, offset_N: float | np.ndarray) -> np.ndarray:
    """Shift poses to their left by `offset_N` metres and return the points (N, P, 2)."""
    left = np.stack([-np.sin(poses_NP3[..., 2]), np.cos(poses_NP3[..., 2])], axis=-1)
    return poses_NP3[..., :2] + np.asarray(offset_N, dtype=float).reshape(-1, 1, 1) * left


def strip(points_NP2: np.ndarray, left_N: float | np.ndarray, right_N: float | np.ndarray) -> np.ndarray:
    """Return the ring (N, 2P, 2) between two offsets of a polyline, anticlockwise, not closed.

    Args:
        points_NP2: Vertices in m.
        left_N: Offset of the left border in m, positive to the left.
        right_N: Offset of the right border in m, less than `left_N`.
    """
    right = offset_polyline(points_NP2, right_N)
    left = offset_polyline(points_NP2, left_N)
    return np.concatenate([right, left[:, ::-1]], axis=1)


def poses_at(
    paths_NMS3: np.ndarray, path_K: np.ndarray, station_NK: np.ndarray, offset_NK: np.ndarray
) -> np.ndarray:
    """Return poses at stations and left offsets of paths.

    Args:
        paths_NMS3: Poses of the M paths of every scene at `STATIONS_S`.
        path_K: Path of each column (K,), broadcast against the columns of `station_NK`.
        station_NK: Stations in m, any trailing shape with scenes first; clipped to the sampled range.
        offset_NK: Offsets to the left in m, same shape.

    Returns:
        (..., 4): x, y, yaw of the path, curvature of the path in 1/m.
    """
    num_scenes, num_paths, num_stations, _ = paths_NMS3.shape
    position = np.clip(station_NK - FIRST_STATION_M, 0.0, num_stations - 1.001)
    index = position.astype(np.int64)
    fraction = position - index
    scene = np.arange(num_scenes).reshape((-1,) + (1,) * (station_NK.ndim - 1))
    flat = (scene * num_paths + path_K) * num_stations + index
    x_all, y_all, yaw_all = (np.ascontiguousarray(paths_NMS3[..., i]).ravel() for i in range(3))
    yaw_low = yaw_all[flat]
    turn = yaw_all[flat + 1] - yaw_low
    yaw = yaw_low + fraction * turn
    x = x_all[flat] + fraction * (x_all[flat + 1] - x_all[flat]) - offset_NK * np.sin(yaw)
    y = y_all[flat] + fraction * (y_all[flat + 1] - y_all[flat]) + offset_NK * np.cos(yaw)
    return np.stack([x, y, yaw, turn], axis=-1)


def smooth_step(u: np.ndarray) -> np.ndarray:
    """Return the quintic 10u^3 - 15u^4 + 6u^5, 0 below 0 and 1 above 1: flat and straight at both ends."""
    u = np.clip(u, 0.0, 1.0)
    return u * u * u * (10.0 - u * (15.0 - 6.0 * u))
