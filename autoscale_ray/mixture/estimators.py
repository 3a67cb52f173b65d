"""Gradient estimators of the objective, pure functions of the history, and the methods built on them.

Every estimator returns dF / d log w_k with a standard deviation, NaN where a cluster is unknown
(docs/cluster_ga.md, The estimators). `deficit` and `excess` read scores only; `progress` fits a learning curve per
cluster; `spsa` and `vector_spsa` read antithetic pairs; `response` uses the Bayesian response curves; `alignment`
reads gradient dot products. The method `fused` joins the last two in one fit.

Shape legend: T runs, Q pairs, K clusters, L laws.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoscale_ray.config import AscentConfig
from autoscale_ray.mixture.ascent import (
    Estimator,
    Gradient,
    fit_history,
    noise_priors,
    propose_by_ascent,
    propose_by_optimum,
    recommend_by_ascent,
    recommend_by_optimum,
    runs_of,
    searched,
    start_weights,
    uniform_share,
)
from autoscale_ray.mixture.laws import law_slopes
from autoscale_ray.mixture.problem import ClusterInfo, History, Method, align_history
from autoscale_ray.mixture.response import ResponseFit, Runs, fit_responses

SEED_SD = 0.008
"""Training-seed SD of a cluster score, used where no fit estimates it."""
_EXPONENTS = (0.3, 0.5, 1.0)


def deficit(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = v_k (1 - y_k) of the last run: chase low scores. A baseline: it cannot tell hard from learnable."""
    scores_K, sd_K = _last_scores(history, info, config)
    return Gradient(info.dev_weights_K * (1.0 - scores_K), info.dev_weights_K * sd_K)


def excess(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = v_k max(0, y_ref,k - y_k): chase what the first run did better (DoReMi's excess loss on scores)."""
    scores_K, sd_K = _last_scores(history, info, config)
    (first,) = align_history(searched(history)[:1], info)
    gap_K = np.where(np.isnan(scores_K), np.nan, np.maximum(0.0, first.scores_K - scores_K))
    return Gradient(info.dev_weights_K * gap_K, info.dev_weights_K * sd_K * np.sqrt(2))


def progress(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = v_k alpha_k (learnable error left): the slope of a power law fitted per cluster (ADO on scores).

    1 - y = e + beta x^-alpha with alpha on a grid, beta >= 0; the slope in log x is alpha beta x^-alpha.
    """
    runs = runs_of(history, info, config)
    keep_T = ~runs.is_real_only_T
    shares_TK = np.maximum(runs.shares_PTK[0][keep_T], 1e-3)
    errors_TK = 1.0 - runs.scores_PTK[0][keep_T]
    slopes = [_power_slope(shares_TK[:, k], errors_TK[:, k]) for k in range(shares_TK.shape[1])]
    return Gradient(info.dev_weights_K * np.array(slopes), np.zeros(len(slopes)))


def spsa(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = mean over pairs of (F+ - F-) d_k / sum_j d_j^2, d = log weight difference of the pair (scalar SPSA)."""
    differences_QK, logs_QK, variance_QK = _pairs(history, info, config)
    if len(logs_QK) == 0:
        return _flat(info)
    weights_K = info.dev_weights_K
    totals_Q = np.nansum(weights_K * differences_QK, axis=1)
    scale_QK = logs_QK / np.maximum((logs_QK**2).sum(1, keepdims=True), 1e-12)
    error_Q = np.sqrt(np.nansum(weights_K**2 * variance_QK, axis=1))
    sd_K = np.sqrt(((error_Q[:, None] * scale_QK) ** 2).sum(0)) / len(logs_QK)
    return Gradient((totals_Q[:, None] * scale_QK).mean(0), sd_K)


def vector_spsa(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = v_k slope_k, each cluster's own score difference over its own log weight difference, EB-shrunk.

    slope = rho slope_raw + (1 - rho) median, rho = tau^2 / (tau^2 + se^2); tau by moments over clusters.
    """
    differences_QK, logs_QK, variance_QK = _pairs(history, info, config)
    if len(logs_QK) == 0:
        return _flat(info)
    precision_QK = np.where(np.isnan(differences_QK), 0.0, logs_QK**2 / variance_QK)
    total_K = precision_QK.sum(0)
    ratio_QK = np.divide(differences_QK, logs_QK, out=np.zeros_like(logs_QK), where=np.abs(logs_QK) > 1e-9)
    raw_K = np.nansum(precision_QK * ratio_QK, axis=0) / np.where(total_K > 0, total_K, np.nan)
    if np.isnan(raw_K).all():
        return _flat(info)
    error_K = 1 / np.where(total_K > 0, total_K, np.nan)
    middle = np.nanmedian(raw_K)
    spread = max(float(np.nanmean((raw_K - middle) ** 2 - error_K)), 1e-10)
    rho_K = spread / (spread + error_K)
    slope_K = rho_K * raw_K + (1 - rho_K) * middle
    return Gradient(info.dev_weights_K * slope_K, info.dev_weights_K * np.sqrt(rho_K * error_K))


def response(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = x_k (v_k sum_l E[a_kl] phi_l'(x_k) + sum_i v_i E[b_ik]) at the last mixture, with posterior sd."""
    fit = fit_history(history, info, config)
    aligned = align_history(searched(history)[-1:], info)
    shares_K = (
        aligned[0].counts_K / uniform_share(info) if aligned else start_weights(info) * len(info.cluster_ids)
    )
    slopes_KL = law_slopes(shares_K)
    own_K = (fit.gains_PKL[0] * slopes_KL).sum(1)
    variance_K = np.maximum((fit.gain_squares_PKL[0] * slopes_KL**2).sum(1) - own_K**2, 0.0)
    spill_K = info.dev_weights_K @ fit.spills_PKJ[0]
    mean_K = shares_K * (info.dev_weights_K * own_K + spill_K)
    return Gradient(mean_K, shares_K * info.dev_weights_K * np.sqrt(variance_K))


def alignment(history: History, info: ClusterInfo, config: AscentConfig) -> Gradient:
    """g_k = h_k, the gradient dot products of the last run that has them, whitened over clusters.

    A surrogate with a bias that more runs do not remove (docs/cluster_ga.md, limits): a prior, not a measurement.
    """
    h_K = _whitened_alignment(history, info)
    return _flat(info) if h_K is None else Gradient(h_K, np.where(np.isnan(h_K), np.nan, 0.0))


def fit_fused(history: History, info: ClusterInfo, config: AscentConfig) -> ResponseFit:
    """Fit the responses twice: once alone, then with alignment as the prior means of the gains, beta h_k / v_k.

    beta is the least-squares slope of the first fit's v_k a_k on h_k, shrunk by their squared correlation, so that
    an alignment that disagrees with the measured gains is ignored.
    """
    runs = runs_of(history, info, config)
    alone = fit_responses(runs, noise_priors(config))
    h_K = _whitened_alignment(history, info)
    if h_K is None or len(info.cluster_ids) < 3:
        return alone
    return fit_responses(
        replace(runs, gain_shift_PK=gain_shift(alone, h_K[None], info.dev_weights_K[None])),
        noise_priors(config),
    )


def gain_shift(fit: ResponseFit, alignment_PK: np.ndarray, dev_weights_PK: np.ndarray) -> np.ndarray:
    """Prior means of the gains from alignments, (P, K); unknown alignments shift nothing."""
    num_clusters = dev_weights_PK.shape[1]
    h_PK = np.nan_to_num(alignment_PK, nan=0.0)
    h_PK = h_PK - h_PK.mean(1, keepdims=True)
    gains_PK = dev_weights_PK * fit.gains_PKL.sum(2)
    gains_PK = gains_PK - gains_PK.mean(1, keepdims=True)
    cross_P, square_P = (h_PK * gains_PK).sum(1), np.maximum((h_PK**2).sum(1), 1e-12)
    energy_P = np.maximum((gains_PK**2).sum(1), 1e-300)
    slope_P = np.maximum(cross_P, 0.0) / square_P * cross_P**2 / (square_P * energy_P)
    return slope_P[:, None] * h_PK / np.maximum(dev_weights_PK, 0.5 / num_clusters)


def _by_ascent(estimator: Estimator, runs_per_step: int, *, reads_gradients: bool = False) -> Method:
    return Method(
        propose=propose_by_ascent(estimator, runs_per_step),
        final=recommend_by_ascent(estimator, runs_per_step),
        reads_gradients=reads_gradients,
    )


METHODS: dict[str, Method] = {
    "response": Method(propose=propose_by_optimum(fit_history), final=recommend_by_optimum(fit_history)),
    "fused": Method(
        propose=propose_by_optimum(fit_fused), final=recommend_by_optimum(fit_fused), reads_gradients=True
    ),
    "response_ascent": _by_ascent(response, 2),
    "deficit": _by_ascent(deficit, 1),
    "excess": _by_ascent(excess, 1),
    "progress": _by_ascent(progress, 1),
    "spsa": _by_ascent(spsa, 2),
    "vector_spsa": _by_ascent(vector_spsa, 2),
    "alignment": _by_ascent(alignment, 1, reads_gradients=True),
}
"""Cluster-GA (`response`, the default) and its variants by name."""


def _last_scores(history: History, info: ClusterInfo, config: AscentConfig) -> tuple[np.ndarray, np.ndarray]:
    runs: Runs = runs_of(history[-1:], info, config)
    variance_K = runs.scene_var_PTK[0, 0] + SEED_SD**2 / runs.num_seeds_T[0]
    return runs.scores_PTK[0, 0], np.where(np.isnan(runs.scores_PTK[0, 0]), np.nan, np.sqrt(variance_K))


def _pairs(
    history: History, info: ClusterInfo, config: AscentConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score differences, log weight differences and their variances of complete pairs, each (Q, K)."""
    runs = runs_of(searched(history), info, config) if searched(history) else None
    num_pairs = 0 if runs is None else runs.shares_PTK.shape[1] // 2
    if runs is None or num_pairs == 0:
        empty_QK = np.zeros((0, len(info.cluster_ids)))
        return empty_QK, empty_QK, empty_QK
    first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    variance_TK = runs.scene_var_PTK[0] + SEED_SD**2 / runs.num_seeds_T[:, None]
    logs_TK = np.log(np.maximum(runs.shares_PTK[0], 1e-3))
    scores_TK = runs.scores_PTK[0]
    return (
        scores_TK[first] - scores_TK[second],
        logs_TK[first] - logs_TK[second],
        variance_TK[first] + variance_TK[second],
    )


def _power_slope(shares_T: np.ndarray, errors_T: np.ndarray) -> float:
    """alpha beta x^-alpha at the last known run, by least squares over the exponent grid; NaN if nothing is known."""
    known_T = ~np.isnan(errors_T)
    if not known_T.any():
        return float("nan")
    x_T, error_T = shares_T[known_T], errors_T[known_T]
    best_loss, best_slope = np.inf, 0.0
    for exponent in _EXPONENTS:
        power_T = x_T**-exponent
        centred_T = power_T - power_T.mean()
        square = float((centred_T**2).sum())
        beta = max(0.0, float(centred_T @ error_T) / square) if square > 1e-12 else 0.0
        loss = float((((error_T - error_T.mean()) - beta * centred_T) ** 2).sum())
        if loss < best_loss:
            best_loss, best_slope = loss, exponent * beta * float(power_T[-1])
    return best_slope


def _whitened_alignment(history: History, info: ClusterInfo) -> np.ndarray | None:
    """Alignments of the last run that recorded them, mean 0 and sd 1 over known clusters."""
    for obs in reversed(align_history(history, info)):
        h_K = obs.feedback.gradient_alignment_K
        if h_K is not None and not np.isnan(h_K).all():
            return (h_K - np.nanmean(h_K)) / max(float(np.nanstd(h_K)), 1e-12)
    return None


def _flat(info: ClusterInfo) -> Gradient:
    zeros_K = np.zeros(len(info.cluster_ids))
    return Gradient(zeros_K, zeros_K)
