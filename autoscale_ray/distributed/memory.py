"""Memory that processes of a run share a machine with."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import pyarrow as pa
import torch


def release() -> None:
    """Give what was freed back to the system, where the C library can (glibc); takes milliseconds.

    Trainers, scorers and the driver take turns: what one has freed and keeps, the next one lacks. On a GPU that workers
    share it is the same.
    """
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
