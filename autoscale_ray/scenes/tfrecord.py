"""Read TFRecord files without TensorFlow: records framed by their length and masked CRC-32C check sums.

Layout of a record: length (8 bytes), check sum of the length (4), content, check sum of the content (4), little-endian.
A check sum is masked: rotated right by 15 bits, plus 0xa282ead8.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import IO

import numpy as np

from autoscale_ray.errors import InputRejectedError

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_HEAD_BYTES, _FOOT_BYTES = 12, 4


def _byte_table() -> np.ndarray:
    """Return the CRC of every single byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


_TABLE = _byte_table()


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes.

    A CRC is linear: content is cut into lanes that advance side by side, and the lanes are joined by the operator
    that appends a lane's length of zero bytes, found by letting the 32 unit vectors advance along.

    Args:
        content: At least 4 bytes.
    """
    assert len(content) >= 4, "shorter contents are not framed"
    values = np.frombuffer(content, dtype=np.uint8).copy()
    values[:4] ^= 0xFF  # the register starts with ones
    num_lanes = max(1, math.isqrt(len(values)))
    num_steps = -(-len(values) // num_lanes)
    # Zero bytes in front change nothing once the register's start is part of the content.
    lanes = np.concatenate([np.zeros(num_lanes * num_steps - len(values), np.uint8), values])
    steps = np.zeros((num_steps, num_lanes + 32), dtype=np.uint8)
    steps[:, :num_lanes] = lanes.reshape(num_lanes, num_steps).T
    register = np.concatenate(
        [np.zeros(num_lanes, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)]
    )
    for step in steps:
        register = _TABLE[(register ^ step) & np.uint32(0xFF)] ^ (register >> np.uint32(8))
    advance = _by_bytes(register[num_lanes:])
    total = 0
    for value in register[:num_lanes].tolist():
        total = (advance[0][total & 255] ^ advance[1][total >> 8 & 255] ^ advance[2][total >> 16 & 255]
                 ^ advance[3][total >> 24] ^ value)  # fmt: skip
    return total ^ 0xFFFFFFFF


def _by_bytes(images: np.ndarray) -> list[list[int]]:
    """Return a linear operator, given by the images of the 32 unit vectors, as one table for each byte."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    parts = images.reshape(4, 1, 8) * bits[None].astype(np.uint32)
    return np.bitwise_xor.reduce(parts, axis=2).tolist()


def masked(check_sum: int) -> int:
    """Return a check sum as it stands in a file."""
    return ((check_sum >> 15 | check_sum << 17) + _MASK_DELTA) & 0xFFFFFFFF


def records(stream: IO[bytes], where: str, max_bytes: int) -> Iterator[bytes | InputRejectedError]:
    """Yield the records of a file; the refusal in place of one whose content is damaged or too large.

    Args:
        stream: The file.
        where: Its name for messages.
        max_bytes: Largest content that is accepted.

    Raises:
        InputRejectedError: A damaged or cut frame: what follows cannot be found any more.
    """
    number = 0
    while head := stream.read(_HEAD_BYTES):
        place = f"{where}: record {number}"
        if len(head) < _HEAD_BYTES or masked(crc32c(head[:8])) != struct.unpack("<I", head[8:])[0]:
            raise InputRejectedError(
                place, "must have a length with its check sum; the rest of the file is lost"
            )
        (length,) = struct.unpack("<Q", head[:8])
        if length > max_bytes:
            if length >= 1 << 62:
                raise InputRejectedError(place, f"must have at most {max_bytes} bytes", length)
            stream.seek(length + _FOOT_BYTES, 1)
            yield InputRejectedError(place, f"must have at most {max_bytes} bytes", length)
        else:
            content, foot = stream.read(length), stream.read(_FOOT_BYTES)
            if len(content) < length or len(foot) < _FOOT_BYTES:
                raise InputRejectedError(place, "must be whole; the file ends within it")
            sound = length >= 4 and masked(crc32c(content)) == struct.unpack("<I", foot)[0]
            yield content if sound else InputRejectedError(place, "content must agree with its check sum")
        number += 1
