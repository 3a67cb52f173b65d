"""Whether polygon rings are simple."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def first_crossing_ring(offsets_G1: npt.NDArray[np.int64], xy_V2: npt.NDArray[np.float64]) -> int:
    """Return the index of the first ring that crosses itself or has no area, or -1.

    Args:
        offsets_G1: (G + 1,) where each ring starts.
        xy_V2: (V, 2) vertices in metres; rings close implicitly.

    Returns:
        The index of a ring, or -1 when all are simple.
    """
    if len(offsets_G1) < 2:
        return -1
    import shapely  # here: the scorer is imported without it

    origin = xy_V2[0]
    ring_of_vertex = np.repeat(np.arange(len(offsets_G1) - 1), np.diff(offsets_G1))
    rings = shapely.linearrings(xy_V2 - origin, indices=ring_of_vertex)
    polygons = shapely.polygons(rings)
    bad_G = ~shapely.is_valid(polygons) | (shapely.area(polygons) <= 0.0)
    return int(np.argmax(bad_G)) if bad_G.any() else -1
