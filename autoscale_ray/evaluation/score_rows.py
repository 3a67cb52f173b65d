"""Score trajectories on the rows of a pool: what `autoscale score` does with a pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from autoscale_ray.errors import InvalidSceneError
from autoscale_ray.evaluation.from_pool import pool_rows, previous_rows, scoring_scene
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.scene_score import SCORERS, SceneScore, Unscored, score_scene, with_comfort
from autoscale_ray.evaluation.score_file import check_waypoints
from autoscale_ray.scenes.pool import open_pool


def score_rows(wanted: Mapping[str, np.ndarray], pool: Path) -> tuple[list[SceneScore], list[Unscored]]:
    """Score trajectories by scene id on the scenes of a pool, by both versions.

    Extended comfort is against the scene that the pool names as the one before, as in the loop.

    Args:
        wanted: Relative waypoints by scene id; see `read_trajectories`.
        pool: Folder of the pool.

    Returns:
        What was scored, and the rest.

    Raises:
        PoolError: No usable pool.
    """
    opened = open_pool(pool)
    ids = opened.scene_ids.tolist()
    previous_N, _ = previous_rows(opened)
    row_of = {scene_id: row for row, scene_id in enumerate(ids) if scene_id in wanted}
    rows = np.array(list(row_of.values()), dtype=np.int64)
    found = [item for row in pool_rows(opened, rows) for item in _found(row, wanted)]
    found += [
        Unscored(token=token, reason=f"{token}: trajectory: must have a scene", version=version)
        for token in wanted
        if token not in row_of
        for version in SCORERS
    ]
    scored = [item for item in found if isinstance(item, SceneScore)]
    newer = {item.token: item for item in scored if item.version == "v2"}
    before = {token: ids[previous_N[row_of[token]]] for token in newer if previous_N[row_of[token]] >= 0}
    pairs = [(newer[old], newer[token]) for token, old in before.items() if old in newer]
    return with_comfort(scored, pairs), [item for item in found if isinstance(item, Unscored)]


def score_row(row: Mapping[str, object], waypoints: Floats, version: str) -> SceneScore:
    """Score (P, 8 or 40, 3) trajectories in one row of a pool; see `scoring_scene`.

    Raises:
        InvalidSceneError: The row or the trajectories break a rule.
    """
    scene = scoring_scene(row)
    return score_scene(
        scene,
        waypoints,
        version,
        log_name=str(row["log_id"]),
        is_synthetic=scene.is_synthetic,
        start_us=int(str(row["timestamp_us"])),
        pose=np.array([row[f"origin_{name}"] for name in ("x_m", "y_m", "yaw_rad")], dtype=np.float64),
    )


def _found(row: Mapping[str, object], wanted: Mapping[str, np.ndarray]) -> Iterator[SceneScore | Unscored]:
    token = str(row["scene_id"])
    for version in SCORERS:
        try:
            yield score_row(row, check_waypoints(token, wanted[token]), version)
        except InvalidSceneError as error:
            yield Unscored(token=token, reason=str(error), version=version)
