"""Compiled pieces of the encoder for inference on a CPU: what lies between its matrix products, each in one pass.

Importing this module needs numba. Tables are contiguous float32. Shape legend: N scenes, M nodes of one type, H hidden
size, W columns of a table (a multiple of H), E edges.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
"""Sums may be reordered, so that they use vector registers; NaN and infinity keep their meaning."""


@njit(**OPTIONS)
def add_neighbour_mean(
    total_MW, message_MW, first_column, size, edges_E2, edge_offsets, source_offsets, target_offsets
):
    """Add to the first H columns of every target the mean over its edges of H columns of the sources.

    Edges are scene-local and ordered by scene, then target, so every target is one run.
    """
    sum_H = np.empty(size, np.float32)
    for scene in range(len(edge_offsets) - 1):
        edge, last = edge_offsets[scene], edge_offsets[scene + 1]
        while edge < last:
            target, start = edges_E2[edge, 1], edge
            sum_H[:] = 0
            while edge < last and edges_E2[edge, 1] == target:
                sent_W = message_MW[source_offsets[scene] + edges_E2[edge, 0]]
                sent_H = sent_W[first_column : first_column + size]
                for column in range(size):
                    sum_H[column] += sent_H[column]
                edge += 1
            total_W = total_MW[target_offsets[scene] + target]
            share = np.float32(1.0) / np.float32(edge - start)
            for column in range(size):
                total_W[column] += sum_H[column] * share


@njit(**OPTIONS)
def finish_layer(states_MH, update_MW, ego_NH, offsets, scale_H, shift_H, epsilon):
    """Add relu(layer norm(update + ego of the scene)) to the states, in place."""
    size = states_MH.shape[1]
    value_H = np.empty(size, np.float32)
    for scene in range(len(offsets) - 1):
        ego_H = ego_NH[scene]
        for row in range(offsets[scene], offsets[scene + 1]):
            state_H, update_W = states_MH[row], update_MW[row]
            mean, square = np.float32(0.0), np.float32(0.0)
            # A loop that sums writes nothing: with writes in it, LLVM chooses the vector or the scalar sum by the
            # addresses of the tables, and the last bit would differ from call to call.
            for column in range(size):
                value_H[column] = update_W[column] + ego_H[column]
            for column in range(size):
                mean += value_H[column]
            mean /= np.float32(size)
            for column in range(size):
                value_H[column] -= mean
            for column in range(size):
                square += value_H[column] * value_H[column]
            inverse = np.float32(1.0) / np.sqrt(square / np.float32(size) + np.float32(epsilon))
            for column in range(size):
                normed = value_H[column] * inverse * scale_H[column] + shift_H[column]
                state_H[column] += max(normed, np.float32(0.0))


@njit(**OPTIONS)
def weighted_mean(states_MH, weight_MG, offsets):
    """Return for every scene sum_i w_i x_i / sum_i w_i, with one weight for each of G equal groups of columns.

    A scene without nodes gives 0.
    """
    num_groups = weight_MG.shape[1]
    width = states_MH.shape[1] // num_groups
    mean_NH = np.zeros((len(offsets) - 1, states_MH.shape[1]), np.float32)
    for scene in range(len(offsets) - 1):
        for group in range(num_groups):
            first, total = group * width, np.float32(1e-16)
            mean_G = mean_NH[scene][first : first + width]
            for row in range(offsets[scene], offsets[scene + 1]):
                weight, state_G = weight_MG[row, group], states_MH[row][first : first + width]
                total += weight
                for column in range(width):
                    mean_G[column] += weight * state_G[column]
            for column in range(width):
                mean_G[column] /= total
    return mean_NH
