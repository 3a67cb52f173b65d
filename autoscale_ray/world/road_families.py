"""Scenario families on roads without a junction: corridors of parallel lanes and the merge.

Every function takes a `Draw` and a variant of the layout and returns the scenes at t = 0.

Shape legend: N scenes, S stations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from autoscale_ray.world.draws import Draw
from autoscale_ray.world.paths import STATIONS_S, poses_at, smooth_step
from autoscale_ray.world.roads import Road, corridor, merge
from autoscale_ray.world.situation import EGO_FRONT_M, EGO_REAR_AXLE_TO_CENTER_M, Detour, Situation
from autoscale_ray.world.traffic import (
    BARRIER,
    BICYCLE,
    CONE,
    EGO,
    FAR_M,
    PEDESTRIAN,
    VEHICLE,
    agent,
    gather,
)

LANES = ((1, 0), (2, 0), (2, 1), (3, 1))
"""Variants of a plain road: lanes of the ego's direction, the ego's lane from the right."""


def straight_curvature(draw: Draw) -> np.ndarray:
    """Return a nearly constant, nearly zero curvature (N, S) in 1/m."""
    return np.broadcast_to(draw.normal(0.0, 0.0008)[:, None], (draw.num_scenes, len(STATIONS_S)))


def bend_curvature(draw: Draw, low: float = 0.012, high: float = 0.035) -> tuple[np.ndarray, np.ndarray]:
    """Return the curvature (N, S) of one bend ahead, with 15 m ramps, and its greatest value (N,) in 1/m."""
    peak_N = draw.uniform(low, high)
    start_N, length_N = draw.uniform(0.0, 22.0), draw.uniform(25.0, 50.0)
    up = smooth_step((STATIONS_S - start_N[:, None]) / 15.0)
    down = smooth_step((STATIONS_S - (start_N + length_N)[:, None]) / 15.0)
    return (peak_N * draw.sign())[:, None] * (up - down), peak_N


def _lane_width(draw: Draw) -> np.ndarray:
    return draw.uniform(3.4, 3.8)


def _scene(
    road: Road, slots: list[dict[str, Any]], speed_N: np.ndarray, draw: Draw, **fields: Any
) -> Situation:
    """Return a situation whose ego drives along the route near its middle."""
    state = {
        "acceleration_N": np.maximum(draw.normal(0.0, 0.25), -speed_N),
        "offset_N": draw.normal(0.0, 0.1),
        "heading_N": np.zeros(draw.num_scenes),
    }
    state["acceleration_N"] = np.minimum(state["acceleration_N"], 0.45 * speed_N)
    return Situation(road, gather(slots, draw.num_scenes), speed_N, **{**state, **fields})


def background(draw: Draw, road: Road, speed_N: np.ndarray, lanes: tuple[int, int]) -> list[dict]:
    """Return slots for company: two oncoming vehicles, a walker on the pavement, a follower."""
    num_lanes, ego_lane = lanes
    oncoming_N = (num_lanes - ego_lane) * road.width_N
    first_N, pace_N = draw.uniform(5.0, 60.0), draw.uniform(6.0, 11.0)
    pavement_N = -(ego_lane + 0.5) * road.width_N - draw.uniform(1.5, 3.0)
    late = np.where(draw.chance(0.15), 6, 0)
    slots = [
        agent(first_N, pace_N, direction=-1.0, offset=oncoming_N, present=draw.chance(0.5), first_frame=late),
        agent(
            first_N + draw.uniform(14.0, 45.0),
            pace_N,
            direction=-1.0,
            offset=oncoming_N,
            present=draw.chance(0.4),
        ),
        walker(draw.uniform(-5.0, 45.0), draw.uniform(0.8, 1.5), offset=pavement_N, present=draw.chance(0.3)),
    ]
    gap_N = 0.9 * speed_N + draw.uniform(4.0, 12.0)
    behind_N = EGO_REAR_AXLE_TO_CENTER_M - 4.6 - gap_N
    slots.append(agent(behind_N, speed_N, leader=EGO, desired=road.limit_N, present=draw.chance(0.4)))
    return slots


def walker(station_N: np.ndarray, speed_N: np.ndarray | float, **orders: Any) -> dict[str, Any]:
    """Describe a slot of pedestrians."""
    body = {"kind": PEDESTRIAN, "length": 0.6, "width": 0.6, "agility": 3.0}
    return agent(station_N, speed_N, **{**body, **orders})


def _truck_or_car(truck_N: np.ndarray) -> dict[str, np.ndarray]:
    return {"length": np.where(truck_N, 9.0, 4.6), "width": np.where(truck_N, 2.4, 1.9)}


def cruise(draw: Draw, variant: int) -> Situation:
    """Free road."""
    lanes = LANES[variant]
    limit_N = draw.uniform(9.0, 14.0)
    speed_N = limit_N * draw.uniform(0.65, 1.0)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes)
    return _scene(road, background(draw, road, speed_N, lanes), speed_N, draw)


def curve(draw: Draw, variant: int) -> Situation:
    """Free road with a bend ahead."""
    lanes = LANES[variant]
    curvature_NS, peak_N = bend_curvature(draw)
    limit_N = np.clip(np.sqrt(2.4 / peak_N), 6.0, 13.0)
    speed_N = limit_N * draw.uniform(0.7, 1.05)
    road = corridor(curvature_NS, _lane_width(draw), limit_N, *lanes)
    return _scene(road, background(draw, road, speed_N, lanes), speed_N, draw)


def _leader(draw: Draw, speed_N: np.ndarray, limit_N: np.ndarray, truck_N: np.ndarray) -> dict[str, Any]:
    body = _truck_or_car(truck_N)
    gap_N = 4.0 + speed_N * draw.uniform(1.0, 2.2)
    slower_N = speed_N * draw.uniform(0.55, 1.05)
    braking_N = np.where(draw.chance(0.35), draw.uniform(-1.2, -0.3), draw.uniform(-0.2, 0.3))
    calm_N = np.where(
        braking_N < -0.25, slower_N * draw.uniform(0.4, 0.8), np.minimum(slower_N * 1.1, limit_N)
    )
    station_N = EGO_FRONT_M + gap_N + 0.5 * body["length"]
    return agent(station_N, slower_N, acceleration=braking_N, desired=calm_N, **body)


def follow(draw: Draw, variant: int) -> Situation:
    """A leader that is slower, brakes or drives along."""
    lanes = LANES[variant]
    limit_N = draw.uniform(9.0, 14.0)
    speed_N = limit_N * draw.uniform(0.6, 0.95)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes)
    truck_N = draw.chance(0.3)
    slots = [_leader(draw, speed_N, limit_N, truck_N), *background(draw, road, speed_N, lanes)]
    return _scene(road, slots, speed_N, draw, attribute_N=truck_N)


def curve_follow(draw: Draw, variant: int) -> Situation:
    """A leader in a bend."""
    lanes = LANES[variant]
    curvature_NS, peak_N = bend_curvature(draw)
    limit_N = np.clip(np.sqrt(2.4 / peak_N), 6.0, 13.0)
    speed_N = limit_N * draw.uniform(0.7, 1.0)
    road = corridor(curvature_NS, _lane_width(draw), limit_N, *lanes)
    truck_N = draw.chance(0.3)
    slots = [_leader(draw, speed_N, limit_N, truck_N), *background(draw, road, speed_N, lanes)]
    return _scene(road, slots, speed_N, draw, attribute_N=truck_N)


def queue(draw: Draw, variant: int) -> Situation:
    """The tail of a queue that stands or creeps."""
    lanes = LANES[variant]
    limit_N = draw.uniform(8.0, 13.0)
    speed_N = limit_N * draw.uniform(0.45, 0.9)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes)
    creep_N = np.where(draw.chance(0.5), 0.0, draw.uniform(0.5, 3.0))
    tail_N = EGO_FRONT_M + 2.3 + speed_N**2 / (2 * 2.2) + draw.uniform(3.0, 14.0)
    spacing_N = draw.uniform(6.5, 8.5)
    slots = [agent(tail_N + i * spacing_N, creep_N, leader=i + 1 if i < 2 else -1) for i in range(3)]
    beside_N = np.where(lanes[1] + 1 < lanes[0], road.width_N, road.width_N * (lanes[0] - lanes[1]))
    along_N = np.where(lanes[1] + 1 < lanes[0], 1.0, -1.0)
    slots.append(
        agent(
            tail_N + draw.uniform(-4.0, 4.0),
            creep_N,
            offset=beside_N,
            direction=along_N,
            present=draw.chance(0.5),
        )
    )
    return _scene(road, slots + background(draw, road, speed_N, lanes)[2:], speed_N, draw)


def cut_in(draw: Draw, variant: int) -> Situation:
    """A vehicle of the next lane moves in just ahead."""
    lanes = ((2, 0), (3, 1), (2, 1))[variant]
    limit_N = draw.uniform(10.0, 14.0)
    speed_N = limit_N * draw.uniform(0.7, 0.95)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes)
    side_N = {0: np.ones(draw.num_scenes), 1: draw.sign(), 2: -np.ones(draw.num_scenes)}[variant]
    intruder_N = speed_N - draw.uniform(-0.5, 4.0)
    station_N = EGO_FRONT_M + 2.3 + draw.uniform(2.5, 11.0)
    slots = [
        agent(
            station_N,
            intruder_N,
            offset=side_N * road.width_N,
            shift_to=0.0,
            shift_from_s=draw.uniform(-1.4, 0.5),
            shift_for_s=draw.uniform(2.4, 3.6),
        ),
        agent(
            station_N + draw.uniform(14.0, 30.0),
            intruder_N,
            offset=side_N * road.width_N,
            present=draw.chance(0.5),
        ),
        agent(station_N + draw.uniform(25.0, 40.0), speed_N, present=draw.chance(0.4)),
    ]
    attribute_N = np.full(draw.num_scenes, variant == 1)
    slots += background(draw, road, speed_N, lanes)
    return _scene(road, slots, speed_N, draw, attribute_N=attribute_N)


def _pass_detours(
    road: Road, offsets: tuple[float, ...], station_N: np.ndarray, stay: bool
) -> tuple[Detour, ...]:
    out_until_N = np.maximum(station_N - 9.0, 6.0)
    out_from_N = out_until_N - np.clip(out_until_N, 12.0, 18.0)
    back_from_N = np.full_like(station_N, FAR_M) if stay else station_N + 6.0
    return tuple(
        Detour(np.full_like(station_N, offset), out_from_N, out_until_N, back_from_N, back_from_N + 18.0)
        for offset in offsets
    )


def overtake(draw: Draw, variant: int) -> Situation:
    """A slow vehicle keeps to the right of a wide lane; there may be room to pass."""
    lanes = ((1, 0), (2, 1))[variant]
    limit_N = draw.uniform(8.0, 12.0)
    speed_N = limit_N * draw.uniform(0.6, 0.9)
    width_N = draw.uniform(4.0, 4.4)
    road = corridor(straight_curvature(draw), width_N, limit_N, *lanes)
    slow_N, station_N = draw.uniform(1.0, 3.5), draw.uniform(20.0, 36.0)
    offset_N = np.where(draw.chance(0.7), draw.uniform(-1.6, -1.15), draw.uniform(-0.8, -0.3))
    slots = [agent(station_N, slow_N, offset=offset_N, width=1.8, length=draw.uniform(3.8, 6.0))]
    detours = _pass_detours(road, (0.7, 1.05, 1.3), station_N, stay=True)
    slots += background(draw, road, speed_N, lanes)
    return _scene(road, slots, speed_N, draw, detours=detours)


def cyclist(draw: Draw, variant: int) -> Situation:
    """A cyclist near the right border of the lane."""
    lanes = ((1, 0), (2, 0))[variant]
    limit_N = draw.uniform(8.0, 12.0)
    speed_N = limit_N * draw.uniform(0.6, 0.9)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes)
    ride_N, station_N = draw.uniform(2.5, 5.0), draw.uniform(12.0, 30.0)
    offset_N = np.where(draw.chance(0.75), draw.uniform(-1.25, -0.6), draw.uniform(-0.3, 0.2))
    slots = [agent(station_N, ride_N, offset=offset_N, kind=BICYCLE, width=0.7, length=1.8)]
    detours = _pass_detours(road, (0.6, 0.95, 1.25), station_N + 4.0, stay=True)
    slots += background(draw, road, speed_N, lanes)
    attribute_N = np.full(draw.num_scenes, variant == 1)
    return _scene(road, slots, speed_N, draw, detours=detours, attribute_N=attribute_N)


def obstacle(draw: Draw, variant: int) -> Situation:
    """A parked vehicle, cone or barrier reaches into the lane."""
    lanes = ((1, 0), (2, 0))[variant]
    limit_N = draw.uniform(8.0, 12.0)
    speed_N = limit_N * draw.uniform(0.55, 0.9)
    road = corridor(straight_curvature(draw), draw.uniform(3.5, 4.0), limit_N, *lanes)
    kind_N = np.array([VEHICLE, VEHICLE, VEHICLE, BARRIER, CONE])[(5 * draw.unit()).astype(int)]
    length_N = np.choose(np.searchsorted([VEHICLE, CONE, BARRIER], kind_N), [4.6, 0.5, 2.0])
    width_N = np.choose(np.searchsorted([VEHICLE, CONE, BARRIER], kind_N), [1.9, 0.5, 0.6])
    station_N, edge_N = draw.uniform(18.0, 42.0), draw.uniform(-0.75, 0.1)
    body = {"kind": kind_N, "length": length_N, "width": width_N}
    slots = [agent(station_N, 0.0, offset=edge_N - 0.5 * width_N, **body)]
    more = {**body, "present": draw.chance(0.4)}
    slots.append(
        agent(station_N + length_N + draw.uniform(1.0, 3.0), 0.0, offset=edge_N - 0.6 - 0.5 * width_N, **more)
    )
    detours = _pass_detours(road, (0.5, 0.8, 1.1, 1.4), station_N, stay=False)
    slots += background(draw, road, speed_N, lanes)
    return _scene(road, slots, speed_N, draw, detours=detours)


def recovery(draw: Draw, variant: int) -> Situation:
    """The ego is beside its lane's middle and heads astray."""
    lanes = LANES[variant]
    limit_N = draw.uniform(8.0, 12.0)
    speed_N = limit_N * draw.uniform(0.6, 0.95)
    curvature_NS = bend_curvature(draw, 0.0, 0.012)[0]
    road = corridor(curvature_NS, _lane_width(draw), limit_N, *lanes)
    slots = [{**_leader(draw, speed_N, limit_N, draw.chance(0.2)), "present": draw.chance(0.3)}]
    slots += background(draw, road, speed_N, lanes)
    side_N = draw.sign()
    offset_N = side_N * draw.uniform(0.3, 0.75)
    heading_N = side_N * draw.uniform(-0.02, 0.07)
    return _scene(road, slots, speed_N, draw, offset_N=offset_N, heading_N=heading_N)


def crossing_path(road: Road, station_N: np.ndarray) -> Road:
    """Add a path that crosses the route at a right angle, to the left, with its station 0 on the route."""
    zero = poses_at(road.paths_NMS3, np.array(0), station_N[:, None], np.zeros((len(station_N), 1)))[:, 0]
    yaw_N = zero[:, 2] + np.pi / 2
    x = zero[:, :1] + STATIONS_S * np.cos(yaw_N)[:, None]
    y = zero[:, 1:2] + STATIONS_S * np.sin(yaw_N)[:, None]
    path = np.stack([x, y, np.broadcast_to(yaw_N[:, None], x.shape)], axis=-1)
    return replace(road, paths_NMS3=np.concatenate([road.paths_NMS3, path[:, None]], axis=1))


def pedestrian(draw: Draw, variant: int) -> Situation:
    """Pedestrians walk, set out or wait at a crossing."""
    lanes = ((1, 0), (2, 0))[variant]
    limit_N = draw.uniform(7.0, 11.0)
    speed_N = limit_N * draw.uniform(0.55, 0.9)
    zebra_N = EGO_FRONT_M + 3.5 + speed_N**2 / (2 * 2.5) + draw.uniform(1.0, 14.0)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes, crosswalk_N=zebra_N)
    road = crossing_path(road, zebra_N)
    slots = []
    for share in (1.0, 0.45):
        side_N, pace_N, mood_N = draw.sign(), draw.uniform(1.0, 1.8), draw.unit()
        kerb_N = np.where(side_N > 0, road.left_room_N, road.right_room_N) + draw.uniform(0.2, 1.0)
        walks = mood_N < 0.65
        begin_N = np.where(walks, -FAR_M, np.where(mood_N < 0.8, draw.uniform(0.1, 0.8), FAR_M))
        arrived_N = np.where(walks, draw.uniform(0.0, 1.0) * (kerb_N - 1.0), 0.0)
        now_N = np.where(walks, pace_N, 0.0)
        orders = {
            "path": 1,
            "direction": -side_N,
            "desired": pace_N,
            "go_from": begin_N,
            "present": draw.chance(share),
        }
        slots.append(walker(side_N * (kerb_N - arrived_N), now_N, offset=draw.uniform(-1.0, 1.0), **orders))
    slots += background(draw, road, speed_N, lanes)[2:]
    return _scene(road, slots, speed_N, draw, yield_N=zebra_N - 2.8)


def dart_out(draw: Draw, variant: int) -> Situation:
    """Somebody stands behind a parked vehicle and may run out at a time that nothing tells."""
    lanes = ((1, 0), (2, 0))[variant]
    limit_N = draw.uniform(7.0, 11.0)
    speed_N = limit_N * draw.uniform(0.6, 0.9)
    where_N = EGO_FRONT_M + 3.0 + speed_N**2 / (2 * 3.0) + draw.uniform(1.0, 14.0)
    road = corridor(straight_curvature(draw), _lane_width(draw), limit_N, *lanes)
    road = crossing_path(road, where_N)
    runs_N = draw.chance(0.55)
    begin_N = np.where(runs_N, draw.uniform(0.25, 2.2), FAR_M)
    pace_N, kerb_N = draw.uniform(1.6, 2.6), road.right_room_N + draw.uniform(0.2, 0.8)
    slots = [
        walker(-kerb_N, 0.0, path=1, desired=pace_N, go_from=begin_N),
        agent(where_N - draw.uniform(4.0, 6.0), 0.0, offset=-road.right_room_N - 1.1),
    ]
    slots += background(draw, road, speed_N, lanes)[:2]
    return _scene(road, slots, speed_N, draw, yield_N=where_N - 2.0)


def merging(draw: Draw, variant: int) -> Situation:
    """The ego joins a main road from its ramp."""
    limit_N = draw.uniform(10.0, 13.0)
    speed_N = limit_N * draw.uniform(0.65, 0.9)
    end_N = draw.uniform(52.0, 66.0)
    road = merge(end_N, _lane_width(draw), limit_N, draw.uniform(0.003, 0.007))
    pace_N = limit_N * draw.uniform(0.7, 0.95)
    station_N = draw.uniform(12.0, 34.0)
    slots = []
    for i in range(4):
        slots.append(agent(station_N, pace_N, path=1, present=draw.chance(0.85), leader=i - 1 if i else -1))
        station_N = station_N - draw.uniform(13.0, 26.0)
    beside = {"path": 1, "offset": road.width_N, "present": draw.chance(0.5)}
    slots.append(agent(draw.uniform(-25.0, 30.0), pace_N + 1.0, **beside))
    return _scene(road, slots, speed_N, draw)
