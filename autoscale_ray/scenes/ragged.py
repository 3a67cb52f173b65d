"""Ragged axes: runs of elements laid end to end, told by offsets, and how to cut runs out of flat tables.

Shape legend: M runs; B scenes that are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Take = Callable[[Tensor], Tensor]
Int64 = NDArray[np.int64]


def row_of(offsets: Tensor) -> Tensor:
    """Return the owner of every element: ``offsets [0, 2, 3]`` gives ``[0, 0, 1]``.

    Args:
        offsets: Int64, M+1, non-decreasing, first entry 0.

    Returns:
        Int64, one entry for each of the ``offsets[-1]`` elements.
    """
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())


def offsets_of(lengths: Tensor) -> Tensor:
    """Return the offsets (M+1, int64) of M runs with the given lengths."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def ragged_index(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the elements of M runs laid end to end, and their offsets.

    Args:
        starts: Int64, M, first element of each run.
        lengths: Int64, M, >= 0.

    Returns:
        Index (int64, sum of lengths) and offsets (int64, M+1).
    """
    if starts.device.type == "cpu":
        index, offsets = _ragged_index(starts.numpy(), lengths.numpy())
        return torch.from_numpy(index), torch.from_numpy(offsets)
    offsets = offsets_of(lengths)
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=int(offsets[-1]))
    return shift.add_(torch.arange(len(shift), device=starts.device)), offsets


def ragged(starts: Int64, lengths: Int64) -> Int64:
    """Return the elements of runs laid end to end: starts [5, 0], lengths [2, 1] give [5, 6, 0]."""
    return _ragged_index(starts, lengths)[0]


def _ragged_index(starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    offsets = _offsets_of(lengths)
    index = np.repeat(starts - offsets[:-1], lengths)
    index += np.arange(len(index))
    return index, offsets


def _offsets_of(lengths: Int64) -> Int64:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True)
class Runs:
    """How to cut scenes out of flat tables."""

    scene: Take
    """Takes a table with one row for each scene."""
    group: Callable[[Tensor], tuple[Take, Tensor]]
    """Offsets of a ragged axis -> what takes its tables, and the offsets of what is taken."""
    long_group: Callable[[Tensor], tuple[Take, Tensor]]
    """The same for an axis with hundreds of elements a scene."""
    points: Callable[[Tensor, Tensor, Take, Tensor], tuple[Take, Tensor]]
    """The same for what hangs on the items of a group: offsets of the group and of the points, take and
    taken offsets of the group."""


def runs_of(rows_B: Tensor) -> Runs:
    """Return how to take scenes: consecutive ones as views, any others by copying.

    Args:
        rows_B: Scene numbers, int64; repeats are allowed.
    """
    on_cpu = rows_B.device.type == "cpu"
    rows = (rows_B if on_cpu else rows_B.cpu()).numpy()
    if len(rows) > 0 and bool((rows[1:] - rows[:-1] == 1).all()):
        return _slice_run(int(rows[0]), len(rows))
    return _gather_run(rows) if on_cpu else _gather_run_on_device(rows_B)


def _slice_run(first: int, count: int) -> Runs:
    def group(offsets: Tensor) -> tuple[Take, Tensor]:
        begin, end = int(offsets[first]), int(offsets[first + count])
        return lambda tensor: tensor[begin:end], offsets[first : first + count + 1] - begin

    def points(scene_offsets: Tensor, offsets: Tensor, _take: Take, _local: Tensor) -> tuple[Take, Tensor]:
        begin, end = int(scene_offsets[first]), int(scene_offsets[first + count])
        low, high = int(offsets[begin]), int(offsets[end])
        return lambda tensor: tensor[low:high], offsets[begin : end + 1] - low

    return Runs(lambda tensor: tensor[first : first + count], group, group, points)


def _gather_run(rows: Int64) -> Runs:
    # By NumPy and bytes: few rows of each of many large tables are taken, and with cold caches torch's calls and views
    # cost half as much again.
    def ends_of(offsets: Tensor) -> tuple[Int64, Int64]:
        values = offsets.numpy()
        return values.take(rows), values.take(rows + 1)

    def group(offsets: Tensor) -> tuple[Take, Tensor]:
        starts, ends = ends_of(offsets)
        index, local = _ragged_index(starts, ends - starts)
        return _Rows(index), torch.from_numpy(local)

    def long_group(offsets: Tensor) -> tuple[Take, Tensor]:
        starts, ends = ends_of(offsets)
        return _laid_end_to_end(starts, ends), torch.from_numpy(_offsets_of(ends - starts))

    def points(scene_offsets: Tensor, offsets: Tensor, take: Take, _local: Tensor) -> tuple[Take, Tensor]:
        assert isinstance(take, _Rows)
        starts, ends = ends_of(scene_offsets)
        values = offsets.numpy()
        local = _offsets_of(values.take(take.index + 1) - values.take(take.index))
        return _laid_end_to_end(values.take(starts), values.take(ends)), torch.from_numpy(local)

    return Runs(_Rows(rows), group, long_group, points)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Takes rows of tables of the CPU."""

    index: Int64

    def __call__(self, tensor: Tensor) -> Tensor:
        try:
            values = tensor.numpy()
        except (TypeError, RuntimeError):  # bfloat16, or a table that wants a gradient: not NumPy's
            return tensor.index_select(0, torch.from_numpy(self.index))
        return torch.from_numpy(values.take(self.index, axis=0))


def _laid_end_to_end(starts: Int64, ends: Int64) -> Take:
    """Copy runs as wholes, byte by byte: with hundreds of vertices or edges a scene, an index costs more than the copy,
    and so does a NumPy view for every run.
    """

    def take(tensor: Tensor) -> Tensor:
        width = tensor.element_size() * math.prod(tensor.shape[1:])
        values: Any = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        held = memoryview(values)
        runs = zip((width * starts).tolist(), (width * ends).tolist(), strict=True)
        joined = bytearray().join([held[low:high] for low, high in runs])
        if not joined:
            return tensor[:0].clone()
        return torch.frombuffer(joined, dtype=tensor.dtype).reshape(-1, *tensor.shape[1:])

    return take


def _gather_run_on_device(rows_B: Tensor) -> Runs:
    def gather(index: Tensor) -> Take:
        return lambda tensor: tensor.index_select(0, index)

    def between(starts: Tensor, ends: Tensor) -> tuple[Take, Tensor]:
        index, local = ragged_index(starts, ends - starts)
        return gather(index), local

    def group(offsets: Tensor) -> tuple[Take, Tensor]:
        return between(offsets[rows_B], offsets[rows_B + 1])

    def points(scene_offsets: Tensor, offsets: Tensor, take: Take, _local: Tensor) -> tuple[Take, Tensor]:
        take_points, _ = between(offsets[scene_offsets[rows_B]], offsets[scene_offsets[rows_B + 1]])
        return take_points, offsets_of(take(offsets[1:]) - take(offsets[:-1]))

    return Runs(gather(rows_B), group, group, points)
