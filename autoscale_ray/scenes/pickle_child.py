"""The child process that opens pickles from outside; imports nothing but the standard library and NumPy.

It answers each request with plain JSON and raw arrays, never with a pickle. It runs under hard limits on
memory, files and processor time, checks the opcodes before it unpickles, and resolves a short list of
harmless globals only.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import resource
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

MAX_OPCODES = 50_000_000
MAX_NODES = 2_000_000
MAX_ARRAY_BYTES = 1 << 30
MEMORY_BYTES = 3 << 30
MAX_DEPTH = 60
_REFUSED_OPCODES = {
    "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "DUP", "NEXT_BUFFER", "READONLY_BUFFER",
}  # fmt: skip
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


class Refused(ValueError):
    """The pickle was not read."""


def check_opcodes(content: bytes) -> None:
    """Refuse opcodes that resolve objects in other ways, memo bombs, and bytes after the end.

    Raises:
        Refused: With the reason.
    """
    stream, count = io.BytesIO(content), 0
    try:
        for opcode, argument, position in pickletools.genops(stream):
            count += 1
            if opcode.name in _REFUSED_OPCODES:
                raise Refused(f"opcode {opcode.name} at byte {position}")
            if opcode.name in _MEMO_OPCODES and int(argument) > count:  # pyright: ignore[reportArgumentType]
                raise Refused(f"memo index {argument} at byte {position}")
            if opcode.name == "FRAME" and int(argument) > len(content):  # pyright: ignore[reportArgumentType]
                raise Refused(f"frame of {argument} bytes at byte {position}")
            if count > MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES} opcodes")
    except Refused:
        raise
    except (ValueError, UnicodeDecodeError, struct.error, OverflowError) as error:
        raise Refused(f"damaged: {error}") from None
    if stream.read(1):
        raise Refused("bytes after the end")


class _Placeholder:
    """Stands for an object of a class that is not resolved; its state is dropped."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


class PlainUnpickler(pickle.Unpickler):
    """Resolves NumPy arrays, plain containers and a few harmless names; refuses every other global."""

    def find_class(self, module: str, name: str) -> object:
        """Return what a global stands for."""
        root = module.split(".")[0]
        if root == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if root in ("metadrive", "scenarionet"):
            return dict if name == "ScenarioDescription" else _Placeholder
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise Refused(f"global {module}.{name}")

    def persistent_load(self, pid: object) -> object:
        """Refuse every persistent id."""
        raise Refused("persistent id")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Refused(f"encoding {encoding}")
    return text.encode("latin1")


class Encoder:
    """Turn an object tree into JSON and a list of arrays, within a budget of nodes and bytes."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._nodes = self._bytes = 0
        self._known: dict[int, tuple[object, int]] = {}

    def tree(self, value: object, depth: int = 0) -> object:
        """Return the JSON form: arrays as ``{"a": index}``, mappings as ``{"d": [[key, value], ...]}``."""
        # A container met again is not walked again but counted in full, so shared tuples cannot multiply the work.
        known, nodes = self._known.get(id(value), (None, 1))
        self._nodes += nodes
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Refused("too many or too deeply nested values")
        if known is not None:
            return known
        before = self._nodes
        tree = self._tree(value, depth)
        if isinstance(value, (dict, list, tuple)):
            self._known[id(value)] = (tree, 1 + self._nodes - before)
        return tree

    def _tree(self, value: object, depth: int) -> object:
        if value is None or isinstance(value, (bool, int, str)):
            return {"i": str(value)} if isinstance(value, int) and abs(value) > 1 << 62 else value
        if isinstance(value, float):
            return {"f": value.hex()}
        if isinstance(value, (np.ndarray, np.generic)):
            return {"a": self._array(np.asarray(value))}
        if isinstance(value, dict):
            return {
                "d": [[self.tree(key, depth + 1), self.tree(item, depth + 1)] for key, item in value.items()]
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return {"l": [self.tree(item, depth + 1) for item in value]}
        if isinstance(value, bytes):
            return {"a": self._array(np.frombuffer(value, dtype=np.uint8))}
        if isinstance(value, _Placeholder):
            return None
        raise Refused(f"value of type {type(value).__name__}")

    def _array(self, array: np.ndarray) -> int:
        if array.dtype.kind not in "biufUS":
            raise Refused(f"array of type {array.dtype}")
        self._bytes += array.nbytes
        if self._bytes > MAX_ARRAY_BYTES:
            raise Refused(f"more than {MAX_ARRAY_BYTES} bytes of arrays")
        self.arrays.append(np.ascontiguousarray(array).reshape(array.shape))
        return len(self.arrays) - 1


def plain_values(content: bytes) -> object:
    """Return what a pickle of plain values holds.

    Raises:
        Refused: With the reason.
    """
    check_opcodes(content)
    return PlainUnpickler(io.BytesIO(content)).load()


def answer(content: bytes, read: Callable[[bytes], object] = plain_values) -> bytes:
    """Return ``+`` and the plain form of a file as `read` sees it, or ``-`` and why it was refused."""
    try:
        encoder = Encoder()
        tree = encoder.tree(read(content))
    except Refused as error:
        return b"-" + str(error).encode()[:500]
    except (Exception, RecursionError) as error:
        return b"-" + f"damaged: {type(error).__name__}: {error}".encode(errors="replace")[:500]
    head = json.dumps(tree).encode()
    body = io.BytesIO()
    for array in encoder.arrays:
        np.lib.format.write_array(body, array, allow_pickle=False)
    return b"+" + struct.pack("<Q", len(head)) + head + body.getvalue()


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    """Return `count` bytes, fewer at the end of the stream."""
    parts, missing = [], count
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def serve(cpu_seconds: int, read: Callable[[bytes], object] = plain_values) -> None:
    """Answer requests (8-byte length and content) on standard input until it ends; see `answer`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := read_exactly(source, 8)) == 8:
        reply = answer(read_exactly(source, struct.unpack("<Q", head)[0]), read)
        sink.write(struct.pack("<Q", len(reply)) + reply)
        sink.flush()
