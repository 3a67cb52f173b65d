"""What can be refused before anything is started."""

from __future__ import annotations

from autoscale_ray.config import PlannerConfig, RunConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.mixture import METHODS
from autoscale_ray.mixture.similarity import require_faiss

STOPPABLE = ("response", "fused")
"""Methods that explore around the optimum that the rule for an early stop compares with."""


def check_ready(config: RunConfig) -> None:
    """Refuse what would fail late or do nothing: an unknown mixture method, a planner that cannot be found or lacks
    what the method reads, a loss on responses, no faiss.

    Raises:
        ConfigError: Unknown method or planner, a method that needs gradients with a planner that has none, an early
            stop of a method that it cannot judge, a warm start of a planner that is not the built-in one, or a weight
            of the response loss above 0.
        MissingExtraError: faiss is not installed.
    """
    if config.ascent.method not in METHODS:
        raise ConfigError("ascent.method", f"must be one of {', '.join(METHODS)}", config.ascent.method)
    response = config.representation.loss.response
    if response > 0:
        rule = "must be 0: a run has no responses before its first round"
        raise ConfigError("representation.loss.response", rule, response)
    if config.loop.stop_early and config.ascent.method not in STOPPABLE:
        rule = f"must be one of {', '.join(STOPPABLE)} with loop.stop_early, which asks their response curves"
        raise ConfigError("ascent.method", rule, config.ascent.method)
    if config.planner.factory != PlannerConfig().factory:
        _check_planner(config)
    require_faiss()


def _check_planner(config: RunConfig) -> None:
    # Imported here: torch is no use to a process that only starts a run and follows it.
    from autoscale_ray.planning.spec import load_planner_spec

    spec = load_planner_spec(config.planner.factory, config.planner)
    if METHODS[config.ascent.method].reads_gradients and spec.gradient is None:
        raise ConfigError(
            "ascent.method",
            f"needs gradients, which {config.planner.factory} does not offer",
            config.ascent.method,
        )
    if config.loop.warm_start:
        raise ConfigError("loop.warm_start", "is there for the built-in planner only", config.planner.factory)
