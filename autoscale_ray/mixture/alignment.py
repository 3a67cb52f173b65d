"""Gradient alignment: whose training scenes push the planner the way the dev scenes ask.

Shape legend: K clusters, W weights of the planner (or entries of a sketch of its gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture.problem import Feedback

Gradients = Callable[[str | None], np.ndarray | None]
"""``gradients(cluster_id)``: mean training gradient (W,) on synthetic scenes of that cluster, None where it has none;
``gradients(None)``: on dev scenes in proportion to their weights. A very large planner may return a fixed random
projection instead: only inner products are read."""


def measure_alignment(gradients: Gradients, cluster_ids: Sequence[str]) -> Feedback:
    """Measure how one step on each cluster would move the dev loss.

    h_k = sum_w g_kw g_dev,w / sqrt(c_w), c = mean over clusters of g_k^2: gradients whitened entry by entry, so that
    h_k is an Adam-like step on cluster k dotted with the dev gradient (LESS, 2402.04333, section 4; whitening after
    TAROT, 2412.00420). G_ij = g_i . g_j stays plain: that is what DoGE (2310.15393) reads.

    Args:
        gradients: Called once for every cluster and once for dev.
        cluster_ids: The K clusters.

    Returns:
        Feedback with ``gradient_alignment_K`` (arbitrary unit) and ``gradient_gram_KK``; NaN for clusters without
        scenes.

    Raises:
        InvalidInputError: No dev gradient, or a gradient that is not finite.
    """
    dev_W = _finite("dev", gradients(None))
    if dev_W is None:
        raise InvalidInputError("gradient alignment", "needs at least one dev scene", 0)
    found_KW = np.full((len(cluster_ids), len(dev_W)), np.nan)
    for place, name in enumerate(cluster_ids):
        gradient_W = _finite(name, gradients(name))
        if gradient_W is not None:
            found_KW[place] = gradient_W
    known_K = ~np.isnan(found_KW[:, 0])
    alignment_K = np.full(len(cluster_ids), np.nan)
    gram_KK = np.full((len(cluster_ids), len(cluster_ids)), np.nan)
    if known_K.any():
        size_W = np.sqrt((found_KW[known_K] ** 2).mean(axis=0))
        whitened_W = np.divide(dev_W, size_W, out=np.zeros_like(size_W), where=size_W > 0)
        alignment_K[known_K] = found_KW[known_K] @ whitened_W
        gram_KK[np.ix_(known_K, known_K)] = found_KW[known_K] @ found_KW[known_K].T
    return Feedback(gradient_alignment_K=alignment_K, gradient_gram_KK=gram_KK)


def _finite(name: str, gradient_W: np.ndarray | None) -> np.ndarray | None:
    if gradient_W is None:
        return None
    if not np.isfinite(gradient_W).all():
        raise InvalidInputError(f"gradient of {name}", "must be finite", "NaN or infinity")
    return np.asarray(gradient_W, dtype=np.float64)
