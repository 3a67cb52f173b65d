from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch
from conftest import road_pose
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.planning.frenet import make_routes, project, project_poses, unproject_poses, wrap_angle
from autoscale_ray.planning.polylines import closest_to_origin, interpolate, make_polylines


def arc_route(curvature: float, end: float = 170.0) -> torch.Tensor:
    s_P = np.arange(-40.0, end, 0.5)
    line = torch.tensor(road_pose(s_P, np.zeros(len(s_P)), curvature)).float()
    return make_routes(line, torch.tensor([0, len(line)]))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    curvature=st.floats(-0.05, 0.05),
    s=st.floats(-10.0, 100.0),
    d=st.floats(-5.0, 5.0),
    yaw=st.floats(-3.0, 3.0),
)
def test_projection_agrees_with_the_arc_formula_and_is_undone(curvature, s, d, yaw):
    # A closed circle would have two arc lengths for one point: the route ends after half a turn.
    route = arc_route(curvature, end=min(170.0, np.pi / max(abs(curvature), 1e-3)))
    if abs(curvature) * 120 > np.pi:  # beyond half a turn the nearest point is no longer the one at s
        s = s * np.pi / 2 / (abs(curvature) * 120)
    pose = torch.tensor(road_pose(np.array([[s]]), np.array([[d]]), curvature)).float()
    pose[..., 2] = wrap_angle(pose[..., 2] + yaw)
    found = project_poses(route, pose)[0, 0]
    # A chord of 1 m leaves the arc by curvature / 8 m at most.
    np.testing.assert_allclose(found[:2], [s, d], atol=0.02)
    np.testing.assert_allclose(found[2], yaw, atol=2e-3)
    back = unproject_poses(route, found[None, None])
    np.testing.assert_allclose(back[..., :2], pose[..., :2], atol=1e-3)
    np.testing.assert_allclose(wrap_angle(back[..., 2] - pose[..., 2]), 0.0, atol=1e-5)


@pytest.mark.parametrize("s", [-100.0, -37.0, -20.5, 140.5, 157.0, 200.0])
def test_points_beyond_the_ends_keep_their_distance(s):
    """A car at 50 m/s drives 200 m in the 4 s of a plan; its target used to end at 156 m."""
    straight = torch.tensor([[-60.0, 1.0, 0.0], [250.0, 1.0, 0.0]])
    route = make_routes(straight, torch.tensor([0, 2]))
    pose = torch.tensor([[[s, 4.0, 0.1]]])
    found = project_poses(route, pose)
    np.testing.assert_allclose(found[0, 0], [s, 3.0, 0.1], atol=1e-3)
    np.testing.assert_allclose(unproject_poses(route, found), pose, atol=1e-3)


def test_far_points_project_like_shapely():
    route = arc_route(0.01)
    line = shapely.LineString(route[0, :, :2].double().numpy())
    points = torch.tensor(np.random.default_rng(0).uniform([0, -20], [80, 40], (200, 2))).float()
    s, d, _ = project(route, points[None])
    reference = shapely.line_locate_point(line, shapely.points(points.double().numpy())) - 20.0
    np.testing.assert_allclose(s[0], reference, atol=0.3)
    np.testing.assert_allclose(
        d[0].abs(), shapely.distance(line, shapely.points(points.double().numpy())), atol=0.02
    )


def test_route_starts_at_the_point_nearest_to_the_ego_and_goes_straight_on_beyond_its_ends():
    line = torch.tensor([[-5.0, 2.0, 0.0], [-5.0, 2.0, 0.0], [30.0, 2.0, 0.0]])
    route = make_routes(line, torch.tensor([0, 3]))[0]
    np.testing.assert_allclose(route[20], [0.0, 2.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(route[0], [-20.0, 2.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(route[-1], [140.0, 2.0, 0.0], atol=1e-5)


def test_heading_of_a_route_is_unwrapped():
    turn = arc_route(0.05)[0, :, 2]
    assert float(turn.diff().abs().max()) < 0.06
    np.testing.assert_allclose(float(turn[-1] - turn[0]), 0.05 * 160, atol=0.06)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_flat_polylines_agree_with_shapely_one_by_one(seed, lengths):
    rng = np.random.default_rng(seed)
    points = torch.tensor(rng.uniform(-30, 30, (sum(lengths), 2))).float()
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))
    polylines = make_polylines(points, offsets)
    distance, arc = closest_to_origin(polylines)
    steps = torch.linspace(0.0, 1.0, 5)
    found = interpolate(polylines, polylines.length_L[:, None] * steps)
    for number, part in enumerate(points.split(lengths)):
        shape = shapely.LineString(part.double()) if len(part) > 1 else shapely.Point(part[0].double())
        np.testing.assert_allclose(float(distance[number]), shape.distance(shapely.Point(0, 0)), atol=1e-4)
        if len(part) > 1:
            reference = shapely.line_interpolate_point(shape, steps.double().numpy(), normalized=True)
            np.testing.assert_allclose(found[number], shapely.get_coordinates(reference), atol=1e-3)
            nearest = shapely.line_interpolate_point(shape, float(arc[number]))
            np.testing.assert_allclose(
                nearest.distance(shapely.Point(0, 0)), float(distance[number]), atol=1e-3
            )


def test_repeated_vertices_do_not_matter():
    points = torch.tensor(
        [[0.0, 0.0], [0.0, 0.0], [4.0, 0.0], [4.0, 0.0], [9.0, 1.0], [9.0, 2.0], [9.0, 2.0]]
    )
    polylines = make_polylines(points, torch.tensor([0, 4, 7]))
    assert polylines.offsets_L1.tolist() == [0, 2, 4]
    assert polylines.length_L.tolist() == pytest.approx([4.0, 1.0])
