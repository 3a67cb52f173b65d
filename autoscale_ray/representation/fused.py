"""The encoder without gradients on a CPU: few matrix products, and compiled kernels between them.

The same arithmetic as `encoder.GraphLayer` and `encoder.AttentionPool` in another order: a relation's weight is applied
before the mean where there are no more sources than targets, and in one product with the nodes' own weight. Products
run in the type of the weights (or of autocast), everything between them in float32.

Shape legend: N scenes, M nodes of one type, H hidden size, W = H times the number of products.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from autoscale_ray.representation.scene_graph import NODE_TYPES, RELATIONS, SceneGraph

FEW_ROWS = 512
"""Below this a product in bfloat16 costs more to set up than it saves."""


def applies(graph: SceneGraph) -> bool:
    """Tell whether these kernels can stand in for the layers: no gradient wanted, CPU, numba installed."""
    return not torch.is_grad_enabled() and graph.features["ego"].device.type == "cpu" and has_numba()


@cache
def has_numba() -> bool:
    """Tell whether numba is installed; it is an extra."""
    return find_spec("numba") is not None


@cache
def _kernels() -> ModuleType:
    return import_module("autoscale_ray.representation.kernels")


def _product(states_MH: Tensor, weight_WH: Tensor, bias_W: Tensor | None = None) -> Tensor:
    if len(states_MH) < FEW_ROWS:
        bias_W = None if bias_W is None else bias_W.float()
        return linear(states_MH.float(), weight_WH.float(), bias_W).float()
    return linear(states_MH.to(weight_WH.dtype), weight_WH, bias_W).float()


def input_states(inputs: nn.ModuleDict, graph: SceneGraph) -> dict[str, Tensor]:
    """Return relu(W features) by node type, float32."""
    return {
        name: torch.relu_(_product(table, inputs[name][0].weight, inputs[name][0].bias))  # type: ignore[index]
        for name, table in graph.features.items()
    }


def apply_layer(layer: Any, states: Mapping[str, Tensor], graph: SceneGraph) -> dict[str, Tensor]:
    """Run one round of messages.

    Args:
        layer: The `GraphLayer`.
        states: Node states by type, float32; overwritten.
        graph: N scenes.

    Returns:
        The next node states.
    """
    size = states["ego"].shape[1]
    early = {
        relation: source
        for relation, (source, target) in RELATIONS.items()
        if len(states[source]) <= len(states[target])
    }
    tables = {
        name: _own_and_messages(layer, name, states[name], [r for r in early if early[r] == name])
        for name in NODE_TYPES
    }
    for relation, (source, target) in RELATIONS.items():
        column = [r for r in early if early[r] == source].index(relation) + 1 if relation in early else 0
        sent = tables[source] if relation in early else states[source]
        total = tables[target] if relation in early else torch.zeros_like(states[target])
        _add_mean(total, sent, column * size, size, graph, relation)
        if relation not in early:
            tables[target][:, :size] += _product(total, layer.relations[relation].lin_l.weight)
    ego_update, *from_ego = _ego_messages(layer, states["ego"])
    means = [
        _mean(states[name], torch.ones(len(states[name]), 1), graph.offsets[name]) for name in NODE_TYPES
    ]
    ego_update = ego_update + _product(
        torch.cat(means, dim=1), torch.cat([layer.to_ego[name].weight for name in NODE_TYPES], dim=1)
    )
    for name, message_NH in zip(NODE_TYPES, from_ego, strict=True):
        _finish(states[name], tables[name], message_NH, graph.offsets[name], layer.norms[name])
    rows = torch.arange(len(ego_update) + 1)
    _finish(states["ego"], ego_update, torch.zeros_like(ego_update), rows, layer.norms["ego"])
    return dict(states)


def _ego_messages(layer: Any, ego_NH: Tensor) -> tuple[Tensor, ...]:
    """Return the ego's own product and what it sends to each node type, with the bias of the nodes' own product."""
    weights = [layer.own["ego"].weight, *(layer.from_ego[name].weight for name in NODE_TYPES)]
    biases = [layer.own[name].bias for name in ("ego", *NODE_TYPES)]
    joined = _product(ego_NH, torch.cat(weights), torch.cat(biases))
    return tuple(part.contiguous() for part in joined.split(ego_NH.shape[1], dim=1))


def _own_and_messages(layer: Any, name: str, states_MH: Tensor, relations: list[str]) -> Tensor:
    """Return the nodes' own product without bias, and beside it what they send along the relations (M, W)."""
    weights = [layer.own[name].weight, *(layer.relations[relation].lin_l.weight for relation in relations)]
    return _product(states_MH, torch.cat(weights))


def _add_mean(
    total_MW: Tensor, sent_MW: Tensor, column: int, size: int, graph: SceneGraph, relation: str
) -> None:
    source, target = RELATIONS[relation]
    _kernels().add_neighbour_mean(
        total_MW.numpy(), sent_MW.numpy(), column, size, graph.edges[relation].contiguous().numpy(),
        graph.edge_offsets[relation].numpy(), graph.offsets[source].numpy(), graph.offsets[target].numpy(),
    )  # fmt: skip


def _finish(
    states_MH: Tensor, update_MW: Tensor, ego_NH: Tensor, offsets: Tensor, norm: nn.LayerNorm
) -> None:
    _kernels().finish_layer(
        states_MH.numpy(), update_MW.numpy(), ego_NH.numpy(), offsets.numpy(),
        norm.weight.detach().float().numpy(), norm.bias.detach().float().numpy(), norm.eps,
    )  # fmt: skip


def _mean(states_MH: Tensor, weight_MG: Tensor, offsets: Tensor) -> Tensor:
    return torch.from_numpy(_kernels().weighted_mean(states_MH.numpy(), weight_MG.numpy(), offsets.numpy()))


def pooled(score: nn.Linear, limit: float, states_MH: Tensor, offsets: Tensor) -> Tensor:
    """Return one attention-weighted mean for each scene, weights exp(limit tanh(score)) (N, H).

    Args:
        score: Linear layer from the state to one score a head.
        limit: Bound of the scores.
        states_MH: Node states, float32.
        offsets: First node of each scene.
    """
    score_MG = linear(states_MH, score.weight.float(), score.bias.float()).float()
    weight_MG = torch.tanh_(score_MG).mul_(limit).exp_()
    return _mean(states_MH, weight_MG, offsets)
