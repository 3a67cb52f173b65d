"""Planar predicates against shapely, for the torch functions and the compiled ones."""

from __future__ import annotations

import math

import numpy as np
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.evaluation.geometry import (
    boxes_meet_rings,
    boxes_overlap,
    groups_in_rings,
    project_on_path,
)
from autoscale_ray.evaluation.kernels_geometry import box_meets_ring, boxes_meet, chunk_path, nearest_on_path
from autoscale_ray.evaluation.kernels_grid import CELL_M, MAX_CELLS_ALONG, build_grid, cell_of
from autoscale_ray.evaluation.kernels_score import _slot_holds
from autoscale_ray.evaluation.planar import box_corners, polygon_distances, ring_centroid

seeds = st.integers(0, 2**32 - 1)
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def random_boxes(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    yaw = generator.uniform(-math.pi, math.pi, count)
    centres = generator.normal(0.0, 3.0, (count, 2))
    return np.column_stack([centres, np.cos(yaw), np.sin(yaw)]), generator.uniform(0.2, 3.0, (count, 2))


def star_ring(generator: np.random.Generator, count: int, size_m: float = 10.0) -> np.ndarray:
    """A simple ring, usually not convex."""
    angle = np.sort(generator.uniform(0.0, 2.0 * math.pi, count)) + generator.uniform(0, 1e-3)
    radius = generator.uniform(0.3, 1.0, count) * size_m
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle)]) + generator.normal(0, 3.0, 2)


@SETTINGS
@given(seeds)
def test_boxes_overlap_like_shapely(seed):
    generator = np.random.default_rng(seed)
    first, half = random_boxes(generator, 60)
    second, other = random_boxes(generator, 60)
    shapes = [shapely.polygons(box_corners(*pair)) for pair in ((first, half), (second, other))]
    expected = shapely.intersects(*shapes)
    tensors = [
        torch.as_tensor(x) for x in (second[:, :2] - first[:, :2], first[:, 2:], half, second[:, 2:], other)
    ]
    assert np.array_equal(boxes_overlap(*tensors).numpy(), expected)
    compiled = [
        boxes_meet(*(b[:2] - a[:2]), *a[2:], *h, *b[2:], *o)
        for a, h, b, o in zip(first, half, second, other, strict=True)
    ]
    assert np.array_equal(compiled, expected)


def test_touching_boxes_overlap_and_parted_ones_do_not():
    axis = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    half = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    for gap_m, expected in ((4.0, True), (4.0 + 1e-9, False)):
        offset = torch.tensor([[gap_m, 0.0]], dtype=torch.float64)
        assert bool(boxes_overlap(offset, axis, half, axis, half)) is expected
        assert boxes_meet(gap_m, 0.0, 1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 2.0, 1.0) is expected


@SETTINGS
@given(seeds, st.integers(3, 30), st.sampled_from([0.0, 3e3, 1e6]))
def test_points_in_rings_like_shapely(seed, count, away_m):
    """Also where one ring lies far away, which must not cost the memory of all cells in between."""
    generator = np.random.default_rng(seed)
    rings = [star_ring(generator, count) for _ in range(4)]
    rings[3] += away_m
    offsets = np.arange(5) * count
    xy = np.concatenate(rings)
    following = np.concatenate([np.roll(np.arange(count), -1) + start for start in offsets[:-1]])
    points = generator.normal(0.0, 8.0, (50, 2))
    points[::3] += away_m
    pairs = np.stack(np.meshgrid(np.arange(50), np.arange(4), indexing="ij"), -1).reshape(-1, 2)
    expected = np.stack([shapely.contains_xy(shapely.Polygon(ring), points) for ring in rings], 1)
    tables = (torch.as_tensor(offsets), torch.as_tensor(xy), torch.as_tensor(following))
    ours = groups_in_rings(torch.as_tensor(points[pairs[:, :1]]), torch.as_tensor(pairs[:, 1]), *tables)
    assert np.array_equal(ours.numpy().reshape(50, 4), expected)
    bounds = np.stack([np.concatenate([ring.min(0), ring.max(0)]) for ring in rings])
    grid = build_grid(offsets, xy, bounds)
    assert len(grid.cell_starts) <= (MAX_CELLS_ALONG + 2) ** 2 + 1
    assert np.array_equal(np.stack([held_by_grid(point, grid, following, xy) for point in points]), expected)


def held_by_grid(point, grid, following, xy):
    held = np.zeros(4, bool)
    cell = cell_of(point[0], point[1], grid.cell_m, grid.origin, grid.shape)
    for entry in grid.cell_entries[grid.cell_starts[cell] : grid.cell_starts[cell + 1]] if cell >= 0 else ():
        slot = -entry - 1
        if entry > 0:
            held[entry - 1] = True
        elif _slot_holds(
            *point, grid.slot_starts[slot], grid.slot_starts[slot + 1], grid.slot_edges, following, xy
        ):
            held[grid.slot_ring[slot]] = True
    return held


def test_a_long_edge_marks_every_cell_it_crosses():
    """A thin triangle across many cells: points just inside and just outside its long edges."""
    ring = np.array([[0.0, 0.0], [40.0, 31.0], [-1.0, 0.7]])
    grid = build_grid(np.array([0, 3]), ring, np.array([[-1.0, 0.0, 40.0, 31.0]]))
    points = np.random.default_rng(0).uniform([-2, -1], [41, 32], (4000, 2))
    following = np.array([1, 2, 0])
    ours = [held_by_grid(point, grid, following, ring)[0] for point in points]
    assert np.array_equal(ours, shapely.contains_xy(shapely.Polygon(ring), points))
    assert CELL_M < 10.0


def test_a_point_on_the_boundary_is_outside():
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    points = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    tables = (torch.tensor([0, 4]), square, torch.tensor([1, 2, 3, 0]))
    inside = groups_in_rings(points[None], torch.zeros(1, dtype=torch.int64), *tables)
    assert inside.tolist() == [[False, False, False, True]]


@SETTINGS
@given(seeds, st.integers(3, 20))
def test_boxes_meet_rings_like_shapely(seed, count):
    generator = np.random.default_rng(seed)
    ring = star_ring(generator, count)
    boxes, half = random_boxes(generator, 40)
    shapes = shapely.polygons(box_corners(boxes, half))
    expected = shapely.intersects(shapes, shapely.Polygon(ring))
    tables = (torch.tensor([0, count]), torch.as_tensor(ring), torch.as_tensor(np.roll(np.arange(count), -1)))
    parts = (torch.as_tensor(boxes[:, :2]), torch.as_tensor(boxes[:, 2:]), torch.as_tensor(half))
    ours = boxes_meet_rings(*parts, torch.zeros(40, dtype=torch.int64), *tables)
    assert np.array_equal(ours.numpy(), expected)
    compiled = [box_meets_ring(*box, *size, 0, count, ring) for box, size in zip(boxes, half, strict=True)]
    assert np.array_equal(compiled, expected)
    distance = polygon_distances(box_corners(boxes, half), ring)
    np.testing.assert_allclose(distance, shapely.distance(shapes, shapely.Polygon(ring)), atol=1e-9)


@SETTINGS
@given(seeds, st.integers(2, 40))
def test_projection_like_shapely(seed, count):
    generator = np.random.default_rng(seed)
    path = np.cumsum(generator.normal(0.5, 1.0, (count, 2)), axis=0)
    path = np.concatenate([path[:1], path])  # coinciding neighbours
    progress = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    points = generator.normal(0.0, 10.0, (30, 2))
    line = shapely.LineString(path)
    distance, along = project_on_path(*(torch.as_tensor(x)[None] for x in (points, path, progress)))
    np.testing.assert_allclose(distance[0], shapely.distance(shapely.points(points), line), atol=1e-9)
    expected = shapely.line_locate_point(line, shapely.points(points))
    unequal = np.abs(along[0].numpy() - expected) > 1e-9
    # Two nearest points are both right.
    there = shapely.line_interpolate_point(line, along[0].numpy()[unequal])
    np.testing.assert_allclose(
        shapely.distance(there, shapely.points(points[unequal])), distance[0][unequal], atol=1e-9
    )
    circles = chunk_path(path)
    for index, point in enumerate(points):
        for guess in (0, count - 1):
            found = nearest_on_path(*point, path, progress, circles, guess)
            np.testing.assert_allclose(found[:2], [distance[0, index], along[0, index]], atol=1e-9)


@SETTINGS
@given(seeds, st.integers(3, 20))
def test_centroid_like_shapely(seed, count):
    ring = star_ring(np.random.default_rng(seed), count)
    np.testing.assert_allclose(ring_centroid(ring), shapely.Polygon(ring).centroid.coords[0], atol=1e-7)
