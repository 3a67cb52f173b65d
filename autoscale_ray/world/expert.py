"""The privileged expert: the best of lateral offsets times speed profiles by kinematic terms of the driving
score.

It knows the whole future of the traffic. Candidates are judged as driven (no tracker in the loop):

    value = NC * DAC * TLC * (5 EP + 5 TTC + 2 LK + 2 C) / 14 - small costs for acceleration and leaving the
    lane,

with the NAVSIM meaning of the terms (docs/scoring.md), agents grown by a margin, and EP measured against the
best candidate that passes the gates. A harmful pseudo-expert is the same planner with other agents and the
light left out.

Shape legend: N scenes, C candidates = lateral options x profiles, A agents, T quarter seconds (0 ... 5 s), J
steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscale_ray.world.paths import poses_at, smooth_step
from autoscale_ray.world.profiles import PROFILES, drive_profiles
from autoscale_ray.world.situation import (
    EGO_FRONT_M,
    EGO_LENGTH_M,
    EGO_REAR_AXLE_TO_CENTER_M,
    EGO_WIDTH_M,
    Detour,
    Situation,
)
from autoscale_ray.world.traffic import BICYCLE, EGO, FAR_M, NUM_STEPS, TIMES_S, VEHICLE

FIRST_FUTURE = 4
NUM_JUDGED = 17
"""Quarter seconds judged, 0 ... 4 s."""
LONG_MARGIN_M, SIDE_MARGIN_M = 1.2, 0.25
"""The tracker of the full score strays from the plan by up to about a metre along the way, hardly sideways."""
TTC_OFFSETS = (2, 4)
"""Quarter seconds by which the ego box is sent ahead."""
NUM_TTC = 13
TERMS = ("no_collision", "drivable", "light", "progress", "time_to_collision", "lane_keeping", "comfort")


@dataclass(frozen=True, slots=True)
class Drive:
    """The chosen drive of N scenes."""

    station_NJ: np.ndarray
    speed_NJ: np.ndarray
    poses_NT3: np.ndarray
    """Rear axle at quarter seconds 0 ... 5 s in the frame of the road."""
    speed_NT: np.ndarray
    acceleration_NT: np.ndarray
    terms: dict[str, np.ndarray]
    """Kinematic terms (N,) of the chosen candidate, every agent and the light counted."""


def lateral_offsets(situation: Situation, detour: Detour | None, station_NX: np.ndarray) -> np.ndarray:
    """Return the ego's offset from the route at stations, left positive, for one lateral option.

    Behind the ego the offset fades as it came; ahead it goes to the route by a quintic, then out and back.
    """
    offset, slope = situation.offset_N[:, None], np.tan(situation.heading_N)[:, None]
    reach = np.maximum(2.2 * situation.speed_N, 12.0)[:, None]
    u = np.clip(station_NX / reach, 0.0, 1.0)
    ahead = offset * (1.0 - smooth_step(u)) + slope * reach * (u - 6 * u**3 + 8 * u**4 - 3 * u**5)
    behind = offset + slope * station_NX * np.exp(np.minimum(station_NX, 0.0) / 15.0)
    total = np.where(station_NX < 0, behind, ahead)
    if detour is None:
        return total
    out = (station_NX - detour.out_from_N[:, None]) / (detour.out_until_N - detour.out_from_N)[:, None]
    back = (station_NX - detour.back_from_N[:, None]) / (detour.back_until_N - detour.back_from_N)[:, None]
    return total + detour.offset_N[:, None] * (smooth_step(out) - smooth_step(back))


def ego_poses(situation: Situation, detour: Detour | None, station_NX: np.ndarray) -> np.ndarray:
    """Return rear-axle poses (N, X, 4) at stations: x, y, yaw and the offset from the route."""
    offset = lateral_offsets(situation, detour, station_NX)
    ahead = lateral_offsets(situation, detour, station_NX + 0.25)
    slope = (ahead - lateral_offsets(situation, detour, station_NX - 0.25)) / 0.5
    pose = poses_at(situation.road.paths_NMS3, np.array(0), station_NX, offset)
    yaw = pose[..., 2] + np.arctan2(slope, 1.0 - pose[..., 3] * offset)
    return np.stack([pose[..., 0], pose[..., 1], yaw, offset], axis=-1)


def leaders(situation: Situation, travel_NAT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rear-bumper station and speed, each (N, J), of the nearest vehicle or bicycle ahead."""
    traffic = situation.traffic
    station = traffic.station[..., None] + traffic.direction[..., None] * travel_NAT[..., FIRST_FUTURE:]
    phase = (TIMES_S[FIRST_FUTURE:] - traffic.shift_from_s[..., None]) / traffic.shift_for_s[..., None]
    offset = traffic.offset[..., None] + (traffic.shift_to - traffic.offset)[..., None] * smooth_step(phase)
    counts = traffic.present & (traffic.direction > 0) & np.isin(traffic.kind, (VEHICLE, BICYCLE))
    counts &= (traffic.path_A == 0) & (traffic.leader_A != EGO)
    half_sum = 0.5 * (traffic.width[..., None] + EGO_WIDTH_M)
    ahead = counts[..., None] & (np.abs(offset) < half_sum) & (station[..., :1] > EGO_FRONT_M)
    rear = np.where(ahead, station - 0.5 * traffic.length[..., None], FAR_M)
    nearest = rear.argmin(axis=1)[:, None]
    rear_NT = np.take_along_axis(rear, nearest, axis=1)[:, 0]
    moved_NT = np.diff(np.take_along_axis(station, nearest, axis=1)[:, 0], axis=1, append=np.nan) / 0.25
    moved_NT[:, -1] = moved_NT[:, -2]
    steps = np.arange(NUM_STEPS + 1)
    low = np.minimum(steps // 2, NUM_STEPS // 2 - 1)
    share = steps / 2 - low
    rear_NJ = rear_NT[:, low] * (1 - share) + rear_NT[:, low + 1] * share
    return rear_NJ, np.maximum(moved_NT[:, low], 0.0)


def choose(
    situation: Situation,
    agent_poses_NAT5: np.ndarray,
    travel_NAT: np.ndarray,
    *,
    slow_N: np.ndarray,
    ignores_N: np.ndarray,
) -> Drive:
    """Return the best drive of every scene.

    Args:
        situation: The scenes.
        agent_poses_NAT5: Agents at `TIMES_S` in the frame of the road.
        travel_NAT: Travelled distance of the agents.
        slow_N: Scenes whose driver keeps to 0.7 of the limit (dynamics gap).
        ignores_N: Scenes whose driver ignores other agents and the light (harmful).
    """
    profiles = _candidate_profiles(situation, travel_NAT, slow_N, ignores_N)
    station_NKT = profiles[0][..., ::2]
    station_NX = station_NKT.reshape(situation.num_scenes, -1)
    options = (None, *situation.detours)
    poses = [ego_poses(situation, option, station_NX).reshape(*station_NKT.shape, 4) for option in options]
    station_NCT, speed_NCT, acceleration_NCT = (
        np.tile(values[..., ::2], (1, len(options), 1)) for values in profiles
    )
    ego = _Candidates(np.concatenate(poses, axis=1), speed_NCT, acceleration_NCT)
    judged = _judge(situation, ego, station_NCT, agent_poses_NAT5[:, :, FIRST_FUTURE:])
    best_N = _best(judged, ego, ignores_N)
    row = np.arange(situation.num_scenes)
    profile_N = best_N % len(PROFILES)
    return Drive(
        profiles[0][row, profile_N],
        profiles[1][row, profile_N],
        ego.poses_NCT4[row, best_N, :, :3],
        ego.speed_NCT[row, best_N],
        ego.acceleration_NCT[row, best_N],
        {name: values_NC[row, best_N] for name, values_NC in judged.terms(np.zeros_like(ignores_N)).items()},
    )


def _candidate_profiles(
    situation: Situation, travel_NAT: np.ndarray, slow_N: np.ndarray, ignores_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rear_NJ, leader_speed_NJ = leaders(situation, travel_NAT)
    rear_NJ = np.where(ignores_N[:, None], FAR_M, rear_NJ)
    signal = situation.signal
    never = np.full(situation.num_scenes, -np.inf)
    red_until_N = never if signal is None else np.where(ignores_N, -np.inf, signal.red_until_s_N)
    red_N = np.full(situation.num_scenes, FAR_M) if signal is None else signal.from_N
    wanted_N = situation.road.limit_N * np.where(slow_N, 0.7, 1.0)
    return drive_profiles(
        situation.speed_N,
        situation.acceleration_N,
        wanted_N,
        rear_NJ,
        leader_speed_NJ,
        situation.yield_stations(),
        red_N,
        red_until_N,
    )


@dataclass(frozen=True, slots=True)
class _Candidates:
    poses_NCT4: np.ndarray
    speed_NCT: np.ndarray
    acceleration_NCT: np.ndarray


@dataclass(frozen=True, slots=True)
class _Judgement:
    hit_s_NC: np.ndarray
    """First at-fault collision, inf without one."""
    near_NC: np.ndarray
    inside_NC: np.ndarray
    ran_light_NC: np.ndarray
    lane_NC: np.ndarray
    comfort_NC: np.ndarray
    progress_NC: np.ndarray

    def terms(self, ignores_N: np.ndarray) -> dict[str, np.ndarray]:
        """Return every term (N, C) in [0, 1], without agents and light where ignored."""
        ignores = ignores_N[:, None]
        collision_free = np.isinf(self.hit_s_NC) | ignores
        light = ~self.ran_light_NC | ignores
        gate = collision_free & self.inside_NC & light
        best = np.where(gate, self.progress_NC, 0.0).max(axis=1, keepdims=True)
        progress = np.where(best > 5.0, np.clip(self.progress_NC / np.maximum(best, 5.0), 0.0, 1.0), 1.0)
        calm = ~self.near_NC | ignores
        values = (collision_free, self.inside_NC, light, progress, calm, self.lane_NC, self.comfort_NC)
        return {name: value.astype(float) for name, value in zip(TERMS, values, strict=True)}


def _best(judged: _Judgement, ego: _Candidates, ignores_N: np.ndarray) -> np.ndarray:
    term = judged.terms(ignores_N)
    gate = term["no_collision"] * term["drivable"] * term["light"]
    average = (
        5 * term["progress"] + 5 * term["time_to_collision"] + 2 * term["lane_keeping"] + 2 * term["comfort"]
    )
    effort = 0.006 * np.mean(ego.acceleration_NCT[..., :NUM_JUDGED] ** 2, axis=-1)
    wander = 0.02 * np.mean(np.abs(ego.poses_NCT4[..., :NUM_JUDGED, 3]), axis=-1)
    latest = 0.1 * np.minimum(judged.hit_s_NC, 4.0) - 0.01 * ego.speed_NCT[..., :NUM_JUDGED].mean(axis=-1)
    return (gate * average / 14.0 - effort - wander + (gate == 0) * (latest - 1.0)).argmax(axis=1)


def _judge(
    situation: Situation, ego: _Candidates, station_NCT: np.ndarray, agents_NAT5: np.ndarray
) -> _Judgement:
    poses = ego.poses_NCT4[:, :, :NUM_JUDGED]
    offset_NCT = poses[..., 3]
    hit_s_NC, near_NC = _collisions(situation, ego, agents_NAT5)
    half = 0.5 * EGO_WIDTH_M + 0.1
    widest_NC, narrowest_NC = offset_NCT.max(axis=-1), offset_NCT.min(axis=-1)
    left = np.maximum(situation.road.left_room_N - half, np.abs(situation.offset_N) + 0.05)
    right = np.maximum(situation.road.right_room_N - half, np.abs(situation.offset_N) + 0.05)
    inside_NC = (widest_NC <= left[:, None]) & (-narrowest_NC <= right[:, None])
    lane_NC = (np.abs(offset_NCT) > 0.5).sum(axis=-1) < 8
    yaw_rate = np.abs(np.diff(poses[..., 2], axis=-1)).max(axis=-1) / 0.25
    acceleration = ego.acceleration_NCT[:, :, :NUM_JUDGED]
    comfort_NC = (yaw_rate < 0.85) & (acceleration.min(axis=-1) > -3.9)
    comfort_NC &= np.abs(np.diff(acceleration, axis=-1)).max(axis=-1) / 0.25 < 3.9
    progress_NC = station_NCT[..., NUM_JUDGED - 1]
    return _Judgement(
        hit_s_NC, near_NC, inside_NC, _runs_light(situation, station_NCT), lane_NC, comfort_NC, progress_NC
    )


def _runs_light(situation: Situation, station_NCT: np.ndarray) -> np.ndarray:
    signal = situation.signal
    if signal is None:
        return np.zeros(station_NCT.shape[:2], bool)
    time_T = np.arange(NUM_JUDGED) * 0.25
    red_NT = time_T < signal.red_until_s_N[:, None]
    station = station_NCT[..., :NUM_JUDGED]
    rear_m = EGO_LENGTH_M - EGO_FRONT_M
    entered = station + EGO_FRONT_M > signal.from_N[:, None, None] - 1.0
    left = station - rear_m > signal.until_N[:, None, None] + 0.2
    return np.any(entered & ~left & red_NT[:, None], axis=-1)


def _collisions(
    situation: Situation, candidates: _Candidates, agents_NAT5: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    traffic = situation.traffic
    x, y, yaw = (np.ascontiguousarray(candidates.poses_NCT4[..., i], dtype=np.float32) for i in range(3))
    cos, sin = np.cos(yaw), np.sin(yaw)
    x += EGO_REAR_AXLE_TO_CENTER_M * cos
    y += EGO_REAR_AXLE_TO_CENTER_M * sin
    speed = candidates.speed_NCT.astype(np.float32)
    hit_s_NC = np.full(x.shape[:2], np.inf)
    near_NC = np.zeros(x.shape[:2], bool)
    agents = agents_NAT5.astype(np.float32)
    ego = (x, y, cos, sin, speed)
    for slot in np.flatnonzero(traffic.leader_A != EGO):
        counts_N = traffic.present[:, slot]
        if not counts_N.any():
            continue
        box = (agents[:, slot], 0.5 * traffic.length[:, slot], 0.5 * traffic.width[:, slot], counts_N)
        hits = _overlaps(tuple(values[..., :NUM_JUDGED] for values in ego), 0, box)
        first = np.where(hits.any(axis=-1), 0.25 * hits.argmax(axis=-1), np.inf)
        hit_s_NC = np.minimum(hit_s_NC, first)
        for ahead in TTC_OFFSETS:
            now_x, now_y, c, s, v = (values[..., :NUM_TTC] for values in ego)
            reach = 0.25 * ahead * v
            moved = (now_x + reach * c, now_y + reach * s, c, s, v)
            near_NC |= _overlaps(moved, ahead, box).any(axis=-1)
    return hit_s_NC, near_NC


def _overlaps(ego: tuple[np.ndarray, ...], ahead: int, box: tuple) -> np.ndarray:
    """Return where (N, C, T) the ego box, grown by the margins, overlaps an agent that is not behind it."""
    x, y, cos, sin, speed = ego
    agent_NT5, half_length_N, half_width_N, counts_N = box
    window = agent_NT5[:, None, ahead : ahead + x.shape[-1]]
    dx, dy = window[..., 0] - x, window[..., 1] - y
    reach = np.hypot(half_length_N, half_width_N) + np.hypot(
        0.5 * EGO_LENGTH_M + LONG_MARGIN_M, 0.5 * EGO_WIDTH_M + 0.3
    )
    reach = np.where(counts_N, reach, 0.0).astype(np.float32)
    close = np.flatnonzero(dx * dx + dy * dy < (reach * reach)[:, None, None])
    hits = np.zeros(x.size, bool)
    if close.size == 0:
        return hits.reshape(x.shape)
    scene, time = close // (x.shape[1] * x.shape[2]), close % x.shape[2]
    agent_yaw = agent_NT5[scene, ahead + time, 2]
    c, s = cos.ravel()[close], sin.ravel()[close]
    along, across = (
        dx.ravel()[close] * c + dy.ravel()[close] * s,
        dy.ravel()[close] * c - dx.ravel()[close] * s,
    )
    crossing = agent_yaw - np.arctan2(s, c)
    touching = _boxes_overlap(along, across, crossing, half_length_N[scene], half_width_N[scene])
    from_axle = along + EGO_REAR_AXLE_TO_CENTER_M
    behind = from_axle < -0.866 * np.hypot(from_axle, across)
    hits[close] = touching & ~behind & (speed.ravel()[close] > 0.05)
    return hits.reshape(x.shape)


def _boxes_overlap(
    along: np.ndarray, across: np.ndarray, turn: np.ndarray, half_length: np.ndarray, half_width: np.ndarray
) -> np.ndarray:
    """Separating axis test of the grown ego box at the origin and a turned box at (along, across)."""
    own_length, own_width = 0.5 * EGO_LENGTH_M + LONG_MARGIN_M, 0.5 * EGO_WIDTH_M + SIDE_MARGIN_M
    c, s = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    apart = np.abs(along) > own_length + half_length * c + half_width * s
    apart |= np.abs(across) > own_width + half_length * s + half_width * c
    other_along = along * np.cos(turn) + across * np.sin(turn)
    other_across = across * np.cos(turn) - along * np.sin(turn)
    apart |= np.abs(other_along) > half_length + own_length * c + own_width * s
    apart |= np.abs(other_across) > half_width + own_length * s + own_width * c
    return ~apart
