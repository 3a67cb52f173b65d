"""The planner: dense attention from the ego over agents and lanes, anchored modes, a small occupancy head.

    ego; agents, lanes -> MLP -> one 4-head cross-attention from the ego -> MLP -> M logits, M residuals

Every weight carries a leading axis of V logical shards, all of them views of the same numbers: one backward
pass then leaves the gradient of each shard apart, and four shards cost one round of operator calls in place
of four (2.3 times faster here). A product over V shards gives each of them the bits it has alone; a test
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
from autoscale_ray.planning.map_tokens import NUM_LANE_FEATURES
from autoscale_ray.planning.occupancy import AGENT_FRAMES, NUM_CELLS
from autoscale_ray.scenes.schema import NUM_PLAN_FRAMES

NUM_HEADS = 4
RESIDUAL_SCALE = (4.0, 1.0, 0.2)
"""m, m, rad of one unit of the residual outputs s, d, heading."""
DRIVABLE_RANK = 2


@dataclass(frozen=True, slots=True)
class PlannerOutput:
    """What the planner says about V shards of B scenes."""

    logits_VBM: Tensor
    residuals_VBMP3: Tensor
    """What to add to the anchors: s, d, heading in units of `RESIDUAL_SCALE`."""
    occupancy_VBOGG: Tensor | None
    """Occupancy logits of the first scenes of each shard; None when the head was not asked."""


class ShardLinear(nn.Module):
    """A linear layer with one copy of its weights for each shard."""

    def __init__(self, num_shards: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_shards, num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.empty(num_shards, 1, num_outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (V, ..., inputs) to (V, ..., outputs)."""
        shards, shape = inputs.shape[0], inputs.shape[:-1]
        rows = inputs.reshape(shards, -1, inputs.shape[-1])
        return torch.baddbmm(self.bias, rows, self.weight).view(*shape, -1)


class CrossAttention(nn.Module):
    """Attention of one query over K tokens, without forming keys and values of the tokens.

    A head's score q . (W_k x) is (W_k^T q) . x and its output is W_v sum(a x): two products a scene in place
    of two a token, the same function.
    """

    def __init__(self, num_shards: int, width: int) -> None:
        super().__init__()
        self.query = ShardLinear(num_shards, width, NUM_HEADS * width)
        self.value = ShardLinear(num_shards, NUM_HEADS * width, width)

    def forward(self, query_VBD: Tensor, tokens_VBKD: Tensor, bias_VBK: Tensor) -> Tensor:
        """Return what the query finds (V, B, D); the bias is 0 for tokens that count and -inf for others."""
        shards, batch, _, width = tokens_VBKD.shape
        query_SHD = self.query(query_VBD).view(shards * batch, NUM_HEADS, width)
        tokens_SKD = tokens_VBKD.flatten(0, 1)
        scores_SHK = torch.baddbmm(
            bias_VBK.flatten(0, 1)[:, None], query_SHD, tokens_SKD.mT, alpha=width**-0.5
        )
        return self.value((scores_SHK.softmax(-1) @ tokens_SKD).view(shards, batch, -1))


class OccupancyHead(nn.Module):
    """Occupancy as a sum of outer products: a token draws one row times one column profile a channel."""

    def __init__(self, num_shards: int, width: int) -> None:
        super().__init__()
        self.agents = ShardLinear(num_shards, width, len(AGENT_FRAMES) * 2 * NUM_CELLS)
        self.lanes = ShardLinear(num_shards, width, DRIVABLE_RANK * 2 * NUM_CELLS)
        self.bias = nn.Parameter(torch.empty(num_shards, 1, 1 + len(AGENT_FRAMES), 1, 1))

    def forward(self, tokens_VBKD: Tensor, filled_VBK: Tensor, num_agents: int) -> Tensor:
        """Return logits_VBOGG; the first `num_agents` tokens are agents, the others lanes."""
        filled_VBK1 = filled_VBK[..., None]
        agents = self.agents(tokens_VBKD[:, :, :num_agents]) * filled_VBK1[:, :, :num_agents]
        lanes = self.lanes(tokens_VBKD[:, :, num_agents:]) * filled_VBK1[:, :, num_agents:]
        rasters = [_outer_products(lanes, 1), _outer_products(agents, len(AGENT_FRAMES))]
        return torch.cat(rasters, 2) + self.bias


def _outer_products(profiles_VBKP: Tensor, num_channels: int) -> Tensor:
    """Sum row times column profiles over tokens and ranks into one raster for each scene and channel."""
    shards, batch = profiles_VBKP.shape[:2]
    profiles = profiles_VBKP.view(shards, batch, -1, num_channels, 2, NUM_CELLS)
    rows, columns = profiles.permute(4, 0, 1, 3, 2, 5)
    return rows.mT @ columns


class Planner(nn.Module):
    """Anchored multi-mode planner over dense scene tokens."""

    def __init__(self, config: PlannerConfig, num_shards: int) -> None:
        super().__init__()
        width, self.config = config.hidden_size, config
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
            drawn = self.occupancy(tokens_VBKD[:, :num_drawn], filled_VBK[:, :num_drawn], num_agents)
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
