"""Scenes of a pool as the scorer sees them, and the scores of planned trajectories for a whole pool.

The scene frame (rear axle at 0 s) serves as the scorer's frame: scores do not change under rigid motion.

Shape legend: N scenes, F scored 2 Hz frames (9, or 11 with the fifth second), A agents, Q polygons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from autoscale_ray.errors import InvalidSceneError, PoolError
from autoscale_ray.evaluation.combine import COLUMNS_V2
from autoscale_ray.evaluation.epdms import (
    MAX_INTERVAL_S,
    epdms,
    two_frame_extended_comfort,
    with_extended_comfort,
)
from autoscale_ray.evaluation.metrics import RULES_V1, RULES_V2, Rules
from autoscale_ray.evaluation.pdms import pdms
from autoscale_ray.evaluation.prepare import PreparedScene, prepare
from autoscale_ray.evaluation.scene import (
    DRIVABLE_LAYERS,
    NUM_FRAMES_V1,
    NUM_FRAMES_V2,
    ScoringScene,
    make_scene,
)
from autoscale_ray.evaluation.scene import POLYGON_LAYERS as SCORED_LAYERS
from autoscale_ray.evaluation.scoring import Metric, ScoreResult
from autoscale_ray.evaluation.timing import NUM_STEPS
from autoscale_ray.evaluation.vehicle import VehicleParameters
from autoscale_ray.scenes.pool import ScenePool
from autoscale_ray.scenes.schema import CURRENT_FRAME, DOMAINS, NUM_FRAMES, NUM_PLAN_FRAMES

CHUNK = 256
"""Scenes scored at once."""
ROWS_READ = 1024
"""Rows read at once: a file of a pool holds 4,096, and is read again for every part of it."""
ASSUMED_HEIGHT_M = 1.6
"""Agents of a pool have no height and no rule reads it; the scorer's container asks for one."""
RULES = {"epdms": RULES_V2, "pdms": RULES_V1}
"""The rules of both scores."""
SCORE_COLUMNS = (*COLUMNS_V2, "extended_comfort", "epdms", "pdms_comfort", "pdms")
"""What `score_pool` tells of a scene, beside its id; the columns are there whatever the scenes."""
SCORER_VERSION = 2
"""Rises when the same plans in a pool get other scores; what was scored by another version is scored anew."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedPool:
    """A pool ready to be scored many times."""

    scene_ids: tuple[str, ...]
    scenes: Mapping[str, tuple[PreparedScene | None, ...]]
    """For ``epdms`` and ``pdms``: one entry per scene, None where it cannot be scored."""
    reasons: Mapping[str, Mapping[str, str]]
    """For ``epdms`` and ``pdms``: why a scene cannot be scored, by scene id."""
    previous_N: np.ndarray
    """Row of the scene half a second earlier, -1 where the pool has none."""
    interval_N: np.ndarray
    """Seconds since that scene, NaN where there is none."""


def prepare_pool(pool: ScenePool, references: Mapping[str, np.ndarray] | None = None) -> PreparedPool:
    """Prepare every scene of a pool for both scores.

    Args:
        pool: Dev or test pool.
        references: What `drive_references` returned; None drives PDM-Closed for every scene, which is most of the
            cost.

    Returns:
        The prepared pool. A scene that breaks a rule of the scorer is listed with its reason, never scored 0.
    """
    previous_N, interval_N = previous_rows(pool)
    scenes: dict[str, list[PreparedScene | None]] = {version: [] for version in RULES}
    reasons: dict[str, dict[str, str]] = {version: {} for version in RULES}
    for version, _, scene_id, prepared in _prepared_scenes(pool, references):
        scenes[version].append(prepared if isinstance(prepared, PreparedScene) else None)
        if isinstance(prepared, str):
            reasons[version][scene_id] = prepared
    return PreparedPool(
        scene_ids=tuple(pool.scene_ids.tolist()),
        scenes={version: tuple(items) for version, items in scenes.items()},
        reasons=reasons,
        previous_N=previous_N,
        interval_N=interval_N,
    )


def drive_references(pool: ScenePool) -> tuple[dict[str, np.ndarray], dict[str, dict[str, str]]]:
    """Drive PDM-Closed in every scene of a pool, one scene after another in memory.

    Returns:
        By score, the poses (N, 41, 3) in each scene's frame, NaN where there are none; and by scene id, why a scene
        cannot be scored.

    Raises:
        PoolError: As `previous_rows`.
    """
    previous_rows(pool)  # what `prepare_pool` would refuse later
    poses = {version: np.full((len(pool), NUM_STEPS, 3), np.nan) for version in RULES}
    reasons: dict[str, dict[str, str]] = {version: {} for version in RULES}
    for version, row, scene_id, prepared in _prepared_scenes(pool, None):
        if isinstance(prepared, str):
            reasons[version][scene_id] = prepared
        else:
            poses[version][row] = prepared.reference_poses + np.append(prepared.arena.origin, 0.0)
    return poses, reasons


def _prepared_scenes(
    pool: ScenePool, references: Mapping[str, np.ndarray] | None
) -> Iterator[tuple[str, int, str, PreparedScene | str]]:
    """Yield score, row, scene id and the prepared scene, or why it cannot be scored, of every scene for both."""
    for row, (scene_id, scene) in enumerate(scoring_scenes(pool)):
        for version, rules in RULES.items():
            known = None if references is None else references[version][row]
            yield version, row, scene_id, _prepared(scene, rules, known)


def check_scorable(pool: ScenePool, version: str) -> None:
    """Refuse a pool of which no scene can be scored; costs one scene where the first can.

    Args:
        pool: Dev or test pool.
        version: ``epdms`` or ``pdms``.

    Raises:
        PoolError: No scene can be scored; says why the first cannot.
    """
    reason = ""
    for _, scene in scoring_scenes(pool):
        prepared = _prepared(scene, RULES[version], None)
        if isinstance(prepared, PreparedScene):
            return
        reason = reason or prepared
    raise PoolError(str(pool.path), f"must hold a scene that {version} can score ({reason})", 0)


def score_pool(prepared: PreparedPool, poses_N83: np.ndarray) -> pa.Table:
    """Score one planned trajectory for every scene by both scores.

    Args:
        prepared: Result of `prepare_pool`.
        poses_N83: Rear-axle poses every 0.5 s in the scene frame: x, y in m, yaw in rad.

    Returns:
        One row a scene: scene_id, every sub-score of EPDMS (human filter applied), extended_comfort, epdms,
        pdms, pdms_comfort; null where a score cannot be given.
    """
    columns = {name: np.full(len(poses_N83), np.nan) for name in SCORE_COLUMNS}
    for rows, result in _comfortable(prepared, _driven(prepared, poses_N83)):
        values = {name: metric.value for name, metric in result.filtered.items()}
        values["extended_comfort"] = result.extended_comfort.value
        _fill(columns, rows, {**values, "epdms": result.score_with_comfort.value})
    for rows, scenes in _scorable(prepared.scenes["pdms"]):
        result = pdms(scenes, poses_N83[rows][:, None])
        values = {"pdms_comfort": result.filtered["comfort"].value, "pdms": result.score.value}
        _fill(columns, rows, values)
    arrays = {name: pa.array(values, from_pandas=True) for name, values in sorted(columns.items())}
    return pa.table({"scene_id": pa.array(prepared.scene_ids), **arrays})


def scoring_scene(row: Mapping[str, object]) -> ScoringScene:
    """Build the scorer's scene from one row of a pool.

    Args:
        row: Values by column of `SCENE_SCHEMA`; list columns as flat arrays.

    Returns:
        A checked scene in the scene frame.

    Raises:
        InvalidSceneError: The row breaks a rule of the scorer; names scene, field and rule.
    """
    ego = _array(row, "ego_states").reshape(NUM_FRAMES, 7)
    ego_valid = _array(row, "ego_valid", bool)
    num_frames = NUM_FRAMES_V1 if ego_valid[CURRENT_FRAME + NUM_FRAMES_V1 - 1] else NUM_FRAMES_V2
    frames = slice(CURRENT_FRAME, CURRENT_FRAME + num_frames)
    history = slice(CURRENT_FRAME - 3, CURRENT_FRAME + 1)
    limit = float(row["route_speed_limit_mps"])  # type: ignore[arg-type]
    polygons = _polygons(row, frames)
    if not np.isin(polygons["polygon_layers"], DRIVABLE_LAYERS).any():
        rule = "must hold a drivable area, else every trajectory is off the road"
        raise InvalidSceneError(f"{row['scene_id']}: polygon_layers", rule)
    return make_scene(
        str(row["scene_id"]),
        ego_history_times_us=_array(row, "ego_times_us", np.int64)[history],
        ego_history_states=ego[history],
        human_poses=ego[CURRENT_FRAME + 1 : CURRENT_FRAME + 1 + NUM_PLAN_FRAMES, :3],
        centreline=_array(row, "centerline").reshape(-1, 3),
        speed_limit_mps=limit if np.isfinite(limit) else None,
        vehicle=_vehicle(row),
        is_synthetic=row["domain"] == DOMAINS[1],
        **_agents(row, frames),
        **polygons,
    )


def scoring_scenes(pool: ScenePool) -> Iterator[tuple[str, ScoringScene | str]]:
    """Yield the scenes of a pool by id; for a scene that breaks a rule of the scorer the reason in its place."""
    for row in pool_rows(pool, np.arange(len(pool))):
        try:
            yield str(row["scene_id"]), scoring_scene(row)
        except InvalidSceneError as error:
            yield str(row["scene_id"]), str(error)


def pool_rows(pool: ScenePool, rows: np.ndarray) -> Iterator[dict[str, object]]:
    """Yield rows of a pool (row numbers, int64) as `scoring_scene` takes them."""
    for start in range(0, len(rows), ROWS_READ):
        table = pool.table(rows[start : start + ROWS_READ])
        for index in range(len(table)):
            yield row_values(table, index)


def previous_rows(pool: ScenePool) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of the scene half a second earlier, -1 where the pool has none, and the seconds since, or NaN.

    Raises:
        PoolError: A scene's `prev_scene_id` is too far away for extended comfort.
    """
    row_of = {scene: row for row, scene in enumerate(pool.scene_ids.tolist())}
    previous_N = np.array(
        [row_of.get(scene, -1) for scene in pool.column("prev_scene_id").tolist()], dtype=np.int64
    )
    times_N = pool.column("timestamp_us")
    interval_N = np.where(previous_N >= 0, (times_N - times_N[previous_N]) / 1e6, np.nan)
    for row in np.flatnonzero((previous_N >= 0) & ~((interval_N > 0) & (interval_N < MAX_INTERVAL_S))):
        raise PoolError(
            f"{pool.path}: {pool.scene_ids[row]}: prev_scene_id",
            f"must name a scene less than {MAX_INTERVAL_S} s earlier",
            float(interval_N[row]),
        )
    return previous_N, interval_N


def row_values(table: pa.Table, index: int) -> dict[str, object]:
    """Return one row of a table as `scoring_scene` takes it."""
    return {name: _value(table[name][index]) for name in table.column_names}


def _value(scalar: pa.Scalar) -> object:
    return (
        scalar.values.to_numpy(zero_copy_only=False) if isinstance(scalar, pa.ListScalar) else scalar.as_py()
    )


def _prepared(
    scene: ScoringScene | str, rules: Rules, reference_poses: np.ndarray | None
) -> PreparedScene | str:
    if isinstance(scene, str):
        return scene
    if reference_poses is not None and not np.isfinite(reference_poses).all():
        return f"{scene.scene_id}: could not be prepared for {rules.version} before"
    try:
        return prepare(scene, rules, reference_poses)
    except InvalidSceneError as error:
        return str(error)


def _array(row: Mapping[str, object], name: str, dtype: type = np.float64) -> np.ndarray:
    return np.asarray(row[name], dtype=dtype)


def _vehicle(row: Mapping[str, object]) -> VehicleParameters:
    half_length = float(row["ego_length_m"]) / 2.0  # type: ignore[arg-type]
    rear_axle = float(row["ego_rear_axle_to_center_m"])  # type: ignore[arg-type]
    return VehicleParameters(
        width_m=float(row["ego_width_m"]),  # type: ignore[arg-type]
        front_length_m=half_length + rear_axle,
        rear_length_m=half_length - rear_axle,
        wheel_base_m=float(row["ego_wheelbase_m"]),  # type: ignore[arg-type]
    )


def _agents(row: Mapping[str, object], frames: slice) -> dict[str, np.ndarray]:
    """Return the agents seen in a scored frame; those seen only before 0 s play no part."""
    mask_AF = _array(row, "agent_valid", bool).reshape(-1, NUM_FRAMES)[:, frames]
    seen_A = mask_AF.any(axis=1)
    size_A2 = _array(row, "agent_size").reshape(-1, 2)[seen_A]
    return {
        "agent_types": _array(row, "agent_type", np.int64)[seen_A],
        "agent_dims": np.column_stack([size_A2, np.full(len(size_A2), ASSUMED_HEIGHT_M)]),
        "agent_states": _array(row, "agent_states").reshape(-1, NUM_FRAMES, 5)[seen_A][:, frames],
        "agent_mask": mask_AF[seen_A],
    }


def _polygons(row: Mapping[str, object], frames: slice) -> dict[str, np.ndarray]:
    """Return the polygons of layers that the scores use."""
    layer_Q = _array(row, "polygon_layer", np.int64)
    used_Q = layer_Q < len(SCORED_LAYERS)
    offsets = _array(row, "polygon_offsets", np.int64)
    points = _array(row, "polygon_points").reshape(-1, 2)
    lengths_Q = np.diff(offsets)
    return {
        "polygon_layers": layer_Q[used_Q],
        "polygon_on_route": _array(row, "polygon_on_route", bool)[used_Q],
        "polygon_red": _array(row, "polygon_red", bool).reshape(-1, NUM_FRAMES)[used_Q][:, frames],
        "polygon_offsets": np.concatenate([[0], np.cumsum(lengths_Q[used_Q])]),
        "polygon_xy": points[np.repeat(used_Q, lengths_Q)],
    }


def _scorable(scenes: Sequence[PreparedScene | None]) -> Iterator[tuple[np.ndarray, list[PreparedScene]]]:
    """Yield rows and scenes in chunks of one vehicle each, as the scorer takes them."""
    by_vehicle: dict[VehicleParameters, list[int]] = {}
    for row, scene in enumerate(scenes):
        if scene is not None:
            by_vehicle.setdefault(scene.arena.vehicle, []).append(row)
    for rows in by_vehicle.values():
        for start in range(0, len(rows), CHUNK):
            part = np.array(rows[start : start + CHUNK], dtype=np.int64)
            yield part, [scene for scene in (scenes[row] for row in part) if scene is not None]


def _driven(prepared: PreparedPool, poses_N83: np.ndarray) -> list[tuple[np.ndarray, ScoreResult]]:
    has_previous = bool((prepared.previous_N >= 0).any())
    return [
        (rows, epdms(scenes, poses_N83[rows][:, None], keep_states=has_previous))
        for rows, scenes in _scorable(prepared.scenes["epdms"])
    ]


def _comfortable(
    prepared: PreparedPool, results: Sequence[tuple[np.ndarray, ScoreResult]]
) -> Iterator[tuple[np.ndarray, ScoreResult]]:
    """Add extended comfort to the scenes whose previous scene was driven too."""
    driven = {
        int(row): states
        for rows, result in results
        if result.states is not None
        for row, states in zip(rows, result.states[:, 0], strict=True)
    }
    for rows, result in results:
        before = [driven.get(int(row)) for row in prepared.previous_N[rows]]
        known = np.array([states is not None for states in before])
        if result.states is None or not known.any():
            yield rows, result
            continue
        now = result.states[:, 0]
        previous = torch.stack([now[0] if states is None else states for states in before])
        interval = np.where(known, prepared.interval_N[rows], np.nan)
        comfort = two_frame_extended_comfort(now, previous, interval)
        yield rows, with_extended_comfort(result, Metric(comfort.value[:, None], comfort.valid[:, None]))


def _fill(columns: Mapping[str, np.ndarray], rows: np.ndarray, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        columns[name][rows] = value[:, 0].numpy()
