"""Compiled planar predicates for one box, point or polyline at a time; the same rules as `geometry`."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

PATH_CHUNK = 8


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def boxes_meet(dx, dy, cos1, sin1, length1, width1, cos2, sin2, length2, width2):
    """Tell whether two boxes (half sizes) share a point; dx, dy lead from the first centre to the second."""
    turn_cos = abs(cos1 * cos2 + sin1 * sin2)
    turn_sin = abs(cos1 * sin2 - sin1 * cos2)
    if abs(dx * cos1 + dy * sin1) > length1 + length2 * turn_cos + width2 * turn_sin:
        return False
    if abs(dy * cos1 - dx * sin1) > width1 + length2 * turn_sin + width2 * turn_cos:
        return False
    if abs(dx * cos2 + dy * sin2) > length2 + length1 * turn_cos + width1 * turn_sin:
        return False
    return abs(dy * cos2 - dx * sin2) <= width2 + length1 * turn_sin + width1 * turn_cos


@njit(cache=True, nogil=True, error_model="numpy")
def box_meets_ring(cx, cy, cos, sin, length, width, first, last, xy):
    """Tell whether a box shares a point with the closed area of the ring of vertices first..last - 1."""
    inside = False
    for edge in range(first, last):
        other = edge + 1 if edge + 1 < last else first
        x1, y1, x2, y2 = xy[edge, 0], xy[edge, 1], xy[other, 0], xy[other, 1]
        ex, ey = x2 - x1, y2 - y1
        size = math.sqrt(ex * ex + ey * ey)
        scale = size if size > 0.0 else 1.0
        dx, dy = 0.5 * (x1 + x2) - cx, 0.5 * (y1 + y2) - cy
        if boxes_meet(dx, dy, cos, sin, length, width, ex / scale, ey / scale, 0.5 * size, 0.0):
            return True
        turn = ex * (cy - y1) - (cx - x1) * ey
        if (y1 > cy) != (y2 > cy) and (turn > 0.0) == (y2 > y1):
            inside = not inside
    return inside


@njit(cache=True, nogil=True, error_model="numpy")
def chunk_path(path):
    """Bound every PATH_CHUNK edges of a polyline by a circle; rows of x, y, radius."""
    num_edges = len(path) - 1
    circles = np.empty(((num_edges + PATH_CHUNK - 1) // PATH_CHUNK, 3))
    for chunk in range(len(circles)):
        first = chunk * PATH_CHUNK
        last = min(first + PATH_CHUNK, num_edges)
        cx, cy = 0.5 * (path[first, 0] + path[last, 0]), 0.5 * (path[first, 1] + path[last, 1])
        reach = 0.0
        for vertex in range(first, last + 1):
            reach = max(reach, math.hypot(path[vertex, 0] - cx, path[vertex, 1] - cy))
        circles[chunk, 0], circles[chunk, 1], circles[chunk, 2] = cx, cy, reach * (1.0 + 1e-12)
    return circles


@njit(cache=True, nogil=True, error_model="numpy")
def nearest_on_path(x, y, path, progress, circles, guess):
    """Return distance, arc length and edge of the nearest point of a polyline, the first among equals.

    Chunks whose circle is farther than the best edge so far are skipped; `guess` is an edge to begin with.
    """
    best, best_edge, best_along = np.inf, -1, 0.0
    guess_chunk = guess // PATH_CHUNK
    for turn in range(len(circles) + 1):
        chunk = guess_chunk if turn == 0 else turn - 1
        if turn > 0:
            if chunk == guess_chunk:
                continue
            away = math.hypot(circles[chunk, 0] - x, circles[chunk, 1] - y) - circles[chunk, 2]
            if away > 0.0 and away * away > best * (1.0 + 1e-9):
                continue
        for edge in range(chunk * PATH_CHUNK, min((chunk + 1) * PATH_CHUNK, len(path) - 1)):
            ex, ey = path[edge + 1, 0] - path[edge, 0], path[edge + 1, 1] - path[edge, 1]
            rx, ry = x - path[edge, 0], y - path[edge, 1]
            squared = ex * ex + ey * ey
            share = (rx * ex + ry * ey) / (squared if squared > 0.0 else 1.0)
            share = min(max(share, 0.0), 1.0)
            px, py = rx - share * ex, ry - share * ey
            away = px * px + py * py
            if away < best or (away == best and edge < best_edge):
                best, best_edge = away, edge
                best_along = progress[edge] + share * (progress[edge + 1] - progress[edge])
    return math.sqrt(best), best_along, best_edge
