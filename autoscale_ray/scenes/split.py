"""Split a pool into sides by log, so that no recording stands on two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import PoolError
from autoscale_ray.scenes.pool import PoolManifest, ScenePool, write_pool

CHUNK = 2048


def split_by_log(pool: ScenePool, side_of_log: Mapping[str, str], out: Path) -> dict[str, PoolManifest]:
    """Write one pool for each side.

    Args:
        pool: Scenes to split; the pool itself is left as it is.
        side_of_log: Side of every log id; logs that are not named are left out.
        out: Receives one folder per side.

    Returns:
        The manifests by side.

    Raises:
        PoolError: A named log is not in the pool, or a folder is in use.
    """
    logs = pool.log_ids
    unknown = sorted(set(side_of_log) - set(logs.tolist()))
    if unknown:
        raise PoolError(str(pool.path), "has no such log", unknown[0])
    sides_N = np.array([side_of_log.get(log, "") for log in logs.tolist()])
    return {
        side: write_pool(out / side, _tables(pool, np.flatnonzero(sides_N == side)))
        for side in sorted(set(side_of_log.values()))
    }


def _tables(pool: ScenePool, rows: np.ndarray) -> Iterator[pa.Table]:
    return (pool.table(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK))
