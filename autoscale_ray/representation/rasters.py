"""Images and counts of a scene that its embedding must be able to reproduce.

Shape legend: N scenes, M nodes, R raster cells along one side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.representation.kinematics import SPEED_SCALE_MPS
from autoscale_ray.representation.scene_graph import SceneGraph
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import AGENT_TYPES

RASTER_ORIGIN_M = (-24.0, -32.0)
"""Rear right corner of the raster: 24 m behind the ego, 40 m ahead, 32 m to either side."""
RASTER_SIZE_M = 64.0
NUM_SECTORS = 8
RING_EDGES_M = (10.0, 25.0)
BOX_SAMPLES = (5, 3)
LANE_SAMPLES = 12
NUM_SECTOR_COUNTS = NUM_SECTORS * (len(RING_EDGES_M) + 1) * 2
"""Sectors, rings, and vehicles or other agents."""


def bev_rasters(graph: SceneGraph, num_cells: int) -> Tensor:
    """Draw the bird's-eye view of every scene.

    Args:
        graph: N scenes with their targets.
        num_cells: R.

    Returns:
        Float32 (N, 4, R * R): occupied (0 or 1), flow x, flow y (velocity / 10 m/s where occupied), lane (0 or 1);
        row-major, x first.
    """
    box_M7 = graph.targets["agent.box"]
    points_MK2 = _box_points(box_M7)
    owner_M = row_of(graph.offsets["agent"])
    raster = points_MK2.new_zeros(len(graph) * num_cells * num_cells, 4)
    cell_MK, inside_MK = _cells(points_MK2, owner_M, num_cells)
    values = torch.nn.functional.pad(box_M7[:, 3:5] / SPEED_SCALE_MPS, (1, 1))
    values[:, 0] = 1.0
    # Where boxes overlap the largest value wins, not the last one written: the result ignores the agents' order.
    drawn = values[:, None].expand(-1, cell_MK.shape[1], -1)[inside_MK]
    index = cell_MK[inside_MK][:, None].expand_as(drawn)
    high = raster.scatter_reduce(0, index, drawn, "amax")
    low = raster.scatter_reduce(0, index, drawn, "amin")
    raster = high + low * (high == 0)
    lanes_MK2 = _polyline_points(graph.targets["lane.points"])
    cell_MK, inside_MK = _cells(lanes_MK2, row_of(graph.offsets["lane"]), num_cells)
    raster[cell_MK[inside_MK], 3] = 1.0
    return raster.reshape(len(graph), -1, 4).transpose(1, 2)


def _box_points(box_M7: Tensor) -> Tensor:
    steps = [torch.linspace(-0.5, 0.5, count, device=box_M7.device) for count in BOX_SAMPLES]
    grid_K2 = torch.cartesian_prod(*steps)
    local = grid_K2[None] * box_M7[:, None, 5:7]
    cos, sin = box_M7[:, 2:3].cos(), box_M7[:, 2:3].sin()
    x = box_M7[:, :1] + cos * local[..., 0] - sin * local[..., 1]
    y = box_M7[:, 1:2] + sin * local[..., 0] + cos * local[..., 1]
    return torch.stack([x, y], dim=2)


def _polyline_points(points_M32: Tensor) -> Tensor:
    share_K1 = torch.linspace(0, 1, LANE_SAMPLES // 2, device=points_M32.device)[:, None]
    first = torch.lerp(points_M32[:, :1], points_M32[:, 1:2], share_K1)
    second = torch.lerp(points_M32[:, 1:2], points_M32[:, 2:], share_K1)
    return torch.cat([first, second], dim=1)


def _cells(points_MK2: Tensor, owner_M: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    place = (points_MK2 - points_MK2.new_tensor(RASTER_ORIGIN_M)) * (num_cells / RASTER_SIZE_M)
    inside = ((place >= 0) & (place < num_cells)).all(dim=2)
    column = place.long()
    return (owner_M[:, None] * num_cells + column[..., 0]) * num_cells + column[..., 1], inside


def sector_counts(graph: SceneGraph) -> Tensor:
    """Count vehicles and other agents by direction and distance.

    Args:
        graph: N scenes with their targets.

    Returns:
        Float32 (N, 8 sectors * 3 rings * 2 kinds): log(1 + count).
    """
    box, kind = graph.targets["agent.box"], graph.targets["agent.type"]
    angle = torch.atan2(box[:, 1], box[:, 0])
    sector = torch.round(angle / (2 * torch.pi / NUM_SECTORS)).long() % NUM_SECTORS
    ring = torch.bucketize(box[:, :2].norm(dim=1), box.new_tensor(RING_EDGES_M))
    other = (kind != AGENT_TYPES.index("vehicle")).long()
    bin_M = (sector * (len(RING_EDGES_M) + 1) + ring) * 2 + other
    bin_M += row_of(graph.offsets["agent"]) * NUM_SECTOR_COUNTS
    counts = torch.bincount(bin_M, minlength=len(graph) * NUM_SECTOR_COUNTS)
    return torch.log1p(counts.float()).reshape(len(graph), NUM_SECTOR_COUNTS)
