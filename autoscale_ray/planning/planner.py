"""The planner: dense attention from the ego over agents and lanes, anchored modes, a small occupancy head.

    ego; agents, lanes -> MLP -> one 4-head cross-attention from the ego -> MLP -> M logits, M residuals

Every weight carries a leading axis of V logical shards, all of them views of the same numbers: one backward
pass then leaves the gradient of each shard apart, and four shards cost one round of operator calls in place
of four (twice as fast here). A product over V shards gives each of them the bits it has alone; a test
holds this.

Shape legend: V shards, B scenes of a shard, K tokens (agents, lanes and one empty token), D width, H heads,
F features, M modes, P plan frames (8), O occupancy channels, G grid cells along a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.agent_tokens import NUM_AGENT_FEATURES
from autoscale_ray.planning.anchors import num_modes
from autoscale_ray.planning.ego_tokens import NUM_EGO_FEATURES
from autoscale_ray.planning.layers import CrossAttention, ShardLinear
from autoscale_ray.planning.map_tokens import NUM_LANE_FEATURES
from autoscale_ray.planning.occupancy_head import OccupancyHead
from autoscale_ray.scenes.schema import NUM_PLAN_FRAMES

RESIDUAL_SCALE = (4.0, 1.0, 0.2)
"""m, m, rad of one unit of the residual outputs s, d, heading."""


@dataclass(frozen=True, slots=True)
class PlannerOutput:
    """What the planner says about V shards of B scenes."""

    logits_VBM: Tensor
    residuals_VBMP3: Tensor
    """What to add to the anchors: s, d, heading in units of `RESIDUAL_SCALE`."""
    occupancy_VBOGG: Tensor | None
    """Occupancy logits of the first scenes of each shard; None when the head was not asked."""


class Planner(nn.Module):
    """Anchored multi-mode planner over dense scene tokens."""

    def __init__(self, config: PlannerConfig, num_shards: int) -> None:
        super().__init__()
        width, self.config = config.hidden_size, config
        self.num_shards = num_shards
        self.ego = _two_layers(num_shards, NUM_EGO_FEATURES, width)
        self.agents = ShardLinear(num_shards, NUM_AGENT_FEATURES, width)
        self.lanes = ShardLinear(num_shards, NUM_LANE_FEATURES, width)
        self.tokens = ShardLinear(num_shards, width, width)
        self.attention = CrossAttention(num_shards, width)
        self.trunk = _two_layers(num_shards, 2 * width, 2 * width)
        self.logits = ShardLinear(num_shards, 2 * width, num_modes(config))
        self.residuals = ShardLinear(num_shards, 2 * width, num_modes(config) * NUM_PLAN_FRAMES * 3)
        self.occupancy = OccupancyHead(num_shards, width)

    def forward(
        self, ego_VBF: Tensor, agents_VBKF: Tensor, lanes_VBKF: Tensor, num_drawn: int
    ) -> PlannerOutput:
        """Plan for B scenes in each shard.

        Args:
            ego_VBF: Ego tokens.
            agents_VBKF: Agent tokens; feature 0 is 1 in filled slots.
            lanes_VBKF: Lane tokens, likewise.
            num_drawn: Draw the occupancy of the first so many scenes of each shard; 0 for none.

        Returns:
            Logits, residuals and occupancy.
        """
        shards, batch, num_agents, _ = agents_VBKF.shape
        ego_VBD = self.ego(ego_VBF)
        filled_VBK = torch.cat([agents_VBKF[..., 0], lanes_VBKF[..., 0]], 2)
        tokens_VBKD = self.tokens(
            torch.cat([self.agents(agents_VBKF), self.lanes(lanes_VBKF)], 2).relu()
        ).relu()
        drawn = None
        if num_drawn:
            agents_VBKD, lanes_VBKD = tokens_VBKD[:, :num_drawn].tensor_split([num_agents], 2)
            drawn = self.occupancy(
                agents_VBKD, agents_VBKF[:, :num_drawn], lanes_VBKD, lanes_VBKF[:, :num_drawn]
            )
        # The empty token, all 0, is what the ego finds in a scene without agents and lanes.
        bias_VBK = nn.functional.pad(filled_VBK.log(), (0, 1))
        found_VBD = self.attention(ego_VBD, nn.functional.pad(tokens_VBKD, (0, 0, 0, 1)), bias_VBK)
        hidden_VBD = self.trunk(torch.cat([ego_VBD, found_VBD], 2))
        residuals_VBMP3 = self.residuals(hidden_VBD).view(shards, batch, -1, NUM_PLAN_FRAMES, 3)
        return PlannerOutput(self.logits(hidden_VBD), residuals_VBMP3, drawn)


def _two_layers(num_shards: int, num_features: int, width: int) -> nn.Sequential:
    first, second = ShardLinear(num_shards, num_features, width), ShardLinear(num_shards, width, width)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def empty_planner(config: PlannerConfig, num_shards: int) -> Planner:
    """Return a planner without weights, for `set_weights`."""
    with torch.device("meta"):
        return Planner(config, num_shards)


def parameter_shapes(planner: Planner) -> dict[str, torch.Size]:
    """Return the shapes of the weights by name, without the shard axis."""
    return {name: weight.shape[1:] for name, weight in planner.named_parameters()}


def set_weights(planner: Planner, weights_W: Tensor) -> None:
    """Let the weights of every shard be views of a flat vector, so that later changes show through."""
    sizes = [shape.numel() for shape in parameter_shapes(planner).values()]
    for (name, weight), flat in zip(planner.named_parameters(), weights_W.split(sizes), strict=True):
        owner = planner.get_submodule(name.rpartition(".")[0])
        setattr(
            owner, name.rpartition(".")[2], nn.Parameter(flat.view(weight.shape[1:]).expand(weight.shape))
        )


def initial_weights(config: PlannerConfig, seed: int) -> Tensor:
    """Draw the weights of an untrained planner.

    Args:
        config: Widths and anchors.
        seed: >= 0; the global random state is neither read nor changed.

    Returns:
        weights_W. Matrices are uniform in +-sqrt(3 / inputs); the residual head starts 10 times smaller, so
        that every mode starts near its anchor; biases start at 0.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, shape in parameter_shapes(empty_planner(config, 1)).items():
        scale = (3 / shape[0]) ** 0.5 * (0.1 if name == "residuals.weight" else 1.0)
        drawn = torch.empty(shape).uniform_(-scale, scale, generator=generator)
        parts.append(torch.zeros(shape.numel()) if name.endswith("bias") else drawn.flatten())
    return torch.cat(parts)
