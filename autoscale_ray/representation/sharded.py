"""Train Graph-RAE with workers that share every step; the same bits on one worker or four.

The objective compares the scenes of a whole batch, so a batch cannot simply be cut. What is cut is the encoder, which
sees one scene at a time. With V = `num_shards` logical shards of consecutive scenes:

    z_v = encoder(shard v),   z = (z_1 .. z_V) gathered on every worker
    g = dL(z)/dz, and the gradients of the decoder, computed alike on every worker
    gradient of the encoder = sum over v, in shard order, of (dz_v/dw)^T g_v

This is the gradient of `training.fit`, in which V = 1, up to rounding.

Shape legend: N scenes of a batch, D embedding size, V logical shards, W weights of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoscale_ray.config import RepresentationConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.representation.distance import fit_scenario_distance
from autoscale_ray.representation.encoder import Encoding
from autoscale_ray.representation.model import GraphRae
from autoscale_ray.representation.scene_graph import select_scenes
from autoscale_ray.representation.training import (
    EncoderState,
    TrainingSet,
    batch_terms,
    draw_batches,
    make_step,
    new_state,
    take_scenes,
    weighted_sum,
)

WHOLE_BATCH_TERMS = ("decoder", "metric", "neighbours", "pairs", "variance", "norm", "laplacian")
"""Terms that need nothing of the encoder but z; the others run it again on changed scenes."""


@dataclass(frozen=True, slots=True)
class Group:
    """The workers that share the steps, seen from one of them."""

    mine: Sequence[int] = ()
    """Logical shards of this worker; all of them when it is alone."""
    gather: Callable[[Tensor], Tensor] = lambda mine: mine
    """Takes one row for each shard of this worker, returns one for each shard of all, in shard order."""


def fit_shared(
    scenes: TrainingSet,
    config: RepresentationConfig,
    seed: int,
    group: Group | None = None,
    *,
    start: Mapping[str, Tensor] | None = None,
    on_step: Callable[[EncoderState], None] = lambda state: None,
    device: str = "cpu",
) -> GraphRae:
    """Train the autoencoder together with the other workers of a group.

    Args:
        scenes: The same on every worker.
        config: Sizes, steps, weights of the terms, and `num_shards`.
        seed: Root of every random stream.
        group: The workers; None for this one alone.
        start: Content of a file of `save_state` to go on from.
        on_step: Called after every step, on every worker, with the state on this worker's device.
        device: Holds scenes and model of this worker while they are trained.

    Returns:
        The trained model, in evaluation mode, on the CPU; the same bits on every worker of every group.

    Raises:
        ConfigError: A term of the objective cannot be shared, or a batch is smaller than the shards are many.
    """
    check_shareable(config)
    group = Group(range(config.num_shards)) if group is None else group
    draws = draw_batches(scenes.source_N, config, torch.Generator().manual_seed(seed + 1))
    scenes = scenes.to(device)
    state = new_state(scenes, config, seed) if start is None else state_from(scenes, config, seed, start)
    distance = fit_scenario_distance(scenes.signature, dataclasses.asdict(config.distance), seed)
    unused = torch.Generator().manual_seed(seed)
    state.model.train()
    for step in range(config.num_steps):
        rows, copies = next(draws)
        if step < state.step:
            continue
        batch = take_scenes(scenes, rows.to(device))
        z_ND, parts = encode_shards(state.model, batch, config.num_shards, group)
        terms = batch_terms(state.model, batch, copies, distance, unused, Encoding({}, z_ND))
        state.optimizer.zero_grad(set_to_none=True)
        weighted_sum(terms, config).backward()
        assert z_ND.grad is not None
        set_encoder_gradient(state.model, z_ND.grad, parts, config.num_shards, group)
        state = make_step(state, config)
        on_step(state)
    return state.model.cpu().eval()


def encode_shards(
    model: GraphRae, batch: TrainingSet, num_shards: int, group: Group
) -> tuple[Tensor, list[Tensor]]:
    """Return z of the whole batch, a leaf of the graph, and z of this worker's shards, with their history."""
    places = torch.arange(len(batch.source_N), device=batch.source_N.device).tensor_split(num_shards)
    parts = [model.encoder(select_scenes(batch.graph, places[shard])).z_ND for shard in group.mine]
    longest = len(places[0])
    sent = torch.stack([nn.functional.pad(z.detach(), (0, 0, 0, longest - len(z))) for z in parts])
    all_VND = group.gather(sent)
    z_ND = torch.cat([part[: len(place)] for part, place in zip(all_VND, places, strict=True)])
    return z_ND.requires_grad_(), parts


def set_encoder_gradient(
    model: GraphRae, gradient_ND: Tensor, parts: Sequence[Tensor], num_shards: int, group: Group
) -> None:
    """Carry dL/dz back through this worker's shards and give the encoder the sum over all, in shard order."""
    weights = list(model.encoder.parameters())
    cut = gradient_ND.tensor_split(num_shards)
    flat = [
        torch.cat([gradient.flatten() for gradient in _gradients(z_ND, weights, cut[shard])])
        for shard, z_ND in zip(group.mine, parts, strict=True)
    ]
    gradients_VW = group.gather(torch.stack(flat))
    total_W = gradients_VW[0].clone()
    for other_W in gradients_VW[1:]:
        total_W += other_W
    sizes = [weight.numel() for weight in weights]
    for weight, gradient in zip(weights, total_W.split(sizes), strict=True):
        weight.grad = gradient.view(weight.shape)


def _gradients(z_ND: Tensor, weights: Sequence[Tensor], gradient_ND: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(z_ND, weights, gradient_ND, allow_unused=True, materialize_grads=True)


def check_shareable(config: RepresentationConfig) -> None:
    """Refuse what cannot be shared, with `ConfigError`."""
    weights = dataclasses.asdict(config.loss)
    alone = [name for name, weight in weights.items() if weight > 0 and name not in WHOLE_BATCH_TERMS]
    if alone:
        rule = f"must be 1 with these terms of the objective, which run the encoder again: {', '.join(alone)}"
        raise ConfigError("representation.num_shards", rule, config.num_shards)
    if config.batch_size < config.num_shards:
        raise ConfigError("representation.batch_size", "must be at least num_shards", config.batch_size)


def save_state(state: EncoderState, path: Path) -> None:
    """Write a state to one file."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    moments = state.optimizer.state_dict()["state"]
    tensors |= {f"moment.{key}.{name}": t for key, item in moments.items() for name, t in item.items()}
    save_file(
        {name: t.detach().cpu().clone() for name, t in tensors.items()}, path, {"step": str(state.step)}
    )


def state_from(
    scenes: TrainingSet, config: RepresentationConfig, seed: int, tensors: Mapping[str, Tensor]
) -> EncoderState:
    """Return the state that `save_state` wrote."""
    state = new_state(scenes, config, seed)
    state.model.load_state_dict(
        {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("moment."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    steps = {int(item["step"]) for item in moments.values()}
    assert len(steps) == 1, "every weight was moved in every step"
    return dataclasses.replace(state, step=steps.pop())
