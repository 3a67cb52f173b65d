"""The best mixture of a controlled problem: projected gradient with restarts, a closed form, and SLSQP.

Shape legend: P problems, K clusters.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from autoscale_ray.mixture.allocation import waterfill
from benchmarks.controlled.family import Family, objective, objective_gradient


def oracle_counts(family: Family, num_steps: int = 1500, run: int | None = None) -> np.ndarray:
    """Maximise F over 0 <= n <= P, sum n = min(B, sum P), by accelerated projected gradient from two starts.

    With a saturating harm F is not concave in the harmful clusters; the start without them and the uniform start
    bracket the two basins, and the better end is kept.

    Returns:
        (P, K) real counts.
    """
    starts = [
        waterfill(np.where(family.harmful_PK, 0.0, 1.0), family.caps_PK, family.budget_P),
        family.uniform_PK,
    ]
    ends = [_ascend(family, start_PK, num_steps, run) for start_PK in starts]
    values_SP = np.stack([objective(family, end_PK, run) for end_PK in ends])
    return np.stack(ends)[np.argmax(values_SP, 0), np.arange(len(family.caps_PK))]


def optimality_gap(family: Family, counts_PK: np.ndarray, run: int | None = None) -> np.ndarray:
    """Frank-Wolfe gap max_m grad F(n) (m - n): an upper bound on the loss where F is concave (P,)."""
    gradient_PK = objective_gradient(family, counts_PK, run)
    order_PK = np.argsort(-gradient_PK, axis=1)
    caps_PK = np.take_along_axis(family.caps_PK, order_PK, 1)
    taken_PK = np.clip(family.budget_P[:, None] - (np.cumsum(caps_PK, 1) - caps_PK), 0.0, caps_PK)
    best_P = (np.take_along_axis(gradient_PK, order_PK, 1) * taken_PK).sum(1)
    return best_P - (gradient_PK * counts_PK).sum(1)


def separable_oracle(family: Family) -> np.ndarray:
    """KKT optimum of the separable power law (no transfer, no harm):

    n_k = clip((s_k / g_k) [(v_k A_k alpha_k g_k / (lambda s_k))^(1 / (1 + alpha_k)) - 1], 0, P_k), sum n = B;
    docs/cluster_ga.md, C1. lambda by bisection on its logarithm.
    """
    quality_PK = np.einsum("pkk->pk", family.reach_PKJ)
    first_PK = family.dev_weights_PK * family.gain_PK * family.exponent_PK * quality_PK / family.scale_PK

    def counts(log_price_P: np.ndarray) -> np.ndarray:
        ratio_PK = first_PK / np.exp(log_price_P)[:, None]
        free_PK = family.scale_PK / quality_PK * (ratio_PK ** (1 / (1 + family.exponent_PK)) - 1)
        return np.clip(free_PK, 0.0, family.caps_PK)

    low_P, high_P = np.log(first_PK.min(1)) - 60.0, np.log(first_PK.max(1))
    for _ in range(200):
        middle_P = (low_P + high_P) / 2
        too_many_P = counts(middle_P).sum(1) > family.budget_P
        low_P, high_P = np.where(too_many_P, middle_P, low_P), np.where(too_many_P, high_P, middle_P)
    return counts(high_P)


def slsqp_oracle(family: Family, index: int) -> np.ndarray:
    """Solve one concave problem with scipy's SLSQP, as a second opinion (K,)."""
    caps_K, budget = family.caps_PK[index], float(family.config.budget)
    unit = family.config.uniform_share

    def full(shares_K: np.ndarray) -> np.ndarray:
        counts_PK = family.uniform_PK.copy()
        counts_PK[index] = shares_K * unit
        return counts_PK

    found = minimize(
        lambda x: -100 * objective(family, full(x))[index],
        family.uniform_PK[index] / unit,
        jac=lambda x: -100 * unit * objective_gradient(family, full(x))[index],
        bounds=[(0.0, cap / unit) for cap in caps_K],
        constraints={
            "type": "eq",
            "fun": lambda x: x.sum() - budget / unit,
            "jac": lambda x: np.ones_like(x),
        },
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return np.clip(found.x * unit, 0.0, caps_K)


def _ascend(family: Family, start_PK: np.ndarray, num_steps: int, run: int | None) -> np.ndarray:
    """FISTA with projection, restarted every 100 steps."""
    counts_PK, ahead_PK, momentum = start_PK, start_PK, 1.0
    gradient_PK = objective_gradient(family, counts_PK, run)
    step_P1 = family.config.uniform_share / (20 * np.abs(gradient_PK).max(1, keepdims=True))
    for step in range(num_steps):
        moved_PK = ahead_PK + step_P1 * objective_gradient(family, ahead_PK, run)
        next_PK = project(moved_PK, family.caps_PK, family.budget_P)
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead_PK = np.maximum(next_PK + (momentum - 1) / next_momentum * (next_PK - counts_PK), 0.0)
        if step % 100 == 99:
            ahead_PK, next_momentum = next_PK, 1.0
        counts_PK, momentum = next_PK, next_momentum
    return counts_PK


def project(points_PK: np.ndarray, caps_PK: np.ndarray, budget_P: np.ndarray) -> np.ndarray:
    """Euclidean projection onto {0 <= n <= P, sum n = min(B, sum P)} by bisection on the shift."""
    total_P1 = np.minimum(budget_P, caps_PK.sum(1))[:, None]
    low_P1, high_P1 = (points_PK - caps_PK).min(1, keepdims=True), points_PK.max(1, keepdims=True)
    for _ in range(60):
        middle_P1 = (low_P1 + high_P1) / 2
        too_many_P1 = np.clip(points_PK - middle_P1, 0, caps_PK).sum(1, keepdims=True) > total_P1
        low_P1 = np.where(too_many_P1, middle_P1, low_P1)
        high_P1 = np.where(too_many_P1, high_P1, middle_P1)
    return np.clip(points_PK - (low_P1 + high_P1) / 2, 0, caps_PK)
