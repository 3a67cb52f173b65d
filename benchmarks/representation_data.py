"""Scenes and judges of the representation benchmark: the built-in world and recorded traffic.

Judges (families, tags, scores of planners) are read here and nowhere else; no embedding sees them.

Shape legend: N scenes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from autoscale_ray.config import PlannerConfig, WorldConfig
from autoscale_ray.evaluation.from_pool import prepare_pool, score_pool
from autoscale_ray.planning.features import concatenate, features_of_pool
from autoscale_ray.planning.inference import predict
from autoscale_ray.planning.training import train as train_planner
from autoscale_ray.representation.kinematics import route_coordinates, route_of
from autoscale_ray.representation.training import GRAPH_CHUNK
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.pool import ScenePool, open_pool
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME
from autoscale_ray.world.pools import make_pool

PLAN_END = CURRENT_FRAME + 8
MIN_CLASS_SCENES = 8
NUM_PLANNERS = 3
"""Training seeds that scores are averaged over: one pair of planners differs by chance more than by its data."""
TEST_LOG_SHARE = 0.3


@dataclass(frozen=True)
class Side:
    """Some rows of some pools."""

    pools: tuple[ScenePool, ...]
    rows: tuple[NDArray[np.int64], ...]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def batches(self) -> Iterator[SceneBatch]:
        for pool, rows in zip(self.pools, self.rows, strict=True):
            for start in range(0, len(rows), GRAPH_CHUNK):
                yield pool.batch(rows[start : start + GRAPH_CHUNK])

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(
            [pool.column(name)[rows] for pool, rows in zip(self.pools, self.rows, strict=True)]
        )


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


def whole(pools: Sequence[ScenePool]) -> Side:
    return Side(tuple(pools), tuple(np.arange(len(pool)) for pool in pools))


def built_in_world(folder: Path, seed: int, *, quick: bool) -> DataSet:
    """Make the default world and judge by its hidden families.

    Args:
        folder: Receives the pools; pools that are there are used again.
        seed: World seed; the test scenes have their own.
        quick: A small pool.
    """
    per_family = 12 if quick else 60
    config = WorldConfig(seed=seed, num_real=200 if quick else 700, num_synthetic=800 if quick else 5000,
                         num_dev_per_family=per_family, num_test_per_family=per_family,
                         test_seed=2_000_003 + seed)  # fmt: skip
    pools = {}
    for side in ("real", "synthetic", "test"):
        path = folder / f"world-{seed}-{'quick' if quick else 'full'}" / side
        if not (path / "manifest.json").is_file():
            make_pool(config, side, path)  # type: ignore[arg-type]
        pools[side] = open_pool(path)
    family_N = truth_column(pools["test"], "family")
    responses = _cached_responses(pools, path.parent / "responses.npz", seed, quick=quick)
    test = whole([pools["test"]])
    return DataSet(
        "world", whole([pools["real"], pools["synthetic"]]), test, family_N, responses, tags_of(test)
    )


def truth_column(pool: ScenePool, name: str) -> np.ndarray:
    table = pq.read_table(pool.path / "truth.parquet", columns=["scene_id", name])
    by_id = dict(zip(table["scene_id"].to_pylist(), table[name].to_pylist(), strict=True))
    return np.array([by_id[scene_id] for scene_id in pool.scene_ids])


def _cached_responses(
    pools: dict[str, ScenePool], file: Path, seed: int, *, quick: bool
) -> dict[str, np.ndarray]:
    """Score planners trained on real scenes, and on these and a family-blind draw of 700, on the test scenes."""
    if not file.is_file():
        config = PlannerConfig(num_steps=60) if quick else PlannerConfig()
        features = {name: features_of_pool(pool, config) for name, pool in pools.items()}
        num_real, num_pool = len(pools["real"]), len(pools["synthetic"])
        data, prepared = concatenate([features["real"], features["synthetic"]]), prepare_pool(pools["test"])
        everything = np.arange(len(pools["test"]))
        scores: dict[str, list[np.ndarray]] = {"real_only": [], "vanilla": []}
        for turn in range(1 if quick else NUM_PLANNERS):
            drawn = np.random.default_rng([seed, turn]).choice(num_pool, min(700, num_pool), replace=False)
            for arm, added in {"real_only": drawn[:0], "vanilla": num_real + drawn}.items():
                rows = np.concatenate([np.arange(num_real), added])
                weights = train_planner(data, rows, config, NUM_PLANNERS * seed + turn)
                table = score_pool(prepared, predict(weights, features["test"], everything))
                scores[arm].append(table["epdms"].to_numpy().astype(float))
        np.savez(file, **{arm: np.mean(columns, axis=0) for arm, columns in scores.items()})  # type: ignore[arg-type]
    loaded = dict(np.load(file))
    return {"score": loaded["vanilla"], "difference": loaded["vanilla"] - loaded["real_only"]}


def recordings(folder: Path, seed: int, *, quick: bool) -> DataSet:
    """Split recorded and simulated traffic by log and judge by tags of motion and map.

    Args:
        folder: Holds one pool in each sub-folder; made by `autoscale ingest`.
        seed: Seed of the split.
        quick: At most 600 training scenes of each pool.
    """
    pools = [open_pool(path.parent) for path in sorted(folder.glob("*/manifest.json"))]
    train_rows, test_rows = [], []
    for pool in pools:
        logs = np.unique(pool.log_ids)
        order = np.random.default_rng(seed).permutation(len(logs))
        held = logs[order[: max(1, round(TEST_LOG_SHARE * len(logs)))]]
        in_test = np.isin(pool.log_ids, held)
        train_rows.append(_thinned(np.flatnonzero(~in_test), 600 if quick else 8000, seed))
        test_rows.append(_thinned(np.flatnonzero(in_test), 200 if quick else 600, seed))
    test = Side(tuple(pools), tuple(test_rows))
    return DataSet(
        "recordings",
        Side(tuple(pools), tuple(train_rows)),
        test,
        _class_of_tags(tags_of(test)),
        {},
        tags_of(test),
    )


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
