"""Files that are whole or not there, also on a full disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np


def cache_folder() -> Path:
    """Return where this machine keeps what can be made again: copies from a bucket, caches of read-only pools."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "autoscale_ray"


def is_writable(folder: Path) -> bool:
    """Return whether a folder, or the nearest one above it that exists, lets this process write."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; at the end of the block it takes the place of `path`, or goes if it failed."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file: the bytes of `np.save`.

    Raises:
        OSError: With its error number; of a full disk `np.save` by itself only says how many items it wrote.
    """
    with path.open("wb") as file:
        np.save(cast(BinaryIO, _Plain(file)), array, allow_pickle=False)


class _Plain:
    """What numpy does not take for a file of the system, and so writes to by its method."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write
