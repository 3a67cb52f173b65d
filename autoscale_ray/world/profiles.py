"""Jerk-limited speed profiles that the expert chooses among.

Shape legend: N scenes, K profiles, J steps of `traffic.STEP_S` (0 ... 5 s).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscale_ray.world.situation import EGO_FRONT_M
from autoscale_ray.world.traffic import FAR_M, NUM_STEPS, STEP_S

IGNORE = 0.0
"""Headway of a profile that does not look at its leader."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How one candidate drives: where it wants to get, how firmly, and for whom it holds back."""

    share_of_limit: float
    acceleration_mps2: float
    deceleration_mps2: float
    jerk_mps3: float = 3.0
    headway_s: float = IGNORE
    go_after_s: float = -1.0
    """Wait at the yield line until this time; -1 passes without waiting."""


PROFILES: tuple[Profile, ...] = (
    *(Profile(share, 1.2, 1.5) for share in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)),
    *(Profile(share, 2.0, 3.0) for share in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)),
    Profile(0.0, 2.0, 6.0, jerk_mps3=9.0),
    Profile(0.3, 2.0, 5.0, jerk_mps3=8.0),
    *(Profile(1.0, 1.8, 3.5, headway_s=headway) for headway in (1.0, 1.5, 2.0)),
    *(Profile(1.0, 2.0, 3.5, headway_s=1.3, go_after_s=after) for after in (1.0, 1.75, 2.5, 3.25, np.inf)),
)


def _column(name: str) -> np.ndarray:
    return np.array([getattr(profile, name) for profile in PROFILES])[None]


def drive_profiles(
    speed_N: np.ndarray,
    acceleration_N: np.ndarray,
    wanted_N: np.ndarray,
    leader_rear_NJ: np.ndarray,
    leader_speed_NJ: np.ndarray,
    wait_N: np.ndarray,
    red_N: np.ndarray,
    red_until_s_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrate all profiles from the ego's state.

    The wanted acceleration is min((v_target - v) / 0.8 s, IDM terms of leader, waiting line and red light),
    clipped to the profile's bounds and followed at its jerk; semi-implicit Euler; no reversing.

    Args:
        speed_N: Speed at t = 0, m/s.
        acceleration_N: Acceleration at t = 0, m/s2.
        wanted_N: Speed the driver would like on a free road, m/s.
        leader_rear_NJ: Station of the nearest leader's rear bumper at every step, m; far away without one.
        leader_speed_NJ: Its speed, m/s.
        wait_N: Station of the yield line, m.
        red_N: Station where the red span begins, m.
        red_until_s_N: Time until which it is red, s.

    Returns:
        Station, speed and acceleration, each (N, K, J).
    """
    share, up, down = _column("share_of_limit"), _column("acceleration_mps2"), _column("deceleration_mps2")
    jerk, headway, after = _column("jerk_mps3"), _column("headway_s"), _column("go_after_s")
    target = share * wanted_N[:, None]
    station = np.zeros(target.shape)
    speed = np.broadcast_to(speed_N[:, None], target.shape).copy()
    acceleration = np.broadcast_to(acceleration_N[:, None], target.shape).copy()
    history = [(station, speed, acceleration)]
    for step in range(NUM_STEPS):
        time_s = step * STEP_S
        front = station + EGO_FRONT_M
        limit = (target - speed) / 0.8
        gap = np.where(headway > 0, leader_rear_NJ[:, step, None] - front, FAR_M)
        limit = np.minimum(
            limit, _idm(speed, target, gap, speed - leader_speed_NJ[:, step, None], headway, up)
        )
        gap = np.where(time_s < after, wait_N[:, None] - front, FAR_M)
        limit = np.minimum(limit, _idm(speed, target, gap, speed, 0.5, up))
        red = (time_s < red_until_s_N[:, None]) & (headway > 0)
        gap = np.where(red, red_N[:, None] - front, FAR_M)
        limit = np.minimum(limit, _idm(speed, target, gap, speed, 0.5, up))
        wanted = np.clip(limit, -down, up)
        acceleration = acceleration + np.clip(wanted - acceleration, -jerk * STEP_S, jerk * STEP_S)
        acceleration = np.where((speed <= 0) & (acceleration < 0), 0.0, acceleration)
        speed = np.maximum(speed + STEP_S * acceleration, 0.0)
        station = station + STEP_S * speed
        history.append((station, speed, acceleration))
    stacked = [np.stack(values, axis=-1) for values in zip(*history, strict=True)]
    return stacked[0], stacked[1], stacked[2]


def _idm(
    speed: np.ndarray,
    target: np.ndarray,
    gap: np.ndarray,
    closing: np.ndarray,
    headway: np.ndarray | float,
    up: np.ndarray,
) -> np.ndarray:
    desired = 1.5 + np.maximum(0.0, speed * headway + speed * closing / (2.0 * np.sqrt(2.5 * up)))
    free = 1.0 - (speed / np.maximum(target, 0.5)) ** 4
    wanted = up * (np.maximum(free, -2.0) - (desired / np.maximum(gap, 0.3)) ** 2)
    return np.where((gap > 200.0) | (gap < -2.0), np.inf, wanted)
