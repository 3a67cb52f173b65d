"""Files that are whole or not there, also on a full disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np


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
