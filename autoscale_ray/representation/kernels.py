"""Compiled pieces of the encoder for inference on a CPU: what lies between its matrix products, each in one pass.

Importing this module needs numba. States are float32. A table is what a product takes or gives: float32, or bfloat16 as
the uint16 of its bits, which numba has no type for; its first H columns are a copy of the states.

Shape legend: N scenes, M nodes of one type, H hidden size, W columns of a table, E edges, G groups of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
ELEMENTWISE: dict[str, Any] = OPTIONS | {"fastmath": {"contract", "nsz"}}
"""No sum may be reordered: where it may, LLVM also divides every element of a row in place of multiplying by 1 / x."""
SUMMING: dict[str, Any] = OPTIONS | {"fastmath": {"reassoc", "contract", "nsz"}}
"""Sums along a row may be reordered, so that they use vector registers; NaN and infinity keep their meaning."""


def _read(cell: Any) -> Any:
    """Return a cell of a table as float32."""


@overload(_read, jit_options={"forceinline": True})
def _read_typed(cell):
    if cell == types.uint16:
        return lambda cell: np.uint32(np.uint32(cell) << np.uint32(16)).view(np.float32)
    return lambda cell: cell


def _write(row: Any, column: int, value: Any) -> None:
    """Put a float32 into a row of a table; bfloat16 rounds to nearest, ties to even."""


@overload(_write, jit_options={"forceinline": True})
def _write_typed(row, column, value):
    if row.dtype != types.uint16:

        def put(row, column, value):
            row[column] = value

        return put

    def round_and_put(row, column, value):
        bits = np.float32(value).view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        row[column] = np.uint16((bits + half) >> np.uint32(16))

    return round_and_put


@njit(**ELEMENTWISE)
def start_states(states_MH, table_MW, update_MH, bias_H, offsets, scenes_NW, mean_column):
    """Set the states to relu(update + bias), and H columns of the scenes to the mean state of their nodes."""
    size = states_MH.shape[1]
    for scene in range(len(offsets) - 1):
        first, last = offsets[scene], offsets[scene + 1]
        mean_H = scenes_NW[scene][mean_column : mean_column + size]
        mean_H[:] = 0
        for row in range(first, last):
            state_H, table_W, update_H = states_MH[row], table_MW[row], update_MH[row]
            for column in range(size):
                state = max(_read(update_H[column]) + bias_H[column], np.float32(0.0))
                state_H[column] = state
                mean_H[column] += state
                _write(table_W, column, state)
        mean_H *= np.float32(1.0) / np.float32(max(last - first, 1))


@njit(**ELEMENTWISE)
def neighbour_mean(out_MW, out_column, sent_MH, sources_E, degree_M, edge_offsets, sent_offsets, out_offsets):
    """Set H columns of every target to the mean over its edges of what the sources send.

    With a column below 0 add the mean to the first H columns. Sources are scene-local; a target's edges are one run; a
    target without edges has the mean 0.
    """
    size = sent_MH.shape[1]
    sum_H = np.empty(size, np.float32)
    for scene in range(len(out_offsets) - 1):
        start, last = sent_offsets[scene], edge_offsets[scene]
        for target in range(out_offsets[scene], out_offsets[scene + 1]):
            edge, last = last, last + degree_M[target]
            if out_column < 0 and edge == last:
                continue
            share = np.float32(1.0) / np.float32(max(last - edge, 1))
            sum_H[:] = 0
            while edge + 4 <= last:  # four at a time: the sum is read and written once
                a_H, b_H = sent_MH[start + sources_E[edge]], sent_MH[start + sources_E[edge + 1]]
                c_H, d_H = sent_MH[start + sources_E[edge + 2]], sent_MH[start + sources_E[edge + 3]]
                for column in range(size):
                    sum_H[column] += (_read(a_H[column]) + _read(b_H[column])) + (
                        _read(c_H[column]) + _read(d_H[column])
                    )
                edge += 4
            while edge < last:
                a_H = sent_MH[start + sources_E[edge]]
                for column in range(size):
                    sum_H[column] += _read(a_H[column])
                edge += 1
            if out_column < 0:
                out_H = out_MW[target]
                for column in range(size):
                    _write(out_H, column, _read(out_H[column]) + sum_H[column] * share)
            else:
                out_H = out_MW[target][out_column : out_column + size]
                for column in range(size):
                    _write(out_H, column, sum_H[column] * share)


@njit(forceinline=True, **SUMMING)
def _moments(update_H, ego_H, epsilon):
    """Return the mean of update + ego and 1 / its standard deviation."""
    share = np.float32(1.0) / np.float32(len(ego_H))
    center, square = np.float32(0.0), np.float32(0.0)
    # A loop that sums writes nothing: with writes in it, LLVM chooses the vector or the scalar sum by the addresses of
    # the tables, and the last bit would differ from call to call.
    for column in range(len(ego_H)):
        center += _read(update_H[column]) + ego_H[column]
    center *= share
    for column in range(len(ego_H)):
        apart = _read(update_H[column]) + ego_H[column] - center
        square += apart * apart
    return center, np.float32(1.0) / np.sqrt(square * share + np.float32(epsilon))


@njit(**ELEMENTWISE)
def finish_layer(
    states_MH,
    table_MW,
    update_MH,
    ego_NW,
    ego_column,
    offsets,
    scale_H,
    shift_H,
    epsilon,
    scenes_NW,
    mean_column,
):
    """Add relu(layer norm(update + H columns of the ego's messages)) to the states.

    H columns of the scenes become the mean state of their nodes.
    """
    size = states_MH.shape[1]
    for scene in range(len(offsets) - 1):
        first, last = offsets[scene], offsets[scene + 1]
        ego_H = ego_NW[scene][ego_column : ego_column + size]
        mean_H = scenes_NW[scene][mean_column : mean_column + size]
        mean_H[:] = 0
        for row in range(first, last):
            state_H, table_W, update_H = states_MH[row], table_MW[row], update_MH[row]
            center, inverse = _moments(update_H, ego_H, epsilon)
            for column in range(size):
                apart = _read(update_H[column]) + ego_H[column] - center
                normed = apart * inverse * scale_H[column] + shift_H[column]
                state = state_H[column] + max(normed, np.float32(0.0))
                state_H[column] = state
                mean_H[column] += state
                _write(table_W, column, state)
        mean_H *= np.float32(1.0) / np.float32(max(last - first, 1))


@njit(**ELEMENTWISE)
def weighted_mean(out_NW, out_column, states_MH, weight_MG, offsets):
    """Set H columns for every scene to sum_i w_i x_i / sum_i w_i, one weight for each of G equal groups of columns.

    A scene without nodes gives 0.
    """
    width = states_MH.shape[1] // weight_MG.shape[1]
    for scene in range(len(offsets) - 1):
        for group in range(weight_MG.shape[1]):
            first, total = group * width, np.float32(1e-16)
            mean_G = out_NW[scene][out_column + first : out_column + first + width]
            mean_G[:] = 0
            for row in range(offsets[scene], offsets[scene + 1]):
                weight, state_G = weight_MG[row, group], states_MH[row][first : first + width]
                total += weight
                for column in range(width):
                    mean_G[column] += weight * state_G[column]
            mean_G *= np.float32(1.0) / total
