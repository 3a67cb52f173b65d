"""Agent tokens: what the planner sees of each of the few agents that matter, in the ego's route frame.

Everything comes from frames -1.5 ... 0 s. Each value is divided by a fixed scale and clamped, so no statistic
of any training set enters and arms with different mixtures read the same numbers.

Shape legend: N scenes, T frames (15), A agents of all scenes, K agent slots of a scene, H times of the
look-ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.planning.frenet import project, route_pose, wrap_angle
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, FRAME_INTERVAL_S

FIRST_HISTORY_FRAME = 1
"""Frame -1.5 s; the optional frame -2.0 s is never read."""
LOOK_AHEAD_S = (0.0, 1.0, 2.0, 3.0, 4.0)
HORIZON_S = 8.0
MIN_GAP_M = 0.5
MIN_SPEED_MPS = 0.3
PATH_MARGIN_M = 0.3
POSITION_SCALE_M, VELOCITY_SCALE_MPS = 30.0, 10.0
NUM_AGENT_FEATURES = 34 + len(AGENT_TYPES)
"""Feature 0 is 1 in a filled slot; an empty slot is all 0. Features 1-4: position and velocity, scene frame."""


def nearest_elements(distance_E: Tensor, offsets_N1: Tensor, num_slots: int) -> Tensor:
    """Pick the nearest elements of each scene out of a flat list.

    Args:
        distance_E: Distance of every element, inf for elements that must not be picked.
        offsets_N1: int64 first element of each scene.
        num_slots: Largest number picked in a scene.

    Returns:
        index_NK: int64 flat element numbers, nearest first, -1 in empty slots; ties keep the stored order.
    """
    row_E = row_of(offsets_N1)
    order_E = distance_E.argsort(stable=True)
    order_E = order_E[row_E[order_E].argsort(stable=True)]
    rank_E = torch.arange(len(order_E), device=distance_E.device) - offsets_N1[row_E[order_E]]
    keep_E = (rank_E < num_slots) & distance_E[order_E].isfinite()
    index_NK = torch.full((len(offsets_N1) - 1, num_slots), -1, dtype=torch.int64, device=distance_E.device)
    index_NK[row_E[order_E][keep_E], rank_E[keep_E]] = order_E[keep_E]
    return index_NK


def relevant_agents(batch: SceneBatch, route_NR3: Tensor, num_slots: int) -> Tensor:
    """Pick the agents that come nearest to the ego within 4 s if everybody keeps his speed.

    The ego is moved along its route, an agent along its velocity; both are compared at 0, 1, 2, 3 and 4 s.

    Args:
        batch: N scenes.
        route_NR3: Their routes.
        num_slots: Agents kept in a scene.

    Returns:
        index_NK: int64 numbers of agents in the batch, most relevant first, -1 in empty slots.
    """
    times_H = torch.tensor(LOOK_AHEAD_S, device=route_NR3.device)
    speed_N = batch.ego_states_NT7[:, CURRENT_FRAME, 3].clamp(min=0.0)
    path_NH2 = route_pose(route_NR3, speed_N[:, None] * times_H)[..., :2]
    state_A5 = batch.agent_states_AT5[:, CURRENT_FRAME]
    agent_AH2 = state_A5[:, None, :2] + times_H[:, None] * state_A5[:, None, 3:5]
    distance_A = (agent_AH2 - path_NH2[batch.agent_row_A]).norm(dim=-1).amin(1)
    seen_A = batch.agent_valid_AT[:, CURRENT_FRAME]
    return nearest_elements(distance_A.masked_fill(~seen_A, torch.inf), batch.agent_offsets, num_slots)


def agent_tokens(batch: SceneBatch, route_NR3: Tensor, ego_s_d_speed_N3: Tensor, num_slots: int) -> Tensor:
    """Describe the relevant agents of every scene.

    Args:
        batch: N scenes.
        route_NR3: Their routes.
        ego_s_d_speed_N3: The ego now: s and d in m, speed along the route in m/s.
        num_slots: Agents kept in a scene.

    Returns:
        tokens_NKF.
    """
    index_NK = relevant_agents(batch, route_NR3, num_slots)
    if len(batch.agent_type_A) == 0:
        return route_NR3.new_zeros(*index_NK.shape, NUM_AGENT_FEATURES)
    slot_NK = index_NK.clamp(min=0)
    state_NK5 = batch.agent_states_AT5[:, CURRENT_FRAME][slot_NK]
    size_NK2 = batch.agent_size_A2[slot_NK]
    s_NK, d_NK, route_yaw_NK = project(route_NR3, state_NK5[..., :2])
    yaw_NK = wrap_angle(state_NK5[..., 2] - route_yaw_NK)
    on_route = (s_NK, d_NK, yaw_NK, *_along_route(state_NK5[..., 3], state_NK5[..., 4], route_yaw_NK))
    parts = [
        torch.ones_like(s_NK)[..., None],
        (state_NK5[..., :2] / POSITION_SCALE_M).clamp(-3.0, 3.0),
        (state_NK5[..., 3:] / VELOCITY_SCALE_MPS).clamp(-3.0, 3.0),
        _motion(on_route, ego_s_d_speed_N3),
        _conflict(on_route, size_NK2, batch.ego_size_N4, ego_s_d_speed_N3),
        _history(batch, slot_NK, route_yaw_NK),
        _shape(state_NK5, size_NK2, batch.agent_type_A[slot_NK]),
    ]
    tokens_NKF = torch.cat(parts, -1)
    assert tokens_NKF.shape[-1] == NUM_AGENT_FEATURES
    return torch.where((index_NK >= 0)[..., None], tokens_NKF, 0.0)


def _along_route(vx_NK: Tensor, vy_NK: Tensor, route_yaw_NK: Tensor) -> tuple[Tensor, Tensor]:
    cos_NK, sin_NK = route_yaw_NK.cos(), route_yaw_NK.sin()
    return vx_NK * cos_NK + vy_NK * sin_NK, vy_NK * cos_NK - vx_NK * sin_NK


def _motion(on_route: tuple[Tensor, ...], ego_N3: Tensor) -> Tensor:
    s_NK, d_NK, yaw_NK, speed_s_NK, speed_d_NK = on_route
    values = [
        (s_NK - ego_N3[:, 0:1]) / 20,
        (s_NK - ego_N3[:, 0:1]) / 60,
        d_NK / 4,
        d_NK / 20,
        (d_NK - ego_N3[:, 1:2]) / 4,
        yaw_NK.cos(),
        yaw_NK.sin(),
        speed_s_NK / 10,
        speed_d_NK / 5,
        (ego_N3[:, 2:3] - speed_s_NK) / 10,
    ]
    return torch.stack(values, -1).clamp(-3.0, 3.0)


def _conflict(on_route: tuple[Tensor, ...], size_NK2: Tensor, ego_size_N4: Tensor, ego_N3: Tensor) -> Tensor:
    """Say when ego and agent would meet: gap, time to collision, time to and out of the ego's path."""
    s_NK, d_NK, yaw_NK, speed_s_NK, speed_d_NK = on_route
    half_s_NK = (size_NK2[..., 0] * yaw_NK.cos().abs() + size_NK2[..., 1] * yaw_NK.sin().abs()) / 2
    half_d_NK = (size_NK2[..., 0] * yaw_NK.sin().abs() + size_NK2[..., 1] * yaw_NK.cos().abs()) / 2
    front_N = ego_size_N4[:, 0] / 2 + ego_size_N4[:, 3]
    gap_NK = s_NK - ego_N3[:, 0:1] - half_s_NK - front_N[:, None]
    closing_NK = ego_N3[:, 2:3] - speed_s_NK
    positive_gap_NK = gap_NK.clamp(min=MIN_GAP_M)
    path_half_NK = ego_size_N4[:, None, 1] / 2 + PATH_MARGIN_M + half_d_NK
    approach_NK = -d_NK.sign() * speed_d_NK
    enter_s_NK = _time(d_NK.abs() - path_half_NK, approach_NK)
    leave_s_NK = _time(d_NK.abs() + path_half_NK, approach_NK)
    arrive_s_NK = _time(gap_NK, ego_N3[:, 2:3].expand_as(gap_NK))
    values = [
        gap_NK / 20,
        (-positive_gap_NK / 10).exp(),
        closing_NK.clamp(min=0.0) / positive_gap_NK,
        closing_NK.clamp(min=0.0).square() / (2 * positive_gap_NK) / 3,
        enter_s_NK / HORIZON_S,
        leave_s_NK / HORIZON_S,
        arrive_s_NK / HORIZON_S,
        (arrive_s_NK - enter_s_NK) / 4,
        (arrive_s_NK - leave_s_NK) / 4,
        (path_half_NK - d_NK.abs()) / 2,
        (gap_NK > 0).float() * (d_NK.abs() < path_half_NK).float(),
    ]
    return torch.stack(values, -1).clamp(-2.0, 2.0)


def _time(distance_NK: Tensor, speed_NK: Tensor) -> Tensor:
    """Return the time to cover a distance, 0 when already covered and HORIZON_S when never."""
    time_NK = distance_NK.clamp(min=0.0) / speed_NK.clamp(min=MIN_SPEED_MPS)
    never_NK = (speed_NK < MIN_SPEED_MPS) & (distance_NK > 0)
    return torch.where(never_NK, HORIZON_S, time_NK).clamp(max=HORIZON_S)


def _history(batch: SceneBatch, slot_NK: Tensor, route_yaw_NK: Tensor) -> Tensor:
    """Compare now with the earliest frame since -1.5 s in which the agent was seen."""
    seen_AH = batch.agent_valid_AT[:, FIRST_HISTORY_FRAME : CURRENT_FRAME + 1]
    first_A = FIRST_HISTORY_FRAME + seen_AH.float().argmax(1)
    agents_A = torch.arange(len(first_A), device=first_A.device)
    change_A5 = batch.agent_states_AT5[:, CURRENT_FRAME] - batch.agent_states_AT5[agents_A, first_A]
    duration_A = (CURRENT_FRAME - first_A) * FRAME_INTERVAL_S
    rate_NK5 = (change_A5 / duration_A.clamp(min=FRAME_INTERVAL_S)[:, None])[slot_NK]
    turn_NK = wrap_angle(change_A5[:, 2])[slot_NK] / duration_A.clamp(min=FRAME_INTERVAL_S)[slot_NK]
    acceleration_s_NK, acceleration_d_NK = _along_route(rate_NK5[..., 3], rate_NK5[..., 4], route_yaw_NK)
    values = [acceleration_s_NK / 3, acceleration_d_NK / 3, turn_NK * 2, duration_A[slot_NK] / 1.5]
    return torch.stack(values, -1).clamp(-2.0, 2.0)


def _shape(state_NK5: Tensor, size_NK2: Tensor, type_NK: Tensor) -> Tensor:
    """Give size, heading in the scene frame and type."""
    values = [
        size_NK2[..., 0] / 5,
        size_NK2[..., 1] / 2,
        state_NK5[..., 2].cos(),
        state_NK5[..., 2].sin(),
    ]
    kind_NKF = torch.nn.functional.one_hot(type_NK, len(AGENT_TYPES)).float()
    return torch.cat([torch.stack(values, -1).clamp(-4.0, 4.0), kind_NKF], -1)
