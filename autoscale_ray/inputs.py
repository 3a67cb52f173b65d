"""The four pools of a run, opened and checked once; made by the built-in world where none is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig
from autoscale_ray.errors import ConfigError, PoolError
from autoscale_ray.records import SIDES, Side
from autoscale_ray.scenes.pool import ScenePool, check_disjoint, open_pool
from autoscale_ray.world.pools import make_pool

TRAINED: tuple[Side, ...] = ("real", "synthetic")
WEIGHTS_TABLE = "weights"
"""Side file of a dev or test pool: scene_id, weight in the objective."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Inputs:
    """Opened pools of a run, dev and test disjoint by log from all others, and the declared weights of their scenes."""

    pools: Mapping[str, ScenePool]
    weights: Mapping[str, np.ndarray]
    """Weight of every scene of the dev and test pools, in pool order."""

    def identity(self) -> dict[str, str]:
        """Return the content hash of every pool and of its weights: what a fingerprint sees of the data."""
        hashes = {side: pool.manifest.content_hash for side, pool in self.pools.items()}
        marks = {f"{side}_weights": fingerprint(w.tolist()) for side, w in self.weights.items()}
        return {**hashes, **marks}


def open_inputs(config: RunConfig, world_dir: Path) -> Inputs:
    """Open the four pools of a run; refuse empty ones and any log that stands on two sides.

    Real and synthetic may share logs: both are trained on, and a synthetic scene may be made from a real one.

    Args:
        config: Names the pools, or none of them: then the built-in world makes all four.
        world_dir: Where pools of the built-in world are kept between runs.

    Raises:
        ConfigError: Some pools are named and some are not.
        PoolError: A pool is missing, empty, damaged or of another schema version.
        SplitLeakError: Dev or test shares a log with another side.
    """
    named = dataclasses.asdict(config.data)
    if not any(named.values()):
        named = {side: str(_world_pool(config, side, world_dir)) for side in SIDES}
    missing = [side for side in SIDES if not named[side]]
    if missing:
        raise ConfigError("data", "name all four pools or none of them; missing", missing)
    pools = {side: open_pool(named[side]) for side in SIDES}
    check_disjoint(pools, may_share=TRAINED)
    return Inputs(
        pools=pools,
        weights={side: scene_weights(pools[side], config.evaluation.use_weights) for side in ("dev", "test")},
    )


def scene_weights(pool: ScenePool, use_weights: bool) -> np.ndarray:
    """Return the weight of every scene of a pool in the objective: its side file's, or 1.

    Raises:
        PoolError: The side file lacks a scene or holds a weight that is no number, negative or not finite.
        InputRejectedError: The side file is damaged or lacks a column.
    """
    table = pool.side_table(WEIGHTS_TABLE, ["scene_id", "weight"]) if use_weights else None
    if table is None:
        return np.ones(len(pool))
    where, kind = f"{pool.path}/{WEIGHTS_TABLE}.parquet", table["weight"].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise PoolError(where, "weights must be numbers", str(kind))
    by_id = dict(zip(table["scene_id"].to_pylist(), table["weight"].to_pylist(), strict=True))
    if len(by_id) < len(table):
        raise PoolError(
            where, "must hold one weight for a scene; rows more than scenes", len(table) - len(by_id)
        )
    absent = [scene for scene in pool.scene_ids.tolist() if scene not in by_id]
    if absent:
        raise PoolError(where, "must hold a weight for every scene; missing", absent[0])
    weights_N = np.array([by_id[scene] for scene in pool.scene_ids.tolist()], dtype=np.float64)
    with np.errstate(over="ignore"):
        total = weights_N.sum()
    if not ((weights_N >= 0).all() and 0 < total < np.inf):
        raise PoolError(where, "weights must be >= 0, not all 0, and of a finite sum")
    return weights_N


def _world_pool(config: RunConfig, side: Side, world_dir: Path) -> Path:
    folder = world_dir / f"{side}-{fingerprint(dataclasses.asdict(config.world))[:12]}"
    try:
        if not (folder / "manifest.json").is_file():
            make_pool(config.world, side, folder)
    except PoolError:  # trials that share a folder may draw one world at a time
        if not (folder / "manifest.json").is_file():
            raise
    return folder
