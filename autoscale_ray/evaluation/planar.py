"""Small planar functions on numpy arrays, for what is done once per scene.

Shape legend: N points or boxes, C polyline vertices, n polygon vertices.
"""

from __future__ import annotations

import numpy as np

from autoscale_ray.evaluation.scene import Flags, Floats


def box_corners(boxes_N4: Floats, half_N2: Floats) -> Floats:
    """Return corners (..., 4, 2) front left, rear left, rear right, front right of boxes x, y, cos, sin."""
    axis = boxes_N4[..., 2:]
    along = axis * half_N2[..., :1]
    left = np.stack([-axis[..., 1], axis[..., 0]], axis=-1) * half_N2[..., 1:]
    centre = boxes_N4[..., :2]
    return np.stack(
        [centre + along + left, centre - along + left, centre - along - left, centre + along - left], axis=-2
    )


def project(points_N2: Floats, path_C2: Floats, progress_C: Floats) -> Floats:
    """Return the arc length (N,) of the nearest point of a polyline, the first one among equals, m."""
    start_C2, edge_C2 = path_C2[:-1], np.diff(path_C2, axis=0)
    squared_C = (edge_C2**2).sum(-1)
    relative_NC2 = points_N2[:, None] - start_C2
    share_NC = np.clip((relative_NC2 * edge_C2).sum(-1) / np.where(squared_C > 0, squared_C, 1.0), 0.0, 1.0)
    away_NC = ((relative_NC2 - share_NC[..., None] * edge_C2) ** 2).sum(-1)
    best_N = away_NC.argmin(axis=1)
    return progress_C[best_N] + share_NC[np.arange(len(best_N)), best_N] * np.diff(progress_C)[best_N]


def ring_centroid(vertices_n2: Floats) -> Floats:
    """Return the area centroid (2,) of a simple ring."""
    base = vertices_n2 - vertices_n2[0]
    following = np.roll(base, -1, axis=0)
    cross = base[:, 0] * following[:, 1] - following[:, 0] * base[:, 1]
    return vertices_n2[0] + ((base + following) * cross[:, None]).sum(axis=0) / (3.0 * cross.sum())


def polygon_distances(boxes_N42: Floats, polygon_n2: Floats) -> Floats:
    """Return the distance (N,) between convex boxes and one polygon, 0 where they share a point, m."""
    nearest = np.minimum(
        _to_edges(boxes_N42, polygon_n2[None]),
        _to_edges(np.repeat(polygon_n2[None], len(boxes_N42), 0), boxes_N42),
    )
    overlap = edges_cross(boxes_N42, polygon_n2) | contains(polygon_n2, boxes_N42[:, 0])
    overlap |= _box_contains(boxes_N42, polygon_n2[0])
    return np.where(overlap, 0.0, nearest)


def contains(polygon_n2: Floats, points_N2: Floats) -> Flags:
    """Tell which points (N, 2) lie inside a ring, by crossing numbers; the boundary is undecided."""
    first, second = polygon_n2, np.roll(polygon_n2, -1, axis=0)
    x, y = points_N2[:, :1], points_N2[:, 1:]
    turn = (second[:, 0] - first[:, 0]) * (y - first[:, 1]) - (x - first[:, 0]) * (second[:, 1] - first[:, 1])
    straddles = (first[:, 1] > y) != (second[:, 1] > y)
    return (straddles & ((turn > 0) == (second[:, 1] > first[:, 1]))).sum(axis=1) % 2 == 1


def edges_cross(boxes_N42: Floats, polygon_n2: Floats) -> Flags:
    """Tell which boxes (N, 4, 2) have an edge that crosses an edge of the polygon."""
    a, b = boxes_N42[:, :, None], np.roll(boxes_N42, -1, axis=1)[:, :, None]
    c, d = polygon_n2[None, None], np.roll(polygon_n2, -1, axis=0)[None, None]
    apart = (_turn(a, b, c) * _turn(a, b, d) < 0) & (_turn(c, d, a) * _turn(c, d, b) < 0)
    return np.any(apart, axis=(1, 2))


def _to_edges(points_Nm2: Floats, rings_Nn2: Floats) -> Floats:
    start = rings_Nn2[:, None]
    edge = np.roll(rings_Nn2, -1, axis=1)[:, None] - start
    relative = points_Nm2[:, :, None] - start
    squared = np.maximum((edge**2).sum(-1), 1e-300)
    share = np.clip((relative * edge).sum(-1) / squared, 0.0, 1.0)
    return np.sqrt(((relative - share[..., None] * edge) ** 2).sum(-1)).min(axis=(1, 2))


def _box_contains(boxes_N42: Floats, point_2: Floats) -> Flags:
    turns = _turn(boxes_N42, np.roll(boxes_N42, -1, axis=1), point_2)
    return np.all(turns >= 0, axis=1) | np.all(turns <= 0, axis=1)


def _turn(first: Floats, second: Floats, third: Floats) -> Floats:
    edge, away = second - first, third - first
    return edge[..., 0] * away[..., 1] - edge[..., 1] * away[..., 0]
