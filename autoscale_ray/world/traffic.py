"""Other road users: they follow the paths of a road by the Intelligent Driver Model (Treiber et al. 2000).

Before t = 0 every agent moves with constant acceleration, so its state at t = 0 is what the family asked for;
from then on it reacts to its leader, to a stop line and to its own order when to go.

Shape legend: N scenes, A agents, T times of `TIMES_S`, J steps of the roll-out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoscale_ray.scenes.schema import AGENT_TYPES
from autoscale_ray.world.paths import poses_at, smooth_step

VEHICLE, PEDESTRIAN, BICYCLE = (AGENT_TYPES.index(name) for name in ("vehicle", "pedestrian", "bicycle"))
CONE, BARRIER = (AGENT_TYPES.index(name) for name in ("traffic_cone", "barrier"))
NOBODY, EGO = -1, -2
STEP_S = 0.125
NUM_STEPS = 40
PAST_TIMES_S = np.array([-2.0, -1.5, -1.0, -0.5])
FUTURE_TIMES_S = np.arange(0.0, 5.001, 0.25)
TIMES_S = np.concatenate([PAST_TIMES_S, FUTURE_TIMES_S])
"""Times at which traffic is known: the four past frames, then every quarter of a second to 5 s."""
FRAME_OF_TIME_T = np.concatenate([np.arange(5), np.arange(6, 25, 2)])
"""Indices into `TIMES_S` of the 15 frames of a scene."""
FAR_M = 1e6
HEADWAY_S = 1.4

_DEFAULTS: dict[str, Any] = {
    "path": 0,
    "leader": NOBODY,
    "direction": 1.0,
    "kind": VEHICLE,
    "length": 4.6,
    "width": 1.9,
    "present": True,
    "offset": 0.0,
    "acceleration": 0.0,
    "desired": None,
    "agility": 1.5,
    "stop_station": FAR_M,
    "stop_until": np.inf,
    "go_from": -np.inf,
    "shift_to": None,
    "shift_from_s": 0.0,
    "shift_for_s": 3.0,
    "first_frame": 0,
}
_PER_SLOT = ("path", "leader")


@dataclass(frozen=True, slots=True)
class Traffic:
    """The agents of N scenes in A slots; arrays are (N, A) unless the name ends in A."""

    path_A: np.ndarray
    leader_A: np.ndarray
    station: np.ndarray
    speed: np.ndarray
    direction: np.ndarray
    kind: np.ndarray
    length: np.ndarray
    width: np.ndarray
    present: np.ndarray
    offset: np.ndarray
    acceleration: np.ndarray
    desired: np.ndarray
    agility: np.ndarray
    stop_station: np.ndarray
    stop_until: np.ndarray
    go_from: np.ndarray
    shift_to: np.ndarray
    shift_from_s: np.ndarray
    shift_for_s: np.ndarray
    first_frame: np.ndarray


def agent(station_N: np.ndarray, speed_N: np.ndarray | float, **orders: Any) -> dict[str, Any]:
    """Describe one slot of road users, one in each scene.

    Args:
        station_N: Station of the box centre on its path at t = 0, m.
        speed_N: Speed at t = 0, m/s.
        orders: Any of the fields of `Traffic` in the units m, s, m/s; `desired` defaults to the speed,
            `shift_to` (a lane change) to the offset, `direction` -1 drives against the stations, `leader` is
            a slot, `EGO` or `NOBODY`, `go_from` is the time from which the agent wants to move.
    """
    slot = {**_DEFAULTS, "station": station_N, "speed": speed_N, **orders}
    slot["desired"] = slot["speed"] if slot["desired"] is None else slot["desired"]
    slot["shift_to"] = slot["offset"] if slot["shift_to"] is None else slot["shift_to"]
    return slot


def gather(slots: list[dict[str, Any]], num_scenes: int) -> Traffic:
    """Stack the slots of a family into arrays."""
    columns: dict[str, np.ndarray] = {}
    for name in Traffic.__slots__:
        key = name.removesuffix("_A")
        if key in _PER_SLOT:
            columns[name] = np.array([slot[key] for slot in slots], dtype=np.int64)
        else:
            columns[name] = np.stack([np.broadcast_to(slot[key], num_scenes) for slot in slots], axis=1)
    return Traffic(**columns)


def roll_out(
    traffic: Traffic, ego_center_NJ: np.ndarray, ego_speed_NJ: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move all agents from -2 s to 5 s along their paths.

    IDM: a = a_max [1 - (v / v_desired)^4 - (s* / gap)^2], s* = 2 + max(0, v T + v dv / (2 sqrt(a_max b))), T = 1.4 s,
    b = 2 m/s2, clipped to [-6, a_max]; semi-implicit Euler at `STEP_S`.

    Args:
        traffic: Slots.
        ego_center_NJ: Station of the ego's box centre on path 0 at every step 0 ... `NUM_STEPS`, m.
        ego_speed_NJ: Its speed, m/s.

    Returns:
        Travelled distance since t = 0 (N, A, T) in m, negative before, and speed (N, A, T) in m/s.
    """
    past_travel, past_speed = _past(traffic)
    travel, speed = np.zeros_like(traffic.speed, dtype=float), traffic.speed.astype(float)
    travels, speeds = [travel], [speed]
    for step in range(NUM_STEPS):
        acceleration = _idm(
            traffic, travel, speed, ego_center_NJ[:, step], ego_speed_NJ[:, step], step * STEP_S
        )
        speed = np.maximum(speed + STEP_S * acceleration, 0.0)
        travel = travel + STEP_S * speed
        if step % 2:
            travels.append(travel)
            speeds.append(speed)
    future_travel, future_speed = np.stack(travels, axis=-1), np.stack(speeds, axis=-1)
    return np.concatenate([past_travel, future_travel], -1), np.concatenate([past_speed, future_speed], -1)


def _past(traffic: Traffic) -> tuple[np.ndarray, np.ndarray]:
    speed, acceleration = traffic.speed[..., None], traffic.acceleration[..., None]
    standstill = np.where(acceleration > 0, -speed / np.maximum(acceleration, 1e-6), -np.inf)
    started = np.minimum(traffic.go_from, 0.0)[..., None]
    begin = np.maximum(standstill, started)
    time = np.maximum(PAST_TIMES_S, begin)
    travel = speed * time + 0.5 * acceleration * time**2
    return travel, np.where(begin >= PAST_TIMES_S, 0.0, speed + acceleration * time)


def _idm(
    traffic: Traffic,
    travel: np.ndarray,
    speed: np.ndarray,
    ego_N: np.ndarray,
    ego_speed_N: np.ndarray,
    time_s: float,
) -> np.ndarray:
    station = traffic.station + traffic.direction * travel
    wanted = np.where(traffic.go_from <= time_s, traffic.desired, 0.0)
    free = np.where(wanted > 0.05, 1.0 - (speed / np.maximum(wanted, 0.05)) ** 4, -2.0)
    stopping = time_s < traffic.stop_until
    gap = (traffic.stop_station - station) * traffic.direction - 0.5 * traffic.length
    push = _interaction(speed, gap, speed, traffic.agility)
    push = np.where(stopping & (gap > -2.0), push, 0.0)
    for slot in np.flatnonzero(traffic.leader_A != NOBODY).tolist():
        push[:, slot] = np.maximum(
            push[:, slot], _leader_push(traffic, slot, station, speed, ego_N, ego_speed_N)
        )
    return np.clip(traffic.agility * (free - push), -6.0, traffic.agility)


def _leader_push(
    traffic: Traffic,
    slot: int,
    station: np.ndarray,
    speed: np.ndarray,
    ego_N: np.ndarray,
    ego_speed_N: np.ndarray,
) -> np.ndarray:
    leader = traffic.leader_A[slot]
    if leader == EGO:
        where, lead_speed, half, present = ego_N, ego_speed_N, 2.3, np.ones(len(ego_N), bool)
    else:
        where, lead_speed = station[:, leader], speed[:, leader]
        half, present = 0.5 * traffic.length[:, leader], traffic.present[:, leader]
    gap = (where - station[:, slot]) * traffic.direction[:, slot] - half - 0.5 * traffic.length[:, slot]
    own = speed[:, slot]
    push = _interaction(own, gap, own - lead_speed, traffic.agility[:, slot])
    return np.where(present & (gap > -3.0), push, 0.0)


def _interaction(speed: np.ndarray, gap: np.ndarray, closing: np.ndarray, agility: np.ndarray) -> np.ndarray:
    desired_gap = 2.0 + np.maximum(0.0, speed * HEADWAY_S + speed * closing / (2.0 * np.sqrt(2.0 * agility)))
    return (desired_gap / np.maximum(gap, 0.3)) ** 2


def agent_poses(
    traffic: Traffic, paths_NMS3: np.ndarray, travel_NAT: np.ndarray, speed_NAT: np.ndarray
) -> np.ndarray:
    """Return box poses and velocities of all agents in the frame of the road.

    Returns:
        (N, A, T, 5): x, y, yaw, vx, vy.
    """
    station = traffic.station[..., None] + traffic.direction[..., None] * travel_NAT
    phase = (TIMES_S - traffic.shift_from_s[..., None]) / traffic.shift_for_s[..., None]
    shift = (traffic.shift_to - traffic.offset)[..., None]
    offset = traffic.offset[..., None] + shift * smooth_step(phase)
    inside = np.clip(phase, 0.0, 1.0)
    sideways = shift / traffic.shift_for_s[..., None] * 30.0 * (inside * (1.0 - inside)) ** 2
    pose = poses_at(paths_NMS3, traffic.path_A[None, :, None], station, offset)
    turned = np.where(traffic.direction > 0, 0.0, np.pi)[..., None]
    drift = (
        np.arctan2(sideways, np.maximum(speed_NAT, 0.5))
        * np.where(traffic.direction > 0, 1.0, -1.0)[..., None]
    )
    yaw = pose[..., 2] + turned + np.where(speed_NAT > 0.2, drift, 0.0)
    velocity = speed_NAT[..., None] * np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
    return np.concatenate([pose[..., :2], yaw[..., None], velocity], axis=-1)
