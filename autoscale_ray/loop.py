"""The closed loop: the algorithm, and nothing else.

Shape legend: K clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from autoscale_ray.config import AscentConfig, RunConfig, derive_seed
from autoscale_ray.mixture import METHODS
from autoscale_ray.mixture.allocation import allocate
from autoscale_ray.mixture.ascent import nothing_to_gain
from autoscale_ray.mixture.problem import ClusterInfo, Feedback, Observation
from autoscale_ray.records import Arm, Clusters, Round
from autoscale_ray.stages import Stages


def run(config: RunConfig, stages: Stages) -> tuple[Clusters, tuple[Round, ...], Mapping[str, int]]:
    """Run the data loop: embed, cluster, then propose, retrieve, train and score, round by round.

    Args:
        config: The run.
        stages: Where the stages happen.

    Returns:
        The clusters, the history (round 0 is real-only) and the recommended scene count of every cluster: the
        optimum under the posterior, not the luckiest round.
    """
    clusters = stages.cluster(stages.embed())
    info = cluster_info(clusters, config.loop.budget)
    method, ascent = METHODS[config.ascent.method], seeded_ascent(config)
    history = (play(config, stages, clusters, {}, ()),)
    while not is_over(config, info, history):
        weights = stages.published_weights(clusters, len(history))
        if weights is None:
            weights = method.propose(observations(history), info, ascent)
        history = (*history, play(config, stages, clusters, weights, history))
    final = method.final(observations(history), info, ascent)
    return clusters, history, allocate(final, info)


def is_over(config: RunConfig, info: ClusterInfo, history: tuple[Round, ...]) -> bool:
    """Say whether the search is over: its rounds are spent, the method has no use for another or, with
    `loop.stop_early`, no more gain is in sight.
    """
    usable = METHODS[config.ascent.method].num_search_runs
    if len(history) > (config.loop.num_rounds if usable is None else min(config.loop.num_rounds, usable)):
        return True
    return config.loop.stop_early and nothing_to_gain(observations(history), info, seeded_ascent(config))


def play(
    config: RunConfig,
    stages: Stages,
    clusters: Clusters,
    weights: dict[str, float],
    history: tuple[Round, ...],
) -> Round:
    """Play one round: choose scenes, train on them at the fixed number of steps, score on dev, publish."""
    index = len(history)
    counts = allocate(weights, cluster_info(clusters, config.loop.budget)) if weights else {}
    selection = stages.retrieve(clusters, counts, history[0].scores if history else None)
    start = history[-1].planners if config.loop.warm_start and history else None
    seeds = training_seeds(config, f"round {index}", config.loop.seeds_per_round)
    planners = stages.train(selection, seeds, start=start)
    finished = Round(
        index=index,
        weights=weights,
        selection=selection,
        planners=planners,
        scores=stages.evaluate(planners, clusters, "dev"),
        probed=stages.probe(planners, clusters) if METHODS[config.ascent.method].reads_gradients else {},
    )
    stages.publish(clusters, (*history, finished))
    return finished


def compare(
    config: RunConfig,
    stages: Stages,
    clusters: Clusters,
    history: tuple[Round, ...],
    final_counts: Mapping[str, int],
) -> tuple[Arm, ...]:
    """Train every arm with fresh seeds at equal steps and score it once on test."""
    # What is drawn at random knows no caps of retrieval.
    info = dataclasses.replace(cluster_info(clusters, config.loop.budget), pool_sizes_K=clusters.pool_sizes_K)
    sizes = dict(zip(clusters.cluster_ids, map(int, clusters.pool_sizes_K), strict=True))
    even = dict.fromkeys(clusters.cluster_ids, 1.0)
    plans: dict[str, tuple[Mapping[str, int], str | None]] = {
        "real_only": ({}, None),
        "vanilla": (allocate({name: float(size) for name, size in sizes.items()}, info), "random"),
        "union": (sizes, "random"),
        "uniform": (allocate(even, info), "random"),
        "autoscale": (final_counts, None),
    }
    seeds = training_seeds(config, "final", config.loop.final_seeds)
    arms = []
    for name in (*config.loop.baselines, "autoscale"):
        counts, how = plans[name]
        selection = stages.retrieve(clusters, counts, history[0].scores, how=how)
        planners = stages.train(selection, seeds)
        arms.append(Arm(name=name, selection=selection, scores=stages.evaluate(planners, clusters, "test")))
    return tuple(arms)


def cluster_info(clusters: Clusters, budget: int) -> ClusterInfo:
    """Return the clusters as the mixture methods see them."""
    return ClusterInfo(
        cluster_ids=clusters.cluster_ids,
        budget=budget,
        pool_sizes_K=clusters.deliverable_K,
        dev_counts_K=clusters.dev_counts_K,
        dev_weights_K=clusters.dev_weights_K,
        real_counts_K=clusters.real_counts_K,
        descriptors_KD=clusters.descriptors_KD,
    )


def observations(history: tuple[Round, ...]) -> tuple[Observation, ...]:
    """Return the rounds as the mixture methods see them: counts delivered, scores, errors."""
    return tuple(
        Observation(
            cluster_ids=tuple(done.selection.counts),
            counts_K=np.array(list(done.selection.counts.values()), dtype=float),
            scores_K=done.scores.cluster_scores_K,
            score_se_K=done.scores.cluster_se_K,
            num_seeds=len(done.scores.seeds),
            is_real_only=done.selection.num_scenes == 0,
            feedback=Feedback(**done.probed),
        )
        for done in history
    )


def seeded_ascent(config: RunConfig) -> AscentConfig:
    """Return the settings of the mixture method with the run's own stream for its exploration design."""
    seed = derive_seed(config.seed, "mixture", str(config.ascent.seed))
    return dataclasses.replace(config.ascent, seed=seed)


def training_seeds(config: RunConfig, stream: str, count: int) -> tuple[int, ...]:
    """Return the training seeds of a stream; no two streams share one."""
    return tuple(derive_seed(config.seed, "train", stream, str(index)) for index in range(count))
