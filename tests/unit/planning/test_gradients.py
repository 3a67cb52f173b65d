from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoscale_ray.planning.gradients import mean_gradient
from autoscale_ray.planning.objectives import make_examples, planning_loss
from autoscale_ray.planning.planner import empty_planner, parameter_shapes, set_weights
from autoscale_ray.planning.training import train

ROWS = np.arange(20)


@pytest.fixture(scope="module")
def weights(features, config):
    return train(features, ROWS, replace(config, num_steps=5), 3)


def loss_at(weights_W, features, config) -> float:
    planner = empty_planner(config, 1)
    set_weights(planner, weights_W)
    batch = make_examples(features, torch.as_tensor(ROWS), config).shards(torch.arange(len(ROWS))[None])
    with torch.no_grad():
        loss_V, _ = planning_loss(planner(batch.ego_NF, batch.agents_NKF, batch.lanes_NKF, 0), batch, 0.0)
    return float(loss_V[0])


def test_gradient_is_the_slope_of_the_loss(weights, features, config):
    gradient_W = mean_gradient(weights, features, ROWS)
    shapes = parameter_shapes(empty_planner(config, 1))
    flat_W = torch.cat([weights.average[name].flatten() for name in shapes])
    direction_W = torch.tensor(gradient_W / np.linalg.norm(gradient_W))
    step = 1e-3
    above, below = (loss_at(flat_W + sign * step * direction_W, features, config) for sign in (1, -1))
    assert (above - below) / (2 * step) == pytest.approx(np.linalg.norm(gradient_W), rel=0.02)


def test_gradient_of_a_group_is_the_mean_over_its_scenes(weights, features):
    whole_W = mean_gradient(weights, features, ROWS)
    parts_W = [mean_gradient(weights, features, part) for part in (ROWS[:5], ROWS[5:])]
    np.testing.assert_allclose(whole_W, 0.25 * parts_W[0] + 0.75 * parts_W[1], atol=2e-6)
    np.testing.assert_array_equal(whole_W, mean_gradient(weights, features, ROWS))
