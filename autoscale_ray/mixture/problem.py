"""The mixture problem as every method sees it: clusters, runs so far, and a pair of pure functions.

A method is ``Method(propose, final)``. Both functions look only at the history (a tuple of `Observation`), at
the clusters (`ClusterInfo`) and at a config, and return weights keyed by cluster id; a run can therefore be
replayed from its history alone. Weights become integer scene counts in `autoscale_ray.mixture.allocation`.

Shape legend: K clusters, D descriptor dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autoscale_ray.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterInfo:
    """The clusters of the synthetic pool and of the dev scenes; fixed during a search."""

    cluster_ids: tuple[str, ...]
    """Names of the K clusters: the key of every weight, count and score; unique."""
    budget: int
    """Synthetic scenes per round, >= 1; more than the pool means the whole pool."""
    pool_sizes_K: np.ndarray
    """Synthetic scenes available per cluster, >= 0."""
    dev_counts_K: np.ndarray
    """Dev scenes per cluster, >= 0; a cluster without dev scenes has unknown scores (NaN)."""
    dev_weights_K: np.ndarray
    """Weight v_k of each cluster in the objective F = sum_k v_k y_k; sums to 1."""
    real_counts_K: np.ndarray
    """Real training scenes per cluster, always all used; >= 0."""
    descriptors_KD: np.ndarray | None = None
    """Cluster centroids in the embedding, for methods that look at geometry."""
    search_budget: int | None = None
    """Synthetic scenes of the runs so far, where the mixture is wanted for another budget; None = the same."""

    def __post_init__(self) -> None:
        num_clusters = len(self.cluster_ids)
        if num_clusters == 0 or len(set(self.cluster_ids)) != num_clusters:
            raise InvalidInputError(
                "ClusterInfo.cluster_ids", "must be non-empty and unique", self.cluster_ids
            )
        for name in ("budget", "search_budget"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidInputError(f"ClusterInfo.{name}", "must be an integer >= 1", value)
        for name in ("pool_sizes_K", "dev_counts_K", "dev_weights_K", "real_counts_K"):
            object.__setattr__(
                self, name, _checked_vector(f"ClusterInfo.{name}", getattr(self, name), num_clusters)
            )
        if not np.isclose(self.dev_weights_K.sum(), 1.0, atol=1e-6):
            raise InvalidInputError(
                "ClusterInfo.dev_weights_K", "must sum to 1", float(self.dev_weights_K.sum())
            )
        if self.pool_sizes_K.sum() < 1:
            raise InvalidInputError("ClusterInfo.pool_sizes_K", "the pool must hold at least one scene", 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Feedback:
    """What a run can tell beyond its dev scores; None = not recorded, NaN = unknown for that cluster.

    A run records the two gradient fields, where its method reads them; the other two come from controlled problems.
    """

    gradient_alignment_K: np.ndarray | None = None
    """h_k = <P adam(g_k), P g_dev>: how much one step on cluster k moves the dev loss; arbitrary unit."""
    gradient_gram_KK: np.ndarray | None = None
    """<g_i, g_j> between the mean training gradients of clusters (DoGE)."""
    transfer_KK: np.ndarray | None = None
    """A[i, j]: change of cluster i's score per unit of extra weight on j, probed (Skill-it, Aioli)."""
    uncertainty_K: np.ndarray | None = None
    """Mean predictive uncertainty of the planner on each cluster's pool scenes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Observation:
    """One mixture that was trained and scored, averaged over ``num_seeds`` training seeds."""

    cluster_ids: tuple[str, ...]
    """Names that the arrays below are ordered by; may differ in order from the `ClusterInfo` read later."""
    counts_K: np.ndarray
    """Synthetic scenes per cluster that were really trained on, >= 0; all zero for the real-only run."""
    scores_K: np.ndarray
    """Mean dev score per cluster in [0, 1]; NaN = unknown, never 0."""
    score_se_K: np.ndarray
    """Standard error of the scores from the dev scenes alone (not from training seeds); NaN = unknown."""
    num_seeds: int = 1
    """Training seeds averaged in ``scores_K``, >= 1; each is charged as one evaluation."""
    is_real_only: bool = False
    """True for round 0, trained on real scenes alone."""
    feedback: Feedback = field(default_factory=Feedback)
    """What else is known of the run."""

    def __post_init__(self) -> None:
        num_clusters = len(self.cluster_ids)
        object.__setattr__(
            self, "counts_K", _checked_vector("Observation.counts_K", self.counts_K, num_clusters)
        )
        for name in ("scores_K", "score_se_K"):
            vector_K = np.asarray(getattr(self, name), dtype=np.float64)
            if vector_K.shape != (num_clusters,) or np.isinf(vector_K).any():
                raise InvalidInputError(
                    f"Observation.{name}", f"must be {num_clusters} finite or NaN numbers"
                )
            object.__setattr__(self, name, vector_K)
        if self.num_seeds < 1:
            raise InvalidInputError("Observation.num_seeds", "must be an integer >= 1", self.num_seeds)


History = tuple[Observation, ...]
Weights = dict[str, float]
MixtureRule = Callable[[History, ClusterInfo, Any], Weights]
"""``rule(history, info, config)`` -> weights on the simplex keyed by cluster id; a pure function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A mixture method: what to train next, and what to recommend in the end."""

    propose: MixtureRule
    """Weights of the next run, given the runs so far (none, or the real-only one, at the first call)."""
    final: MixtureRule
    """Weights recommended after the last run."""
    num_search_runs: int | None = None
    """Runs the method can use: None = as many as it is given, 0 = needs no run."""
    reads_gradients: bool = False
    """Whether it reads the planner's gradients, which cost a probe after every round."""


def align_history(history: History, info: ClusterInfo) -> History:
    """Reorder every observation by cluster name as ``info`` does; a missing cluster becomes unknown.

    Args:
        history: Runs so far, each with its own order of clusters.
        info: The order wanted.

    Returns:
        The same runs; clusters absent from a run get count 0 and NaN scores.

    Raises:
        InvalidInputError: A run holds scenes of a cluster that ``info`` does not name.
    """
    return tuple(obs if obs.cluster_ids == info.cluster_ids else _aligned(obs, info) for obs in history)


def as_weights(weights_K: np.ndarray, info: ClusterInfo) -> Weights:
    """Key an array of K weights by cluster id."""
    return {name: float(weight) for name, weight in zip(info.cluster_ids, weights_K, strict=True)}


def as_array(weights: Weights, info: ClusterInfo) -> np.ndarray:
    """Order weights keyed by cluster id as ``info`` does.

    Raises:
        InvalidInputError: A name is missing or unknown, or a weight is negative or not finite.
    """
    if set(weights) != set(info.cluster_ids):
        odd = sorted(set(weights) ^ set(info.cluster_ids))
        raise InvalidInputError("weights", "must name every cluster exactly once; missing or unknown", odd)
    return _checked_vector("weights", [weights[name] for name in info.cluster_ids], len(info.cluster_ids))


def _aligned(obs: Observation, info: ClusterInfo) -> Observation:
    unknown = [
        name
        for name, count in zip(obs.cluster_ids, obs.counts_K, strict=True)
        if name not in info.cluster_ids and count > 0
    ]
    if unknown:
        raise InvalidInputError(
            "Observation.cluster_ids", "holds scenes of clusters that are not in ClusterInfo", unknown
        )
    position = {name: index for index, name in enumerate(obs.cluster_ids)}
    source_K = np.array([position.get(name, -1) for name in info.cluster_ids])
    feedback = {
        name: None if value is None else _reordered(value, source_K, name)
        for name in Feedback.__slots__
        for value in (getattr(obs.feedback, name),)
    }
    return replace(
        obs,
        cluster_ids=info.cluster_ids,
        counts_K=np.where(source_K < 0, 0.0, obs.counts_K[source_K]),
        scores_K=_reordered(obs.scores_K, source_K, "scores_K"),
        score_se_K=_reordered(obs.score_se_K, source_K, "score_se_K"),
        feedback=Feedback(**feedback),
    )


def _reordered(values: np.ndarray, source_K: np.ndarray, name: str) -> np.ndarray:
    """Reorder the last axis (both axes of a ``_KK`` array), NaN where the cluster was absent."""
    taken = np.where(source_K < 0, np.nan, np.asarray(values, dtype=np.float64)[..., source_K])
    return np.where((source_K < 0)[:, None], np.nan, taken[source_K]) if name.endswith("_KK") else taken


def _checked_vector(where: str, values: Any, num_clusters: int) -> np.ndarray:
    vector_K = np.asarray(values, dtype=np.float64)
    if vector_K.shape != (num_clusters,) or not np.isfinite(vector_K).all() or (vector_K < 0).any():
        raise InvalidInputError(where, f"must be {num_clusters} finite numbers >= 0", vector_K.tolist())
    return vector_K
