"""What every reader offers: the units of a source, and the recordings of one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autoscale_ray.scenes.recording import Recording
from autoscale_ray.scenes.windows import WindowOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """One data format."""

    title: str
    """One line for help texts."""
    units: Callable[[Path], list[str]]
    """Names of the parts that can be read on their own, sorted; a refused unit loses itself alone."""
    read: Callable[[Path, str], Iterator[Recording]]
    """Recordings of one unit; raises InputRejectedError."""
    options: WindowOptions = field(default_factory=WindowOptions)
    """Windows that suit the format."""
    fingerprints: Callable[[Recording], np.ndarray] | None = None
    """Hashes (uint64) of stretches of motion; recordings that share one are cuts of the same log."""
