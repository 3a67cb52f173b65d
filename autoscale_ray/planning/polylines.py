"""Flat polylines: many open polylines stored as one vertex array plus offsets, handled without a loop over
polylines.

Shape legend: V vertices of all polylines, L polylines, M positions asked of each polyline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoscale_ray.scenes.ragged import row_of

MIN_SEGMENT_M = 1e-3


@dataclass(frozen=True, slots=True)
class Polylines:
    """Polylines without repeated vertices and with the arc length of every vertex."""

    points_V2: Tensor
    offsets_L1: Tensor
    arc_V: Tensor
    """float64; runs on across polylines, only differences within one polyline have a meaning."""

    def __len__(self) -> int:
        """Return the number of polylines L."""
        return len(self.offsets_L1) - 1

    @property
    def length_L(self) -> Tensor:
        """Arc length of every polyline in m."""
        return (self.arc_V[self.offsets_L1[1:] - 1] - self.arc_V[self.offsets_L1[:-1]]).float()


def make_polylines(points_V2: Tensor, offsets_L1: Tensor) -> Polylines:
    """Drop repeated vertices and measure arc length.

    Args:
        points_V2: Vertices in m, every polyline with at least one vertex.
        offsets_L1: int64 first vertex of each polyline; last entry is V.

    Returns:
        The polylines; a polyline may be left with one vertex.
    """
    keep_V = _steps(points_V2, offsets_L1) > MIN_SEGMENT_M
    keep_V[offsets_L1[:-1]] = True
    kept_before_V1 = torch.cat([keep_V.new_zeros(1, dtype=torch.int64), keep_V.cumsum(0)])
    points_V2, offsets_L1 = points_V2[keep_V], kept_before_V1[offsets_L1]
    return Polylines(points_V2, offsets_L1, _steps(points_V2, offsets_L1).cumsum(0))


def _steps(points_V2: Tensor, offsets_L1: Tensor) -> Tensor:
    """Return how far each vertex lies from the one before it, 0 for the first of a polyline; float64."""
    step_V = torch.zeros(len(points_V2), dtype=torch.float64, device=points_V2.device)
    step_V[1:] = (points_V2[1:] - points_V2[:-1]).double().norm(dim=1)
    step_V[offsets_L1[:-1]] = 0.0
    return step_V


def closest_to_origin(polylines: Polylines) -> tuple[Tensor, Tensor]:
    """Find the point of each polyline nearest to the origin (0, 0).

    Args:
        polylines: L polylines.

    Returns:
        distance_L in m and arc_L, the arc length from the polyline's first vertex to that point, in m.
    """
    points_V2, offsets_L1 = polylines.points_V2, polylines.offsets_L1
    owner_V = row_of(offsets_L1)
    along_V2 = points_V2.roll(-1, 0) - points_V2
    along_V2[offsets_L1[1:] - 1] = 0.0  # the last vertex of a polyline stands for itself
    square_V = along_V2.square().sum(1)
    fraction_V = (-(points_V2 * along_V2).sum(1) / square_V.clamp(min=MIN_SEGMENT_M**2)).clamp(0.0, 1.0)
    distance_V = (points_V2 + fraction_V[:, None] * along_V2).norm(dim=1)
    distance_L = torch.full((len(polylines),), torch.inf, device=points_V2.device)
    distance_L = distance_L.scatter_reduce(0, owner_V, distance_V, "amin")
    vertices_V = torch.arange(len(points_V2), device=points_V2.device)
    best_L = torch.full_like(offsets_L1[1:], len(points_V2)).scatter_reduce(
        0, owner_V, torch.where(distance_V <= distance_L[owner_V], vertices_V, len(points_V2)), "amin"
    )
    arc_V = polylines.arc_V - polylines.arc_V[offsets_L1[:-1]][owner_V] + fraction_V * square_V.sqrt()
    return distance_L, arc_V[best_L].float()


def interpolate(polylines: Polylines, arc_LM: Tensor) -> Tensor:
    """Return the points at given arc lengths; beyond an end the last segment goes on as a straight line.

    Args:
        polylines: L polylines.
        arc_LM: Arc length from the first vertex in m; may be negative or beyond the end.

    Returns:
        points_LM2; a polyline of one vertex returns that vertex.
    """
    first_L, last_L = polylines.offsets_L1[:-1], polylines.offsets_L1[1:] - 1
    query_LM = polylines.arc_V[first_L][:, None] + arc_LM.double()
    found_LM = torch.searchsorted(polylines.arc_V, query_LM, right=True) - 1
    low_LM = torch.maximum(torch.minimum(found_LM, (last_L - 1)[:, None]), first_L[:, None])
    high_LM = torch.minimum(low_LM + 1, last_L[:, None])
    span_LM = (polylines.arc_V[high_LM] - polylines.arc_V[low_LM]).clamp(min=MIN_SEGMENT_M)
    fraction_LM = ((query_LM - polylines.arc_V[low_LM]) / span_LM).float()
    low_LM2, high_LM2 = polylines.points_V2[low_LM], polylines.points_V2[high_LM]
    return low_LM2 + fraction_LM[..., None] * (high_LM2 - low_LM2)
