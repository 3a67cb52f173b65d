"""The planner: dense attention from the ego over agents and lanes, anchored modes, and a small occupancy
head.

    ego, agents, lanes -> MLP, 64 wide -> one 4-head cross-attention from the ego -> MLP -> M logits, M
    residuals.

Shape legend: B scenes of a batch, K tokens (agents, lanes and one empty token), D width, H heads, F features,
M modes, P plan frames (8), O occupancy channels, C agent channels among them, G grid cells along a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.agent_tokens import NUM_AGENT_FEATURES
from autoscale_ray.planning.anchors import anchor_trajectories, num_modes
from autoscale_ray.planning.ego_tokens import NUM_EGO_FEATURES
from autoscale_ray.planning.features import PlannerFeatures
from autoscale_ray.planning.map_tokens import NUM_LANE_FEATURES
from autoscale_ray.planning.occupancy import AGENT_FRAMES, NUM_CELLS
from autoscale_ray.scenes.schema import NUM_PLAN_FRAMES

NUM_HEADS = 4
RESIDUAL_SCALE = (4.0, 1.0, 0.2)
"""m, m, rad of one unit of the residual outputs s, d, heading."""
DRIVABLE_RANK = 2


@dataclass(frozen=True, slots=True)
class PlannerOutput:
    """What the planner says about B scenes, in the route frame."""

    logits_BM: Tensor
    trajectories_BMP3: Tensor
    """s, d in m and heading relative to the route in rad."""
    occupancy_BOGG: Tensor | None
    """Occupancy logits; None when the head was not asked."""


class CrossAttention(nn.Module):
    """Attention of one query over K tokens, without forming keys and values of the tokens.

    A head's score q . (W_k x) is (W_k^T q) . x and its output W_v sum(a x): two products per scene in place
    of two per token, the same function.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, NUM_HEADS * width)
        self.value = nn.Parameter(torch.empty(NUM_HEADS, width, width // NUM_HEADS))

    def forward(self, query_BD: Tensor, tokens_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """Return what the query finds in the valid tokens (B, D); one token at least must be valid."""
        query_BHD = self.query(query_BD).view(len(query_BD), NUM_HEADS, -1)
        scores_BHK = query_BHD @ tokens_BKD.transpose(1, 2) * tokens_BKD.shape[-1] ** -0.5
        weights_BHK = scores_BHK.masked_fill(~valid_BK[:, None], -torch.inf).softmax(-1)
        found_BHD = weights_BHK @ tokens_BKD
        return torch.einsum("bhd,hde->bhe", found_BHD, self.value).flatten(1)


class OccupancyHead(nn.Module):
    """Occupancy as a sum of outer products: a token draws one row times one column profile a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.agents = nn.Linear(width, len(AGENT_FRAMES) * 2 * NUM_CELLS)
        self.lanes = nn.Linear(width, DRIVABLE_RANK * 2 * NUM_CELLS)
        self.bias = nn.Parameter(torch.empty(1 + len(AGENT_FRAMES)))

    def forward(self, agents_BKD: Tensor, lanes_BKD: Tensor) -> Tensor:
        """Return logits_BOGG; tokens of empty slots must be 0 and draw next to nothing."""
        batch = len(agents_BKD)
        profiles = (
            self.agents(agents_BKD).view(batch, -1, len(AGENT_FRAMES), 2, NUM_CELLS).permute(3, 0, 2, 1, 4)
        )
        agents_BCGG = profiles[0].transpose(-1, -2) @ profiles[1]
        strips = self.lanes(lanes_BKD).view(batch, -1, 2, NUM_CELLS)
        drivable_BGG = strips[:, :, 0].transpose(-1, -2) @ strips[:, :, 1]
        return torch.cat([drivable_BGG[:, None], agents_BCGG], 1) + self.bias[:, None, None]


def _encoder(num_features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


class Planner(nn.Module):
    """Anchored multi-mode planner over dense scene tokens."""

    def __init__(self, config: PlannerConfig) -> None:
        super().__init__()
        width, self.config = config.hidden_size, config
        self.ego = _encoder(NUM_EGO_FEATURES, width)
        self.agents = _encoder(NUM_AGENT_FEATURES, width)
        self.lanes = _encoder(NUM_LANE_FEATURES, width)
        self.empty_token = nn.Parameter(torch.empty(width))
        self.attention = CrossAttention(width)
        self.trunk = _encoder(2 * width, 2 * width)
        self.logits = nn.Linear(2 * width, num_modes(config))
        self.residuals = nn.Linear(2 * width, num_modes(config) * NUM_PLAN_FRAMES * 3)
        self.occupancy = OccupancyHead(width)

    def forward(self, scenes: PlannerFeatures, occupancy_scenes: int | None = None) -> PlannerOutput:
        """Plan for B scenes.

        Args:
            scenes: Inputs; targets are not read.
            occupancy_scenes: Draw the occupancy of the first so many scenes only; all by default, 0 for none.

        Returns:
            Logits, trajectories and occupancy.
        """
        ego_BD = self.ego(scenes.ego_NF)
        agents_BKD = self.agents(scenes.agents_NKF) * scenes.agents_valid_NK[..., None]
        lanes_BKD = self.lanes(scenes.lanes_NKF) * scenes.lanes_valid_NK[..., None]
        empty_B1D = self.empty_token.expand(len(scenes), 1, -1)
        valid_BK = torch.cat(
            [scenes.agents_valid_NK, scenes.lanes_valid_NK, scenes.agents_valid_NK.new_ones(len(scenes), 1)],
            1,
        )
        found_BD = self.attention(ego_BD, torch.cat([agents_BKD, lanes_BKD, empty_B1D], 1), valid_BK)
        hidden_BD = self.trunk(torch.cat([ego_BD, found_BD], 1))
        drawn = slice(occupancy_scenes)
        occupancy = None if occupancy_scenes == 0 else self.occupancy(agents_BKD[drawn], lanes_BKD[drawn])
        return PlannerOutput(
            self.logits(hidden_BD), self._trajectories(hidden_BD, scenes.state_N4), occupancy
        )

    def _trajectories(self, hidden_BD: Tensor, state_B4: Tensor) -> Tensor:
        anchors_BMP3 = anchor_trajectories(state_B4, self.config)
        scale_3 = torch.tensor(RESIDUAL_SCALE, device=state_B4.device)
        return anchors_BMP3 + self.residuals(hidden_BD).view(anchors_BMP3.shape) * scale_3


def new_planner(config: PlannerConfig, seed: int) -> Planner:
    """Make an untrained planner.

    Args:
        config: Widths and anchors.
        seed: Seed of the initial weights, >= 0; the global random state is neither read nor changed.

    Returns:
        A planner on the CPU. Matrices are uniform in +-sqrt(3 / inputs); the residual head starts 10 times
        smaller, so that every mode starts near its anchor; vectors start at 0.
    """
    with torch.device("meta"):
        planner = Planner(config)
    planner.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in planner.named_parameters():
            if weight.ndim == 1:
                weight.zero_()
                continue
            num_inputs = weight.shape[1]
            bound = (3 / num_inputs) ** 0.5 * (0.1 if name == "residuals.weight" else 1.0)
            weight.uniform_(-bound, bound, generator=generator)
    return planner
