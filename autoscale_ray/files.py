"""Files that are whole or not there, also on a full disk."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

ABANDONED_S = 24 * 3600.0
"""A hidden folder in which no file has grown for so long has no builder any more."""


def cache_folder() -> Path:
    """Return where this machine keeps what can be made again: copies from a bucket, caches of read-only pools."""
    given = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(given) / "autoscale_ray"


def is_writable(folder: Path) -> bool:
    """Return whether a folder, or the nearest one above it that exists, lets this process write."""
    may = partial(os.access, effective_ids=os.access in os.supports_effective_ids)
    there = next(parent for parent in (folder, *folder.absolute().parents) if may(parent, os.F_OK))
    return may(there, os.W_OK | os.X_OK)


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; at the end of the block it takes the place of `path`, or goes if it failed."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with suppress(NotADirectoryError, PermissionError):  # then it was never there
            temporary.unlink(missing_ok=True)


@contextmanager
def all_or_none() -> Iterator[list[Path]]:
    """Give a list for the folders that the block makes; when it fails or is interrupted they are removed again."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside `path` to build in; what is not renamed by the end of the block goes.

    Folders that killed processes left behind for the same path go first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        remove_abandoned(left)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove a folder in which nothing has changed for a day."""
    with suppress(FileNotFoundError):  # its builder, or another one that came by, has removed it
        changed_s = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        if time.time() - changed_s > ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system refuses: another one, or no more links to a file.

    Raises:
        FileExistsError: The name is taken.
    """
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(path, target)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file: the bytes of `np.save`.

    Raises:
        OSError: With its error number; of a full disk `np.save` by itself only says how many items it wrote.
    """
    with path.open("wb") as file:
        np.save(cast(BinaryIO, _Plain(file)), array, allow_pickle=False)


def begin_array(file: BinaryIO, first: np.ndarray, num_rows: int) -> None:
    """Write the head of a .npy file whose rows follow piece by piece; in the end the file has the bytes of `np.save`.

    Not a memory map: a full disk would end the process instead of raising an error.

    Args:
        file: Open for writing, empty.
        first: The first piece, (n, ...).
        num_rows: Rows of all pieces together.
    """
    description = np.lib.format.header_data_from_array_1_0(first) | {"shape": (num_rows, *first.shape[1:])}
    np.lib.format.write_array_header_1_0(file, description)


class _Plain:
    """What numpy does not take for a file of the system, and so writes to by its method."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write
