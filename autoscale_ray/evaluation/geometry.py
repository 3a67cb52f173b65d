"""Exact planar predicates on batches: boxes, rings, polylines, in plain torch.

Touching counts as overlap for boxes and segments, and as outside for points in rings, as in the official scorer.
Shape legend: K pairs, E edge tests, C polyline vertices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def boxes_overlap(
    offset_K2: Tensor, axis_K2: Tensor, half_K2: Tensor, other_axis_K2: Tensor, other_half_K2: Tensor
) -> Tensor:
    """Tell whether oriented boxes share a point, by separating axes.

    Args:
        offset_K2: Centre of the second box minus centre of the first, m.
        axis_K2: cos, sin of the first box's yaw.
        half_K2: Half length and half width of the first box, m; 0 makes it a segment.
        other_axis_K2: cos, sin of the second box's yaw.
        other_half_K2: Half length and half width of the second box, m.

    Returns:
        (K,) flags.
    """
    turn_cos = (axis_K2 * other_axis_K2).sum(-1).abs()
    turn_sin = (axis_K2[..., 0] * other_axis_K2[..., 1] - axis_K2[..., 1] * other_axis_K2[..., 0]).abs()
    first_along, first_across = _in_frame(offset_K2, axis_K2)
    other_along, other_across = _in_frame(offset_K2, other_axis_K2)
    length, width = half_K2.unbind(-1)
    other_length, other_width = other_half_K2.unbind(-1)
    return (
        (first_along.abs() <= length + other_length * turn_cos + other_width * turn_sin)
        & (first_across.abs() <= width + other_length * turn_sin + other_width * turn_cos)
        & (other_along.abs() <= other_length + length * turn_cos + width * turn_sin)
        & (other_across.abs() <= other_width + length * turn_sin + width * turn_cos)
    )


def expand_rings(ring_K: Tensor, ring_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """List every edge of every pair's ring.

    Args:
        ring_K: Ring of each pair.
        ring_offsets: (G + 1,) start of each ring.

    Returns:
        Pair index (E,) and first vertex of the edge (E,).
    """
    start_K = ring_offsets[ring_K]
    count_K = ring_offsets[ring_K + 1] - start_K
    pair_E = torch.repeat_interleave(torch.arange(len(ring_K), device=ring_K.device), count_K)
    first_K = torch.cumsum(count_K, 0) - count_K
    return pair_E, torch.arange(len(pair_E), device=ring_K.device) - first_K[pair_E] + start_K[pair_E]


def groups_in_rings(
    points_KQ2: Tensor, ring_K: Tensor, ring_offsets: Tensor, ring_xy: Tensor, ring_next: Tensor
) -> Tensor:
    """Tell which of Q neighbouring points lie strictly inside the ring of their group, by crossing numbers.

    Edges above, below or left of the whole group cannot be crossed by its rays to the right and are dropped first.

    Args:
        points_KQ2: Groups of points, m.
        ring_K: Ring of each group.
        ring_offsets: (G + 1,) start of each ring.
        ring_xy: (V, 2) vertices, m.
        ring_next: (V,) next vertex of the same ring.

    Returns:
        (K, Q) flags; a point on the boundary is outside.
    """
    pair_E, vertex_E = expand_rings(ring_K, ring_offsets)
    low_y, high_y, low_x = points_KQ2[..., 1].amin(1), points_KQ2[..., 1].amax(1), points_KQ2[..., 0].amin(1)
    edge_V4 = torch.cat([ring_xy, ring_xy[ring_next]], dim=1)
    edge_low_y_V, edge_high_y_V = (
        torch.minimum(edge_V4[:, 1], edge_V4[:, 3]),
        torch.maximum(edge_V4[:, 1], edge_V4[:, 3]),
    )
    edge_high_x_V = torch.maximum(edge_V4[:, 0], edge_V4[:, 2])
    kept_E = (edge_high_y_V[vertex_E] >= low_y[pair_E]) & (edge_low_y_V[vertex_E] <= high_y[pair_E])
    kept_E &= edge_high_x_V[vertex_E] >= low_x[pair_E]
    pair_E, vertex_E = pair_E[kept_E], vertex_E[kept_E]
    x_EQ, y_EQ = points_KQ2[pair_E].unbind(-1)
    x1, y1, x2, y2 = edge_V4[vertex_E][..., None].unbind(1)
    turn_EQ = (x2 - x1) * (y_EQ - y1) - (x_EQ - x1) * (y2 - y1)
    crosses_EQ = ((y1 > y_EQ) != (y2 > y_EQ)) & ((turn_EQ > 0) == (y2 > y1))
    within_x_EQ = (torch.minimum(x1, x2) <= x_EQ) & (x_EQ <= torch.maximum(x1, x2))
    within_y_EQ = (torch.minimum(y1, y2) <= y_EQ) & (y_EQ <= torch.maximum(y1, y2))
    touches_EQ = (turn_EQ == 0) & within_x_EQ & within_y_EQ
    zeros_KQ = torch.zeros(points_KQ2.shape[:2], dtype=torch.int32, device=ring_K.device)
    crossings_KQ = zeros_KQ.index_add(0, pair_E, crosses_EQ.int())
    touches_KQ = zeros_KQ.index_add(0, pair_E, touches_EQ.int())
    return (crossings_KQ % 2 == 1) & (touches_KQ == 0)


def boxes_meet_rings(
    centre_K2: Tensor,
    axis_K2: Tensor,
    half_K2: Tensor,
    ring_K: Tensor,
    ring_offsets: Tensor,
    ring_xy: Tensor,
    ring_next: Tensor,
) -> Tensor:
    """Tell whether boxes share a point with the closed area of a ring.

    Args:
        centre_K2: Box centres, m.
        axis_K2: cos, sin of the boxes' yaw.
        half_K2: Half length and half width, m.
        ring_K: Ring of each pair.
        ring_offsets: (G + 1,) start of each ring.
        ring_xy: (V, 2) vertices, m.
        ring_next: (V,) next vertex of the same ring.

    Returns:
        (K,) flags.
    """
    pair_E, vertex_E = expand_rings(ring_K, ring_offsets)
    middle_V2 = (ring_xy + ring_xy[ring_next]) / 2.0
    reach_V = torch.linalg.vector_norm(ring_xy[ring_next] - ring_xy, dim=-1) / 2.0
    reach_E = reach_V[vertex_E] + torch.linalg.vector_norm(half_K2, dim=-1)[pair_E]
    near_E = ((middle_V2[vertex_E] - centre_K2[pair_E]) ** 2).sum(-1) <= (reach_E * (1.0 + 1e-9)) ** 2
    pair_E, vertex_E = pair_E[near_E], vertex_E[near_E]
    start_E2, end_E2 = ring_xy[vertex_E], ring_xy[ring_next[vertex_E]]
    edge_E2 = end_E2 - start_E2
    length_E = torch.linalg.vector_norm(edge_E2, dim=-1)
    axis_E2 = edge_E2 / torch.where(length_E > 0, length_E, 1.0)[:, None]
    edge_half_E2 = torch.stack([length_E / 2.0, torch.zeros_like(length_E)], dim=-1)
    offset_E2 = (start_E2 + end_E2) / 2.0 - centre_K2[pair_E]
    hits_E = boxes_overlap(offset_E2, axis_K2[pair_E], half_K2[pair_E], axis_E2, edge_half_E2)
    hits_K = torch.zeros(len(ring_K), dtype=torch.int32, device=ring_K.device).index_add_(
        0, pair_E, hits_E.int()
    )
    holds_K1 = groups_in_rings(centre_K2[:, None], ring_K, ring_offsets, ring_xy, ring_next)
    return (hits_K > 0) | holds_K1[:, 0]


def project_on_path(point_NQ2: Tensor, path_NC2: Tensor, progress_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest point of a polyline.

    Args:
        point_NQ2: Points, m.
        path_NC2: Polyline of each row, m; coinciding neighbours are allowed.
        progress_NC: Arc length at the vertices, m.

    Returns:
        Distance (N, Q) and arc length of the nearest point (N, Q), the first one among equals, m.
    """
    x1, y1 = (axis[:, None] for axis in path_NC2[:, :-1].unbind(-1))
    ex, ey = (axis[:, None] for axis in (path_NC2[:, 1:] - path_NC2[:, :-1]).unbind(-1))
    squared = ex * ex + ey * ey
    rx_NQC, ry_NQC = point_NQ2[..., 0:1] - x1, point_NQ2[..., 1:2] - y1
    share_NQC = (rx_NQC * ex + ry_NQC * ey) / torch.where(squared > 0, squared, 1.0)
    share_NQC = share_NQC.clamp_(0.0, 1.0)
    rx_NQC -= share_NQC * ex
    ry_NQC -= share_NQC * ey
    away_NQC = rx_NQC.square_() + ry_NQC.square_()
    best_NQ1 = away_NQC.argmin(dim=-1, keepdim=True)
    length_NC = progress_NC[:, 1:] - progress_NC[:, :-1]
    edge_NQ = best_NQ1[..., 0]
    along_NQ = progress_NC.gather(1, edge_NQ) + share_NQC.gather(-1, best_NQ1)[..., 0] * length_NC.gather(
        1, edge_NQ
    )
    return away_NQC.gather(-1, best_NQ1)[..., 0].sqrt(), along_NQ


def _in_frame(vector_K2: Tensor, axis_K2: Tensor) -> tuple[Tensor, Tensor]:
    along = (vector_K2 * axis_K2).sum(-1)
    across = vector_K2[..., 1] * axis_K2[..., 0] - vector_K2[..., 0] * axis_K2[..., 1]
    return along, across
