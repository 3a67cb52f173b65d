"""Neighbour tables of a batch at t = 0: nearest agents of each agent, and the lanes it drives on or beside.

They cost as much as the encoder that uses them, so they are computed once, when the cache is built. Tables
have a fixed width and scene-local numbers, with -1 where there are fewer neighbours. Distances are compared in steps of
a millimetre and equal ones by where things are, never by their numbers: lanes that part share their geometry up to
there, and the order of a file must not choose between them.

Shape legend: as in `batch`, and B scenes of a chunk, M agents of its largest scene, P agent-lane pairs, S
segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import offsets_of, ragged_index, row_of
from autoscale_ray.scenes.schema import CURRENT_FRAME

RADIUS_M = 60.0
"""Objects farther from the ego at t = 0 are no nodes of a scene's graph."""
NUM_AGENT_NEIGHBOURS = 8
NUM_AGENT_LANES = 3
MAX_LANE_DISTANCE_M = 5.0
MAX_LANE_ANGLE_RAD = math.radians(60.0)
_MAX_CELLS = 1 << 22
_STEPS_PER_M = 1000
_MAX_RANK = 1 << 24
"""Ranks below a step of distance: more than any scene has agents or lanes, few enough for float64 to be exact."""


def with_neighbours(batch: SceneBatch) -> SceneBatch:
    """Return the batch with `agent_neighbours_A8` and `agent_lanes_A3` filled in."""
    return replace(batch, agent_neighbours_A8=agent_neighbours(batch), agent_lanes_A3=agent_lanes(batch))


def agent_neighbours(batch: SceneBatch) -> Tensor:
    """Find the nearest other agents of every agent near the ego at t = 0.

    Returns:
        Int64 (A, 8), scene-local agent numbers by growing centre distance, -1 where there are fewer; agents that are
        absent at t = 0 or `RADIUS_M` away from the ego are no neighbours, and their rows are -1 throughout.
    """
    points_A2 = batch.agent_states_AT5[:, CURRENT_FRAME, :2]
    near_A = batch.agent_valid_AT[:, CURRENT_FRAME] & (points_A2.norm(dim=1) < RADIUS_M)
    rank_A = _rank_by_place(points_A2, batch.agent_offsets, batch.agent_row_A)
    table_A8 = batch.agent_row_A.new_full((len(points_A2), NUM_AGENT_NEIGHBOURS), -1)
    counts_N = batch.agent_offsets.diff()
    for first, last in _chunks(counts_N):
        low, high = int(batch.agent_offsets[first]), int(batch.agent_offsets[last])
        if low == high:
            continue
        counts_B = counts_N[first:last]
        starts_B1 = offsets_of(counts_B)
        row = row_of(starts_B1)
        slot = torch.arange(high - low, device=row.device) - starts_B1[row]
        chunk = slice(low, high)
        places = (points_A2[chunk], near_A[chunk], rank_A[chunk])
        near_BMk = _nearest(*places, row, slot, counts_B)
        table_A8[low:high, : near_BMk.shape[2]] = near_BMk[row, slot]
    return table_A8


def _nearest(
    points_A2: Tensor, near_A: Tensor, rank_A: Tensor, row: Tensor, slot: Tensor, counts_B: Tensor
) -> Tensor:
    largest = int(counts_B.max())
    padded_BM2 = points_A2.new_full((len(counts_B), largest, 2), math.nan)
    padded_BM2[row, slot] = torch.where(near_A[:, None], points_A2, math.nan)
    rank_BM = rank_A.new_zeros(len(counts_B), largest)
    rank_BM[row, slot] = rank_A
    offsets_BMM2 = padded_BM2[:, :, None] - padded_BM2[:, None, :]
    steps_BMM = (offsets_BMM2.square().sum(-1).sqrt() * _STEPS_PER_M).round().double()
    keys_BMM = (steps_BMM * _MAX_RANK + rank_BM[:, None, :]).nan_to_num_(nan=math.inf)
    keys_BMM.diagonal(dim1=1, dim2=2).fill_(math.inf)
    nearest = keys_BMM.topk(min(NUM_AGENT_NEIGHBOURS, largest), dim=2, largest=False)
    return torch.where(nearest.values.isfinite(), nearest.indices, -1)


def _rank_by_place(points_M2: Tensor, offsets: Tensor, row_M: Tensor) -> Tensor:
    """Return the number of each thing in its scene by x, then y, in steps of a millimetre (int64, M)."""
    steps_M2 = (points_M2.nan_to_num(0.0) * _STEPS_PER_M).round()
    order_M = steps_M2[:, 1].argsort(stable=True)
    order_M = order_M[steps_M2[order_M, 0].argsort(stable=True)]
    order_M = order_M[row_M[order_M].argsort(stable=True)]
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return rank_M - offsets[row_M]


def _chunks(counts_N: Tensor) -> Iterator[tuple[int, int]]:
    """Yield runs of scenes whose padded distance table stays below `_MAX_CELLS`."""
    first, largest = 0, 0
    for number, count in enumerate(counts_N.cpu().tolist()):
        largest_then = max(largest, count)
        if number > first and (number + 1 - first) * largest_then**2 > _MAX_CELLS:
            yield first, number
            first, largest_then = number, count
        largest = largest_then
    if len(counts_N):
        yield first, len(counts_N)


def agent_lanes(batch: SceneBatch) -> Tensor:
    """Find the nearest lanes of every agent whose direction there fits the agent's heading.

    A lane counts when its nearest compatible segment is within `MAX_LANE_DISTANCE_M` of the box centre; a
    segment is compatible when its direction is within `MAX_LANE_ANGLE_RAD` of the agent's heading.

    Returns:
        Int64 (A, 3), scene-local lane numbers by growing distance, -1 where there are fewer.
    """
    present_A = batch.agent_valid_AT[:, CURRENT_FRAME]
    poses_A3 = batch.agent_states_AT5[:, CURRENT_FRAME, :3]
    table_A3 = batch.agent_row_A.new_full((len(poses_A3), NUM_AGENT_LANES), -1)
    lane_counts_A = batch.lane_offsets.diff()[batch.agent_row_A] * present_A
    starts_A = batch.lane_offsets[batch.agent_row_A]
    boxes_L4 = _lane_boxes(batch)
    rank_L = _rank_by_place(_lane_middles(batch), batch.lane_offsets, batch.lane_row_L)
    for low, high in _runs_below(lane_counts_A, _MAX_CELLS):
        lane_P, pair_offsets = ragged_index(starts_A[low:high], lane_counts_A[low:high])
        agent_P = low + row_of(pair_offsets)
        close_P = _box_distance(poses_A3[agent_P, :2], boxes_L4[lane_P]) <= MAX_LANE_DISTANCE_M
        agent_P, lane_P = agent_P[close_P], lane_P[close_P]
        distance_P = _lane_distance(batch, poses_A3, agent_P, lane_P)
        keep_P = distance_P <= MAX_LANE_DISTANCE_M
        agent_P, lane_P, distance_P = agent_P[keep_P], lane_P[keep_P], distance_P[keep_P]
        steps_P = (distance_P * _STEPS_PER_M).round().double()
        order_P = (steps_P * _MAX_RANK + rank_L[lane_P]).argsort()
        order_P = order_P[agent_P[order_P].argsort(stable=True)]
        agent_P, lane_P = agent_P[order_P], lane_P[order_P]
        rank_P = torch.arange(len(agent_P), device=agent_P.device) - torch.searchsorted(agent_P, agent_P)
        first_P = rank_P < NUM_AGENT_LANES
        local_P = lane_P - starts_A[agent_P]
        table_A3[agent_P[first_P], rank_P[first_P]] = local_P[first_P]
    return table_A3


def _lane_boxes(batch: SceneBatch) -> Tensor:
    """Return min x, min y, max x, max y of every lane (L, 4)."""
    num_lanes = len(batch.lane_width_L)
    owner_V = row_of(batch.lane_point_offsets)
    index_V2 = owner_V[:, None].expand(-1, 2)
    low = batch.lane_points_V2.new_full((num_lanes, 2), math.inf).scatter_reduce_(
        0, index_V2, batch.lane_points_V2, "amin"
    )
    high = batch.lane_points_V2.new_full((num_lanes, 2), -math.inf).scatter_reduce_(
        0, index_V2, batch.lane_points_V2, "amax"
    )
    return torch.cat([low, high], dim=1)


def _lane_middles(batch: SceneBatch) -> Tensor:
    """Return the mean vertex of every lane (L, 2), which differs for lanes that part or merge."""
    counts_L = batch.lane_point_offsets.diff()
    owner_V = row_of(batch.lane_point_offsets)
    total_L2 = batch.lane_points_V2.new_zeros(len(counts_L), 2).double()
    return total_L2.index_add(0, owner_V, batch.lane_points_V2.double()) / counts_L.clamp(min=1)[:, None]


def _box_distance(points_P2: Tensor, boxes_P4: Tensor) -> Tensor:
    outside_P2 = torch.maximum(boxes_P4[:, :2] - points_P2, points_P2 - boxes_P4[:, 2:]).clamp(min=0.0)
    return outside_P2.norm(dim=1)


def _lane_distance(batch: SceneBatch, poses_A3: Tensor, agent_P: Tensor, lane_P: Tensor) -> Tensor:
    """Return the distance of each agent to the nearest compatible segment of its lane, inf without one
    (P)."""
    firsts_P = batch.lane_point_offsets[lane_P]
    counts_P = (batch.lane_point_offsets[lane_P + 1] - firsts_P - 1).clamp(min=0)
    begin_S, offsets = ragged_index(firsts_P, counts_P)
    pair_S = row_of(offsets)
    begin_S2 = batch.lane_points_V2[begin_S]
    along_S2 = batch.lane_points_V2[begin_S + 1] - begin_S2
    pose_S3 = poses_A3[agent_P[pair_S]]
    from_begin_S2 = pose_S3[:, :2] - begin_S2
    share_S = (from_begin_S2 * along_S2).sum(1) / along_S2.square().sum(1).clamp(min=1e-9)
    distance_S = (from_begin_S2 - share_S.clamp(0.0, 1.0)[:, None] * along_S2).norm(dim=1)
    facing_S = along_S2[:, 0] * pose_S3[:, 2].cos() + along_S2[:, 1] * pose_S3[:, 2].sin()
    fits_S = facing_S >= math.cos(MAX_LANE_ANGLE_RAD) * along_S2.norm(dim=1)
    distance_S = torch.where(fits_S, distance_S, math.inf)
    return distance_S.new_full((len(lane_P),), math.inf).scatter_reduce_(0, pair_S, distance_S, "amin")


def _runs_below(counts: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Yield runs of items whose counts add up to about `limit` at most; one item always goes through."""
    ends = offsets_of(counts)
    low = 0
    while low < len(counts):
        high = max(low + 1, int(torch.searchsorted(ends, ends[low] + limit, right=True)) - 1)
        yield low, high
        low = high
