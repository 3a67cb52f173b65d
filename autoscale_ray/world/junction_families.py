"""Scenario families at junctions: intersections with and without lights, the roundabout.

Shape legend: N scenes.
"""

from __future__ import annotations

import numpy as np

from autoscale_ray.world.draws import Draw
from autoscale_ray.world.junctions import half_size, intersection, roundabout
from autoscale_ray.world.road_families import walker
from autoscale_ray.world.situation import EGO_FRONT_M, FORWARD, LEFT_TURN, Signal, Situation
from autoscale_ray.world.traffic import agent, gather


def _situation(draw: Draw, road, slots, speed_N: np.ndarray, **fields) -> Situation:
    acceleration_N = np.clip(draw.normal(0.0, 0.2), -speed_N, 0.45 * speed_N)
    zero_N = np.zeros(draw.num_scenes)
    traffic = gather(slots, draw.num_scenes)
    return Situation(road, traffic, speed_N, acceleration_N, draw.normal(0.0, 0.08), zero_N, **fields)


def crossing(draw: Draw, variant: int) -> Situation:
    """Vehicles with right of way cross from both sides."""
    num_lanes = variant + 1
    limit_N, width_N = draw.uniform(8.0, 11.0), draw.uniform(3.4, 3.7)
    speed_N = limit_N * draw.uniform(0.5, 0.85)
    half_N = half_size(width_N, num_lanes)
    room_N = speed_N**2 / (2 * 2.5) + draw.uniform(2.0, 12.0)
    distance_N = EGO_FRONT_M + width_N + 1.0 + room_N
    road = intersection(distance_N, width_N, limit_N, num_lanes=num_lanes)
    arrival_N = distance_N / np.maximum(0.5 * (speed_N + limit_N), 1.0)
    truck_N = draw.chance(0.5)
    slots = []
    for path, share in ((1, 0.75), (3, 0.55)):
        pace_N = draw.uniform(6.0, 10.0)
        station_N = -np.maximum(arrival_N + draw.uniform(-2.2, 2.2), 0.8) * pace_N
        body = {"length": np.where(truck_N, 8.5, 4.6), "width": np.where(truck_N, 2.4, 1.9)}
        slots.append(agent(station_N, pace_N, path=path, present=draw.chance(share), **body))
        behind_N = station_N - draw.uniform(14.0, 26.0)
        slots.append(agent(behind_N, pace_N, path=path, leader=len(slots) - 1, present=draw.chance(0.35)))
    slots.append(
        walker(
            -half_N - 3.0 - draw.uniform(0, 9),
            0.0,
            offset=-num_lanes * width_N,
            path=2,
            present=draw.chance(0.3),
        )
    )
    wait_N = distance_N - np.where(slots[2]["present"] | slots[3]["present"], width_N, 0.0) - 1.0
    return _situation(draw, road, slots, speed_N, yield_N=wait_N, attribute_N=truck_N)


def left_turn(draw: Draw, variant: int) -> Situation:
    """The ego turns left on green across oncoming traffic."""
    num_lanes = variant + 1
    limit_N, width_N = draw.uniform(6.0, 7.5), draw.uniform(3.4, 3.7)
    half_N = half_size(width_N, num_lanes)
    speed_N = limit_N * draw.uniform(0.35, 0.9)
    distance_N = half_N + EGO_FRONT_M - 4.0 + speed_N**2 / (2 * 2.5) + draw.uniform(1.0, 8.0)
    road = intersection(distance_N, width_N, limit_N, movement="left", num_lanes=num_lanes, signals=True)
    to_conflict_N = distance_N - half_N + 12.0
    arrival_N = to_conflict_N / np.maximum(0.5 * (speed_N + limit_N), 1.0)
    pace_N = draw.uniform(6.5, 10.5)
    first_N = -np.maximum(arrival_N + draw.uniform(-2.8, 2.2), 0.2) * pace_N
    gap_N = draw.uniform(12.0, 40.0)
    slots = [
        agent(first_N, pace_N, path=2, present=draw.chance(0.85)),
        agent(first_N - gap_N, pace_N, path=2, present=draw.chance(0.55), leader=0),
        agent(-half_N - 3.3, 0.0, path=1, present=draw.chance(0.4)),
        agent(-half_N - 3.3, 0.0, path=3, present=draw.chance(0.4)),
    ]
    attribute_N = np.full(draw.num_scenes, variant == 1)
    light = Signal(distance_N - half_N, distance_N + half_N, np.full(len(half_N), -np.inf))
    wait_N = distance_N - half_N + 4.0
    fields = {"yield_N": wait_N, "signal": light, "command": LEFT_TURN, "attribute_N": attribute_N}
    return _situation(draw, road, slots, speed_N, **fields)


def red_light(draw: Draw, variant: int) -> Situation:
    """A light ahead: red, turning green, or green."""
    num_lanes = variant + 1
    limit_N, width_N = draw.uniform(8.0, 12.0), draw.uniform(3.4, 3.7)
    half_N = half_size(width_N, num_lanes)
    gap_N = draw.uniform(7.0, 38.0)
    speed_N = np.minimum(limit_N, np.sqrt(2 * 1.6 * (gap_N - 2.0))) * draw.uniform(0.65, 0.95)
    distance_N = half_N + EGO_FRONT_M + gap_N
    road = intersection(distance_N, width_N, limit_N, num_lanes=num_lanes, signals=True)
    mood_N = draw.unit()
    until_N = np.where(
        mood_N < 0.6, np.inf, np.where(mood_N < 0.7, 0.5 * np.ceil(draw.uniform(0.5, 4.5)), -np.inf)
    )
    line_N = distance_N - half_N
    waiting_N = draw.chance(0.3) & (gap_N > 16.0) & (mood_N < 0.7)
    flows_N = mood_N < 0.6
    slots = [
        agent(
            line_N - 3.0,
            0.0,
            desired=limit_N,
            stop_station=line_N - 0.2,
            stop_until=until_N,
            present=waiting_N,
        )
    ]
    for path in (1, 3):
        pace_N = draw.uniform(6.0, 10.0)
        moving = {"path": path, "present": flows_N & draw.chance(0.55)}
        slots.append(agent(draw.uniform(-38.0, 8.0), pace_N, **moving))
        standing = {"path": path, "present": ~flows_N & draw.chance(0.5)}
        slots.append(agent(-half_N - 3.3, 0.0, **standing))
    slots.append(agent(-half_N - 3.3, 0.0, path=2, present=flows_N & draw.chance(0.5)))
    signal = Signal(line_N, distance_N + half_N, until_N)
    return _situation(draw, road, slots, speed_N, signal=signal)


def roundabout_entry(draw: Draw, variant: int) -> Situation:
    """The ego gives way to the ring, joins it and heads for its exit."""
    radius_N, width_N, limit_N = draw.uniform(16.5, 20.0), draw.uniform(3.5, 3.9), draw.uniform(6.0, 7.5)
    speed_N = limit_N * draw.uniform(0.5, 0.9)
    distance_N = draw.uniform(-8.0, 10.0)
    road = roundabout(distance_N, radius_N, width_N, limit_N, exit_arm=variant + 2)
    radius_NS = np.linalg.norm(road.paths_NMS3[:, 0, :, :2], axis=-1)
    outer_N = radius_N + 0.5 * width_N + 1.2
    wait_N = (radius_NS < outer_N[:, None]).argmax(axis=1) - 70.0
    arrival_N = (wait_N + 4.0) / np.maximum(0.5 * (speed_N + limit_N), 1.0)
    mode_N, pace_N = draw.unit(), draw.uniform(4.5, 7.0)
    ring_N = -np.maximum(arrival_N + draw.uniform(-2.2, 2.2), 0.3) * pace_N
    slots = [
        agent(ring_N, pace_N, path=1, present=mode_N < 0.55),
        agent(
            ring_N - draw.uniform(10.0, 18.0),
            pace_N,
            path=1,
            leader=0,
            present=(mode_N < 0.55) & draw.chance(0.5),
        ),
        agent(ring_N - 6.0, pace_N, path=2, present=(mode_N >= 0.55) & (mode_N < 0.75)),
        agent(draw.uniform(-22.0, 4.0), pace_N, path=3, present=(mode_N >= 0.75) & (mode_N < 0.95)),
        agent(ring_N + draw.uniform(18.0, 30.0), pace_N, path=1, present=draw.chance(0.35)),
    ]
    return _situation(draw, road, slots, speed_N, yield_N=wait_N, command=LEFT_TURN if variant else FORWARD)
