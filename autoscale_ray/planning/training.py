"""Training the planner: a fixed number of optimiser steps, the same bits on one worker or four.

A step's batch is V = 4 logical shards. Each shard's gradient is computed for itself and the four are summed
in shard order, so it does not matter which worker computed which. AdamW runs on one flat vector of all
weights:

    g = (g_0 + g_1 + g_2 + g_3) / 4,      g <- g min(1, G / |g|)
    m <- b1 m + (1 - b1) g,               v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

with lr rising over the first 5 % of the steps and then falling along a cosine; over the last 30 % of the
steps the weights are averaged, a <- ema a + (1 - ema) w, and the average is what drives.

Shape legend: N scenes, W weights of the model, V logical shards (4), B scenes of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.config import PlannerConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.planning.features import PlannerFeatures
from autoscale_ray.planning.objectives import planning_loss
from autoscale_ray.planning.order import NUM_SHARDS, shard_places
from autoscale_ray.planning.planner import NUM_HEADS, Planner, new_planner

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8
MAX_GRADIENT_NORM = 5.0
WARMUP_SHARE = 0.05
AVERAGED_SHARE = 0.3
OCCUPANCY_SHARE = 0.5
"""Share of a shard whose occupancy is drawn in training: the head is the dearest part of a step."""

Losses = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a training run stands: enough to go on to the same bits."""

    step: int
    """Optimiser steps done."""
    weights_W: Tensor
    first_moment_W: Tensor
    second_moment_W: Tensor
    average_W: Tensor
    """Average of the weights since the averaging began; before that the initial weights."""


@dataclass(frozen=True, slots=True)
class PlannerWeights:
    """A trained planner."""

    config: PlannerConfig
    model: Mapping[str, Tensor]
    """Last weights by parameter name."""
    average: Mapping[str, Tensor]
    """Averaged weights by parameter name; these drive."""


def train(
    features: PlannerFeatures,
    rows: np.ndarray,
    config: PlannerConfig,
    seed: int,
    *,
    start: TrainState | None = None,
    on_step: Callable[[TrainState, Losses], None] | None = None,
) -> PlannerWeights:
    """Train a planner for `config.num_steps` steps, however many scenes there are.

    Args:
        features: Scenes to choose from.
        rows: int64 rows of the scenes to train on, real and synthetic alike; at least one.
        config: The planner and its training.
        seed: Seed of initial weights and sample order, >= 0.
        start: A state of the same run to go on from.
        on_step: Called after every step with the state and its losses; may save the state or raise to stop.

    Returns:
        The trained planner; the same bits for the same arguments, with or without a stop in between.

    Raises:
        ConfigError: Batch size or width do not fit the shards or heads, or there is nothing to train on.
    """
    check_trainable(config, len(rows))
    rows_N = torch.as_tensor(rows)
    state = start if start is not None else new_state(config, seed)
    planner = new_planner(config, seed)
    with one_thread():
        for step in range(state.step, config.num_steps):
            places_VB = torch.from_numpy(shard_places(seed, step, config.batch_size, len(rows)))
            state, losses = train_step(
                planner, state, [features.take(rows_N[places_B]) for places_B in places_VB]
            )
            if on_step is not None:
                on_step(state, losses)
    return finished(planner, state)


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
    weights_W = torch.cat([weight.detach().flatten() for weight in new_planner(config, seed).parameters()])
    zeros_W = torch.zeros_like(weights_W)
    return TrainState(0, weights_W, zeros_W, zeros_W.clone(), weights_W.clone())


def train_step(
    planner: Planner, state: TrainState, shards: Sequence[PlannerFeatures]
) -> tuple[TrainState, Losses]:
    """Make one optimiser step.

    Args:
        planner: Any planner of the configuration; its weights are overwritten.
        state: Where the run stands; not changed.
        shards: The V logical shards of this step.

    Returns:
        The next state and the mean losses over the shards.
    """
    set_weights(planner, state.weights_W)
    results = [shard_gradient(planner, shard) for shard in shards]
    losses = {name: sum(losses[name] for _, losses in results) / len(results) for name in results[0][1]}
    return apply_gradients(state, [gradient_W for gradient_W, _ in results], planner.config), losses


def set_weights(planner: Planner, weights_W: Tensor) -> None:
    """Let the planner's parameters be views of a flat vector; nothing is copied."""
    sizes = [weight.numel() for weight in planner.parameters()]
    for weight, flat in zip(planner.parameters(), weights_W.split(sizes), strict=True):
        weight.data = flat.view(weight.shape)


def shard_gradient(planner: Planner, shard: PlannerFeatures) -> tuple[Tensor, Losses]:
    """Return the flat gradient (W) of the mean loss over one logical shard, and the losses."""
    drawn = int(len(shard) * OCCUPANCY_SHARE) if planner.config.occupancy_weight > 0 else 0
    loss, parts = planning_loss(planner(shard, drawn), shard, planner.config)
    weights = list(planner.parameters())
    gradients = torch.autograd.grad(loss, weights, allow_unused=drawn == 0, materialize_grads=drawn == 0)
    gradient_W = torch.cat([gradient.flatten() for gradient in gradients])
    return gradient_W, {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}


def apply_gradients(state: TrainState, gradients_VW: Sequence[Tensor], config: PlannerConfig) -> TrainState:
    """Sum the shards' gradients in shard order and make one AdamW step.

    Args:
        state: Where the run stands; not changed.
        gradients_VW: Gradient of every logical shard, in shard order.
        config: Learning rate, decay, number of steps.

    Returns:
        The next state.
    """
    total_W = gradients_VW[0].clone()
    for gradient_W in gradients_VW[1:]:
        total_W += gradient_W
    gradient_W = total_W / len(gradients_VW)
    gradient_W *= (MAX_GRADIENT_NORM / gradient_W.norm().clamp(min=MAX_GRADIENT_NORM)).item()
    first_W = state.first_moment_W.lerp(gradient_W, 1 - FIRST_DECAY)
    second_W = (state.second_moment_W * SECOND_DECAY).addcmul_(gradient_W, gradient_W, value=1 - SECOND_DECAY)
    done = state.step + 1
    rate = learning_rate(state.step, config)
    scale_W = (second_W / (1 - SECOND_DECAY**done)).sqrt_().add_(EPSILON)
    weights_W = state.weights_W * (1 - rate * config.weight_decay)
    weights_W.addcdiv_(first_W, scale_W, value=-rate / (1 - FIRST_DECAY**done))
    average_W = _average(state, weights_W, config)
    return TrainState(done, weights_W, first_W, second_W, average_W)


def learning_rate(step: int, config: PlannerConfig) -> float:
    """Return the learning rate of step `step`: a linear rise over 5 % of the steps, then a cosine to 0."""
    num_warmup = max(1, round(WARMUP_SHARE * config.num_steps))
    rise = min(1.0, (step + 1) / num_warmup)
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def _average(state: TrainState, weights_W: Tensor, config: PlannerConfig) -> Tensor:
    first_averaged = config.num_steps - int(AVERAGED_SHARE * config.num_steps)
    if state.step <= first_averaged:
        return weights_W
    return state.average_W.lerp(weights_W, 1 - config.ema_decay)


def finished(planner: Planner, state: TrainState) -> PlannerWeights:
    """Return the planner that a state holds."""
    return PlannerWeights(planner.config, _named(planner, state.weights_W), _named(planner, state.average_W))


def _named(planner: Planner, weights_W: Tensor) -> dict[str, Tensor]:
    named = dict(planner.named_parameters())
    flats = weights_W.split([weight.numel() for weight in named.values()])
    return {
        name: flat.view(weight.shape).clone()
        for (name, weight), flat in zip(named.items(), flats, strict=True)
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: with more, sums are cut differently and the last bits move."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
