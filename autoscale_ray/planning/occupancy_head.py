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
    """Return where agents are at the frames of the channels at constant velocity, (2, V, B, C, J) in m."""
    times_C1 = torch.tensor(FRAME_TIMES_S[list(AGENT_FRAMES)], device=agents_VBKF.device).float()[:, None]
    x, y, vx, vy = agents_VBKF[:, :, None, :, 1:5].unbind(-1)
    places = [x * POSITION_SCALE_M + times_C1 * VELOCITY_SCALE_MPS * vx]
    places.append(y * POSITION_SCALE_M + times_C1 * VELOCITY_SCALE_MPS * vy)
    return torch.stack(places)


def _lane_places(lanes_VBKF: Tensor) -> Tensor:
    """Return the points of all lane pieces, (2, V, B, 1, J) in m."""
    points = lanes_VBKF[..., 1 : 1 + 2 * NUM_PIECE_POINTS].unflatten(-1, (2, -1)).movedim(-2, 0)
    return points.flatten(3)[:, :, :, None] * POSITION_SCALE_M


def _draw(places_2VBCJ: Tensor, parameters_VBCJ5: Tensor, filled_VBCJ: Tensor) -> Tensor:
    """Sum the spots of every channel on the grid, (V, B, C, G, G)."""
    steps_G = CELL_M * (torch.arange(NUM_CELLS, device=places_2VBCJ.device) + 0.5)
    centres_2G = torch.stack([ORIGIN_X_M + steps_G, ORIGIN_Y_M + steps_G])
    parameters_5VBCJ = parameters_VBCJ5.movedim(-1, 0)
    shifted_2VBCJ = places_2VBCJ + SHIFT_SCALE_M * parameters_5VBCJ[:2]
    width_2VBCJ = MIN_WIDTH_M + CELL_M * nn.functional.softplus(parameters_5VBCJ[2:4])
    height_VBCJ = HEIGHT * (1 + parameters_5VBCJ[4]) * filled_VBCJ
    # The spots are flattened to one axis so that the whole channel is one batched product.
    shape = width_2VBCJ.shape
    scaled = (centres_2G[:, None] - shifted_2VBCJ.flatten(1)[..., None]) / width_2VBCJ.flatten(1)[..., None]
    profile_2SJG = (scaled * scaled * -0.5).exp().view(2, -1, shape[-1], NUM_CELLS)
    rows_SJG = profile_2SJG[0] * height_VBCJ.reshape(-1, shape[-1], 1)
    return torch.bmm(rows_SJG.mT, profile_2SJG[1]).view(*shape[1:4], NUM_CELLS, NUM_CELLS)
