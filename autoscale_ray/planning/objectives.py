"""The planner's training objectives, each the mean over a batch.

Shape legend: B scenes, M modes, P plan frames (8), O occupancy channels, G grid cells along a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.anchors import anchor_trajectories
from autoscale_ray.planning.features import PlannerFeatures
from autoscale_ray.planning.planner import PlannerOutput

HEADING_WEIGHT_M_PER_RAD = 5.0
"""One radian of heading error counts like so many metres of lateral error."""
SMOOTH_M = 0.1
AGENT_CELL_WEIGHT = 3.0
"""Weight of occupied cells in the agent channels, where about one cell in a hundred is occupied."""


def planning_loss(
    output: PlannerOutput, scenes: PlannerFeatures, config: PlannerConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Combine the objectives: L = L_mode + L_imitation + occupancy_weight * L_occupancy.

    Args:
        output: The planner's output for the scenes.
        scenes: Targets; every scene has a valid plan frame.
        config: Weights.

    Returns:
        The loss (scalar) and its components mode, imitation and occupancy, before weighting.
    """
    anchors_BMP3 = anchor_trajectories(scenes.state_N4, config)
    error_BM = trajectory_error(
        anchors_BMP3, scenes.target_NP3, scenes.target_valid_NP, config.lateral_weight
    )
    mode_B = error_BM.argmin(1)
    chosen_BP3 = output.trajectories_BMP3[torch.arange(len(mode_B), device=mode_B.device), mode_B]
    imitation_B1 = trajectory_error(
        chosen_BP3[:, None], scenes.target_NP3, scenes.target_valid_NP, config.lateral_weight
    )
    parts = {
        "mode": torch.nn.functional.cross_entropy(output.logits_BM, mode_B),
        "imitation": imitation_B1.mean(),
        "occupancy": imitation_B1.new_zeros(()),
    }
    if output.occupancy_BOGG is not None:
        drawn = len(output.occupancy_BOGG)
        parts["occupancy"] = occupancy_loss(output.occupancy_BOGG, scenes.occupancy_NOGG[:drawn])
    return parts["mode"] + parts["imitation"] + config.occupancy_weight * parts["occupancy"], parts


def trajectory_error(
    trajectories_BMP3: Tensor, target_BP3: Tensor, valid_BP: Tensor, lateral_weight: float
) -> Tensor:
    """Measure how far trajectories are from the recorded one, in metres of longitudinal error.

    e = mean over valid frames of h(ds) + w h(dd) + w 5 m/rad h(dpsi),  h(x) = sqrt(x^2 + 0.1^2) - 0.1.

    Args:
        trajectories_BMP3: s, d in m and heading in rad.
        target_BP3: The recorded trajectory.
        valid_BP: Frames that count; at least one a scene.
        lateral_weight: w, > 0.

    Returns:
        error_BM in m, >= 0.
    """
    weights_3 = torch.tensor(
        [1.0, lateral_weight, lateral_weight * HEADING_WEIGHT_M_PER_RAD], device=target_BP3.device
    )
    offset_BMP3 = trajectories_BMP3 - target_BP3[:, None]
    error_BMP3 = (offset_BMP3.square() + SMOOTH_M**2).sqrt() - SMOOTH_M
    share_BP = valid_BP / valid_BP.sum(1, keepdim=True)
    return torch.einsum("bmpc,bp,c->bm", error_BMP3, share_BP, weights_3)


def occupancy_loss(logits_BOGG: Tensor, occupied_BOGG: Tensor) -> Tensor:
    """Return the binary cross-entropy of the occupancy, occupied agent cells counted 3 times.

    Args:
        logits_BOGG: Channel 0 is the drivable area, the others are agents.
        occupied_BOGG: 0 or 1.

    Returns:
        Scalar mean over cells and channels.
    """
    weight_O11 = torch.full((logits_BOGG.shape[1], 1, 1), AGENT_CELL_WEIGHT, device=logits_BOGG.device)
    weight_O11[0] = 1.0
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits_BOGG, occupied_BOGG.float(), pos_weight=weight_O11
    )
