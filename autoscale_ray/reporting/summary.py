"""The summary of a run: one JSON tree that tables, plots and the report are made of.

The tree holds plain numbers and names; None stands for a missing value. Nothing reads it back to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from autoscale_ray.config import RunConfig
from autoscale_ray.records import Arm, Clusters, Round, Scores, number_or_none

TOTAL_NAMES = ("objective", "epdms", "pdms", "miou")


def summarise(
    config: RunConfig,
    clusters: Clusters,
    history: Sequence[Round],
    *,
    final_counts: Mapping[str, int] | None = None,
    arms: Sequence[Arm] = (),
    seconds: Sequence[Mapping[str, float]],
    num_real: int,
    gains: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Gather a run into one tree.

    Args:
        config: The run.
        clusters: Its clusters.
        history: Finished rounds, round 0 first.
        final_counts: Recommended scenes per cluster, once the search is over.
        arms: Arms of the final comparison, as far as they are scored.
        seconds: Wall seconds per stage from the start to the end of each round, and after the rounds to now.
        num_real: Real training scenes.
        gains: AutoScale minus another arm on the same test scenes, and its standard error, by arm.

    Returns:
        A tree of plain values, ready for JSON.
    """
    scored = [one.scores for one in (*history, *arms)]
    return {
        "seed": config.seed,
        "objective": config.evaluation.objective,
        "budget": config.loop.budget,
        "method": config.ascent.method,
        "steps": config.planner.num_steps,
        "batch_size": config.planner.batch_size,
        "num_real": num_real,
        "unscored": {scores.side: scores.num_unscored for scores in scored},
        "clusters": _cluster_rows(clusters),
        "rounds": [_round_row(clusters, done) for done in history],
        "final_counts": dict(final_counts) if final_counts is not None else None,
        "arms": [_arm_row(clusters, arm, config, num_real) for arm in arms],
        "gains": {
            name: {"mean": number_or_none(mean), "se": number_or_none(se)}
            for name, (mean, se) in (gains or {}).items()
        },
        "spent": _spent(config, history, arms, seconds),
    }


def _cluster_rows(clusters: Clusters) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "pool": int(clusters.pool_sizes_K[k]),
            "real": int(clusters.real_counts_K[k]),
            "dev": int(clusters.dev_counts_K[k]),
            "dev_weight": float(clusters.dev_weights_K[k]),
        }
        for k, name in enumerate(clusters.cluster_ids)
    ]


def _round_row(clusters: Clusters, done: Round) -> dict[str, Any]:
    return {
        "index": done.index,
        "weights": dict(done.weights),
        "counts": dict(done.selection.counts),
        "num_scenes": done.selection.num_scenes,
        **_score_fields(clusters, done.scores),
    }


def _arm_row(clusters: Clusters, arm: Arm, config: RunConfig, num_real: int) -> dict[str, Any]:
    shown = config.planner.num_steps * config.planner.batch_size
    return {
        "name": arm.name,
        "num_scenes": arm.selection.num_scenes,
        "counts": dict(arm.selection.counts),
        "epochs": shown / max(num_real + arm.selection.num_scenes, 1),
        **_score_fields(clusters, arm.scores),
    }


def _score_fields(clusters: Clusters, scores: Scores) -> dict[str, Any]:
    return {
        "cluster_scores": _by_cluster(clusters, scores.cluster_scores_K),
        "cluster_se": _by_cluster(clusters, scores.cluster_se_K),
        "totals": {name: number_or_none(scores.totals[name]) for name in TOTAL_NAMES},
        "error_unit": scores.error_unit,
        "total_se": {name: number_or_none(scores.total_se[name]) for name in TOTAL_NAMES},
        "seed_totals": {
            name: [number_or_none(value) for value in scores.seed_totals[name]] for name in TOTAL_NAMES
        },
    }


def _spent(
    config: RunConfig, history: Sequence[Round], arms: Sequence[Arm], seconds: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    search = sum(len(done.scores.seeds) for done in history)
    final = sum(len(arm.scores.seeds) for arm in arms)
    return {
        "search_runs": search,
        "comparison_runs": final,
        "optimiser_steps": (search + final) * config.planner.num_steps,
        "seconds": _seconds_since({}, seconds[-1]),
        "seconds_by_round": [_seconds_since(*ends) for ends in pairwise([{}, *seconds[: len(history)]])],
    }


def _seconds_since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value - before.get(name, 0.0), 2) for name, value in now.items()}


def _by_cluster(clusters: Clusters, values_K: Any) -> dict[str, float | None]:
    return {name: number_or_none(value) for name, value in zip(clusters.cluster_ids, values_K, strict=True)}
