"""The ego token: its own motion since -1.5 s, its size, command, speed limit, the route ahead and a red light
on it.

Shape legend: N scenes, T frames (15), H history frames (4), R preview distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.planning.agent_tokens import FIRST_HISTORY_FRAME
from autoscale_ray.planning.frenet import project_poses, route_pose
from autoscale_ray.planning.map_tokens import MAX_STOP_M, stop_line_distance
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.schema import CURRENT_FRAME, DRIVING_COMMANDS

PREVIEW_M = (5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 55.0, 70.0)
NUM_HISTORY_FRAMES = CURRENT_FRAME + 1 - FIRST_HISTORY_FRAME
NUM_EGO_FEATURES = 7 * NUM_HISTORY_FRAMES + 4 + len(DRIVING_COMMANDS) + len(PREVIEW_M) + 4 + 4


def ego_state_on_route(batch: SceneBatch, route_NR3: Tensor) -> Tensor:
    """Return the ego now in the route frame.

    Args:
        batch: N scenes.
        route_NR3: Their routes.

    Returns:
        state_N4: s and d in m, heading relative to the route in rad, speed in m/s.
    """
    now_N7 = batch.ego_states_NT7[:, CURRENT_FRAME]
    pose_N3 = project_poses(route_NR3, now_N7[:, None, :3])[:, 0]
    return torch.cat([pose_N3, now_N7[:, 3:4].clamp(min=0.0)], 1)


def ego_tokens(batch: SceneBatch, route_NR3: Tensor, state_N4: Tensor) -> Tensor:
    """Describe the ego of every scene.

    Args:
        batch: N scenes.
        route_NR3: Their routes.
        state_N4: From `ego_state_on_route`.

    Returns:
        tokens_NF.
    """
    size_N4 = batch.ego_size_N4
    sizes_N4 = torch.stack([size_N4[:, 0] / 5, size_N4[:, 1] / 2, size_N4[:, 2] / 3, size_N4[:, 3] / 1.5], 1)
    command_NF = torch.nn.functional.one_hot(batch.command_N, len(DRIVING_COMMANDS)).float()
    speed_N = state_N4[:, 3]
    parts = [
        _history(batch, route_NR3),
        sizes_N4,
        command_NF,
        _preview(route_NR3),
        _speed_limit(batch.route_speed_limit_N, speed_N),
        _red_light(stop_line_distance(batch, route_NR3) - size_N4[:, 0] / 2 - size_N4[:, 3], speed_N),
    ]
    tokens_NF = torch.cat(parts, 1)
    assert tokens_NF.shape[1] == NUM_EGO_FEATURES
    return tokens_NF


def _history(batch: SceneBatch, route_NR3: Tensor) -> Tensor:
    frames = slice(FIRST_HISTORY_FRAME, CURRENT_FRAME + 1)
    states_NH7 = batch.ego_states_NT7[:, frames]
    poses_NH3 = project_poses(route_NR3, states_NH7[..., :3])
    scale_7 = torch.tensor([10.0, 2.0, 0.5, 10.0, 2.0, 3.0, 3.0], device=route_NR3.device)
    values_NH7 = (torch.cat([poses_NH3, states_NH7[..., 3:]], -1) / scale_7).clamp(-4.0, 4.0)
    return (values_NH7 * batch.ego_valid_NT[:, frames, None]).flatten(1)


def _preview(route_NR3: Tensor) -> Tensor:
    distances_NR = torch.tensor((0.0, *PREVIEW_M), device=route_NR3.device).expand(len(route_NR3), -1)
    yaw_NR = route_pose(route_NR3, distances_NR)[..., 2]
    return (yaw_NR[:, 1:] - yaw_NR[:, :1]).clamp(-3.0, 3.0)


def _speed_limit(limit_N: Tensor, speed_N: Tensor) -> Tensor:
    known_N = limit_N.isfinite()
    values = [limit_N.nan_to_num() / 10, (limit_N - speed_N).nan_to_num() / 5, known_N.float(), speed_N / 10]
    return torch.stack(values, 1).clamp(-4.0, 4.0)


def _red_light(gap_N: Tensor, speed_N: Tensor) -> Tensor:
    """Describe the free way to the stop line; all 0 without a red light ahead."""
    red_N = gap_N.isfinite()
    free_N = gap_N.clamp(0.5, MAX_STOP_M)
    braking_N = speed_N.square() / (2 * free_N)
    values = [red_N.float(), free_N / 20, (-free_N / 10).exp(), (braking_N / 3).clamp(max=2.0)]
    return torch.stack(values, 1) * red_N[:, None]
