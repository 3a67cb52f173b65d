"""Compiled pieces of the encoder for inference on a CPU: what lies between its matrix products, each in one pass.

Importing this module needs numba. Tables hold float32, or bfloat16 as the uint16 of its bits, which numba has no type
for; sums are float32 in either case. The first H columns of a table of nodes are their states. Shape legend: N scenes,
M nodes of one type, H hidden size, W columns of a table, E edges, G groups of columns.
"""

from __future__ import annotations


import numpy as np
from numba import njit, types
from numba.extending import overload

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
"""Sums may be reordered, so that they use vector registers; NaN and infinity keep their meaning."""


def _read(cell):
    """Return a cell of a table as float32."""


@overload(_read)
def _read_typed(cell):
    if cell == types.uint16:
        return lambda cell: np.uint32(np.uint32(cell) << np.uint32(16)).view(np.float32)
    return lambda cell: cell


def _write(row, column, value):
    """Put a float32 into a row of a table; bfloat16 rounds to nearest, ties to even."""


@overload(_write)
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


@njit(**OPTIONS)
def start_states(states_MW, update_MH, bias_H, offsets, scenes_NW, mean_column):
    """Set the states to relu(update + bias), and H columns of the scenes to the mean state of their nodes."""
    size = update_MH.shape[1]
    for scene in range(len(offsets) - 1):
        first, last = offsets[scene], offsets[scene + 1]
        mean_H = scenes_NW[scene][mean_column : mean_column + size]
        mean_H[:] = 0
        share = np.float32(1.0) / np.float32(max(last - first, 1))
        for row in range(first, last):
            state_W, update_H = states_MW[row], update_MH[row]
            for column in range(size):
                value = max(_read(update_H[column]) + bias_H[column], np.float32(0.0))
                mean_H[column] += value * share
                _write(state_W, column, value)


@njit(**OPTIONS)
def neighbour_mean(out_MW, out_column, sent_MW, size, sources_E, source_offsets, sent_offsets, out_offsets):
    """Set H columns of every target to the mean over its edges of the first H columns of the sources.

    With a column below 0 add the mean to the first H columns. Sources are scene-local; a target's edges are one run; a
    target without edges has the mean 0.
    """
    sum_H = np.empty(size, np.float32)
    for scene in range(len(out_offsets) - 1):
        for target in range(out_offsets[scene], out_offsets[scene + 1]):
            first, last = source_offsets[target], source_offsets[target + 1]
            if out_column < 0 and first == last:
                continue
            sum_H[:] = 0
            for edge in range(first, last):
                sent_W = sent_MW[sent_offsets[scene] + sources_E[edge]]
                for column in range(size):
                    sum_H[column] += _read(sent_W[column])
            share = np.float32(1.0) / np.float32(max(last - first, 1))
            if out_column < 0:
                out_H = out_MW[target]
                for column in range(size):
                    _write(out_H, column, _read(out_H[column]) + sum_H[column] * share)
            else:
                out_H = out_MW[target][out_column : out_column + size]
                for column in range(size):
                    _write(out_H, column, sum_H[column] * share)


@njit(**OPTIONS)
def finish_layer(
    states_MW, update_MH, ego_NW, ego_column, offsets, scale_H, shift_H, epsilon, scenes_NW, mean_column
):
    """Add relu(layer norm(update + H columns of the ego's messages)) to the states.

    H columns of the scenes become the mean state of their nodes.
    """
    size = update_MH.shape[1]
    value_H = np.empty(size, np.float32)
    for scene in range(len(offsets) - 1):
        first, last = offsets[scene], offsets[scene + 1]
        ego_H = ego_NW[scene][ego_column : ego_column + size]
        mean_H = scenes_NW[scene][mean_column : mean_column + size]
        mean_H[:] = 0
        share = np.float32(1.0) / np.float32(max(last - first, 1))
        for row in range(first, last):
            state_W, update_H = states_MW[row], update_MH[row]
            center, square = np.float32(0.0), np.float32(0.0)
            # A loop that sums writes nothing: with writes in it, LLVM chooses the vector or the scalar sum by the
            # addresses of the tables, and the last bit would differ from call to call.
            for column in range(size):
                value_H[column] = _read(update_H[column]) + ego_H[column]
            for column in range(size):
                center += value_H[column]
            center /= np.float32(size)
            for column in range(size):
                value_H[column] -= center
            for column in range(size):
                square += value_H[column] * value_H[column]
            inverse = np.float32(1.0) / np.sqrt(square / np.float32(size) + np.float32(epsilon))
            for column in range(size):
                normed = value_H[column] * inverse * scale_H[column] + shift_H[column]
                value_H[column] = _read(state_W[column]) + max(normed, np.float32(0.0))
            for column in range(size):
                mean_H[column] += value_H[column] * share
                _write(state_W, column, value_H[column])


@njit(**OPTIONS)
def weighted_mean(out_NW, out_column, size, states_MW, weight_MG, offsets):
    """Set H columns for every scene to sum_i w_i x_i / sum_i w_i, one weight for each of G equal groups of columns.

    A scene without nodes gives 0.
    """
    width = size // weight_MG.shape[1]
    for scene in range(len(offsets) - 1):
        for group in range(weight_MG.shape[1]):
            first, total = group * width, np.float32(1e-16)
            mean_G = out_NW[scene][out_column + first : out_column + first + width]
            mean_G[:] = 0
            for row in range(offsets[scene], offsets[scene + 1]):
                weight, state_G = weight_MG[row, group], states_MW[row][first : first + width]
                total += weight
                for column in range(width):
                    mean_G[column] += weight * _read(state_G[column])
            for column in range(width):
                mean_G[column] /= total
