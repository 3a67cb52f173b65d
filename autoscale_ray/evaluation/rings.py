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
    from autoscale_ray.scenes.rings import is_tangled  # here: the scorer is imported without shapely

    bad_G = is_tangled(xy_V2 - xy_V2[0], np.diff(offsets_G1))
    return int(np.argmax(bad_G)) if bad_G.any() else -1
