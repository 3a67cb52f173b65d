"""Driving with a trained planner: plans in the scene frame and the occupancy score.

Shape legend: N scenes asked for, P plan frames (8).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from autoscale_ray.errors import ConfigError
from autoscale_ray.planning.anchors import anchor_trajectories
from autoscale_ray.planning.features import Features, PlannerFeatures
from autoscale_ray.planning.frenet import unproject_poses
from autoscale_ray.planning.occupancy import mean_iou
from autoscale_ray.planning.planner import (
    RESIDUAL_SCALE,
    Planner,
    empty_planner,
    parameter_shapes,
    set_weights,
)
from autoscale_ray.planning.training import PlannerWeights, one_thread
from autoscale_ray.scenes.schema import NUM_PLAN_FRAMES

CHUNK_SCENES = 256


def load_planner(weights: PlannerWeights) -> Planner:
    """Return the module with the averaged weights."""
    planner = empty_planner(weights.config, 1)
    set_weights(planner, torch.cat([weights.average[name].flatten() for name in parameter_shapes(planner)]))
    return planner


def predict(weights: PlannerWeights, features: Features, rows: np.ndarray) -> np.ndarray:
    """Plan for scenes: the trajectory of the most probable mode.

    Args:
        weights: A trained planner.
        features: Scenes to choose from.
        rows: int64 rows to plan for.

    Returns:
        poses_NP3: float32 x, y in m and yaw in rad of the rear axle in the scene frame at 0.5 ... 4 s.

    Raises:
        ConfigError: The training diverged, so that there is no plan.
    """
    planner = load_planner(weights)
    poses = [np.empty((0, NUM_PLAN_FRAMES, 3), np.float32)]
    with one_thread(), torch.no_grad():
        for scenes, count in _chunks(features, rows):
            output = planner(scenes.ego_NF[None], scenes.agents_NKF[None], scenes.lanes_NKF[None], 0)
            best_B = (torch.arange(len(scenes)), output.logits_VBM[0].argmax(1))
            anchors_BP3 = anchor_trajectories(scenes.state_N4, weights.config)[best_B]
            route_poses_BP3 = anchors_BP3 + output.residuals_VBMP3[0][best_B] * torch.tensor(RESIDUAL_SCALE)
            if not bool(route_poses_BP3.isfinite().all()):
                rule = "makes the training diverge: plans must be finite"
                raise ConfigError("planner.learning_rate", rule, weights.config.learning_rate)
            poses.append(unproject_poses(scenes.route_NR3, route_poses_BP3)[:count].numpy())
    return np.concatenate(poses)


def occupancy_miou(
    weights: PlannerWeights, features: Features, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score the auxiliary occupancy head.

    Args:
        weights: A trained planner.
        features: Scenes to choose from.
        rows: int64 rows to score.

    Returns:
        value_N: float64 mean IoU in [0, 1], 0 where invalid; valid_N: bool, all False if the head was not
            trained.
    """
    planner = load_planner(weights)
    values, valid = [np.empty(0)], [np.empty(0, bool)]
    with one_thread(), torch.no_grad():
        for scenes, count in _chunks(features, rows):
            inputs = (scenes.ego_NF[None], scenes.agents_NKF[None], scenes.lanes_NKF[None])
            occupancy_VBOGG = planner(*inputs, len(scenes)).occupancy_VBOGG
            value_B, valid_B = mean_iou(occupancy_VBOGG[0], scenes.occupancy_NOGG)
            values.append(value_B[:count].numpy())
            valid.append(valid_B[:count].numpy())
    trained = weights.config.occupancy_weight > 0
    return np.concatenate(values) * trained, np.concatenate(valid) & trained


def _chunks(features: Features, rows: np.ndarray) -> Iterator[tuple[PlannerFeatures, int]]:
    """Yield chunks of one size: a shorter one could take other matrix kernels and move the last bits."""
    rows_N = torch.as_tensor(rows)
    for start in range(0, len(rows_N), CHUNK_SCENES):
        chunk = rows_N[start : start + CHUNK_SCENES]
        padded = torch.cat([chunk, chunk[-1:].expand(CHUNK_SCENES - len(chunk))])
        yield features.take(padded), len(chunk)
