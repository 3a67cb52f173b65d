"""Rules that regress the score on the mixture: RegMix and CLIMB.

Legend: K clusters, R runs, S simulated mixtures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autoscale_ray.mixture.baselines.signals import (
    Float64,
    method_of,
    objective,
    searched,
    shares,
    size_prior,
)
from autoscale_ray.mixture.problem import ClusterInfo, History

PRIOR_POWER, LEAST_STRENGTH, MOST_STRENGTH, MOST_REPEATS, LEAST_WEIGHT = 0.5, 0.1, 5.0, 15.0, 2e-4
NUM_SIMULATED, NUM_AVERAGED = 20_000, 100
"""Mixtures simulated for the optimum, and how many of the best RegMix averages."""
CLIMB_RANDOM_RUNS, CLIMB_LEAST_CANDIDATES = 4, 128
"""CLIMB's first wave is more than half of its runs; of ours the first four are drawn at random."""
PENALTIES = np.geomspace(1e-4, 1e2, 25)


def dirichlet_mixtures(prior_K: Float64, count: int, rng: np.random.Generator) -> Float64:
    """Draw mixtures around the size prior: w ~ Dirichlet(s p), p ~ prior^1/2, s log-uniform in [.1, 5].

    Weights below 2e-4 become 0; mixtures that repeat a cluster more than 15 times its prior share are drawn
    again, and cut where that keeps failing (Liu et al. 2024, RegMix, arXiv 2407.01492).

    Args:
        prior_K: Shares of the pool.
        count: S.
        rng: Source of the draws.

    Returns:
        S x K.
    """
    soft_K = prior_K**PRIOR_POWER / (prior_K**PRIOR_POWER).sum()
    most_K = np.where(prior_K > 0, np.minimum(MOST_REPEATS * prior_K, 1.0), 0.0)
    kept: list[Float64] = []
    num_kept = 0
    for attempt in range(20):
        strength_S1 = np.exp(rng.uniform(np.log(LEAST_STRENGTH), np.log(MOST_STRENGTH), (2 * count, 1)))
        gamma_SK = rng.standard_gamma(np.maximum(strength_S1 * soft_K, 1e-3))
        weights_SK = _tidied(gamma_SK * (prior_K > 0) + 1e-300 * (prior_K > 0))
        is_last = attempt == 19
        weights_SK = _tidied(np.minimum(weights_SK, most_K)) if is_last else weights_SK
        allowed_S = np.ones(len(weights_SK), bool) if is_last else (weights_SK <= most_K + 1e-12).all(axis=1)
        kept.append(weights_SK[allowed_S])
        num_kept += int(allowed_S.sum())
        if num_kept >= count:
            break
    return np.concatenate(kept)[:count]


def _tidied(weights_SK: Float64) -> Float64:
    weights_SK = weights_SK / weights_SK.sum(axis=1, keepdims=True)
    weights_SK = np.where(weights_SK < LEAST_WEIGHT, 0.0, weights_SK)
    return weights_SK / weights_SK.sum(axis=1, keepdims=True)


def ridge(mixtures_RK: Float64, scores_R: Float64, penalty: float) -> tuple[Float64, float]:
    """Fit y = b.(w - mean w) + mean y with penalty |b|^2 and return (b, intercept at w = 0).

    Args:
        mixtures_RK: Mixtures.
        scores_R: Scores.
        penalty: Ridge > 0.
    """
    centre_K, mean = mixtures_RK.mean(axis=0), float(scores_R.mean())
    centred_RK = mixtures_RK - centre_K
    gram_RR = centred_RK @ centred_RK.T + penalty * np.eye(len(scores_R))
    slope_K = centred_RK.T @ np.linalg.solve(gram_RR, scores_R - mean)
    return slope_K, mean - float(slope_K @ centre_K)


def left_out_error(mixtures_RK: Float64, scores_R: Float64, penalty: float) -> float:
    """Return the sum of squared leave-one-out errors of `ridge`: residual / (1 - leverage), exact for ridge.

    Args:
        mixtures_RK: Mixtures.
        scores_R: Scores.
        penalty: Ridge > 0.
    """
    count = len(scores_R)
    centred_RK = mixtures_RK - mixtures_RK.mean(axis=0)
    gram_RR = centred_RK @ centred_RK.T
    hat_RR = np.linalg.solve(gram_RR + penalty * np.eye(count), gram_RR) + 1 / count
    residual_R = scores_R - hat_RR.T @ scores_R
    return float(((residual_R / np.maximum(1 - np.diag(hat_RR), 1e-12)) ** 2).sum())


def chosen_penalty(mixtures_RK: Float64, scores_R: Float64) -> float:
    """Return the ridge penalty of least leave-one-out error, the larger one at a tie or with under three runs.

    Args:
        mixtures_RK: Mixtures.
        scores_R: Scores.
    """
    if len(scores_R) < 3:
        return float(PENALTIES[-1])
    return float(min(reversed(PENALTIES), key=lambda penalty: left_out_error(mixtures_RK, scores_R, penalty)))


def propose_at_random(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Propose the next random mixture of RegMix's design; the run index and the seed fix the draw."""
    rng = np.random.default_rng([getattr(config, "seed", 0), len(searched(history))])
    return _named_draws(info, 1, rng)[0]


def propose_near_best(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Propose at random first, then among the max(n^2, 128) best of 1,024 mixtures by the fit so far."""
    runs = searched(history)
    if len(runs) < CLIMB_RANDOM_RUNS:
        return propose_at_random(history, info, config)
    rng = np.random.default_rng([getattr(config, "seed", 0), len(runs)])
    drawn_SK = _named_draws(info, 1024, rng)
    best_S = np.argsort(-_predicted(history, info, drawn_SK), kind="stable")
    num_candidates = min(max(len(runs) ** 2, CLIMB_LEAST_CANDIDATES), len(drawn_SK))
    return drawn_SK[best_S[rng.integers(num_candidates)]]


def regmix(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Return the mean of the 100 best of 20,000 simulated mixtures by ridge regression on the runs so far.

    RegMix regresses with LightGBM on hundreds of runs; with at most some tens a tree of five scenes a leaf
    predicts a constant, so the linear model, which RegMix compares with, is used.
    """
    if not searched(history):
        return size_prior(info)
    drawn_SK = _named_draws(info, NUM_SIMULATED, np.random.default_rng([getattr(config, "seed", 0), 1 << 20]))
    best_S = np.argsort(-_predicted(history, info, drawn_SK), kind="stable")[:NUM_AVERAGED]
    return drawn_SK[best_S].mean(axis=0)


def climb(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Return the best of 20,000 simulated mixtures by the same regression: CLIMB's last wave keeps one."""
    if not searched(history):
        return size_prior(info)
    drawn_SK = _named_draws(info, NUM_SIMULATED, np.random.default_rng([getattr(config, "seed", 0), 1 << 20]))
    return drawn_SK[int(np.argmax(_predicted(history, info, drawn_SK)))]


def _named_draws(info: ClusterInfo, count: int, rng: np.random.Generator) -> Float64:
    """Draw in the order of names and return in that of `info`: the order of clusters must not matter."""
    by_name = np.argsort(np.array(info.cluster_ids))
    draws_SK = np.empty((count, len(by_name)))
    draws_SK[:, by_name] = dirichlet_mixtures(size_prior(info)[by_name], count, rng)
    return draws_SK


def _predicted(history: History, info: ClusterInfo, mixtures_SK: Float64) -> Float64:
    runs = [run for run in searched(history) if np.isfinite(objective(run, info))]
    if not runs:
        return np.zeros(len(mixtures_SK))
    mixtures_RK = np.array([shares(run) for run in runs])
    scores_R = np.array([objective(run, info) for run in runs])
    slope_K, intercept = ridge(mixtures_RK, scores_R, chosen_penalty(mixtures_RK, scores_R))
    return mixtures_SK @ slope_K + intercept


REGMIX = method_of(propose_at_random, regmix)
CLIMB = method_of(propose_near_best, climb)
