"""Cluster-GA: which mixture to train next and which to recommend, from the runs so far.

Two ascents share one interface:

- *posterior optimum* (the default): fit the response curves, explore in strong antithetic pairs recentred on the
  fitted optimum, recommend the optimum of the posterior mean, moved to the null as far as the null is believed;
- *mirror ascent* for estimators that give a gradient only: w' ~ w e^(eta g) with the step bounded in
  Kullback-Leibler divergence, noisy gradients shrunk, a floor toward the size prior, and a gate that takes back a
  step that a paired bound calls harmful.

Neither recommends the luckiest run: with noise of half a point a run, the best of ten is mostly luck.
All functions are pure in the history. Shape legend: P problems, T runs, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autoscale_ray.config import AscentConfig
from autoscale_ray.mixture.allocation import waterfill
from autoscale_ray.mixture.design import balanced_signs, perturbed, step_size
from autoscale_ray.mixture.optimum import posterior_optimum, predicted_objective
from autoscale_ray.mixture.problem import (
    ClusterInfo,
    History,
    Observation,
    Weights,
    align_history,
    as_weights,
)
from autoscale_ray.mixture.response import NoisePriors, ResponseFit, Runs, fit_responses


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """Estimated gain of the objective per unit of log weight; NaN = unknown for that cluster."""

    mean_K: np.ndarray
    sd_K: np.ndarray


Estimator = Callable[[History, ClusterInfo, AscentConfig], Gradient]
Fitter = Callable[[History, ClusterInfo, AscentConfig], ResponseFit]


def uniform_share(info: ClusterInfo) -> float:
    """Scenes of one cluster when the budget of the runs (or the whole pool, if smaller) is split evenly.

    The unit of responses and their priors, so it stays what it was in the search when another budget is asked for.
    """
    budget = info.budget if info.search_budget is None else info.search_budget
    return min(budget, float(info.pool_sizes_K.sum())) / len(info.cluster_ids)


def caps_in_shares(info: ClusterInfo) -> np.ndarray:
    """Pool sizes (1, K) in uniform shares."""
    return info.pool_sizes_K[None] / uniform_share(info)


def start_weights(info: ClusterInfo) -> np.ndarray:
    """Uniform mixture under the pool caps (K,), sum 1."""
    shares_K = waterfill(
        np.ones(len(info.cluster_ids)), caps_in_shares(info)[0], float(len(info.cluster_ids))
    )
    return shares_K / shares_K.sum()


def runs_of(history: History, info: ClusterInfo, config: AscentConfig) -> Runs:
    """Arrays (P = 1) of a history, aligned by cluster name.

    All runs are scored on one dev set, so a cluster has one variance, the mean over its runs. The error of equal
    scores is 0 by the formula and not known to be: no variance is below that of a share of which n in n were seen
    (Jeffreys' prior).
    """
    aligned = align_history(history, info)
    dev_counts_K = np.where(info.dev_counts_K > 0, info.dev_counts_K, np.nan)
    scene_var_K = config.scene_sd**2 / dev_counts_K
    least_K = 0.5 / ((dev_counts_K + 1) * (dev_counts_K + 2))
    variances = [np.where(np.isnan(obs.score_se_K), scene_var_K, obs.score_se_K**2) for obs in aligned]
    variance_TK = np.maximum(np.mean(variances, axis=0, keepdims=True), least_K).repeat(len(aligned), axis=0)
    scores_TK = np.array([obs.scores_K for obs in aligned])
    counts_TK = np.array([obs.counts_K for obs in aligned])
    if config.exposure == "steps":
        full = uniform_share(info) * len(info.cluster_ids)
        counts_TK = extra_visits(counts_TK, info.real_counts_K, full)
    return Runs(
        shares_PTK=counts_TK[None] / uniform_share(info),
        scores_PTK=np.where(np.isnan(variance_TK), np.nan, scores_TK)[None],
        scene_var_PTK=np.nan_to_num(variance_TK, nan=1.0)[None],
        num_seeds_T=np.array([obs.num_seeds for obs in aligned]),
        is_real_only_T=np.array([obs.is_real_only for obs in aligned]),
    )


def extra_visits(counts: np.ndarray, real: np.ndarray, budget: float | np.ndarray) -> np.ndarray:
    """Scenes that would give each cluster the visits it gets from the fixed steps of a run at the full budget.

    x_k = (R_k + n_k) (N_R + B) / (N_R + sum n) - R_k: the count itself at the full budget, and R_k B / N_R in the
    real-only run, whose steps all go to real scenes; docs/cluster_ga.md, the response model, exposure.

    Args:
        counts: (..., K) synthetic scenes.
        real: Real scenes per cluster, broadcast against ``counts``.
        budget: Synthetic scenes of a full run.

    Returns:
        (..., K) equivalent scenes, >= 0.
    """
    num_real = real.sum(-1, keepdims=True)
    trained = num_real + counts.sum(-1, keepdims=True)
    visits = (real + counts) * (num_real + budget) / np.maximum(trained, 1e-300)
    return np.where(trained > 0, np.maximum(visits - real, 0.0), counts)


def noise_priors(config: AscentConfig) -> NoisePriors:
    """Offset and null priors of a config."""
    return NoisePriors(
        offset_sd=config.offset_sd,
        offset_real_only_sd=config.offset_real_only_sd,
        null_prior=config.null_prior,
    )


def fit_history(history: History, info: ClusterInfo, config: AscentConfig) -> ResponseFit:
    """Fit the response curves to a history (P = 1)."""
    return fit_responses(runs_of(history, info, config), noise_priors(config))


def searched(history: History) -> History:
    """Return the runs that trained on synthetic scenes."""
    return tuple(obs for obs in history if not obs.is_real_only)


def propose_by_optimum(fitter: Fitter) -> Callable[[History, ClusterInfo, AscentConfig], Weights]:
    """Build the proposal rule: antithetic pairs around the posterior optimum of the runs before the pair."""

    def propose(history: History, info: ClusterInfo, config: AscentConfig) -> Weights:
        num_done = len(searched(history))
        pair, is_second = divmod(num_done, 2)
        before = _before_pair(history, num_done - is_second)
        centre_K = _optimum(fitter, before, info, config, config.floor_explore, guard=False)
        signs_K = balanced_signs(info.cluster_ids, config.seed, pair) * (-1.0 if is_second else 1.0)
        total = float(len(info.cluster_ids))
        step = step_size(config.perturbation, config.perturbation_decay, pair)
        shares_K = perturbed(centre_K, signs_K, step, caps_in_shares(info)[0], total)
        return as_weights(shares_K / shares_K.sum(), info)

    return propose


def recommend_by_optimum(fitter: Fitter) -> Callable[[History, ClusterInfo, AscentConfig], Weights]:
    """Build the final rule: the posterior optimum of all runs, guarded by the null."""

    def recommend(history: History, info: ClusterInfo, config: AscentConfig) -> Weights:
        shares_K = _optimum(fitter, history, info, config, config.floor_final, guard=True)
        return as_weights(shares_K / shares_K.sum(), info)

    return recommend


def _optimum(
    fitter: Fitter, history: History, info: ClusterInfo, config: AscentConfig, floor: float, *, guard: bool
) -> np.ndarray:
    if not searched(history):
        return start_weights(info) * len(info.cluster_ids)
    fit = fitter(history, info, config)
    weights_1K, caps_1K, total = (
        info.dev_weights_K[None],
        caps_in_shares(info),
        info.budget / uniform_share(info),
    )
    return posterior_optimum(fit, weights_1K, caps_1K, total, floor, guard=guard)[0]


def _before_pair(history: History, num_searched: int) -> History:
    """Return the history without the runs of the pair in progress."""
    kept: list[Observation] = []
    left = num_searched
    for obs in history:
        if obs.is_real_only or left > 0:
            kept.append(obs)
            left -= 0 if obs.is_real_only else 1
    return tuple(kept)


def shrink(gradient: Gradient, kappa: float) -> np.ndarray:
    """Positive-part shrinkage g max(0, 1 - (kappa sd / |g|)^2); an unknown entry is 0 (no move), (K,)."""
    mean_K = np.nan_to_num(gradient.mean_K, nan=0.0)
    sd_K = np.where(np.isnan(gradient.sd_K), 0.0, gradient.sd_K)
    ratio_K = np.divide(kappa * sd_K, np.abs(mean_K), out=np.full(mean_K.shape, np.inf), where=mean_K != 0)
    return mean_K * np.maximum(0.0, 1.0 - np.minimum(ratio_K, 1.0) ** 2)


def mirror_step(weights_K: np.ndarray, gradient_K: np.ndarray, radius: float) -> np.ndarray:
    """Move w' ~ w e^(eta g) with eta by bisection so that KL(w' || w) = radius.

    docs/cluster_ga.md, mirror ascent. A flat gradient moves nothing; one whose limit lies inside the radius moves as
    far as the bisection range allows. Weights stay on the simplex.

    Args:
        weights_K: Current weights, sum 1.
        gradient_K: Gradient; only its shape matters, not its scale.
        radius: Trust region in nats, >= 0.
    """
    centred_K = gradient_K - weights_K @ gradient_K
    scale = np.abs(centred_K[weights_K > 0]).max()
    if scale <= 1e-15 or radius <= 0:
        return weights_K
    low, high = 0.0, 1e4 / scale
    for _ in range(100):
        middle = (low + high) / 2
        if divergence(_tilted(weights_K, middle * centred_K), weights_K) < radius:
            low = middle
        else:
            high = middle
    return _tilted(weights_K, low * centred_K)


def _tilted(weights_K: np.ndarray, exponents_K: np.ndarray) -> np.ndarray:
    top = exponents_K[weights_K > 0].max()
    tilted_K = np.where(weights_K > 0, weights_K * np.exp(np.minimum(exponents_K - top, 0.0)), 0.0)
    return tilted_K / tilted_K.sum()


def divergence(weights_K: np.ndarray, reference_K: np.ndarray) -> float:
    """KL(w || reference) in nats; a zero weight adds nothing."""
    positive_K = weights_K > 0
    return float((weights_K[positive_K] * np.log(weights_K[positive_K] / reference_K[positive_K])).sum())


def root_size_prior(info: ClusterInfo) -> np.ndarray:
    """Square root of the pool sizes, scaled to sum 1: the mixture the floor pulls to."""
    root_K = np.sqrt(info.pool_sizes_K)
    return root_K / root_K.sum()


def ascend(
    history: History, info: ClusterInfo, config: AscentConfig, estimator: Estimator, runs_per_step: int
) -> tuple[np.ndarray, float]:
    """Replay mirror ascent over a history.

    One step follows every ``runs_per_step`` runs on synthetic scenes (2 = an antithetic pair). With one run a step,
    a step whose paired difference to the run before has a lower bound under minus the tolerance is taken back, and
    the radius halved.

    Returns:
        Weights after the last run (K,), sum 1, and the trust radius left.
    """
    weights_K = start_weights(info)
    before_K, radius, prior_K = weights_K, config.trust_radius, root_size_prior(info)
    for num_done in range(runs_per_step, len(searched(history)) + 1, runs_per_step):
        seen = _before_pair(history, num_done)
        if runs_per_step == 1 and _is_harmful(searched(seen), info, config):
            weights_K, radius = before_K, radius / 2
            continue
        gradient_K = shrink(estimator(seen, info, config), config.shrinkage)
        before_K = weights_K
        moved_K = mirror_step(weights_K, gradient_K, radius)
        weights_K = (1 - config.prior_share) * moved_K + config.prior_share * prior_K
        weights_K = _under_caps(weights_K, info)
    return weights_K, radius


def propose_by_ascent(estimator: Estimator, runs_per_step: int) -> Callable[..., Weights]:
    """Build the proposal rule of mirror ascent: the iterate, or an antithetic pair around it."""

    def propose(history: History, info: ClusterInfo, config: AscentConfig) -> Weights:
        weights_K, _ = ascend(history, info, config, estimator, runs_per_step)
        if runs_per_step == 1:
            return as_weights(weights_K, info)
        pair, is_second = divmod(len(searched(history)), 2)
        signs_K = balanced_signs(info.cluster_ids, config.seed, pair) * (-1.0 if is_second else 1.0)
        total = float(len(info.cluster_ids))
        step = step_size(config.perturbation / 2, config.perturbation_decay, pair)
        shares_K = perturbed(weights_K, signs_K, step, caps_in_shares(info)[0], total)
        return as_weights(shares_K / shares_K.sum(), info)

    return propose


def recommend_by_ascent(estimator: Estimator, runs_per_step: int) -> Callable[..., Weights]:
    """Build the final rule of mirror ascent: the last iterate, never the best run seen."""

    def recommend(history: History, info: ClusterInfo, config: AscentConfig) -> Weights:
        return as_weights(ascend(history, info, config, estimator, runs_per_step)[0], info)

    return recommend


def nothing_to_gain(history: History, info: ClusterInfo, config: AscentConfig) -> bool:
    """Say whether the search should stop: after two pairs, and never inside one.

    True when the posterior-mean gain of the optimum over the mixture explored last is below the standard error of one
    run's objective, so that another pair cannot be expected to show a difference.
    """
    num_done = len(searched(history))
    if num_done < 4 or num_done % 2:
        return False
    fit = fit_history(history, info, config)
    centre_K = _optimum(
        fit_history, _before_pair(history, num_done - 2), info, config, config.floor_explore, guard=False
    )
    best_K = _optimum(fit_history, history, info, config, config.floor_explore, guard=False)
    pair_PSK = np.stack([centre_K, best_K])[None]
    worst, best = predicted_objective(fit, info.dev_weights_K[None], pair_PSK)[0]
    run_sd = np.sqrt(
        objective_variance(searched(history)[-1], info, config)
        + fit.noise_var_P[0] / searched(history)[-1].num_seeds * (info.dev_weights_K**2).sum()
    )
    return bool(best - worst < run_sd)


def objective_variance(obs: Observation, info: ClusterInfo, config: AscentConfig) -> float:
    """Variance of sum_k v_k y_k from dev scenes, over the clusters with a known score."""
    runs = runs_of((obs,), info, config)
    known_K = ~np.isnan(runs.scores_PTK[0, 0])
    return float((info.dev_weights_K**2 * runs.scene_var_PTK[0, 0])[known_K].sum())


def _is_harmful(runs: History, info: ClusterInfo, config: AscentConfig) -> bool:
    """Whether the last run is worse than the one before by more than the gate allows."""
    if len(runs) < 2:
        return False
    before, after = align_history(runs[-2:], info)
    known_K = ~np.isnan(before.scores_K) & ~np.isnan(after.scores_K)
    difference = float((info.dev_weights_K * (after.scores_K - before.scores_K))[known_K].sum())
    error = np.sqrt(objective_variance(before, info, config) + objective_variance(after, info, config))
    return difference - config.gate_sd * error < -config.gate_tolerance and difference < 0


def _under_caps(weights_K: np.ndarray, info: ClusterInfo) -> np.ndarray:
    shares_K = waterfill(weights_K, caps_in_shares(info)[0], float(len(weights_K)))
    return shares_K / shares_K.sum()
