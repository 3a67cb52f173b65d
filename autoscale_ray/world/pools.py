"""The four sides of a built-in world as scene pools: real and synthetic for training, dev and test for
scoring.

Every side is a plan (one line per scene: family, row of its random stream, quality) whose chunks are
simulated one after the other, so memory does not grow with the pool. Hidden truth goes to `truth.parquet`
beside the pool and never into its columns.

Shape legend: N scenes, D coordinates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.config import WorldConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.records import Side
from autoscale_ray.scenes.pool import PoolManifest, write_pool
from autoscale_ray.world.draws import NUM_COORDINATES, cube_rows, seed_of
from autoscale_ray.world.expert import TERMS
from autoscale_ray.world.families import FAMILIES, SAFETY_WEIGHT
from autoscale_ray.world.presets import PRESETS, QUALITIES, counts
from autoscale_ray.world.simulation import Conditions, Driven, add_noise, simulate
from autoscale_ray.world.tables import Identity, scene_table

SOURCES = {"real": "world/recorded", "synthetic": "world/simulated"}
CHUNK_SCENES = 4096
NAMES = tuple(FAMILIES)
FRESH, NEAR_DUPLICATE, PERTURBED_COPY = range(3)
ORIGINS = ("fresh", "near_duplicate", "perturbed_copy")
_DUPLICATE_WIDTH = 0.03


@dataclass(frozen=True, slots=True)
class Plan:
    """What every scene of a side will be."""

    side: Side
    seed: int
    family_N: np.ndarray
    row_N: np.ndarray
    """Row in the random stream of the family (of the real side for perturbed copies)."""
    quality_N: np.ndarray
    """Index into `QUALITIES`."""
    origin_N: np.ndarray
    """Index into `ORIGINS`."""
    group_N: np.ndarray
    """Base scene of a near-duplicate, real scene of a perturbed copy, else -1."""

    def __len__(self) -> int:
        return len(self.family_N)


def make_pool(config: WorldConfig, side: Side, out: str | Path) -> PoolManifest:
    """Write one side of a world as a scene pool with its hidden truth.

    Beside the pool's own files: `truth.parquet` (scene_id, family, quality, origin, the expert's kinematic
    terms) and, for dev and test, `weights.parquet` (scene_id, weight), the declared weights of the objective.

    Args:
        config: World; the real and synthetic sides depend on `seed`, dev on `seed`, test on `test_seed`.
        side: Which pool.
        out: Folder to write.

    Returns:
        The manifest of the pool.

    Raises:
        ConfigError: A count below 1 or a negative seed.
    """
    check_config(config)
    side_tables: dict[str, pa.Table] = {}
    scenes = _scenes(plan_side(config, side), config.preset, side_tables)
    return write_pool(out, scenes, side_tables=side_tables)


def evaluation_weights(families: list[str], preset: str) -> np.ndarray:
    """Return the weight of each scene in the declared objective, given the families of the scenes."""
    safety = SAFETY_WEIGHT if PRESETS[preset].weighted else 1.0
    return np.array([safety if FAMILIES[family].safety else 1.0 for family in families])


def check_config(config: WorldConfig) -> None:
    """Refuse counts below 1 and negative seeds."""
    for name in ("num_real", "num_synthetic", "num_dev_per_family", "num_test_per_family"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"world.{name}", "must be an integer >= 1", value)
    for name in ("seed", "test_seed"):
        if getattr(config, name) < 0:
            raise ConfigError(f"world.{name}", "must be an integer >= 0", getattr(config, name))


def plan_side(config: WorldConfig, side: Side) -> Plan:
    """Return the plan of a side; scenes of all families are mixed in a seeded order."""
    preset = PRESETS[config.preset]
    families = [name for name in NAMES if name in preset.real_shares]
    if side == "real":
        return _shuffled(side, config.seed, counts(preset.real_shares, config.num_real or preset.num_real))
    if side == "dev":
        return _shuffled(side, config.seed, dict.fromkeys(families, config.num_dev_per_family))
    if side == "test":
        return _shuffled(side, config.test_seed, dict.fromkeys(families, config.num_test_per_family))
    num_copies = round(preset.copy_share * config.num_synthetic)
    plan = _shuffled(side, config.seed, counts(preset.pool_shares, config.num_synthetic - num_copies))
    quality_N = np.array([QUALITIES.index(preset.quality[name]) for name in NAMES])[plan.family_N]
    origin_N, group_N = plan.origin_N.copy(), plan.group_N.copy()
    for name, num_bases in preset.near_duplicates.items():
        chosen = plan.family_N == NAMES.index(name)
        origin_N[chosen], group_N[chosen] = NEAR_DUPLICATE, plan.row_N[chosen] % num_bases
    plan = replace(plan, quality_N=quality_N, origin_N=origin_N, group_N=group_N)
    return _with_copies(plan, config, num_copies)


def _shuffled(side: Side, seed: int, sizes: dict[str, int]) -> Plan:
    family_N = np.repeat([NAMES.index(name) for name in sizes], list(sizes.values()))
    row_N = np.concatenate([np.arange(size) for size in sizes.values()])
    order = np.random.default_rng(seed_of(seed, side, "order")).permutation(len(family_N))
    zero_N = np.zeros(len(order), dtype=np.int64)
    return Plan(side, seed, family_N[order], row_N[order], zero_N, zero_N, zero_N - 1)


def _with_copies(plan: Plan, config: WorldConfig, num_copies: int) -> Plan:
    if num_copies == 0:
        return plan
    real = plan_side(config, "real")
    generator = np.random.default_rng(seed_of(config.seed, "synthetic", "copies"))
    group_N = generator.integers(0, len(real), num_copies)
    zero_N = np.zeros(num_copies, dtype=np.int64)
    extra = (real.family_N[group_N], real.row_N[group_N], zero_N, zero_N + PERTURBED_COPY, group_N)
    own = (plan.family_N, plan.row_N, plan.quality_N, plan.origin_N, plan.group_N)
    order = generator.permutation(len(plan) + num_copies)
    return Plan(plan.side, plan.seed, *(np.concatenate(pair)[order] for pair in zip(own, extra, strict=True)))


def _scenes(plan: Plan, preset: str, side_tables: dict[str, pa.Table]) -> Iterator[pa.Table]:
    """Yield the scenes of a side; after the last of them put truth and weights into `side_tables`."""
    truths = []
    for table, truth in _chunks(plan):
        truths.append(truth)
        yield table
    truth = side_tables["truth"] = pa.concat_tables(truths)
    if plan.side in ("dev", "test"):
        weights = pa.array(evaluation_weights(truth["family"].to_pylist(), preset), pa.float64())
        side_tables["weights"] = pa.table({"scene_id": truth["scene_id"], "weight": weights})


def _chunks(plan: Plan) -> Iterator[tuple[pa.Table, pa.Table]]:
    for start in range(0, len(plan), CHUNK_SCENES):
        yield chunk_tables(plan, np.arange(start, min(start + CHUNK_SCENES, len(plan))))


def chunk_tables(plan: Plan, numbers_N: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """Simulate the scenes of a plan with the given numbers.

    Args:
        plan: Plan of a side.
        numbers_N: Scene numbers, ascending.

    Returns:
        Rows of `SCENE_SCHEMA` and the hidden truth, both in the order of `numbers_N`.
    """
    cube_ND = _cube(plan, numbers_N)
    tables, truths, members = [], [], []
    for index in np.unique(plan.family_N[numbers_N]):
        name = NAMES[index]
        of_family = plan.family_N[numbers_N] == index
        variant_N = (cube_ND[:, 0] * FAMILIES[name].num_variants).astype(int)
        for variant in np.unique(variant_N[of_family]):
            chosen = np.flatnonzero(of_family & (variant_N == variant))
            driven = simulate(name, int(variant), cube_ND[chosen], _conditions(plan, numbers_N[chosen]))
            numbers = numbers_N[chosen]
            truths.append(_truth(plan, numbers, driven, name))
            tables.append(scene_table(_observed(plan, numbers, driven), identity(plan, numbers)))
            members.append(chosen)
    order = np.argsort(np.concatenate(members))
    return pa.concat_tables(tables).take(order), pa.concat_tables(truths).take(order)


def _cube(plan: Plan, numbers_N: np.ndarray) -> np.ndarray:
    cube_ND = np.empty((len(numbers_N), NUM_COORDINATES))
    family_N, origin_N, row_N = plan.family_N[numbers_N], plan.origin_N[numbers_N], plan.row_N[numbers_N]
    for index in np.unique(family_N):
        name = NAMES[index]
        fresh, near, copy = (np.flatnonzero((family_N == index) & (origin_N == kind)) for kind in range(3))
        cube_ND[fresh] = cube_rows((plan.seed, plan.side, name), row_N[fresh])
        cube_ND[copy] = cube_rows((plan.seed, "real", name), row_N[copy])
        if len(near):
            base = cube_rows((plan.seed, plan.side, name, "base"), plan.group_N[numbers_N][near])
            step = cube_rows((plan.seed, plan.side, name, "step"), row_N[near]) - 0.5
            step[:, 0] = 0.0  # the layout stays that of the base scene
            cube_ND[near] = np.clip(base + 2 * _DUPLICATE_WIDTH * step, 0.0, np.nextafter(1.0, 0.0))
    return cube_ND


def _conditions(plan: Plan, numbers_N: np.ndarray) -> Conditions:
    slow_N, harmful_N, split_N = (plan.quality_N[numbers_N] == QUALITIES.index(letter) for letter in "GHS")
    unit = 2.0 * cube_rows((plan.seed, plan.side, "nudge"), numbers_N)[:, :3] - 1.0
    nudge_N3 = unit * np.array([0.5, 0.05, 0.1]) * (plan.origin_N[numbers_N] == PERTURBED_COPY)[:, None]
    return Conditions(slow_N, harmful_N, split_N, nudge_N3)


def _observed(plan: Plan, numbers_N: np.ndarray, driven: Driven) -> Driven:
    if plan.side == "synthetic":
        return driven
    return add_noise(driven, np.random.default_rng(seed_of(plan.seed, plan.side, "noise", int(numbers_N[0]))))


def identity(plan: Plan, numbers_N: np.ndarray) -> Identity:
    """Return names and places of scenes: hashes, so that nothing but the side can be read from them.

    Near-duplicates of one base scene and copies of one real scene share a log, as cuts of one recording
    would.
    """
    names, logs, origins = [], [], []
    for number in numbers_N.tolist():
        kind, group = int(plan.origin_N[number]), int(plan.group_N[number])
        key = ("scene", number) if kind == FRESH else (ORIGINS[kind], int(plan.family_N[number]), group)
        names.append(hashed_name("scene", plan.seed, plan.side, number))
        logs.append(hashed_name("log", plan.seed, plan.side, *key))
        origins.append(hashed_name("scene", plan.seed, "real", group) if kind == PERTURBED_COPY else None)
    place = cube_rows((plan.seed, plan.side, "place"), numbers_N)[:, :4]
    map_pose_N3 = (place[:, :3] - 0.5) * np.array([2e5, 2e5, 2.0 * math.pi]) + np.array([5e5, 4e6, 0.0])
    time_us_N = (place[:, 3] * 1e15).astype(np.int64)
    domain = "synthetic" if plan.side == "synthetic" else "real"
    return Identity(names, logs, origins, domain, SOURCES[domain], time_us_N, map_pose_N3)


def hashed_name(*parts: int | str) -> str:
    """Return a 16-digit name made from its parts."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def _truth(plan: Plan, numbers_N: np.ndarray, driven: Driven, family: str) -> pa.Table:
    letter_N = np.array(QUALITIES)[plan.quality_N[numbers_N]]
    letter_N = np.where(np.isin(letter_N, ("H", "S")), np.where(driven.harmful_N, "H", "F"), letter_N)
    if FAMILIES[family].irreducible:
        letter_N = np.where(letter_N == "F", "irreducible", letter_N)
    columns = {
        "scene_id": [hashed_name("scene", plan.seed, plan.side, number) for number in numbers_N.tolist()],
        "family": [family] * len(numbers_N),
        "quality": letter_N.tolist(),
        "origin": [ORIGINS[kind] for kind in plan.origin_N[numbers_N]],
    }
    return pa.table(
        columns | {f"expert_{name}": driven.drive.terms[name].astype(np.float32) for name in TERMS}
    )


def generate(family: str, count: int, seed: int, quality: str = "F", side: Side = "dev") -> pa.Table:
    """Return scenes of one family without a pool.

    Args:
        family: A key of `FAMILIES`.
        count: Number of scenes, >= 1.
        seed: Seed of the stream.
        quality: A letter of `QUALITIES`.
        side: Side whose noise and names they get.

    Returns:
        Rows of `SCENE_SCHEMA`.

    Raises:
        ConfigError: Unknown family or quality.
    """
    if family not in FAMILIES:
        raise ConfigError("family", f"must be one of {', '.join(FAMILIES)}", family)
    if quality not in QUALITIES:
        raise ConfigError("quality", f"must be one of {', '.join(QUALITIES)}", quality)
    plan = _shuffled(side, seed, {family: count})
    plan = replace(plan, quality_N=plan.quality_N + QUALITIES.index(quality))
    return pa.concat_tables(table for table, _ in _chunks(plan))
