"""Exploration: which clusters are raised and which lowered in a training run.

Runs come in antithetic pairs: a balanced sign vector s and its negative, applied as w * e^(+c s) and w * e^(-c s)
around the same centre. The pair's difference is free of curvature to second order, and a strong step (c = 1.6, a
cluster between a fifth and five times its share) is what makes a response visible above the noise
(docs/cluster_ga.md, One search).

Shape legend: K clusters.
"""

from __future__ import annotations

import hashlib

import numpy as np

from autoscale_ray.mixture.allocation import waterfill


def balanced_signs(cluster_ids: tuple[str, ...], seed: int, pair: int) -> np.ndarray:
    """Draw +1 for half of the clusters and -1 for the rest (one 0 where K is odd), fresh for each pair.

    Each cluster's draw hangs on its name, so that reordering the clusters reorders the signs.

    Args:
        cluster_ids: Names of the K clusters.
        seed: Seed of the design.
        pair: Index of the pair, >= 0.

    Returns:
        (K,) signs that sum to 0.
    """
    draws = [hashlib.sha256(f"{seed}/{pair}/{name}".encode()).digest() for name in cluster_ids]
    order = sorted(range(len(cluster_ids)), key=lambda index: draws[index])
    signs_K = np.zeros(len(cluster_ids))
    half = len(cluster_ids) // 2
    signs_K[order[:half]] = 1.0
    signs_K[order[len(order) - half :]] = -1.0
    return signs_K


def step_size(perturbation: float, decay: float, pair: int) -> float:
    """Return the log-weight step of a pair, c / sqrt(1 + decay pair): constant at decay 0, the default."""
    return perturbation / (1.0 + decay * pair) ** 0.5


def perturbed(
    shares_K: np.ndarray,
    signs_K: np.ndarray,
    perturbation: float,
    caps_K: np.ndarray,
    total: float | np.ndarray,
) -> np.ndarray:
    """Multiply a mixture by e^(c s) and fill the budget again under the caps, (..., K)."""
    return waterfill(shares_K * np.exp(perturbation * signs_K), caps_K, total)
