"""Scoring on Ray: actors that stay alive between rounds, each with its share of the scenes prepared.

A scene needs the one half a second earlier, which lies in the same log, so whole logs are dealt out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from autoscale_ray import tasks
from autoscale_ray.config import PlannerConfig
from autoscale_ray.evaluation.from_pool import PreparedPool, prepare_pool, score_pool
from autoscale_ray.planning.spec import load_planner_spec
from autoscale_ray.scenes.pool import ScenePool, open_pool


class PoolRows:
    """Some rows of a pool, with the part of a pool's face that preparing scenes needs."""

    def __init__(self, pool: ScenePool, rows: np.ndarray) -> None:
        self._pool, self._rows = pool, rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def scene_ids(self) -> np.ndarray:
        """Return the scene ids of the rows."""
        return self._pool.scene_ids[self._rows]

    def column(self, name: str) -> np.ndarray:
        """Return a scalar column of the rows."""
        return self._pool.column(name)[self._rows]

    def table(self, rows: np.ndarray) -> pa.Table:
        """Return some of the rows as an Arrow table."""
        return self._pool.table(self._rows[rows])


class Scorer:
    """Actor that scores one share of a dev or test pool with planner after planner."""

    def __init__(
        self, planner: PlannerConfig, pool: str, references: str, features: str, rows: np.ndarray
    ) -> None:
        torch.set_num_threads(1)
        self._spec = load_planner_spec(planner.factory, planner)
        self._rows = rows
        self._features = self._spec.load_features(Path(features))
        self._prepared = prepare_rows(open_pool(pool), Path(references), rows)

    def score(self, weights: str) -> pa.Table:
        """Return scene_id, sub-scores, epdms, pdms and miou of this share, as `tasks.score_planner` does."""
        planner = self._spec.load_weights(Path(weights))
        poses = self._spec.predict(planner, self._features, self._rows).astype(np.float64)
        value_N, valid_N = self._spec.miou(planner, self._features, self._rows)
        miou = pa.array(np.where(valid_N, value_N, np.nan), from_pandas=True)
        return score_pool(self._prepared, poses).append_column("miou", miou)


class ScorerPool:
    """The scorers of one pool.

    Args:
        planner: The planner they load.
        pool: Dev or test pool.
        references: Folder of the reference drives.
        features: Folder of the pool's planner features.
        num_scorers: How many share the pool at most.
    """

    def __init__(
        self, planner: PlannerConfig, pool: ScenePool, references: Path, features: Path, num_scorers: int
    ) -> None:
        self._scene_ids = pool.scene_ids
        # Scoring is a function of its arguments, so a call that a dying actor lost can simply be made again.
        actor = ray.remote(Scorer).options(num_cpus=1, max_restarts=-1, max_task_retries=8)
        self._scorers: list[Any] = [
            actor.remote(planner, str(pool.path), str(references), str(features), rows)
            for rows in shares(pool.log_ids, num_scorers)
        ]

    def score(self, weights: Path) -> pa.Table:
        """Return the scores of every scene, in pool order."""
        parts = ray.get([scorer.score.remote(str(weights)) for scorer in self._scorers])
        table = pa.concat_tables(parts, promote_options="default")
        row_of = {scene_id: row for row, scene_id in enumerate(table["scene_id"].to_pylist())}
        names = [name for name in sorted(table.column_names) if name not in ("scene_id", "miou")]
        return table.select(["scene_id", *names, "miou"]).take(
            pa.array([row_of[scene_id] for scene_id in self._scene_ids.tolist()])
        )

    def close(self) -> None:
        """End the actors."""
        for scorer in self._scorers:
            ray.kill(scorer)


def prepare_rows(pool: ScenePool, references: Path, rows: np.ndarray) -> PreparedPool:
    """Prepare some rows of a pool with reference drives that were made before."""
    known = {
        version: np.load(references / f"{version}.npy", mmap_mode="r")[rows] for version in tasks.VERSIONS
    }
    return prepare_pool(PoolRows(pool, rows), known)  # type: ignore[arg-type]


def shares(log_ids: np.ndarray, num_shares: int) -> Sequence[np.ndarray]:
    """Deal whole logs out to shares of about equal size, largest logs first; no share is empty.

    Args:
        log_ids: Log of each row.
        num_shares: Most shares wanted, >= 1.

    Returns:
        Sorted int64 rows of each share.
    """
    logs, index_N, counts = np.unique(log_ids, return_inverse=True, return_counts=True)
    loads = np.zeros(min(num_shares, len(logs)))
    share_of = np.zeros(len(logs), dtype=np.int64)
    for log in np.argsort(-counts, kind="stable"):
        share_of[log] = loads.argmin()
        loads[share_of[log]] += counts[log]
    return [np.flatnonzero(share_of[index_N] == share) for share in range(len(loads))]
