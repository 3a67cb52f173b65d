"""Scene embeddings that Graph-RAE is compared with; those on graphs see what it sees, none sees a label or a tag.

Shape legend: N scenes, M agents, D embedding size, F descriptor size, R raster cells along one side.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoscale_ray.config import RepresentationConfig
from autoscale_ray.representation import features, objectives
from autoscale_ray.representation.decoder import NUM_CELLS
from autoscale_ray.representation.distance import fit_scenario_distance
from autoscale_ray.representation.encoder import GraphEncoder
from autoscale_ray.representation.kinematics import relative_motion, route_ahead, route_coordinates, route_of
from autoscale_ray.representation.model import feature_sizes_of, new_model
from autoscale_ray.representation.rasters import bev_rasters
from autoscale_ray.representation.scene_graph import (
    NODE_TYPES,
    RELATIONS,
    SceneGraph,
    global_edges,
    select_scenes,
)
from autoscale_ray.representation.segments import cut_lanes
from autoscale_ray.representation.training import (
    WEIGHT_DECAY,
    EncoderState,
    TrainingSet,
    batch_terms,
    draw_batches,
    make_step,
    take_scenes,
    weighted_sum,
)
from autoscale_ray.representation.views import semantic_view
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, DRIVING_COMMANDS, NUM_PLAN_FRAMES

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import VGAE, SAGEConv, TransformerConv

Float64 = NDArray[np.float64]
Embedded = tuple[Float64, ...]
"""Embeddings of the training, the test and the held scenes."""
Encode = Callable[[SceneGraph], Tensor]
"""A trained embedding."""
SIDES_M = ((-1.75, 1.75), (1.75, 6.0), (-6.0, -1.75), (6.0, 25.0), (-25.0, -6.0))
"""Corridors beside the route: own, left, right, far left, far right."""
VULNERABLE = ("pedestrian", "bicycle")


def hand_descriptor(batch: SceneBatch) -> Tensor:
    """Describe a scene as an engineer would: own motion, route, nearest others by corridor, lights, lanes.

    Args:
        batch: N scenes.

    Returns:
        Float32 (N, F).
    """
    scene = features.scene_geometry(batch, cut_lanes(batch))
    return torch.cat(
        [_own_motion(batch), _route_shape(batch), _others(batch, scene), _map_and_lights(batch, scene)], 1
    )


def descriptor_with_future(batch: SceneBatch) -> Tensor:
    """Return `hand_descriptor` with the ego's position and speed 1, 2, 3 and 4 s ahead, float32 (N, F + 12)."""
    ahead = batch.ego_states_NT7[:, CURRENT_FRAME + 2 : CURRENT_FRAME + 1 + NUM_PLAN_FRAMES : 2]
    return torch.cat([hand_descriptor(batch), ahead[..., [0, 1, 3]].flatten(1)], dim=1)


def _own_motion(batch: SceneBatch) -> Tensor:
    states = batch.ego_states_NT7
    now, before = states[:, CURRENT_FRAME], states[:, CURRENT_FRAME - 3]
    turn = torch.atan2((now[:, 2] - before[:, 2]).sin(), (now[:, 2] - before[:, 2]).cos())
    command = torch.nn.functional.one_hot(batch.command_N, len(DRIVING_COMMANDS)).float()
    limit = batch.route_speed_limit_N.nan_to_num(nan=14.0)
    single = [
        now[:, 3],
        now[:, 3] - before[:, 3],
        now[:, 5],
        now[:, 6],
        turn,
        limit,
        now[:, 3] / limit.clamp(min=1),
    ]
    return torch.cat([torch.stack(single, dim=1), command], dim=1)


def _route_shape(batch: SceneBatch) -> Tensor:
    route = route_of(batch)
    ahead = route_ahead(route, (10.0, 20.0, 40.0))
    here = route_coordinates(torch.zeros(len(batch), 2), torch.arange(len(batch)), route)
    return torch.cat([here[:, 1:], ahead[..., 1], ahead[..., 2] - here[:, 2:]], dim=1)


def _others(batch: SceneBatch, scene: features.SceneGeometry) -> Tensor:
    kept = torch.nonzero(scene.near["agent"]).flatten()
    owner, place = scene.owner["agent"][kept], scene.place["agent"][kept]
    now, kind = batch.agent_states_AT5[kept, CURRENT_FRAME], batch.agent_type_A[kept]
    ego = torch.zeros_like(now)
    ego[:, 3] = batch.ego_states_NT7[owner, CURRENT_FRAME, 3]
    motion = relative_motion(ego, now)
    vulnerable = torch.stack([kind == AGENT_TYPES.index(name) for name in VULNERABLE]).sum(0).float()
    vehicle = (kind == AGENT_TYPES.index("vehicle")).float()
    moving = (now[:, 3:5].norm(dim=1) > 0.5).float()
    across = (now[:, 3:5].norm(dim=1) * (now[:, 2] - place[:, 2]).sin().abs()) / 10
    columns = [motion[:, 4], motion[:, 5], motion[:, 4] * vehicle * moving, motion[:, 4] * vehicle * (1 - moving),
               motion[:, 4] * vulnerable, motion[:, 4] * (1 - vehicle - vulnerable), across * motion[:, 4]]  # fmt: skip
    for low, high in SIDES_M:
        inside = ((place[:, 1] > low) & (place[:, 1] <= high)).float()
        for ahead in (place[:, 0] > 0, place[:, 0] <= 0):
            nearness = torch.exp(-place[:, 0].abs() / 20) * inside * ahead
            columns += [
                nearness,
                nearness * (motion[:, 2]).clamp(min=0),
                nearness * (-motion[:, 2]).clamp(min=0),
            ]
    table = torch.stack(columns, dim=1)
    largest = torch.zeros(len(batch), table.shape[1])
    largest = largest.scatter_reduce(0, owner[:, None].expand_as(table), table, "amax")
    counts = torch.zeros(len(batch), 3).index_add(0, owner, torch.stack([vehicle, vulnerable, moving], dim=1))
    return torch.cat([largest, torch.log1p(counts)], dim=1)


def _map_and_lights(batch: SceneBatch, scene: features.SceneGeometry) -> Tensor:
    place, owner = scene.place["control"], scene.owner["control"]
    red = batch.polygon_red_QT[scene.controls_B, CURRENT_FRAME].float()
    nearness = torch.exp(-place[:, 0].abs() / 20) * (place[:, 0] > -5)
    table = torch.stack([nearness * red, nearness * (1 - red)], dim=1)
    lights = torch.zeros(len(batch), 2).scatter_reduce(0, owner[:, None].expand_as(table), table, "amax")
    near_lane = scene.near["lane"]
    lane_owner, lane_place = scene.owner["lane"][near_lane], scene.place["lane"][near_lane]
    turn = (_heading(scene.segments.points_G32[near_lane]) - lane_place[:, 2]).cos()
    kinds = torch.stack([(turn > 0.7).float(), (turn.abs() <= 0.7).float(), (turn < -0.7).float()], dim=1)
    lanes = torch.zeros(len(batch), 3).index_add(0, lane_owner, kinds)
    return torch.cat([lights, torch.log1p(lanes)], dim=1)


def _heading(points_G32: Tensor) -> Tensor:
    return torch.atan2(points_G32[:, 2, 1] - points_G32[:, 0, 1], points_G32[:, 2, 0] - points_G32[:, 0, 0])


def fit_principal_components(train_NF: Float64, size: int) -> tuple[Float64, Float64, Float64]:
    """Fit standardisation and PCA; return mean, scale and components (F, size)."""
    mean, scale = train_NF.mean(0), train_NF.std(0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    _, _, directions = np.linalg.svd((train_NF - mean) / scale, full_matrices=False)
    return mean, scale, directions[:size].T


def classical_scaling(distance_NN: Float64, size: int) -> Float64:
    """Return points (N, size) whose distances are those given, as far as that many axes allow."""
    squared = np.asarray(distance_NN, dtype=np.float64) ** 2
    centred = squared - squared.mean(0) - squared.mean(1, keepdims=True) + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    return vectors[:, -size:] * np.sqrt(values[-size:].clip(min=0))


def raster_autoencoder(train: SceneGraph, config: RepresentationConfig, seed: int) -> Encode:
    """Train a convolutional autoencoder on the bird's-eye rasters and return its bottleneck."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(
            nn.Conv2d(4, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(512, config.embedding_size),
        )  # fmt: skip
        decoder = nn.Sequential(
            nn.Linear(config.embedding_size, 256), nn.ReLU(), nn.Linear(256, 4 * NUM_CELLS**2)
        )

    def images(graph: SceneGraph) -> Tensor:
        return bev_rasters(graph, NUM_CELLS).unflatten(2, (NUM_CELLS, NUM_CELLS))

    def cost(graph: SceneGraph, generator: torch.Generator) -> Tensor:
        raster = images(graph)
        found = decoder(encoder(raster)).reshape(raster.shape)
        weight = raster.new_tensor(5.0)
        filled = nn.functional.binary_cross_entropy_with_logits(found[:, 0], raster[:, 0], pos_weight=weight)
        lanes = nn.functional.binary_cross_entropy_with_logits(found[:, 3], raster[:, 3], pos_weight=weight)
        return filled + lanes + (found[:, 1:3] - raster[:, 1:3]).square().mean() * 10

    _optimise(nn.ModuleList([encoder, decoder]), cost, train, config, seed)
    return lambda graph: encoder(images(graph))


class _HomogeneousEncoder(nn.Module):
    """Two SAGE layers over agents, lanes and controls as one graph; mean and log deviation of every node."""

    def __init__(self, feature_sizes: dict[str, int], size: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict({name: nn.Linear(width, size) for name, width in feature_sizes.items()})
        self.hidden = SAGEConv(size, size)
        self.mean, self.log_deviation = SAGEConv(size, size), SAGEConv(size, size)

    def forward(self, graph: SceneGraph) -> tuple[Tensor, Tensor]:
        nodes, edges, _ = homogeneous(
            graph, {name: layer(graph.features[name]) for name, layer in self.inputs.items()}
        )
        hidden = torch.relu(self.hidden(torch.relu(nodes), edges))
        return self.mean(hidden, edges), self.log_deviation(hidden, edges)


def homogeneous(graph: SceneGraph, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay all nodes end to end; return node table, edge index and the scene of every node.

    Args:
        graph: N scenes.
        tables: One table of equal width by node type.
    """
    names = ("ego", *NODE_TYPES)
    start: dict[str, int] = dict(
        zip(names, np.cumsum([0, *(len(tables[name]) for name in names[:-1])]).tolist(), strict=True)
    )
    owner = {"ego": torch.arange(len(graph)), **{name: row_of(graph.offsets[name]) for name in NODE_TYPES}}
    parts = []
    for relation, (source, target) in RELATIONS.items():
        parts.append(global_edges(graph, relation) + torch.tensor([start[source], start[target]]))
    for name in NODE_TYPES:
        own = torch.arange(len(owner[name])) + start[name]
        parts += [torch.stack([owner[name], own], dim=1), torch.stack([own, owner[name]], dim=1)]
    return (
        torch.cat([tables[name] for name in names]),
        torch.cat(parts).T,
        torch.cat([owner[name] for name in names]),
    )


def graph_vgae(train: SceneGraph, config: RepresentationConfig, seed: int) -> Encode:
    """Train PyG's variational graph autoencoder on the edges and return the mean over the nodes of a scene."""
    sizes = {name: table.shape[1] for name, table in train.features.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VGAE(_HomogeneousEncoder(sizes, config.embedding_size))

    def cost(graph: SceneGraph, generator: torch.Generator) -> Tensor:
        mean, log_deviation = model.encoder(graph)
        noise = torch.randn(mean.shape, generator=generator)
        z = mean + noise * log_deviation.clamp(max=2).exp()
        _, edges, _ = homogeneous(graph, {name: graph.features[name][:, :1] for name in graph.features})
        other = torch.randint(len(z), edges.shape, generator=generator)
        return model.recon_loss(z, edges, other) + model.kl_loss(mean, log_deviation.clamp(max=2)) / len(z)

    def pooled(graph: SceneGraph) -> Tensor:
        mean, _ = model.encoder(graph)
        _, _, owner = homogeneous(graph, {name: graph.features[name][:, :1] for name in graph.features})
        total = torch.zeros(len(graph), mean.shape[1]).index_add(0, owner, mean)
        return total / torch.bincount(owner, minlength=len(graph))[:, None]

    _optimise(model, cost, train, config, seed)
    return pooled


def vicreg(train: SceneGraph, config: RepresentationConfig, seed: int) -> Encode:
    """Train our encoder with VICReg alone: 25 invariance + 25 variance + 1 covariance over two views."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = GraphEncoder({name: table.shape[1] for name, table in train.features.items()},
                               config.hidden_size, config.embedding_size, config.num_layers)  # fmt: skip

    def cost(graph: SceneGraph, generator: torch.Generator) -> Tensor:
        first, second = (encoder(semantic_view(graph, generator)).z_ND for _ in range(2))
        spread = objectives.variance_loss(first) + objectives.variance_loss(second)
        return 25 * (first - second).square().mean() + 25 * spread

    _optimise(encoder, cost, train, config, seed)
    return lambda graph: encoder(graph).z_ND


class TransformerLayer(nn.Module):
    """Attention in place of the mean over a relation; has the call of SAGEConv."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = TransformerConv((size, size), size // 4, heads=4, root_weight=False)

    def forward(self, states: tuple[Tensor, Tensor], edges: Tensor) -> Tensor:
        return self.layer(states, edges)


def transformer_rival(encoder: GraphEncoder, size: int) -> GraphEncoder:
    """Put TransformerConv in place of every mean aggregation of an encoder."""
    for layer in encoder.layers:
        assert isinstance(layer.relations, nn.ModuleDict)
        layer.relations = nn.ModuleDict({name: TransformerLayer(size) for name in layer.relations})
    return encoder


def with_attention(scenes: TrainingSet, config: RepresentationConfig, seed: int) -> Encode:
    """Train Graph-RAE with attention in place of mean aggregation: objective, draws and schedule of `training.fit`."""
    model = new_model(config, feature_sizes_of(scenes.graph), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer_rival(model.encoder, config.hidden_size)
    distance = fit_scenario_distance(scenes.signature, dataclasses.asdict(config.distance), seed)
    state = EncoderState(0, model, torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY))
    draws = draw_batches(scenes.source_N, config, torch.Generator().manual_seed(seed + 1))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.num_steps):
        rows, copies = next(draws)
        batch = take_scenes(scenes, rows)
        terms = batch_terms(
            model, batch, copies, distance, generator, encoding=model.encoder(batch.graph, "pyg")
        )
        state.optimizer.zero_grad()
        weighted_sum(terms, config).backward()
        state = make_step(state, config)
    return lambda graph: model.encoder(graph, "pyg").z_ND


def _optimise(
    model: nn.Module,
    cost: Callable[[SceneGraph, torch.Generator], Tensor],
    graph: SceneGraph,
    config: RepresentationConfig,
    seed: int,
) -> None:
    """Minimise a cost with the steps, batch size and learning rate of Graph-RAE."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.num_steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.num_steps):
        rows = torch.randint(len(graph), (config.batch_size,), generator=generator)
        value = cost(select_scenes(graph, rows), generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def embedded(encode: Encode, graph: SceneGraph, size: int = 1024) -> Float64:
    """Return the embeddings of all scenes."""
    rows = torch.arange(len(graph)).split(size)
    return torch.cat([encode(select_scenes(graph, part)) for part in rows]).double().numpy()
