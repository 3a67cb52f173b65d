"""Train Graph-RAE on scene pools.

`train` is what the loop calls. Everything is deterministic given the seed: initial weights, the sample of
scenes, batch order, views and masks each have their own generator.

Shape legend: N scenes, D embedding size, P pairs, R responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoscale_ray.config import RepresentationConfig
from autoscale_ray.errors import PoolError
from autoscale_ray.representation import objectives
from autoscale_ray.representation.decoder import NUM_CELLS
from autoscale_ray.representation.distance import (
    ScenarioDistance,
    Signature,
    fit_scenario_distance,
    scenario_signature,
    select_signature,
)
from autoscale_ray.representation.encoder import Encoding
from autoscale_ray.representation.model import GraphRae, feature_sizes_of, new_model, pool_batches
from autoscale_ray.representation.rasters import bev_rasters, sector_counts
from autoscale_ray.representation.scene_graph import (
    RELATIONS,
    SceneGraph,
    global_edges,
    graph_from_batch,
    join_graphs,
    select_scenes,
)
from autoscale_ray.representation.views import (
    draw_node_masks,
    half_a_second_later,
    masked_graph,
    semantic_view,
)
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.pool import ScenePool
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.sample import sampled_rows

WARMUP_SHARE = 0.05
WEIGHT_DECAY = 1e-4
MAX_GRADIENT_NORM = 5.0
PAIR_SHARE = 0.125
"""Share of a batch given to perturbed scenes, with as many places for their sources, where pairs are compared."""


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Scenes held in memory as one graph, with what the objective compares."""

    graph: SceneGraph
    signature: Signature
    source_N: Tensor
    """Row of the real source of a perturbed scene, -1 without one (int64)."""
    log_N: Tensor
    """Number of the log of each scene (int64)."""
    responses_NR: Tensor | None = None
    """Sub-scores of a frozen planner, NaN where unknown."""
    later: SceneGraph | None = None
    """The same scenes half a second later, where the term `time_shift` is on."""

    def to(self, device: torch.device | str) -> TrainingSet:
        """Return the scenes with every tensor on `device`."""
        return TrainingSet(
            self.graph.to(device),
            {name: table.to(device) for name, table in self.signature.items()},
            self.source_N.to(device),
            self.log_N.to(device),
            None if self.responses_NR is None else self.responses_NR.to(device),
            None if self.later is None else self.later.to(device),
        )


def training_set(
    batches: Iterable[SceneBatch],
    source_N: np.ndarray | None = None,
    log_N: np.ndarray | None = None,
    responses_NR: np.ndarray | None = None,
    *,
    use_future: bool = True,
    with_later: bool = False,
) -> TrainingSet:
    """Turn batches into a training set.

    Args:
        batches: Scenes, at least one.
        source_N: Row of each scene's source, -1 without one; None for no pairs.
        log_N: Log of each scene; None where every scene has one of its own.
        responses_NR: Sub-scores of a frozen planner, NaN where unknown.
        use_future: See `scene_graph.graph_from_batch`.
        with_later: Also build the graphs half a second later.
    """
    graphs, later = [], []
    for batch in batches:
        graphs.append(graph_from_batch(batch, use_future=use_future))
        if with_later:
            later.append(graph_from_batch(half_a_second_later(batch), use_future=use_future))
    graph = join_graphs(graphs)
    source = np.full(len(graph), -1, np.int64) if source_N is None else np.asarray(source_N, np.int64)
    _, log = np.unique(np.arange(len(graph)) if log_N is None else log_N, return_inverse=True)
    responses = None if responses_NR is None else torch.as_tensor(responses_NR, dtype=torch.float32)
    return TrainingSet(
        graph,
        scenario_signature(graph),
        torch.from_numpy(source),
        torch.from_numpy(log),
        responses,
        join_graphs(later) if with_later else None,
    )


def train(
    pools: Sequence[ScenePool],
    config: RepresentationConfig,
    seed: int,
    report: Callable[[int, dict[str, float]], None] | None = None,
    device: str = "cpu",
) -> GraphRae:
    """Train the autoencoder on the scenes of the training pools.

    Args:
        pools: Real and synthetic training pools; never dev or test.
        config: Sizes, steps and weights of the terms.
        seed: Root of every random stream.
        report: Called with the step number and the value of every term.
        device: Holds scenes and model while they are trained.

    Returns:
        The trained model, in evaluation mode, on the CPU.

    Raises:
        PoolError: There is no scene to train on.
    """
    return fit(pools_training_set(pools, config, seed), config, seed, report, device)


def pools_training_set(pools: Sequence[ScenePool], config: RepresentationConfig, seed: int) -> TrainingSet:
    """Return the scenes of the training pools that `train` trains on, everything or a seeded sample.

    Raises:
        PoolError: There is no scene to train on.
    """
    if sum(len(pool) for pool in pools) == 0:
        raise PoolError("representation", "training needs at least one scene", 0)
    rows = sampled_rows([len(pool) for pool in pools], config.max_training_scenes, seed)
    source_N = _source_rows(pools, rows)
    log_N = np.concatenate([pool.log_ids[chosen] for pool, chosen in zip(pools, rows, strict=True)])
    batches = (
        batch for pool, chosen in zip(pools, rows, strict=True) for batch in pool_batches(pool, chosen)
    )
    with_later = config.loss.time_shift > 0
    return training_set(batches, source_N, log_N, use_future=config.use_future, with_later=with_later)


def _source_rows(pools: Sequence[ScenePool], rows: Sequence[np.ndarray]) -> np.ndarray:
    ids = np.concatenate([pool.scene_ids[chosen] for pool, chosen in zip(pools, rows, strict=True)])
    origins = np.concatenate([pool.origin_ids[chosen] for pool, chosen in zip(pools, rows, strict=True)])
    row_by_id = {scene_id: row for row, scene_id in enumerate(ids)}
    return np.array([row_by_id.get(origin, -1) if origin else -1 for origin in origins], dtype=np.int64)


def fit(
    scenes: TrainingSet,
    config: RepresentationConfig,
    seed: int,
    report: Callable[[int, dict[str, float]], None] | None = None,
    device: str = "cpu",
) -> GraphRae:
    """Train the autoencoder on a training set; see `train`.

    Args:
        scenes: At least one scene.
        config: Sizes, steps and weights of the terms.
        seed: Root of every random stream.
        report: Called with the step number and the value of every term.
        device: Holds scenes and model while they are trained; every draw is made on the CPU, alike for all.
    """
    draws = draw_batches(scenes.source_N, config, torch.Generator().manual_seed(seed + 1))
    scenes = scenes.to(device)
    state = new_state(scenes, config, seed)
    distance = fit_scenario_distance(scenes.signature, dataclasses.asdict(config.distance), seed)
    generator = torch.Generator().manual_seed(seed)
    state.model.train()
    for step in range(config.num_steps):
        rows, copies = next(draws)
        terms = batch_terms(state.model, take_scenes(scenes, rows.to(device)), copies, distance, generator)
        state.optimizer.zero_grad(set_to_none=True)
        weighted_sum(terms, config).backward()
        state = make_step(state, config)
        if report is not None:
            report(step, {name: float(value.detach()) for name, value in terms.items()})
    return state.model.cpu().eval()


@dataclass(frozen=True, slots=True)
class EncoderState:
    """A model in training: enough to go on to the same bits."""

    step: int
    """Optimiser steps done."""
    model: GraphRae
    optimizer: torch.optim.AdamW


def new_state(scenes: TrainingSet, config: RepresentationConfig, seed: int) -> EncoderState:
    """Return the state before the first step, on the device of the scenes."""
    num_responses = 0 if scenes.responses_NR is None else scenes.responses_NR.shape[1]
    model = new_model(config, feature_sizes_of(scenes.graph), seed, num_responses).to(scenes.source_N.device)
    settings = {"lr": config.learning_rate, "weight_decay": WEIGHT_DECAY, "fused": True}
    return EncoderState(0, model, torch.optim.AdamW(model.parameters(), **settings))


def make_step(state: EncoderState, config: RepresentationConfig) -> EncoderState:
    """Make one optimiser step with the gradients at hand."""
    nn.utils.clip_grad_norm_(list(state.model.parameters()), MAX_GRADIENT_NORM)
    for settings in state.optimizer.param_groups:
        settings["lr"] = config.learning_rate * learning_rate_factor(state.step, config.num_steps)
    state.optimizer.step()
    return dataclasses.replace(state, step=state.step + 1)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return the learning rate factor: linear warm-up, then half a cosine to 0."""
    warmup = max(1, int(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + np.cos(np.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))


def draw_batches(
    source_N: Tensor, config: RepresentationConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, int]]:
    """Yield rows of a batch and how many of them are copies.

    The rows are an epoch-wise shuffle of everything. Where the objective has the term `pairs`, the first k rows are
    perturbed scenes and the next k their sources.
    """
    size, copies_C = config.batch_size, torch.nonzero(source_N >= 0).flatten()
    num_copies = min(int(size * PAIR_SHARE), len(copies_C)) if config.loss.pairs > 0 else 0
    order, place = torch.randperm(len(source_N), generator=generator), 0
    while True:
        chosen = copies_C[torch.randint(max(len(copies_C), 1), (num_copies,), generator=generator)]
        num_rest = size - 2 * num_copies
        while len(order) - place < num_rest:
            order = torch.cat([order[place:], torch.randperm(len(source_N), generator=generator)])
            place = 0
        yield torch.cat([chosen, source_N[chosen], order[place : place + num_rest]]), num_copies
        place += num_rest


def take_scenes(scenes: TrainingSet, rows: Tensor) -> TrainingSet:
    """Return a batch of the training set."""
    responses = None if scenes.responses_NR is None else scenes.responses_NR[rows]
    return TrainingSet(
        select_scenes(scenes.graph, rows),
        select_signature(scenes.signature, rows),
        scenes.source_N[rows],
        scenes.log_N[rows],
        responses,
        None if scenes.later is None else select_scenes(scenes.later, rows),
    )


def weighted_sum(terms: Mapping[str, Tensor], config: RepresentationConfig) -> Tensor:
    """Add up the terms with the weights of the configuration."""
    weights = dataclasses.asdict(config.loss)
    return sum((weights[name] * value for name, value in terms.items()), torch.zeros(()))


def batch_terms(
    model: GraphRae,
    scenes: TrainingSet,
    num_copies: int,
    distance: ScenarioDistance,
    generator: torch.Generator,
    encoding: Encoding | None = None,
) -> dict[str, Tensor]:
    """Compute every term of the objective that has a weight.

    Args:
        model: In training mode.
        scenes: One batch: first the perturbed scenes, then as many sources, then the rest.
        num_copies: Number of perturbed scenes with their source.
        distance: The fitted scenario distance.
        generator: Source of views, masks and negatives.
        encoding: What the encoder says of the batch, where that was computed elsewhere.

    Returns:
        Scalars by name of the weight in `EmbeddingLossConfig`.
    """
    weights = dataclasses.asdict(model.config.loss)
    encoded = model.encoder(scenes.graph) if encoding is None else encoding
    z_ND = encoded.z_ND
    delta_NN = torch.zeros(0, 0)
    if any(weights[name] for name in ("metric", "neighbours", "pairs", "laplacian")):
        delta_NN = distance(scenes.signature, scenes.signature)
    copies = torch.arange(num_copies, device=z_ND.device)
    makers: dict[str, Callable[[], Tensor]] = {
        "decoder": lambda: _decoder_term(model, scenes.graph, z_ND),
        "masked": lambda: _masked_term(model, scenes.graph, generator),
        "relation": lambda: _relation_term(model, scenes.graph, encoded.nodes, generator),
        "contrastive": lambda: objectives.contrastive_loss(
            z_ND, model.encoder(semantic_view(scenes.graph, generator)).z_ND
        ),
        "metric": lambda: objectives.metric_loss(z_ND, delta_NN),
        "neighbours": lambda: objectives.neighbour_loss(z_ND, delta_NN, scenes.log_N),
        "pairs": lambda: objectives.pair_loss(
            z_ND, copies + num_copies, copies, delta_NN[copies, copies + num_copies]
        ),
        "variance": lambda: objectives.variance_loss(z_ND),
        "norm": lambda: z_ND.square().sum(1).mean(),
        "laplacian": lambda: objectives.laplacian_loss(z_ND, delta_NN),
    }
    later = scenes.later
    if later is not None:
        makers["time_shift"] = lambda: objectives.contrastive_loss(z_ND, model.encoder(later).z_ND)
    response_head, responses_NR = model.decoder.responses, scenes.responses_NR
    if response_head is not None and responses_NR is not None:
        makers["response"] = lambda: objectives.response_loss(response_head(z_ND), responses_NR)
    return {name: make() for name, make in makers.items() if weights[name] > 0}


def _decoder_term(model: GraphRae, graph: SceneGraph, z_ND: Tensor) -> Tensor:
    return objectives.scene_loss(
        model.decoder.scene(z_ND),
        bev_rasters(graph, NUM_CELLS),
        graph.targets["ego.drive"],
        graph.targets["ego.drive_valid"],
        sector_counts(graph),
    )


def _masked_term(model: GraphRae, graph: SceneGraph, generator: torch.Generator) -> Tensor:
    masks = draw_node_masks(graph, generator)
    encoding = model.encoder(masked_graph(graph, masks, dict(model.decoder.mask_tokens.items())))
    total = torch.zeros(())
    for name, mask in masks.items():
        z_MD = encoding.z_ND[row_of(graph.offsets[name])[mask]]
        found = model.decoder.node(name, encoding.nodes[name][mask], z_MD)
        total = total + objectives.masked_loss(found, graph.features[name][mask])
    return total / len(masks)


def _relation_term(
    model: GraphRae, graph: SceneGraph, nodes: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    total = torch.zeros(())
    for relation, (source, target) in RELATIONS.items():
        positive, negative = (
            model.decoder.relation(relation, nodes[source][pairs[:, 0]], nodes[target][pairs[:, 1]])
            for pairs in (global_edges(graph, relation), drawn_non_edges(graph, relation, generator))
        )
        total = total + objectives.relation_loss(positive, negative)
    return total / len(RELATIONS)


def drawn_non_edges(graph: SceneGraph, relation: str, generator: torch.Generator) -> Tensor:
    """Draw pairs of nodes that are no edges: for each edge another source for its target, of the same scene.

    Telling scenes apart would be too easy. Draws that are edges themselves are left out.

    Args:
        graph: N scenes.
        relation: A key of RELATIONS.
        generator: Source of the draws.

    Returns:
        Int64 (E, 2), batch-wide, at most as many as there are edges.
    """
    edges = global_edges(graph, relation)
    source, target = RELATIONS[relation]
    owner = row_of(graph.edge_offsets[relation])
    count = graph.offsets[source].diff()[owner]
    share = torch.rand(len(owner), generator=generator).to(owner.device)
    drawn = torch.stack([graph.offsets[source][owner] + (share * count).long(), edges[:, 1]], dim=1)
    num_targets = graph.offsets[target][-1]
    is_edge = torch.isin(*(pairs[:, 0] * num_targets + pairs[:, 1] for pairs in (drawn, edges)))
    return drawn[~is_edge]
