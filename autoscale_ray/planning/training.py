"""Training the planner: a fixed number of optimiser steps, the same bits on one worker or four.

A step's batch is V = 4 logical shards. Each shard's gradient is computed for itself and the four are summed
in shard order, so it does not matter which worker computed which. AdamW runs on one flat vector of all
weights:

    g = (g_0 + g_1 + g_2 + g_3) / 4,      g <- g min(1, G / |g|)
    m <- b1 m + (1 - b1) g,               v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

with lr rising over the first 5 % of the steps and then falling along a cosine; over the last 30 % of the
steps the weights are averaged, a <- ema a + (1 - ema) w, and the average is what drives.

Shape legend: N scenes, W weights of the model, V logical shards (4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.config import PlannerConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.planning.features import Features
from autoscale_ray.planning.layers import NUM_HEADS
from autoscale_ray.planning.objectives import Examples, make_examples, planning_loss
from autoscale_ray.planning.order import NUM_SHARDS, drawn_places, shard_places
from autoscale_ray.planning.planner import (
    Planner,
    empty_planner,
    initial_weights,
    parameter_shapes,
    set_weights,
)

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8
MAX_GRADIENT_NORM = 5.0
WARMUP_SHARE = 0.05
AVERAGED_SHARE = 0.3
OCCUPANCY_SHARE, OCCUPANCY_EVERY = 1 / 4, 4
"""Every fourth step draws the occupancy of a quarter of each shard: on every step the head would cost as much
as half of everything else. Its weight counts four times there."""


@dataclass(slots=True)
class TrainState:
    """Where a training run stands: enough to go on to the same bits. A step changes it in place."""

    step: int
    """Optimiser steps done."""
    weights_W: Tensor
    first_moment_W: Tensor
    second_moment_W: Tensor
    average_W: Tensor
    """Average of the weights since the averaging began; before that not defined."""

    def copy(self) -> TrainState:
        """Return a state that shares no memory with this one."""
        tensors = [getattr(self, field.name).clone() for field in fields(self) if field.name != "step"]
        return TrainState(self.step, *tensors)


@dataclass(frozen=True, slots=True)
class PlannerWeights:
    """A trained planner."""

    config: PlannerConfig
    model: Mapping[str, Tensor]
    """Last weights by parameter name."""
    average: Mapping[str, Tensor]
    """Averaged weights by parameter name; these drive."""


def train(
    features: Features,
    rows: np.ndarray,
    config: PlannerConfig,
    seed: int,
    *,
    start: TrainState | None = None,
    on_step: Callable[[TrainState, Tensor], None] | None = None,
) -> PlannerWeights:
    """Train a planner for `config.num_steps` steps, however many scenes there are.

    Args:
        features: Scenes to choose from; only those that a step draws are read.
        rows: int64 rows of the scenes to train on, real and synthetic alike; at least one.
        config: The planner and its training.
        seed: Seed of initial weights and sample order, >= 0.
        start: A state of the same run to go on from; not changed.
        on_step: Called after every step with the state (copy or save it to keep it) and the losses (4,)
            total, mode, imitation, occupancy. May raise to stop the run.

    Returns:
        The trained planner; the same bits for the same arguments, with or without a stop in between.

    Raises:
        ConfigError: Batch size or width do not fit the shards or heads, or there is nothing to train on.
    """
    check_trainable(config, len(rows))
    planner = empty_planner(config, NUM_SHARDS)
    state = new_state(config, seed) if start is None else start.copy()
    steps = range(state.step, config.num_steps)
    drawn = drawn_places(seed, steps, config.batch_size, len(rows))
    examples = make_examples(features, torch.as_tensor(rows), config, torch.from_numpy(drawn))
    set_weights(planner, state.weights_W)
    buffer_VW = state.weights_W.new_empty(NUM_SHARDS, len(state.weights_W))
    with one_thread():
        for step in steps:
            places_VB = np.searchsorted(drawn, shard_places(seed, step, config.batch_size, len(rows)))
            losses = train_step(planner, state, examples.shards(torch.from_numpy(places_VB)), buffer_VW)
            if on_step is not None:
                on_step(state, losses)
    return finished(config, state)


def check_trainable(config: PlannerConfig, num_rows: int) -> None:
    """Refuse a configuration that cannot be trained, with `ConfigError`."""
    if config.batch_size % NUM_SHARDS:
        raise ConfigError("planner.batch_size", f"must be a multiple of {NUM_SHARDS}", config.batch_size)
    if config.hidden_size % NUM_HEADS:
        raise ConfigError("planner.hidden_size", f"must be a multiple of {NUM_HEADS}", config.hidden_size)
    if num_rows < 1:
        raise ConfigError("planner training", "needs at least one scene", num_rows)


def new_state(config: PlannerConfig, seed: int) -> TrainState:
    """Return the state before the first step."""
    weights_W = initial_weights(config, seed)
    return TrainState(0, weights_W, *(torch.zeros_like(weights_W) for _ in range(3)))


def train_step(
    planner: Planner, state: TrainState, shards: Examples, buffer_VW: Tensor | None = None
) -> Tensor:
    """Make one optimiser step with all shards in this process.

    Workers that share the shards do the same in two parts: `shard_gradients` of their own, `apply_gradients`
        of all.

    Args:
        planner: Planner of V shards whose weights are views of the state's.
        state: Where the run stands; moved on by one step.
        shards: The V logical shards of this step, in order.
        buffer_VW: Memory for the gradients.

    Returns:
        losses (4,): total, mode, imitation, occupancy (NaN where it was not drawn), mean over the shards.
    """
    gradients_VW, losses_4V = shard_gradients(planner, shards, state.step, buffer_VW)
    apply_gradients(state, gradients_VW, planner.config)
    return losses_4V.mean(1)


def shard_gradients(
    planner: Planner, shards: Examples, step: int, out_VW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of every shard's mean loss.

    Args:
        planner: Planner of as many shards.
        shards: Examples with fields (V, B, ...), any V >= 1; a shard's bits do not depend on the others.
        step: Optimiser steps done so far.
        out_VW: Memory for the gradients; new memory costs a sixth of a step in page faults.

    Returns:
        gradients_VW and losses_4V (total, mode, imitation, occupancy).
    """
    draws = planner.config.occupancy_weight > 0 and step % OCCUPANCY_EVERY == 0
    num_drawn = math.ceil(shards.ego_NF.shape[1] * OCCUPANCY_SHARE) if draws else 0
    output = planner(shards.ego_NF, shards.agents_NKF, shards.lanes_NKF, num_drawn)
    loss_V, parts_3V = planning_loss(output, shards, OCCUPANCY_EVERY * planner.config.occupancy_weight)
    gradients = torch.autograd.grad(
        loss_V.sum(), list(planner.parameters()), allow_unused=not draws, materialize_grads=not draws
    )
    gradients_VW = torch.cat([gradient.flatten(1) for gradient in gradients], 1, out=out_VW)
    return gradients_VW, torch.cat([loss_V.detach()[None], parts_3V])


def apply_gradients(state: TrainState, gradients_VW: Tensor, config: PlannerConfig) -> None:
    """Sum the shards' gradients in shard order and make one AdamW step.

    Args:
        state: Where the run stands; moved on by one step.
        gradients_VW: Gradient of every logical shard, in shard order; used up.
        config: Learning rate, decay, number of steps.
    """
    gradient_W = gradients_VW[0]
    for other_W in gradients_VW[1:]:
        gradient_W += other_W
    gradient_W /= len(gradients_VW)
    gradient_W *= min(1.0, MAX_GRADIENT_NORM / max(float(gradient_W.norm()), MAX_GRADIENT_NORM))
    state.first_moment_W.lerp_(gradient_W, 1 - FIRST_DECAY)
    state.second_moment_W.mul_(SECOND_DECAY).addcmul_(gradient_W, gradient_W, value=1 - SECOND_DECAY)
    rate = learning_rate(state.step, config)
    state.step += 1
    scale_W = torch.sqrt(state.second_moment_W, out=gradient_W)
    scale_W /= math.sqrt(1 - SECOND_DECAY**state.step)
    scale_W += EPSILON
    state.weights_W *= 1 - rate * config.weight_decay
    state.weights_W.addcdiv_(state.first_moment_W, scale_W, value=-rate / (1 - FIRST_DECAY**state.step))
    _average(state, config)


def learning_rate(step: int, config: PlannerConfig) -> float:
    """Return the learning rate of step `step`: a linear rise over 5 % of the steps, then a cosine to 0."""
    num_warmup = max(1, round(WARMUP_SHARE * config.num_steps))
    rise = min(1.0, (step + 1) / num_warmup)
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def _average(state: TrainState, config: PlannerConfig) -> None:
    first_averaged = max(1, config.num_steps - int(AVERAGED_SHARE * config.num_steps))
    if state.step == first_averaged:
        state.average_W.copy_(state.weights_W)
    elif state.step > first_averaged:
        state.average_W.lerp_(state.weights_W, 1 - config.ema_decay)


def finished(config: PlannerConfig, state: TrainState) -> PlannerWeights:
    """Return the planner that a state holds; an untrained one is its own average."""
    average_W = state.average_W if state.step else state.weights_W
    return PlannerWeights(config, _named(config, state.weights_W), _named(config, average_W))


def _named(config: PlannerConfig, weights_W: Tensor) -> dict[str, Tensor]:
    shapes = parameter_shapes(empty_planner(config, 1))
    flats = weights_W.split([shape.numel() for shape in shapes.values()])
    return {name: flat.view(shape).clone() for (name, shape), flat in zip(shapes.items(), flats, strict=True)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: with more, sums are cut differently and the last bits move."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
