"""Shared training of the encoder: the same bits however many workers share it, and the gradient of the whole batch."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoscale_ray.config import EmbeddingLossConfig, RepresentationConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.representation import model as models
from autoscale_ray.representation import training
from autoscale_ray.representation.sharded import WHOLE_BATCH_TERMS, Group, fit_shared, save_state
from tests.unit.representation.random_scenes import random_batch

LOSS = EmbeddingLossConfig(
    **{**dataclasses.asdict(EmbeddingLossConfig()), "variance": 0.1, "pairs": 0.2, "metric": 0.3}
)
SMALL = RepresentationConfig(
    hidden_size=16, embedding_size=16, num_layers=1, num_steps=5, batch_size=30, num_shards=4, loss=LOSS
)


@pytest.fixture(scope="module")
def scenes():
    source_N = np.full(120, -1)
    source_N[100:] = np.arange(20)
    return training.training_set([random_batch(60, 0), random_batch(60, 1)], source_N)


@pytest.fixture(scope="module")
def alone(scenes):
    return fit_shared(scenes, SMALL, 3).state_dict()


@pytest.fixture(scope="module")
def first_step(scenes, tmp_path_factory):
    """Return the state after the first step: threads share the generator that draws initial weights."""
    path = tmp_path_factory.mktemp("first") / "state.safetensors"
    fit_shared(scenes, SMALL, 3, on_step=lambda state: save_state(state, path) if state.step == 1 else None)
    return path


def together(scenes, shards_by_worker, start):
    """Train with one thread for each worker; they meet in every gather."""
    num_workers = len(shards_by_worker)
    met, table = threading.Barrier(num_workers), {}
    found = [None] * num_workers

    def work(rank):
        def gather(mine):
            table[rank] = mine
            met.wait(60)
            everything = torch.cat([table[other] for other in range(num_workers)])
            met.wait(60)
            return everything

        found[rank] = fit_shared(
            scenes, SMALL, 3, Group(shards_by_worker[rank], gather), start=load_file(start)
        ).state_dict()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


@pytest.mark.parametrize("shards_by_worker", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0,), (1, 2, 3)]])
def test_workers_together_end_with_the_bits_of_one(scenes, alone, first_step, shards_by_worker):
    for state in together(scenes, shards_by_worker, first_step):
        assert all(torch.equal(state[name], alone[name]) for name in alone)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_step_is_that_of_the_whole_batch_up_to_rounding(scenes, num_shards):
    """One AdamW step divides each gradient by itself, so gradients are compared through the second moment: a plain
    sum of squares. float32, tolerance 1e-4 of the largest."""
    config = dataclasses.replace(SMALL, num_steps=1, num_shards=num_shards)
    states = []
    fit_shared(scenes, config, 3, on_step=states.append)
    shared = [item["exp_avg"] for item in states[0].optimizer.state_dict()["state"].values()]
    whole = whole_batch_gradient(scenes, config)
    for ours, theirs in zip(shared, whole, strict=True):
        torch.testing.assert_close(
            ours / 0.1, theirs, rtol=1e-3, atol=1e-4 * max(1e-3, theirs.abs().max().item())
        )


def whole_batch_gradient(scenes, config):
    """Return the clipped gradient of the first step, taken through the encoder in one piece."""
    model = models.new_model(config, models.feature_sizes_of(scenes.graph), 3).train()
    distance = training.fit_scenario_distance(scenes.signature, dataclasses.asdict(config.distance), 3)
    rows, copies = next(training.draw_batches(scenes.source_N, config, torch.Generator().manual_seed(4)))
    terms = training.batch_terms(
        model, training.take_scenes(scenes, rows), copies, distance, torch.Generator()
    )
    training.weighted_sum(terms, config).backward()
    weights = list(model.parameters())
    torch.nn.utils.clip_grad_norm_([weight for weight in weights if weight.grad is not None], 5.0)
    return [weight.grad for weight in weights if weight.grad is not None]


@pytest.mark.parametrize("stop", [1, 3])
def test_training_goes_on_from_a_saved_state_to_the_same_bits(scenes, alone, stop, tmp_path):
    def keep(state):
        if state.step == stop:
            save_state(state, tmp_path / "state.safetensors")

    fit_shared(scenes, SMALL, 3, on_step=keep)
    again = fit_shared(scenes, SMALL, 3, start=load_file(tmp_path / "state.safetensors")).state_dict()
    assert all(torch.equal(again[name], alone[name]) for name in alone)


@pytest.mark.parametrize("name", [name for name in dataclasses.asdict(LOSS) if name not in WHOLE_BATCH_TERMS])
def test_terms_that_run_the_encoder_again_are_refused(scenes, name):
    config = dataclasses.replace(SMALL, loss=dataclasses.replace(LOSS, **{name: 0.1}))
    with pytest.raises(ConfigError, match=f"num_shards.*{name}"):
        fit_shared(scenes, config, 0)


def test_a_batch_smaller_than_the_shards_are_many_is_refused(scenes):
    with pytest.raises(ConfigError, match="batch_size"):
        fit_shared(scenes, dataclasses.replace(SMALL, batch_size=3), 0)
