"""Hand-made scenes on a straight road along x, the ego's rear axle at the origin."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from autoscale_ray.evaluation import ScoringScene, make_scene

SPEED_MPS = 8.0


def rectangle(x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def straight_road(
    speed_mps: float = SPEED_MPS, agents: list[dict] | None = None, **changes: object
) -> ScoringScene:
    """One route lane 3.5 m wide inside an 8 m wide roadblock, from x = -60 to 120 m."""
    rings = [rectangle(-60.0, 120.0, -4.0, 4.0), rectangle(-60.0, 120.0, -1.75, 1.75)]
    times_s = np.array([-1.5, -1.0, -0.5, 0.0])
    history = np.zeros((4, 7))
    history[:, 0], history[:, 3] = speed_mps * times_s, speed_mps
    agents = agents or []
    frames = np.arange(11) * 0.5
    states = np.zeros((len(agents), 11, 5))
    for row, agent in enumerate(agents):
        vx, vy = agent.get("velocity", (0.0, 0.0))
        states[row, :, 0], states[row, :, 1] = agent["x"] + vx * frames, agent["y"] + vy * frames
        states[row, :, 2] = agent.get("yaw", 0.0)
        states[row, :, 3:] = vx, vy
    values = {
        "ego_history_times_us": 1_000_000_000 + (times_s * 1e6).astype(np.int64),
        "ego_history_states": history,
        "agent_types": [agent.get("type", 0) for agent in agents],
        "agent_dims": np.array([agent.get("dims", (4.0, 2.0, 1.5)) for agent in agents]).reshape(-1, 3),
        "agent_states": states,
        "agent_mask": np.array([agent.get("mask", [True] * 11) for agent in agents], dtype=bool).reshape(
            -1, 11
        ),
        "polygon_layers": [0, 1],
        "polygon_on_route": [False, True],
        "polygon_red": np.zeros((2, 11), bool),
        "polygon_offsets": [0, 4, 8],
        "polygon_xy": np.concatenate(rings),
        "centreline": np.stack([np.linspace(-60, 120, 181), np.zeros(181), np.zeros(181)], axis=1),
        "human_poses": constant_speed(speed_mps),
        "speed_limit_mps": 13.0,
    }
    return make_scene("straight", **{**values, **changes})


def constant_speed(speed_mps: float, lateral_m: float = 0.0, num: int = 8) -> np.ndarray:
    times_s = np.arange(1, num + 1) * 4.0 / num
    return np.stack([speed_mps * times_s, lateral_m * times_s / 4.0, np.zeros(num)], axis=1)


def moved(scene: ScoringScene, yaw_rad: float, x_m: float, y_m: float) -> ScoringScene:
    """Move the whole scene rigidly."""
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    rotation = np.array([[cos, sin], [-sin, cos]])

    def poses(values: np.ndarray) -> np.ndarray:
        out = values.copy()
        out[..., :2] = values[..., :2] @ rotation + np.array([x_m, y_m])
        out[..., 2] = values[..., 2] + yaw_rad
        return out

    agents = poses(scene.agent_states)
    agents[..., 3:5] = scene.agent_states[..., 3:5] @ rotation
    history = scene.ego_history_states.copy()
    history[:, :3] = poses(history[:, :3])
    return dataclasses.replace(
        scene,
        ego_history_states=history,
        agent_states=agents,
        polygon_xy=scene.polygon_xy @ rotation + np.array([x_m, y_m]),
        centreline=poses(scene.centreline),
    )


def permuted(scene: ScoringScene, order: np.ndarray) -> ScoringScene:
    """List the agents in another order."""
    names = ("agent_types", "agent_dims", "agent_states", "agent_mask")
    return dataclasses.replace(scene, **{name: getattr(scene, name)[order] for name in names})


def with_unseen_agents(scene: ScoringScene, count: int) -> ScoringScene:
    """Pad with agents that are never seen."""
    return dataclasses.replace(
        scene,
        agent_types=np.concatenate([scene.agent_types, np.zeros(count, np.int64)]),
        agent_dims=np.concatenate([scene.agent_dims, np.ones((count, 3))]),
        agent_states=np.concatenate([scene.agent_states, np.full((count, scene.num_frames, 5), np.nan)]),
        agent_mask=np.concatenate([scene.agent_mask, np.zeros((count, scene.num_frames), bool)]),
    )
