"""Scenes and judges of the representation benchmark: the built-in world and recorded traffic.

Judges (families, tags, scores of planners) are read here and nowhere else; no embedding sees them.

Shape legend: N scenes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import autoscale_ray
from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import PlannerConfig, WorldConfig
from autoscale_ray.evaluation.from_pool import PreparedPool, prepare_pool, score_pool
from autoscale_ray.planning.features import PlannerFeatures, concatenate, features_of_pool
from autoscale_ray.planning.inference import predict
from autoscale_ray.planning.training import PlannerWeights
from autoscale_ray.planning.training import train as train_planner
from autoscale_ray.records import Side as PoolSide
from autoscale_ray.representation.kinematics import route_coordinates, route_of
from autoscale_ray.representation.model import pool_batches
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import ScenePool, open_pool
from autoscale_ray.scenes.pool_writer import write_pool
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME
from autoscale_ray.world.pools import make_pool
from jobs.demo_real import GROUPS, RECORDED, SIMULATED, known_groups

PLAN_END = CURRENT_FRAME + 8
MIN_CLASS_SCENES = 8
NUM_PLANNERS = 3
"""Training seeds that scores are averaged over: one pair of planners differs by chance more than by its data."""
NUM_LESSONS = 1500
TEST_LOG_SHARE = 0.3
HELD_SEED = 3_000_017


JUDGES = ("world", "planning", "evaluation", "scenes")
"""Rooms of the package that pools and scores of planners depend on."""


def mark_of_sources(*places: str) -> str:
    """Return a mark of the sources of these rooms or modules and of the benchmark: what is kept is of this code."""
    package = Path(autoscale_ray.__file__).parent
    files = sorted(Path(__file__).parent.glob("*representation*.py"))
    for place in places:
        files += sorted((package / place).rglob("*.py")) or [package / place]
    return fingerprint([file.read_text(encoding="utf-8") for file in files])[:8]


@dataclass(frozen=True)
class Side:
    """Some rows of some pools."""

    pools: tuple[ScenePool, ...]
    rows: tuple[NDArray[np.int64], ...]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def batches(self) -> Iterator[SceneBatch]:
        for pool, rows in zip(self.pools, self.rows, strict=True):
            yield from pool_batches(pool, rows)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(
            [pool.column(name)[rows] for pool, rows in zip(self.pools, self.rows, strict=True)]
        )


def source_rows(side: Side) -> np.ndarray:
    ids, origins = side.column("scene_id"), side.column("origin_id")
    row_by_id = {scene_id: row for row, scene_id in enumerate(ids)}
    return np.array([row_by_id.get(origin, -1) if origin else -1 for origin in origins])


@dataclass(frozen=True)
class DataSet:
    """One data set of the benchmark."""

    name: str
    train: Side
    test: Side
    label_N: np.ndarray
    """Class of every test scene; the empty string leaves it out."""
    responses: dict[str, np.ndarray]
    """Per-scene scores of the test scenes, NaN where missing; empty without planners."""
    tag_N: np.ndarray
    """Tag of motion and map of every test scene, see `motion_tags`."""
    held: Side
    """Real and synthetic scenes that no training saw, for the recall of sources and the domain probe."""
    lessons: Callable[[], np.ndarray] | None = None
    """Makes sub-scores (N, R) of the training scenes by a planner that saw real ones alone; NaN where unknown."""


def whole(pools: Sequence[ScenePool]) -> Side:
    return Side(tuple(pools), tuple(np.arange(len(pool)) for pool in pools))


def built_in_world(folder: Path, seed: int, *, quick: bool) -> DataSet:
    """Make the default world and judge by its hidden families.

    Args:
        folder: Receives the pools; pools that are there are used again.
        seed: World seed; the test scenes and the held pools have their own.
        quick: A small pool.
    """
    size = f"{'quick' if quick else 'full'}-{mark_of_sources(*JUDGES)}"
    per_family = 12 if quick else 60
    config = WorldConfig(seed=seed, num_real=200 if quick else 700, num_synthetic=800 if quick else 5000,
                         num_dev_per_family=per_family, num_test_per_family=per_family,
                         test_seed=2_000_003 + seed)  # fmt: skip
    pools = _drawn(config, ("real", "synthetic", "test"), folder / f"world-{seed}-{size}")
    other = dataclasses.replace(config, seed=HELD_SEED + seed, num_synthetic=800 if quick else 2500)
    held = _drawn(other, ("real", "synthetic"), folder / f"world-{seed}-{size}-held")
    family_N = truth_column(pools["test"], "family")
    file = pools["test"].path.parent / "responses.npz"
    responses = _cached_responses(
        [pools["real"], pools["synthetic"]], [pools["test"]], file, seed, quick=quick
    )
    test = whole([pools["test"]])
    return DataSet(
        "world",
        whole([pools["real"], pools["synthetic"]]),
        test,
        family_N,
        responses,
        tags_of(test),
        whole([held["real"], held["synthetic"]]),
        lambda: _lessons(pools, seed, quick=quick),
    )


def _drawn(config: WorldConfig, sides: Sequence[PoolSide], folder: Path) -> dict[str, ScenePool]:
    for side in sides:
        if not (folder / side / "manifest.json").is_file():
            make_pool(config, side, folder / side)
    return {side: open_pool(folder / side) for side in sides}


def truth_column(pool: ScenePool, name: str) -> np.ndarray:
    table = pq.read_table(pool.path / "truth.parquet", columns=["scene_id", name])
    by_id = dict(zip(table["scene_id"].to_pylist(), table[name].to_pylist(), strict=True))
    return np.array([by_id[scene_id] for scene_id in pool.scene_ids])


def _cached_responses(
    train: Sequence[ScenePool], test: Sequence[ScenePool], file: Path, seed: int, *, quick: bool
) -> dict[str, np.ndarray]:
    """Score planners on the test scenes: trained on real scenes, and on these and a blind draw of 700 others.

    Args:
        train: Real and synthetic pools.
        test: Test pools.
        file: Keeps the scores.
        seed: Root of training seeds and draws.
        quick: One short training each.
    """
    if not file.is_file():
        config = _planner(quick=quick)
        data = concatenate([features_of_pool(pool, config) for pool in train])
        domain_N = np.concatenate([pool.column("domain") for pool in train])
        real, others = np.flatnonzero(domain_N == "real"), np.flatnonzero(domain_N == "synthetic")
        scores: dict[str, list[np.ndarray]] = {"real_only": [], "vanilla": []}
        judged = [(prepare_pool(pool), features_of_pool(pool, config)) for pool in test]
        for turn in range(1 if quick else NUM_PLANNERS):
            drawn = np.random.default_rng([seed, turn]).choice(others, min(700, len(others)), replace=False)
            for arm, added in {"real_only": drawn[:0], "vanilla": drawn}.items():
                rows = np.concatenate([real, added])
                weights = train_planner(data, rows, config, NUM_PLANNERS * seed + turn)
                tables = [_scored(prepared, weights, features) for prepared, features in judged]
                scores[arm].append(
                    np.concatenate([table["epdms"].to_numpy().astype(float) for table in tables])
                )
        np.savez(file, **{arm: np.mean(columns, axis=0) for arm, columns in scores.items()})  # type: ignore[arg-type]
    loaded = dict(np.load(file))
    return {"score": loaded["vanilla"], "difference": loaded["vanilla"] - loaded["real_only"]}


def _planner(*, quick: bool) -> PlannerConfig:
    return PlannerConfig(num_steps=60) if quick else PlannerConfig()


def _scored(prepared: PreparedPool, weights: PlannerWeights, features: PlannerFeatures) -> pa.Table:
    return score_pool(prepared, predict(weights, features, np.arange(len(features))))


def _lessons(pools: dict[str, ScenePool], seed: int, *, quick: bool) -> np.ndarray:
    """Return the sub-scores of a real-only planner on the first synthetic scenes, NaN on all others."""
    config, num_scored = _planner(quick=quick), 200 if quick else NUM_LESSONS
    features = features_of_pool(pools["real"], config)
    weights = train_planner(features, np.arange(len(features)), config, seed)
    rows = np.arange(num_scored)
    part = subset(pools["synthetic"], rows, pools["synthetic"].path.parent / "lessons")
    table = _scored(prepare_pool(part), weights, features_of_pool(part, config))
    names = [name for name in table.column_names if name not in ("scene_id", "pdms", "pdms_comfort")]
    scores = np.stack([table[name].to_numpy().astype(float) for name in names], axis=1)
    unknown = np.full((len(pools["real"]) + len(pools["synthetic"]), len(names)), np.nan)
    unknown[len(pools["real"]) + rows] = scores
    return unknown


def subset(pool: ScenePool, rows: NDArray[np.int64], path: Path) -> ScenePool:
    """Write some rows of a pool as a pool of their own, unless it is there."""
    if not (path / "manifest.json").is_file():
        write_pool(path, (pool.table(part) for part in np.array_split(rows, max(1, len(rows) // 256))))
    return open_pool(path)


def recordings(folder: Path, out: Path, seed: int, *, quick: bool) -> DataSet:
    """Split recorded and simulated traffic by log and judge by tags of motion and map.

    Args:
        folder: Holds one pool in each sub-folder; made by `ingest_recordings`.
        out: Receives the pools of the split; those that are there are used again.
        seed: Seed of the split.
        quick: At most 600 training scenes of each pool.
    """
    train, test = [], []
    split = out / f"recordings-{seed}-{'quick' if quick else 'full'}-{mark_of_sources(*JUDGES)}"
    for path in sorted(folder.glob("*/manifest.json")):
        pool = open_pool(path.parent)
        logs = np.unique(pool.log_ids)
        order = np.random.default_rng(seed).permutation(len(logs))
        held = logs[order[: max(1, round(TEST_LOG_SHARE * len(logs)))]]
        in_test = np.isin(pool.log_ids, held)
        for side, parts, rows, limit in (
            ("train", train, np.flatnonzero(~in_test), 600 if quick else 8000),
            ("test", test, np.flatnonzero(in_test), 200 if quick else 600),
        ):
            parts.append(subset(pool, _thinned(rows, limit, seed), split / f"{path.parent.name}-{side}"))
    responses = _cached_responses(train, test, split / "responses.npz", seed, quick=quick)
    tag_N = tags_of(whole(test))
    return DataSet(
        "recordings", whole(train), whole(test), _class_of_tags(tag_N), responses, tag_N, whole(test)
    )


def ingest_recordings(data: Path, out: Path) -> None:
    """Make the pools of `recordings` that are not there: NGSIM (real) and SUMO scenarios (synthetic) of CommonRoad.

    Args:
        data: Folder with the archives and their index, which tells what was cut from one recording.
        out: Receives one pool in each sub-folder.
    """
    groups = known_groups(data / GROUPS)
    for name, (archive, domain) in {"ngsim": (RECORDED, "real"), "sumo": (SIMULATED, "synthetic")}.items():
        if not (out / name / "manifest.json").is_file():
            ingest("commonroad", data / archive, out / name, domain, known_groups=groups, num_processes=2)


def _thinned(rows: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(seed + 1).choice(rows, limit, replace=False))


def tags_of(side: Side, *, of_history: bool = False) -> np.ndarray:
    """Return the tag of every scene, see `motion_tags`.

    Args:
        side: Scenes.
        of_history: Tag the drive that goes on as it was, in place of the drive of the 4 s to come.
    """
    batches = (continued(batch) if of_history else batch for batch in side.batches())
    return np.concatenate([np.array(motion_tags(batch)) for batch in batches])


def continued(batch: SceneBatch) -> SceneBatch:
    """Return scenes whose ego keeps the turn rate and the acceleration of its last 1.5 s until 4 s.

    Only heading and speed at 4 s are changed: they are what the tags read of the drive.
    """
    states = batch.ego_states_NT7.clone()
    now, before = states[:, CURRENT_FRAME], states[:, CURRENT_FRAME - 3]
    turn = torch.atan2((now[:, 2] - before[:, 2]).sin(), (now[:, 2] - before[:, 2]).cos())
    steps = (PLAN_END - CURRENT_FRAME) / 3
    states[:, PLAN_END, 2] = now[:, 2] + steps * turn
    states[:, PLAN_END, 3] = (now[:, 3] + steps * (now[:, 3] - before[:, 3])).clamp(min=0)
    return dataclasses.replace(batch, ego_states_NT7=states)


def most_common(tag_N: np.ndarray, num_groups: int) -> np.ndarray:
    """Merge the rarest tags into one group, so that there are at most `num_groups`."""
    names, count = np.unique(tag_N, return_counts=True)
    if len(names) <= num_groups:
        return tag_N
    kept = names[np.argsort(-count, kind="stable")[: num_groups - 1]]
    return np.where(np.isin(tag_N, kept), tag_N, "")


def _class_of_tags(tags: np.ndarray) -> np.ndarray:
    names, count = np.unique(tags, return_counts=True)
    return np.where(np.isin(tags, names[count >= MIN_CLASS_SCENES]), tags, "")


def motion_tags(batch: SceneBatch) -> list[str]:
    """Name every scene by what its ego does and what is around it.

    Turn: the drive of 4 s turns by more than 20 degrees. Speed: standing (< 0.5 m/s), stopping (loses more than
    half), speeding up (gains more than 2 m/s) or steady. Following: a moving vehicle within 30 m ahead and 2 m of
    the route. Dense: more than 12 agents within 40 m. Pedestrian near: within 15 m.
    """
    states = batch.ego_states_NT7
    turn = states[:, PLAN_END, 2] - states[:, CURRENT_FRAME, 2]
    turn = torch.atan2(turn.sin(), turn.cos())
    now, then = states[:, CURRENT_FRAME, 3], states[:, PLAN_END, 3]
    pace = np.select([(now < 0.5).numpy(), (then < 0.5 * now).numpy(), (then > now + 2).numpy()],
                     ["standing", "stopping", "speeding"], "steady")  # fmt: skip
    side = np.select([(turn > 0.35).numpy(), (turn < -0.35).numpy()], ["left", "right"], "straight")
    agent = batch.agent_states_AT5[:, CURRENT_FRAME]
    place = route_coordinates(agent[:, :2], batch.agent_row_A, route_of(batch))
    seen, distance = batch.agent_valid_AT[:, CURRENT_FRAME], agent[:, :2].norm(dim=1)
    vehicle = batch.agent_type_A == AGENT_TYPES.index("vehicle")
    ahead = seen & vehicle & (place[:, 0] > 2) & (place[:, 0] < 30) & (place[:, 1].abs() < 2)
    marks = {
        "following": (_count(batch, ahead & (agent[:, 3:5].norm(dim=1) > 0.5)) > 0),
        "dense": _count(batch, seen & (distance < 40)) > 12,
        "pedestrian": _count(
            batch, seen & (distance < 15) & (batch.agent_type_A == AGENT_TYPES.index("pedestrian"))
        )
        > 0,
    }
    extra = ["+".join(name for name, flags in marks.items() if flags[row]) for row in range(len(batch))]
    return [f"{side[row]} {pace[row]} {extra[row]}".strip() for row in range(len(batch))]


def _count(batch: SceneBatch, flag_A: torch.Tensor) -> np.ndarray:
    return torch.bincount(batch.agent_row_A[flag_A], minlength=len(batch)).numpy()
