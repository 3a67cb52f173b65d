"""How fast whole scenes become tensors: every column of the pool, random and consecutive rows, CPU time of one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_batch --check --json out.json

Rivals hold the same content: PyG's Batch.from_data_list over Data objects prebuilt in memory (every tensor of a scene
as an attribute), and random rows of one list column read from Parquet (zstd 3, row groups of 1024). Variants take turns
inside one process; a figure is the median over the turns, of scenes a CPU-second.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from autoscale_ray.scenes.batch import SceneBatch, tensors_of
from autoscale_ray.scenes.pool import ScenePool, open_pool, write_pool
from autoscale_ray.scenes.ragged import ragged_index
from autoscale_ray.scenes.schema import NUM_FRAMES, SCENE_SCHEMA, inner_shape
from benchmarks.surroundings import common_parser, surroundings, tell, verdict

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.data import Batch, Data

BATCH = 256
TARGETS = {"random_over_pyg": 6.0, "contiguous_over_pyg": 15.0, "cache_rows_over_parquet": 50.0}
"""Ratios, at least."""
_SIZES = {"A": 20, "L": 20, "V": 200, "E": 40, "Q": 40, "W": 400, "C": 40}


def main() -> int:
    """Run the benchmark; return 1 when a target is missed under --check."""
    arguments = common_parser(__doc__, quick="fewer scenes and turns").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        num_scenes = 2_048 if arguments.quick else 10_240
        pool = _pool(Path(folder), num_scenes, arguments.seed)
        result = _measure(pool, Path(folder), 5 if arguments.quick else 15, arguments.seed)
    result |= {"seed": arguments.seed, "num_scenes": num_scenes}
    result |= surroundings("torch", "torch-geometric", "pyarrow", "numpy")
    tell(result, arguments.json)
    missed = [f"{name} {result['ratios'][name]:.2f} {target}" for name, target in TARGETS.items()
              if result["ratios"][name] < target]  # fmt: skip
    return verdict(missed, check=arguments.check)


def _pool(folder: Path, num_scenes: int, seed: int) -> ScenePool:
    """Write a pool of scenes of even size: the content does not matter here, its size does."""
    rng = np.random.default_rng(seed)
    block = 1_024
    tables = (_table(rng, block, first) for first in range(0, num_scenes, block))
    write_pool(folder / "pool", tables)
    return open_pool(folder / "pool")


def _table(rng: np.random.Generator, count: int, first: int) -> pa.Table:
    columns = []
    for field in SCENE_SCHEMA:
        if not pa.types.is_list(field.type):
            columns.append(_scalar(rng, field, count, first))
            continue
        letter = (field.metadata or {})[b"stride"].decode().split(",")[0]
        items = _SIZES.get(letter, 1) if not letter.endswith("+1") else _SIZES[letter[0]] + 1
        width = int(np.prod(inner_shape(field))) * (0 if field.name == "tags" else items)
        values = _flat(rng, field, count, width)
        offsets = pa.array(np.arange(count + 1) * width, type=pa.int32())
        columns.append(pa.ListArray.from_arrays(offsets, values, type=field.type))
    return pa.Table.from_arrays(columns, schema=SCENE_SCHEMA)


def _scalar(rng: np.random.Generator, field: pa.Field, count: int, first: int) -> pa.Array:
    if field.name == "scene_id":
        return pa.array([f"scene-{first + row}" for row in range(count)])
    if pa.types.is_string(field.type):
        value = None if field.nullable else "synthetic"
        return pa.array([value] * count, type=pa.string())
    return pa.array(rng.integers(0, 3, size=count)).cast(field.type)


def _flat(rng: np.random.Generator, field: pa.Field, count: int, width: int) -> pa.Array:
    kind = field.type.value_type
    if field.name == "lane_offsets" or field.name == "polygon_offsets":
        per_item = 10
        return pa.array(np.tile(np.arange(width) * per_item, count)).cast(kind)
    if pa.types.is_floating(kind):
        return pa.array(rng.normal(scale=20.0, size=count * width).astype(np.float32)).cast(kind)
    return pa.array(rng.integers(0, 2, size=count * width)).cast(kind)


def _measure(pool: ScenePool, folder: Path, turns: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed + 1)
    table = pool.table(np.arange(len(pool)))
    pq.write_table(table.select(["agent_states"]), folder / "list.parquet", compression="zstd", compression_level=3,
                   row_group_size=1024, use_dictionary=False)  # fmt: skip
    prebuilt = [_data(pool.cached.select([row])) for row in range(2_048)]
    rows = [rng.integers(len(pool), size=BATCH) for _ in range(turns)]
    few = [turn % 2_048 for turn in rows]
    starts = [int(turn[0]) % (len(pool) - BATCH) for turn in rows]
    variants: dict[str, Callable[[int], object]] = {
        "pyg": lambda turn: Batch.from_data_list([prebuilt[row] for row in few[turn]]),
        "random": lambda turn: pool.batch(rows[turn]),
        "contiguous": lambda turn: pool.cached.select(np.arange(starts[turn], starts[turn] + BATCH)),
        "cache_column": lambda turn: _cached_rows(pool.cached, rows[turn]),
        "parquet_column": lambda turn: _parquet_rows(folder / "list.parquet", rows[turn]),
    }
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns):
        for name, run in variants.items():
            speeds[name].append(BATCH / _cpu_seconds(run, turn))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    spread = {name: statistics.stdev(values) for name, values in speeds.items()}
    ratios = {
        "random_over_pyg": median["random"] / median["pyg"],
        "contiguous_over_pyg": median["contiguous"] / median["pyg"],
        "cache_rows_over_parquet": median["cache_column"] / median["parquet_column"],
    }
    return {"scenes_per_cpu_s": median, "standard_deviation": spread, "ratios": ratios, "targets": TARGETS}


def _data(scene: SceneBatch) -> Data:
    """Return one scene as a PyG graph: agents are the nodes, the table of neighbours gives the edges."""
    parts = {name: tensor for name, tensor in tensors_of(scene).items() if not name.endswith("offsets")}
    neighbours = parts.pop("agent_neighbours_A8").long()
    sender, receiver = (
        neighbours.flatten(),
        torch.arange(len(neighbours)).repeat_interleave(neighbours.shape[1]),
    )
    edges = torch.stack([sender, receiver])[:, sender >= 0]
    return Data(
        x=parts.pop("agent_states_AT5").clone(), edge_index=edges, **{k: v.clone() for k, v in parts.items()}
    )


def _cached_rows(whole: SceneBatch, rows: np.ndarray) -> torch.Tensor:
    rows_B = torch.from_numpy(rows)
    starts = whole.agent_offsets[rows_B]
    index, _ = ragged_index(starts, whole.agent_offsets[rows_B + 1] - starts)
    return whole.agent_states_AT5.index_select(0, index)


def _parquet_rows(path: Path, rows: np.ndarray) -> torch.Tensor:
    file = pq.ParquetFile(path)
    groups = np.unique(rows // 1024)
    table = file.read_row_groups(groups.tolist())
    local = np.searchsorted(groups, rows // 1024) * 1024 + rows % 1024
    values = table["agent_states"].combine_chunks().take(pa.array(local)).flatten()
    return torch.from_numpy(np.array(values)).reshape(-1, NUM_FRAMES, 5)


def _cpu_seconds(run: Callable[[int], object], turn: int) -> float:
    """Return CPU seconds of one call; short ones are repeated so that the clock's step does not count."""
    repeats, elapsed = 1, 0.0
    while elapsed < 0.01:
        begin = time.process_time()
        for _ in range(repeats):
            run(turn)
        elapsed = time.process_time() - begin
        repeats *= 4
    return elapsed / (repeats // 4)


if __name__ == "__main__":
    sys.exit(main())
