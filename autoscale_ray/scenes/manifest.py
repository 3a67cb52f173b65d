"""The manifest of a scene pool, and the content hash it carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, TypeAdapter, ValidationError

from autoscale_ray.config import CountOrZero
from autoscale_ray.errors import PoolError
from autoscale_ray.scenes.schema import SCENE_SCHEMA, SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolFile:
    """One Parquet file of a pool."""

    name: Annotated[str, Field(pattern=r"^[^/]+\.parquet$")]
    num_scenes: CountOrZero
    num_bytes: CountOrZero
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolManifest:
    """What a pool holds; stored as manifest.json."""

    schema_version: int
    num_scenes: CountOrZero
    content_hash: str
    files: tuple[PoolFile, ...]
    counts: Mapping[str, Mapping[str, CountOrZero]]
    """Scenes by domain, by source and by log."""
    num_quarantined: CountOrZero = 0
    side_tables: tuple[str, ...] = ()
    """Names of the tables beside the scenes that were written with them."""


class ContentHash:
    """Hash of the values of a stream of tables, independent of how the stream is cut."""

    def __init__(self) -> None:
        # One hash for each level of a column, because levels interleave differently when the stream is cut
        # otherwise.
        self._levels = {name: tuple(hashlib.sha256() for _ in range(3)) for name in SCENE_SCHEMA.names}

    def update(self, table: pa.Table) -> None:
        """Add the rows of `table`."""
        for name, levels in self._levels.items():
            for chunk in table[name].chunks:
                for level, values in zip(levels, _level_values(chunk), strict=True):
                    level.update(values)

    def hexdigest(self) -> str:
        """Return the hash of all rows so far."""
        whole = hashlib.sha256(str(SCHEMA_VERSION).encode())
        for levels in self._levels.values():
            whole.update(b"".join(level.digest() for level in levels))
        return whole.hexdigest()


def _level_values(array: pa.Array) -> tuple[bytes, bytes, bytes | memoryview]:
    """Return list lengths, string lengths (-1 for null) and values of one column as bytes."""
    list_lengths = text_lengths = b""
    if pa.types.is_list(array.type):
        list_lengths = np.diff(array.offsets.to_numpy()).astype("<i8").tobytes()
        array = array.flatten()
    if pa.types.is_string(array.type):
        lengths = pc.binary_length(array.cast(pa.binary())).fill_null(-1)  # pyright: ignore[reportAttributeAccessIssue]
        text_lengths = lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        return list_lengths, text_lengths, "".join(array.fill_null("").to_pylist()).encode()
    values = np.ascontiguousarray(array.to_numpy(zero_copy_only=False))
    return list_lengths, text_lengths, memoryview(values).cast("B") if values.size else b""  # pyright: ignore[reportArgumentType]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> PoolManifest:
    """Read the manifest of a pool folder.

    Raises:
        PoolError: Missing, damaged, or of another schema version.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise PoolError(str(folder), "must be the folder of a scene pool", found)
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise PoolError(str(folder), f"must be the folder of a scene pool, with a {MANIFEST_NAME}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PoolError(str(path), "is damaged", str(error)) from None
    if version != SCHEMA_VERSION:
        raise PoolError(str(path), f"scene schema version must be {SCHEMA_VERSION}", version)
    try:
        manifest = TypeAdapter(PoolManifest).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        dotted = ".".join(str(part) for part in first["loc"])
        raise PoolError(str(path), f"is damaged: {dotted}: {first['msg'].lower()}", first["input"]) from None
    sums = [sum(file.num_scenes for file in manifest.files)]
    sums += [sum(manifest.counts.get(kind, {}).values()) for kind in ("domain", "source", "log")]
    if set(sums) != {manifest.num_scenes}:
        rule = f"is damaged: files, domains, sources and logs must each hold its {manifest.num_scenes} scenes"
        raise PoolError(str(path), rule, sums)
    return manifest
