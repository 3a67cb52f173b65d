"""Junctions of the world: four-way intersections and roundabouts, built as one arm and turned three times.

Shape legend: N scenes, S stations, P vertices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from autoscale_ray.world.paths import (
    FIRST_STATION_M,
    STATIONS_S,
    bezier,
    line,
    path_through,
    rotate_quarter,
    strip,
)
from autoscale_ray.world.roads import (
    CROSSWALK,
    EGO_SIGNAL,
    INTERSECTION,
    LEFT,
    NO_SIGNAL,
    RIGHT,
    ROADBLOCK,
    SHOULDER_M,
    SUCCESSOR,
    Area,
    Lane,
    Road,
    assemble,
    lead_in,
    point,
    straight_path,
)

ARM_LENGTH_M = 80.0


def _pose(num: int, x: float | np.ndarray, y: float | np.ndarray, yaw_rad: float) -> np.ndarray:
    return np.concatenate([point(num, x, y), np.full((num, 1), yaw_rad)], axis=1)


def _rotated_path(poses_NS3: np.ndarray, quarters: int) -> np.ndarray:
    points = rotate_quarter(poses_NS3[..., :2], quarters)
    return np.concatenate([points, poses_NS3[..., 2:] + quarters * np.pi / 2], axis=-1)


def intersection(
    distance_N: np.ndarray,
    width_N: np.ndarray,
    limit_N: np.ndarray,
    *,
    movement: str = "straight",
    num_lanes: int = 1,
    signals: bool = False,
) -> Road:
    """Build a four-way intersection; the ego comes from the west, arms are numbered west, south, east, north.

    Paths: 0 the route; 1 northbound from the south; 2 westbound from the east; 3 southbound from the north,
    each straight through in the lane next to the middle, station 0 at the centre of the intersection.

    Args:
        distance_N: Ego's rear axle to the centre of the intersection, m.
        width_N: Lane width, m.
        limit_N: Speed limit, m/s.
        movement: straight or left.
        num_lanes: Lanes of every arm in each direction.
        signals: Whether connectors carry signal groups.
    """
    half_N = half_size(width_N, num_lanes)
    lanes: dict[tuple, Lane] = {}
    links: list[tuple[tuple, tuple, int]] = []
    target = {"straight": 2, "left": 3}[movement]
    for arm in range(4):
        own = _arm_lanes(half_N, width_N, num_lanes)
        for (kind, i), points in own.items():
            lanes[kind, arm, i] = Lane(
                rotate_quarter(points, arm),
                on_route=(kind, arm) in (("in", 0), ("out", target), (movement, 0)),
                connector=kind not in ("in", "out"),
                signal=NO_SIGNAL if kind in ("in", "out") or not signals else EGO_SIGNAL + arm % 2,
            )
        links += _arm_links(arm, num_lanes)
    areas = [Area(_square(half_N), INTERSECTION)]
    for arm in range(4):
        areas += _arm_areas(half_N, width_N, num_lanes, arm)
    paths = [_junction_route(lanes, movement, target, distance_N, half_N)]
    middle = straight_path(point(len(width_N), 0.0, -0.5 * width_N))
    paths += [_rotated_path(middle, arm) for arm in (1, 2, 3)]
    room = (0.5 * width_N, (num_lanes - 0.5) * width_N + SHOULDER_M)
    return assemble(lanes, links, areas, paths, width_N, limit_N, room)


def half_size(width_N: np.ndarray, num_lanes: int) -> np.ndarray:
    """Return half the side of the intersection square, m: all lanes of one direction and a corner of 5 m."""
    return num_lanes * width_N + 5.0


def _arm_lanes(half_N: np.ndarray, width_N: np.ndarray, num_lanes: int) -> dict[tuple[str, int], np.ndarray]:
    num = len(half_N)
    far_N = half_N + ARM_LENGTH_M
    lanes = {}
    for i in range(num_lanes):
        y_N = (i + 0.5) * width_N
        lanes["in", i] = line(point(num, -far_N, -y_N), point(num, -half_N, -y_N), 9)
        lanes["out", i] = line(point(num, -half_N, y_N), point(num, -far_N, y_N), 9)
        lanes["straight", i] = line(point(num, -half_N, -y_N), point(num, half_N, -y_N), 4)
    first_N, last_N = 0.5 * width_N, (num_lanes - 0.5) * width_N
    start, end = _pose(num, -half_N, -first_N, 0.0), _pose(num, first_N, half_N, np.pi / 2)
    lanes["left", 0] = bezier(start, end, 10)
    start, end = _pose(num, -half_N, -last_N, 0.0), _pose(num, -last_N, -half_N, -np.pi / 2)
    lanes["right", num_lanes - 1] = bezier(start, end, 8)
    return lanes


def _arm_links(arm: int, num_lanes: int) -> list[tuple[tuple, tuple, int]]:
    links = []
    turns = [("straight", i, (arm + 2) % 4) for i in range(num_lanes)]
    turns += [("left", 0, (arm + 3) % 4), ("right", num_lanes - 1, (arm + 1) % 4)]
    for kind, i, target in turns:
        links.append((("in", arm, i), (kind, arm, i), SUCCESSOR))
        links.append(((kind, arm, i), ("out", target, i), SUCCESSOR))
    for i in range(num_lanes - 1):
        for kind in ("in", "out"):
            links.append(((kind, arm, i + 1), (kind, arm, i), LEFT))
            links.append(((kind, arm, i), (kind, arm, i + 1), RIGHT))
    return links


def _square(half_N: np.ndarray) -> np.ndarray:
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    return half_N[:, None, None] * corners


def _arm_areas(half_N: np.ndarray, width_N: np.ndarray, num_lanes: int, arm: int) -> list[Area]:
    num = len(half_N)
    outer_N = num_lanes * width_N + SHOULDER_M
    axis = line(point(num, -half_N - ARM_LENGTH_M, 0.0), point(num, -half_N + 0.5, 0.0), 2)
    zebra = line(point(num, -half_N - 3.6, 0.0), point(num, -half_N - 0.6, 0.0), 2)
    rings = [
        (strip(axis, 0.0, -outer_N), ROADBLOCK),
        (strip(axis, outer_N, 0.0), ROADBLOCK),
        (strip(zebra, outer_N, -outer_N), CROSSWALK),
    ]
    return [Area(rotate_quarter(ring, arm), layer) for ring, layer in rings]


def _junction_route(
    lanes: dict[tuple, Lane],
    movement: str,
    target: int,
    distance_N: np.ndarray,
    half_N: np.ndarray,
) -> np.ndarray:
    connector = lanes[movement, 0, 0].points_NP2
    end = lanes["out", target, 0].points_NP2[:, -1:]
    back = point(len(half_N), distance_N - half_N - FIRST_STATION_M, 0.0)
    return path_through(np.concatenate([connector[:, :1] - back[:, None], connector, end], axis=1))


ENTRY_ANGLE_RAD = np.deg2rad(40.0)
ENTRY_RUN_M = 16.0
_JOIN_RAD, _LEAVE_RAD = np.pi + ENTRY_ANGLE_RAD, np.pi - ENTRY_ANGLE_RAD
"""Where the lanes of the west arm meet the ring."""


def roundabout(
    distance_N: np.ndarray,
    radius_N: np.ndarray,
    width_N: np.ndarray,
    limit_N: np.ndarray,
    *,
    exit_arm: int = 2,
) -> Road:
    """Build a one-lane roundabout with four arms; the ego comes from the west and gives way to the ring.

    Traffic circulates anticlockwise. Arms: west, south, east, north. Paths: 0 the route; 1 the ring, station
    0 where the ego joins it; 2 from the north onto the ring, station 0 at the same point; 3 on the ring and
    out to the west, station 0 where it leaves the ring.

    Args:
        distance_N: Ego's rear axle to the end of its straight approach lane, m.
        radius_N: Radius of the ring's centre line, m, about 16 ... 20.
        width_N: Lane width, m; the ring is 1.2 m wider.
        limit_N: Speed limit, m/s.
        exit_arm: 2 straight on, 3 left.
    """
    on_route = {
        ("in", 0),
        ("entry", 0),
        ("gap", 0),
        ("ring", 1),
        ("gap", 1),
        ("exit", exit_arm),
        ("out", exit_arm),
    }
    on_route |= {("ring", 2), ("gap", 2)} if exit_arm == 3 else set()
    lanes: dict[tuple, Lane] = {}
    links: list[tuple[tuple, tuple, int]] = []
    for arm in range(4):
        for kind, points in _roundabout_arm(radius_N, width_N).items():
            ring = kind in ("ring", "gap")
            lanes[kind, arm] = Lane(
                rotate_quarter(points, arm),
                on_route=(kind, arm) in on_route,
                connector=kind not in ("in", "out"),
                widening_m=1.2 if ring else 0.6 if kind in ("entry", "exit") else 0.0,
            )
        following = (arm + 1) % 4
        chain = [("in", arm), ("entry", arm), ("gap", arm), ("exit", following), ("out", following)]
        links += [(a, b, SUCCESSOR) for a, b in pairwise(chain)]
        links += [(("gap", arm), ("ring", following), SUCCESSOR), (("ring", arm), ("gap", arm), SUCCESSOR)]
    areas = [area for arm in range(4) for area in _roundabout_areas(lanes, radius_N, width_N, arm)]
    paths = _roundabout_paths(lanes, radius_N, distance_N, exit_arm)
    return assemble(lanes, links, areas, paths, width_N, limit_N, (0.5 * width_N, 0.5 * width_N + SHOULDER_M))


def _roundabout_arm(radius_N: np.ndarray, width_N: np.ndarray) -> dict[str, np.ndarray]:
    num = len(radius_N)
    near_N = radius_N + ENTRY_RUN_M
    y_N = 0.5 * width_N
    join, leave = _JOIN_RAD, _LEAVE_RAD
    joined = _pose(num, radius_N * np.cos(join), radius_N * np.sin(join), join - 1.5 * np.pi)
    left = _pose(num, radius_N * np.cos(leave), radius_N * np.sin(leave), leave + 0.5 * np.pi)
    return {
        "in": line(point(num, -near_N - ARM_LENGTH_M, -y_N), point(num, -near_N, -y_N), 9),
        "out": line(point(num, -near_N, y_N), point(num, -near_N - ARM_LENGTH_M, y_N), 9),
        "entry": bezier(_pose(num, -near_N, -y_N, 0.0), joined, 9),
        "exit": bezier(left, _pose(num, -near_N, y_N, np.pi), 9),
        "ring": _arc(radius_N, leave, join, 13),
        "gap": _arc(radius_N, join, leave + np.pi / 2, 3),
    }


def _arc(radius_N: np.ndarray, first_rad: float, last_rad: float, num_points: int) -> np.ndarray:
    angle_P = np.linspace(first_rad, last_rad, num_points)
    return radius_N[:, None, None] * np.stack([np.cos(angle_P), np.sin(angle_P)], axis=-1)


def _roundabout_areas(
    lanes: dict[tuple, Lane], radius_N: np.ndarray, width_N: np.ndarray, arm: int
) -> list[Area]:
    outer_N = 0.5 * width_N + SHOULDER_M
    ring_N = 0.5 * width_N + 0.9
    areas = [
        Area(
            strip(rotate_quarter(_arc(radius_N, first - 0.03, last + 0.03, 13), arm), ring_N, -ring_N),
            ROADBLOCK,
        )
        for first, last in ((_LEAVE_RAD, _JOIN_RAD), (_JOIN_RAD, _LEAVE_RAD + np.pi / 2))
    ]
    ways = [lanes[kind, arm].points_NP2 for kind in ("in", "out")]
    areas += [Area(strip(way, 0.5 * width_N, -outer_N), ROADBLOCK) for way in ways]
    mouths = [_stretched(lanes[kind, arm].points_NP2) for kind in ("entry", "exit")]
    return areas + [Area(strip(mouth, 0.5 * width_N + 1.0, -outer_N - 0.6), INTERSECTION) for mouth in mouths]


def _stretched(points_NP2: np.ndarray) -> np.ndarray:
    """Lengthen polylines straight by one piece at both ends, so that their areas overlap the neighbours'."""
    first, last = 2 * points_NP2[:, :1] - points_NP2[:, 1:2], 2 * points_NP2[:, -1:] - points_NP2[:, -2:-1]
    return np.concatenate([first, points_NP2, last], axis=1)


def _roundabout_paths(
    lanes: dict[tuple, Lane], radius_N: np.ndarray, distance_N: np.ndarray, exit_arm: int
) -> list[np.ndarray]:
    num = len(radius_N)
    join, leave = _JOIN_RAD, _LEAVE_RAD
    until = leave + exit_arm * np.pi / 2
    entry = lanes["entry", 0].points_NP2
    back = point(num, distance_N - FIRST_STATION_M, 0.0)
    around = _arc(radius_N, join, until, 24 * (exit_arm - 1))
    out = [lanes["exit", exit_arm].points_NP2[:, 1:], lanes["out", exit_arm].points_NP2[:, -1:]]
    route = np.concatenate([entry[:, :1] - back[:, None], entry, around[:, 1:], *out], axis=1)
    angle_NS = join + STATIONS_S / radius_N[:, None]
    ring = np.stack(
        [radius_N[:, None] * np.cos(angle_NS), radius_N[:, None] * np.sin(angle_NS), angle_NS + np.pi / 2],
        axis=-1,
    )
    north_entry = lanes["entry", 3].points_NP2
    north_arc = _arc(radius_N, join - np.pi / 2, join + 1.5 * np.pi, 60)
    north = np.concatenate([north_entry, north_arc[:, 1:]], axis=1)
    north_length_N = _length(north_entry) + radius_N * np.pi / 2
    west = np.concatenate(
        [
            _arc(radius_N, leave - 0.9 * np.pi, leave, 50),
            lanes["exit", 0].points_NP2[:, 1:],
            lanes["out", 0].points_NP2[:, -1:],
        ],
        axis=1,
    )
    return [
        path_through(route),
        ring,
        path_through(lead_in(north, north_length_N)),
        path_through(lead_in(west, radius_N * 0.9 * np.pi)),
    ]


def _length(points_NP2: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(points_NP2, axis=1), axis=-1).sum(axis=1)
