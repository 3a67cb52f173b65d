"""The only way this package opens a Parquet file: extension types are refused before a value is read.

Inside a process that imported Ray, reading a value of one of Ray's Arrow extension types can run code from
the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.trust import raise_storage_failure

MAX_COLUMNS = 10_000


def open_parquet(path: Path | str) -> pq.ParquetFile:
    """Open a Parquet file whose schema holds plain types only; page checksums are verified where present.

    Args:
        path: Local file.

    Returns:
        The open file; use it as a context manager.

    Raises:
        InputRejectedError: The file is not Parquet, has an extension type at any depth, or too many columns.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise_storage_failure(error)
        raise InputRejectedError(str(path), "must be a readable Parquet file", _line(error)) from None
    refuse_extension_types(schema, str(path))
    return file


def read_parquet(path: Path | str, columns: list[str] | None = None) -> pa.Table:
    """Read a whole small Parquet file, or some of its columns.

    Args:
        path: Local file.
        columns: Names to read; all by default.

    Raises:
        InputRejectedError: As `open_parquet`, or a damaged page.
    """
    with open_parquet(path) as file:
        try:
            return file.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise_storage_failure(error)
            raise InputRejectedError(str(path), "holds a damaged page", _line(error)) from None


def refuse_extension_types(schema: pa.Schema, where: str) -> None:
    """Refuse Arrow extension types and their metadata marks at any nesting depth.

    Raises:
        InputRejectedError: Naming the field.
    """
    if len(schema.names) > MAX_COLUMNS:
        raise InputRejectedError(where, f"must have at most {MAX_COLUMNS} columns", len(schema.names))
    for field in schema:
        for name, inner in _fields_below(field, field.name):
            marked = b"ARROW:extension:name" in (inner.metadata or {})
            if marked or isinstance(inner.type, pa.BaseExtensionType):
                raise InputRejectedError(
                    where, f"column {name} must not have an extension type", str(inner.type)
                )


def _fields_below(field: pa.Field, name: str) -> Iterator[tuple[str, pa.Field]]:
    yield name, field
    kind = field.type
    if isinstance(kind, pa.DictionaryType):
        yield from _fields_below(pa.field("values", kind.value_type), f"{name}.values")
    elif isinstance(kind, pa.MapType):
        yield from _fields_below(kind.key_field, f"{name}.key")
        yield from _fields_below(kind.item_field, f"{name}.item")
    else:
        for position in range(kind.num_fields):
            inner = kind.field(position)
            yield from _fields_below(inner, f"{name}.{inner.name}")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_feather(path: Path | str) -> pa.Table:
    """Read a whole small Feather (Arrow IPC) file with plain types.

    Raises:
        InputRejectedError: Missing, damaged, or with an extension type.
    """
    try:
        with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
            refuse_extension_types(reader.schema, str(path))
            return reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise_storage_failure(error)
        raise InputRejectedError(str(path), "must be a readable Feather file", _line(error)) from None
