"""What the footer of a Parquet file says of its row groups and of its schema, read here and not by Arrow.

Asked for a column chunk of a damaged footer, Arrow's Python binding ends the process (a C++ exception that nothing
catches); reading the table reports the same damage as an error. A schema is given to the extension types that the
process knows, Ray's among them, as soon as Arrow opens the file. The footer is a Thrift structure in the compact
protocol; field numbers are those of parquet.thrift.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_NUM_ROWS, _ROW_GROUPS, _KEY_VALUES = 3, 4, 5  # FileMetaData
_KEY, _VALUE = 1, 2  # KeyValue
_ARROW_SCHEMA = b"ARROW:schema"
_COLUMNS, _GROUP_ROWS = 1, 3  # RowGroup
_CHUNK_META = 3  # ColumnChunk
_NUM_VALUES, _UNPACKED_BYTES = 5, 6  # ColumnMetaData
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_MAX_DEPTH = 16
_MAX_VARINT_BYTES = 10


class Chunk(NamedTuple):
    """One column of one row group."""

    num_values: int
    unpacked_bytes: int


class RowGroup(NamedTuple):
    """Rows and columns of one row group."""

    num_rows: int
    chunks: list[Chunk]


class Footer(NamedTuple):
    """Rows of the file, its row groups, and its Arrow schema as bytes (none where Arrow did not write it)."""

    num_rows: int
    groups: list[RowGroup]
    schema: bytes


def parse_footer(content: bytes) -> Footer:
    """Return what a footer says.

    Raises:
        ValueError: It is no Thrift structure, or its Arrow schema is not in base 64.
    """
    reader = _Compact(content)

    def pair() -> tuple[bytes, bytes]:
        found = reader.struct({_KEY: reader.text, _VALUE: reader.text})
        return found.get(_KEY, b""), found.get(_VALUE, b"")

    found = reader.struct(
        {
            _NUM_ROWS: reader.number,
            _ROW_GROUPS: lambda: reader.each(_group(reader)),
            _KEY_VALUES: lambda: reader.each(pair),
        }
    )
    schemas = [value for key, value in found.get(_KEY_VALUES, []) if key == _ARROW_SCHEMA]
    schema = b"".join(base64.b64decode(value, validate=True) for value in schemas)
    return Footer(found.get(_NUM_ROWS, -1), found.get(_ROW_GROUPS, []), schema)


def _group(reader: _Compact) -> Callable[[], RowGroup]:
    def chunk() -> Chunk:
        meta = reader.struct({_CHUNK_META: numbers}).get(_CHUNK_META, {})
        return Chunk(meta.get(_NUM_VALUES, -1), meta.get(_UNPACKED_BYTES, 0))

    def numbers() -> dict[int, int]:
        return reader.struct({_NUM_VALUES: reader.number, _UNPACKED_BYTES: reader.number})

    def group() -> RowGroup:
        found = reader.struct({_COLUMNS: lambda: reader.each(chunk), _GROUP_ROWS: reader.number})
        return RowGroup(found.get(_GROUP_ROWS, -1), found.get(_COLUMNS, []))

    return group


class _Compact:
    """A place in bytes of Thrift's compact protocol."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self, wanted: dict[int, Callable[[], Any]]) -> dict:
        """Return the wanted fields by number, each read by its function; the others are passed over."""
        found = {}
        for number, kind in self._fields():
            if number in wanted:
                expected = {self.number: (_I32, _I64), self.text: (_BINARY,)}.get(
                    wanted[number], (_LIST, _STRUCT)
                )
                if kind not in expected:
                    raise ValueError(f"field {number} has type {kind}")
                found[number] = wanted[number]()
            else:
                self._pass_over(kind, _MAX_DEPTH)
        return found

    def each(self, read: Callable[[], Any]) -> list:
        """Return the elements of a list of structures."""
        count, kind = self._list_header()
        if kind != _STRUCT:
            raise ValueError(f"list has elements of type {kind}")
        return [read() for _ in range(count)]

    def number(self) -> int:
        """Return an integer of 16 to 64 bits."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def text(self) -> bytes:
        """Return a text as its bytes."""
        length = self._varint()
        self._at += length
        if self._at > len(self._content):
            raise ValueError("ends too early")
        return self._content[self._at - length : self._at]

    def _fields(self) -> Iterator[tuple[int, int]]:
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self.number()
            yield number, head & 15

    def _list_header(self) -> tuple[int, int]:
        head = self._byte()
        count = head >> 4
        return (self._varint() if count == 15 else count), head & 15

    def _byte(self) -> int:
        if self._at >= len(self._content):
            raise ValueError("ends too early")
        self._at += 1
        return self._content[self._at - 1]

    def _varint(self) -> int:
        value = 0
        for place in range(_MAX_VARINT_BYTES):
            byte = self._byte()
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                return value
        raise ValueError("a number has too many bytes")

    def _pass_over(self, kind: int, depth: int) -> None:
        if depth == 0:
            raise ValueError("is nested too deep")
        if kind in (_BYTE, _I16, _I32, _I64):
            self._byte() if kind == _BYTE else self._varint()
        elif kind in (_DOUBLE, _BINARY):
            length = 8 if kind == _DOUBLE else self._varint()
            self._at += length
        elif kind == _STRUCT:
            for _, inner in self._fields():
                self._pass_over(inner, depth - 1)
        elif kind in (_LIST, _SET):
            self._pass_over_elements(*self._list_header(), depth)
        elif kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._pass_over_elements(1, kinds >> 4, depth)
                self._pass_over_elements(1, kinds & 15, depth)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"unknown type {kind}")

    def _pass_over_elements(self, count: int, kind: int, depth: int) -> None:
        for _ in range(count):
            # A truth value takes no room as a field, and a byte as an element.
            self._pass_over(_BYTE if kind in (_TRUE, _FALSE) else kind, depth - 1)
