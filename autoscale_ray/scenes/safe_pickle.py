"""Read pickles from outside through a resource-limited child process; see `pickle_child`."""

from __future__ import annotations

import atexit
import io
import json
import math
import os
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.trust import read_member

DEADLINE_S = 60.0
MAX_REPLY_BYTES = 3 << 30
_CPU_SECONDS = 3600
"""A child's processor time, over all pickles that it reads."""
READS_OF_A_CHILD = 256
"""A new child reads on after so many pickles: far less than an hour of work, and what it leaked ends with it."""
_PLAIN_CHILD = "autoscale_ray.scenes.pickle_child"


class PickleReader:
    """One child that reads pickles; started on first use, again after it died and after `READS_OF_A_CHILD` of them.

    Args:
        deadline_s: Wall time for one pickle, > 0.
        child: Module whose `serve` the child runs; by default the one for plain values.
    """

    def __init__(self, deadline_s: float = DEADLINE_S, child: str = _PLAIN_CHILD) -> None:
        self._deadline_s = deadline_s
        self._start = f"from {child} import serve; serve({_CPU_SECONDS})"
        self._child: subprocess.Popen[bytes] | None = None
        self._num_reads = 0

    def read(self, content: bytes, where: str) -> Any:
        """Return the content of a pickle as plain Python values and NumPy arrays.

        Args:
            content: The whole pickle.
            where: File name for messages.

        Raises:
            InputRejectedError: The pickle does more than hold plain values, is damaged, or exceeds a limit.
        """
        if self._num_reads % READS_OF_A_CHILD == 0:
            self.close()
        self._num_reads += 1
        reply = self._exchange(content)
        if reply is None:
            self.close()
            raise InputRejectedError(where, "pickle must be readable within the limits on time and memory")
        if reply[:1] != b"+":
            raise InputRejectedError(
                where, "pickle must hold plain values only", reply[1:].decode(errors="replace")
            )
        return _decoded(reply[1:])

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            for stream in (self._child.stdin, self._child.stdout):
                if stream is not None:
                    stream.close()
            self._child.wait()
            self._child = None

    def __enter__(self) -> PickleReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(
                [sys.executable, "-c", self._start],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        return self._child

    def _exchange(self, content: bytes) -> bytes | None:
        """Send a request and return the reply, or None when the child died or was too slow."""
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        end = time.monotonic() + self._deadline_s
        request = memoryview(struct.pack("<Q", len(content)) + content)
        received = bytearray()
        os.set_blocking(child.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdin, selectors.EVENT_WRITE)
            selector.register(child.stdout, selectors.EVENT_READ)
            while not _complete(received):
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    return None
                for key, _ in ready:
                    if key.fileobj is child.stdout:
                        part = os.read(child.stdout.fileno(), 1 << 20)
                        received += part
                        if not part or len(received) > MAX_REPLY_BYTES:
                            return None
                    else:
                        request = _sent(child.stdin.fileno(), request)
                        if not request:
                            selector.unregister(child.stdin)
        return bytes(received[8:])


@lru_cache(maxsize=4)
def shared_reader(child: str = _PLAIN_CHILD) -> PickleReader:
    """Return one reader for all files of this process, because starting a child costs more than most files."""
    reader = PickleReader(child=child)
    atexit.register(reader.close)
    return reader


def read_pickle(path: Path, unit: str) -> Any:
    """Return the plain values of a pickle in a folder or archive; InputRejectedError where it is refused."""
    return shared_reader().read(read_member(path, unit), unit)


def _sent(handle: int, request: memoryview) -> memoryview:
    try:
        return request[os.write(handle, request) :]
    except BrokenPipeError:
        return request[:0]


def _complete(received: bytearray) -> bool:
    return len(received) >= 8 and len(received) >= 8 + struct.unpack("<Q", received[:8])[0]


def _decoded(payload: bytes) -> Any:
    (length,) = struct.unpack("<Q", payload[:8])
    return _plain(json.loads(payload[8 : 8 + length]), list(_arrays(payload, 8 + length)))


def _arrays(payload: bytes, position: int) -> Iterator[np.ndarray]:
    """Yield the arrays of a reply, each in the .npy format 1.0 as the child writes it."""
    while position < len(payload):
        begin = position + 10 + struct.unpack_from("<H", payload, position + 8)[0]
        shape, dtype = _header(payload[position + 8 : begin])
        count = math.prod(shape)
        position = begin + count * dtype.itemsize
        yield np.frombuffer(payload, dtype, count, begin).reshape(shape).copy()


@lru_cache(maxsize=4096)
def _header(text: bytes) -> tuple[tuple[int, ...], np.dtype]:
    # A log holds thousands of arrays with few different headers, and reading one costs more than the array.
    shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(text))
    return shape, dtype


def _plain(tree: Any, arrays: list[np.ndarray]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "a":
        return arrays[value]
    if kind == "f":
        return float.fromhex(value)
    if kind == "i":
        return int(value)
    if kind == "l":
        return [_plain(item, arrays) for item in value]
    return {_key(_plain(key, arrays)): _plain(item, arrays) for key, item in value}


def _key(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    return tuple(value) if isinstance(value, list) else value
