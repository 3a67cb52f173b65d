"""Graph-RAE on another device: the CPU's embeddings, training that ends near the CPU's, bfloat16 that points the same
way.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoscale_ray.config import RepresentationConfig
from autoscale_ray.representation import objectives, sharded
from autoscale_ray.representation.model import embed_batch, feature_sizes_of, new_model
from autoscale_ray.representation.scene_graph import graph_from_batch, select_scenes
from autoscale_ray.representation.training import (
    batch_terms,
    fit,
    fit_scenario_distance,
    take_scenes,
    training_set,
)
from tests.unit.representation.random_scenes import random_batch

TOLERANCE = 1e-4
"""float32 sums on the device run in another order, and products may use wider accumulators."""
EVERY_TERM = dataclasses.replace(
    RepresentationConfig().loss,
    **{field.name: 1.0 for field in dataclasses.fields(RepresentationConfig().loss)},
)


@pytest.fixture(scope="module")
def batch():
    return random_batch(200, 0)


@pytest.fixture(scope="module")
def graph(batch):
    return graph_from_batch(batch)


@pytest.fixture(scope="module")
def model(graph):
    return new_model(RepresentationConfig(), feature_sizes_of(graph), 0)


@pytest.fixture(scope="module")
def scenes(batch):
    source_N = np.where(np.arange(200) % 5 == 1, np.arange(200) - 1, -1)
    responses_NR = np.random.default_rng(0).random((200, 3))
    return training_set([batch], source_N, None, responses_NR, with_later=True)


@pytest.mark.parametrize("use_future", [False, True])
def test_graphs_are_the_same(batch, use_future, device):
    bare = dataclasses.replace(batch, agent_neighbours_A8=None, agent_lanes_A3=None)
    for scenes in (batch, bare):
        expected = graph_from_batch(scenes, use_future=use_future)
        found = graph_from_batch(scenes.to(device), use_future=use_future).to("cpu")
        for field in dataclasses.fields(expected):
            for name, table in getattr(expected, field.name).items():
                torch.testing.assert_close(
                    getattr(found, field.name)[name], table, atol=TOLERANCE, rtol=0, msg=name
                )


@pytest.mark.parametrize("path", ["fast", "pyg"])
def test_embeddings_equal_the_cpu(batch, model, path, device):
    expected = embed_batch(model, batch, "pyg")
    found = embed_batch(copy.deepcopy(model).to(device), batch, path)
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), expected, atol=TOLERANCE, rtol=0)


def test_scenes_selected_on_the_device_embed_the_same(graph, model, device):
    encoder, moved = copy.deepcopy(model.encoder).to(device), graph.to(device)
    rows = torch.tensor([7, 3, 3, 150], device=device)
    with torch.no_grad():
        whole, part = encoder(moved).z_ND, encoder(select_scenes(moved, rows)).z_ND
    torch.testing.assert_close(part, whole[rows], atol=TOLERANCE, rtol=0)


def test_gradients_equal_the_cpu(graph, model, device):
    gradients = []
    delta = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    for place in ("cpu", device):
        encoder = copy.deepcopy(model.encoder).to(place)
        objectives.neighbour_loss(
            encoder(graph.to(place)).z_ND, delta.to(place), torch.arange(len(delta)).to(place)
        ).backward()
        gradients.append({name: value.grad.cpu() for name, value in encoder.named_parameters()
                          if value.grad is not None})  # fmt: skip
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-2, atol=1e-4, msg=name)


def test_every_term_of_the_objective_equals_the_cpu(scenes, device):
    config = RepresentationConfig(loss=EVERY_TERM)
    found = []
    for place in ("cpu", device):
        there = take_scenes(scenes.to(place), torch.arange(64, device=place))
        model = new_model(config, feature_sizes_of(scenes.graph), 0, 3).to(place)
        distance = fit_scenario_distance(there.signature, dataclasses.asdict(config.distance), 0)
        terms = batch_terms(model, there, 8, distance, torch.Generator().manual_seed(1))
        found.append({name: float(value.detach()) for name, value in terms.items()})
    assert found[0].keys() == dataclasses.asdict(EVERY_TERM).keys()
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)


def test_training_ends_near_the_cpu(scenes, device):
    settings = {"num_steps": 8, "batch_size": 64, "learning_rate": 1e-3}
    alone = RepresentationConfig(loss=EVERY_TERM, **settings)
    together = RepresentationConfig(num_shards=4, **settings)
    steps = []
    for config, expected, found in (
        (alone, fit(scenes, alone, 0), fit(scenes, alone, 0, device=device)),
        (
            together,
            sharded.fit_shared(scenes, together, 0),
            sharded.fit_shared(scenes, together, 0, device=device, on_step=steps.append),
        ),
    ):
        assert {weight.device.type for weight in found.parameters()} == {"cpu"}
        before = flat(new_model(config, feature_sizes_of(scenes.graph), 0, num_responses=3))
        moved, missed = (flat(expected) - before).abs().mean(), (flat(found) - flat(expected)).abs().mean()
        assert float(moved) > 1e-4
        assert float(missed) < 0.05 * float(moved)
    assert len(steps) == settings["num_steps"]


def flat(model) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_a_checkpoint_of_the_device_goes_on_there(scenes, device, tmp_path):
    config = RepresentationConfig(num_shards=4, num_steps=8, batch_size=64)
    steps = []

    def keep(state):
        if state.step == 2:
            sharded.save_state(state, tmp_path / "state")

    whole = sharded.fit_shared(scenes, config, 0, device=device, on_step=keep)
    rest = sharded.fit_shared(
        scenes, config, 0, device=device, start=load_file(tmp_path / "state"), on_step=steps.append
    )
    assert [state.step for state in steps] == [3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(flat(rest), flat(whole), atol=1e-5, rtol=0)


def test_bfloat16_points_the_same_way(graph, model, device):
    half = copy.deepcopy(model.encoder).bfloat16().to(device)
    features = {name: table.bfloat16() for name, table in graph.features.items()}
    with torch.no_grad():
        expected = model.encoder(graph, "pyg").z_ND
        found = half(dataclasses.replace(graph, features=features).to(device)).z_ND.float().cpu()
    assert float(torch.cosine_similarity(found, expected).min()) >= 0.999
