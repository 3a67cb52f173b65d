"""The gradient of a trained planner on a group of scenes.

Shape legend: W weights of the planner, N scenes of the group.
"""

from __future__ import annotations

import numpy as np
import torch

from autoscale_ray.planning.features import Features
from autoscale_ray.planning.inference import load_planner
from autoscale_ray.planning.objectives import make_examples, planning_loss
from autoscale_ray.planning.training import PlannerWeights, one_thread


def mean_gradient(weights: PlannerWeights, features: Features, rows: np.ndarray) -> np.ndarray:
    """Compute the gradient of the mean planning loss (mode and imitation) at the weights that drive.

    Args:
        weights: A trained planner.
        features: Scenes to choose from.
        rows: int64 rows of the group; at least one; a row may stand there twice.

    Returns:
        gradient_W, float32.
    """
    planner = load_planner(weights)
    examples = make_examples(features, torch.as_tensor(rows), weights.config)
    batch = examples.shards(torch.arange(len(rows))[None])
    with one_thread():
        output = planner(batch.ego_NF, batch.agents_NKF, batch.lanes_NKF, 0)
        loss_V, _ = planning_loss(output, batch, 0.0)
        parts = torch.autograd.grad(
            loss_V.sum(), list(planner.parameters()), allow_unused=True, materialize_grads=True
        )
    return torch.cat([part.flatten() for part in parts]).numpy()
