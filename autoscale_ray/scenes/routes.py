"""Which lanes a vehicle drove, and the route they give: lanes, roadblocks and a centre line that goes on
beyond.

Shape legend: L lanes, S samples of one track, P sample-lane pairs, C centre line vertices.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.road_map import SUCCESSOR, RoadMap

MATCH_DISTANCE_M = 0.75
MATCH_ANGLE_RAD = math.radians(75.0)
NO_LANE_COST = 12.0
NEIGHBOUR_COST = 3.0
SKIPPED_LANE_COST = 0.5
JUMP_COST = 8.0
LANE_CHANGE_COST_M = 50.0
LANE_CHANGE_START_M = 10.0
LANE_CHANGE_LENGTH_M = 30.0
EXTENSION_M = 150.0
DETOUR_M = 100.0


class LaneMatcher:
    """Match driven paths to lanes by the cheapest chain of lanes (Viterbi).

    A pose may lie on a lane within `MATCH_DISTANCE_M` whose direction is within `MATCH_ANGLE_RAD` of its
    heading. It costs (distance to the centre line / 1.5 m)^2 + (heading difference / 0.35 rad)^2; a change of
    lane costs nothing along a successor and most between unconnected lanes.
    """

    def __init__(self, road: RoadMap, lane_shapes: Sequence[shapely.Polygon] | None = None) -> None:
        count = road.num_lanes
        self._tree = shapely.STRtree([shapely.Polygon(road.ring_of(k)) for k in range(count)] if lane_shapes is None
                                     else list(lane_shapes))  # fmt: skip
        self._lines = np.array([shapely.LineString(road.center_of(k)) for k in range(count)], dtype=object)
        self._headings = [_headings(road.center_of(k)) for k in range(count)]
        self._costs_LL = _transition_costs(road)

    def match(self, poses_S3: np.ndarray) -> np.ndarray:
        """Return the lane of each pose of one track (S, int64), -1 off the lanes.

        Args:
            poses_S3: x, y, yaw in map coordinates, in time order.
        """
        sample_P, lane_P, cost_P = self._candidates(poses_S3)
        bounds = np.searchsorted(sample_P, np.arange(len(poses_S3) + 1))
        states, origins, totals = [], [], np.zeros(1)
        before = np.array([-1])
        for number in range(len(poses_S3)):
            run = slice(bounds[number], bounds[number + 1])
            lanes = np.append(lane_P[run], -1)
            reach = totals[:, None] + self._steps(before, lanes)
            origin = reach.argmin(axis=0)
            totals = reach[origin, np.arange(len(lanes))] + np.append(cost_P[run], NO_LANE_COST)
            states.append(lanes)
            origins.append(origin)
            before = lanes
        return _traced_back(states, origins, totals)

    def _steps(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        costs = self._costs_LL[np.ix_(before, after)]
        return np.where((before[:, None] < 0) | (after[None] < 0), 0.0, costs)

    def _candidates(self, poses_S3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points = shapely.points(poses_S3[:, :2])
        sample_P, lane_P = self._tree.query(points, predicate="dwithin", distance=MATCH_DISTANCE_M)
        along_P = shapely.line_locate_point(self._lines[lane_P], points[sample_P])  # pyright: ignore
        heading_P = np.array([_at(self._headings[lane], s) for lane, s in zip(lane_P, along_P, strict=True)])
        angle_P = wrap_angle(heading_P - poses_S3[sample_P, 2])
        cost_P = (shapely.distance(self._lines[lane_P], points[sample_P]) / 1.5) ** 2 + (angle_P / 0.35) ** 2  # pyright: ignore
        keep_P = np.abs(angle_P) <= MATCH_ANGLE_RAD
        order = np.lexsort((lane_P[keep_P], sample_P[keep_P]))
        return sample_P[keep_P][order], lane_P[keep_P][order], cost_P[keep_P][order]


def _headings(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.diff(line, axis=0)
    return np.cumsum(np.linalg.norm(steps, axis=1)), np.arctan2(steps[:, 1], steps[:, 0])


def _at(headings: tuple[np.ndarray, np.ndarray], along: float) -> float:
    ends, values = headings
    return values[min(int(np.searchsorted(ends, along)), len(values) - 1)]


def _transition_costs(road: RoadMap) -> np.ndarray:
    count = road.num_lanes
    follows = np.zeros((count, count), dtype=bool)
    beside = np.zeros((count, count), dtype=bool)
    for start, end, kind in road.links_E3:
        (follows if kind == SUCCESSOR else beside)[start, end] = True
    skips = (follows.astype(np.float32) @ follows.astype(np.float32)) > 0
    costs = np.where(skips, SKIPPED_LANE_COST, JUMP_COST).astype(np.float32)
    costs[beside] = NEIGHBOUR_COST
    costs[follows] = 0.0
    np.fill_diagonal(costs, 0.0)
    return np.pad(costs, ((0, 1), (0, 1)))


def _traced_back(states: list[np.ndarray], origins: list[np.ndarray], totals: np.ndarray) -> np.ndarray:
    chain = np.full(len(states), -1, dtype=np.int64)
    position = int(totals.argmin()) if len(states) else 0
    for number in range(len(states) - 1, -1, -1):
        chain[number] = states[number][position]
        position = int(origins[number][position])
    return chain


@dataclass(frozen=True, slots=True)
class Route:
    """A route in map coordinates."""

    lanes: tuple[int, ...]
    """Lanes of the centre line, in order."""
    on_route_L: np.ndarray
    """Bool: the lane lies in a roadblock of the route."""
    line_C2: np.ndarray
    """Centre line."""


class RoutePlanner:
    """Turn matched lanes into routes on one road map; equal inputs give the same object."""

    def __init__(self, road: RoadMap) -> None:
        self._road = road
        self._lengths_L = np.array([_length(road.center_of(lane)) for lane in range(road.num_lanes)])
        self._next: dict[int, list[int]] = {}
        self._beside: dict[int, list[int]] = {}
        for start, end, kind in road.links_E3.tolist():
            (self._next if kind == SUCCESSOR else self._beside).setdefault(start, []).append(end)
        self._known: dict[tuple[object, ...], Route | None] = {}

    def route(self, driven: np.ndarray, position: np.ndarray) -> Route | None:
        """Return the route of a vehicle that is at `position` and drives the lanes `driven` from there.

        The lanes of the centre line are the shortest chain of successors from the first lane to the roadblock
        of the last one inside the driven roadblocks; a change to a neighbour lane costs `LANE_CHANGE_COST_M`,
        so it is taken only where successors do not lead on. Behind the last driven lane the straightest
        successors follow for `EXTENSION_M`.

        Args:
            driven: Lanes by time, int64, -1 off the lanes; the first entry is the lane at `position`.
            position: (2,) map coordinates.

        Returns:
            The route, or None where the vehicle is on no lane or the lanes are not connected.
        """
        if len(driven) == 0 or driven[0] < 0:
            return None
        on_lane = driven[driven >= 0]
        chain = tuple(on_lane[np.flatnonzero(np.diff(on_lane, prepend=-1))].tolist())
        lanes = self._cached_lanes(chain)
        if lanes is None:
            return None
        changes = any(b not in self._next.get(a, ()) for a, b in itertools.pairwise(lanes))
        key = (lanes, chain, (*np.round(position, 3),) if changes else ())
        if key not in self._known:
            blocks = self._road.roadblock_L[list({*lanes, *chain})]
            on_route_L = np.isin(self._road.roadblock_L, blocks)
            self._known[key] = Route(lanes, on_route_L, self._line(lanes, position))
        return self._known[key]

    def _cached_lanes(self, chain: tuple[int, ...]) -> tuple[int, ...] | None:
        key = ("lanes", chain)
        if key not in self._known:
            blocks = set(self._road.roadblock_L[list(chain)].tolist())
            # Lanes that the match jumped between (say, two exits of one fork) are joined by a way around the
            # jump.
            detour_m = DETOUR_M + float(self._lengths_L[list(chain)].sum())
            path = self._search(chain, blocks, math.inf) or self._search(chain, None, detour_m)
            self._known[key] = None if path is None else self._extended(path)  # pyright: ignore
        return self._known[key]  # pyright: ignore

    def _search(
        self, chain: tuple[int, ...], allowed: set[int] | None, limit_m: float
    ) -> tuple[int, ...] | None:
        """Find the cheapest chain of lanes to the last roadblock (Dijkstra), inside `allowed` roadblocks."""
        block_L = self._road.roadblock_L
        goal = block_L[chain[-1]]
        queue = [(0.0, chain[0], (chain[0],))]
        done: set[int] = set()
        while queue:
            cost, lane, path = heapq.heappop(queue)
            if block_L[lane] == goal:
                return path
            if lane in done:
                continue
            done.add(lane)
            ahead = [(cost + self._lengths_L[lane], lane_to) for lane_to in self._next.get(lane, ())]
            aside = [(cost + LANE_CHANGE_COST_M, lane_to) for lane_to in self._beside.get(lane, ())]
            for reached, lane_to in ahead + aside:
                is_allowed = allowed is None or block_L[lane_to] in allowed
                if lane_to not in done and is_allowed and reached <= limit_m:
                    heapq.heappush(queue, (reached, lane_to, (*path, lane_to)))  # pyright: ignore
        return None

    def _extended(self, path: tuple[int, ...]) -> tuple[int, ...]:
        missing = EXTENSION_M
        while missing > 0.0 and self._next.get(path[-1]):
            here = self._road.center_of(path[-1])
            leave = _direction(here[-2:])
            ahead = [lane for lane in self._next[path[-1]] if lane not in path]
            if not ahead:
                break
            best = min(ahead, key=lambda lane: abs(wrap_angle(_turn(self._road.center_of(lane)) - leave)))  # pyright: ignore
            path = (*path, best)
            missing -= self._lengths_L[best]
        return path

    def _line(self, lanes: tuple[int, ...], position: np.ndarray) -> np.ndarray:
        """Join the centre lines of the lanes; a lane change leaves one line ahead of `position` for the
        next."""
        line = self._road.center_of(lanes[0])
        for before, lane in itertools.pairwise(lanes):
            following = self._road.center_of(lane)
            if lane in self._next.get(before, ()):
                line = np.concatenate([line, following])
            else:
                line = _changed_over(line, following, position)
        steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
        return line[np.concatenate([[True], steps > 1e-3])]


def _changed_over(line: np.ndarray, following: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Leave `line` a little ahead of `position` and join `following` further on."""
    first, second = shapely.LineString(line), shapely.LineString(following)
    leave = first.project(shapely.Point(position)) + LANE_CHANGE_START_M
    join = second.project(first.interpolate(leave)) + LANE_CHANGE_LENGTH_M
    join = min(join, second.length)
    kept = line[_along(line) < leave]
    joined = following[_along(following) > join]
    parts = [kept, np.array(second.interpolate(join).coords), joined]
    return np.concatenate([part for part in parts if len(part)])


def _along(line: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])


def _length(line: np.ndarray) -> float:
    return float(_along(line)[-1])


def _direction(ends: np.ndarray) -> float:
    dx, dy = ends[-1] - ends[0]
    return math.atan2(dy, dx)


def _turn(line: np.ndarray) -> float:
    """Return the direction from the start of a lane to its end, which tells turns from going straight."""
    return _direction(line[[0, -1]])


def cut_line(line_C2: np.ndarray, position: np.ndarray, behind_m: float, ahead_m: float) -> np.ndarray:
    """Cut a centre line around a position and extend it straight where it ends too early.

    Args:
        line_C2: (C, 2), C >= 2.
        position: (2,) point beside the line.
        behind_m: Length kept behind the foot point, >= 0.
        ahead_m: Length ahead of the foot point, > 0.

    Returns:
        (C, 3) x, y and yaw of the segment that starts there.
    """
    along = _along(line_C2)
    foot = float(shapely.line_locate_point(shapely.LineString(line_C2), shapely.Point(position)))
    low, high = max(0.0, foot - behind_m), foot + ahead_m
    if high > along[-1]:
        unit = (line_C2[-1] - line_C2[-2]) / max(along[-1] - along[-2], 1e-9)
        line_C2 = np.concatenate([line_C2, line_C2[-1:] + unit * (high - along[-1])])
        along = np.append(along, high)
    inside = (along > low + 1e-3) & (along < high - 1e-3)
    at = np.concatenate([[low], along[inside], [high]])
    points = np.stack([np.interp(at, along, line_C2[:, axis]) for axis in range(2)], axis=1)
    steps = np.diff(points, axis=0)
    yaw = np.arctan2(steps[:, 1], steps[:, 0])
    return np.column_stack([points, np.append(yaw, yaw[-1])])
