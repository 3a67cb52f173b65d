"""Rules that fit a learning curve to every cluster: ADO and MOSAIC.

Legend: K clusters, R runs, P points of one curve.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from autoscale_ray.mixture.baselines.signals import (
    STEPS_PER_ROUND,
    Float64,
    method_of,
    on_simplex,
    probe_one_cluster,
    searched,
    seeded_order,
    shares,
    size_prior,
)
from autoscale_ray.mixture.problem import ClusterInfo, History

ADO_LEAST_EXPONENT, ADO_MOST_EXPONENT, ADO_LEAST_SHARE, ADO_KEPT = 0.05, 0.8, 1e-2, 0.9
ADO_HUBER = 1e-3
PILOT_LEVELS = (0.25, 1.0, 4.0)
"""Scenes of a cluster in a MOSAIC pilot, in units of budget / K; a ladder wide enough to see a curve bend."""
GREEDY_STEPS = 2_000
"""Steps in which MOSAIC's greedy choice spends the budget; one scene a step where the budget is smaller."""


def power_law(counts_P: Float64, losses_P: Float64) -> tuple[float, float]:
    """Fit L(n) = E + b n^-a and return (E, a).

    Least Huber loss (delta 1e-3) of log L, as in ADO (Jiang et al. 2024, arXiv 2410.11820). The
    published fit starts LBFGS from 512 points; here E and a run over a finer grid and b is the median that
    they imply, which is fast and has one value. a is kept in [0.05, 0.8], the published bounds.

    Args:
        counts_P: Scenes seen, > 0.
        losses_P: Losses, > 0.
    """
    log_n_P, log_loss_P = np.log(counts_P), np.log(losses_P)
    floors = losses_P.min() * np.append(np.linspace(0, 0.95, 20), 0.99)
    exponents = np.linspace(ADO_LEAST_EXPONENT, ADO_MOST_EXPONENT, 31)
    floor_GP, exponent_GP = (grid.reshape(-1, 1) for grid in np.meshgrid(floors, exponents, indexing="ij"))
    log_b_GP = np.median(np.log(losses_P - floor_GP) + exponent_GP * log_n_P, axis=1, keepdims=True)
    residual_GP = np.abs(
        np.logaddexp(np.log(floor_GP + 1e-300), log_b_GP - exponent_GP * log_n_P) - log_loss_P
    )
    huber_GP = np.where(
        residual_GP > ADO_HUBER, ADO_HUBER * (residual_GP - 0.5 * ADO_HUBER), 0.5 * residual_GP**2
    )
    best = int(np.argmin(huber_GP.sum(axis=1)))
    return float(floor_GP[best, 0]), float(exponent_GP[best, 0])


def ado_preference(prior_K: Float64, slopes_K: Float64, credit_K: Float64) -> Float64:
    """Return ADO's preference: r ~ prior slope (h (1 - h))^1/2, no share below 1 %.

    Jiang et al. 2024; yidingjiang/ado 731863d, ado.py (the code's credit h (1 - h), where the
    paper has h).

    Args:
        prior_K: Shares of the pool.
        slopes_K: a (L - E) / n, >= 0.
        credit_K: h, smoothed share of each domain in what was trained on.
    """
    raw_K = on_simplex(prior_K * slopes_K * np.sqrt(credit_K * (1 - credit_K)))
    return on_simplex(np.maximum(raw_K, ADO_LEAST_SHARE))


def ado_step(average_K: Float64, preference_K: Float64, step: int) -> tuple[Float64, Float64]:
    """Take one step of ADO: p = .9 p_avg + .1 r, then p_avg <- (1 - 1/(t+1)) p_avg + r / (t+1).

    Args:
        average_K: p_avg.
        preference_K: r.
        step: t >= 1.

    Returns:
        The mixture p and the new p_avg.
    """
    mixture_K = ADO_KEPT * average_K + (1 - ADO_KEPT) * preference_K
    return mixture_K, (1 - 1 / (step + 1)) * average_K + preference_K / (step + 1)


def ado(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Replay ADO: one law for each cluster from the runs so far, over real + synthetic scenes of the cluster.

    A cluster seen at one size only has no law and takes the mean slope of the others; before any cluster has
    one the mixture is the prior.
    """
    prior_K = size_prior(info)
    average_K, credit_K, mixture_K = prior_K, prior_K, prior_K
    for last in range(len(history)):
        seen = history[: last + 1]
        if history[last].counts_K.sum() > 0:
            credit_K = ADO_KEPT * credit_K + (1 - ADO_KEPT) * shares(history[last])
        slopes_K = _slopes(seen, info)
        if slopes_K is None:
            continue
        preference_K = ado_preference(prior_K, slopes_K, credit_K)
        for step in range(last * STEPS_PER_ROUND + 1, (last + 1) * STEPS_PER_ROUND + 1):
            mixture_K, average_K = ado_step(average_K, preference_K, step)
    return mixture_K


def ado_proposal(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Propose ADO's mixture; the first two runs halve and double clusters, so that curves exist."""
    runs = searched(history)
    if len(runs) >= 2:
        return ado(history, info, config)
    place = seeded_order(info, config)
    sign_K = np.array([1 if (place[name] + len(runs)) % 2 else -1 for name in info.cluster_ids])
    return size_prior(info) * 2.0**sign_K


def _slopes(history: History, info: ClusterInfo) -> Float64 | None:
    slopes_K = np.full(len(info.cluster_ids), np.nan)
    for cluster in range(len(slopes_K)):
        counts_P, losses_P = _curve_points(history, info, cluster)
        if len(np.unique(counts_P)) >= 2:
            floor, exponent = power_law(counts_P, losses_P)
            slopes_K[cluster] = exponent * (losses_P[-1] - floor) / counts_P[-1]
    known_K = np.isfinite(slopes_K)
    return np.where(known_K, slopes_K, slopes_K[known_K].mean()) if known_K.any() else None


def _curve_points(history: History, info: ClusterInfo, cluster: int) -> tuple[Float64, Float64]:
    """Return scenes seen (>= 1) and losses (>= 1e-4) of a cluster in the runs that scored it."""
    known = [run for run in history if np.isfinite(run.scores_K[cluster])]
    counts_P = np.array([info.real_counts_K[cluster] + run.counts_K[cluster] for run in known])
    losses_P = np.array([1 - run.scores_K[cluster] for run in known])
    return np.maximum(counts_P, 1.0), np.maximum(losses_P, 1e-4)


def saturating_gain(counts_P: Float64, scores_P: Float64, unit: float) -> tuple[float, float]:
    """Fit y = u + a (1 - exp(-n / tau)) with a >= 0 by least squares and return (a, tau).

    MOSAIC, arXiv 2604.08366, its law of gain for each domain; tau over a grid, u and a in closed form.

    Args:
        counts_P: Scenes of the domain in each pilot.
        scores_P: Its scores.
        unit: Scenes of an equal share, which scales the grid of tau.
    """
    best = (np.inf, 0.0, unit)
    for tau in unit * np.geomspace(0.05, 20, 61):
        curve_P = 1 - np.exp(-counts_P / tau)
        spread_P = curve_P - curve_P.mean()
        variance = float(spread_P @ spread_P)
        gain = max(float(spread_P @ scores_P) / variance, 0.0) if variance > 1e-12 else 0.0
        residual_P = scores_P - scores_P.mean() - gain * spread_P
        best = min(best, (float(residual_P @ residual_P), gain, float(tau)))
    return best[1], best[2]


def greedy_counts(gains_K: Float64, taus_K: Float64, caps_K: Float64, budget: int, chunk: int = 1) -> Float64:
    """Spend a budget scene by scene on the domain of largest marginal gain, a (e^(-n/tau) - e^(-(n+1)/tau)).

    MOSAIC's greedy choice; equal gains go to the first domain.

    Args:
        gains_K: a >= 0.
        taus_K: tau > 0.
        caps_K: Scenes there are.
        budget: Scenes to spend.
        chunk: Scenes a step.
    """
    counts_K = np.zeros(len(gains_K))

    def entry(domain: int) -> tuple[float, int]:
        have, tau = counts_K[domain], taus_K[domain]
        return -gains_K[domain] * (np.exp(-have / tau) - np.exp(-(have + chunk) / tau)) / chunk, domain

    heap = [entry(domain) for domain in range(len(gains_K)) if caps_K[domain] > 0]
    heapq.heapify(heap)
    left = min(float(budget), float(caps_K.sum()))
    while left > 0 and heap:
        domain = heapq.heappop(heap)[1]
        taken = min(chunk, caps_K[domain] - counts_K[domain], left)
        counts_K[domain] += taken
        left -= taken
        if counts_K[domain] < caps_K[domain]:
            heapq.heappush(heap, entry(domain))
    return counts_K


def pilot_ladder(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Propose every cluster at another level of the ladder, in seeded order, one level on in the next run.

    Not the published pilot, which grows one domain at a time: MOSAIC's own assumption, that gains add up, allows
    to grow all at once, so that each run gives every cluster one point.
    """
    ladder, level = divmod(len(searched(history)), len(PILOT_LEVELS))
    place = seeded_order(info, config, ladder)
    return np.array([PILOT_LEVELS[(place[name] + level) % len(PILOT_LEVELS)] for name in info.cluster_ids])


def mosaic(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Fit every cluster's gain and spend the budget greedily on v_k times it; a plain sample before any run.

    A cluster with fewer than two known points has no curve and takes the mean of the others'.
    """
    unit = max(info.budget / len(info.cluster_ids), 1.0)
    curves = [_gain_of(history, cluster, unit) for cluster in range(len(info.cluster_ids))]
    known = np.array([curve for curve in curves if curve is not None])
    if len(known) == 0 or known[:, 0].max() <= 0:
        return size_prior(info)
    fitted_K2 = np.array([known.mean(axis=0) if curve is None else curve for curve in curves])
    chunk = max(1, info.budget // GREEDY_STEPS)
    return greedy_counts(
        info.dev_weights_K * fitted_K2[:, 0], fitted_K2[:, 1], info.pool_sizes_K, info.budget, chunk
    )


def _gain_of(history: History, cluster: int, unit: float) -> tuple[float, float] | None:
    counts_P = np.array([run.counts_K[cluster] for run in history])
    scores_P = np.array([run.scores_K[cluster] for run in history])
    known_P = np.isfinite(scores_P)
    if len(np.unique(counts_P[known_P])) < 2:
        return None
    return saturating_gain(counts_P[known_P], scores_P[known_P], unit)


ADO = method_of(ado_proposal, ado)
MOSAIC = method_of(probe_one_cluster, mosaic)
MOSAIC_LADDER = method_of(pilot_ladder, mosaic)
