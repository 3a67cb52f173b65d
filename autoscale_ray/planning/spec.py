"""Bring your own planner: what a planner must offer, and how one is found by a dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.config import PlannerConfig
from autoscale_ray.errors import AutoScaleError, ConfigError
from autoscale_ray.planning.checkpoint import load_weights, save_weights
from autoscale_ray.planning.features import (
    concatenate,
    features_of_pool,
    load_features,
    save_features,
    write_features,
)
from autoscale_ray.planning.gradients import mean_gradient
from autoscale_ray.planning.inference import occupancy_miou, predict
from autoscale_ray.planning.training import train
from autoscale_ray.scenes.pool import ScenePool


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerSpec:
    """A planner as the loop sees it. `Features` and `Weights` are the planner's own types; the loop never
    looks inside.

    Rows are int64 row numbers of the features at hand.
    """

    features: Callable[[ScenePool], Any]
    """``features(pool) -> Features``: computed once per pool; row k belongs to row k of the pool."""
    concatenate: Callable[[Sequence[Any]], Any]
    """``concatenate([real, synthetic]) -> Features``: rows of the first, then rows of the second; every trainer calls
    it with features it has loaded, so one that copies nothing saves memory in each."""
    train: Callable[..., Any]
    """``train(features, rows, seed) -> Weights``: a fixed number of steps, a function of its arguments."""
    predict: Callable[[Any, Any, np.ndarray], np.ndarray]
    """``predict(weights, features, rows)``: float32 (N, 8, 3) rear-axle poses in the scene frame."""
    miou: Callable[[Any, Any, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """``miou(weights, features, rows)``: value in [0, 1] and valid mask per scene; all invalid without it."""
    save_weights: Callable[[Any, Path], None]
    """``save_weights(weights, folder)``."""
    load_weights: Callable[[Path], Any]
    """``load_weights(folder) -> Weights``."""
    save_features: Callable[[Any, Path], None]
    """``save_features(features, folder)``."""
    load_features: Callable[[Path], Any]
    """``load_features(folder) -> Features``."""
    write_features: Callable[[ScenePool, Path], None] | None = None
    """``write_features(pool, folder)``: what ``save_features(features(pool), folder)`` leaves there, without holding a
    whole pool; used in its place where it is given."""
    gradient: Callable[[Any, Any, np.ndarray], np.ndarray] | None = None
    """``gradient(weights, features, rows)``: mean training gradient, flat float32; only methods that read gradient
    alignment ask for it. A very large planner may return a fixed random projection."""


def planner_spec(config: PlannerConfig) -> PlannerSpec:
    """Return the built-in planner for a configuration."""
    return PlannerSpec(
        features=partial(features_of_pool, config=config),
        concatenate=concatenate,
        train=partial(_train, config),
        predict=predict,
        miou=occupancy_miou,
        save_weights=save_weights,
        load_weights=load_weights,
        save_features=save_features,
        load_features=load_features,
        write_features=partial(write_features, config=config),
        gradient=mean_gradient,
    )


def _train(config: PlannerConfig, features: Any, rows: np.ndarray, seed: int, **checkpointing: Any) -> Any:
    return train(features, rows, config, seed, **checkpointing)


def load_planner_spec(path: str, config: PlannerConfig) -> PlannerSpec:
    """Find a planner by its dotted path and configure it.

    Args:
        path: ``package.module:function``; the function takes the configuration and returns a `PlannerSpec`.
        config: Passed to the function.

    Returns:
        The planner.

    Raises:
        ConfigError: Malformed path, no such module or function, or the function fails or returns something
            else than a PlannerSpec.
    """
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError("planner.factory", "must look like package.module:function", path)
    try:
        module = importlib.import_module(module_name)
    # The user's own code may raise anything; it is told in one line, with its cause.
    except Exception as error:
        raise ConfigError("planner.factory", f"cannot import module {module_name}: {error}", path) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise ConfigError("planner.factory", f"module {module_name} has no function {function_name}", path)
    try:
        spec = factory(config)
    except AutoScaleError:
        raise
    except Exception as error:  # as above
        raise ConfigError("planner.factory", f"failed: {type(error).__name__} {error}", path) from error
    if not isinstance(spec, PlannerSpec):
        raise ConfigError("planner.factory", f"{path} must return a PlannerSpec", type(spec).__name__)
    return spec
