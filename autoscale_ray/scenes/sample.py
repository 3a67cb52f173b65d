"""A seeded sample over several pools, of which one may be a thousand times the size of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sampled_rows(sizes: Sequence[int], limit: int, seed: int) -> list[np.ndarray]:
    """Draw scenes of pools: everything, or `limit` of them in all.

    A pool gives all it has before another gives more than an even share: of 700 real and a million synthetic scenes a
    sample of both alike would hold hardly a real one.

    Args:
        sizes: Scenes of each pool.
        limit: Scenes wanted in all, >= 1.
        seed: Seed of the sample, >= 0.

    Returns:
        Sorted int64 rows of each pool.
    """
    generator, left = np.random.default_rng(seed), min(limit, sum(sizes))
    rows = [np.empty(0, np.int64)] * len(sizes)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for number, pool in enumerate(order):
        count = min(sizes[pool], left // (len(order) - number))
        rows[pool] = np.sort(generator.choice(sizes[pool], count, replace=False))
        left -= count
    return rows
