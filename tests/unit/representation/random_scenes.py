"""Small seeded scenes with every ragged column filled, for tests of the representation."""

from __future__ import annotations

import numpy as np
import torch

from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import offsets_of
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, FRAME_TIMES_S, NUM_FRAMES, POLYGON_LAYERS

TIMES_T = torch.from_numpy(FRAME_TIMES_S).float()


def random_batch(
    num_scenes: int, seed: int, *, num_agents: int | None = None, num_lanes: int | None = None
) -> SceneBatch:
    """Make straight-road scenes: constant-velocity agents around an ego that holds its speed.

    Args:
        num_scenes: N.
        seed: Seed of everything.
        num_agents: Agents of every scene; random in 0..9 when None.
        num_lanes: Lanes of every scene; random in 1..4 when None.
    """
    rng = np.random.default_rng(seed)
    agents_N = torch.from_numpy(
        rng.integers(0, 10, num_scenes) if num_agents is None else np.full(num_scenes, num_agents)
    )
    lanes_N = torch.from_numpy(
        rng.integers(1, 5, num_scenes) if num_lanes is None else np.full(num_scenes, num_lanes)
    )
    speed_N = torch.from_numpy(rng.uniform(0, 15, num_scenes)).float()
    return SceneBatch(
        scene_ids=tuple(f"scene{row}" for row in range(num_scenes)),
        domain_N=torch.from_numpy(rng.integers(0, 2, num_scenes).astype(np.int8)),
        command_N=torch.from_numpy(rng.integers(0, 4, num_scenes)),
        ego_size_N4=torch.tensor([[4.8, 1.9, 2.9, 1.4]]).repeat(num_scenes, 1),
        ego_states_NT7=_ego_states(speed_N),
        ego_valid_NT=torch.ones(num_scenes, NUM_FRAMES, dtype=torch.bool),
        route_speed_limit_N=torch.from_numpy(rng.choice([8.0, 14.0, np.nan], num_scenes)).float(),
        **_agents(rng, agents_N),
        **_lanes(rng, lanes_N),
        **_polygons(rng, lanes_N),
        **_centerlines(rng, num_scenes),
    )


def _ego_states(speed_N: torch.Tensor) -> torch.Tensor:
    states = torch.zeros(len(speed_N), NUM_FRAMES, 7)
    states[:, :, 0] = speed_N[:, None] * TIMES_T
    states[:, :, 3] = speed_N[:, None]
    return states


def _agents(rng: np.random.Generator, agents_N: torch.Tensor) -> dict[str, torch.Tensor]:
    count = int(agents_N.sum())
    yaw_A = torch.from_numpy(rng.uniform(-np.pi, np.pi, count)).float()
    speed_A = torch.from_numpy(rng.uniform(0, 12, count)).float()
    velocity_A2 = torch.stack([yaw_A.cos(), yaw_A.sin()], dim=1) * speed_A[:, None]
    place_A2 = torch.from_numpy(rng.uniform(-45, 45, (count, 2))).float()
    states = torch.zeros(count, NUM_FRAMES, 5)
    states[:, :, :2] = place_A2[:, None] + velocity_A2[:, None] * TIMES_T[None, :, None]
    states[:, :, 2] = yaw_A[:, None]
    states[:, :, 3:] = velocity_A2[:, None]
    valid = torch.from_numpy(rng.random((count, NUM_FRAMES)) < 0.9)
    valid[:, CURRENT_FRAME] = torch.from_numpy(rng.random(count) < 0.95)
    return {
        "agent_offsets": offsets_of(agents_N),
        "agent_type_A": torch.from_numpy(rng.integers(0, len(AGENT_TYPES), count)),
        "agent_size_A2": torch.from_numpy(rng.uniform(0.5, 5, (count, 2))).float(),
        "agent_states_AT5": states * valid[:, :, None],
        "agent_valid_AT": valid,
    }


def _lanes(rng: np.random.Generator, lanes_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parallel straight lanes 3.5 m apart; each links to its left neighbour and the first to itself ahead."""
    count = int(lanes_N.sum())
    offsets = offsets_of(lanes_N)
    number_L = torch.arange(count) - torch.repeat_interleave(offsets[:-1], lanes_N)
    points_L = torch.from_numpy(rng.integers(2, 9, count))
    point_offsets = offsets_of(points_L)
    owner_V = torch.repeat_interleave(torch.arange(count), points_L)
    along_V = (torch.arange(len(owner_V)) - point_offsets[owner_V]).float() * 9.0 - 10.0
    links = [(lane, lane + 1, 1) for lanes in lanes_N.tolist() for lane in range(lanes - 1)]
    return {
        "lane_offsets": offsets,
        "lane_point_offsets": point_offsets,
        "lane_points_V2": torch.stack([along_V, number_L[owner_V] * 3.5], dim=1),
        "lane_width_L": torch.from_numpy(rng.choice([3.5, np.nan], count)).float(),
        "lane_speed_limit_L": torch.from_numpy(rng.choice([13.9, np.nan], count)).float(),
        "lane_on_route_L": number_L == 0,
        "link_offsets": offsets_of(lanes_N - 1),
        "links_E3": torch.tensor(links, dtype=torch.int64).reshape(-1, 3),
    }


def _polygons(rng: np.random.Generator, lanes_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """One lane polygon that may be red, and one crosswalk, in every scene."""
    num_scenes = len(lanes_N)
    place = torch.from_numpy(rng.uniform(5, 30, (num_scenes * 2, 1, 2))).float()
    square = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [2.0, 2.0], [-2.0, 2.0]])
    red = torch.zeros(num_scenes * 2, NUM_FRAMES, dtype=torch.bool)
    red[::2] = torch.from_numpy(rng.random(num_scenes) < 0.5)[:, None]
    layers = [POLYGON_LAYERS.index("lane_connector"), POLYGON_LAYERS.index("crosswalk")]
    return {
        "polygon_offsets": offsets_of(torch.full((num_scenes,), 2)),
        "polygon_point_offsets": offsets_of(torch.full((num_scenes * 2,), 4)),
        "polygon_points_W2": (place + square).reshape(-1, 2),
        "polygon_layer_Q": torch.tensor(layers).repeat(num_scenes),
        "polygon_lane_Q": torch.tensor([0, -1]).repeat(num_scenes),
        "polygon_on_route_Q": torch.tensor([True, False]).repeat(num_scenes),
        "polygon_red_QT": red,
    }


def _centerlines(rng: np.random.Generator, num_scenes: int) -> dict[str, torch.Tensor]:
    lengths_N = torch.from_numpy(rng.integers(5, 120, num_scenes))
    offsets = offsets_of(lengths_N)
    owner_C = torch.repeat_interleave(torch.arange(num_scenes), lengths_N)
    along_C = (torch.arange(len(owner_C)) - offsets[owner_C]).float() - 5.0
    curvature_N = rng.uniform(0.002, 0.02, num_scenes) * rng.choice([-1, 1], num_scenes)
    curvature_C = torch.from_numpy(curvature_N).float()[owner_C]
    yaw_C = curvature_C * along_C
    x_C, y_C = yaw_C.sin() / curvature_C, (1 - yaw_C.cos()) / curvature_C
    return {"centerline_offsets": offsets, "centerline_C3": torch.stack([x_C, y_C, yaw_C], dim=1)}
