"""Road layouts of the world: lanes, links, areas and the paths that traffic follows.

Right-hand traffic. Every layout is built for N scenes at once with one topology and per-scene measures. Path
0 of a road is the ego's route; its station 0 is the ego's rear axle at t = 0. A lane's own area is derived
from its centre line; roadblocks and intersections (the drivable area of the score) and crosswalks are listed
in `areas`.

Shape legend: N scenes, M paths, S stations, P vertices, W ring vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autoscale_ray.world.paths import (
    FIRST_STATION_M,
    STATIONS_S,
    line,
    offset_polyline,
    offset_poses,
    path_from_curvature,
    path_through,
    poses_at,
    smooth_step,
    strip,
)

ROADBLOCK, INTERSECTION, CROSSWALK = 0, 3, 5
"""Indices into `autoscale_ray.scenes.schema.POLYGON_LAYERS`."""
SUCCESSOR, LEFT, RIGHT = 0, 1, 2
NO_SIGNAL, EGO_SIGNAL, CROSS_SIGNAL = 0, 1, 2
SHOULDER_M = 0.6
_BEFORE_M = -FIRST_STATION_M


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane or lane connector."""

    points_NP2: np.ndarray
    on_route: bool = False
    connector: bool = False
    signal: int = NO_SIGNAL
    widening_m: float = 0.0


@dataclass(frozen=True, slots=True)
class Area:
    """A polygon that is not the area of one lane."""

    points_NW2: np.ndarray
    layer: int


@dataclass(frozen=True, slots=True)
class Road:
    """A layout for N scenes."""

    lanes: tuple[Lane, ...]
    links: tuple[tuple[int, int, int], ...]
    areas: tuple[Area, ...]
    paths_NMS3: np.ndarray
    width_N: np.ndarray
    limit_N: np.ndarray
    left_room_N: np.ndarray
    right_room_N: np.ndarray
    """Drivable room to the left and right of the route, m, as far as the expert may use it."""


def assemble(
    lanes: dict[tuple, Lane],
    links: list[tuple[tuple, tuple, int]],
    areas: list[Area],
    paths: list[np.ndarray],
    width_N: np.ndarray,
    limit_N: np.ndarray,
    room: tuple[np.ndarray, np.ndarray],
) -> Road:
    """Return a road whose lanes and links are given by name; `room` is the drivable room left and right."""
    number = {name: i for i, name in enumerate(lanes)}
    numbered = tuple((number[a], number[b], kind) for a, b, kind in links)
    return Road(
        tuple(lanes.values()), numbered, tuple(areas), np.stack(paths, axis=1), width_N, limit_N, *room
    )


def corridor(
    curvature_NS: np.ndarray,
    width_N: np.ndarray,
    limit_N: np.ndarray,
    num_lanes: int,
    ego_lane: int,
    *,
    crosswalk_N: np.ndarray | None = None,
) -> Road:
    """Build a road of parallel lanes along the ego's route and one oncoming lane on their left.

    All traffic moves in the stations of path 0.

    Args:
        curvature_NS: Curvature of the ego's lane at `STATIONS_S`, 1/m.
        width_N: Lane width, m.
        limit_N: Speed limit, m/s.
        num_lanes: Lanes in the ego's direction.
        ego_lane: The ego's lane, 0 is the rightmost.
        crosswalk_N: Station of a pedestrian crossing, m, or None.
    """
    route = path_from_curvature(curvature_NS)
    pieces = [route[:, _stations(-40, 30)], route[:, _stations(30, 110)]]
    lanes: dict[tuple, Lane] = {}
    for piece, poses in enumerate(pieces):
        for i in range(num_lanes):
            shifted = offset_poses(poses, (i - ego_lane) * width_N)
            lanes["ahead", i, piece] = Lane(shifted, on_route=True)
        lanes["oncoming", piece] = Lane(offset_poses(poses, (num_lanes - ego_lane) * width_N)[:, ::-1])
    links: list[tuple[tuple, tuple, int]]
    links = [(("ahead", i, 0), ("ahead", i, 1), SUCCESSOR) for i in range(num_lanes)]
    links += _neighbours([("ahead", i) for i in range(num_lanes)], 2)
    links.append((("oncoming", 1), ("oncoming", 0), SUCCESSOR))
    right_N = (ego_lane + 0.5) * width_N + SHOULDER_M
    middle_N = (num_lanes - ego_lane - 0.5) * width_N
    left_N = middle_N + width_N + SHOULDER_M
    sides = ((middle_N, -right_N), (left_N, middle_N))
    areas = [Area(_band(poses, *side), ROADBLOCK) for poses in pieces for side in sides]
    if crosswalk_N is not None:
        areas.append(_crosswalk(route, crosswalk_N, left_N, right_N))
    return assemble(lanes, links, areas, [route], width_N, limit_N, (left_N, right_N))


def _stations(first_m: float, last_m: float, step_m: int = 5) -> slice:
    start = int(first_m - FIRST_STATION_M)
    return slice(start, start + int(last_m - first_m) + 1, step_m)


def _neighbours(right_to_left: list[tuple], num_pieces: int) -> list[tuple[tuple, tuple, int]]:
    links = []
    for right, left in pairwise(right_to_left):
        for piece in range(num_pieces):
            links.append(((*right, piece), (*left, piece), LEFT))
            links.append(((*left, piece), (*right, piece), RIGHT))
    return links


def _band(poses_NP3: np.ndarray, left_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [offset_poses(poses_NP3, right_N), offset_poses(poses_NP3, left_N)[:, ::-1]], axis=1
    )


def _crosswalk(route_NS3: np.ndarray, station_N: np.ndarray, left_N: np.ndarray, right_N: np.ndarray) -> Area:
    station_NC = station_N[:, None] + np.array([-1.6, 1.6, 1.6, -1.6])
    offset_NC = np.stack([-right_N, -right_N, left_N, left_N], axis=1)
    return Area(poses_at(route_NS3[:, None], np.array(0), station_NC, offset_NC)[..., :2], CROSSWALK)


def merge(ramp_end_N: np.ndarray, width_N: np.ndarray, limit_N: np.ndarray, bend_N: np.ndarray) -> Road:
    """Build a two-lane road that the ego joins from a lane on its right.

    Path 1 is the right main lane; its station 0 is abreast of the ego.

    Args:
        ramp_end_N: Distance from the ego to the end of the joining lane, m, about 50 ... 80.
        width_N: Lane width, m.
        limit_N: Speed limit of the main road, m/s.
        bend_N: How quickly the ramp leaves the main road backwards, 1/m, for example 0.004.
    """
    num = len(width_N)
    along_NP = np.broadcast_to(np.arange(-60.0, 20.0, 4.0), (num, 20))
    ramp_y = -width_N[:, None] - bend_N[:, None] * np.minimum(along_NP + 8.0, 0.0) ** 2
    ramp_back = np.stack([along_NP, ramp_y], axis=-1)
    ahead_NP = np.linspace(20.0, ramp_end_N, 8, axis=1)
    ramp_ahead = np.stack([ahead_NP, np.broadcast_to(-width_N[:, None], ahead_NP.shape)], axis=-1)
    change_NP = np.linspace(ramp_end_N - 45.0, ramp_end_N, 16, axis=1)
    change_y = -width_N[:, None] * (1.0 - smooth_step((change_NP - change_NP[:, :1]) / 45.0))
    before = ramp_back[:, along_NP[0] < 4.0]
    route = np.concatenate(
        [before, np.stack([change_NP, change_y], axis=-1), point(num, 160.0, 0.0)[:, None]], axis=1
    )
    zero = int(np.flatnonzero(along_NP[0] == 0.0)[0])
    length_N = np.linalg.norm(np.diff(ramp_back[:, : zero + 1], axis=1), axis=-1).sum(axis=1)
    main = line(point(num, -60.0, 0.0), point(num, 110.0, 0.0), 35)
    left = offset_polyline(main, width_N)
    lanes = {
        ("main", 0, 0): Lane(main[:, :18], on_route=True),
        ("main", 1, 0): Lane(left[:, :18], on_route=True),
        ("main", 0, 1): Lane(main[:, 17:], on_route=True),
        ("main", 1, 1): Lane(left[:, 17:], on_route=True),
        ("ramp",): Lane(np.concatenate([ramp_back, ramp_ahead[:, 1:]], axis=1), on_route=True),
    }
    links = [(("main", i, 0), ("main", i, 1), SUCCESSOR) for i in (0, 1)]
    links += [
        *_neighbours([("main", 0), ("main", 1)], 2),
        *((("ramp",), ("main", 0, i), LEFT) for i in (0, 1)),
    ]
    half_N = 0.5 * width_N
    areas = [
        Area(strip(main, 1.5 * width_N + SHOULDER_M, -half_N), ROADBLOCK),
        Area(strip(lanes[("ramp",)].points_NP2, half_N, -half_N - SHOULDER_M), ROADBLOCK),
    ]
    paths = [path_through(lead_in(route, length_N)), straight_path(point(num, 0.0, 0.0))]
    return assemble(lanes, links, areas, paths, width_N, limit_N, (1.5 * width_N, half_N))


def lead_in(points_NP2: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """Prepend a straight piece so that a point `length_N` metres into the polylines gets station 0."""
    back = points_NP2[:, 0] - points_NP2[:, 1]
    back /= np.linalg.norm(back, axis=-1, keepdims=True)
    first = points_NP2[:, 0] + back * (_BEFORE_M - length_N)[:, None]
    return np.concatenate([first[:, None], points_NP2], axis=1)


def point(num: int, x: float | np.ndarray, y: float | np.ndarray) -> np.ndarray:
    """Return points (N, 2) from numbers or arrays (N,)."""
    return np.stack([np.broadcast_to(x, num), np.broadcast_to(y, num)], axis=-1).astype(float)


def straight_path(zero_N2: np.ndarray) -> np.ndarray:
    """Return poses (N, S, 3) along x with station 0 at the given points."""
    x = zero_N2[:, :1] + STATIONS_S
    return np.stack([x, np.broadcast_to(zero_N2[:, 1:], x.shape), np.zeros_like(x)], axis=-1)
