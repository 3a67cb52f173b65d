"""The encoder without gradients on a CPU: few matrix products, and compiled kernels between them.

The same arithmetic as `encoder.GraphLayer` and `encoder.AttentionPool` in another order. Nodes of one type lie in one
table: a copy of their states and, beside it, the means of their neighbours, so that one product does for all of it.
Where a relation has fewer sources than targets, its weight is applied to the sources instead, and the mean taken of the
products. Egos lie in a table of scenes, beside the mean state of each node type. Weights are brought into this form
once a call, and the tables of a block of scenes are used again by the next block.

Tables and products of nodes have the type of the weights (or of autocast) unless they are few; the rest is float32.

Shape legend: N scenes, M nodes of one type, H hidden size, W = H times (1 + the means beside the states), I inputs and
O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from autoscale_ray.extras import has_numba
from autoscale_ray.representation.scene_graph import NODE_TYPES, RELATIONS, SceneGraph

GATE_LIMIT = 6.0
"""Attention scores are bounded by 6 tanh(.): exp cannot overflow, so no maximum per scene is needed."""
FEW_ROWS = 512
"""Below this a product in bfloat16 costs more to set up than it saves."""
ADD = -1
"""In place of the first column: add the mean to the table, do not set it."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """One or several linear layers as one product from the right."""

    weight_IO: Tensor
    bias_O: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of a `GraphLayer`; the weights of a product lie on top of one another."""

    nodes_WH: dict[str, Tensor]
    """By ragged node type: own weight and those of its relations of `_late`."""
    early_HH: dict[str, Tensor]
    """By relation that has edges and is not of `_late`."""
    from_ego: _Linear
    """H -> H for each ragged node type, side by side, with the bias of the nodes' own weight."""
    to_ego: _Linear
    """A row of the table of scenes -> H."""
    norms: dict[str, tuple[NDArray[np.float32], NDArray[np.float32], float]]
    """Scale, shift and epsilon by ragged node type."""
    ego_norm: tuple[Tensor, Tensor, float]


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights of a `GraphEncoder`, in the types of the tables they are used on."""

    inputs: dict[str, _Linear]
    layers: list[_Layer]
    late: dict[str, int]
    """See `_late`."""
    scores: dict[str, _Linear]
    size: int
    """H."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Memory that torch and the kernels share; the kernels see bfloat16 as its bits."""

    rows: Tensor
    array: NDArray[Any]

    def first(self, num_rows: int) -> _Table:
        """Return the first rows."""
        return _Table(self.rows[:num_rows], self.array[:num_rows])


@dataclass(frozen=True, slots=True)
class _Scenes:
    """Scenes and the tables they are computed in."""

    features: dict[str, Tensor]
    offsets: dict[str, NDArray[np.int64]]
    """First node of each scene, by ragged node type."""
    sources: dict[str, NDArray[np.int32]]
    degrees: dict[str, NDArray[np.int32]]
    edge_offsets: dict[str, NDArray[np.int64]]
    """First edge of each scene, in `sources`."""
    scenes: _Table
    """Float32 (N, 4 H): the ego's state, then the mean state of each ragged node type."""
    states: dict[str, _Table]
    """By ragged node type, float32 (M, H)."""
    nodes: dict[str, _Table]
    """What products take (M, W): the states, then the means of the relations of `_late`."""
    updates: dict[str, _Table]
    """What they give (M, H)."""


def applies(graph: SceneGraph) -> bool:
    """Tell whether these kernels can stand in for the layers: no gradient wanted, CPU, numba installed."""
    return not torch.is_grad_enabled() and graph.features["ego"].device.type == "cpu" and has_numba()


@cache
def _kernels() -> ModuleType:
    return import_module("autoscale_ray.representation.kernels")


def encode(encoder: Any, graph: SceneGraph, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Encode scenes up to the input of the head.

    Args:
        encoder: The `GraphEncoder`.
        graph: N scenes.
        size: Scenes taken at a time.

    Returns:
        State of the ego and pooled states, float32 (N, 4 H), and the node states of the last block by type (M, H).
    """
    kinds = _kinds(encoder, graph, size)
    with torch.autocast("cpu", enabled=False):
        weights = _prepared(encoder, graph, kinds)
        joined_NW = torch.empty(len(graph), weights.size * (1 + len(NODE_TYPES)))
        whole, states = _scenes(graph, weights, kinds, size), {}
        # No scenes: one empty block, whose states have their shapes.
        for first in range(0, max(len(graph), 1), size):
            part = _cut(whole, first, min(first + size, len(graph)))
            states = _encode_block(weights, part, joined_NW.numpy()[first : first + size])
    return joined_NW, states


def _kinds(encoder: Any, graph: SceneGraph, size: int) -> dict[str, torch.dtype]:
    """Return the type of the tables of each node type."""
    weight = encoder.inputs["ego"][0].weight
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    share = min(1.0, size / max(len(graph), 1))
    return {
        name: torch.bfloat16
        if wanted == torch.bfloat16 and share * len(graph.features[name]) >= FEW_ROWS
        else torch.float32
        for name in NODE_TYPES
    }


def _late(graph: SceneGraph) -> dict[str, int]:
    """Return the relations whose mean is taken before the product, and where it stands in the target's table."""
    places: dict[str, int] = {}
    for relation, (source, target) in RELATIONS.items():
        if len(graph.features[source]) >= len(graph.features[target]):
            places[relation] = 1 + sum(RELATIONS[other][1] == target for other in places)
    return places


def _prepared(encoder: Any, graph: SceneGraph, kinds: Mapping[str, torch.dtype]) -> _Weights:
    inputs = {
        name: _linear([encoder.inputs[name][0]], kinds.get(name, torch.float32))
        for name in ("ego", *NODE_TYPES)
    }
    scores = {name: _linear([encoder.pools[name].pool.gate_nn.score], kinds[name]) for name in NODE_TYPES}
    late = _late(graph)
    layers = [_prepared_layer(layer, graph, kinds, late) for layer in encoder.layers]
    return _Weights(inputs, layers, late, scores, inputs["ego"].weight_IO.shape[1])


def _prepared_layer(
    layer: Any, graph: SceneGraph, kinds: Mapping[str, torch.dtype], late: Mapping[str, int]
) -> _Layer:
    linear = {name: layer.relations[name].lin_l for name in RELATIONS}
    nodes_WH = {
        name: _on_top(
            [layer.own[name], *(linear[found] for found in late if RELATIONS[found][1] == name)], kind
        )
        for name, kind in kinds.items()
    }
    early_HH = {
        relation: _on_top([linear[relation]], kinds[source])
        for relation, (source, _) in RELATIONS.items()
        if relation not in late and len(graph.sources[relation])
    }
    bias = torch.cat([layer.own[name].bias for name in NODE_TYPES]).float()
    from_ego = torch.cat([layer.from_ego[name].weight for name in NODE_TYPES]).float()
    to_ego = _on_top([layer.own["ego"], *(layer.to_ego[name] for name in NODE_TYPES)], torch.float32)
    norms = {name: _norm(layer.norms[name]) for name in (*NODE_TYPES, "ego")}
    return _Layer(
        nodes_WH, early_HH, _Linear(from_ego.T.contiguous(), bias), _Linear(to_ego, layer.own["ego"].bias.float()),
        {name: (norms[name][0].numpy(), norms[name][1].numpy(), norms[name][2]) for name in NODE_TYPES}, norms["ego"],
    )  # fmt: skip


def _on_top(layers: Sequence[nn.Linear], kind: torch.dtype) -> Tensor:
    return torch.cat([layer.weight.T for layer in layers]).to(kind)


def _linear(layers: Sequence[nn.Linear], kind: torch.dtype) -> _Linear:
    return _Linear(_on_top(layers, kind), layers[0].bias.detach().float())


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


def _table(num_rows: int, num_columns: int, kind: torch.dtype) -> _Table:
    rows = torch.empty(num_rows, num_columns, dtype=kind)
    return _Table(rows, _array(rows))


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _scenes(graph: SceneGraph, weights: _Weights, kinds: Mapping[str, torch.dtype], size: int) -> _Scenes:
    """Return all scenes, with tables for the largest block of them."""
    bounds = [*range(0, len(graph), size), len(graph)]
    states, nodes, updates = {}, {}, {}
    for name in NODE_TYPES:
        most = int(graph.offsets[name][bounds].diff().max()) if len(graph) else 0
        states[name] = _table(most, weights.size, torch.float32)
        nodes[name] = _table(most, len(weights.layers[0].nodes_WH[name]), kinds[name])
        updates[name] = _table(most, weights.size, kinds[name])
    scenes = _table(min(size, len(graph)), weights.size * (1 + len(NODE_TYPES)), torch.float32)
    return _Scenes(
        graph.features, _arrays(graph.offsets), _arrays(graph.sources), _arrays(graph.degrees),
        _arrays(graph.edge_offsets), scenes, states, nodes, updates,
    )  # fmt: skip


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _cut(whole: _Scenes, first: int, last: int) -> _Scenes:
    """Return consecutive scenes; their nodes are counted from the first one on."""
    bounds = {name: (int(found[first]), int(found[last])) for name, found in whole.offsets.items()}
    features = {name: whole.features[name][low:high] for name, (low, high) in bounds.items()}
    offsets = {name: whole.offsets[name][first : last + 1] - low for name, (low, _) in bounds.items()}
    degrees = {name: found[slice(*bounds[RELATIONS[name][1]])] for name, found in whole.degrees.items()}
    edge_offsets = {name: found[first : last + 1] for name, found in whole.edge_offsets.items()}
    states, nodes, updates = (
        {name: tables[name].first(high - low) for name, (low, high) in bounds.items()}
        for tables in (whole.states, whole.nodes, whole.updates)
    )
    features["ego"], scenes = whole.features["ego"][first:last], whole.scenes.first(last - first)
    return _Scenes(features, offsets, whole.sources, degrees, edge_offsets, scenes, states, nodes, updates)


def _encode_block(weights: _Weights, part: _Scenes, joined_NW: NDArray[np.float32]) -> dict[str, Tensor]:
    """Fill `joined_NW`; return the node states."""
    size = weights.size
    _start(weights, part)
    for layer in weights.layers:
        _apply_layer(layer, part, weights.late)
    scores = [_affine(weights.scores[name], part.nodes[name].rows[:, :size]) for name in NODE_TYPES]
    weight_MG = torch.cat(scores).float().tanh_().mul_(GATE_LIMIT).exp_().numpy()
    joined_NW[:, :size] = part.scenes.array[:, :size]
    end = 0
    for place, name in enumerate(NODE_TYPES, start=1):
        states = part.states[name].array
        first, end = end, end + len(states)
        _kernels().weighted_mean(joined_NW, place * size, states, weight_MG[first:end], part.offsets[name])
    return {"ego": part.scenes.rows[:, :size]} | {name: part.states[name].rows for name in NODE_TYPES}


def _affine(linear: _Linear, rows_MI: Tensor) -> Tensor:
    return torch.addmm(linear.bias_O.to(rows_MI.dtype), rows_MI, linear.weight_IO)


def _start(weights: _Weights, part: _Scenes) -> None:
    """Set the states to relu(W features)."""
    size = weights.size
    ego = _affine(weights.inputs["ego"], part.features["ego"].float())
    part.scenes.rows[:, :size] = ego.relu_()
    for place, name in enumerate(NODE_TYPES, start=1):
        linear, update = weights.inputs[name], part.updates[name]
        torch.mm(part.features[name].to(update.rows.dtype), linear.weight_IO, out=update.rows)
        _kernels().start_states(
            part.states[name].array, part.nodes[name].array, update.array, linear.bias_O.numpy(), part.offsets[name],
            part.scenes.array, place * size,
        )  # fmt: skip


def _apply_layer(layer: _Layer, part: _Scenes, late: Mapping[str, int]) -> None:
    """Run one round of messages."""
    size = len(layer.ego_norm[0])
    ego_NH = part.scenes.rows[:, :size]
    from_ego_NW = _affine(layer.from_ego, ego_NH).numpy()
    ego_update_NH = _affine(layer.to_ego, part.scenes.rows)
    for relation, place in late.items():
        source, target = RELATIONS[relation]
        _neighbour_mean(part, relation, part.states[source].array, part.nodes[target].array, place * size)
    for name in NODE_TYPES:
        torch.mm(part.nodes[name].rows, layer.nodes_WH[name], out=part.updates[name].rows)
    for relation, weight_HH in layer.early_HH.items():
        source, target = RELATIONS[relation]
        sent = _array(torch.mm(part.nodes[source].rows[:, :size], weight_HH))
        _neighbour_mean(part, relation, sent, part.updates[target].array, ADD)
    for place, name in enumerate(NODE_TYPES):
        _kernels().finish_layer(
            part.states[name].array, part.nodes[name].array, part.updates[name].array, from_ego_NW, place * size,
            part.offsets[name], *layer.norms[name], part.scenes.array, (1 + place) * size,
        )  # fmt: skip
    scale_H, shift_H, epsilon = layer.ego_norm
    ego_NH += layer_norm(ego_update_NH, (size,), scale_H, shift_H, epsilon).relu_()


def _neighbour_mean(
    part: _Scenes, relation: str, sent_MH: NDArray[Any], out_MW: NDArray[Any], column: int
) -> None:
    source, target = RELATIONS[relation]
    _kernels().neighbour_mean(
        out_MW, column, sent_MH, part.sources[relation], part.degrees[relation], part.edge_offsets[relation],
        part.offsets[source], part.offsets[target],
    )  # fmt: skip
