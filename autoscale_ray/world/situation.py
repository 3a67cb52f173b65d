"""What a family hands over: a road, its traffic and the ego's state at t = 0, before anybody drives.

Shape legend: N scenes, T times of `traffic.TIMES_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscale_ray.world.roads import Road
from autoscale_ray.world.traffic import FAR_M, Traffic

EGO_LENGTH_M = 4.6
EGO_WIDTH_M = 1.9
EGO_WHEELBASE_M = 2.8
EGO_REAR_AXLE_TO_CENTER_M = 1.35
EGO_FRONT_M = EGO_REAR_AXLE_TO_CENTER_M + 0.5 * EGO_LENGTH_M
"""Rear axle to front bumper."""
LEFT_TURN, FORWARD = 0, 1
"""Indices into `autoscale_ray.scenes.schema.DRIVING_COMMANDS`."""


@dataclass(frozen=True, slots=True)
class Detour:
    """A lateral option of the expert: an offset taken between two stations, given up between two others."""

    offset_N: np.ndarray
    out_from_N: np.ndarray
    out_until_N: np.ndarray
    back_from_N: np.ndarray
    back_until_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Signal:
    """The traffic light of the ego's connector: red until a time, over a span of stations."""

    from_N: np.ndarray
    until_N: np.ndarray
    red_until_s_N: np.ndarray
    """-inf: green throughout; inf: red throughout."""


@dataclass(frozen=True, slots=True)
class Situation:
    """One family, N scenes, at t = 0."""

    road: Road
    traffic: Traffic
    speed_N: np.ndarray
    acceleration_N: np.ndarray
    offset_N: np.ndarray
    """Ego's rear axle to the left of the route, m."""
    heading_N: np.ndarray
    """Ego's heading against the route, rad."""
    command: int = FORWARD
    detours: tuple[Detour, ...] = ()
    yield_N: np.ndarray | None = None
    """Station at which the front bumper may wait for others, m."""
    signal: Signal | None = None
    attribute_N: np.ndarray | None = None
    """A visible property of road or traffic by which half-harmful families tell their halves apart."""

    @property
    def num_scenes(self) -> int:
        """Number of scenes N."""
        return len(self.speed_N)

    def yield_stations(self) -> np.ndarray:
        """Return the waiting line (N,), far away where the family has none."""
        return np.full(self.num_scenes, FAR_M) if self.yield_N is None else self.yield_N
