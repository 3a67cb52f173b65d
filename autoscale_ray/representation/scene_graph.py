"""The scene graph: flat node features by type, edges by relation, and what the decoders must reconstruct.

A graph keeps its edges scene-local, one number an edge, so scenes can be cut out and joined without touching them; the
kernels of `fused` read them as they are.

Shape legend: N scenes, M nodes of one type, F features, E edges of one relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.representation import features
from autoscale_ray.representation.segments import cut_lanes, segment_links
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.graph import with_neighbours
from autoscale_ray.scenes.ragged import offsets_of, row_of, runs_of

NODE_TYPES = ("agent", "lane", "control")
"""Ragged node types; the ego is one node for each scene."""
RELATIONS = {
    "agent_agent": ("agent", "agent"),
    "lane_agent": ("lane", "agent"),
    "lane_lane": ("lane", "lane"),
    "control_lane": ("control", "lane"),
}
"""Relation -> (source type, target type)."""


@dataclass(frozen=True, slots=True)
class SceneGraph:
    """N scenes as node and edge tables."""

    features: dict[str, Tensor]
    """Encoder input by node type (ego: one row for each scene), float32 (M, F)."""
    offsets: dict[str, Tensor]
    """First node of each scene by ragged node type, int64, N+1."""
    sources: dict[str, Tensor]
    """By relation, int32 (E): scene-local source of each edge, edges ordered by scene, then target."""
    degrees: dict[str, Tensor]
    """Edges of each target node by relation, int32 (M)."""
    edge_offsets: dict[str, Tensor]
    """First edge of each scene by relation, int64, N+1."""
    targets: dict[str, Tensor]
    """What decoders reconstruct, never encoder input; rows follow the node type before the dot (`ego.drive`)."""

    def __len__(self) -> int:
        return len(self.features["ego"])

    def to(self, device: torch.device | str) -> SceneGraph:
        """Return the graph with every tensor on `device`."""
        groups = (self.features, self.offsets, self.sources, self.degrees, self.edge_offsets, self.targets)
        return SceneGraph(*({name: tensor.to(device) for name, tensor in group.items()} for group in groups))


def graph_from_batch(batch: SceneBatch, *, use_future: bool = True) -> SceneGraph:
    """Build the scene graph of a batch.

    Args:
        batch: N scenes; its stored neighbour tables give the agent edges and are computed where they are absent.
        use_future: Add the logged future of ego and agents as extra feature columns (selection is offline, so it
            is there for every training and dev scene).

    Returns:
        A graph of objects within `features.RADIUS_M` of the ego.
    """
    batch = batch if batch.agent_neighbours_A8 is not None else with_neighbours(batch)
    scene = features.scene_geometry(batch, cut_lanes(batch))
    kept = {name: torch.nonzero(near).flatten() for name, near in scene.near.items()}
    owners = {name: scene.owner[name][index] for name, index in kept.items()}
    offsets = {
        name: offsets_of(torch.bincount(owner, minlength=len(batch))) for name, owner in owners.items()
    }
    pairs = _pairs(batch, scene)
    parts = [
        _edge_tables(_ranked(pairs[relation], kept[source], kept[target]), offsets[source], offsets[target])
        for relation, (source, target) in RELATIONS.items()
    ]
    sources, degrees, edge_offsets = (
        dict(zip(RELATIONS, tables, strict=True)) for tables in zip(*parts, strict=True)
    )
    node_features = features.node_features(batch, scene, kept, pairs, use_future=use_future)
    found = features.targets(batch, scene, kept)
    return SceneGraph(node_features, offsets, sources, degrees, edge_offsets, found)


def _pairs(batch: SceneBatch, scene: features.SceneGeometry) -> dict[str, Tensor]:
    """Return (source, target) pairs of every relation, as batch-wide candidates, where both ends are nodes.

    Those of lanes have the kind of the link as a third column.
    """
    found = {
        "agent_agent": features.agent_pairs(batch),
        "lane_agent": features.agent_segment_pairs(batch, scene),
        "lane_lane": segment_links(batch, scene.segments),
        "control_lane": features.control_segment_pairs(batch, scene),
    }
    return {
        relation: found[relation][
            scene.near[source][found[relation][:, 0]] & scene.near[target][found[relation][:, 1]]
        ]
        for relation, (source, target) in RELATIONS.items()
    }


def _ranked(pairs: Tensor, kept_source: Tensor, kept_target: Tensor) -> Tensor:
    """Return the pairs as node numbers, each once, ordered by target, then source."""
    source = torch.searchsorted(kept_source, pairs[:, 0].contiguous())
    target = torch.searchsorted(kept_target, pairs[:, 1].contiguous())
    size = len(kept_source) + 1
    ordered = torch.unique(target * size + source)
    return torch.stack([ordered % size, ordered // size], dim=1)


def _edge_tables(edges_E2: Tensor, starts_N1: Tensor, targets_N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `sources`, `degrees` and `edge_offsets` of edges between batch-wide nodes, ordered by target.

    Args:
        edges_E2: Source and target, int64.
        starts_N1: First source node of each scene.
        targets_N1: First target node of each scene.
    """
    degree_M = torch.bincount(edges_E2[:, 1], minlength=int(targets_N1[-1]))
    edge_offsets = offsets_of(degree_M)[targets_N1]
    source_E = edges_E2[:, 0] - starts_N1[row_of(edge_offsets)]
    return source_E.to(torch.int32), degree_M.to(torch.int32), edge_offsets


def select_scenes(graph: SceneGraph, rows: Tensor) -> SceneGraph:
    """Return the scenes `rows` of a graph, in that order; repeats are allowed.

    A run of consecutive rows is cut out as views; any other order costs one copy per table.

    Args:
        graph: N scenes.
        rows: Int64 scene numbers.
    """
    runs = runs_of(rows)
    take, offsets, sources, degrees, edge_offsets = {"ego": runs.scene}, {}, {}, {}, {}
    for name, found in graph.offsets.items():
        take[name], offsets[name] = runs.group(found)
    for relation, found in graph.edge_offsets.items():
        take_edges, edge_offsets[relation] = runs.long_group(found)
        sources[relation] = take_edges(graph.sources[relation])
        degrees[relation] = take[RELATIONS[relation][1]](graph.degrees[relation])
    node_features = {name: take[name](table) for name, table in graph.features.items()}
    targets = {key: take[key.split(".")[0]](table) for key, table in graph.targets.items()}
    return SceneGraph(node_features, offsets, sources, degrees, edge_offsets, targets)


def join_graphs(graphs: Sequence[SceneGraph]) -> SceneGraph:
    """Lay graphs end to end.

    Args:
        graphs: At least one graph, all built with the same features.
    """

    def joined(tables: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}

    def chained(tables: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: offsets_of(torch.cat([table[name].diff() for table in tables])) for name in tables[0]}

    return SceneGraph(
        joined([graph.features for graph in graphs]),
        chained([graph.offsets for graph in graphs]),
        joined([graph.sources for graph in graphs]),
        joined([graph.degrees for graph in graphs]),
        chained([graph.edge_offsets for graph in graphs]),
        joined([graph.targets for graph in graphs]),
    )


def drop_nodes(graph: SceneGraph, keep: dict[str, Tensor]) -> SceneGraph:
    """Remove nodes and the edges that touch them.

    Args:
        graph: N scenes.
        keep: By ragged node type, bool, one entry for each node; types left out stay whole.
    """
    keep = {
        name: keep.get(name, graph.features[name].new_ones(len(graph.features[name]), dtype=torch.bool))
        for name in NODE_TYPES
    }
    owner = {name: row_of(found) for name, found in graph.offsets.items()}
    offsets = {
        name: offsets_of(torch.bincount(owner[name][keep[name]], minlength=len(graph))) for name in NODE_TYPES
    }
    rank = {name: keep[name].long().cumsum(0) - 1 for name in NODE_TYPES}
    sources, degrees, edge_offsets = {}, {}, {}
    for relation, (source, target) in RELATIONS.items():
        from_E, to_E = global_edges(graph, relation).unbind(1)
        kept_E = keep[source][from_E] & keep[target][to_E]
        edges_E2 = torch.stack([rank[source][from_E[kept_E]], rank[target][to_E[kept_E]]], dim=1)
        sources[relation], degrees[relation], edge_offsets[relation] = _edge_tables(
            edges_E2, offsets[source], offsets[target]
        )
    masks = {**keep, "ego": graph.features["ego"].new_ones(len(graph), dtype=torch.bool)}
    node_features = {name: table[masks[name]] for name, table in graph.features.items()}
    targets = {key: table[masks[key.split(".")[0]]] for key, table in graph.targets.items()}
    return SceneGraph(node_features, offsets, sources, degrees, edge_offsets, targets)


def global_sources(graph: SceneGraph, relation: str) -> Tensor:
    """Return the batch-wide source node of every edge of a relation, int32 (E)."""
    starts_N = graph.offsets[RELATIONS[relation][0]][:-1].to(torch.int32)
    counts_N, local_E = graph.edge_offsets[relation].diff(), graph.sources[relation]
    if local_E.device.type == "cpu":  # NumPy repeats seven times as fast
        start_E = torch.from_numpy(np.repeat(starts_N.numpy(), counts_N.numpy()))
    else:
        start_E = starts_N.repeat_interleave(counts_N, output_size=len(local_E))
    return start_E.add_(local_E)


def global_edges(graph: SceneGraph, relation: str) -> Tensor:
    """Return edges with batch-wide node numbers.

    Args:
        graph: N scenes.
        relation: A key of RELATIONS.

    Returns:
        Int64 (E, 2): source and target.
    """
    target_E = row_of(offsets_of(graph.degrees[relation]))
    return torch.stack([global_sources(graph, relation).long(), target_E], dim=1)
