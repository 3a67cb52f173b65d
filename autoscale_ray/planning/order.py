"""Sample order: which scenes a step trains on, as a pure function of seed and step.

Position p = step * batch_size + place belongs to epoch p // n and to entry p % n of that epoch's permutation
of the n scenes, so every epoch holds every scene exactly once whatever the batch size. Worker counts, retries
and resumes do not enter; a step's batch is cut into 4 logical shards of consecutive places.

Shape legend: B places of a batch, V logical shards (4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

NUM_SHARDS = 4
_ORDER_STREAM = 0x0DE5


def batch_places(seed: int, step: int, batch_size: int, num_scenes: int) -> np.ndarray:
    """Return the places in the scene list that step `step` trains on.

    Args:
        seed: Training seed, >= 0.
        step: Optimiser step, >= 0.
        batch_size: Places of a step, >= 1.
        num_scenes: Length n of the scene list, >= 1.

    Returns:
        places_B: int64 in [0, n).
    """
    positions_B = step * batch_size + np.arange(batch_size)
    epochs_B, entries_B = np.divmod(positions_B, num_scenes)
    places_B = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs_B[0]), int(epochs_B[-1]) + 1):
        here = epochs_B == epoch
        places_B[here] = _permutation(seed, epoch, num_scenes)[entries_B[here]]
    return places_B


def shard_places(seed: int, step: int, batch_size: int, num_scenes: int) -> np.ndarray:
    """Return the same places cut into the logical shards.

    Args:
        seed: Training seed, >= 0.
        step: Optimiser step, >= 0.
        batch_size: A multiple of 4.
        num_scenes: Length n of the scene list, >= 1.

    Returns:
        places_VB: int64 (4, batch_size / 4); row v is shard v, whoever computes it.
    """
    return batch_places(seed, step, batch_size, num_scenes).reshape(NUM_SHARDS, -1)


def drawn_places(
    seed: int, steps: range, batch_size: int, num_scenes: int, shards: Sequence[int] = range(NUM_SHARDS)
) -> np.ndarray:
    """Return the places in the scene list that some steps train on: what has to be read for them.

    Args:
        seed: Training seed, >= 0.
        steps: Optimiser steps.
        batch_size: A multiple of 4.
        num_scenes: Length n of the scene list, >= 1.
        shards: Logical shards that count.

    Returns:
        int64, sorted, each once; at most ``len(steps) * batch_size``.
    """
    is_drawn_N = np.zeros(num_scenes, dtype=bool)
    for step in steps:
        is_drawn_N[shard_places(seed, step, batch_size, num_scenes)[list(shards)]] = True
        if is_drawn_N.all():
            break
    return np.flatnonzero(is_drawn_N)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_scenes: int) -> np.ndarray:
    permutation = np.random.default_rng([_ORDER_STREAM, seed, epoch]).permutation(num_scenes)
    permutation.setflags(write=False)
    return permutation
