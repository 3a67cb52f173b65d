"""Bird's-eye-view occupancy: the target rasters of the auxiliary head and its mIoU.

The grid holds 32 x 32 cells of 2 m in the scene frame, x from -16 to 48 m (rows), y from -32 to 32 m
(columns).
Channels: the drivable area (a cell counts if its centre lies in a roadblock, intersection or car park
polygon), and the agents at 0, 2 and 4 s (a cell counts if one of 10 x 4 points spread over an agent's box
lies in it).

Shape legend: N scenes, A agents, Q polygons, W polygon vertices, G grid cells along a side (32), O channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import CURRENT_FRAME, POLYGON_LAYERS

NUM_CELLS = 32
CELL_M = 2.0
ORIGIN_X_M, ORIGIN_Y_M = -16.0, -32.0
AGENT_FRAMES = (CURRENT_FRAME, CURRENT_FRAME + 4, CURRENT_FRAME + 8)
DRIVABLE_LAYERS = ("roadblock", "intersection", "carpark_area")
BOX_POINTS = (10, 4)


def occupancy_targets(batch: SceneBatch) -> Tensor:
    """Rasterise the drivable area and the recorded agents.

    Args:
        batch: N scenes.

    Returns:
        occupied_NOGG: uint8, 0 or 1; the channels are the drivable area and the agents at 0, 2 and 4 s.
    """
    agents = [_agent_raster(batch, frame) for frame in AGENT_FRAMES]
    return torch.stack([_drivable_raster(batch), *agents], 1).to(torch.uint8)


def _agent_raster(batch: SceneBatch, frame: int) -> Tensor:
    state_A5 = batch.agent_states_AT5[:, frame]
    steps = [torch.linspace(-0.5, 0.5, count, device=state_A5.device) for count in BOX_POINTS]
    unit_P2 = torch.cartesian_prod(*steps)
    box_AP2 = unit_P2 * batch.agent_size_A2[:, None]
    cos_A1, sin_A1 = state_A5[:, 2:3].cos(), state_A5[:, 2:3].sin()
    x_AP = state_A5[:, 0:1] + box_AP2[..., 0] * cos_A1 - box_AP2[..., 1] * sin_A1
    y_AP = state_A5[:, 1:2] + box_AP2[..., 0] * sin_A1 + box_AP2[..., 1] * cos_A1
    row_AP = ((x_AP - ORIGIN_X_M) / CELL_M).floor().long()
    column_AP = ((y_AP - ORIGIN_Y_M) / CELL_M).floor().long()
    inside_AP = (row_AP >= 0) & (row_AP < NUM_CELLS) & (column_AP >= 0) & (column_AP < NUM_CELLS)
    inside_AP &= batch.agent_valid_AT[:, frame, None]
    cell_AP = (batch.agent_row_A[:, None] * NUM_CELLS + row_AP) * NUM_CELLS + column_AP
    raster = torch.zeros(len(batch) * NUM_CELLS**2, dtype=torch.bool, device=state_A5.device)
    raster[cell_AP[inside_AP]] = True
    return raster.view(len(batch), NUM_CELLS, NUM_CELLS)


def _drivable_raster(batch: SceneBatch) -> Tensor:
    layers = torch.tensor(
        [POLYGON_LAYERS.index(name) for name in DRIVABLE_LAYERS], device=batch.polygon_layer_Q.device
    )
    drivable_Q = torch.isin(batch.polygon_layer_Q, layers)
    covered_QGG = polygon_rasters(batch.polygon_points_W2, batch.polygon_point_offsets)
    covered_NGG = torch.zeros(len(batch), NUM_CELLS, NUM_CELLS, dtype=torch.int32, device=covered_QGG.device)
    covered_NGG.index_add_(0, batch.polygon_row_Q[drivable_Q], covered_QGG[drivable_Q].int())
    return covered_NGG > 0


def polygon_rasters(points_W2: Tensor, offsets_Q1: Tensor) -> Tensor:
    """Tell which cell centres lie inside each polygon (even-odd rule).

    Every edge that crosses the line through a row of cell centres flips the state of all cells beyond the
    crossing.

    Args:
        points_W2: Ring vertices in m, rings not closed.
        offsets_Q1: int64 first vertex of each polygon.

    Returns:
        inside_QGG: bool.
    """
    owner_W = row_of(offsets_Q1)
    next_W = torch.arange(1, len(points_W2) + 1, device=points_W2.device)
    filled_Q = offsets_Q1.diff() > 0
    next_W[offsets_Q1[1:][filled_Q] - 1] = offsets_Q1[:-1][filled_Q]
    start_W2, end_W2 = points_W2, points_W2[next_W]
    centre_x_G = ORIGIN_X_M + CELL_M * (torch.arange(NUM_CELLS, device=points_W2.device) + 0.5)
    crosses_WG = (start_W2[:, :1] <= centre_x_G) != (end_W2[:, :1] <= centre_x_G)
    edge_C, row_C = crosses_WG.nonzero(as_tuple=True)
    start_C2, end_C2 = start_W2[edge_C], end_W2[edge_C]
    fraction_C = (centre_x_G[row_C] - start_C2[:, 0]) / (end_C2[:, 0] - start_C2[:, 0])
    y_C = start_C2[:, 1] + fraction_C * (end_C2[:, 1] - start_C2[:, 1])
    # The first column whose centre lies beyond the crossing; column G collects crossings beyond the grid.
    column_C = ((y_C - ORIGIN_Y_M) / CELL_M - 0.5).floor().add(1).clamp(0, NUM_CELLS).long()
    flips = torch.zeros(
        (len(offsets_Q1) - 1) * NUM_CELLS * (NUM_CELLS + 1), dtype=torch.int32, device=y_C.device
    )
    index_C = (owner_W[edge_C] * NUM_CELLS + row_C) * (NUM_CELLS + 1) + column_C
    flips.index_add_(0, index_C, torch.ones_like(index_C, dtype=torch.int32))
    counts_QGG = flips.view(-1, NUM_CELLS, NUM_CELLS + 1)[..., :NUM_CELLS].cumsum(-1)
    return counts_QGG % 2 == 1


def mean_iou(logits_NOGG: Tensor, occupied_NOGG: Tensor) -> tuple[Tensor, Tensor]:
    """Compare predicted with recorded occupancy, scene by scene.

    IoU of a channel = |predicted and occupied| / |predicted or occupied|; the mean runs over the channels
    whose union is not empty.

    Args:
        logits_NOGG: A cell is predicted occupied above 0.
        occupied_NOGG: 0 or 1.

    Returns:
        value_N in [0, 1] (0 where invalid) and valid_N, False where every channel's union is empty.
    """
    predicted_NOGG, occupied_NOGG = logits_NOGG > 0, occupied_NOGG.bool()
    overlap_NO = (predicted_NOGG & occupied_NOGG).sum((-2, -1)).double()
    union_NO = (predicted_NOGG | occupied_NOGG).sum((-2, -1)).double()
    used_NO = union_NO > 0
    ratio_NO = torch.where(used_NO, overlap_NO / union_NO.clamp(min=1.0), 0.0)
    valid_N = used_NO.any(1)
    return ratio_NO.sum(1) / used_NO.sum(1).clamp(min=1), valid_N
