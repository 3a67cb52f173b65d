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


def points_in_rings(
    point_K2: Tensor, ring_K: Tensor, ring_offsets: Tensor, ring_xy: Tensor, ring_next: Tensor
) -> Tensor:
    """Tell whether each point lies strictly inside its ring, by crossing numbers.

    Args:
        point_K2: Points, m.
        ring_K: Ring of each point.
        ring_offsets: (G + 1,) start of each ring.
        ring_xy: (V, 2) vertices, m.
        ring_next: (V,) next vertex of the same ring.

    Returns:
        (K,) flags; a point on the boundary is outside.
    """
    pair_E, vertex_E = expand_rings(ring_K, ring_offsets)
    x_E, y_E = point_K2[pair_E].unbind(-1)
    x1_E, y1_E = ring_xy[vertex_E].unbind(-1)
    x2_E, y2_E = ring_xy[ring_next[vertex_E]].unbind(-1)
    turn_E = (x2_E - x1_E) * (y_E - y1_E) - (x_E - x1_E) * (y2_E - y1_E)
    crosses_E = ((y1_E > y_E) != (y2_E > y_E)) & ((turn_E > 0) == (y2_E > y1_E))
    within_x_E = (torch.minimum(x1_E, x2_E) <= x_E) & (x_E <= torch.maximum(x1_E, x2_E))
    within_y_E = (torch.minimum(y1_E, y2_E) <= y_E) & (y_E <= torch.maximum(y1_E, y2_E))
    touches_E = (turn_E == 0) & within_x_E & within_y_E
    crossings_K = torch.zeros(len(ring_K), dtype=torch.int32, device=ring_K.device)
    crossings_K.index_add_(0, pair_E, crosses_E.int())
    touches_K = torch.zeros_like(crossings_K).index_add_(0, pair_E, touches_E.int())
    return (crossings_K % 2 == 1) & (touches_K == 0)


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
    return (hits_K > 0) | points_in_rings(centre_K2, ring_K, ring_offsets, ring_xy, ring_next)


def project_on_path(point_NQ2: Tensor, path_NC2: Tensor, progress_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest point of a polyline.

    Args:
        point_NQ2: Points, m.
        path_NC2: Polyline of each row, m; coinciding neighbours are allowed.
        progress_NC: Arc length at the vertices, m.

    Returns:
        Distance (N, Q) and arc length of the nearest point (N, Q), the first one among equals, m.
    """
    start_N1C2 = path_NC2[:, None, :-1]
    edge_N1C2 = path_NC2[:, None, 1:] - start_N1C2
    squared_N1C = (edge_N1C2**2).sum(-1)
    relative_NQC2 = point_NQ2[:, :, None] - start_N1C2
    share_NQC = (relative_NQC2 * edge_N1C2).sum(-1) / torch.where(squared_N1C > 0, squared_N1C, 1.0)
    share_NQC = share_NQC.clamp(0.0, 1.0)
    away_NQC = ((relative_NQC2 - share_NQC[..., None] * edge_N1C2) ** 2).sum(-1)
    best_NQ1 = away_NQC.argmin(dim=-1, keepdim=True)
    length_N1C = (progress_NC[:, 1:] - progress_NC[:, :-1])[:, None]
    along_NQC = progress_NC[:, None, :-1] + share_NQC * length_N1C
    return away_NQC.gather(-1, best_NQ1)[..., 0].sqrt(), along_NQC.gather(-1, best_NQ1)[..., 0]


def _in_frame(vector_K2: Tensor, axis_K2: Tensor) -> tuple[Tensor, Tensor]:
    along = (vector_K2 * axis_K2).sum(-1)
    across = vector_K2[..., 1] * axis_K2[..., 0] - vector_K2[..., 0] * axis_K2[..., 1]
    return along, across
