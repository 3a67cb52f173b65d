"""Optimiser steps that workers of one process group share; no Ray in it.

*Deterministic*: the four logical shards of a step (planning/training.py) are dealt out to the workers; each computes
the gradients of its own, all gather all, and every worker makes the same optimiser step on the same sum: 1, 2 and 4
workers end with the same bits.

*Plain*: DistributedDataParallel averages the gradients of the workers' parts of the same batch. Faster for planners
whose gradients are too large to be kept four times over; the last bits depend on the number of workers.

Shape legend: V logical shards (4), W weights of the model, B places of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.features import Features
from autoscale_ray.planning.objectives import Examples, make_examples, planning_loss
from autoscale_ray.planning.order import NUM_SHARDS, drawn_places, shard_places
from autoscale_ray.planning.planner import Planner, empty_planner, set_weights
from autoscale_ray.planning.training import (
    OCCUPANCY_EVERY,
    OCCUPANCY_SHARE,
    PlannerWeights,
    TrainState,
    apply_gradients,
    check_trainable,
    finished,
    new_state,
    one_thread,
    shard_gradients,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands in its group."""

    rank: int = 0
    num_workers: int = 1
    device: str = "cpu"


def train_shared(
    features: Features,
    rows: np.ndarray,
    config: PlannerConfig,
    seed: int,
    place: Place,
    *,
    start: TrainState | None = None,
    on_step: Callable[[TrainState], None] = lambda state: None,
) -> PlannerWeights:
    """Train a planner together with the other workers: `planning.training.train`, to the same bits on CPU.

    Args:
        features: Scenes to choose from, the same on every worker; each reads only what its own shards draw.
        rows: int64 rows to train on.
        config: The planner and its training; `deterministic` says which way steps are shared.
        seed: Training seed.
        place: This worker among 1 to 4.
        start: A state to go on from.
        on_step: Called after every step, on every worker, with the state on this worker's device.
    """
    check_trainable(config, len(rows))
    mine = shards_of(place.rank, place.num_workers)
    state = moved(new_state(config, seed) if start is None else start.copy(), place.device)
    steps = range(state.step, config.num_steps)
    drawn = drawn_places(seed, steps, config.batch_size, len(rows), mine)
    examples = make_examples(features, torch.as_tensor(rows), config, torch.from_numpy(drawn))
    examples = moved(examples, place.device)
    # One shard at a time on a GPU, whose libraries choose their kernels by the number of products in a batch.
    together = len(mine) if config.deterministic and place.device == "cpu" else 1
    planner = empty_planner(config, together)
    set_weights(planner, state.weights_W)
    share = _deterministic_step if config.deterministic else _plain_step(planner, place)
    with one_thread():
        for step in steps:
            places_VB = np.searchsorted(drawn, worker_places(seed, step, config.batch_size, len(rows), place))
            gradients_VW = share(planner, examples, torch.from_numpy(places_VB).to(place.device), step, place)
            apply_gradients(state, gradients_VW, config)
            on_step(state)
    return finished(config, moved(state, "cpu"))


def worker_places(seed: int, step: int, batch_size: int, num_scenes: int, place: Place) -> np.ndarray:
    """Return the places in the scene list that a worker's own shards hold in a step, (shards, B)."""
    return shard_places(seed, step, batch_size, num_scenes)[shards_of(place.rank, place.num_workers)]


def shards_of(rank: int, num_workers: int) -> list[int]:
    """Return the logical shards of a worker: consecutive, as even as they go."""
    return list(range(rank * NUM_SHARDS // num_workers, (rank + 1) * NUM_SHARDS // num_workers))


def gather_shards(mine: Tensor, num_workers: int) -> Tensor:
    """Return one row for every logical shard in shard order, on every worker, from each worker's own rows."""
    if num_workers == 1:
        return mine
    longest = max(len(shards_of(rank, num_workers)) for rank in range(num_workers))
    sent = mine.new_zeros(longest, *mine.shape[1:])
    sent[: len(mine)] = mine
    received = [torch.empty_like(sent) for _ in range(num_workers)]
    torch.distributed.all_gather(received, sent)
    return torch.cat([part[: len(shards_of(rank, num_workers))] for rank, part in enumerate(received)])


T = TypeVar("T", Examples, TrainState)
Share = Callable[[Planner, Examples, Tensor, int, Place], Tensor]
"""Computes the gradients to sum: of all logical shards, or already averaged as one."""


def _deterministic_step(
    planner: Planner, examples: Examples, places_VB: Tensor, step: int, place: Place
) -> Tensor:
    parts = places_VB.split(planner.num_shards)
    gradients = [shard_gradients(planner, examples.shards(part_VB), step)[0] for part_VB in parts]
    return gather_shards(torch.cat(gradients), place.num_workers)


def _plain_step(planner: Planner, place: Place) -> Share:
    # Most steps draw no occupancy, so its head is often unused.
    wrapped = (
        DistributedDataParallel(planner, find_unused_parameters=True) if place.num_workers > 1 else planner
    )

    def share(planner: Planner, examples: Examples, places_VB: Tensor, step: int, place: Place) -> Tensor:
        config = planner.config
        draws = config.occupancy_weight > 0 and step % OCCUPANCY_EVERY == 0
        num_drawn = math.ceil(places_VB.shape[1] * OCCUPANCY_SHARE) if draws else 0
        # The scenes whose occupancy is drawn are those of the logical shards; they must come first.
        parts = (places_VB[:, :num_drawn].flatten(), places_VB[:, num_drawn:].flatten())
        batch = examples.shards(torch.cat(parts)[None])
        output = wrapped(batch.ego_NF, batch.agents_NKF, batch.lanes_NKF, num_drawn * len(places_VB))
        loss_V, _ = planning_loss(output, batch, OCCUPANCY_EVERY * config.occupancy_weight)
        planner.zero_grad(set_to_none=True)
        # DDP takes the plain mean over workers; with 3 of them one has two shards and counts twice.
        (loss_V.sum() * len(places_VB) * place.num_workers / NUM_SHARDS).backward()
        return torch.cat([_gradient(weight).flatten(1) for weight in planner.parameters()], 1)

    return share


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def moved(values: T, device: str) -> T:
    """Return a record with every tensor on a device."""
    found = {field.name: getattr(values, field.name) for field in fields(values)}
    return replace(values, **{name: t.to(device) for name, t in found.items() if isinstance(t, Tensor)})
