"""Compiled search for the greedy choice: bounds of gains in a heap, refreshed from stored cosines.

Importing this module needs numba. A gain is known here within an interval only, because sums are taken in another order
than in `greedy`; where the intervals of two candidates meet, the caller gives the gain itself. So the choice is the
caller's own to the bit.

Legend: N candidates, E queries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
SUMS = {**OPTIONS, "fastmath": {"reassoc", "contract", "nsz"}}
"""Sums may be reordered, so that they use vector registers; the interval allows for it."""


@njit(**SUMS)
def gain_interval(cosine_E, covered_E, weights_E, tolerance, sum_tolerance):
    """Return the lowest and the highest value that sum_e w_e max(0, cosine_e - covered_e) may have for the caller.

    Args:
        cosine_E: Cosines of one candidate, float32.
        covered_E: Largest cosine of any chosen scene, float32.
        weights_E: Weights >= 0, float32.
        tolerance: How far two ways to compute one cosine may lie apart, rounding of the difference included.
        sum_tolerance: The same for two ways to take the sum, as a share of it.
    """
    gain, reached, nothing, one = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(1.0)
    for query in range(len(cosine_E)):
        added = cosine_E[query] - covered_E[query]
        # Factors, not cases: only so does the compiler use vector registers.
        gain += weights_E[query] * (added if added > 0 else nothing)
        reached += weights_E[query] * (one if added > -tolerance else nothing)
    slack = np.float64(tolerance) * reached * (1 + sum_tolerance)
    slack += sum_tolerance * (gain + slack)
    return max(gain - slack, 0.0), gain + slack


@njit(**OPTIONS)
def sift_down(keys_N, rows_N, size, place):
    """Restore the heap (largest key first, equal keys by row) below a place whose key fell."""
    key, row = keys_N[place], rows_N[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and comes_first(keys_N[other], rows_N[other], keys_N[child], rows_N[child]):
            child = other
        if not comes_first(keys_N[child], rows_N[child], key, row):
            break
        keys_N[place], rows_N[place] = keys_N[child], rows_N[child]
        place = child
    keys_N[place], rows_N[place] = key, row


@njit(**OPTIONS)
def comes_first(key, row, other_key, other_row):
    """Tell whether one entry of the heap goes before another."""
    return key > other_key or (key == other_key and row < other_row)


@njit(**OPTIONS)
def settle_first(
    keys_N,
    rows_N,
    known,
    lowest_N,
    seen_N,
    turn,
    cosine_NE,
    covered_E,
    weights_E,
    values_N,
    tolerance,
    sum_tolerance,
):
    """Refresh bounds until one candidate leads; return whether its lead is beyond doubt.

    Args:
        keys_N: Heap of upper bounds of the gain with `value`; changed in place, as the next four tables.
        rows_N: Candidate of each entry.
        known: What the first entry is worth to the bit, -inf to strike it out; NaN where that is not known.
        lowest_N: Lower bound of each candidate, as of the turn in `seen_N`.
        seen_N: Turn in which each candidate was last looked at.
        turn: Number of the present turn; it goes up with every chosen scene.
        cosine_NE: Cosines of all candidates with all queries, float32.
        covered_E, weights_E, tolerance, sum_tolerance: See `gain_interval`.
        values_N: Worth of each candidate by itself, float64.

    Returns:
        False where `known` is wanted of the first entry. A first key of -inf: none is left.
    """
    size = len(keys_N)
    if not np.isnan(known):
        keys_N[0] = lowest_N[rows_N[0]] = known
        sift_down(keys_N, rows_N, size, 0)
    while True:
        place, row = 0, rows_N[0]
        if seen_N[row] == turn or keys_N[0] == -np.inf:
            if lowest_N[row] == keys_N[0]:
                return True
            place = 2 if size > 2 and comes_first(keys_N[2], rows_N[2], keys_N[1], rows_N[1]) else 1
            if place >= size or keys_N[place] < lowest_N[row]:
                return True
            row = rows_N[place]
            if seen_N[row] == turn:
                return False
        low, high = gain_interval(cosine_NE[row], covered_E, weights_E, tolerance, sum_tolerance)
        # Never above what it was: an old bound holds still.
        keys_N[place] = min(keys_N[place], high + values_N[row])
        lowest_N[row] = min(low + values_N[row], keys_N[place])
        seen_N[row] = turn
        sift_down(keys_N, rows_N, size, place)
