"""Anchor trajectories: a fixed vocabulary computed from the ego's own state, the same for every mixture.

An anchor is one constant acceleration a together with one final offset o from the route centre line:

    s(t) = s0 + v0 t + a t^2 / 2, standing still once the speed reaches 0,
    d(t) = o + (d0 - o) b(t/T) + v0 sin(psi0) t (1 - t/T)^3,   b(u) = 1 - 10 u^3 + 15 u^4 - 6 u^5,
    psi(t) = psi0 (1 - t/T)^3,   T = 4 s.

No training scene enters: anchors fitted to a training set would give each mixture its own output head.

Shape legend: N scenes, M modes, P plan frames (8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.config import PlannerConfig
from autoscale_ray.scenes.schema import FRAME_INTERVAL_S, NUM_PLAN_FRAMES


def num_modes(config: PlannerConfig) -> int:
    """Return the number of anchors M."""
    return len(config.anchor_accelerations_mps2) * len(config.anchor_offsets_m)


def anchor_trajectories(state_N4: Tensor, config: PlannerConfig) -> Tensor:
    """Compute the anchors of every scene.

    Args:
        state_N4: Ego now on its route: s, d in m, relative heading in rad, speed in m/s.
        config: Accelerations in m/s^2 and offsets in m.

    Returns:
        anchors_NMP3: s, d in m and heading relative to the route in rad; mode = acceleration * offsets +
            offset.
    """
    times_P = torch.arange(1, NUM_PLAN_FRAMES + 1, device=state_N4.device) * FRAME_INTERVAL_S
    pairs_M2 = torch.cartesian_prod(
        torch.tensor(config.anchor_accelerations_mps2, device=state_N4.device),
        torch.tensor(config.anchor_offsets_m, device=state_N4.device),
    ).view(-1, 2)
    s0, d0, yaw0, speed0 = (column[:, None, None] for column in state_N4.unbind(1))
    acceleration_M1, offset_M1 = pairs_M2[:, :1], pairs_M2[:, 1:]
    s_NMP = s0 + _distance(speed0, acceleration_M1, times_P)
    progress_P = times_P / times_P[-1]
    blend_P = 1 - progress_P**3 * (10 - 15 * progress_P + 6 * progress_P**2)
    fade_P = (1 - progress_P) ** 3
    d_NMP = offset_M1 + (d0 - offset_M1) * blend_P + speed0 * yaw0.sin() * times_P * fade_P
    yaw_NMP = (yaw0 * fade_P).expand_as(s_NMP)
    return torch.stack([s_NMP, d_NMP, yaw_NMP], -1)


def _distance(speed0: Tensor, acceleration: Tensor, times_P: Tensor) -> Tensor:
    """Return the way driven at constant acceleration that ends in standing still."""
    stop_s = torch.where(acceleration < 0, speed0 / (-acceleration).clamp(min=1e-3), torch.inf)
    driving = torch.minimum(times_P, stop_s)
    return speed0 * driving + acceleration * driving.square() / 2
