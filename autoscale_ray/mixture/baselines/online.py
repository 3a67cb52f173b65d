"""Rules that move weights with the loss or the gradient: Group DRO, DoReMi, Re-Mix, DoGE, ODM.

Each has its published step as a function of arrays and a replay of that step over the history.
Legend: K clusters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autoscale_ray.mixture.baselines.signals import (
    STEPS_PER_ROUND,
    Float64,
    end_losses,
    loss_steps,
    method_of,
    needs,
    on_simplex,
    searched,
    size_prior,
    uniform,
)
from autoscale_ray.mixture.problem import ClusterInfo, History

GROUP_DRO_STEP = 0.01
DOREMI_STEP, DOREMI_SMOOTHING = 1.0, 1e-3
REMIX_STEP, REMIX_SMOOTHING, REMIX_FLOOR = 0.2, 0.05, 0.01
DOGE_MU, DOGE_LEARNING_RATE, DOGE_CLIP = 0.05, 5e-4, 5.0
DOGE_MAX_NORM = 1.0
"""Norm that the authors' trainer clips the gradient of every domain to (the default of its library)."""


def group_dro_step(
    weights_K: Float64,
    losses_K: Float64,
    counts_K: Float64,
    step: float = GROUP_DRO_STEP,
    margin: float = 0.0,
) -> Float64:
    """Take one step of Group DRO: q_g <- q_g exp(step (l_g + C / sqrt(n_g))) / Z.

    Sagawa et al. 2020, arXiv 1911.08731, algorithm 1; kohpangwei/group_DRO, loss.py.

    Args:
        weights_K: q on the simplex.
        losses_K: Group losses.
        counts_K: Training scenes of each group, for the size-adjusted margin.
        step: Step size.
        margin: C >= 0.
    """
    adjusted_K = losses_K + margin / np.sqrt(np.maximum(counts_K, 1.0))
    return on_simplex(weights_K * np.exp(step * (adjusted_K - adjusted_K.max())))


def excess_loss_step(
    weights_K: Float64, excess_K: Float64, prior_K: Float64, step: float, smoothing: float
) -> Float64:
    """Take one step of DoReMi or Re-Mix: a <- softmax(log a + step max(excess, 0)), a <- (1-c) a + c prior.

    Xie et al. 2023, arXiv 2305.10429, algorithm 1 (prior uniform); Re-Mix, Hejna et al. 2024, arXiv
    2408.14037 (prior = sizes).

    Args:
        weights_K: a on the simplex.
        excess_K: Loss minus loss of the reference model.
        prior_K: What the smoothing pulls toward, on the simplex.
        step: Step size.
        smoothing: c in [0, 1].
    """
    gain_K = step * np.maximum(excess_K, 0)
    moved_K = on_simplex(weights_K * np.exp(gain_K - gain_K.max()))
    return (1 - smoothing) * moved_K + smoothing * prior_K


def doge_scores(gram_KK: Float64, learning_rate: float = DOGE_LEARNING_RATE) -> Float64:
    """Return DoGE's generalisation scores: W_i = lr (sum_j g_i.g_j - |g_i|^2) / mean |g|, cut to [0, 5] lr.

    Fan et al. 2024, arXiv 2310.15393; Olivia-fsm/DoGE 88400e9, src/trainer.py (universal
    generalisation, gradients clipped to norm 1 before they are multiplied).

    Args:
        gram_KK: Dot products of the domains' gradients.
        learning_rate: lr of the proxy.
    """
    clip_K = np.minimum(1.0, DOGE_MAX_NORM / np.maximum(np.sqrt(np.diag(gram_KK)), 1e-12))
    gram_KK = clip_K[:, None] * gram_KK * clip_K
    squares_K = np.diag(gram_KK)
    raw_K = learning_rate * (gram_KK.sum(axis=1) - squares_K) / max(float(np.sqrt(squares_K).mean()), 1e-12)
    return np.clip(raw_K, 0.0, DOGE_CLIP * learning_rate)


def doge_step(weights_K: Float64, scores_K: Float64, mu: float = DOGE_MU) -> Float64:
    """Take one mirror step of DoGE: log w <- log w + W / mu, normalised.

    Args:
        weights_K: w on the simplex.
        scores_K: From `doge_scores`.
        mu: Bregman coefficient.
    """
    return on_simplex(weights_K * np.exp((scores_K - scores_K.max()) / mu))


def exp3_policy(totals_K: Float64, step: int) -> Float64:
    """Return ODM's mixture: pi_i = (1 - K e_t) exp(e_{t-1} R_i) / sum_j exp(e_{t-1} R_j) + e_t.

    e_t = min(1/K, sqrt(log K / (K t))), e_0 = 1/K.

    Args:
        totals_K: R.
        step: t >= 1.
    """
    count = len(totals_K)
    rate, previous = (
        min(1 / count, math.sqrt(math.log(count) / (count * t))) if t > 0 else 1 / count
        for t in (step, step - 1)
    )
    return (1 - count * rate) * on_simplex(np.exp(previous * (totals_K - totals_K.max()))) + rate


def group_dro(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Replay Group DRO from equal weights."""
    weights_K = uniform(info)
    for losses_K in loss_steps(history):
        weights_K = group_dro_step(weights_K, losses_K, info.real_counts_K)
    return weights_K


def _excess_steps(history: History) -> Float64:
    """Return steps x K losses above the reference, which is the first run with synthetic scenes."""
    runs = searched(history)
    if not runs:
        return np.zeros((0, 0))
    return loss_steps(runs)[STEPS_PER_ROUND:] - end_losses(runs[:1])


def _excess_path(
    history: History, start_K: Float64, prior_K: Float64, step: float, smoothing: float
) -> Float64:
    path = [start_K]
    for excess_K in _excess_steps(history):
        path.append(excess_loss_step(path[-1], excess_K, prior_K, step, smoothing))
    return np.array(path)


def _doremi_path(history: History, info: ClusterInfo) -> Float64:
    return _excess_path(history, uniform(info), uniform(info), DOREMI_STEP, DOREMI_SMOOTHING)


def _remix_path(history: History, info: ClusterInfo) -> Float64:
    prior_K = size_prior(info)
    start_K = on_simplex(np.maximum(prior_K, REMIX_FLOOR))
    return _excess_path(history, start_K, prior_K, REMIX_STEP, REMIX_SMOOTHING)


def doremi(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Replay DoReMi; the first run trains the reference on the pool as it is."""
    return _doremi_path(history, info)[-1] if searched(history) else size_prior(info)


def doremi_average(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Return the mean of DoReMi's weights over all steps, which it recommends."""
    return _doremi_path(history, info).mean(axis=0)


def remix(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Replay Re-Mix; the first run trains the reference on the pool as it is."""
    return _remix_path(history, info)[-1] if searched(history) else size_prior(info)


def remix_average(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Return the mean of Re-Mix's weights over all steps, which it recommends."""
    return _remix_path(history, info).mean(axis=0)


def _doge_path(history: History, info: ClusterInfo) -> Float64:
    path = [uniform(info)]
    for run in searched(history):
        gram_KK = needs(run.feedback.gradient_gram_KK, "doge", "Feedback.gradient_gram_KK")
        scores_K = doge_scores(np.nan_to_num(gram_KK))
        for _ in range(STEPS_PER_ROUND):
            path.append(doge_step(path[-1], scores_K))
    return np.array(path)


def doge(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Replay DoGE.

    Raises:
        InvalidInputError: A run recorded no gradient: no other signal can stand for it.
    """
    return _doge_path(history, info)[-1]


def doge_average(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Return the mean of DoGE's weights over all steps, which it recommends."""
    return _doge_path(history, info).mean(axis=0)


def odm(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Replay ODM with the expected reward of every pull.

    An arm drawn with probability pi_i and credited r / pi_i gains r on average, so that a step adds the loss
    itself. Losses are cut to [0, 1]; the code's division by 10 brings nats there and is not needed for 1 -
    score.
    """
    rows = loss_steps(history)
    if len(rows) == 0:
        return uniform(info)
    return exp3_policy(np.clip(rows, 0, 1).sum(axis=0), len(rows))


GROUP_DRO = method_of(group_dro, group_dro)
DOREMI = method_of(doremi, doremi_average)
REMIX = method_of(remix, remix_average)
DOGE = method_of(doge, doge_average, reads_gradients=True)
ODM = method_of(odm, odm)
