"""Scene embeddings that Graph-RAE is compared with; all see the history only, none sees a label or a tag.

Shape legend: N scenes, M agents, D embedding size, F descriptor size, R raster cells along one side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoscale_ray.representation import features
from autoscale_ray.representation.kinematics import relative_motion, route_ahead, route_coordinates, route_of
from autoscale_ray.representation.rasters import bev_rasters
from autoscale_ray.representation.scene_graph import SceneGraph, global_edges, select_scenes
from autoscale_ray.representation.segments import cut_lanes
from autoscale_ray.scenes.batch import SceneBatch, row_of
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, DRIVING_COMMANDS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import VGAE, SAGEConv

Float64 = NDArray[np.float64]
SIDES_M = ((-1.75, 1.75), (1.75, 6.0), (-6.0, -1.75), (6.0, 25.0), (-25.0, -6.0))
"""Corridors beside the route: own, left, right, far left, far right."""
VULNERABLE = ("pedestrian", "bicycle")


def hand_descriptor(batch: SceneBatch) -> Tensor:
    """Describe a scene as an engineer would: own motion, route, nearest others by corridor, lights, lanes.

    Args:
        batch: N scenes.

    Returns:
        Float32 (N, F).
    """
    scene = features.scene_geometry(batch, cut_lanes(batch))
    return torch.cat([_own_motion(batch), _route_shape(batch), _others(batch, scene), _map_and_lights(batch, scene)], 1)


def _own_motion(batch: SceneBatch) -> Tensor:
    states = batch.ego_states_NT7
    now, before = states[:, CURRENT_FRAME], states[:, CURRENT_FRAME - 3]
    turn = torch.atan2((now[:, 2] - before[:, 2]).sin(), (now[:, 2] - before[:, 2]).cos())
    command = torch.nn.functional.one_hot(batch.command_N, len(DRIVING_COMMANDS)).float()
    limit = batch.route_speed_limit_N.nan_to_num(nan=14.0)
    single = [now[:, 3], now[:, 3] - before[:, 3], now[:, 5], now[:, 6], turn, limit, now[:, 3] / limit.clamp(min=1)]
    return torch.cat([torch.stack(single, dim=1), command], dim=1)


def _route_shape(batch: SceneBatch) -> Tensor:
    route = route_of(batch)
    ahead = route_ahead(route, (10.0, 20.0, 40.0))
    here = route_coordinates(torch.zeros(len(batch), 2), torch.arange(len(batch)), route)
    return torch.cat([here[:, 1:], ahead[..., 1], ahead[..., 2] - here[:, 2:]], dim=1)


def _others(batch: SceneBatch, scene: features.SceneGeometry) -> Tensor:
    kept = torch.nonzero(scene.near["agent"]).flatten()
    owner, place = scene.owner["agent"][kept], scene.place["agent"][kept]
    now, kind = batch.agent_states_AT5[kept, CURRENT_FRAME], batch.agent_type_A[kept]
    ego = torch.zeros_like(now)
    ego[:, 3] = batch.ego_states_NT7[owner, CURRENT_FRAME, 3]
    motion = relative_motion(ego, now)
    vulnerable = sum((kind == AGENT_TYPES.index(name)).float() for name in VULNERABLE)
    vehicle = (kind == AGENT_TYPES.index("vehicle")).float()
    moving = (now[:, 3:5].norm(dim=1) > 0.5).float()
    across = (now[:, 3:5].norm(dim=1) * (now[:, 2] - place[:, 2]).sin().abs()) / 10
    columns = [motion[:, 4], motion[:, 5], motion[:, 4] * vehicle * moving, motion[:, 4] * vehicle * (1 - moving),
               motion[:, 4] * vulnerable, motion[:, 4] * (1 - vehicle - vulnerable), across * motion[:, 4]]  # fmt: skip
    for low, high in SIDES_M:
        inside = ((place[:, 1] > low) & (place[:, 1] <= high)).float()
        for ahead in (place[:, 0] > 0, place[:, 0] <= 0):
            nearness = torch.exp(-place[:, 0].abs() / 20) * inside * ahead
            columns += [nearness, nearness * (motion[:, 2]).clamp(min=0), nearness * (-motion[:, 2]).clamp(min=0)]
    table = torch.stack(columns, dim=1)
    largest = torch.zeros(len(batch), table.shape[1])
    largest = largest.scatter_reduce(0, owner[:, None].expand_as(table), table, "amax")
    counts = torch.zeros(len(batch), 3).index_add(0, owner, torch.stack([vehicle, vulnerable, moving], dim=1))
    return torch.cat([largest, torch.log1p(counts)], dim=1)


def _map_and_lights(batch: SceneBatch, scene: features.SceneGeometry) -> Tensor:
    place, owner = scene.place["control"], scene.owner["control"]
    red = batch.polygon_red_QT[scene.controls_B, CURRENT_FRAME].float()
    nearness = torch.exp(-place[:, 0].abs() / 20) * (place[:, 0] > -5)
    table = torch.stack([nearness * red, nearness * (1 - red)], dim=1)
    lights = torch.zeros(len(batch), 2).scatter_reduce(0, owner[:, None].expand_as(table), table, "amax")
    near_lane = scene.near["lane"]
    lane_owner, lane_place = scene.owner["lane"][near_lane], scene.place["lane"][near_lane]
    turn = (_heading(scene.segments.points_G32[near_lane]) - lane_place[:, 2]).cos()
    kinds = torch.stack([(turn > 0.7).float(), (turn.abs() <= 0.7).float(), (turn < -0.7).float()], dim=1)
    lanes = torch.zeros(len(batch), 3).index_add(0, lane_owner, kinds)
    return torch.cat([lights, torch.log1p(lanes)], dim=1)


def _heading(points_G32: Tensor) -> Tensor:
    return torch.atan2(points_G32[:, 2, 1] - points_G32[:, 0, 1], points_G32[:, 2, 0] - points_G32[:, 0, 0])


def fit_principal_components(train_NF: Float64, size: int) -> tuple[Float64, Float64, Float64]:
    """Fit standardisation and PCA; return mean, scale and components (F, size)."""
    mean, scale = train_NF.mean(0), train_NF.std(0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    _, _, directions = np.linalg.svd((train_NF - mean) / scale, full_matrices=False)
    return mean, scale, directions[:size].T
