"""Score a file of trajectories against the scenes of a pool: what `autoscale score` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autoscale_ray.evaluation.from_pool import scoring_scenes
from autoscale_ray.evaluation.score_file import SCORERS, read_trajectories, score_file
from autoscale_ray.files import in_one_step
from autoscale_ray.scenes.pool import open_pool


def score_trajectory_file(trajectories: Path, pool: Path, out: Path) -> dict[str, int]:
    """Score every trajectory by PDMS (v1) and EPDMS (v2) and write all sub-scores.

    Args:
        trajectories: npz or Parquet with scene_id and trajectories (P x 8 x 3 or P x 40 x 3) in the scene frame.
        pool: Scene pool.
        out: Parquet file: version, scene_id, trajectory, valid, reason, traffic, raw_* and filtered_* sub-scores,
            raw_score, score; null where a version has no such sub-score or the trajectory is invalid.

    Returns:
        Number of rows ``scored`` and ``invalid``.

    Raises:
        InvalidInputError: The file of trajectories breaks a rule.
        PoolError: No usable pool.
    """
    wanted = read_trajectories(trajectories)
    opened = open_pool(pool)
    rows = np.flatnonzero(np.isin(opened.scene_ids, list(wanted)))
    built = list(scoring_scenes(opened, rows))
    scenes = [scene for _, scene in built if not isinstance(scene, str)]
    refused = {scene_id: reason for scene_id, reason in built if isinstance(reason, str)}
    tables = {version: score_file(scenes, wanted, version, refused=refused) for version in SCORERS}
    named = [rows.add_column(0, "version", pa.repeat(version, len(rows))) for version, rows in tables.items()]
    table = pa.concat_tables(named, promote_options="default")
    with in_one_step(out) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    scored = int(np.sum(table["valid"].to_numpy()))
    return {"scored": scored, "invalid": len(table) - scored}
