"""Seeded random numbers of the world: every scene is one point of a unit cube.

A family turns the coordinates of that point into a road, traffic and an ego state. So a scene can be made
again alone (its perturbed copies need that), a near-duplicate is a neighbouring point, and a stream of any
length uses bounded
memory: the points of a side come in blocks, each with its own seed.

Shape legend: N scenes, D coordinates.
"""

from __future__ import annotations

import hashlib
from typing import final

import numpy as np
from scipy.special import ndtri

NUM_COORDINATES = 96
_BLOCK_ROWS = 1024


def seed_of(*parts: int | str) -> np.random.SeedSequence:
    """Return a seed for one named stream; equal parts give equal streams, others independent ones."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=16).digest()
    return np.random.SeedSequence(int.from_bytes(digest, "little"))


def cube_rows(stream: tuple[int | str, ...], rows_N: np.ndarray) -> np.ndarray:
    """Return the unit-cube points of the given rows of a stream.

    Args:
        stream: Name of the stream, for example ``(seed, "real", "cruise")``.
        rows_N: Row numbers, >= 0, any order.

    Returns:
        Points (N, `NUM_COORDINATES`) in [0, 1), the same whatever other rows are asked for.
    """
    points_ND = np.empty((len(rows_N), NUM_COORDINATES))
    blocks_N = rows_N // _BLOCK_ROWS
    for block in np.unique(blocks_N):
        chosen = blocks_N == block
        block_points = np.random.default_rng(seed_of(*stream, int(block))).random(
            (_BLOCK_ROWS, NUM_COORDINATES)
        )
        points_ND[chosen] = block_points[rows_N[chosen] % _BLOCK_ROWS]
    return points_ND


@final
class Draw:
    """Reads the coordinates of N cube points column by column, as values of chosen distributions.

    Coordinate 0 is left out: it is the variant of the layout.
    """

    def __init__(self, cube_ND: np.ndarray) -> None:
        self._cube_ND = cube_ND
        self._next = 1
        self.num_scenes = len(cube_ND)

    def unit(self) -> np.ndarray:
        """Return the next coordinate (N,) in [0, 1)."""
        column_N = self._cube_ND[:, self._next]
        self._next += 1
        return column_N

    def uniform(self, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
        """Return values (N,) uniform in [low, high)."""
        return low + (high - low) * self.unit()

    def normal(self, mean: float, deviation: float) -> np.ndarray:
        """Return normal values (N,), clipped at 2.5 deviations."""
        return mean + deviation * np.clip(ndtri(np.clip(self.unit(), 1e-9, 1 - 1e-9)), -2.5, 2.5)

    def chance(self, probability: float) -> np.ndarray:
        """Return a boolean (N,) that is true with the given probability."""
        return self.unit() < probability

    def sign(self) -> np.ndarray:
        """Return -1 or +1 (N,) with equal probability."""
        return np.where(self.unit() < 0.5, -1.0, 1.0)
