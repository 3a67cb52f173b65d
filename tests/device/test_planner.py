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
    for name, weight in expected.average.items():
        assert found.average[name].device.type == "cpu"
        torch.testing.assert_close(found.average[name], weight, atol=1e-3, rtol=0, msg=name)


def test_a_checkpoint_of_the_device_goes_on_there(features, device, tmp_path):
    def keep(state):
        if state.step == 9:
            save_state(state, tmp_path / "state")

    whole = train_shared(features, ROWS, CONFIG, 3, Place(device=device), on_step=keep)
    rest = train_shared(features, ROWS, CONFIG, 3, Place(device=device), start=load_state(tmp_path / "state"))
    for name, weight in whole.average.items():
        torch.testing.assert_close(rest.average[name], weight, atol=1e-5, rtol=0, msg=name)


def test_features_are_the_same(device):
    batch = make_batch(16)
    found = moved(features_of_batch(batch.to(device), CONFIG), "cpu")
    expected = features_of_batch(batch, CONFIG)
    for name in expected.__slots__:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=0, msg=name)
