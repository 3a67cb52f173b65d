"""Rings that cross themselves are mended: simple afterwards, in float32 too, with the same area inside."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from autoscale_ray.scenes.rings import MIN_PART_M2, is_tangled, mend_rings

SQUARE = [(0, 0), (1, 0), (1, 1), (0, 1)]
BOW_TIE = [(0, 0), (2, 2), (2, 0), (0, 2)]
STEPS_BACK = [(0, 0), (5, 0), (4.99, -1e-3), (4.995, 1e-3), (10, 0), (10, 3), (0, 3)]
LINE = [(0, 0), (1, 0), (2, 0)]
TWO_POINTS = [(0, 0), (1, 0)]
INFINITE = [(0, 0), (np.inf, 0), (2, 1)]


def laid(*rings) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(ring, dtype=np.float32) for ring in rings]), np.array(
        [len(ring) for ring in rings]
    )


def split(points: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(points, np.cumsum(counts)[:-1]) if len(counts) else []


def test_tells_which_rings_are_tangled():
    points, counts = laid(SQUARE, BOW_TIE, STEPS_BACK, LINE, TWO_POINTS, INFINITE)
    assert is_tangled(points, counts).tolist() == [False, True, True, True, False, False]
    assert is_tangled(np.zeros((0, 2)), np.zeros(0, dtype=int)).tolist() == []


def test_mends_what_is_tangled_and_keeps_the_rest_to_the_bit():
    points, counts = laid(SQUARE, BOW_TIE, STEPS_BACK, LINE, TWO_POINTS, INFINITE, SQUARE)
    mended, now, source = mend_rings(points, counts, np.arange(7))
    assert source.tolist() == [0, 1, 1, 2, 4, 5, 6], "a bow tie is two triangles, a line is nothing"
    rings = split(mended, now)
    assert mended.dtype == np.float32
    for row, was in ((0, SQUARE), (4, TWO_POINTS), (5, INFINITE), (6, SQUARE)):
        np.testing.assert_array_equal(rings[row], np.array(was, dtype=np.float32))
    assert [shapely.Polygon(ring).area for ring in rings[1:4]] == pytest.approx([1, 1, 30], abs=0.01)


def test_looks_at_suspects_alone():
    points, counts = laid(BOW_TIE, SQUARE, BOW_TIE)
    mended, now, source = mend_rings(points, counts, np.array([1, 2]))
    assert source.tolist() == [0, 1, 2, 2]
    np.testing.assert_array_equal(mended[:4], np.array(BOW_TIE, dtype=np.float32))
    assert now.tolist()[:2] == [4, 4]


def test_a_ring_that_winds_around_what_is_not_its_own_is_kept_for_the_scorer_to_refuse():
    """A loop that runs into itself would become its full outline, with the island inside."""
    turn = np.linspace(0, 2.1 * np.pi, 40)
    around = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    loop = np.concatenate([16 * around, 12 * around[::-1]])
    points, counts = laid(SQUARE, loop)
    mended, now, source = mend_rings(points, counts, np.arange(2))
    np.testing.assert_array_equal(mended, points)
    assert now.tolist() == counts.tolist()
    assert source.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(40))
def test_random_rings_keep_what_they_wind_around(seed):
    """Of the faces that a ring cuts the plane into, those that it winds around are inside afterwards, and no others."""
    rng = np.random.default_rng(seed)
    rings = [rng.normal(scale=20, size=(rng.integers(3, 9), 2)).astype(np.float32) for _ in range(20)]
    points, counts = laid(*rings)
    mended, now, source = mend_rings(points, counts, np.arange(20))
    after = split(mended, now)
    for row, ring in enumerate(rings):
        parts = [shapely.Polygon(part) for part, of in zip(after, source, strict=True) if of == row]
        faces = shapely.get_parts(shapely.polygonize([shapely.node(shapely.LinearRing(ring))]))
        inside = shapely.get_coordinates(shapely.point_on_surface(faces))
        is_own = winding_numbers(ring.astype(float), inside) != 0
        own = shapely.union_all(faces[is_own])
        holes = [shapely.Polygon(hole).area for part in shapely.get_parts(own) for hole in part.interiors]
        if sum(holes) >= MIN_PART_M2:
            np.testing.assert_array_equal(after[np.flatnonzero(source == row)[0]], ring)
            continue
        assert all(part.is_valid for part in parts)
        assert shapely.union_all(parts).symmetric_difference(own).area < 2 * MIN_PART_M2 * len(faces)
        assert sum(part.area for part in parts) == pytest.approx(own.area, abs=MIN_PART_M2 * len(faces))


def winding_numbers(ring: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how often a ring goes around each point, by the sum of the angles of its edges."""
    towards = ring[None] - points[:, None]
    angle = np.arctan2(towards[..., 1], towards[..., 0])
    step = np.diff(np.concatenate([angle, angle[:, :1]], axis=1), axis=1)
    step = (step + np.pi) % (2 * np.pi) - np.pi
    return np.abs(np.round(step.sum(axis=1) / (2 * np.pi))).astype(int)
