"""Score a file of trajectories: what `autoscale score` does, whatever the scenes come from.

Shape legend: P trajectories of one scene, n waypoints (8 or 40).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.errors import InvalidInputError, InvalidSceneError
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.scene_score import SceneScore, Unscored
from autoscale_ray.evaluation.score_table import write_scores
from autoscale_ray.evaluation.two_stages import read_mapping


def score_file(
    trajectories: Path,
    score: Callable[[Mapping[str, np.ndarray]], tuple[list[SceneScore], list[Unscored]]],
    out: Path,
    two_stage: Path | None = None,
) -> dict[str, Any]:
    """Score every trajectory of a file, whatever the scenes come from; what cannot be scored is reported.

    Args:
        trajectories: npz, Parquet or submission pickle; see `read_trajectories`.
        score: What scores trajectories by scene: `score_rows`, `score_caches` or `score_navhard` with its files.
        out: Parquet file; see `write_scores`.
        two_stage: Split YAML of NAVSIM whose mapping gives the two-stage score; see `two_stage_summary`.

    Returns:
        See `write_scores`.

    Raises:
        InvalidInputError: The trajectories, the scenes as a whole or the mapping break a rule.
    """
    wanted = read_trajectories(trajectories)
    mapping = None if two_stage is None else read_mapping(two_stage)
    return write_scores(wanted, *score(wanted), out, mapping)


def read_trajectories(path: Path | str) -> dict[str, np.ndarray]:
    """Read trajectories by scene from an npz or Parquet file, or a NAVSIM submission pickle.

    npz: `scene_id` (S,) and `trajectories` (S, P, 8 or 40, 3). Parquet: columns `scene_id` and `trajectories`, nested
    lists P x 8 x 3 or P x 40 x 3. The axis P may be left out where every scene has one trajectory. Submission (.pkl):
    one trajectory a token.

    Args:
        path: The file.

    Returns:
        Relative waypoints by scene id; (P, 8 or 40, 3) where `check_waypoints` accepts them.

    Raises:
        InvalidInputError: Naming the file and the rule.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        from autoscale_ray.scenes.readers.metric_cache import read_submission

        return {token: poses[None] for token, poses in read_submission(path).items()}
    if path.suffix == ".npz":
        from autoscale_ray.scenes.trust import read_npz

        arrays = read_npz(path, ("scene_id", "trajectories"))
        names, values = arrays["scene_id"].ravel().tolist(), list(np.atleast_1d(arrays["trajectories"]))
    else:
        from autoscale_ray.scenes.parquet import read_parquet

        table = read_parquet(path, ["scene_id", "trajectories"])
        names, values = table["scene_id"].to_pylist(), table["trajectories"].to_pylist()
    names = [str(name) for name in names]
    if not names or len(names) != len(values) or len(set(names)) != len(names):
        raise InvalidInputError(
            str(path), "must have one row of trajectories for each scene_id, and at least one"
        )
    return {name: _as_array(value) for name, value in zip(names, values, strict=True)}


def check_waypoints(scene_id: str, waypoints: np.ndarray) -> Floats:
    """Return the trajectories of one scene of a file as float64.

    Args:
        scene_id: Name used in errors.
        waypoints: Its entry in the result of `read_trajectories`.

    Returns:
        (P, 8 or 40, 3) relative waypoints, P >= 1.

    Raises:
        InvalidSceneError: They have another shape, are ragged, or no numbers.
    """
    where, rule = f"{scene_id}: trajectory", "must be an array P x 8 x 3 or P x 40 x 3"
    try:
        array = np.asarray(waypoints, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidSceneError(where, rule, "ragged lists, or no numbers") from None
    if array.ndim != 3 or not len(array) or array.shape[1] not in (8, 40) or array.shape[2] != 3:
        raise InvalidSceneError(where, rule, array.shape)
    return array


def _as_array(value: object) -> np.ndarray:
    """Return the entry of one scene, as objects where it is no array of numbers: only its own scene is refused.

    One trajectory without the axis P gets it.
    """
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(value, dtype=object)
    array = array.astype(np.float64 if array.dtype.kind in "biuf" else object)
    return array[None] if array.ndim == 2 else np.atleast_1d(array)
