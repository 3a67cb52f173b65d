"""The memory-mapped cache of a pool: one .npy file for each tensor of a `SceneBatch` that holds the whole
pool.

The cache is derived from the Parquet files, built into a temporary folder and renamed when complete. Its
folder carries the content hash of the pool, so a cache of other contents is never picked up, and building it
checks the hash.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from autoscale_ray.errors import PoolError
from autoscale_ray.files import begin_array, is_writable, partial_folder
from autoscale_ray.scenes.batch import SceneBatch, batch_from_table, group_of, select, tensors_of
from autoscale_ray.scenes.graph import with_neighbours
from autoscale_ray.scenes.manifest import ContentHash

CACHE_VERSION = 2
# Stored narrow, read wide: the values fit and these columns would otherwise take most of the disk and page
# cache.
_NARROW = {
    "agent_type_A": torch.int8,
    "polygon_layer_Q": torch.int8,
    "polygon_lane_Q": torch.int32,
    "links_E3": torch.int32,
    "agent_neighbours_A8": torch.int16,
    "agent_lanes_A3": torch.int16,
}


def read_rows(cached: SceneBatch, rows: np.ndarray, scene_ids: tuple[str, ...]) -> SceneBatch:
    """Return rows of a mapped cache (int64, in range) with their ids and with 64-bit integers again."""
    return select(cached, torch.from_numpy(rows), scene_ids, _NARROW)


def open_cache(
    root: Path, elsewhere: Path | None, content_hash: str, tables: Iterable[pa.Table], where: str
) -> SceneBatch:
    """Map the cache of a pool, building it first where there is none.

    Args:
        root: Folder that holds caches.
        elsewhere: Folder that holds them where the first one is read-only; None for nowhere else.
        content_hash: Content hash of the pool.
        tables: The pool in row order; read only when the cache has to be built.
        where: Pool folder, for messages.

    Returns:
        The whole pool as one batch of mapped tensors with narrow integers and without scene ids; see `read_rows`.

    Raises:
        PoolError: The Parquet files do not hold what the manifest says, or no folder can be written to.
    """
    name = f"v{CACHE_VERSION}-{content_hash[:16]}"
    folder = root / name
    if not _complete(folder) and not is_writable(root):
        if elsewhere is None or not (_complete(elsewhere / name) or is_writable(elsewhere)):
            rule = f"needs a folder for its cache that can be written to: {root} cannot, nor can {elsewhere}"
            raise PoolError(where, rule)
        folder = elsewhere / name
    if not _complete(folder):
        _build(folder, content_hash, tables, where)
    names = json.loads((folder / "sizes.json").read_text())
    # Mode "c" maps pages copy-on-write, so torch sees writable memory and the files stay as they are.
    mapped = {Path(name).stem: torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in names}
    return SceneBatch(scene_ids=(), **mapped)


def _complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "sizes.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _build(folder: Path, content_hash: str, tables: Iterable[pa.Table], where: str) -> None:
    with partial_folder(folder) as part:
        found = _write_arrays(part, tables)
        if found != content_hash:
            raise PoolError(
                where, "Parquet files must hold what the manifest records", f"content hash {found[:16]}"
            )
        sizes = {path.name: path.stat().st_size for path in sorted(part.glob("*.npy"))}
        (part / "sizes.json").write_text(json.dumps(sizes))
        _publish(part, folder)


def _publish(part: Path, folder: Path) -> None:
    if folder.exists() and not _complete(folder):
        os.rename(folder, folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.damaged"))
    try:
        os.rename(part, folder)
    except OSError:
        # Another process finished the same cache first; equal content hash means equal files.
        if not _complete(folder):
            raise


def _write_arrays(part: Path, tables: Iterable[pa.Table]) -> str:
    content, writers = ContentHash(), dict[str, _NpyWriter]()
    for table in tables:
        content.update(table)
        for name, tensor in tensors_of(with_neighbours(batch_from_table(table))).items():
            if name not in writers:
                writers[name] = _NpyWriter(part / f"{name}.npy", is_offsets=group_of(name) == "offsets")
            writers[name].append(tensor.to(_NARROW.get(name, tensor.dtype)))
    for writer in writers.values():
        writer.close()
    return content.hexdigest()


class _NpyWriter:
    """Append chunks to one .npy file; the head is written again, as long as before, when the length is known."""

    def __init__(self, path: Path, *, is_offsets: bool) -> None:
        self._file: BinaryIO = path.open("wb")
        self._is_offsets = is_offsets
        self._num_rows, self._end, self._last = 0, 0, np.zeros(0, dtype=np.int64)

    def append(self, tensor: Tensor) -> None:
        """Append rows; offsets are continued from the previous chunk."""
        values = tensor.contiguous().numpy()
        if self._is_offsets:
            values = (values if self._num_rows == 0 else values[1:]) + self._end
            self._end = int(values[-1]) if len(values) else self._end
        if self._file.tell() == 0:
            begin_array(self._file, values, 0)
        self._last = values[:0].copy()
        self._num_rows += len(values)
        self._file.write(values.tobytes())

    def close(self) -> None:
        """Write the length into the head and close the file."""
        self._file.seek(0)
        begin_array(self._file, self._last, self._num_rows)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
