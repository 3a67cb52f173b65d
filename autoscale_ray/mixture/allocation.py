"""From weights to scene counts: water-filling under pool caps, then integers.

Two pure rules, keyed by the order of the arrays given; `allocate` is the name-keyed front.

- `waterfill`: n_k = min(P_k, lambda w_k) with lambda so that the sum is min(B, sum P): an exhausted pool spills over
  to the others in proportion to their weights.
- `largest_remainder`: integers nearest to a real allocation, |n_k - x_k| < 1.

Shape legend: K clusters; leading axes ``...`` are independent problems.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoscale_ray.mixture.problem import ClusterInfo, Weights, as_array

LEAST_WEIGHT = 1e-200
"""Weights below about this share of the largest count as none: a pool divided by one may be infinite."""


def waterfill(weights_K: np.ndarray, caps_K: np.ndarray, budget: float | np.ndarray) -> np.ndarray:
    """Fill pools in proportion to weights until the budget is spent, exactly.

    n_k = min(P_k, lambda w_k), sum n = min(B, sum of P_k over w_k > 0); docs/cluster_ga.md, allocation.
    Where the positive weights cannot hold the budget, the rest goes to zero-weight pools in proportion to size.

    Args:
        weights_K: (..., K) weights >= 0; any scale; all zero reads as equal weights.
        caps_K: (..., K) pool sizes P_k >= 0.
        budget: Scenes B >= 0, a scalar or (...).

    Returns:
        (..., K) real counts with 0 <= n <= P and sum min(B, sum P).
    """
    weights_K, caps_K = np.broadcast_arrays(np.asarray(weights_K, float), np.asarray(caps_K, float))
    weights_K = np.where(weights_K.sum(-1, keepdims=True) > 0, weights_K, 1.0)
    _, exponent = np.frexp(weights_K.max(-1, keepdims=True, initial=0.0))
    weights_K = np.ldexp(weights_K, -exponent)  # to [1/2, 1) at most, exactly
    weights_K = np.where(weights_K > LEAST_WEIGHT, weights_K, 0.0)
    total = np.minimum(np.asarray(budget, float)[..., None], caps_K.sum(-1, keepdims=True))
    counts_K = _fill(weights_K, caps_K, np.minimum(total, (caps_K * (weights_K > 0)).sum(-1, keepdims=True)))
    spill_K = np.where(weights_K > 0, 0.0, caps_K)
    spill_total = spill_K.sum(-1, keepdims=True)
    missing = total - counts_K.sum(-1, keepdims=True)
    missing = np.where(missing > 1e-9 * total, missing, 0.0)  # what is left is rounding, not a lack of room
    return counts_K + spill_K * np.divide(
        missing, spill_total, out=np.zeros_like(missing), where=spill_total > 0
    )


def largest_remainder(real_K: np.ndarray, caps_K: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Round a real allocation to integers with the same (rounded) sum, never above a cap.

    Args:
        real_K: (K,) real counts, 0 <= x <= P.
        caps_K: (K,) integer caps P_k.
        names: Cluster ids; ties are broken by name, so the order of clusters does not matter.

    Returns:
        (K,) int64 counts with |n_k - x_k| < 1.
    """
    total = min(round(float(real_K.sum())), int(caps_K.sum()))
    snapped_K = np.where(np.abs(real_K - np.round(real_K)) < 1e-9, np.round(real_K), real_K)
    floors_K = np.minimum(np.floor(snapped_K), caps_K).astype(np.int64)
    remainders_K = np.where(floors_K < caps_K, np.round(snapped_K - floors_K, 9), -1.0)
    order = sorted(range(len(names)), key=lambda index: (-remainders_K[index], names[index]))
    floors_K[order[: total - int(floors_K.sum())]] += 1
    assert floors_K.sum() == total
    assert (floors_K <= caps_K).all()
    return floors_K


def allocate(weights: Weights, info: ClusterInfo) -> dict[str, int]:
    """Turn weights keyed by cluster id into integer scene counts under pool caps.

    Args:
        weights: Weight per cluster id, >= 0, any scale.
        info: Clusters with pool sizes and the budget.

    Returns:
        Scene count per cluster id; the sum is min(budget, pool).

    Raises:
        InvalidInputError: A name is missing or unknown, or a weight is negative or NaN.
    """
    weights_K = as_array(weights, info)
    caps_K = np.floor(info.pool_sizes_K).astype(np.int64)
    counts_K = largest_remainder(waterfill(weights_K, caps_K, info.budget), caps_K, info.cluster_ids)
    return {name: int(count) for name, count in zip(info.cluster_ids, counts_K, strict=True)}


def spill(counts: Mapping[str, int], missing: int) -> dict[str, int]:
    """Add scenes that other clusters could not deliver, in proportion to the counts.

    Args:
        counts: Scenes by cluster id, >= 0, of the clusters that may have more.
        missing: Scenes to add, >= 0.

    Returns:
        The next counts of those with a positive count; empty when nothing is missing.
    """
    shares = {name: counts[name] for name in sorted(counts) if counts[name] > 0}
    if missing == 0 or not shares:
        return {}
    ends = np.cumsum(list(shares.values()))
    added = np.diff(missing * ends // ends[-1], prepend=0)
    return {name: counts[name] + int(more) for name, more in zip(shares, added, strict=True)}


def _fill(weights_K: np.ndarray, caps_K: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Solve sum_k min(P_k, lambda w_k) = total by sorting the break points P_k / w_k."""
    ratio_K = np.divide(caps_K, weights_K, out=np.full(caps_K.shape, np.inf), where=weights_K > 0)
    order_K = np.argsort(ratio_K, axis=-1, kind="stable")
    caps_sorted_K = np.where(weights_K > 0, caps_K, 0.0)
    caps_sorted_K = np.take_along_axis(caps_sorted_K, order_K, -1)
    weights_sorted_K = np.take_along_axis(weights_K, order_K, -1)
    full_before_K = np.cumsum(caps_sorted_K, -1) - caps_sorted_K
    weight_left_K = np.cumsum(weights_sorted_K[..., ::-1], -1)[..., ::-1]
    level_K = np.divide(
        total - full_before_K, weight_left_K, out=np.full(caps_K.shape, np.inf), where=weight_left_K > 0
    )
    # The first pool that the candidate level does not exhaust fixes the level.
    fits_K = level_K <= np.take_along_axis(ratio_K, order_K, -1)
    first = np.argmax(fits_K, axis=-1)[..., None]
    level = np.where(fits_K.any(-1, keepdims=True), np.take_along_axis(level_K, first, -1), np.inf)
    return np.where(
        weights_K > 0, np.minimum(caps_K, np.maximum(level, 0.0) * np.where(weights_K > 0, weights_K, 1)), 0.0
    )
