"""The planner's training objectives, each the mean over a shard.

Shape legend: N scenes of a run, V logical shards, B scenes of a shard, M modes, P plan frames (8), O
occupancy channels, G grid cells along a side, X = 3 P.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.anchors import anchor_trajectories, num_modes
from autoscale_ray.planning.features import CHUNK_SCENES, Features, PlannerFeatures
from autoscale_ray.planning.planner import RESIDUAL_SCALE, PlannerOutput

HEADING_WEIGHT_M_PER_RAD = 5.0
"""One radian of heading error counts like so many metres of lateral error."""
SMOOTH_M = 0.1


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs and targets of the scenes of one run, ready for the objectives."""

    ego_NF: Tensor
    agents_NKF: Tensor
    lanes_NKF: Tensor
    mode_NM: Tensor
    """1 for the anchor nearest to the recorded trajectory, else 0; float32."""
    residual_NP3: Tensor
    """Recorded trajectory minus that anchor: s, d in m, heading in rad."""
    weight_NP3: Tensor
    """Weight of each residual: 0 for frames not recorded, adding up over frames to the channel's weight."""
    occupancy_NOGG: Tensor

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.ego_NF)

    def shards(self, places_VB: Tensor) -> Examples:
        """Return copies of the given places (int64), fields (V, B, ...) with a leading shard axis."""
        flat = places_VB.flatten()
        return Examples(
            *(
                getattr(self, field.name).index_select(0, flat).unflatten(0, places_VB.shape)
                for field in fields(self)
            )
        )


def make_examples(
    features: Features, rows: Tensor, config: PlannerConfig, drawn: Tensor | None = None
) -> Examples:
    """Gather scenes of a run and find the anchor nearest to each recorded trajectory.

    Slots that no scene of the run fills are dropped: they change no plan but cost time.

    Args:
        features: Scenes to choose from.
        rows: int64 rows of the run, each with a recorded plan frame.
        config: Anchors and weights.
        drawn: int64 places in `rows` to gather; all by default.

    Returns:
        The examples in the order of `drawn`.
    """
    num_agents, num_lanes = (max(count, 1) for count in features.most_filled(rows))
    scenes = features.take(rows if drawn is None else rows[drawn])
    targets = [
        _targets(scenes.take(chunk), config) for chunk in torch.arange(len(scenes)).split(CHUNK_SCENES)
    ]
    mode_NM, residual_NP3, weight_NP3 = (torch.cat(parts) for parts in zip(*targets, strict=True))
    agents_NKF = scenes.agents_NKF[:, :num_agents].contiguous()
    lanes_NKF = scenes.lanes_NKF[:, :num_lanes].contiguous()
    occupancy_NOGG = scenes.occupancy_NOGG
    return Examples(scenes.ego_NF, agents_NKF, lanes_NKF, mode_NM, residual_NP3, weight_NP3, occupancy_NOGG)


def _targets(scenes: PlannerFeatures, config: PlannerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return mode_NM, residual_NP3 and weight_NP3 of `Examples`."""
    weight_NP3 = _weights(scenes.target_valid_NP, config.lateral_weight)
    offset_NMP3 = scenes.target_NP3[:, None] - anchor_trajectories(scenes.state_N4, config)
    mode_N = (_smooth_distance(offset_NMP3) * weight_NP3[:, None]).sum((2, 3)).argmin(1)
    residual_NP3 = offset_NMP3[torch.arange(len(scenes), device=mode_N.device), mode_N]
    mode_NM = functional.one_hot(mode_N, num_modes(config)).to(residual_NP3.dtype)
    return mode_NM, residual_NP3, weight_NP3


def _weights(valid_NP: Tensor, lateral_weight: float) -> Tensor:
    channels = (1.0, lateral_weight, lateral_weight * HEADING_WEIGHT_M_PER_RAD)
    share_NP = valid_NP / valid_NP.sum(1, keepdim=True)
    return share_NP[..., None] * torch.tensor(channels, device=valid_NP.device)


def _smooth_distance(offset: Tensor) -> Tensor:
    return functional.smooth_l1_loss(offset, torch.zeros_like(offset), beta=SMOOTH_M, reduction="none")


def planning_loss(
    output: PlannerOutput, examples: Examples, occupancy_weight: float
) -> tuple[Tensor, Tensor]:
    """Combine the objectives: L = L_mode + L_imitation + occupancy_weight * L_occupancy.

    Args:
        output: The planner's output for the shards.
        examples: Targets, fields (V, B, ...).
        occupancy_weight: Weight of the occupancy against the other two.

    Returns:
        loss_V of each shard and its components parts_3V mode, imitation and occupancy before weighting,
        detached; NaN for an occupancy that was not drawn.
    """
    mode_V = mode_loss(output.logits_VBM, examples.mode_NM)
    imitation_V = imitation_loss(output.residuals_VBMP3, examples)
    loss_V, occupancy_V = mode_V + imitation_V, torch.full_like(mode_V, torch.nan)
    if output.occupancy_VBOGG is not None:
        num_drawn = output.occupancy_VBOGG.shape[1]
        occupancy_V = occupancy_loss(output.occupancy_VBOGG, examples.occupancy_NOGG[:, :num_drawn])
        loss_V = loss_V + occupancy_weight * occupancy_V
    return loss_V, torch.stack([mode_V, imitation_V, occupancy_V]).detach()


def mode_loss(logits_VBM: Tensor, mode_VBM: Tensor) -> Tensor:
    """Return the mean cross-entropy (V) of the anchor nearest to the recorded trajectory."""
    return -(functional.log_softmax(logits_VBM, -1) * mode_VBM).sum(-1).mean(1)


def imitation_loss(residuals_VBMP3: Tensor, examples: Examples) -> Tensor:
    """Measure how far the nearest anchor's mode is from the recorded trajectory, in metres along the route.

    L = mean over scenes of sum over frames and channels of w_pc h(y_pc - r_pc), where h is quadratic below
    0.1 m and linear above, and the weights are 1 (s), w (d) and 5 m/rad w (heading), w the lateral weight.

    Args:
        residuals_VBMP3: Of every mode, in units of `RESIDUAL_SCALE`.
        examples: Targets, fields (V, B, ...).

    Returns:
        loss_V in m, >= 0.
    """
    # A product with the one-hot mode has a far cheaper gradient than indexing.
    chosen_VB1X = examples.mode_NM[:, :, None] @ residuals_VBMP3.flatten(3)
    chosen_VBP3 = chosen_VB1X.view(examples.residual_NP3.shape)
    scale_3 = torch.tensor(RESIDUAL_SCALE, device=chosen_VBP3.device)
    distance_VBP3 = _smooth_distance(chosen_VBP3 * scale_3 - examples.residual_NP3)
    return (distance_VBP3 * examples.weight_NP3).sum((2, 3)).mean(1)


def occupancy_loss(logits_VBOGG: Tensor, occupied_VBOGG: Tensor) -> Tensor:
    """Return the binary cross-entropy (V) of the occupancy, a mean over scenes, channels and cells.

    Args:
        logits_VBOGG: Predicted log odds.
        occupied_VBOGG: 0 or 1.

    Returns:
        loss_V.
    """
    targets = occupied_VBOGG.to(logits_VBOGG.dtype)
    loss = functional.binary_cross_entropy_with_logits(logits_VBOGG, targets, reduction="none")
    return loss.flatten(1).mean(1)
