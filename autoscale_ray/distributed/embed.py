"""Embed pools with Ray Data: row ranges go out, embeddings come back as Parquet parts that survive a kill.

No scene passes through the object store: an actor gets the name of a pool and a range of rows, reads the rows from
the pool's own memory-mapped cache and writes ids and embeddings to a part file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from autoscale_ray import tasks
from autoscale_ray.config import RayConfig
from autoscale_ray.distributed.causes import own_error
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.distributed.devices import worker_device
from autoscale_ray.errors import AutoScaleError, InputRejectedError
from autoscale_ray.files import in_one_step
from autoscale_ray.representation.model import GRAPH_CHUNK, embed_batch, load
from autoscale_ray.scenes.pool import ScenePool, open_pool

NO_PROGRESS_TIMEOUT_S = 300
"""Ray Data waits half an hour by default before it says that nothing moves."""
TASKS_AN_EMBEDDER = 8
RANGES_A_TASK = 16
"""At most, so that a task says long before the timeout that something moves."""


class EmbeddingFailedError(AutoScaleError, RuntimeError):
    """Embedders stand still, also those that were started anew."""


class RangeEmbedder:
    """Actor that embeds row ranges of pools; loads the encoder by path, once.

    Args:
        encoder: Folder of the trained encoder.
        deadline: How long one range may take before this process ends itself.
    """

    def __init__(self, encoder: str, deadline: Deadline) -> None:
        torch.set_num_threads(1)
        self._deadline = deadline
        self._model = load(Path(encoder)).to(worker_device())
        self._pools: dict[str, ScenePool] = {}

    def __call__(self, ranges: pa.Table) -> pa.Table:
        """Write the part of every range; return how many rows each has."""
        num_rows = []
        for item in ranges.to_pylist():
            with self._deadline:
                num_rows.append(self._embed(item))
        return pa.table({"num_rows": num_rows})

    def _embed(self, item: dict[str, Any]) -> int:
        if item["pool"] not in self._pools:
            # Of a read-only pool every node builds a cache, which takes minutes.
            self._pools[item["pool"]] = open_pool(item["pool"], on_file=self._deadline.renew)
        pool, start, stop = self._pools[item["pool"]], item["start"], item["stop"]
        ids = pool.ids_between(start, stop)
        # A task whose embedder was killed is run again from its first range.
        if not is_whole(item, ids):
            z_ND = embed_batch(self._model, pool.batch(np.arange(start, stop), ids)).cpu().numpy()
            with in_one_step(Path(item["part"])) as temporary:
                tasks.write_embeddings(ids, z_ND, temporary)
        return stop - start


def embed_pools(
    encoder: Path, pools: dict[str, ScenePool], parts: Path, stacks: Path, folder: Path, config: RayConfig
) -> dict[str, Any]:
    """Embed every scene of the pools; parts that an earlier attempt finished are used again.

    Args:
        encoder: Folder of the trained encoder.
        pools: Pools by side.
        parts: Folder for the parts; outlives a killed attempt.
        stacks: Folder for the stacks of embedders that stood still.
        folder: Receives one table a side.
        config: How many embedders, and how long one may stand still.

    Returns:
        Nothing to record beside the files.

    Raises:
        EmbeddingFailedError: Nothing moved, although embedders that stood still were started again.
        AutoScaleError: What an embedder ran into: a damaged pool, a full disk.
    """
    missing = [
        item
        for side, pool in pools.items()
        for item in row_ranges(side, pool, parts)
        if not is_whole(item, pool.scene_ids[item["start"] : item["stop"]])
    ]
    parts.mkdir(parents=True, exist_ok=True)
    if missing:
        run_ranges(encoder, missing, stacks, config)
    for side, pool in pools.items():
        embeddings = [_part_of(item, pool) for item in row_ranges(side, pool, parts)]
        tasks.write_embeddings(pool.scene_ids, np.concatenate(embeddings), folder / tasks.table_file(side))
    return {}


def run_ranges(encoder: Path, ranges: list[dict[str, Any]], stacks: Path, config: RayConfig) -> None:
    """Send row ranges through a pool of embedders, which write the part of each."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else `own_error` finds its words alone
    context.execution_no_progress_timeout_s = no_progress_timeout_s(config)
    # Not from_arrow: it asks a worker process for the size of every block.
    embedded = ray.data.from_items(ranges, override_num_blocks=num_tasks(len(ranges), config)).map_batches(
        RangeEmbedder,
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_embedders, len(ranges))),
        fn_constructor_args=(str(encoder), Deadline(config.stall_timeout_s, stacks)),
        num_cpus=1,
        num_gpus=config.gpus_per_worker or None,
    )
    try:
        done = pa.concat_tables(embedded.iter_batches(batch_size=None, batch_format="pyarrow"))
    except ExecutionTimeoutError as error:
        raise EmbeddingFailedError(
            f"no range of scenes was embedded in {context.execution_no_progress_timeout_s:g} s; where the embedders "
            f"stood is told in {stacks}"
        ) from error
    except RayError as error:
        if own := own_error(error):
            raise own from error
        raise
    assert sum(done["num_rows"].to_pylist()) == sum(item["stop"] - item["start"] for item in ranges)


def no_progress_timeout_s(config: RayConfig) -> int:
    """Return after how long without a finished task embedding is given up.

    Later than an embedder that stands still, which leaves its stacks before another one tries, and later than nodes
    for the embedders may come: Ray Data counts the time that its actors wait for a place as well.
    """
    return NO_PROGRESS_TIMEOUT_S + max(config.stall_timeout_s, config.start_timeout_s)


def num_tasks(num_ranges: int, config: RayConfig) -> int:
    """Return how many tasks a number of ranges is dealt to: few, as each costs, yet enough to share out evenly."""
    return max(min(num_ranges, TASKS_AN_EMBEDDER * config.num_embedders), -(-num_ranges // RANGES_A_TASK))


def row_ranges(side: str, pool: ScenePool, parts: Path) -> Iterator[dict[str, Any]]:
    """Yield the row ranges of a pool; their bounds are those of the local loop, so the bits are the same."""
    for start in range(0, len(pool), GRAPH_CHUNK):
        stop = min(start + GRAPH_CHUNK, len(pool))
        part = parts / f"{side}-{start:09d}-{stop:09d}.parquet"
        yield {"pool": str(pool.path), "start": start, "stop": stop, "part": str(part)}


def _part_of(item: dict[str, Any], pool: ScenePool) -> np.ndarray:
    """Return the embeddings of a range, float32 (rows, D)."""
    ids, z_ND = tasks.read_embeddings(Path(item["part"]))
    assert np.array_equal(ids, pool.scene_ids[item["start"] : item["stop"]]), "each once, in pool order"
    return z_ND


def is_whole(item: dict[str, Any], scene_ids: np.ndarray) -> bool:
    """Return whether a part holds exactly the scenes of its range."""
    path = Path(item["part"])
    if not path.is_file():
        return False
    try:
        ids, _ = tasks.read_embeddings(path)
    except (InputRejectedError, pa.ArrowInvalid, OSError):
        return False
    return np.array_equal(ids, scene_ids)
