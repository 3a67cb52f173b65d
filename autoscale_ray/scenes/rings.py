"""Mend polygon rings that cross themselves, as the borders of a tight turn do where they meet.

Shape legend: Q rings, W their vertices, S suspects, P parts of mended rings.
"""

from __future__ import annotations

import numpy as np
import shapely

from autoscale_ray.scenes.ragged import ragged

MIN_PART_M2 = 0.01
"""Parts of a mended ring below this are left out: hairs that it was crossed by."""


def is_tangled(points_W2: np.ndarray, counts_Q: np.ndarray) -> np.ndarray:
    """Tell which rings cross or touch themselves or have no area.

    Args:
        points_W2: Vertices, all rings laid end to end; a ring closes by itself.
        counts_Q: Vertices of each ring.

    Returns:
        Bool, Q; False for a ring that cannot be mended: under 3 vertices, or one that is not finite.
    """
    first_Q = np.cumsum(counts_Q) - counts_Q
    mendable = counts_Q >= 3
    finite_W = np.isfinite(points_W2).all(axis=1)
    if not finite_W.all():
        mendable &= (
            np.bincount(np.repeat(np.arange(len(counts_Q)), counts_Q)[~finite_W], minlength=len(counts_Q))
            == 0
        )
    counts = counts_Q[mendable]
    rings = _polygons(points_W2[ragged(first_Q[mendable], counts)], counts)
    flags = np.zeros(len(counts_Q), dtype=bool)
    with np.errstate(over="ignore"):  # A gate refuses what becomes infinite.
        flags[mendable] = ~(shapely.is_valid(rings) & (shapely.area(rings) > 0.0))
    return flags


def mend_rings(
    points_W2: np.ndarray, counts_Q: np.ndarray, suspect_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace each ring that crosses itself by the simple rings around the area that it encloses.

    Args:
        points_W2: Vertices (m), all rings laid end to end; a ring closes by itself.
        counts_Q: Vertices of each ring.
        suspect_S: Rings to look at, ascending; the others are kept as they are.

    Returns:
        Vertices, counts, and for each ring now the ring that it was; a ring without area is gone. A ring that
        cannot be mended is kept, for gates and scorer to refuse: one that is not finite, and one that winds around
        an area that is not its own, because outlines have no holes.
    """
    source_Q, first_Q = np.arange(len(counts_Q)), np.cumsum(counts_Q) - counts_Q

    def taken(ring_S: np.ndarray) -> np.ndarray:
        return points_W2[ragged(first_Q[ring_S], counts_Q[ring_S])]

    bad_S = suspect_S[is_tangled(taken(suspect_S), counts_Q[suspect_S])]
    if not len(bad_S):
        return points_W2, counts_Q, source_Q
    areas_S = shapely.make_valid(
        _polygons(taken(bad_S), counts_Q[bad_S]), method="structure", keep_collapsed=False
    )
    is_whole_S = _area_of_holes(areas_S) < MIN_PART_M2
    bad_S = bad_S[is_whole_S]
    parts, owner = shapely.get_parts(areas_S[is_whole_S], return_index=True)
    is_large = shapely.area(parts) >= MIN_PART_M2
    parts, owner = parts[is_large], owner[is_large]
    outlines = shapely.get_exterior_ring(parts)
    # The last vertex of an outline repeats its first.
    counts_P = shapely.get_num_coordinates(outlines).astype(np.int64) - 1
    outline_points = shapely.get_coordinates(outlines).astype(points_W2.dtype)
    first_P = len(points_W2) + np.cumsum(counts_P + 1) - (counts_P + 1)
    is_kept = np.ones(len(counts_Q), dtype=bool)
    is_kept[bad_S] = False
    source = np.concatenate([source_Q[is_kept], bad_S[owner]])
    order = np.argsort(source, kind="stable")
    counts = np.concatenate([counts_Q[is_kept], counts_P])[order]
    first = np.concatenate([first_Q[is_kept], first_P])[order]
    points = np.concatenate([points_W2, outline_points])[ragged(first, counts)]
    return points, counts, source[order]


def _area_of_holes(areas_S: np.ndarray) -> np.ndarray:
    """Return the area (m2) of what the outlines of each area enclose and it does not hold."""
    parts, owner = shapely.get_parts(areas_S, return_index=True)
    holes = shapely.area(shapely.polygons(shapely.get_exterior_ring(parts))) - shapely.area(parts)
    return np.bincount(owner, weights=holes, minlength=len(areas_S))


def _polygons(points_W2: np.ndarray, counts_Q: np.ndarray) -> np.ndarray:
    owner_W = np.repeat(np.arange(len(counts_Q)), counts_Q)
    return np.asarray(shapely.polygons(shapely.linearrings(points_W2, indices=owner_W)))
