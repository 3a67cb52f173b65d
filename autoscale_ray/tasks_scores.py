"""What the scoring stages compute, from weights and pools to feedback and gains; the same wherever they run.

Shape legend: N scenes, K clusters, S training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autoscale_ray.evaluation.feedback import cluster_feedback, weighted_mean
from autoscale_ray.evaluation.from_pool import RULES, PreparedPool, drive_references, prepare_pool, score_pool
from autoscale_ray.files import save_array
from autoscale_ray.planning.spec import PlannerSpec
from autoscale_ray.records import Arm, number_or_none
from autoscale_ray.scenes.parquet import read_parquet, write_table
from autoscale_ray.scenes.pool import ScenePool

SCORES_FILE = "scores.parquet"


def reference_drives(pool: ScenePool, folder: Path) -> dict[str, Any]:
    """Drive PDM-Closed once in every scene of a dev or test pool: what progress is measured against.

    Returns:
        By score, why scenes cannot be scored, by scene id.
    """
    poses, reasons = drive_references(pool)
    for version, poses_NT3 in poses.items():
        save_array(folder / f"{version}.npy", poses_NT3)
    return {"unscored": reasons}


def load_prepared(pool: ScenePool, references: Path) -> PreparedPool:
    """Prepare a pool with reference drives that were made before."""
    return prepare_pool(
        pool, {version: np.load(references / f"{version}.npy", allow_pickle=False) for version in RULES}
    )


def score_planner(spec: PlannerSpec, weights: Path, features: Any, prepared: PreparedPool) -> pa.Table:
    """Let a planner plan every scene of a pool; return scene_id, sub-scores, epdms, pdms and miou."""
    planner = spec.load_weights(weights)
    rows = np.arange(len(prepared.scene_ids))
    table = score_pool(prepared, spec.predict(planner, features, rows).astype(np.float64))
    value_N, valid_N = spec.miou(planner, features, rows)
    return table.append_column("miou", pa.array(np.where(valid_N, value_N, np.nan), from_pandas=True))


def gather_scores(
    tables: Sequence[pa.Table],
    seeds: Sequence[int],
    objective: str,
    pool: ScenePool,
    weights_N: np.ndarray,
    labels: Path,
    cluster_ids: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Write the scene scores of all training seeds and return cluster feedback and totals.

    The objective is a weighted mean over scenes; EPDMS, PDMS and mIoU beside it are plain means. Errors are
    clustered by log; of a side that is one log they are over its scenes, and said to be.

    Args:
        tables: One table of `score_planner` for each seed.
        seeds: Training seeds.
        objective: epdms or pdms.
        pool: The scored pool.
        weights_N: Scene weights.
        labels: Label file of the pool.
        cluster_ids: The K clusters.
        folder: Receives the score file: scene_id, seed, weight, objective, sub-scores, epdms, pdms, miou.
    """
    stacked = pa.concat_tables(
        [
            table.append_column("objective", table[objective])
            .append_column("seed", pa.array([seed] * len(table), pa.int64()))
            .append_column("weight", pa.array(weights_N))
            for table, seed in zip(tables, seeds, strict=True)
        ]
    )
    write_table(stacked, folder / SCORES_FILE)
    place = {name: k for k, name in enumerate(cluster_ids)}
    clusters_N = np.array([place[name] for name in read_parquet(labels)["cluster"].to_pylist()])
    logs_N, error_unit = sampling_units(pool)
    scores_SN = _column(tables, objective)
    means_K, errors_K = cluster_feedback(scores_SN, weights_N, logs_N, clusters_N, len(cluster_ids))
    names = {"objective": objective, "epdms": "epdms", "pdms": "pdms", "miou": "miou"}
    columns = {name: _column(tables, column) for name, column in names.items()}
    shares = {name: weights_N if name == "objective" else np.ones(len(weights_N)) for name in columns}
    totals = {
        name: weighted_mean(column.mean(axis=0), shares[name], logs_N) for name, column in columns.items()
    }
    return {
        "cluster_scores": [number_or_none(value) for value in means_K],
        "cluster_se": [number_or_none(value) for value in errors_K],
        "totals": {name: number_or_none(mean) for name, (mean, _) in totals.items()},
        "error_unit": error_unit,
        "total_se": {name: number_or_none(error) for name, (_, error) in totals.items()},
        "seed_totals": {
            name: [number_or_none(weighted_mean(row_N, shares[name], logs_N)[0]) for row_N in column]
            for name, column in columns.items()
        },
    }


def sampling_units(pool: ScenePool) -> tuple[np.ndarray, str]:
    """Return what standard errors count as independent: the log of each scene, or the scenes of a single log."""
    logs_N = np.unique(pool.log_ids, return_inverse=True)[1]
    if int(logs_N.max(initial=0)) == 0:
        return np.arange(len(logs_N)), "scene"
    return logs_N, "log"


def paired_gains(arms: Sequence[Arm], pool: ScenePool) -> dict[str, tuple[float, float]]:
    """Compare the last arm with every other, scene by scene.

    Args:
        arms: Arms scored on the same pool, AutoScale last.
        pool: That pool.

    Returns:
        Mean difference of the objective and its standard error over logs, by name of the other arm; seeds are
        averaged first.
    """
    units_N, _ = sampling_units(pool)
    scores_SN, weights_N = objective_by_seed(read_parquet(arms[-1].scores.file))
    gains = {}
    for arm in arms[:-1]:
        others_SN, _ = objective_by_seed(read_parquet(arm.scores.file))
        differences_N = scores_SN.mean(axis=0) - others_SN.mean(axis=0)
        gains[arm.name] = weighted_mean(differences_N, weights_N, units_N)
    return gains


def objective_by_seed(scores: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the objective (S, N) and the scene weights (N,) of a score file, scenes in pool order."""
    num_seeds = len(np.unique(scores["seed"].to_numpy()))
    values = scores["objective"].to_numpy().reshape(num_seeds, -1)
    return values, scores["weight"].to_numpy().reshape(num_seeds, -1)[0]


def _column(tables: Sequence[pa.Table], name: str) -> np.ndarray:
    return np.stack([table[name].to_numpy().astype(np.float64) for table in tables])
