"""How much a message of an Arrow IPC stream unpacks to, read from its description before anything is unpacked.

The description is a flatbuffer (Arrow's Message.fbs): a table begins with the distance back to its list of field
positions, which are 16-bit distances from the table's begin, 0 for an absent field.
"""

from __future__ import annotations

import struct

import pyarrow as pa

_HEADER = 2  # Message: version, header type, header, ...
_DICTIONARY_DATA = 1  # DictionaryBatch: id, data, is delta
_BUFFERS, _COMPRESSION = 2, 3  # RecordBatch: length, nodes, buffers, compression, ...


def unpacked_bytes(message: pa.ipc.Message) -> int:
    """Return the bytes that all buffers of a message take when unpacked.

    A packed buffer begins with its unpacked length (int64), or -1 where it is left as it is.

    Raises:
        struct.error: A position outside the message.
    """
    if message.type not in ("record batch", "dictionary"):
        return 0
    meta = bytes(message.metadata)
    batch = _pointer(meta, _field(meta, _pointer(meta, 0), _HEADER))
    if message.type == "dictionary":
        batch = _pointer(meta, _field(meta, batch, _DICTIONARY_DATA))
    body = memoryview(message.body) if message.body is not None else memoryview(b"")
    if not _field(meta, batch, _COMPRESSION):
        return len(body)
    return sum(_unpacked(body, offset, length) for offset, length in _buffers(meta, batch))


def _unpacked(body: memoryview, offset: int, length: int) -> int:
    if not length:
        return 0
    size = struct.unpack_from("<q", body, _position(offset))[0]
    return length if size == -1 else _position(size)


def _buffers(meta: bytes, batch: int) -> list[tuple[int, int]]:
    field = _field(meta, batch, _BUFFERS)
    if not field:
        return []
    begin = _pointer(meta, field)
    count = struct.unpack_from("<I", meta, begin)[0]
    values = struct.unpack_from(f"<{2 * count}q", meta, begin + 4)
    return list(zip(values[::2], values[1::2], strict=True))


def _field(meta: bytes, table: int, number: int) -> int:
    """Return where a field of a table stands, 0 when it is absent."""
    fields = table - struct.unpack_from("<i", meta, _position(table))[0]
    size = struct.unpack_from("<H", meta, _position(fields))[0]
    if 4 + 2 * number >= size:
        return 0
    distance = struct.unpack_from("<H", meta, fields + 4 + 2 * number)[0]
    return table + distance if distance else 0


def _pointer(meta: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", meta, at)[0]


def _position(value: int) -> int:
    # A negative position would be counted from the end.
    if value < 0:
        raise struct.error("a position before the begin of the message")
    return value
