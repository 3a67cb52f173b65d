"""The encoder without gradients on a CPU: few matrix products, and compiled kernels between them.

The same arithmetic as `encoder.GraphLayer` and `encoder.AttentionPool` in another order. Nodes of one type lie in one
table: their states and, beside them, the means of their neighbours, so that one product does for all of it. Where a
relation has fewer sources than targets, its weight is applied to the sources instead, and the mean taken of the products.
Egos lie in a table of scenes, beside the mean state of each node type. Weights are brought into this form once a call;
the tables of a block of scenes stay in the cache of a core and are used again by the next block.

Tables and products of nodes have the type of the weights (or of autocast) unless they are few; the rest is float32.

Shape legend: N scenes, M nodes of one type, H hidden size, W = H times (1 + the means beside the states), I inputs and O
outputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from autoscale_ray.representation.scene_graph import NODE_TYPES, RELATIONS, SceneGraph

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


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive scenes of a graph and the tables they are computed in, which may have more rows than they need."""

    features: dict[str, Tensor]
    offsets: dict[str, NDArray[np.int64]]
    """First node of each scene, counted from the block's first."""
    sources: dict[str, NDArray[np.int32]]
    source_offsets: dict[str, NDArray[np.int64]]
    """First edge of each target node, in `sources`."""
    scenes: _Table
    """Float32 (N, 4 H): the ego's state, then the mean state of each ragged node type."""
    nodes: dict[str, _Table]
    """(M, W): the states, then the means of the relations of `_late`."""
    updates: dict[str, _Table]
    """(M, H)."""


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


def encode(encoder: Any, graph: SceneGraph, gate_limit: float, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Encode scenes up to the input of the head.

    Args:
        encoder: The `GraphEncoder`.
        graph: N scenes.
        gate_limit: Bound of the pools' scores.
        size: Scenes taken at a time.

    Returns:
        State of the ego and pooled states, float32 (N, 4 H), and the node states of the last block by type (M, H).
    """
    kinds = _kinds(encoder, graph, size)
    with torch.autocast("cpu", enabled=False):
        weights = _prepared(encoder, graph, kinds)
        tables = _tables(graph, weights, kinds, size)
        joined = torch.zeros(len(graph), weights.size * (1 + len(NODE_TYPES)))
        states = {}
        for first in range(0, len(graph), size):
            last = min(first + size, len(graph))
            states = _encode_block(weights, _cut(graph, tables, first, last), gate_limit, joined[first:last])
    return joined, states


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
    layers = [_prepared_layer(layer, graph, kinds) for layer in encoder.layers]
    return _Weights(inputs, layers, _late(graph), scores, inputs["ego"].weight_IO.shape[1])


def _prepared_layer(layer: Any, graph: SceneGraph, kinds: Mapping[str, torch.dtype]) -> _Layer:
    late, linear = _late(graph), {name: layer.relations[name].lin_l for name in RELATIONS}
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


def _tables(
    graph: SceneGraph, weights: _Weights, kinds: Mapping[str, torch.dtype], size: int
) -> tuple[_Table, dict[str, _Table], dict[str, _Table]]:
    """Return `scenes`, `nodes` and `updates` for the largest block."""
    bounds = [*range(0, len(graph), size), len(graph)]
    nodes, updates = {}, {}
    for name in NODE_TYPES:
        most = int(graph.offsets[name][bounds].diff().max()) if len(graph) else 0
        nodes[name] = _table(most, len(weights.layers[0].nodes_WH[name]), kinds[name])
        updates[name] = _table(most, weights.size, kinds[name])
    scenes = _table(min(size, len(graph)), weights.size * (1 + len(NODE_TYPES)), torch.float32)
    return scenes, nodes, updates


def _cut(
    graph: SceneGraph, tables: tuple[_Table, dict[str, _Table], dict[str, _Table]], first: int, last: int
) -> _Block:
    features, offsets, source_offsets = {"ego": graph.features["ego"][first:last]}, {}, {}
    for name in NODE_TYPES:
        found = graph.offsets[name].numpy()[first : last + 1]
        features[name] = graph.features[name][found[0] : found[-1]]
        offsets[name] = found - found[0]
        for relation, (_, target) in RELATIONS.items():
            if target == name:
                source_offsets[relation] = graph.source_offsets[relation].numpy()[found[0] : found[-1] + 1]
    sources = {relation: graph.sources[relation].numpy() for relation in RELATIONS}
    return _Block(features, offsets, sources, source_offsets, *tables)


def _encode_block(
    weights: _Weights, block: _Block, gate_limit: float, joined_NW: Tensor
) -> dict[str, Tensor]:
    """Fill the rows of `joined_NW`; return the node states."""
    num_scenes, size = len(joined_NW), weights.size
    ego_NH = block.scenes.rows[:num_scenes, :size]
    _start(weights, block, ego_NH)
    for layer in weights.layers:
        _apply_layer(layer, block, ego_NH, weights.late)
    joined_NW[:, :size] = ego_NH
    states = {"ego": ego_NH}
    for place, name in enumerate(NODE_TYPES, start=1):
        states[name] = block.nodes[name].rows[: len(block.features[name]), :size]
        score_MG = (
            _product(states[name], weights.scores[name].weight_IO).float().add_(weights.scores[name].bias_O)
        )
        weight_MG = torch.tanh_(score_MG).mul_(gate_limit).exp_()
        _kernels().weighted_mean(
            joined_NW.numpy(),
            place * size,
            size,
            block.nodes[name].array,
            weight_MG.numpy(),
            block.offsets[name],
        )
    return states


def _product(rows_MI: Tensor, weight_IO: Tensor, out_MO: Tensor | None = None) -> Tensor:
    return torch.mm(rows_MI.to(weight_IO.dtype), weight_IO, out=out_MO)


def _start(weights: _Weights, block: _Block, ego_NH: Tensor) -> None:
    """Set the states to relu(W features)."""
    ego = weights.inputs["ego"]
    ego_NH.copy_(torch.addmm(ego.bias_O, block.features["ego"].float(), ego.weight_IO).relu_())
    for place, name in enumerate(NODE_TYPES, start=1):
        features, linear, update = block.features[name], weights.inputs[name], block.updates[name]
        _product(features, linear.weight_IO, update.rows[: len(features)])
        _kernels().start_states(
            block.nodes[name].array, update.array, linear.bias_O.numpy(), block.offsets[name],
            block.scenes.array, place * weights.size,
        )  # fmt: skip


def _apply_layer(layer: _Layer, block: _Block, ego_NH: Tensor, late: Mapping[str, int]) -> None:
    """Run one round of messages."""
    num_scenes, size = ego_NH.shape
    from_ego_NW = torch.addmm(layer.from_ego.bias_O, ego_NH, layer.from_ego.weight_IO).numpy()
    ego_update_NH = torch.addmm(layer.to_ego.bias_O, block.scenes.rows[:num_scenes], layer.to_ego.weight_IO)
    for relation, place in late.items():
        source, target = RELATIONS[relation]
        _neighbour_mean(
            block, relation, block.nodes[source].array, block.nodes[target].array, place * size, size
        )
    for name in NODE_TYPES:
        num_nodes = len(block.features[name])
        _product(
            block.nodes[name].rows[:num_nodes], layer.nodes_WH[name], block.updates[name].rows[:num_nodes]
        )
    for relation, weight_HH in layer.early_HH.items():
        source, target = RELATIONS[relation]
        states_MH = block.nodes[source].rows[: len(block.features[source]), :size]
        sent = _array(_product(states_MH, weight_HH))
        _neighbour_mean(block, relation, sent, block.updates[target].array, ADD, size)
    for place, name in enumerate(NODE_TYPES):
        _kernels().finish_layer(
            block.nodes[name].array, block.updates[name].array, from_ego_NW, place * size, block.offsets[name],
            *layer.norms[name], block.scenes.array, (1 + place) * size,
        )  # fmt: skip
    scale_H, shift_H, epsilon = layer.ego_norm
    ego_NH += layer_norm(ego_update_NH, (size,), scale_H, shift_H, epsilon).relu_()


def _neighbour_mean(
    block: _Block, relation: str, sent_MW: NDArray[Any], out_MW: NDArray[Any], column: int, size: int
) -> None:
    source, target = RELATIONS[relation]
    _kernels().neighbour_mean(
        out_MW, column, sent_MW, size, block.sources[relation], block.source_offsets[relation],
        block.offsets[source], block.offsets[target],
    )  # fmt: skip
