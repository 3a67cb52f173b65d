"""What every reader offers: the units of a source, and the recordings of one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.scenes.recording import Recording, Tracks

SceneTables = Iterator[tuple[pa.Table, pa.Table]]
"""Pairs of a table of the scene schema and one of the quarantine schema."""


def _holds_no_recordings(path: Path, unit: str) -> Iterator[Recording]:
    raise AssertionError(f"{path}: {unit} holds scenes, not recordings")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """One data format."""

    units: Callable[[Path], list[str]]
    """Names of the parts that can be read on their own, sorted; a refused unit loses itself alone."""
    read: Callable[[Path, str], Iterator[Recording]] = _holds_no_recordings
    """Recordings of one unit; raises InputRejectedError."""
    read_scenes: Callable[[Path, str, str], SceneTables] | None = None
    """For a format that fixes its scenes itself: scenes of one unit (path, unit, domain) and what was refused, in place
    of `read`; the scenes still pass the gates."""
    with_files: Callable[[Mapping[str, Path]], Reader] | None = None
    """Return the reader that uses files beside the source, such as maps, by name; raises InvalidInputError."""
    fingerprints: Callable[[Tracks], np.ndarray] | None = None
    """Hashes (uint64) of stretches of motion; recordings that share one are cuts of the same log."""


def bound_reader(reader: Reader, format: str, files: Mapping[str, Path]) -> Reader:
    """Return the reader with the files that stand beside its source.

    Args:
        reader: Any reader.
        format: Its name, for messages.
        files: Paths by name, for example ``maps``; empty for most formats.

    Raises:
        InvalidInputError: The format takes no such files, or needs others.
    """
    if reader.with_files is not None:
        return reader.with_files(files)
    if files:
        raise InvalidInputError(next(iter(files)), f"is nothing that the format {format} uses")
    return reader
