"""Mixtures from the geometry of the pool or from the planner's doubt: coreset, uncertainty, leverage scores.

Legend: N points, K clusters, D embedding size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autoscale_ray.mixture.baselines.signals import (
    Float64,
    latest,
    method_of,
    needs,
    on_simplex,
    size_prior,
    without_runs,
)
from autoscale_ray.mixture.problem import ClusterInfo, History

LEVERAGE_RIDGE = 10.0
LEVERAGE_TEMPERATURE = 5.0
"""Chameleon's constants for training from scratch (LIONS-EPFL/Chameleon 159d9e1)."""


def farthest_first(points_ND: Float64, first: int, num_points: int) -> tuple[np.ndarray, Float64]:
    """Order points so that each is the one farthest from all before it (greedy k-center).

    u = argmax_i min_{j in S} |x_i - x_j| (Sener and Savarese 2018, arXiv 1708.00489, algorithm 1); equal
    distances go to the lower row. Memory N; time N times `num_points`.

    Args:
        points_ND: Points.
        first: Row to start from.
        num_points: Points wanted, 1 ... N.

    Returns:
        Rows in order, and the distance of each to those before it (infinite for the first).
    """
    rows, radii = [first], [np.inf]
    distance_N = np.linalg.norm(points_ND - points_ND[first], axis=1)
    for _ in range(num_points - 1):
        distance_N[rows[-1]] = -1.0  # equal points lie at 0, and each is taken once
        row = int(np.argmax(distance_N))
        rows.append(row)
        radii.append(float(distance_N[row]))
        distance_N = np.minimum(distance_N, np.linalg.norm(points_ND - points_ND[row], axis=1))
    return np.array(rows), np.array(radii)


def coreset_share(info: ClusterInfo) -> Float64:
    """Weigh clusters by how far they lie from those chosen before, w_k ~ covering radius at k's turn.

    Stands for k-center over scenes: a region of the pool gets scenes for its extent, not for its density. The
    first cluster, the largest, counts with the radius of the second.

    Args:
        info: Clusters with centroids.

    Raises:
        InvalidInputError: No centroids.
    """
    points_KD = needs(info.descriptors_KD, "k_center", "ClusterInfo.descriptors_KD")
    if len(points_KD) == 1:
        return np.ones(1)
    rows, radii = farthest_first(points_KD, int(np.argmax(info.pool_sizes_K)), len(points_KD))
    radii[0] = radii[1]
    weights_K = np.zeros(len(points_KD))
    weights_K[rows] = radii
    return on_simplex(weights_K)


def doubt_share(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Draw scenes in proportion to doubt: w_k ~ P_k u_k; a plain sample until a run has told.

    Args:
        history: Runs; `uncertainty_K` is the mean doubt of the planner on a cluster's pool scenes. Where it
            was not recorded the variance of a pass/fail score stands for it, u_k = y_k (1 - y_k).
        info: Clusters.
        config: Not read.
    """
    doubt_K = latest(history, "uncertainty_K")
    if doubt_K is None and history:
        scores_K = history[-1].scores_K
        doubt_K = scores_K * (1 - scores_K)
        doubt_K = np.where(
            np.isfinite(doubt_K), doubt_K, np.nanmean(doubt_K) if np.isfinite(doubt_K).any() else 1
        )
    return size_prior(info) if doubt_K is None else on_simplex(info.pool_sizes_K * np.maximum(doubt_K, 0))


def leverage_scores(points_KD: Float64, ridge: float = LEVERAGE_RIDGE) -> Float64:
    """Return how unlike the others each domain is, summing to 1.

    S_k ~ [G (G + ridge K I)^-1]_kk with G = X X^T of the centred rows (Chameleon, Xie et al. 2025, arXiv 2505.24844;
    the authors' code centres the kernel): what all domains share tells none from another.

    Args:
        points_KD: Mean embedding of each domain.
        ridge: lambda > 0.
    """
    centred_KD = points_KD - points_KD.mean(0)
    gram_KK = centred_KD @ centred_KD.T
    regular_KK = gram_KK + ridge * len(gram_KK) * np.eye(len(gram_KK))
    return on_simplex(np.diag(np.linalg.solve(regular_KK, gram_KK)).astype(np.float64))


def chameleon_share(info: ClusterInfo) -> Float64:
    """Weigh common domains up: w ~ exp(1 / (T S_k)), T = 5 (Chameleon, its rule for training from scratch).

    Args:
        info: Clusters with centroids.

    Raises:
        InvalidInputError: No centroids.
    """
    scores_K = leverage_scores(needs(info.descriptors_KD, "chameleon", "ClusterInfo.descriptors_KD"))
    logits_K = 1 / np.maximum(scores_K, 1e-12) / LEVERAGE_TEMPERATURE
    return on_simplex(np.exp(logits_K - logits_K.max()))


K_CENTER = without_runs(coreset_share)
CHAMELEON = without_runs(chameleon_share)
UNCERTAINTY = method_of(doubt_share, doubt_share)
