"""Lanes cut into pieces of at most 20 m: the lane nodes of the graph and the links between them.

Shape legend: L lanes, G segments, E links; all over the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import offsets_of, ragged_index, row_of
from autoscale_ray.scenes.schema import LINK_KINDS

SEGMENT_LENGTH_M = 20.0
KINDS = ("next", "previous", "left", "right")
"""What the first segment of a link is to the second."""
ROUNDING = 1e-4
"""Pieces by which a lane may be longer than a whole number of them; its vertices are float32."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Lane pieces in lane order."""

    lane_G: Tensor
    """Lane (batch-wide) of each segment, int64."""
    lane_offsets_L: Tensor
    """First segment of each lane, int64, L+1."""
    points_G32: Tensor
    """Start, middle and end, scene frame, m."""
    length_G: Tensor
    """m."""


def cut_lanes(batch: SceneBatch) -> Segments:
    """Cut every lane into equal pieces of at most 20 m.

    Args:
        batch: N scenes.

    Returns:
        At least one segment for each lane that has a vertex.
    """
    offsets = batch.lane_point_offsets
    length_L, measure_V, lane_gap = _arclength(batch)
    count_L = (length_L / SEGMENT_LENGTH_M - ROUNDING).ceil().long().clamp(min=1) * (offsets.diff() > 0)
    segment_offsets = offsets_of(count_L)
    lane_G = row_of(segment_offsets)
    piece_G = torch.arange(len(lane_G), device=lane_G.device) - segment_offsets[lane_G]
    share_3 = length_L.new_tensor([0.0, 0.5, 1.0])
    share_G3 = (piece_G[:, None] + share_3) / count_L[lane_G, None]
    wanted_G3 = share_G3 * length_L[lane_G, None] + lane_gap * lane_G[:, None]
    first_G1, last_G1 = offsets[lane_G, None], offsets[lane_G + 1, None] - 1
    high_G3 = torch.searchsorted(measure_V, wanted_G3.contiguous()).clamp(max=len(measure_V) - 1)
    high_G3 = torch.maximum(torch.minimum(high_G3, last_G1), torch.minimum(first_G1 + 1, last_G1))
    low_G3 = torch.maximum(high_G3 - 1, first_G1)
    gap_G3 = (measure_V[high_G3] - measure_V[low_G3]).clamp(min=1e-9)
    mix_G31 = ((wanted_G3 - measure_V[low_G3]) / gap_G3).clamp(0, 1)[:, :, None].float()
    points_G32 = torch.lerp(batch.lane_points_V2[low_G3], batch.lane_points_V2[high_G3], mix_G31)
    return Segments(lane_G, segment_offsets, points_G32, (length_L / count_L.clamp(min=1)).float()[lane_G])


def _arclength(batch: SceneBatch) -> tuple[Tensor, Tensor, float]:
    """Return lane lengths, a coordinate that rises over all vertices of the batch, and its step from lane to lane."""
    offsets = batch.lane_point_offsets
    steps_V = batch.lane_points_V2.new_zeros(len(batch.lane_points_V2), dtype=torch.float64)
    steps_V[1:] = batch.lane_points_V2.diff(dim=0).norm(dim=1).double()
    starts = offsets[:-1][offsets.diff() > 0]
    steps_V[starts] = 0
    lane_V = row_of(offsets)
    total_V1 = torch.nn.functional.pad(steps_V.cumsum(0), (1, 0))
    length_L = total_V1[offsets[1:]] - total_V1[offsets[:-1]]
    along_V = total_V1[1:] - total_V1[offsets[lane_V]]
    lane_gap = float(length_L.max()) + 1.0 if len(length_L) else 1.0
    return length_L, along_V + lane_gap * lane_V, lane_gap


def segment_links(batch: SceneBatch, segments: Segments) -> Tensor:
    """Link segments along and across lanes.

    A segment is linked to the next one of its lane, the last one of a lane to the first one of a successor, and
    segments of neighbouring lanes at equal share of their length. Every link is there in both directions.

    Args:
        batch: N scenes.
        segments: Their segments.

    Returns:
        Int64 (E, 3): source and target segment, batch-wide, and what the source is to the target, an index of KINDS.
    """
    inside = torch.nonzero(segments.lane_G[1:] == segments.lane_G[:-1]).flatten()
    shift_E = batch.lane_offsets[row_of(batch.link_offsets)]
    from_E, to_E, kind_E = (
        batch.links_E3[:, 0] + shift_E,
        batch.links_E3[:, 1] + shift_E,
        batch.links_E3[:, 2],
    )
    count_L, first_L = segments.lane_offsets_L.diff(), segments.lane_offsets_L
    present_E = (count_L[from_E] > 0) & (count_L[to_E] > 0)
    along_E = torch.nonzero(present_E & (kind_E == LINK_KINDS.index("successor"))).flatten()
    successor = torch.stack([first_L[from_E[along_E] + 1] - 1, first_L[to_E[along_E]]], dim=1)
    links = _both_ways(torch.cat([torch.stack([inside, inside + 1], dim=1), successor]), "next", "previous")
    for kind, other in (("left", "right"), ("right", "left")):
        across_E = torch.nonzero(present_E & (kind_E == LINK_KINDS.index(kind))).flatten()
        links += _both_ways(_beside(from_E[across_E], to_E[across_E], segments), kind, other)
    return torch.cat(links).unique(dim=0)


def _both_ways(pairs_E2: Tensor, second_is: str, first_is: str) -> list[Tensor]:
    """Return links from the second to the first segment of each pair and back, by what each is to the other."""
    kind_E1 = torch.ones_like(pairs_E2[:, :1])
    return [
        torch.cat([pairs_E2.flip(1), kind_E1 * KINDS.index(second_is)], dim=1),
        torch.cat([pairs_E2, kind_E1 * KINDS.index(first_is)], dim=1),
    ]


def _beside(from_E: Tensor, to_E: Tensor, segments: Segments) -> Tensor:
    count_L = segments.lane_offsets_L.diff()
    source, offsets = ragged_index(segments.lane_offsets_L[from_E], count_L[from_E])
    link = row_of(offsets)
    share = (source - segments.lane_offsets_L[from_E[link]] + 0.5) / count_L[from_E[link]]
    target = segments.lane_offsets_L[to_E[link]] + (share * count_L[to_E[link]]).long()
    return torch.stack([source, target], dim=1)
