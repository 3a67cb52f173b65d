"""Score a file of trajectories: every sub-score of every trajectory, and a reason where none can be given.

Shape legend: P trajectories of one scene, n waypoints (8 or 40).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoscale_ray.errors import InvalidInputError, InvalidSceneError
from autoscale_ray.evaluation.combine import COLUMNS_V1, COLUMNS_V2
from autoscale_ray.evaluation.epdms import epdms
from autoscale_ray.evaluation.pdms import pdms
from autoscale_ray.evaluation.scene import Floats, ScoringScene
from autoscale_ray.evaluation.scoring import TRAFFIC, ScoreResult

if TYPE_CHECKING:
    import pyarrow as pa

SCORERS = {"v1": pdms, "v2": epdms}
SUB_SCORES = {"v1": COLUMNS_V1, "v2": COLUMNS_V2}


def read_trajectories(path: Path | str) -> dict[str, np.ndarray]:
    """Read trajectories by scene from an npz or Parquet file, or a NAVSIM submission pickle.

    npz: `scene_id` (S,) and `trajectories` (S, P, 8 or 40, 3). Parquet: columns `scene_id` and `trajectories`, nested
    lists P x 8 x 3 or P x 40 x 3. Submission (.pkl): one trajectory a token.

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


def score_file(
    scenes: Iterable[ScoringScene],
    trajectories: Mapping[str, np.ndarray],
    version: str = "v2",
    backend: str = "auto",
    refused: Mapping[str, str] | None = None,
) -> pa.Table:
    """Score trajectories against scenes; a scene that breaks a rule is reported and the rest is scored.

    Args:
        scenes: Scenes, valid or not; those without a trajectory are left out.
        trajectories: Relative waypoints by scene id; see `read_trajectories`.
        version: "v1" or "v2".
        backend: "auto", "torch" or "numba".
        refused: Reasons by scene id for scenes that could not even be built.

    Returns:
        One row for each trajectory, and one for a scene that was given none: scene_id, trajectory, valid, reason,
        traffic, raw_* and filtered_* sub-scores, raw_score, score; scores are null where valid is false.
    """
    import pyarrow as pa

    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    for scene in scenes:
        if scene.scene_id in trajectories and scene.scene_id not in seen:
            rows += _score_scene(scene, trajectories[scene.scene_id], version, backend)
            seen.add(scene.scene_id)
    for scene_id, value in trajectories.items():
        if scene_id not in seen:
            reason = (refused or {}).get(scene_id, f"{scene_id}: trajectory: must have a scene")
            rows += refused_rows(scene_id, len(value), reason)
    return pa.Table.from_pylist(rows, schema=score_schema(version))


def score_schema(version: str) -> pa.Schema:
    """Return the columns of `score_file`."""
    import pyarrow as pa

    numbers = [f"{kind}_{name}" for name in SUB_SCORES[version] for kind in ("raw", "filtered")]
    fields = [
        ("scene_id", pa.string()),
        ("trajectory", pa.int32()),
        ("valid", pa.bool_()),
        ("reason", pa.string()),
    ]
    fields += [("traffic", pa.string()), *((name, pa.float64()) for name in numbers)]
    return pa.schema([*fields, ("raw_score", pa.float64()), ("score", pa.float64())])


def _score_scene(
    scene: ScoringScene, waypoints: np.ndarray, version: str, backend: str
) -> list[dict[str, object]]:
    try:
        result = SCORERS[version]([scene], check_waypoints(scene.scene_id, waypoints)[None], backend=backend)
    except InvalidSceneError as error:
        return refused_rows(scene.scene_id, len(waypoints), str(error))
    return [result_row(scene.scene_id, index, result) for index in range(len(waypoints))]


def result_row(scene_id: str, index: int, result: ScoreResult) -> dict[str, object]:
    """Return the row of `score_file` of one trajectory of a result of one scene."""
    row: dict[str, object] = {
        "scene_id": scene_id,
        "trajectory": index,
        "valid": True,
        "traffic": result.traffic,
    }
    for name in result.raw:
        row[f"raw_{name}"] = float(result.raw[name].value[0, index])
        row[f"filtered_{name}"] = float(result.filtered[name].value[0, index])
    return {
        **row,
        "raw_score": float(result.raw_score.value[0, index]),
        "score": float(result.score.value[0, index]),
    }


def refused_rows(scene_id: str, num_trajectories: int, reason: str) -> list[dict[str, object]]:
    """Return the rows of `score_file` of trajectories that cannot be scored, at least one."""
    row = {"scene_id": scene_id, "valid": False, "reason": reason, "traffic": TRAFFIC}
    return [{**row, "trajectory": index} for index in range(max(1, num_trajectories))]


def _as_array(value: object) -> np.ndarray:
    """Return the entry of one scene, as objects where it is no array of numbers: only its own scene is refused."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(value, dtype=object)
    return np.atleast_1d(array.astype(np.float64 if array.dtype.kind in "biuf" else object))
