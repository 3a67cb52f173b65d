"""The encoder: message passing over the scene graph, attention pooling by node type, one embedding per scene.

The modules are PyG layers. `GraphEncoder` runs them as they are (`path="pyg"`) or by segment sums on the flat tables
(`path="fast"`, same weights, same result within 1e-5 in float32), which is what makes a CPU fast enough.

Shape legend: N scenes, M nodes of one type, H hidden size, E edges, D embedding size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from autoscale_ray.representation import fused
from autoscale_ray.representation.scene_graph import (
    NODE_TYPES,
    RELATIONS,
    SceneGraph,
    global_edges,
    global_sources,
    select_scenes,
)
from autoscale_ray.scenes.ragged import offsets_of, row_of

# torch_geometric scripts a class at import, which torch 2.13 calls deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import SAGEConv
    from torch_geometric.nn.aggr import AttentionalAggregation, MeanAggregation

NUM_POOL_HEADS = 4
BLOCK = 128
"""Scenes that `GraphEncoder.embed` takes at a time."""

Path = Literal["fast", "pyg"]


@dataclass(frozen=True, slots=True)
class Wiring:
    """Edges and owners of a batch, computed once and used by every layer."""

    sources: dict[str, Tensor]
    """Source nodes of each relation ordered by target, int32 (E); the fast path's."""
    source_offsets: dict[str, Tensor]
    """First edge of each target node, int32 (M + 1); the fast path's."""
    edge_index: dict[str, Tensor]
    """The same edges as PyG wants them, int64 (2, E); the pyg path's."""
    owner: dict[str, Tensor]
    """Scene of each node, int64."""
    offsets: dict[str, Tensor]


def wiring_of(graph: SceneGraph, path: Path) -> Wiring:
    """Prepare the edges of a graph for message passing.

    Args:
        graph: N scenes.
        path: Who passes the messages.
    """
    sources, source_offsets, edge_index = {}, {}, {}
    for relation in RELATIONS:
        if path == "pyg":
            edge_index[relation] = global_edges(graph, relation).T
        else:
            sources[relation] = global_sources(graph, relation)
            source_offsets[relation] = offsets_of(graph.degrees[relation]).to(torch.int32)
    owner = {name: row_of(offsets) for name, offsets in graph.offsets.items()}
    return Wiring(sources, source_offsets, edge_index, owner, graph.offsets)


def bag_mean(states_MH: Tensor, index_E: Tensor, offsets: Tensor, mode: str = "mean") -> Tensor:
    """Average (or sum) rows of a table over consecutive runs of an index; empty runs give 0.

    Args:
        states_MH: Table.
        index_E: Rows to take, int32 or int64.
        offsets: First index of each run, R + 1, of the same type.
        mode: `mean` or `sum`.

    Returns:
        (R, H).
    """
    if len(states_MH) == 0:
        return states_MH.new_zeros(len(offsets) - 1, states_MH.shape[1])
    return embedding_bag(index_E, states_MH, offsets, mode=mode, include_last_offset=True)


class _HeadGate(nn.Module):
    """Bounded attention scores, one per head, repeated over the columns of the head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.score = nn.Linear(size, NUM_POOL_HEADS)
        self.repeat = size // NUM_POOL_HEADS

    def forward(self, states_MH: Tensor) -> Tensor:
        scores = fused.GATE_LIMIT * torch.tanh(self.score(states_MH))
        return scores.repeat_interleave(self.repeat, dim=1)


class AttentionPool(nn.Module):
    """Pool the nodes of a scene with learned weights: sum_i softmax_i(gate_h(x_i)) x_i[h], for each head h.

    Every head weighs its own quarter of the state; the layers after the pool mix the quarters.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool = AttentionalAggregation(gate_nn=_HeadGate(size))

    def forward(self, states_MH: Tensor, owner_M: Tensor, offsets: Tensor, path: Path) -> Tensor:
        """Return one row for each scene; a scene without nodes gives 0."""
        if path == "pyg":
            return self.pool(states_MH, owner_M, dim_size=len(offsets) - 1)
        gate = cast(_HeadGate, self.pool.gate_nn)
        weight_M4 = (fused.GATE_LIMIT * torch.tanh(gate.score(states_MH))).exp()
        weighted = (states_MH.unflatten(1, (NUM_POOL_HEADS, -1)) * weight_M4[:, :, None]).flatten(1)
        rows = torch.arange(len(owner_M), device=owner_M.device)
        top = bag_mean(weighted, rows, offsets, mode="sum").unflatten(1, (NUM_POOL_HEADS, -1))
        bottom = bag_mean(weight_M4, rows, offsets, mode="sum")
        # The same 1e-16 as PyG's softmax, which also makes the empty scene 0 / 1e-16 = 0.
        return (top / (bottom[:, :, None] + 1e-16)).flatten(1)


class GraphLayer(nn.Module):
    """One round of messages: x' = x + relu(norm(W x + sum_r W_r mean_r(x_neighbours) + W_e x_ego)).

    Mean aggregation for each relation (GraphSAGE, arXiv 1706.02216, without the root term, which is W).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.own = nn.ModuleDict({name: nn.Linear(size, size) for name in (*NODE_TYPES, "ego")})
        self.from_ego = nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name in NODE_TYPES})
        self.to_ego = nn.ModuleDict({name: nn.Linear(size, size, bias=False) for name in NODE_TYPES})
        self.relations = nn.ModuleDict(
            {
                name: SAGEConv((size, size), size, aggr="mean", root_weight=False, bias=False)
                for name in RELATIONS
            }
        )
        self.norms = nn.ModuleDict({name: nn.LayerNorm(size) for name in (*NODE_TYPES, "ego")})
        self.mean = MeanAggregation()

    def forward(self, states: Mapping[str, Tensor], wiring: Wiring, path: Path) -> dict[str, Tensor]:
        """Return the next node states by type."""
        update = {name: self.own[name](table) for name, table in states.items()}
        for name in NODE_TYPES:
            update[name] += self.from_ego[name](states["ego"]).index_select(0, wiring.owner[name])
            to_ego = cast(nn.Linear, self.to_ego[name])
            _accumulate(update["ego"], self._scene_mean(states[name], wiring, name, path), to_ego.weight)
        for relation, (source, target) in RELATIONS.items():
            layer = self.relations[relation]
            if path == "pyg":
                update[target] += layer((states[source], states[target]), wiring.edge_index[relation])
            else:
                self._send(relation, states[source], update[target], wiring)
        return {name: states[name] + torch.relu_(self.norms[name](table)) for name, table in update.items()}

    def _send(self, relation: str, states_MH: Tensor, total_MH: Tensor, wiring: Wiring) -> None:
        """Add W_r mean(x) = mean(W_r x) in place, with the product on the side that has fewer nodes."""
        weight_HH = cast(SAGEConv, self.relations[relation]).lin_l.weight
        index, offsets = wiring.sources[relation], wiring.source_offsets[relation]
        if len(states_MH) < len(total_MH):
            total_MH += bag_mean(torch.nn.functional.linear(states_MH, weight_HH), index, offsets)
        else:
            _accumulate(total_MH, bag_mean(states_MH, index, offsets), weight_HH)

    def _scene_mean(self, states_MH: Tensor, wiring: Wiring, name: str, path: Path) -> Tensor:
        offsets = wiring.offsets[name]
        if path == "pyg":
            return self.mean(states_MH, wiring.owner[name], dim_size=len(offsets) - 1)
        return bag_mean(states_MH, torch.arange(len(states_MH), device=states_MH.device), offsets)


def _accumulate(total_MH: Tensor, states_MG: Tensor, weight_HG: Tensor) -> None:
    """Add a linear layer's output in place: one product, no temporary table of the size of the nodes."""
    if torch.is_autocast_enabled(total_MH.device.type):  # autocast does not cover in-place products
        total_MH += torch.nn.functional.linear(states_MG, weight_HG)
    else:
        total_MH.addmm_(states_MG, weight_HG.T)


@dataclass(frozen=True, slots=True)
class Encoding:
    """Node states and the pooled embedding."""

    nodes: dict[str, Tensor]
    """By node type, (M, H), in the type of the products."""
    z_ND: Tensor


class GraphEncoder(nn.Module):
    """Scene graph -> z in R^D (docs/graph_rae.md, encoder)."""

    def __init__(
        self, feature_sizes: Mapping[str, int], hidden_size: int, embedding_size: int, num_layers: int
    ):
        super().__init__()
        self.inputs = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(size, hidden_size), nn.ReLU())
                for name, size in feature_sizes.items()
            }
        )
        self.layers = nn.ModuleList(GraphLayer(hidden_size) for _ in range(num_layers))
        self.pools = nn.ModuleDict({name: AttentionPool(hidden_size) for name in NODE_TYPES})
        self.head = nn.Sequential(
            nn.Linear(hidden_size * (1 + len(NODE_TYPES)), 2 * hidden_size),
            nn.ReLU(),
            nn.Linear(2 * hidden_size, embedding_size),
        )

    def forward(self, graph: SceneGraph, path: Path = "fast") -> Encoding:
        """Encode N scenes.

        Args:
            graph: N scenes.
            path: `pyg` runs the PyG layers, `fast` the same arithmetic by segment sums; without gradients on a CPU
                with numba `fast` runs compiled kernels.
        """
        if path == "fast" and fused.applies(graph):
            return self._fused(graph, max(len(graph), 1))
        wiring = wiring_of(graph, path)
        states = {name: self.inputs[name](table) for name, table in graph.features.items()}
        for layer in self.layers:
            states = layer(states, wiring, path)
        pooled = [
            self.pools[name](states[name], wiring.owner[name], wiring.offsets[name], path)
            for name in NODE_TYPES
        ]
        return Encoding(states, self.head(torch.cat([states["ego"], *pooled], dim=1)))

    def embed(self, graph: SceneGraph, path: Path = "fast") -> Tensor:
        """Return the embeddings of N scenes (N, D), a block of scenes at a time, so that a block stays in the cache.

        Args:
            graph: N scenes.
            path: As in `forward`.
        """
        if path == "fast" and fused.applies(graph):
            return self._fused(graph, BLOCK).z_ND
        blocks = torch.arange(len(graph), device=graph.features["ego"].device).split(BLOCK)
        return torch.cat([self(select_scenes(graph, rows), path).z_ND for rows in blocks])

    def _fused(self, graph: SceneGraph, block: int) -> Encoding:
        joined_NW, states = fused.encode(self, graph, block)
        return Encoding(states, self.head(joined_NW.to(cast(nn.Linear, self.head[0]).weight.dtype)))
