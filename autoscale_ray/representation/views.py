"""Changes of a scene graph that keep its meaning: views for the contrastive term, masks for the masked decoder.

Scenes are not mirrored (left and right differ in meaning) and not rotated (the ego frame already fixes the direction).

Shape legend: N scenes, M nodes of one type, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoscale_ray.representation.decoder import MASKED_TYPES
from autoscale_ray.representation.kinematics import rotated
from autoscale_ray.representation.scene_graph import SceneGraph, drop_nodes
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import CURRENT_FRAME, NUM_FRAMES

FAR_AGENT_M = 30.0
FAR_LANE_M = 40.0
DROP_SHARE = 0.2
FEATURE_MASK_SHARE = 0.1
JITTER = 0.01
"""Standard deviation of the noise on every feature: 0.2 m on positions, 0.1 m/s on speeds."""
NODE_MASK_SHARE = 0.5


def half_a_second_later(batch: SceneBatch) -> SceneBatch:
    """Return the scenes one frame later, in the ego frame of then.

    Args:
        batch: N scenes.
    """
    now_N3 = batch.ego_states_NT7[:, CURRENT_FRAME + 1, :3]
    frames_T = torch.arange(1, NUM_FRAMES + 1).clamp(max=NUM_FRAMES - 1)
    known_T = torch.arange(NUM_FRAMES) < NUM_FRAMES - 1
    agent_N3, line_N3 = now_N3[batch.agent_row_A], now_N3[row_of(batch.centerline_offsets)]
    states_AT5 = batch.agent_states_AT5[:, frames_T]
    velocity_AT2 = rotated(states_AT5[..., 3:], agent_N3[:, None, 2])
    ego_NT7 = batch.ego_states_NT7[:, frames_T]  # its speeds and accelerations are in the body frame
    return replace(
        batch,
        ego_states_NT7=torch.cat([_poses_in(ego_NT7[..., :3], now_N3[:, None]), ego_NT7[..., 3:]], dim=2),
        ego_valid_NT=batch.ego_valid_NT[:, frames_T] & known_T,
        agent_states_AT5=torch.cat([_poses_in(states_AT5[..., :3], agent_N3[:, None]), velocity_AT2], dim=2),
        agent_valid_AT=batch.agent_valid_AT[:, frames_T] & known_T,
        lane_points_V2=_points_in(
            batch.lane_points_V2, now_N3[batch.lane_row_L[row_of(batch.lane_point_offsets)]]
        ),
        polygon_points_W2=_points_in(
            batch.polygon_points_W2, now_N3[batch.polygon_row_Q[row_of(batch.polygon_point_offsets)]]
        ),
        polygon_red_QT=batch.polygon_red_QT[:, frames_T],
        centerline_C3=_poses_in(batch.centerline_C3, line_N3),
        agent_neighbours_A8=None,
        agent_lanes_A3=None,
    )


def _points_in(points_M2: Tensor, frame_M3: Tensor) -> Tensor:
    return rotated(points_M2 - frame_M3[..., :2], frame_M3[..., 2])


def _poses_in(poses_M3: Tensor, frame_M3: Tensor) -> Tensor:
    turn = poses_M3[..., 2:] - frame_M3[..., 2:]
    yaw = torch.atan2(turn.sin(), turn.cos())
    return torch.cat([_points_in(poses_M3[..., :2], frame_M3), yaw], dim=-1)


def semantic_view(graph: SceneGraph, generator: torch.Generator) -> SceneGraph:
    """Return a view that a driver would call the same scene.

    Drops each agent beyond 30 m and each lane piece beyond 40 m with probability 0.2, adds noise of about 0.2 m and
    0.1 m/s, and hides a tenth of the feature values.

    Args:
        graph: N scenes with their targets.
        generator: Source of every draw.
    """
    far = {
        "agent": graph.targets["agent.box"][:, :2].norm(dim=1) > FAR_AGENT_M,
        "lane": graph.targets["lane.points"][:, 1].norm(dim=1) > FAR_LANE_M,
    }
    keep = {
        name: ~(is_far & (torch.rand(len(is_far), generator=generator) < DROP_SHARE).to(is_far.device))
        for name, is_far in far.items()
    }
    view = drop_nodes(replace(graph, targets={}), keep)
    return replace(view, features={name: _noisy(table, generator) for name, table in view.features.items()})


def _noisy(table_MF: Tensor, generator: torch.Generator) -> Tensor:
    shown = torch.rand(table_MF.shape, generator=generator) >= FEATURE_MASK_SHARE
    noise = JITTER * torch.randn(table_MF.shape, generator=generator)
    return (table_MF + noise.to(table_MF.device)) * shown.to(table_MF.device)


def draw_node_masks(graph: SceneGraph, generator: torch.Generator) -> dict[str, Tensor]:
    """Choose half of the agents and lane pieces.

    Args:
        graph: N scenes.
        generator: Source of every draw.

    Returns:
        Bool by node type, True where the features are to be hidden.
    """
    tables = {name: graph.features[name] for name in MASKED_TYPES}
    return {
        name: (torch.rand(len(table), generator=generator) < NODE_MASK_SHARE).to(table.device)
        for name, table in tables.items()
    }


def masked_graph(graph: SceneGraph, masks: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> SceneGraph:
    """Replace the features of chosen nodes by a learned token.

    Args:
        graph: N scenes.
        masks: From `draw_node_masks`.
        tokens: One feature row by node type.
    """
    hidden = {
        name: torch.where(mask[:, None], tokens[name], graph.features[name]) for name, mask in masks.items()
    }
    return replace(graph, features={**graph.features, **hidden})
