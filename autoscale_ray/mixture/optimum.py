"""The best mixture for known response curves: a separable, capped, concave-hull problem solved by its price.

Shape legend: P problems, K clusters (J the same), L laws, G grid points of the shares.
"""

from __future__ import annotations

import numpy as np

from autoscale_ray.mixture.allocation import waterfill
from autoscale_ray.mixture.laws import law_values
from autoscale_ray.mixture.response import ResponseFit

GRID_G = np.concatenate([[0.0], np.geomspace(0.01, 16.0, 95)])
"""Shares that one of up to 16 clusters may get, in units of the uniform share; the price mixes neighbours on it."""
GRID_STEP = np.log(16.0 / 0.01) / 94
NUM_BISECTIONS = 50


def share_grid(num_clusters: int) -> np.ndarray:
    """Return `GRID_G`, going on with its steps to the whole budget where that is more than 16 uniform shares."""
    if num_clusters <= 16:
        return GRID_G
    num_steps = int(np.ceil(np.log(num_clusters / 16.0) / GRID_STEP))
    return np.concatenate([GRID_G, np.geomspace(16.0, num_clusters, num_steps + 1)[1:]])


def posterior_optimum(
    fit: ResponseFit,
    dev_weights_PK: np.ndarray,
    caps_PK: np.ndarray,
    total: float,
    floor: float,
    *,
    guard: bool,
) -> np.ndarray:
    """Maximise the posterior-mean objective sum_k v_k y_k over mixtures; docs/cluster_ga.md, The optimum.

    With the guard, the answer moves toward what is safe under the null by the posterior weight of the null.

    Args:
        fit: Posterior of the response curves.
        dev_weights_PK: v_k, sum 1.
        caps_PK: Pool sizes in uniform shares of the runs.
        total: Shares to give out: K for the budget of the runs.
        floor: Least share of every cluster before caps, in parts of an even share.
        guard: Whether to move toward the null.

    Returns:
        (P, K) shares (scenes over the runs' budget / K) that sum to min(total, sum of caps).
    """
    grid_PKG = np.minimum(share_grid(caps_PK.shape[1]), caps_PK[..., None])
    total_P = np.minimum(total, caps_PK.sum(1))
    laws_PKGL = law_values(grid_PKG)
    spill_PJ = np.einsum("pk,pkj->pj", dev_weights_PK, fit.spills_PKJ)
    values_PKG = np.einsum("pkl,pkgl->pkg", dev_weights_PK[..., None] * fit.gains_PKL, laws_PKGL)
    shares_PK = best_shares(values_PKG + spill_PJ[..., None] * grid_PKG, grid_PKG, caps_PK, total_P, floor)
    if not guard:
        return shares_PK
    null_PKG = dev_weights_PK[..., None] * np.einsum("pl,pkgl->pkg", fit.null_gains_PL, laws_PKGL)
    null_PK = best_shares(null_PKG, grid_PKG, caps_PK, total_P, floor)
    safe_PK = _safe_shares(fit, dev_weights_PK, caps_PK, total_P, null_PK)
    weight_P1 = fit.null_probability_P[:, None]
    return (1 - weight_P1) * shares_PK + weight_P1 * safe_PK


def predicted_objective(fit: ResponseFit, dev_weights_PK: np.ndarray, shares_PSK: np.ndarray) -> np.ndarray:
    """Posterior-mean objective of S candidate mixtures, up to a constant of the problem, (P, S)."""
    own_PS = np.einsum(
        "pk,pkl,pskl->ps", dev_weights_PK, fit.gains_PKL, law_values(shares_PSK), optimize=True
    )
    return own_PS + np.einsum("pk,pkj,psj->ps", dev_weights_PK, fit.spills_PKJ, shares_PSK, optimize=True)


def _safe_shares(
    fit: ResponseFit,
    dev_weights_PK: np.ndarray,
    caps_PK: np.ndarray,
    total_P: np.ndarray,
    null_PK: np.ndarray,
) -> np.ndarray:
    """Pick the best point, by the free fit, between the uniform mixture and the optimum of the null.

    Where all clusters are alike and weigh the same the two ends coincide, so nothing moves; the optimum of the null
    alone would follow the dev weights into clusters that the free fit already suspects.
    """
    uniform_PK = waterfill(np.ones_like(caps_PK), caps_PK, total_P)
    steps_S11 = np.linspace(0.0, 1.0, 11)[:, None]
    path_PSK = uniform_PK[:, None] + steps_S11 * (null_PK - uniform_PK)[:, None]
    best_P = predicted_objective(fit, dev_weights_PK, path_PSK).argmax(1)
    return path_PSK[np.arange(len(path_PSK)), best_P]


def best_shares(
    values_PKG: np.ndarray, grid_PKG: np.ndarray, caps_PK: np.ndarray, total_P: np.ndarray, floor: float
) -> np.ndarray:
    """Maximise sum_k U_k(x_k) with sum x = total, at most the sum of the caps, by bisection on the price of a share.

    x_k(price) = argmax_x U_k(x) - price x walks along the concave hull of U_k, so curves that fall (harm) or bend
    upward are handled; the two solutions around the right price are mixed to meet the budget exactly.
    """
    steps_PKG = np.diff(grid_PKG, axis=-1)
    slopes_PKG = np.diff(values_PKG, axis=-1) / np.where(steps_PKG > 0, steps_PKG, np.inf)
    high_P = np.abs(slopes_PKG).max((1, 2)) + 1e-12
    low_P = -high_P
    for _ in range(NUM_BISECTIONS):
        middle_P = (low_P + high_P) / 2
        too_many_P = _shares_at(middle_P, values_PKG, grid_PKG).sum(1) > total_P
        low_P, high_P = np.where(too_many_P, middle_P, low_P), np.where(too_many_P, high_P, middle_P)
    many_PK, few_PK = _shares_at(low_P, values_PKG, grid_PKG), _shares_at(high_P, values_PKG, grid_PKG)
    gap_P = many_PK.sum(1) - few_PK.sum(1)
    mix_P = np.where(gap_P > 0, (total_P - few_PK.sum(1)) / np.where(gap_P > 0, gap_P, 1.0), 0.0)
    mixed_PK = few_PK + np.clip(mix_P, 0.0, 1.0)[:, None] * (many_PK - few_PK)
    return waterfill(mixed_PK + floor * total_P[:, None] / caps_PK.shape[1], caps_PK, total_P)


def _shares_at(price_P: np.ndarray, values_PKG: np.ndarray, grid_PKG: np.ndarray) -> np.ndarray:
    best_PK = np.argmax(values_PKG - price_P[:, None, None] * grid_PKG, axis=-1)
    return np.take_along_axis(grid_PKG, best_PK[..., None], axis=-1)[..., 0]
