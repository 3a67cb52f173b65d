"""Compiled interpolation, tracker and bicycle for one trajectory; the same rules as `simulate`."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from autoscale_ray.evaluation.simulate import (
    ACCELERATION_BLEND,
    HEADING_WEIGHT,
    INITIAL_CURVATURE_PENALTY,
    MAX_STEERING_RAD,
    NUM_DISPLACEMENTS,
    SPEED_GAIN,
    STEERING_BLEND,
    STEP_S,
    STOPPING_GAIN,
    STOPPING_SPEED_MPS,
)
from autoscale_ray.evaluation.simulate import TRACKING_HORIZON as HORIZON
from autoscale_ray.evaluation.timing import NUM_STEPS


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def wrap(angle):
    """Wrap an angle to [-pi, pi)."""
    return (angle + math.pi) % (2.0 * math.pi) - math.pi


@njit(cache=True, nogil=True, error_model="numpy")
def sample_waypoints(waypoints, ego_pose, left, share, out):
    """Fill out (41, 3), relative to the ego's position, from relative waypoints (n, 3); see `interpolate`."""
    cos, sin = math.cos(ego_pose[2]), math.sin(ego_pose[2])
    nodes = np.empty((len(waypoints) + 1, 3))
    nodes[0] = ego_pose
    for index in range(len(waypoints)):
        x, y = waypoints[index, 0], waypoints[index, 1]
        nodes[index + 1, 0] = (cos * x - sin * y) + ego_pose[0]
        nodes[index + 1, 1] = (sin * x + cos * y) + ego_pose[1]
        turn = wrap(wrap(ego_pose[2] + waypoints[index, 2]) - wrap(nodes[index, 2]))
        nodes[index + 1, 2] = nodes[index, 2] + turn
    for step in range(NUM_STEPS):
        node, part = left[step], share[step]
        for axis in range(3):
            out[step, axis] = nodes[node, axis] + part * (nodes[node + 1, axis] - nodes[node, axis])
        out[step, 0] -= ego_pose[0]
        out[step, 1] -= ego_pose[1]
        out[step, 2] = wrap(out[step, 2])


@njit(cache=True, nogil=True, error_model="numpy")
def fit_profiles(poses, speed_matrix, speed, curvature):
    """Fill the speed and curvature profiles (40,) of poses (41, 3)."""
    along = np.empty(NUM_DISPLACEMENTS)
    stiffness, load = np.empty(NUM_DISPLACEMENTS), np.empty(NUM_DISPLACEMENTS)
    for k in range(NUM_DISPLACEMENTS):
        dx, dy = poses[k + 1, 0] - poses[k, 0], poses[k + 1, 1] - poses[k, 1]
        along[k] = dx * math.cos(poses[k, 2]) + dy * math.sin(poses[k, 2])
    for k in range(NUM_DISPLACEMENTS):
        total = 0.0
        for j in range(NUM_DISPLACEMENTS):
            total += speed_matrix[k, j] * along[j]
        speed[k] = total
    for k in range(NUM_DISPLACEMENTS - 1, -1, -1):
        travel = speed[k] * STEP_S
        stiffness[k] = travel * travel
        load[k] = travel * wrap(poses[k + 1, 2] - poses[k, 2])
        if k < NUM_DISPLACEMENTS - 1:
            softening = 1.0 + stiffness[k + 1]
            stiffness[k] += stiffness[k + 1] / softening
            load[k] += load[k + 1] / softening
    curvature[0] = load[0] / (stiffness[0] + INITIAL_CURVATURE_PENALTY)
    for k in range(1, NUM_DISPLACEMENTS):
        curvature[k] = (load[k] + curvature[k - 1]) / (stiffness[k] + 1.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _steering_rate(state, pose, command, curvature, step, wheel_base):
    dx, dy = state[0] - pose[0], state[1] - pose[1]
    lateral = -dx * math.sin(pose[2]) + dy * math.cos(pose[2])
    heading = wrap(state[2] - pose[2])
    unit_lateral, unit_heading = 0.0, 0.0
    for j in range(HORIZON):
        travel = (state[3] + j * STEP_S * command) * STEP_S
        lateral += travel * heading
        unit_lateral += travel * unit_heading
        bend = curvature[min(step + j, NUM_DISPLACEMENTS - 1)]
        heading += travel * (state[7] / wheel_base - bend)
        unit_heading += travel * (j * STEP_S / wheel_base)
    gain = unit_lateral * unit_lateral + HEADING_WEIGHT * unit_heading * unit_heading + 1.0
    return -(unit_lateral * lateral + HEADING_WEIGHT * unit_heading * wrap(heading)) / gain


@njit(cache=True, nogil=True, error_model="numpy")
def simulate_one(poses, start, speed_matrix, wheel_base, states):
    """Fill states (41, 11) with the drive along poses (41, 3)."""
    speed, curvature = np.empty(NUM_DISPLACEMENTS), np.empty(NUM_DISPLACEMENTS)
    fit_profiles(poses, speed_matrix, speed, curvature)
    states[0] = start
    for step in range(NUM_DISPLACEMENTS):
        old, new = states[step], states[step + 1]
        target = speed[min(step + HORIZON, NUM_DISPLACEMENTS - 1)]
        if target <= STOPPING_SPEED_MPS and old[3] <= STOPPING_SPEED_MPS:
            command, rate = -STOPPING_GAIN * (old[3] - target), 0.0
        else:
            command = -SPEED_GAIN * (old[3] - target)
            rate = _steering_rate(old, poses[step], command, curvature, step, wheel_base)
        acceleration = old[5] + ACCELERATION_BLEND * (command - old[5])
        applied = STEERING_BLEND * (STEP_S * rate) / STEP_S
        new[0] = old[0] + old[3] * math.cos(old[2]) * STEP_S
        new[1] = old[1] + old[3] * math.sin(old[2]) * STEP_S
        new[2] = wrap(old[2] + old[3] * math.tan(old[7]) / wheel_base * STEP_S)
        new[3] = old[3] + acceleration * STEP_S
        new[4], new[5], new[6] = 0.0, acceleration, 0.0
        new[7] = min(max(old[7] + applied * STEP_S, -MAX_STEERING_RAD), MAX_STEERING_RAD)
        new[8] = applied
        new[9] = new[3] * math.tan(new[7]) / wheel_base
        new[10] = (new[9] - old[9]) / STEP_S
