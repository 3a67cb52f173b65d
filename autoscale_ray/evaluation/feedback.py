"""From scene scores to what the mixture optimiser reads: weighted cluster means with log-clustered errors.

Shape legend: S training seeds, N scenes, K clusters, G logs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def weighted_mean(values_N: Float64, weights_N: Float64, logs_N: Int64) -> tuple[float, float]:
    """Return a weighted mean over scenes and its standard error, clustered by log.

    mean = sum w_i y_i / sum w_i;  se^2 = G/(G-1) sum_g (sum_{i in g} w_i (y_i - mean))^2 / (sum w_i)^2, the
    linearised ratio estimator with logs as the sampling unit.

    Args:
        values_N: Scores; NaN = missing, left out.
        weights_N: Weights >= 0.
        logs_N: Number of the log of each scene.

    Returns:
        Mean and standard error; NaN mean without a scene of positive weight, NaN error with fewer than two
        logs.
    """
    used = np.isfinite(values_N) & (weights_N > 0)
    if not used.any():
        return float("nan"), float("nan")
    values, weights, logs = values_N[used], weights_N[used], logs_N[used]
    mean = float(weights @ values / weights.sum())
    sums_G = np.bincount(np.unique(logs, return_inverse=True)[1], weights=weights * (values - mean))
    if len(sums_G) < 2:
        return mean, float("nan")
    variance = len(sums_G) / (len(sums_G) - 1) * float(sums_G @ sums_G) / float(weights.sum()) ** 2
    return mean, float(np.sqrt(variance))


def cluster_feedback(
    scores_SN: Float64, weights_N: Float64, logs_N: Int64, clusters_N: Int64, num_clusters: int
) -> tuple[Float64, Float64]:
    """Return the weighted mean score of every cluster and its standard error from scenes alone.

    Scenes are first averaged over training seeds; a scene that any seed has no score for is left out.

    Args:
        scores_SN: Scene scores in [0, 1]; NaN = missing.
        weights_N: Scene weights >= 0.
        logs_N: Number of the log of each scene.
        clusters_N: Cluster of each scene in [0, K).
        num_clusters: K.

    Returns:
        Means (K,) and errors (K,); NaN where a cluster has no score (or, for the error, fewer than two logs).
    """
    means_N = scores_SN.mean(axis=0)
    pairs = [
        weighted_mean(means_N[rows], weights_N[rows], logs_N[rows])
        for rows in (np.flatnonzero(clusters_N == k) for k in range(num_clusters))
    ]
    return np.array([mean for mean, _ in pairs]), np.array([error for _, error in pairs])


def cluster_weights(weights_N: Float64, clusters_N: Int64, num_clusters: int) -> Float64:
    """Return the share v_k of each cluster in the weighted mean; sums to 1."""
    sums_K = np.bincount(clusters_N, weights=weights_N, minlength=num_clusters)
    return sums_K / sums_K.sum()
