"""The encoder on a CUDA device: the CPU's embeddings, gradients that train, bfloat16 that points the same way."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from autoscale_ray.config import RepresentationConfig
from autoscale_ray.representation import objectives
from autoscale_ray.representation.scene_graph import graph_from_batch, select_scenes
from autoscale_ray.representation.training import feature_sizes_of, new_model
from tests.unit.representation.random_scenes import random_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is there"),
]
TOLERANCE = 1e-4
"""float32 sums on the device run in another order, and products may use wider accumulators."""


@pytest.fixture(scope="module")
def graph():
    return graph_from_batch(random_batch(200, 0))


@pytest.fixture(scope="module")
def model(graph):
    return new_model(RepresentationConfig(), feature_sizes_of(graph), 0)


@pytest.mark.parametrize("path", ["fast", "pyg"])
def test_embeddings_equal_the_cpu(graph, model, path):
    with torch.no_grad():
        expected = model.encoder(graph, "pyg").z_ND
        found = copy.deepcopy(model.encoder).cuda()(graph.to("cuda"), path).z_ND
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=TOLERANCE, rtol=0)


def test_scenes_selected_on_the_device_embed_the_same(graph, model):
    encoder, moved = copy.deepcopy(model.encoder).cuda(), graph.to("cuda")
    rows = torch.tensor([7, 3, 3, 150], device="cuda")
    with torch.no_grad():
        whole, part = encoder(moved).z_ND, encoder(select_scenes(moved, rows)).z_ND
    torch.testing.assert_close(part, whole[rows], atol=TOLERANCE, rtol=0)


def test_gradients_equal_the_cpu(graph, model):
    gradients = []
    delta = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        encoder = copy.deepcopy(model.encoder).to(device)
        objectives.neighbour_loss(encoder(graph.to(device)).z_ND, delta.to(device)).backward()
        gradients.append({name: value.grad.cpu() for name, value in encoder.named_parameters()
                          if value.grad is not None})  # fmt: skip
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-2, atol=1e-4, msg=name)


def test_bfloat16_points_the_same_way(graph, model):
    half = copy.deepcopy(model.encoder).cuda().bfloat16()
    features = {name: table.bfloat16() for name, table in graph.features.items()}
    with torch.no_grad():
        expected = model.encoder(graph, "pyg").z_ND
        found = half(dataclasses.replace(graph, features=features).to("cuda")).z_ND.float().cpu()
    assert float(torch.cosine_similarity(found, expected).min()) >= 0.999
