"""Split pools into sides by log, so that no recording stands on two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import PoolError
from autoscale_ray.files import all_or_none
from autoscale_ray.scenes.pool import PoolManifest, ScenePool, write_pool
from autoscale_ray.scenes.pool_writer import check_unused

CHUNK = 2048


def deal_logs(pool: ScenePool, shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Give every log of a pool to a side: large logs first, each to the side that lacks most of its share of scenes.

    Logs whose numbers of scenes have the same power of two below them come in random order.

    Args:
        pool: Scenes to split.
        shares: Share of the scenes by side, > 0; only their ratios count.
        seed: Seed of the order, >= 0.

    Returns:
        Side by log id, as `split_by_log` takes it.

    Raises:
        PoolError: Fewer logs than sides.
    """
    logs, counts = np.unique(pool.log_ids, return_counts=True)
    if len(logs) < len(shares):
        rule = f"needs a log for each of the {len(shares)} sides; scenes of one log must not stand on two"
        raise PoolError(str(pool.path), rule, len(logs))
    order = np.random.default_rng(seed).permutation(len(logs))
    order = order[np.argsort(-np.floor(np.log2(counts[order])), kind="stable")]
    sides = list(shares)
    wanted_S = np.array([shares[side] for side in sides], dtype=np.float64)
    lacking_S, empty_S = wanted_S / wanted_S.sum() * counts.sum(), np.ones(len(sides), dtype=bool)
    side_of_log: dict[str, str] = {}
    for num_left, log in zip(range(len(order), 0, -1), order.tolist(), strict=True):
        may_S = empty_S if num_left == empty_S.sum() else np.ones_like(empty_S)
        side = int(np.where(may_S, lacking_S, -np.inf).argmax())
        side_of_log[str(logs[log])] = sides[side]
        lacking_S[side] -= counts[log]
        empty_S[side] = False
    return side_of_log


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
    sides = sorted(set(side_of_log.values()))
    for side in sides:
        check_unused(out / side)
    sides_N = np.array([side_of_log.get(log, "") for log in logs.tolist()])
    manifests: dict[str, PoolManifest] = {}
    with all_or_none() as made:
        for side in sides:
            manifests[side] = write_pool(out / side, _tables(pool, np.flatnonzero(sides_N == side)))
            made.append(out / side)
    return manifests


def split_pools(
    recorded: ScenePool, shares: Mapping[str, float], seed: int, out: Path, synthetic: ScenePool | None = None
) -> dict[str, PoolManifest]:
    """Deal the logs of recordings out to sides; keep the synthetic scenes that may be trained on beside ``real``.

    Args:
        recorded: Scenes to split.
        shares: Share of the scenes by side, > 0; only their ratios count.
        seed: Seed of the order, >= 0.
        out: Receives one folder per side and, with synthetic scenes, the folder ``synthetic``.
        synthetic: Its scenes of logs that went to another side than ``real`` are left out; all others are kept,
            those of logs that are not in `recorded` too.

    Returns:
        The manifests by side.

    Raises:
        PoolError: Fewer logs than sides, no synthetic scene to keep, or a folder is in use.
    """
    side_of_log = deal_logs(recorded, shares, seed)
    if synthetic is None:
        return split_by_log(recorded, side_of_log, out)
    logs = np.unique(synthetic.log_ids).tolist()
    kept = {log: "synthetic" for log in logs if side_of_log.get(log, "real") == "real"}
    if not kept:
        raise PoolError(str(synthetic.path), "every scene is of a log of dev or test", len(synthetic))
    check_unused(out / "synthetic")  # told now, not after the other sides
    manifests = split_by_log(recorded, side_of_log, out)
    with all_or_none() as made:
        made.extend(out / side for side in manifests)
        return manifests | split_by_log(synthetic, kept, out)


def _tables(pool: ScenePool, rows: np.ndarray) -> Iterator[pa.Table]:
    return (pool.table(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK))
