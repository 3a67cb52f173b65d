"""Let a method search a family of problems, run by run, as the real loop would.

The default method is played on all problems at once (`play_response`); `play_method` plays anything behind the
`Method` interface, one problem at a time. Both give integer counts, the same noise model and no hidden truth.

Shape legend: P problems, T runs, K clusters.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoscale_ray.config import AscentConfig
from autoscale_ray.mixture.allocation import allocate, largest_remainder, waterfill
from autoscale_ray.mixture.ascent import extra_visits, noise_priors
from autoscale_ray.mixture.design import balanced_signs, perturbed, step_size
from autoscale_ray.mixture.estimators import gain_shift
from autoscale_ray.mixture.optimum import posterior_optimum
from autoscale_ray.mixture.problem import ClusterInfo, Feedback, Method, Observation, as_array
from autoscale_ray.mixture.response import Runs, fit_responses
from benchmarks.controlled.family import SCENE_SD, Family, objective_gradient, observed_scores, true_scores

Answers = dict[int, np.ndarray]
"""Recommended counts (P, K) after each number of runs."""


def cluster_names(num_clusters: int) -> tuple[str, ...]:
    return tuple(f"c{index:02d}" for index in range(num_clusters))


def play_response(
    family: Family,
    seed: int,
    stops: tuple[int, ...],
    *,
    with_real_only: bool,
    num_seeds: int = 1,
    config: AscentConfig | None = None,
    alignment_PK: np.ndarray | None = None,
) -> Answers:
    """Search all problems with Cluster-GA at once; the real-only run counts as the first where asked for."""
    config = config or AscentConfig()
    rng = np.random.default_rng(seed)
    unit = family.config.budget / family.config.num_clusters
    caps_PK = family.caps_PK / unit
    counts: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    answers: Answers = {}

    def run(counts_PK: np.ndarray) -> None:
        scores.append(observed_scores(family, counts_PK, rng, len(counts), num_seeds))
        counts.append(counts_PK)

    def optimum(floor: float, guard: bool) -> np.ndarray:
        runs = _runs(family, counts, scores, with_real_only, num_seeds, config)
        fit = fit_responses(runs, noise_priors(config))
        if alignment_PK is not None:
            shift_PK = gain_shift(fit, alignment_PK, family.dev_weights_PK)
            fit = fit_responses(replace(runs, gain_shift_PK=shift_PK), noise_priors(config))
        total = float(family.config.num_clusters)
        return posterior_optimum(fit, family.dev_weights_PK, caps_PK, total, floor, guard=guard)

    if with_real_only:
        run(np.zeros_like(caps_PK))
    centre_PK = family.uniform_PK / unit
    while len(counts) <= max(stops):
        if len(counts) in stops:
            answers[len(counts)] = _whole(optimum(config.floor_final, True) * unit, family)
        pair, is_second = divmod(len(counts) - with_real_only, 2)
        if not is_second and pair:
            centre_PK = optimum(config.floor_explore, False)
        signs_PK = _signs(family, seed, pair) * (-1.0 if is_second else 1.0)
        total_P = np.full(len(caps_PK), float(family.config.num_clusters))
        step = step_size(config.perturbation, config.perturbation_decay, pair)
        run(_whole(perturbed(centre_PK, signs_PK, step, caps_PK, total_P) * unit, family))
    return answers


def play_method(
    method: Method, family: Family, seed: int, stops: tuple[int, ...], with_real_only: bool
) -> Answers:
    """Search every problem with a method behind the interface, one after the other."""
    answers = {stop: np.zeros_like(family.caps_PK) for stop in stops}
    hints = _hints(family, np.random.default_rng([seed, 1]))
    for index in range(len(family.caps_PK)):
        one = _problem(family, index)
        info = cluster_info(one, hints["descriptors"][index])
        rng = np.random.default_rng([seed, 2, index])
        config = AscentConfig(seed=seed * 100_000 + index)
        history: tuple[Observation, ...] = ()
        for num_done in range(max(stops) + 1):
            if num_done in stops:
                answers[num_done][index] = _counts(allocate(method.final(history, info, config), info), info)
            if num_done == max(stops):
                break
            is_real_only = with_real_only and num_done == 0
            counts_K = np.zeros(len(info.cluster_ids))
            if not is_real_only:
                counts_K = _counts(allocate(method.propose(history, info, config), info), info)
            feedback = _feedback(one, counts_K, hints, index, rng)
            history = (*history, _observe(one, info, counts_K, rng, num_done, is_real_only, feedback))
    return answers


def cluster_info(one: Family, descriptors_KD: np.ndarray) -> ClusterInfo:
    """Return what a method may know of problem 0 of a family."""
    return ClusterInfo(
        cluster_ids=cluster_names(one.config.num_clusters),
        budget=one.config.budget,
        pool_sizes_K=one.caps_PK[0],
        dev_counts_K=one.dev_counts_PK[0],
        dev_weights_K=one.dev_weights_PK[0],
        real_counts_K=one.real_PK[0],
        descriptors_KD=descriptors_KD,
    )


def alignments(family: Family, correlation: float, seed: int) -> np.ndarray:
    """Alignment signal (P, K): the true gradient at uniform, standardised, plus a bias that never goes away."""
    rng = np.random.default_rng([seed, 3])
    gradient_PK = objective_gradient(family, family.uniform_PK)
    gradient_PK = gradient_PK - gradient_PK.mean(1, keepdims=True)
    gradient_PK = gradient_PK / np.maximum(gradient_PK.std(1, keepdims=True), 1e-15)
    bias_PK = rng.standard_normal(gradient_PK.shape)
    return correlation * gradient_PK + np.sqrt(1 - correlation**2) * bias_PK


def _runs(
    family: Family,
    counts: list[np.ndarray],
    scores: list[np.ndarray],
    with_real_only: bool,
    num_seeds: int,
    config: AscentConfig,
) -> Runs:
    scene_var_PK = SCENE_SD**2 / family.dev_counts_PK
    counts_PTK = np.stack(counts, 1)
    if config.exposure == "steps":
        counts_PTK = extra_visits(counts_PTK, family.real_PK[:, None], family.config.budget)
    return Runs(
        shares_PTK=counts_PTK * family.config.num_clusters / family.config.budget,
        scores_PTK=np.stack(scores, 1),
        scene_var_PTK=np.repeat(scene_var_PK[:, None], len(counts), axis=1),
        num_seeds_T=np.full(len(counts), num_seeds),
        is_real_only_T=np.array([with_real_only and index == 0 for index in range(len(counts))]),
    )


def _signs(family: Family, seed: int, pair: int) -> np.ndarray:
    names = cluster_names(family.config.num_clusters)
    return np.stack(
        [balanced_signs(names, seed * 100_000 + index, pair) for index in range(len(family.caps_PK))]
    )


def _whole(counts_PK: np.ndarray, family: Family) -> np.ndarray:
    """Round every problem's counts by largest remainder."""
    names = cluster_names(family.config.num_clusters)
    rows = zip(counts_PK, family.caps_PK, strict=True)
    return np.array([largest_remainder(row_K, caps_K, names) for row_K, caps_K in rows], dtype=float)


def _problem(family: Family, index: int) -> Family:
    """Cut one problem out of a family."""
    arrays = {
        name: getattr(family, name)[index : index + 1]
        for name in family.__dataclass_fields__
        if name != "config"
    }
    return Family(config=family.config, **arrays)


def _hints(family: Family, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Side information for methods that ask for it, each half signal and half lasting error."""
    similarity_PKJ = (family.similarity_PKJ + np.swapaxes(family.similarity_PKJ, 1, 2)) / 2
    return {
        "alignment": alignments(family, 0.5, int(rng.integers(2**31))),
        "descriptors": similarity_PKJ + 0.05 * rng.standard_normal(similarity_PKJ.shape),
        "gram": similarity_PKJ + np.eye(family.config.num_clusters),
        "graph_noise": rng.standard_normal(similarity_PKJ.shape),
    }


def _feedback(
    one: Family, counts_K: np.ndarray, hints: dict[str, np.ndarray], index: int, rng: np.random.Generator
) -> Feedback:
    scores_K = true_scores(one, counts_K[None])[0]
    noisy_K = scores_K + 0.01 * rng.standard_normal(len(scores_K))
    graph_KK = one.reach_PKJ[0] * one.gain_PK[0][:, None] - one.harm_PKJ[0]
    graph_KK = graph_KK + graph_KK.std() * hints["graph_noise"][index]
    return Feedback(
        gradient_alignment_K=hints["alignment"][index],
        gradient_gram_KK=hints["gram"][index],
        transfer_KK=graph_KK,
        uncertainty_K=1 - noisy_K,
    )


def _observe(
    one: Family,
    info: ClusterInfo,
    counts_K: np.ndarray,
    rng: np.random.Generator,
    run: int,
    is_real_only: bool,
    feedback: Feedback,
) -> Observation:
    return Observation(
        cluster_ids=info.cluster_ids,
        counts_K=counts_K,
        scores_K=observed_scores(one, counts_K[None], rng, run)[0],
        score_se_K=SCENE_SD / np.sqrt(info.dev_counts_K),
        is_real_only=is_real_only,
        feedback=feedback,
    )


def _counts(counts: dict[str, int], info: ClusterInfo) -> np.ndarray:
    return as_array({name: float(count) for name, count in counts.items()}, info)


def uniform_counts(family: Family) -> np.ndarray:
    """Uniform mixture in whole scenes (P, K)."""
    return _whole(waterfill(np.ones_like(family.caps_PK), family.caps_PK, family.budget_P), family)
