"""Scene pools: a folder of Parquet files with a manifest, and a derived memory-mapped cache.

A pool is immutable. It is written into a sibling folder and renamed when complete, so a half-written pool is
never seen. The content hash covers every value in row order and nothing else: it does not depend on how the
rows were cut into files, on the compression, on the machine or on the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import PoolError, SplitLeakError
from autoscale_ray.files import cache_folder
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.cache import open_cache, read_rows
from autoscale_ray.scenes.manifest import PoolFile, PoolManifest, read_manifest
from autoscale_ray.scenes.parquet import open_parquet, read_parquet
from autoscale_ray.scenes.pool_writer import SIDE_TABLES, PoolWriter, write_pool
from autoscale_ray.scenes.schema import SCENE_SCHEMA, check_schema

__all__ = ["PoolManifest", "PoolWriter", "ScenePool", "check_disjoint", "open_pool", "write_pool"]


@dataclass(frozen=True, eq=False)
class ScenePool:
    """A finished pool on disk; made by `open_pool`. Row numbers are positions in file order."""

    path: Path
    manifest: PoolManifest
    cache_dir: Path | None = None
    on_file: Callable[[], None] = lambda: None
    """Called before a Parquet file is read whole: building the cache of a large pool takes minutes."""

    def __len__(self) -> int:
        return self.manifest.num_scenes

    @cached_property
    def scene_ids(self) -> np.ndarray:
        """Return the scene ids by row, a NumPy string array."""
        return self.column("scene_id")

    @cached_property
    def log_ids(self) -> np.ndarray:
        """Return the log id of each row."""
        return self.column("log_id")

    @cached_property
    def origin_ids(self) -> np.ndarray:
        """Return the origin id of each row, an empty string where there is none."""
        return self.column("origin_id")

    @cached_property
    def sources(self) -> np.ndarray:
        """Return the source of each row."""
        return self.column("source")

    @cached_property
    def tags(self) -> tuple[tuple[str, ...], ...]:
        """Return the tags of each row."""
        return tuple(tuple(row) for row in self.list_column("tags"))  # pyright: ignore[reportReturnType]

    def list_column(self, name: str) -> list[list[object]]:
        """Return one flat column as Python lists; for small columns such as tags or ego_valid."""
        return self._read([name])[name].to_pylist()

    def column(self, name: str) -> np.ndarray:
        """Return one scalar column; strings as a NumPy string array in which null is empty.

        Args:
            name: Column of `SCENE_SCHEMA` that is not a list.

        Raises:
            PoolError: No such scalar column.
        """
        if name not in SCENE_SCHEMA.names or pa.types.is_list(SCENE_SCHEMA.field(name).type):
            raise PoolError(str(self.path), "has no scalar column of that name", name)
        column = self._read([name])[name]
        if pa.types.is_string(column.type):
            return np.array(column.fill_null("").to_pylist(), dtype=np.str_)
        return column.to_numpy()

    def ids_between(self, start: int, stop: int) -> np.ndarray:
        """Return the scene ids of the rows ``start <= row < stop``; files without such rows are not read."""
        assert 0 <= start < stop <= len(self), "row out of range"
        first_rows = np.cumsum([0, *(file.num_scenes for file in self.manifest.files)])
        first, last = (int(np.searchsorted(first_rows, row, "right")) for row in (start, stop - 1))
        files = self.manifest.files[first - 1 : last]
        tables = [read_parquet(self.path / file.name, ["scene_id"]) for file in files]
        column = pa.concat_tables(tables)["scene_id"].slice(start - first_rows[first - 1], stop - start)
        return np.array(column.to_pylist(), dtype=np.str_)

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """Return the row of each scene id, int64.

        Raises:
            PoolError: An id is not in the pool.
        """
        wanted = list(ids)
        rows = [self._row_by_id.get(str(key), -1) for key in wanted]
        if -1 in rows:
            raise PoolError(str(self.path), "has no such scene", wanted[rows.index(-1)])
        return np.array(rows, dtype=np.int64)

    def table(self, rows: np.ndarray | None = None) -> pa.Table:
        """Return rows as an Arrow table, in the order asked for.

        Args:
            rows: Row numbers, int64; all by default (small pools only).
        """
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        assert len(wanted) == 0 or (wanted.min() >= 0 and wanted.max() < len(self)), "row out of range"
        first_rows = np.cumsum([0, *(file.num_scenes for file in self.manifest.files)])
        order = np.argsort(wanted, kind="stable")
        parts = [SCENE_SCHEMA.empty_table()]
        for number, file in enumerate(self.manifest.files):
            low, high = np.searchsorted(wanted[order], first_rows[number : number + 2])
            if low < high:
                parts.append(self._file_table(file).take(wanted[order[low:high]] - first_rows[number]))
        return pa.concat_tables(parts).take(np.argsort(order, kind="stable")).combine_chunks()

    def file_tables(self) -> Iterator[pa.Table]:
        """Yield the pool file by file, in row order."""
        for file in self.manifest.files:
            self.on_file()
            yield self._file_table(file)

    def batch(self, rows: np.ndarray, ids: np.ndarray | None = None) -> SceneBatch:
        """Return rows as flat tensors from the memory-mapped cache, in the order asked for.

        The cache is built on first use.

        Args:
            rows: Row numbers, int64.
            ids: Their scene ids where they are known; by default the ids of the whole pool are read once.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        assert len(wanted) == 0 or (wanted.min() >= 0 and wanted.max() < len(self)), "row out of range"
        scene_ids = self.scene_ids[wanted] if ids is None else ids
        return read_rows(self.cached, wanted, tuple(scene_ids.tolist()))

    @cached_property
    def cached(self) -> SceneBatch:
        """Return the whole pool as one memory-mapped batch without scene ids; see `cache`."""
        elsewhere = None if self.cache_dir else cache_folder() / "pools"
        root = self.cache_dir or self.path / "cache"
        return open_cache(root, elsewhere, self.manifest.content_hash, self.file_tables(), str(self.path))

    def side_table(self, name: str, columns: list[str] | None = None) -> pa.Table | None:
        """Return a table of `SIDE_TABLES`, or some of its columns; None where the pool has none.

        Raises:
            InputRejectedError: Damaged, or a column is missing.
            PoolError: It was written with the pool and is not there any more.
        """
        assert name in SIDE_TABLES, name
        path = self.path / f"{name}.parquet"
        if path.exists():
            return read_parquet(path, columns)
        if name in self.manifest.side_tables:
            raise PoolError(str(path), "must be there as recorded in the manifest", "none")
        return None

    @cached_property
    def _row_by_id(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.scene_ids.tolist())}

    def _read(self, columns: list[str]) -> pa.Table:
        files = self.manifest.files
        return pa.concat_tables([read_parquet(self.path / file.name, columns) for file in files])

    def _file_table(self, file: PoolFile) -> pa.Table:
        table = read_parquet(self.path / file.name)
        check_schema(table.schema, str(self.path / file.name))
        return table


def open_pool(
    path: Path | str,
    *,
    cache_dir: Path | str | None = None,
    allow_empty: bool = False,
    on_file: Callable[[], None] = lambda: None,
) -> ScenePool:
    """Open a pool after checking its manifest, schema version and the size of every file.

    Args:
        path: Pool folder.
        cache_dir: Where the derived cache goes; by default `cache` inside the pool, or this machine's cache folder
            where the pool is read-only.
        allow_empty: Accept a pool whose scenes were all quarantined.
        on_file: See `ScenePool`.

    Raises:
        PoolError: Missing, damaged, empty, or of another schema version.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.num_scenes == 0 and not allow_empty:
        raise PoolError(str(folder), "holds no scenes")
    for file in manifest.files:
        size = (folder / file.name).stat().st_size if (folder / file.name).exists() else None
        if size != file.num_bytes:
            raise PoolError(
                str(folder / file.name), f"must have {file.num_bytes} bytes as recorded", size or "none"
            )
        with open_parquet(folder / file.name) as parquet:
            check_schema(parquet.schema_arrow, str(folder / file.name))
            found = parquet.metadata.num_rows
        if found != file.num_scenes:
            raise PoolError(str(folder / file.name), f"must hold {file.num_scenes} scenes as recorded", found)
    return ScenePool(folder, manifest, Path(cache_dir) if cache_dir else None, on_file)


def check_disjoint(pools: Mapping[str, ScenePool], may_share: Collection[str] = ()) -> None:
    """Refuse pools of which two share a log.

    Args:
        pools: The sides of a split by name, for example real, dev, test.
        may_share: Sides that may share logs with each other.

    Raises:
        SplitLeakError: Naming the two sides and the log.
    """
    logs = {name: set(pool.manifest.counts["log"]) for name, pool in pools.items()}
    for (left, left_logs), (right, right_logs) in itertools.combinations(logs.items(), 2):
        shared = sorted(left_logs & right_logs)
        if shared and not {left, right} <= set(may_share):
            rule = f"pools must not share a log ({len(shared)} shared)"
            raise SplitLeakError(f"{left} and {right}", rule, shared[0])
