"""From waypoints to driven states: interpolation, LQR tracker and kinematic bicycle, in plain torch.

Shape legend: N trajectories, T = 41 poses, M = 40 displacements.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.evaluation.timing import STEP_S, TimeGrid
from autoscale_ray.evaluation.vehicle import PACIFICA, VehicleParameters

NUM_DISPLACEMENTS = 40
TRACKING_HORIZON = 10
JERK_PENALTY = 1e-4
INITIAL_CURVATURE_PENALTY = 1e-10
STOPPING_SPEED_MPS = 0.2
STOPPING_GAIN = 0.5
SPEED_GAIN = 10.0 / 11.0
HEADING_WEIGHT = 10.0
ACCELERATION_BLEND = STEP_S / (STEP_S + 0.2)
STEERING_BLEND = STEP_S / (STEP_S + 0.05)
MAX_STEERING_RAD = math.pi / 3.0

X, Y, YAW, VX, VY, AX, AY, STEERING, STEERING_RATE, YAW_RATE, YAW_ACCELERATION = range(11)


def interpolate(waypoints_Nn3: Tensor, ego_pose_N3: Tensor, left_NT: Tensor, share_NT: Tensor) -> Tensor:
    """Sample relative waypoints every 0.1 s in the frame of the ego pose.

    Give the ego pose in the scene's frame and subtract an origin afterwards: near standstill the tracker amplifies
    the rounding of map coordinates to millimetres, and only the official order of operations rounds alike.

    Args:
        waypoints_Nn3: (N, 8 or 40, 3) x, y in m, yaw in rad, relative to the rear axle at t = 0.
        ego_pose_N3: (N, 3) rear axle pose at t = 0.
        left_NT: (N, 41) left node of each sample; node 0 is the ego pose.
        share_NT: (N, 41) share of the way to the next node.

    Returns:
        (N, 41, 3) poses, yaw in [-pi, pi).
    """
    cos_N1, sin_N1 = torch.cos(ego_pose_N3[:, 2:3]), torch.sin(ego_pose_N3[:, 2:3])
    x_Nn, y_Nn, turn_Nn = waypoints_Nn3.unbind(-1)
    absolute_Nn3 = torch.stack(
        [
            (cos_N1 * x_Nn - sin_N1 * y_Nn) + ego_pose_N3[:, 0:1],
            (sin_N1 * x_Nn + cos_N1 * y_Nn) + ego_pose_N3[:, 1:2],
            _wrap(ego_pose_N3[:, 2:3] + turn_Nn),
        ],
        dim=-1,
    )
    return resample(torch.cat([ego_pose_N3[:, None], absolute_Nn3], dim=1), left_NT, share_NT)


def resample(nodes_Nk3: Tensor, left_NT: Tensor, share_NT: Tensor) -> Tensor:
    """Interpolate poses linearly, yaw after unwrapping.

    Args:
        nodes_Nk3: (N, k, 3) poses at the nodes.
        left_NT: (N, 41) left node of each sample.
        share_NT: (N, 41) share of the way to the next node.

    Returns:
        (N, 41, 3) poses, yaw in [-pi, pi).
    """
    turn_Nk = _wrap(nodes_Nk3[:, 1:, 2] - nodes_Nk3[:, :-1, 2])
    yaw_Nk = torch.cat([nodes_Nk3[:, :1, 2], nodes_Nk3[:, :1, 2] + torch.cumsum(turn_Nk, dim=1)], dim=1)
    unwrapped_Nk3 = torch.cat([nodes_Nk3[..., :2], yaw_Nk[..., None]], dim=-1)
    index_NT3 = left_NT[..., None].expand(-1, -1, 3)
    before_NT3 = torch.gather(unwrapped_Nk3, 1, index_NT3)
    after_NT3 = torch.gather(unwrapped_Nk3, 1, index_NT3 + 1)
    sampled_NT3 = before_NT3 + share_NT[..., None] * (after_NT3 - before_NT3)
    return torch.cat([sampled_NT3[..., :2], _wrap(sampled_NT3[..., 2:])], dim=-1)


def resample_one(nodes_k3: np.ndarray, grid: TimeGrid) -> np.ndarray:
    """Interpolate the poses of one drive, (41, 3); see `resample`."""
    return resample(*(torch.as_tensor(part)[None] for part in (nodes_k3, grid.left, grid.share)))[0].numpy()


def simulate(poses_NT3: Tensor, initial_state_N11: Tensor, vehicle: VehicleParameters = PACIFICA) -> Tensor:
    """Drive the kinematic bicycle along reference poses with NAVSIM's LQR tracker.

    Longitudinal: accel = -(10/11) (v - v_ref), or -0.5 (v - v_ref) when both are at most 0.2 m/s. Lateral: one
    constant steering rate minimising e^2 + 10 psi^2 + rate^2 after 1 s (docs/scoring.md, Tracker and bicycle).

    Args:
        poses_NT3: (N, 41, 3) reference x, y in m and yaw in rad every 0.1 s.
        initial_state_N11: (N, 11) x, y, yaw, vx, vy, ax, ay, steering angle, steering rate, yaw rate, yaw
            acceleration; rear axle, velocities and accelerations in the body frame.
        vehicle: Gives the wheel base.

    Returns:
        (N, 41, 11) states; the first one is the initial state.
    """
    speed_NM, curvature_NM = reference_profiles(poses_NT3)
    ahead_NMk = _curvature_preview(curvature_NM)
    states = [initial_state_N11]
    for step in range(NUM_DISPLACEMENTS):
        reference_speed_N = speed_NM[:, min(step + TRACKING_HORIZON, NUM_DISPLACEMENTS - 1)]
        command_N, rate_N = _track(
            states[-1], poses_NT3[:, step], reference_speed_N, ahead_NMk[:, step], vehicle
        )
        states.append(_drive(states[-1], command_N, rate_N, vehicle))
    return torch.stack(states, dim=1)


def reference_profiles(poses_NT3: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the speed and curvature profiles that the tracker follows.

    Speed: argmin |s_k - dt v_k|^2 + 1e-4 |R a|^2, s_k the displacement along the yaw, R NAVSIM's banded matrix. The
    rotation drops out of the normal matrix, so one constant matrix maps displacements to speeds. Curvature: argmin
    |dyaw_k - v_k dt kappa_k|^2 + 1e-10 kappa_0^2 + 1e-2 |dkappa/dt|^2, a chain of springs solved from its end without
    a subtraction, hence stable at standstill (docs/scoring.md, Reference profiles).

    Args:
        poses_NT3: (N, 41, 3) reference poses.

    Returns:
        Speeds (N, 40) in m/s and curvatures (N, 40) in 1/m.
    """
    step_NM3 = poses_NT3[:, 1:] - poses_NT3[:, :-1]
    yaw_NM = poses_NT3[:, :-1, 2]
    along_NM = step_NM3[..., 0] * torch.cos(yaw_NM) + step_NM3[..., 1] * torch.sin(yaw_NM)
    matrix = torch.as_tensor(speed_fit_matrix(), dtype=poses_NT3.dtype, device=poses_NT3.device)
    speed_NM = along_NM @ matrix.T
    return speed_NM, _fit_curvature(_wrap(step_NM3[..., 2]), speed_NM)


@lru_cache(maxsize=1)
def speed_fit_matrix() -> np.ndarray:
    """Return the constant (40, 40) matrix from displacements along the yaw to the speed profile."""
    size, dt = NUM_DISPLACEMENTS, STEP_S
    design = np.tri(size) * dt**2
    design[:, 0] = dt
    penalty = np.zeros((size - 2, size))
    rows = np.arange(size - 2)
    penalty[rows, rows + 1] = -1.0
    penalty[-1, -1] = 1.0  # NAVSIM overwrites the other entries of the super-diagonal
    normal = design.T @ design + JERK_PENALTY * penalty.T @ penalty
    integrate = np.tri(size) * dt
    integrate[:, 0] = 1.0
    return integrate @ np.linalg.solve(normal, design.T)


def _fit_curvature(turn_NM: Tensor, speed_NM: Tensor) -> Tensor:
    travel_NM = speed_NM * STEP_S
    stiffness, load = [travel_NM[:, -1] ** 2], [travel_NM[:, -1] * turn_NM[:, -1]]
    for k in range(NUM_DISPLACEMENTS - 2, -1, -1):
        softening_N = 1.0 + stiffness[-1]  # 1 = 1e-2 / STEP_S**2
        load.append(travel_NM[:, k] * turn_NM[:, k] + load[-1] / softening_N)
        stiffness.append(travel_NM[:, k] ** 2 + stiffness[-1] / softening_N)
    curvature = [load[-1] / (stiffness[-1] + INITIAL_CURVATURE_PENALTY)]
    for k in range(1, NUM_DISPLACEMENTS):
        curvature.append((load[-1 - k] + curvature[-1]) / (stiffness[-1 - k] + 1.0))
    return torch.stack(curvature, dim=1)


def _curvature_preview(curvature_NM: Tensor) -> Tensor:
    step_M = torch.arange(NUM_DISPLACEMENTS, device=curvature_NM.device)
    ahead_Mk = step_M[:, None] + torch.arange(TRACKING_HORIZON, device=curvature_NM.device)
    return curvature_NM[:, ahead_Mk.clamp(max=NUM_DISPLACEMENTS - 1)]


def _track(
    state_N11: Tensor,
    pose_N3: Tensor,
    reference_speed_N: Tensor,
    curvature_Nk: Tensor,
    vehicle: VehicleParameters,
) -> tuple[Tensor, Tensor]:
    speed_N = state_N11[:, VX]
    error_N = speed_N - reference_speed_N
    stopping_N = (reference_speed_N <= STOPPING_SPEED_MPS) & (speed_N <= STOPPING_SPEED_MPS)
    command_N = -torch.where(stopping_N, STOPPING_GAIN * error_N, SPEED_GAIN * error_N)
    rate_N = _steering_rate(state_N11, pose_N3, command_N, curvature_Nk, vehicle)
    return command_N, torch.where(stopping_N, 0.0, rate_N)


def _steering_rate(
    state_N11: Tensor, pose_N3: Tensor, command_N: Tensor, curvature_Nk: Tensor, vehicle: VehicleParameters
) -> Tensor:
    dx_N, dy_N = state_N11[:, X] - pose_N3[:, 0], state_N11[:, Y] - pose_N3[:, 1]
    lateral_N = -dx_N * torch.sin(pose_N3[:, 2]) + dy_N * torch.cos(pose_N3[:, 2])
    heading_N = _wrap(state_N11[:, YAW] - pose_N3[:, 2])
    steering_N = state_N11[:, STEERING]
    preview_k = torch.arange(TRACKING_HORIZON, dtype=state_N11.dtype, device=state_N11.device)
    travel_Nk = (state_N11[:, VX, None] + preview_k * STEP_S * command_N[:, None]) * STEP_S
    turn_Nk = travel_Nk * (steering_N[:, None] / vehicle.wheel_base_m - curvature_Nk)
    unit_turn_Nk = travel_Nk * (preview_k * STEP_S / vehicle.wheel_base_m)
    free_heading_Nk = heading_N[:, None] + torch.cumsum(turn_Nk, dim=1) - turn_Nk  # before each step
    unit_heading_Nk = torch.cumsum(unit_turn_Nk, dim=1) - unit_turn_Nk
    free_lateral_N = lateral_N + (travel_Nk * free_heading_Nk).sum(dim=1)
    unit_lateral_N = (travel_Nk * unit_heading_Nk).sum(dim=1)
    free_heading_N = free_heading_Nk[:, -1] + turn_Nk[:, -1]
    unit_heading_N = unit_heading_Nk[:, -1] + unit_turn_Nk[:, -1]
    gain_N = unit_lateral_N**2 + HEADING_WEIGHT * unit_heading_N**2 + 1.0
    return (
        -(unit_lateral_N * free_lateral_N + HEADING_WEIGHT * unit_heading_N * _wrap(free_heading_N)) / gain_N
    )


def _drive(state_N11: Tensor, command_N: Tensor, rate_N: Tensor, vehicle: VehicleParameters) -> Tensor:
    x_N, y_N, yaw_N, speed_N, _, accel_N, _, steering_N, _, yaw_rate_N, _ = state_N11.unbind(1)
    accel_N = accel_N + ACCELERATION_BLEND * (command_N - accel_N)
    applied_rate_N = STEERING_BLEND * (STEP_S * rate_N) / STEP_S
    new_speed_N = speed_N + accel_N * STEP_S
    new_steering_N = torch.clamp(steering_N + applied_rate_N * STEP_S, -MAX_STEERING_RAD, MAX_STEERING_RAD)
    new_yaw_rate_N = new_speed_N * torch.tan(new_steering_N) / vehicle.wheel_base_m
    zero_N = torch.zeros_like(x_N)
    return torch.stack(
        [
            x_N + speed_N * torch.cos(yaw_N) * STEP_S,
            y_N + speed_N * torch.sin(yaw_N) * STEP_S,
            _wrap(yaw_N + speed_N * torch.tan(steering_N) / vehicle.wheel_base_m * STEP_S),
            new_speed_N,
            zero_N,
            accel_N,
            zero_N,
            new_steering_N,
            applied_rate_N,
            new_yaw_rate_N,
            (new_yaw_rate_N - yaw_rate_N) / STEP_S,
        ],
        dim=1,
    )


def _wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi
