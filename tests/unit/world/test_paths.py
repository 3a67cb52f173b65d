"""Curves: against circles, shapely and hand values."""

import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.world.paths import (
    FIRST_STATION_M,
    NUM_STATIONS,
    STATIONS_S,
    bezier,
    offset_poses,
    path_from_curvature,
    path_through,
    poses_at,
    resample,
    rotate_quarter,
    smooth_step,
    strip,
)


def test_constant_curvature_is_a_circle():
    radius_m = 40.0
    poses = path_from_curvature(np.full((1, NUM_STATIONS), 1 / radius_m))[0]
    angle = STATIONS_S / radius_m
    expected = np.stack([radius_m * np.sin(angle), radius_m * (1 - np.cos(angle)), angle], axis=-1)
    # Trapezoidal chords of 1 m are short of the arc by 1 / (24 R^2): 0.003 % here.
    np.testing.assert_allclose(poses, expected, atol=6e-3)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_resample_agrees_with_shapely_interpolation(seed):
    rng = np.random.default_rng(seed)
    points = np.cumsum(rng.uniform(0.5, 4.0, (3, 6, 2)), axis=1)
    lengths = np.linspace(0, 9, 7)
    sampled = resample(points, lengths)
    for row, line in zip(sampled, points, strict=True):
        curve = shapely.LineString(line)
        inside = lengths <= curve.length
        expected = [shapely.get_coordinates(curve.interpolate(length))[0] for length in lengths[inside]]
        np.testing.assert_allclose(row[inside], expected, atol=1e-9)


def test_resample_goes_straight_on_beyond_the_end():
    line = np.array([[[0.0, 0.0], [0.0, 2.0], [3.0, 2.0]]])
    np.testing.assert_allclose(resample(line, np.array([1.0, 5.0, 9.0]))[0], [[0, 1], [3, 2], [7, 2]])


def test_path_through_keeps_station_zero_and_one_metre_steps():
    corner = np.array([[[-80.0, 0.0], [10.0, 0.0], [10.0, 90.0]]])
    path = path_through(corner)[0]
    zero = int(-FIRST_STATION_M)
    np.testing.assert_allclose(path[zero, :2], [-10.0, 0.0], atol=1e-9)
    steps = np.linalg.norm(np.diff(path[:, :2], axis=0), axis=1)
    assert steps.max() < 1.0 + 1e-6
    assert steps.min() > 0.97
    # The corner is rounded: its 90 degrees (1.57 rad) are spread over several metres.
    assert np.abs(np.diff(path[:, 2])).max() < 0.5
    np.testing.assert_allclose(path[-1, 2] - path[0, 2], np.pi / 2, atol=1e-6)


def test_bezier_quarter_turn_is_nearly_an_arc():
    start, end = np.array([[0.0, -10.0, 0.0]]), np.array([[10.0, 0.0, np.pi / 2]])
    curve = bezier(start, end, 33)[0]
    np.testing.assert_allclose(curve[[0, -1]], [[0, -10], [10, 0]], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(curve, axis=1), 10.0, atol=0.02)


def test_strip_of_a_bend_has_the_area_of_the_ring_sector():
    angle = np.linspace(0, np.pi / 2, 91)
    arc = 30.0 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
    ring = shapely.Polygon(strip(arc, 2.0, -1.0)[0])
    assert ring.is_valid
    # Left of an anticlockwise arc is inside: radii 28 ... 31.
    np.testing.assert_allclose(ring.area, np.pi / 4 * (31**2 - 28**2), rtol=1e-3)
    assert shapely.is_ccw(shapely.LinearRing(ring.exterior.coords))


def test_neighbouring_strips_of_a_bend_share_their_border():
    angle = np.linspace(0, np.pi / 2, 31)
    arc = 25.0 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
    first, second = strip(arc[:, :16], 5.0, -5.0)[0], strip(arc[:, 15:], 5.0, -5.0)[0]
    np.testing.assert_allclose(first[[15, 16]], second[[0, -1]], atol=0.01)


def test_poses_at_interpolates_and_offsets_to_the_left():
    path = path_from_curvature(np.zeros((2, NUM_STATIONS)))[:, None]
    pose = poses_at(path, np.array(0), np.array([[2.5], [-3.25]]), np.array([[1.0], [-2.0]]))
    np.testing.assert_allclose(pose[:, 0], [[2.5, 1.0, 0.0, 0.0], [-3.25, -2.0, 0.0, 0.0]], atol=1e-12)


def test_offset_poses_moves_left():
    poses = np.array([[[0.0, 0.0, np.pi / 2], [0.0, 5.0, np.pi / 2]]])
    np.testing.assert_allclose(offset_poses(poses, 2.0)[0], [[-2, 0], [-2, 5]], atol=1e-12)


def test_four_quarters_are_a_full_turn():
    points = np.random.default_rng(0).normal(size=(3, 4, 2))
    turned = points
    for _ in range(4):
        turned = rotate_quarter(turned, 1)
    np.testing.assert_array_equal(turned, points)
    np.testing.assert_array_equal(rotate_quarter(np.array([1.0, 0.0]), 1), [0.0, 1.0])


def test_smooth_step_is_flat_at_both_ends():
    u = np.array([-1.0, 0.0, 1e-3, 0.5, 1 - 1e-3, 1.0, 2.0])
    value = smooth_step(u)
    np.testing.assert_allclose(value[[0, 1, 3, 5, 6]], [0, 0, 0.5, 1, 1], atol=1e-12)
    assert value[2] < 2e-8
    assert 1 - value[4] < 2e-8
