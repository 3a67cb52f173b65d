"""From points of the unit cube to driven scenes: traffic, expert, ego history, observation noise.

Shape legend: N scenes, A agents, T the 15 frames of a scene, X quarter seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autoscale_ray.scenes.schema import CURRENT_FRAME, NUM_FRAMES
from autoscale_ray.world.draws import Draw
from autoscale_ray.world.expert import Drive, choose, ego_poses
from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.situation import EGO_REAR_AXLE_TO_CENTER_M, Situation
from autoscale_ray.world.traffic import FRAME_OF_TIME_T, NUM_STEPS, STEP_S, Traffic, agent_poses, roll_out

SIGHT_M = 85.0
"""Agents farther from the ego are not recorded."""
GAP_SPEED = 0.8
"""Speeds of everybody in a scene with a dynamics gap, relative to the real ones."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """How N scenes differ from faithful ones."""

    slow_N: np.ndarray
    """Dynamics gap."""
    harmful_N: np.ndarray
    """The driver ignores others."""
    half_harmful_N: np.ndarray
    """The driver ignores others where the family's visible attribute is set."""
    nudge_N3: np.ndarray
    """Ego moved to the left by m, turned by rad, speed changed by a factor 1 + x."""


@dataclass(frozen=True, slots=True)
class Driven:
    """N scenes of one family and one layout, in the frame of their road."""

    situation: Situation
    drive: Drive
    ego_states_NT7: np.ndarray
    agent_states_NAT5: np.ndarray
    agent_valid_NAT: np.ndarray
    harmful_N: np.ndarray


def simulate(family: str, variant: int, cube_ND: np.ndarray, conditions: Conditions) -> Driven:
    """Drive the scenes of some cube points.

    Traffic runs twice: once with the ego at constant speed, so that the expert knows everybody ahead of it,
    and again behind the ego that the expert drove; agents that do not follow the ego move the same both
    times.

    Args:
        family: Name of the family.
        variant: Layout variant, the same for all points.
        cube_ND: Points (N, D) in the unit cube; coordinate 0 is the variant and is skipped.
        conditions: Gaps and harm.
    """
    situation = FAMILIES[family].build(Draw(cube_ND), variant)
    situation = _with_conditions(situation, conditions)
    attribute_N = situation.attribute_N
    halves_N = np.zeros(len(cube_ND), bool) if attribute_N is None else attribute_N
    ignores_N = conditions.harmful_N | (conditions.half_harmful_N & halves_N)
    paths = situation.road.paths_NMS3
    steps_J = np.arange(NUM_STEPS + 1) * STEP_S
    steady_NJ = np.broadcast_to(situation.speed_N[:, None], (len(cube_ND), NUM_STEPS + 1))
    travel, speed = roll_out(situation.traffic, steady_NJ * steps_J + EGO_REAR_AXLE_TO_CENTER_M, steady_NJ)
    poses = agent_poses(situation.traffic, paths, travel, speed)
    drive = choose(situation, poses, travel, slow_N=conditions.slow_N, ignores_N=ignores_N)
    travel, speed = roll_out(situation.traffic, drive.station_NJ + EGO_REAR_AXLE_TO_CENTER_M, drive.speed_NJ)
    states = agent_poses(situation.traffic, paths, travel, speed)[:, :, FRAME_OF_TIME_T]
    ego_states = _ego_states(situation, drive)
    return Driven(
        situation, drive, ego_states, states, _visible(situation.traffic, states, ego_states), ignores_N
    )


def _with_conditions(situation: Situation, conditions: Conditions) -> Situation:
    pace_N = np.where(conditions.slow_N, GAP_SPEED, 1.0)
    traffic = situation.traffic
    slower = {name: getattr(traffic, name) * pace_N[:, None] for name in ("speed", "desired")}
    side_N, turn_N, faster_N = conditions.nudge_N3.T
    return replace(
        situation,
        traffic=replace(traffic, **slower),
        speed_N=situation.speed_N * pace_N * (1.0 + faster_N),
        acceleration_N=situation.acceleration_N * pace_N,
        offset_N=situation.offset_N + side_N,
        heading_N=situation.heading_N + turn_N,
    )


def _ego_states(situation: Situation, drive: Drive) -> np.ndarray:
    """Return the ego's 15 frames (N, T, 7): history at constant acceleration, then the chosen drive."""
    past_X = np.arange(-9, 0) * 0.25
    speed, acceleration = situation.speed_N[:, None], situation.acceleration_N[:, None]
    station = speed * past_X + 0.5 * acceleration * past_X**2
    history = ego_poses(situation, None, station)[..., :3]
    poses = np.concatenate([history, drive.poses_NT3], axis=1)
    yaw = np.unwrap(poses[..., 2], axis=1)
    speeds = np.concatenate([speed + acceleration * past_X, drive.speed_NT], axis=1)
    along = np.concatenate([np.broadcast_to(acceleration, station.shape), drive.acceleration_NT], axis=1)
    sideways = speeds * np.gradient(yaw, 0.25, axis=1)
    columns = [poses[..., 0], poses[..., 1], yaw, speeds, np.zeros_like(speeds), along, sideways]
    frames = 1 + 2 * np.arange(NUM_FRAMES)
    return np.stack(columns, axis=-1)[:, frames]


def _visible(traffic: Traffic, states_NAT5: np.ndarray, ego_states_NT7: np.ndarray) -> np.ndarray:
    away = np.linalg.norm(states_NAT5[..., :2] - ego_states_NT7[:, None, :, :2], axis=-1)
    visible = traffic.present[..., None] & (away < SIGHT_M)
    return visible & (np.arange(NUM_FRAMES) >= traffic.first_frame[..., None])


def add_noise(driven: Driven, generator: np.random.Generator) -> Driven:
    """Return the scenes as a recording would show them, with detector noise on agents.

    0.1 m on x and y, 0.01 rad on headings and 3 % on speeds (so that what stands still stays so: the score asks
    whether an agent is stopped), standard deviations.

    Args:
        driven: Exact scenes.
        generator: Source of the noise.
    """
    states = driven.agent_states_NAT5.copy()
    states[..., :2] += generator.normal(0.0, 0.1, states[..., :2].shape)
    states[..., 2] += generator.normal(0.0, 0.01, states.shape[:-1])
    states[..., 3:] *= 1.0 + generator.normal(0.0, 0.03, (*states.shape[:-1], 1))
    return replace(driven, agent_states_NAT5=states)


def current_pose(driven: Driven) -> np.ndarray:
    """Return the ego's rear-axle pose (N, 3) at t = 0 in the frame of the road."""
    return driven.ego_states_NT7[:, CURRENT_FRAME, :3]
