"""Which of our signals stands for which of the peers': losses, priors and the length of a round.

Published rules read losses at every optimiser step of one run; our loop sees one score vector a round. A
round therefore stands for `STEPS_PER_ROUND` published steps with the signal held, at the published step size.

Legend: K clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture.problem import (
    ClusterInfo,
    History,
    Method,
    Observation,
    Weights,
    align_history,
    as_weights,
)

Float64 = NDArray[np.float64]

STEPS_PER_ROUND = 100
"""Published optimiser steps that one round stands for; at 100 the published step sizes move weights by tens
of percent a round for losses that differ by .1, neither frozen nor one-hot."""

PROBE_WEIGHT = 0.5
"""Weight of a cluster while it is probed (Aioli's one-hot factor, published .5 to .625)."""

Rule = Callable[[History, ClusterInfo, Any], Float64]


def method_of(
    propose: Rule,
    final: Rule,
    *,
    num_search_runs: int | None = None,
    reads_gradients: bool = False,
) -> Method:
    """Wrap two rules on arrays as a method on weights keyed by cluster id.

    Args:
        propose: Weights of the next run, any positive scale, in the order of the clusters.
        final: Weights recommended in the end.
        num_search_runs: Runs it can use, None = any.
        reads_gradients: Whether it reads the planner's gradients.
    """

    def keyed(rule: Rule) -> Callable[[History, ClusterInfo, Any], Weights]:
        def weights(history: History, info: ClusterInfo, config: Any) -> Weights:
            return as_weights(on_simplex(rule(align_history(history, info), info, config)), info)

        return weights

    return Method(
        propose=keyed(propose),
        final=keyed(final),
        num_search_runs=num_search_runs,
        reads_gradients=reads_gradients,
    )


def without_runs(rule: Callable[[ClusterInfo], Float64]) -> Method:
    """Wrap weights that need no run."""

    def ignore_history(history: History, info: ClusterInfo, config: Any) -> Float64:
        return rule(info)

    return method_of(ignore_history, ignore_history, num_search_runs=0)


def on_simplex(weights_K: Float64) -> Float64:
    """Scale weights to sum 1; equal weights where all are zero."""
    total = weights_K.sum()
    return weights_K / total if total > 0 else np.full(len(weights_K), 1 / len(weights_K))


def uniform(info: ClusterInfo) -> Float64:
    """Return equal weights."""
    return np.full(len(info.cluster_ids), 1 / len(info.cluster_ids))


def size_prior(info: ClusterInfo) -> Float64:
    """Return weights in proportion to pool sizes: a plain sample of the pool."""
    return on_simplex(info.pool_sizes_K)


def end_losses(history: History) -> Float64:
    """Return the losses at the end of every run, 1 - score, known or filled in.

    An unknown loss repeats the last known one (as DoReMi does for a domain absent from a batch); before that
    it is the mean of the known ones of its run, and 0 where a run knows nothing at all.

    Args:
        history: Runs.

    Returns:
        Runs x K, finite.
    """
    filled: list[Float64] = []
    for run in history:
        row_K = 1 - run.scores_K
        known_K = np.isfinite(row_K)
        neutral_K = np.full(len(row_K), row_K[known_K].mean() if known_K.any() else 0.0)
        filled.append(np.where(known_K, row_K, filled[-1] if filled else neutral_K))
    return np.array(filled)


def loss_steps(history: History) -> Float64:
    """Return one row of losses for every step that a rule takes: a run's end losses `STEPS_PER_ROUND` times.

    Args:
        history: Runs.

    Returns:
        Steps x K, finite.
    """
    return np.repeat(end_losses(history), STEPS_PER_ROUND, axis=0)


def objective(observation: Observation, info: ClusterInfo) -> float:
    """Return sum_k v_k y_k over the clusters with a known score, weights scaled to sum 1; NaN if none."""
    known_K = np.isfinite(observation.scores_K) & (info.dev_weights_K > 0)
    weights_K = info.dev_weights_K[known_K]
    return (
        float(weights_K @ observation.scores_K[known_K] / weights_K.sum()) if weights_K.size else float("nan")
    )


def shares(observation: Observation) -> Float64:
    """Return the mixture that was really trained on; zeros for the real-only run."""
    return observation.counts_K / max(observation.counts_K.sum(), 1.0)


def searched(history: History) -> History:
    """Return the runs with synthetic scenes."""
    return tuple(observation for observation in history if observation.counts_K.sum() > 0)


def seeded_order(info: ClusterInfo, config: Any, *more: int) -> dict[str, int]:
    """Return a random place of every cluster, by name, so that the order of clusters does not matter.

    Args:
        info: Clusters.
        config: Its `seed`, 0 where it has none.
        more: Further seeds.
    """
    names = sorted(info.cluster_ids)
    order = np.random.default_rng([getattr(config, "seed", 0), *more]).permutation(len(names))
    return {names[index]: place for place, index in enumerate(order.tolist())}


def probe_one_cluster(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Propose half the weight for one cluster and the rest equally, the clusters in seeded random order."""
    count = len(info.cluster_ids)
    place = seeded_order(info, config)
    is_probed_K = np.array([place[name] == len(searched(history)) % count for name in info.cluster_ids])
    return np.where(is_probed_K, PROBE_WEIGHT, (1 - PROBE_WEIGHT) / max(count - 1, 1))


def latest(history: History, name: str) -> Float64 | None:
    """Return a feedback field of the last run that recorded it, unknown entries as 0; None if no run did."""
    for observation in reversed(history):
        value = getattr(observation.feedback, name)
        if value is not None:
            return np.nan_to_num(np.asarray(value, dtype=np.float64))
    return None


def needs(value: Any, method: str, field: str) -> Any:
    """Return a value that a method cannot do without.

    Raises:
        InvalidInputError: It is missing.
    """
    if value is None:
        raise InvalidInputError(f"method {method}", f"needs {field}, which is not recorded")
    return np.asarray(value, dtype=np.float64)
