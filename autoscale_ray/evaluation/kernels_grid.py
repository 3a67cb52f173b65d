"""A cell grid over the rings of a scene, so that a point is tested against few edges; results stay exact.

A cell lists the rings that hold it wholly, and the rings whose boundary may pass through it. The latter point to a
slot: the edges of that ring that overlap the cell's row, which are the only ones a horizontal ray can cross.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

CELL_M = 2.0
MAX_CELLS_ALONG = 1024
MARGIN_M = 1e-6
OUTSIDE, HOLDS, BOUNDARY = 0, 1, 2


class RingGrid(NamedTuple):
    """Cells of `cell_m`; `cell_entries` holds ring + 1 for a holding ring and -(slot + 1) for a boundary."""

    cell_m: float
    origin: np.ndarray
    shape: np.ndarray
    cell_starts: np.ndarray
    cell_entries: np.ndarray
    slot_ring: np.ndarray
    slot_starts: np.ndarray
    slot_edges: np.ndarray


def build_grid(ring_offsets: np.ndarray, ring_xy: np.ndarray, ring_bounds: np.ndarray) -> RingGrid:
    """Build the grid of a scene's rings.

    Args:
        ring_offsets: (G + 1,) start of each ring.
        ring_xy: (V, 2) vertices, m.
        ring_bounds: (G, 4) x min, y min, x max, y max.

    Returns:
        The grid; one empty cell where there are no rings.
    """
    if not len(ring_bounds):
        empty = np.zeros(0, dtype=np.int64)
        return RingGrid(
            CELL_M,
            np.zeros(2),
            np.zeros(2, dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            empty,
            empty,
            np.zeros(1, dtype=np.int64),
            empty,
        )
    origin = ring_bounds[:, :2].min(axis=0) - MARGIN_M
    extent = ring_bounds[:, 2:].max(axis=0) + MARGIN_M - origin
    # one ring far away, say in another map's frame, must not take the memory of all cells in between
    cell_m = max(CELL_M, float(extent.max()) / MAX_CELLS_ALONG)
    shape = np.maximum(1, np.ceil(extent / cell_m)).astype(np.int64) + 1
    return RingGrid(cell_m, origin, shape, *_fill(ring_offsets, ring_xy, ring_bounds, cell_m, origin, shape))


@njit(cache=True, nogil=True, error_model="numpy")
def _mark_boundary(first, last, xy, cell_m, origin, column0, row0, marks):
    """Mark the cells of one ring's window that an edge may touch, row by row."""
    num_rows, num_columns = marks.shape
    for edge in range(first, last):
        other = edge + 1 if edge + 1 < last else first
        x1, y1 = xy[edge, 0] - origin[0], xy[edge, 1] - origin[1]
        x2, y2 = xy[other, 0] - origin[0], xy[other, 1] - origin[1]
        if y1 > y2:
            x1, y1, x2, y2 = x2, y2, x1, y1
        low_row = max(0, int((y1 - MARGIN_M) / cell_m) - row0)
        high_row = min(num_rows - 1, int((y2 + MARGIN_M) / cell_m) - row0)
        slope = (x2 - x1) / (y2 - y1) if y2 - y1 > 1e-3 else 0.0
        for row in range(low_row, high_row + 1):
            left, right = min(x1, x2), max(x1, x2)
            if y2 - y1 > 1e-3:
                start = x1 + slope * (min(max((row0 + row) * cell_m - MARGIN_M, y1), y2) - y1)
                end = x1 + slope * (min(max((row0 + row + 1) * cell_m + MARGIN_M, y1), y2) - y1)
                left, right = max(left, min(start, end)), min(right, max(start, end))
            low = max(0, int((left - MARGIN_M) / cell_m) - column0)
            high = min(num_columns - 1, int((right + MARGIN_M) / cell_m) - column0)
            marks[row, low : high + 1] = BOUNDARY


@njit(cache=True, nogil=True, error_model="numpy")
def _mark_inside(first, last, xy, cell_m, origin, column0, row0, marks):
    """Mark unmarked cells whose centre lies inside the ring; no edge touches them, so the whole cell does."""
    num_rows, num_columns = marks.shape
    cuts = np.empty(last - first)
    for row in range(num_rows):
        y = origin[1] + (row0 + row + 0.5) * cell_m
        num_cuts = 0
        for edge in range(first, last):
            other = edge + 1 if edge + 1 < last else first
            y1, y2 = xy[edge, 1], xy[other, 1]
            if (y1 > y) != (y2 > y):
                cuts[num_cuts] = xy[edge, 0] + (y - y1) * (xy[other, 0] - xy[edge, 0]) / (y2 - y1)
                num_cuts += 1
        for column in range(num_columns):
            if marks[row, column] == OUTSIDE:
                x = origin[0] + (column0 + column + 0.5) * cell_m
                before = 0
                for cut in range(num_cuts):
                    before += cuts[cut] <= x
                if before % 2 == 1:
                    marks[row, column] = HOLDS


@njit(cache=True, nogil=True, error_model="numpy")
def _row_edges(first, last, xy, low_y, high_y, out):
    """List the edges that overlap a row; return how many."""
    count = 0
    for edge in range(first, last):
        other = edge + 1 if edge + 1 < last else first
        y1, y2 = xy[edge, 1], xy[other, 1]
        if not ((y1 < low_y and y2 < low_y) or (y1 > high_y and y2 > high_y)):
            out[count] = edge
            count += 1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _fill(offsets, xy, bounds, cell_m, origin, shape):
    pairs_cell, pairs_entry, slot_ring, slot_counts, slot_edges = [0], [0], [0], [0], [0]
    for ring in range(len(bounds)):
        first, last = offsets[ring], offsets[ring + 1]
        column0, row0 = (
            int((bounds[ring, 0] - origin[0]) / cell_m),
            int((bounds[ring, 1] - origin[1]) / cell_m),
        )
        column1, row1 = (
            int((bounds[ring, 2] - origin[0]) / cell_m),
            int((bounds[ring, 3] - origin[1]) / cell_m),
        )
        column0, row0 = max(0, column0 - 1), max(0, row0 - 1)
        column1, row1 = min(shape[0] - 1, column1 + 1), min(shape[1] - 1, row1 + 1)
        marks = np.zeros((row1 - row0 + 1, column1 - column0 + 1), dtype=np.int8)
        _mark_boundary(first, last, xy, cell_m, origin, column0, row0, marks)
        _mark_inside(first, last, xy, cell_m, origin, column0, row0, marks)
        buffer = np.empty(last - first, dtype=np.int64)
        for row in range(marks.shape[0]):
            slot = -1
            for column in range(marks.shape[1]):
                mark = marks[row, column]
                if mark == BOUNDARY and slot < 0:
                    slot = len(slot_ring) - 1
                    low_y = origin[1] + (row0 + row) * cell_m - MARGIN_M
                    count = _row_edges(first, last, xy, low_y, low_y + cell_m + 2 * MARGIN_M, buffer)
                    slot_ring.append(ring)
                    slot_counts.append(count)
                    for index in range(count):
                        slot_edges.append(buffer[index])  # noqa: PERF401
                if mark != OUTSIDE:
                    pairs_cell.append((row0 + row) * shape[0] + column0 + column)
                    pairs_entry.append(ring + 1 if mark == HOLDS else -(slot + 1))
    return _pack(pairs_cell, pairs_entry, slot_ring, slot_counts, slot_edges, shape[0] * shape[1])


@njit(cache=True, nogil=True, error_model="numpy")
def _pack(pairs_cell, pairs_entry, slot_ring, slot_counts, slot_edges, num_cells):
    """Turn the lists, whose first element is a dummy, into offset arrays."""
    starts = np.zeros(num_cells + 1, dtype=np.int64)
    for index in range(1, len(pairs_cell)):
        starts[pairs_cell[index] + 1] += 1
    starts = np.cumsum(starts)
    entries = np.empty(len(pairs_cell) - 1, dtype=np.int64)
    place = starts[:-1].copy()
    for index in range(1, len(pairs_cell)):
        cell = pairs_cell[index]
        entries[place[cell]] = pairs_entry[index]
        place[cell] += 1
    rings, counts, edges = np.array(slot_ring)[1:], np.array(slot_counts), np.array(slot_edges)[1:]
    return starts, entries, rings, np.cumsum(counts), edges


@njit(cache=True, nogil=True, error_model="numpy")
def cell_of(x, y, cell_m, origin, shape):
    """Return the cell of a point, or -1 outside the grid."""
    column, row = math.floor((x - origin[0]) / cell_m), math.floor((y - origin[1]) / cell_m)
    if column < 0 or row < 0 or column >= shape[0] or row >= shape[1]:
        return -1
    return row * shape[0] + column
