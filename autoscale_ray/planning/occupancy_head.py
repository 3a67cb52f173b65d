"""The auxiliary head: occupancy drawn as soft spots that the tokens place on the grid.

Each agent token places one spot a channel where the agent would be at 0, 2 and 4 s at constant velocity; each
lane token places one spot at each point of its piece. The head learns shift, width and height of every spot:

    logit(x, y) = -3 + 10 bias + sum over spots of 6 (1 + h) exp(-((x - x0)/w_x)^2 / 2 - ((y - y0)/w_y)^2 /
    2),

a sum of products of a function of x and one of y, so a channel is one small matrix product a scene.

Shape legend: V shards, B scenes of a shard, K tokens, D width, F features, J spots of a token, C channels,
G grid cells along a side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoscale_ray.planning.agent_tokens import POSITION_SCALE_M, VELOCITY_SCALE_MPS
from autoscale_ray.planning.layers import ShardLinear
from autoscale_ray.planning.map_tokens import NUM_PIECE_POINTS
from autoscale_ray.planning.occupancy import AGENT_FRAMES, CELL_M, NUM_CELLS, ORIGIN_X_M, ORIGIN_Y_M
from autoscale_ray.scenes.schema import FRAME_TIMES_S

SPOT_PARAMETERS = 5
SHIFT_SCALE_M = 4.0
MIN_WIDTH_M = 0.5
HEIGHT = 6.0
BASE_LOGIT = -3.0
BIAS_SCALE = 10.0


class OccupancyHead(nn.Module):
    """Draws the occupancy channels from the tokens and their places."""

    def __init__(self, num_shards: int, width: int) -> None:
        super().__init__()
        self.agents = ShardLinear(num_shards, width, len(AGENT_FRAMES) * SPOT_PARAMETERS)
        self.lanes = ShardLinear(num_shards, width, NUM_PIECE_POINTS * SPOT_PARAMETERS)
        self.bias = nn.Parameter(torch.empty(num_shards, 1, 1 + len(AGENT_FRAMES), 1, 1))

    def forward(
        self, agents_VBKD: Tensor, agents_VBKF: Tensor, lanes_VBKD: Tensor, lanes_VBKF: Tensor
    ) -> Tensor:
        """Draw the grid of every scene.

        Args:
            agents_VBKD: Encoded agents.
            agents_VBKF: Agent tokens, for filled slots and places.
            lanes_VBKD: Encoded lanes.
            lanes_VBKF: Lane tokens, likewise.

        Returns:
            logits_VBOGG: Drivable area, then agents at 0, 2 and 4 s.
        """
        agents_VBCJ5 = self.agents(agents_VBKD).unflatten(-1, (-1, SPOT_PARAMETERS)).transpose(2, 3)
        lanes_VBCJ5 = self.lanes(lanes_VBKD).unflatten(-1, (-1, SPOT_PARAMETERS)).flatten(2, 3)[:, :, None]
        filled_VBCJ = lanes_VBKF[..., 0].repeat_interleave(NUM_PIECE_POINTS, 2)[:, :, None]
        drivable = _draw(_lane_places(lanes_VBKF), lanes_VBCJ5, filled_VBCJ)
        agents = _draw(_agent_places(agents_VBKF), agents_VBCJ5, agents_VBKF[:, :, None, :, 0])
        return torch.cat([drivable, agents], 2) + BIAS_SCALE * self.bias + BASE_LOGIT


def _agent_places(agents_VBKF: Tensor) -> Tensor:
    """Return where agents are at the frames of the channels at constant velocity, (V, B, C, J, 2) in m."""
    times_C11 = torch.tensor(FRAME_TIMES_S[list(AGENT_FRAMES)], device=agents_VBKF.device).float()[
        :, None, None
    ]
    position = agents_VBKF[..., 1:3] * POSITION_SCALE_M
    velocity = agents_VBKF[..., 3:5] * VELOCITY_SCALE_MPS
    return position[:, :, None] + times_C11 * velocity[:, :, None]


def _lane_places(lanes_VBKF: Tensor) -> Tensor:
    """Return the points of all lane pieces, (V, B, 1, J, 2) in m."""
    x, y = lanes_VBKF[..., 1 : 1 + 2 * NUM_PIECE_POINTS].unflatten(-1, (2, -1)).unbind(3)
    return torch.stack([x.flatten(2), y.flatten(2)], -1)[:, :, None] * POSITION_SCALE_M


def _draw(places_VBCJ2: Tensor, parameters_VBCJ5: Tensor, filled_VBCJ: Tensor) -> Tensor:
    """Sum the spots of every channel on the grid, (V, B, C, G, G)."""
    steps_G = CELL_M * (torch.arange(NUM_CELLS, device=places_VBCJ2.device) + 0.5)
    centres_2G = torch.stack([ORIGIN_X_M + steps_G, ORIGIN_Y_M + steps_G])
    shifted_VBCJ2 = places_VBCJ2 + SHIFT_SCALE_M * parameters_VBCJ5[..., :2]
    width_VBCJ2 = MIN_WIDTH_M + CELL_M * nn.functional.softplus(parameters_VBCJ5[..., 2:4])
    scaled_VBCJ2G = (centres_2G - shifted_VBCJ2[..., None]) / width_VBCJ2[..., None]
    profile_VBCJ2G = (-0.5 * scaled_VBCJ2G.square()).exp()
    height_VBCJ1 = HEIGHT * (1 + parameters_VBCJ5[..., 4:]) * filled_VBCJ[..., None]
    return (height_VBCJ1 * profile_VBCJ2G[..., 0, :]).mT @ profile_VBCJ2G[..., 1, :]
