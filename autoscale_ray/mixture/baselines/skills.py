"""Rules that learn which cluster helps which: Skill-it and Aioli.

Legend: K clusters, R runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autoscale_ray.mixture.baselines.signals import (
    Float64,
    end_losses,
    latest,
    method_of,
    on_simplex,
    probe_one_cluster,
    shares,
    uniform,
)
from autoscale_ray.mixture.problem import ClusterInfo, History

SKILL_IT_STEP, SKILL_IT_WINDOW = 0.8, 3
AIOLI_STEP = 0.2


def skill_it_weights(graph_KK: Float64, losses_RK: Float64, step: float = SKILL_IT_STEP) -> Float64:
    """Return Skill-it's mixture: p_i ~ exp(eta sum_j A_ij sum_{last 3} l_j).

    Chen et al. 2023, arXiv 2307.14430, algorithm 1; HazyResearch/skill-it cfabec0, trainer/mw_trainer.py.

    Args:
        graph_KK: A[i, j] in [0, 1]: how much training on i lowers the loss of j.
        losses_RK: Losses at the ends of the rounds so far, the last `SKILL_IT_WINDOW` of which count.
        step: eta.
    """
    logits_K = step * graph_KK @ losses_RK[-SKILL_IT_WINDOW:].sum(axis=0)
    return on_simplex(np.exp(logits_K - logits_K.max()))


def skill_graph(transfer_KK: Float64) -> Float64:
    """Turn measured transfers into Skill-it's graph: no negative edge, largest entry 1, other full edges
    halved.

    Args:
        transfer_KK: T[i, j]: change of cluster i's score per unit of extra weight on j.
    """
    graph_KK = np.maximum(transfer_KK.T, 0)
    graph_KK = graph_KK / max(float(graph_KK.max()), 1e-12)
    is_full_edge_KK = (graph_KK == 1) & ~np.eye(len(graph_KK), dtype=bool)
    return np.where(is_full_edge_KK, 0.5, graph_KK)


def aioli_matrix(shares_RK: Float64, gains_RK: Float64) -> Float64:
    """Undo the smoothing of the probes: solve gains_r = A shares_r, least norm where there are fewer runs
    than K.

    Chen et al. 2024, arXiv 2411.05735, algorithm 2 (LearnParams); HazyResearch/aioli 910d524.

    Args:
        shares_RK: Mixture of each probe.
        gains_RK: Fall of each cluster's loss in that probe.

    Returns:
        A[i, j]: fall of loss i per unit of weight on j.
    """
    return np.linalg.lstsq(shares_RK, gains_RK, rcond=1e-10)[0].T.astype(np.float64)


def aioli_step(
    weights_K: Float64, matrix_KK: Float64, target_K: Float64 | None = None, step: float = AIOLI_STEP
) -> Float64:
    """Take one step of Aioli: A <- A - min(A, 0), A <- A / sum A, p_j <- p_j exp(eta sum_i A_ij).

    Args:
        weights_K: p on the simplex.
        matrix_KK: A.
        target_K: Weight of each row, 1 on average; the published rule weighs all rows alike.
        step: eta.
    """
    positive_KK = matrix_KK - min(float(matrix_KK.min()), 0.0)
    total = positive_KK.sum()
    if total <= 0:
        return weights_K
    rows_K = np.ones(len(weights_K)) if target_K is None else target_K
    return on_simplex(weights_K * np.exp(step * rows_K @ (positive_KK / total)))


def skill_it(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Apply Skill-it to the losses so far; without probed transfers its graph is the identity."""
    if not history:
        return uniform(info)
    transfer_KK = latest(history, "transfer_KK")
    graph_KK = np.eye(len(info.cluster_ids)) if transfer_KK is None else skill_graph(transfer_KK)
    return skill_it_weights(graph_KK, end_losses(history))


def aioli(history: History, info: ClusterInfo, config: Any) -> Float64:
    """Take one step of Aioli after every probe, with the matrix learned from the probes until then."""
    mixtures_RK, ends_RK = np.array([shares(run) for run in history]), end_losses(history)
    probed_KK = latest(history, "transfer_KK")
    target_K = len(info.cluster_ids) * info.dev_weights_K
    is_probe = np.array([run.counts_K.sum() > 0 for run in history], dtype=bool)
    weights_K = uniform(info)
    for last in np.flatnonzero(is_probe).tolist():
        probes = np.flatnonzero(is_probe[: last + 1])
        base_K = ends_RK[~is_probe if (~is_probe).any() else probes].mean(axis=0)
        matrix_KK = (
            probed_KK
            if probed_KK is not None
            else aioli_matrix(mixtures_RK[probes], base_K - ends_RK[probes])
        )
        weights_K = aioli_step(weights_K, matrix_KK, target_K)
    return weights_K


SKILL_IT = method_of(skill_it, skill_it)
AIOLI = method_of(probe_one_cluster, aioli)
