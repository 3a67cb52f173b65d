"""The tracker against a direct transcription of its least-squares problems."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.evaluation import PACIFICA, epdms, simulate
from autoscale_ray.evaluation.backends import drive_freely
from autoscale_ray.evaluation.simulate import reference_profiles
from autoscale_ray.evaluation.timing import history_samples, step_grid, waypoint_grid

from .straight_road import moved, straight_road


def profiles_by_pinv(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve both regularised problems as they are written, with an SVD pseudo-inverse."""
    dt, size = 0.1, 40
    heading, step = poses[:-1, 2], np.diff(poses, axis=0)
    unit = np.column_stack([np.cos(heading), np.sin(heading)]).ravel()
    design = np.repeat(np.tri(size), 2, axis=0) * unit[:, None] * dt**2
    design[:, 0] = unit * dt
    penalty = np.zeros((38, 40))
    for row in range(38):
        penalty[row, row + 1] = -1.0
    penalty[37, 39] = 1.0
    fitted = np.linalg.pinv(design.T @ design + 1e-4 * penalty.T @ penalty) @ design.T @ step[:, :2].ravel()
    speed = fitted[0] + np.concatenate([[0.0], np.cumsum(fitted[1:] * dt)])
    design = np.tri(size) * (speed * dt**2)[:, None]
    design[:, 0] = speed * dt
    turns = (step[:, 2] + math.pi) % (2 * math.pi) - math.pi
    weights = np.diag([1e-10] + [1e-2] * 39)
    fitted = np.linalg.pinv(design.T @ design + weights) @ design.T @ turns
    return speed, fitted[0] + np.concatenate([[0.0], np.cumsum(fitted[1:] * dt)])


def random_poses(seed: int, speed_mps: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    yaw = np.cumsum(np.r_[generator.uniform(-3, 3), generator.normal(0, 0.02, 40)])
    step = np.abs(speed_mps + generator.normal(0, 0.3 * speed_mps, 40)) * 0.1
    xy = np.cumsum(np.column_stack([step * np.cos(yaw[:-1]), step * np.sin(yaw[:-1])]), axis=0)
    return np.column_stack([np.r_[[[0.0, 0.0]], xy], yaw])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-3, 0.3, 3.0, 15.0]))
def test_profiles_equal_the_pseudo_inverse(seed, speed_mps):
    poses = random_poses(seed, speed_mps)
    speed, curvature = reference_profiles(torch.as_tensor(poses)[None])
    expected_speed, expected_curvature = profiles_by_pinv(poses)
    np.testing.assert_allclose(speed[0], expected_speed, atol=1e-9)
    if speed_mps >= 0.3 or speed_mps == 0.0:
        np.testing.assert_allclose(curvature[0], expected_curvature, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_standing_vehicle_stays_exactly_where_it_is(backend):
    start = np.zeros((1, 11))
    start[0, :3] = 3.0, -2.0, 0.7
    poses = np.repeat(start[:, None, :3], 41, axis=1)
    states = drive_freely(poses, start, PACIFICA, backend)
    np.testing.assert_allclose(states, np.repeat(start[:, None], 41, axis=1), atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_steady_straight_driving_keeps_its_speed_and_lane(backend):
    start = np.zeros((1, 11))
    start[0, 3] = 10.0
    poses = np.zeros((1, 41, 3))
    poses[0, :, 0] = np.arange(41)
    states = drive_freely(poses, start, PACIFICA, backend)
    np.testing.assert_allclose(states[0, :, 3], 10.0, atol=1e-6)
    np.testing.assert_allclose(states[0, :, 0], np.arange(41), atol=1e-5)
    np.testing.assert_allclose(states[0, :, [1, 2, 7]], 0.0, atol=1e-12)


def test_steering_stops_at_its_limit():
    start = np.zeros((1, 11))
    start[0, 3] = 4.0
    yaw = np.linspace(0.0, 12.0, 41)
    poses = np.stack([np.cumsum(0.4 * np.cos(yaw)), np.cumsum(0.4 * np.sin(yaw)), yaw], axis=-1)[None]
    states = simulate(torch.as_tensor(poses), torch.as_tensor(start))
    assert float(states[..., 7].abs().max()) == pytest.approx(math.pi / 3)


@pytest.mark.parametrize("num_waypoints", [8, 40])
def test_time_nodes_without_rounding_are_the_ideal_grid(num_waypoints):
    grid = waypoint_grid(0, num_waypoints)
    position = (grid.left + grid.share) * 4.0 / num_waypoints
    np.testing.assert_allclose(position, np.arange(41) * 0.1, atol=2e-6)


def test_time_nodes_late_in_the_epoch_move_by_a_microsecond_at_most():
    for start_us in (1_621_000_000_123_457, 1_640_000_000_999_999):
        grid = step_grid(start_us)
        np.testing.assert_allclose((grid.left + grid.share) * 0.1, np.arange(41) * 0.1, atol=2.1e-6)


@pytest.mark.parametrize(("span_us", "count"), [(1_500_000, 14), (1_530_000, 15), (1_480_000, 14)])
def test_history_drops_its_last_sample(span_us, count):
    times_us = np.array([0, 500_000, 1_000_000, span_us]) + 10**15
    states = np.zeros((4, 7))
    states[:, 0] = (times_us - times_us[0]) * 1e-6
    states[:, 2] = [3.1, -3.1, -3.0, -2.9]
    samples = history_samples(times_us, states)
    assert len(samples) == count
    np.testing.assert_allclose(samples[:, 0], np.arange(count) * 0.1, atol=1e-9)
    assert np.abs(np.diff(np.unwrap(samples[:, 2]))).max() < 0.05


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_waypoints_are_placed_in_map_coordinates_as_the_official_code_does(backend):
    """Near standstill the tracker amplifies the rounding of map coordinates, so poses must be rounded alike."""
    scene = moved(straight_road(speed_mps=8.0), 0.7, 6.5e5, 4.1e6)
    waypoints = np.random.default_rng(5).normal(0.0, 1e-6, (1, 3, 40, 3))
    result = epdms([scene], waypoints, backend=backend, keep_states=True)
    x, y, yaw = ego = scene.ego_history_states[-1, :3]
    cos, sin = math.cos(yaw), math.sin(yaw)
    grid = waypoint_grid(int(scene.ego_history_times_us[-1]), 40)
    start = np.concatenate([[0.0, 0.0], scene.ego_history_states[-1, 2:], np.zeros(4)])
    for poses, states in zip(waypoints[0], result.states[0].numpy(), strict=True):
        placed = np.column_stack(
            [
                cos * poses[:, 0] - sin * poses[:, 1] + x,
                sin * poses[:, 0] + cos * poses[:, 1] + y,
                yaw + poses[:, 2],
            ]
        )
        nodes = np.vstack([ego, placed])
        sampled = nodes[grid.left] + grid.share[:, None] * (nodes[grid.left + 1] - nodes[grid.left])
        expected = drive_freely((sampled - [x, y, 0.0])[None], start[None], PACIFICA, backend)[0].numpy()
        np.testing.assert_allclose(states - np.append([x, y], np.zeros(9)), expected, atol=5e-9)
