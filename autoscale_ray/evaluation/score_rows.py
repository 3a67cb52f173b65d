"""Score trajectories on the rows of a pool: what `autoscale score` does with a pool."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from autoscale_ray.errors import AutoScaleError, InvalidSceneError
from autoscale_ray.evaluation.from_pool import pool_rows, previous_rows, scoring_scene
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.scene_score import SCORERS, SceneScore, Unscored, score_scene, with_comfort
from autoscale_ray.evaluation.score_file import check_waypoints
from autoscale_ray.scenes.pool import ScenePool, open_pool

SCENES_A_PART = 128
"""Scenes that one process scores before it asks for more."""


class ScoringProcessError(AutoScaleError, RuntimeError):
    """A process that scored was ended from outside."""


def score_rows(
    wanted: Mapping[str, np.ndarray], pool: Path, num_processes: int = 1
) -> tuple[list[SceneScore], list[Unscored]]:
    """Score trajectories by scene id on the scenes of a pool, by both versions.

    Extended comfort is against the scene that the pool names as the one before, as in the loop.

    Args:
        wanted: Relative waypoints by scene id; see `read_trajectories`.
        pool: Folder of the pool.
        num_processes: Parts of 128 scenes scored side by side, >= 1; the result does not depend on it.

    Returns:
        What was scored, and the rest.

    Raises:
        PoolError: No usable pool.
        ScoringProcessError: A process was ended from outside.
    """
    opened = open_pool(pool)
    ids = opened.scene_ids.tolist()
    previous_N, _ = previous_rows(opened)
    row_of = {scene_id: row for row, scene_id in enumerate(ids) if scene_id in wanted}
    rows = np.array(list(row_of.values()), dtype=np.int64)
    found = list(_score_all(opened, rows, wanted, num_processes))
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


def _score_all(
    pool: ScenePool, rows: np.ndarray, wanted: Mapping[str, np.ndarray], num_processes: int
) -> Iterator[SceneScore | Unscored]:
    if num_processes == 1 or len(rows) <= SCENES_A_PART:
        yield from _score_some(pool, rows, wanted)
        return
    parts = [rows[start : start + SCENES_A_PART] for start in range(0, len(rows), SCENES_A_PART)]
    plans = [{name: wanted[name] for name in pool.scene_ids[part].tolist()} for part in parts]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_processes, mp_context=context) as executor:
            for found in executor.map(_score_part, [pool.path] * len(parts), parts, plans):
                yield from found
    except BrokenProcessPool:
        raise ScoringProcessError(
            f"{pool.path}: a scoring process was ended from outside (memory?)"
        ) from None


def _score_part(
    path: Path, rows: np.ndarray, wanted: Mapping[str, np.ndarray]
) -> list[SceneScore | Unscored]:
    torch.set_num_threads(1)
    return list(_score_some(open_pool(path), rows, wanted))


def _score_some(
    pool: ScenePool, rows: np.ndarray, wanted: Mapping[str, np.ndarray]
) -> Iterable[SceneScore | Unscored]:
    return (item for row in pool_rows(pool, rows) for item in _found(row, wanted))


def _found(row: Mapping[str, object], wanted: Mapping[str, np.ndarray]) -> Iterator[SceneScore | Unscored]:
    token = str(row["scene_id"])
    for version in SCORERS:
        try:
            yield score_row(row, check_waypoints(token, wanted[token]), version)
        except InvalidSceneError as error:
            yield Unscored(token=token, reason=str(error), version=version)
