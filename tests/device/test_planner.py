"""The planner trained on another device ends near the CPU's, in both ways of sharing steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoscale_ray.config import PlannerConfig
from autoscale_ray.distributed.steps import Place, moved, train_shared
from autoscale_ray.planning.checkpoint import load_state, save_state
from autoscale_ray.planning.features import features_of_batch
from autoscale_ray.planning.planner import empty_planner, parameter_shapes
from autoscale_ray.planning.training import PlannerWeights, new_state
from tests.unit.planning.conftest import make_batch

CONFIG = PlannerConfig(
    hidden_size=16, batch_size=16, num_steps=20, num_agents=4, num_lanes=3, learning_rate=1e-4
)
ROWS = np.arange(3, 60)


@pytest.fixture(scope="module")
def features():
    return features_of_batch(make_batch(64), CONFIG)


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_ends_near_the_cpu(features, deterministic, device):
    config = replace(CONFIG, deterministic=deterministic)
    expected = train_shared(features, ROWS, config, 3, Place())
    found = train_shared(features, ROWS, config, 3, Place(device=device))
    assert {weight.device.type for weight in found.average.values()} == {"cpu"}
    before = new_state(config, 3).weights_W
    moved, missed = (flat(expected) - before).abs().mean(), (flat(found) - flat(expected)).abs().mean()
    assert float(moved) > 1e-4
    assert float(missed) < 0.05 * float(moved)


def flat(weights: PlannerWeights) -> torch.Tensor:
    """Return the averaged weights in the order of a training state."""
    return torch.cat([weights.average[name].flatten() for name in parameter_shapes(empty_planner(CONFIG, 1))])


def test_a_checkpoint_of_the_device_goes_on_there(features, device, tmp_path):
    steps = []

    def keep(state):
        if state.step == 9:
            save_state(state, tmp_path / "state")

    whole = train_shared(features, ROWS, CONFIG, 3, Place(device=device), on_step=keep)
    start = load_state(tmp_path / "state")
    rest = train_shared(
        features, ROWS, CONFIG, 3, Place(device=device), start=start, on_step=lambda s: steps.append(s.step)
    )
    assert steps == list(range(10, CONFIG.num_steps + 1))
    torch.testing.assert_close(flat(rest), flat(whole), atol=1e-5, rtol=0)


def test_features_are_the_same(device):
    batch = make_batch(16)
    found = moved(features_of_batch(batch.to(device), CONFIG), "cpu")
    expected = features_of_batch(batch, CONFIG)
    for name in expected.__slots__:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=0, msg=name)
