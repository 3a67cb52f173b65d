"""Write scene pools as a stream, all or nothing."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autoscale_ray.errors import PoolError
from autoscale_ray.files import partial_folder, sync
from autoscale_ray.scenes.batch import batch_from_table
from autoscale_ray.scenes.manifest import MANIFEST_NAME, ContentHash, PoolFile, PoolManifest, file_sha256
from autoscale_ray.scenes.schema import SCENE_SCHEMA, SCHEMA_VERSION, check_schema

ROW_GROUP_SIZE = 512
SIDE_TABLES = ("quarantine", "truth", "weights")


def check_unused(path: Path) -> None:
    """Refuse, with `PoolError`, a folder for a new pool that is there and not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PoolError(str(path), "already exists; a pool is immutable, choose another folder")


class PoolWriter:
    """Write one pool as a stream; a context manager that publishes on success and leaves nothing on failure.

    Args:
        path: Folder of the new pool; must not exist, or be empty.
        rows_per_file: Scenes in one Parquet file, >= 1.

    Raises:
        PoolError: The folder is already in use.
    """

    def __init__(self, path: Path | str, *, rows_per_file: int = 4096) -> None:
        self.path = Path(path)
        check_unused(self.path)
        self._rows_per_file = rows_per_file
        self._open = ExitStack()
        self._waiting: list[pa.Table] = []
        self._files: list[PoolFile] = []
        self._counts: dict[str, Counter[str]] = {"domain": Counter(), "source": Counter(), "log": Counter()}
        self._ids: set[str] = set()
        self._hash = ContentHash()
        self._num_quarantined = 0
        self._side_tables: set[str] = set()

    def __enter__(self) -> PoolWriter:
        self._part = self._open.enter_context(partial_folder(self.path))
        return self

    def add(self, table: pa.Table) -> None:
        """Append scenes.

        Raises:
            PoolError: Another schema, or a scene_id that the pool already has.
            InvalidSceneError: The flat columns of a scene contradict one another.
        """
        check_schema(table.schema, str(self.path))
        batch_from_table(table)
        self._add_ids(table["scene_id"].to_pylist())
        for key, column in (("domain", "domain"), ("source", "source"), ("log", "log_id")):
            self._counts[key].update(table[column].to_pylist())
        self._hash.update(table)
        self._waiting.append(table)
        while sum(map(len, self._waiting)) >= self._rows_per_file:
            waiting = pa.concat_tables(self._waiting)
            self._write_file(waiting.slice(0, self._rows_per_file))
            self._waiting = [waiting.slice(self._rows_per_file)]

    def add_side_table(self, name: str, table: pa.Table) -> None:
        """Store a table beside the scenes.

        Args:
            name: One of `SIDE_TABLES`.
            table: For ``quarantine`` see `quarantine`, for ``truth`` the hidden truth of a generated world.
        """
        assert name in SIDE_TABLES, name
        self._num_quarantined += len(table) if name == "quarantine" else 0
        self._side_tables.add(name)
        path = self._part / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd")
        sync(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None:
                self._publish()

    def _publish(self) -> None:
        rest = pa.concat_tables(self._waiting) if self._waiting else SCENE_SCHEMA.empty_table()
        if len(rest):
            self._write_file(rest)
        path = self._part / MANIFEST_NAME
        path.write_text(json.dumps(asdict(self.manifest), indent=1), encoding="utf-8")
        sync(path)
        sync(self._part)
        try:
            os.rename(self._part, self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise PoolError(str(self.path), "was written by another process meanwhile") from None
        sync(self.path.parent)

    @property
    def manifest(self) -> PoolManifest:
        """Return the manifest of what was added; final once the writer is closed."""
        return PoolManifest(
            schema_version=SCHEMA_VERSION,
            num_scenes=len(self._ids),
            content_hash=self._hash.hexdigest(),
            files=tuple(self._files),
            counts={key: dict(sorted(counter.items())) for key, counter in self._counts.items()},
            num_quarantined=self._num_quarantined,
            side_tables=tuple(sorted(self._side_tables)),
        )

    def repeated(self, ids: list[str]) -> np.ndarray:
        """Tell of each id (bool) whether the pool has it already, or it stands earlier in the list."""
        seen: set[str] = set()
        return np.array([key in self._ids or key in seen or bool(seen.add(key)) for key in ids], dtype=bool)

    def _add_ids(self, ids: list[str]) -> None:
        fresh = set(ids)
        if len(fresh) < len(ids) or fresh & self._ids:
            twice = sorted(fresh & self._ids) or [key for key, count in Counter(ids).items() if count > 1]
            raise PoolError(str(self.path), "scene_id must be unique in a pool", twice[0])
        self._ids |= fresh

    def _write_file(self, table: pa.Table) -> None:
        path = self._part / f"scenes-{len(self._files):05d}.parquet"
        pq.write_table(
            table.combine_chunks(),
            path,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            use_byte_stream_split=_float_leaves(),  # pyright: ignore[reportArgumentType]
            row_group_size=ROW_GROUP_SIZE,
            write_page_checksum=True,
        )
        sync(path)
        self._files.append(
            PoolFile(
                name=path.name, num_scenes=len(table), num_bytes=path.stat().st_size, sha256=file_sha256(path)
            )
        )


def _float_leaves() -> list[str]:
    return [
        f"{item.name}.list.element"
        for item in SCENE_SCHEMA
        if pa.types.is_list(item.type) and pa.types.is_float32(item.type.value_type)
    ]


def write_pool(
    path: Path | str,
    tables: Iterable[pa.Table],
    *,
    rows_per_file: int = 4096,
    side_tables: Mapping[str, pa.Table] | None = None,
) -> PoolManifest:
    """Write a pool from a stream of tables; nothing is left behind if the stream fails.

    Args:
        path: Folder of the new pool; must not exist, or be empty.
        tables: Tables of `SCENE_SCHEMA`, in the order the rows shall have.
        rows_per_file: Scenes in one Parquet file, >= 1.
        side_tables: Tables stored beside the scenes, by a name of `SIDE_TABLES`; read when the stream has
            ended, so the stream may fill it.

    Returns:
        The manifest that was stored.

    Raises:
        PoolError: The folder is in use, a table has another schema, or a scene_id comes twice.
        InvalidSceneError: The flat columns of a scene contradict one another.
    """
    with PoolWriter(path, rows_per_file=rows_per_file) as writer:
        for table in tables:
            writer.add(table)
        for name, table in (side_tables or {}).items():
            writer.add_side_table(name, table)
    return writer.manifest
