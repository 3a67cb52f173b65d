"""Small seeded scenes: one arc-shaped road, a few agents on it, and an ego whose future depends on what it sees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.features import PlannerFeatures, features_of_batch
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import offsets_of
from autoscale_ray.scenes.schema import CURRENT_FRAME, FRAME_TIMES_S, NUM_FRAMES, POLYGON_LAYERS

MAX_AGENTS = 5
LANE_WIDTH_M = 3.5


def road_pose(s: np.ndarray, d: np.ndarray, curvature: float) -> np.ndarray:
    """Return x, y, yaw on an arc that starts at the origin along x: the exact answer for an arc route."""
    yaw = s * curvature
    if abs(curvature) < 1e-9:
        return np.stack([s, d + 0 * s, yaw], -1)
    radius = 1 / curvature
    return np.stack([(radius - d) * np.sin(yaw), radius - (radius - d) * np.cos(yaw), yaw], -1)


def ego_motion(rng: np.random.Generator, leader_gap_m: float, speed_mps: float) -> np.ndarray:
    """Return s at every frame: the ego brakes evenly for a near leader and speeds up gently otherwise."""
    braking = speed_mps**2 / (2 * max(leader_gap_m - 8.0, 1.0))
    acceleration = -braking if leader_gap_m < 30 else 0.5
    times = np.maximum(FRAME_TIMES_S, 0.0)
    if acceleration < 0:
        times = np.minimum(times, speed_mps / -acceleration)
    future = speed_mps * times + acceleration * times**2 / 2
    return np.where(FRAME_TIMES_S < 0, speed_mps * FRAME_TIMES_S, future)


def make_scene(rng: np.random.Generator) -> dict[str, np.ndarray]:
    curvature = float(rng.uniform(-0.02, 0.02))
    speed_mps = float(rng.uniform(3.0, 12.0))
    num_agents = int(rng.integers(1, MAX_AGENTS + 1))
    gaps_m = np.concatenate([rng.uniform(10.0, 80.0, 1), rng.uniform(-15.0, 60.0, num_agents - 1)])
    sides_m = np.concatenate([[0.0], rng.choice([-LANE_WIDTH_M, LANE_WIDTH_M], num_agents - 1)])
    ego = np.zeros((NUM_FRAMES, 7))
    ego[:, :3] = road_pose(ego_motion(rng, gaps_m[0], speed_mps), np.zeros(NUM_FRAMES), curvature)
    ego[:, 3] = speed_mps
    agents = np.zeros((num_agents, NUM_FRAMES, 5))
    for agent, (gap_m, side_m) in enumerate(zip(gaps_m, sides_m, strict=True)):
        agents[agent, :, :3] = road_pose(np.full(NUM_FRAMES, gap_m), np.full(NUM_FRAMES, side_m), curvature)
    lane_s_m = np.linspace(-40.0, 160.0, 60)
    lanes = [road_pose(lane_s_m, np.full(60, d), curvature)[:, :2] for d in (0.0, LANE_WIDTH_M)]
    edge = [road_pose(lane_s_m, np.full(60, d), curvature)[:, :2] for d in (-1.75, 5.25)]
    return {
        "ego": ego,
        "agents": agents,
        "agent_type": rng.integers(0, 7, num_agents),
        "lanes": np.stack(lanes),
        "polygon": np.concatenate([edge[0], edge[1][::-1]]),
        "centerline": road_pose(lane_s_m, np.zeros(60), curvature),
        "command": rng.integers(0, 4),
    }


def make_batch(num_scenes: int, seed: int = 0) -> SceneBatch:
    """Stack scenes whose stop line (a red connector of the route) begins at s = 40 m in every third of them."""
    rng = np.random.default_rng(seed)
    scenes = [make_scene(rng) for _ in range(num_scenes)]
    num_agents = torch.tensor([len(scene["agents"]) for scene in scenes])
    agents = torch.cat([torch.tensor(scene["agents"]).float() for scene in scenes])
    polygons = torch.cat([torch.tensor(scene["polygon"]).float() for scene in scenes])
    connectors = torch.tensor([[40.0, -1.75], [60.0, -1.75], [60.0, 1.75], [40.0, 1.75]])
    rings = torch.cat([torch.cat([ring, connectors]) for ring in polygons.split(120)])
    red_QT = torch.zeros(2 * num_scenes, NUM_FRAMES, dtype=torch.bool)
    red_QT[1::6] = True
    valid_AT = torch.ones(agents.shape[:2], dtype=torch.bool)
    valid_AT[::7, : CURRENT_FRAME - 1] = False
    limits = torch.where(torch.arange(num_scenes) % 4 == 0, torch.nan, 13.9)
    layers = [POLYGON_LAYERS.index("roadblock"), POLYGON_LAYERS.index("lane_connector")]
    return SceneBatch(
        scene_ids=tuple(f"scene-{number}" for number in range(num_scenes)),
        domain_N=torch.zeros(num_scenes, dtype=torch.int8),
        command_N=torch.tensor([int(scene["command"]) for scene in scenes]),
        ego_size_N4=torch.tensor([[4.8, 2.0, 2.9, 1.4]]).repeat(num_scenes, 1),
        ego_states_NT7=torch.stack([torch.tensor(scene["ego"]).float() for scene in scenes]),
        ego_valid_NT=torch.ones(num_scenes, NUM_FRAMES, dtype=torch.bool),
        route_speed_limit_N=limits,
        agent_offsets=offsets_of(num_agents),
        agent_type_A=torch.cat([torch.tensor(scene["agent_type"]) for scene in scenes]),
        agent_size_A2=torch.tensor([[4.5, 1.9]]).repeat(len(agents), 1),
        agent_states_AT5=agents,
        agent_valid_AT=valid_AT,
        lane_offsets=offsets_of(torch.full((num_scenes,), 2)),
        lane_point_offsets=offsets_of(torch.full((2 * num_scenes,), 60)),
        lane_points_V2=torch.cat([torch.tensor(scene["lanes"]).float().flatten(0, 1) for scene in scenes]),
        lane_width_L=torch.full((2 * num_scenes,), LANE_WIDTH_M),
        lane_speed_limit_L=torch.full((2 * num_scenes,), torch.nan),
        lane_on_route_L=torch.tensor([True, False]).repeat(num_scenes),
        link_offsets=torch.zeros(num_scenes + 1, dtype=torch.int64),
        links_E3=torch.empty(0, 3, dtype=torch.int64),
        polygon_offsets=offsets_of(torch.full((num_scenes,), 2)),
        polygon_point_offsets=offsets_of(torch.tensor([120, 4]).repeat(num_scenes)),
        polygon_points_W2=rings,
        polygon_layer_Q=torch.tensor(layers).repeat(num_scenes),
        polygon_lane_Q=torch.tensor([-1, 0]).repeat(num_scenes),
        polygon_on_route_Q=torch.tensor([False, True]).repeat(num_scenes),
        polygon_red_QT=red_QT,
        centerline_offsets=offsets_of(torch.full((num_scenes,), 60)),
        centerline_C3=torch.cat([torch.tensor(scene["centerline"]).float() for scene in scenes]),
    )


class OnePool:
    """Stands for a pool: the planner asks for its length and batches only."""

    def __init__(self, num_scenes: int) -> None:
        self._batch = make_batch(num_scenes)

    def __len__(self) -> int:
        return len(self._batch)

    def batch(self, rows: np.ndarray):
        return self._batch.select(rows)


@pytest.fixture(scope="session")
def scene_batch() -> Callable[[int, int], SceneBatch]:
    return make_batch


@pytest.fixture(scope="session")
def config() -> PlannerConfig:
    return PlannerConfig(hidden_size=16, batch_size=16, num_steps=60, num_agents=4, num_lanes=3)


@pytest.fixture(scope="session")
def features(config: PlannerConfig) -> PlannerFeatures:
    return features_of_batch(make_batch(64), config)
