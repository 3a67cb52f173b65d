"""The only way this package opens a Parquet file: extension types are refused before a value is read.

Inside a process that imported Ray, reading a value of one of Ray's Arrow extension types can run code from
the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.arrow_messages import unpacked_bytes
from autoscale_ray.scenes.parquet_footer import Footer, parse_footer
from autoscale_ray.scenes.trust import first_line, raise_storage_failure, read_file

MAX_COLUMNS = 10_000
MAX_FOOTER_BYTES = 16 << 20
MAX_ROWS = 1 << 30
MAX_GROUP_BYTES = 2 << 30
MAX_TABLE_BYTES = 4 << 30
MAX_FEATHER_BYTES = 512 << 20
ROW_GROUP_SIZE = 65_536
"""Rows that are written and read at a time: 16 MiB of embeddings of size 64."""
_EXTENSION_MARK = b"ARROW:extension:name"
_FEATHER_HEAD = b"ARROW1\0\0"
_MIN_VALUE_BYTES = 8
_TEXT_TYPES = (pa.string(), pa.binary(), pa.large_string(), pa.large_binary())


def open_parquet(path: Path | str) -> pq.ParquetFile:
    """Open a Parquet file whose schema holds plain types only; page checksums are verified where present.

    Args:
        path: Local file.

    Returns:
        The open file; use it as a context manager.

    Raises:
        InputRejectedError: The file is not Parquet, has an extension type at any depth, too many columns, or row
            groups that would unpack to more than the limits.
    """
    footer = _read_footer(Path(path))
    _check_sizes(footer, str(path))
    return _open(path, footer)


def _open(path: Path | str, footer: Footer) -> pq.ParquetFile:
    _refuse_marked(footer.schema, str(path))
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise_storage_failure(error)
        raise InputRejectedError(str(path), "must be a readable Parquet file", first_line(error)) from None
    refuse_extension_types(schema, str(path))
    return file


def _read_footer(path: Path) -> Footer:
    """Return the description of a file; one so long that reading it alone would take too much is refused."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            tail = file.read(8)
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != b"PAR1" or length > size - 12:
                raise InputRejectedError(str(path), "must be a readable Parquet file", "no footer")
            if length > MAX_FOOTER_BYTES:
                raise InputRejectedError(
                    str(path), f"footer must be at most {MAX_FOOTER_BYTES} bytes", length
                )
            file.seek(size - 8 - length)
            return parse_footer(file.read(length))
    except FileNotFoundError:
        raise InputRejectedError(str(path), "must be a file", "no such path") from None
    except ValueError as error:
        if isinstance(error, InputRejectedError):
            raise
        raise InputRejectedError(str(path), "must be a readable Parquet file", f"footer {error}") from None


def _check_sizes(footer: Footer, where: str) -> None:
    """Refuse row groups that say, or whose counts imply, more than they may unpack to."""
    if not 0 <= footer.num_rows <= MAX_ROWS or footer.num_rows != sum(
        group.num_rows for group in footer.groups
    ):
        raise InputRejectedError(where, "row groups must add up to the file's rows", footer.num_rows)
    for rows, chunks in footer.groups:
        if len(chunks) > MAX_COLUMNS:
            raise InputRejectedError(where, f"must have at most {MAX_COLUMNS} columns", len(chunks))
        size = sum(max(chunk.unpacked_bytes, chunk.num_values * _MIN_VALUE_BYTES) for chunk in chunks)
        if rows < 0 or any(chunk.num_values < 0 for chunk in chunks) or size > MAX_GROUP_BYTES:
            raise InputRejectedError(
                where, f"row groups must unpack to at most {MAX_GROUP_BYTES} bytes", size
            )


def read_parquet(path: Path | str, columns: list[str] | None = None) -> pa.Table:
    """Read a whole small Parquet file, or some of its columns.

    Args:
        path: Local file.
        columns: Names to read; all by default.

    Raises:
        InputRejectedError: As `open_parquet`, a column is missing, or a damaged page.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
        if not set(columns or ()) <= set(schema.names):
            raise InputRejectedError(
                str(path), f"must have the columns {', '.join(columns or ())}", schema.names[:10]
            )
        texts = [field.name for field in schema if field.type in _TEXT_TYPES]
    # Texts are read as a dictionary first: one long text, named a million times, takes no room in the file.
    with (
        pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file,
        _damage_told(path),
    ):
        table = file.read(columns=columns)
        # Arrow takes numbers of dictionary entries and bytes of texts from the file as they are.
        table.validate(full=True)
        if sum(map(_unpacked_bytes, table.columns)) > MAX_TABLE_BYTES:
            raise InputRejectedError(str(path), f"must unpack to at most {MAX_TABLE_BYTES} bytes")
        return table.cast(pa.schema([schema.field(name) for name in table.column_names], schema.metadata))


def read_groups(path: Path | str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the row groups of a file that this package wrote, one at a time: it may be of any size.

    Args:
        path: Local file.
        columns: Names to read; all by default.

    Raises:
        InputRejectedError: As `open_parquet`, but for its limits, or a damaged page.
    """
    with _open(path, _read_footer(Path(path))) as file:
        for group in range(file.num_row_groups):
            with _damage_told(path):
                table = file.read_row_group(group, columns=columns)
                table.validate(full=True)
            yield table


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table of plain columns in groups of rows, as `read_groups` gives them back."""
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_SIZE,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
    )


@contextmanager
def _damage_told(path: Path | str) -> Iterator[None]:
    """Name the file in which a page is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise_storage_failure(error)
        raise InputRejectedError(str(path), "holds a damaged page", first_line(error)) from None


def _unpacked_bytes(column: pa.ChunkedArray) -> int:
    """Return what a column takes once its dictionary is resolved."""
    total = 0
    for chunk in column.chunks:
        if isinstance(chunk, pa.DictionaryArray) and len(chunk.dictionary):
            lengths = pc.binary_length(chunk.dictionary).fill_null(0).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
            used = chunk.indices.drop_null().to_numpy()
            total += int(lengths.astype(np.int64)[used].sum())
        else:
            total += chunk.nbytes
    return total


def _refuse_marked(schema: bytes, where: str) -> None:
    """Refuse an encoded Arrow schema that marks an extension type: decoding it would hand the mark to that type."""
    if _EXTENSION_MARK in schema:
        raise InputRejectedError(where, "columns must not have an extension type")


def refuse_extension_types(schema: pa.Schema, where: str) -> None:
    """Refuse Arrow extension types and their metadata marks at any nesting depth, and names that are no text.

    Raises:
        InputRejectedError: Naming the field.
    """
    if len(schema) > MAX_COLUMNS:
        raise InputRejectedError(where, f"must have at most {MAX_COLUMNS} columns", len(schema))
    try:
        fields = [below for field in schema for below in _fields_below(field, field.name)]
    except UnicodeDecodeError as error:
        raise InputRejectedError(where, "column names must be UTF-8", str(error)) from None
    for name, inner in fields:
        marked = _EXTENSION_MARK in (inner.metadata or {})
        if marked or isinstance(inner.type, pa.BaseExtensionType):
            raise InputRejectedError(where, f"column {name} must not have an extension type", str(inner.type))


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


def read_feather(path: Path | str) -> pa.Table:
    """Read a whole small Feather (Arrow IPC) file with plain types.

    The file is read as the stream of messages that it holds, so that what was measured is what is read; its index at
    the end, which could tell of other messages, is left aside.

    Raises:
        InputRejectedError: Missing, damaged, with an extension type, or larger than the limit when unpacked.
    """
    content = read_file(Path(path), MAX_FEATHER_BYTES)
    if content[: len(_FEATHER_HEAD)] != _FEATHER_HEAD:
        raise InputRejectedError(str(path), "must be a readable Feather file", "no Arrow IPC file")
    stream = pa.py_buffer(content)[len(_FEATHER_HEAD) :]
    try:
        size = 0
        for message in pa.ipc.MessageReader.open_stream(stream):
            _refuse_marked(bytes(message.metadata), str(path))
            size += unpacked_bytes(message)
        if size > MAX_FEATHER_BYTES:
            raise InputRejectedError(str(path), f"must unpack to at most {MAX_FEATHER_BYTES} bytes", size)
        with pa.ipc.open_stream(stream) as reader:
            refuse_extension_types(reader.schema, str(path))
            table = reader.read_all()
            # Arrow takes offsets and lengths from the file as they are; using wrong ones ends the process.
            table.validate(full=True)
            return table
    except (pa.ArrowException, OSError, struct.error) as error:
        raise_storage_failure(error)
        raise InputRejectedError(str(path), "must be a readable Feather file", first_line(error)) from None
