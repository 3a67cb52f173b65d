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

from autoscale_ray.scenes.crops import ragged
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.road_map import SUCCESSOR, RoadMap, lane_polygons

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
_POSES_AT_ONCE = 50_000


class LaneMatcher:
    """Match driven paths to lanes by the cheapest chain of lanes (Viterbi).

    A pose may lie on a lane within `MATCH_DISTANCE_M` whose direction is within `MATCH_ANGLE_RAD` of its
    heading. It costs (distance to the centre line / 1.5 m)^2 + (heading difference / 0.35 rad)^2; a change of
    lane costs nothing along a successor and most between unconnected lanes.
    """

    def __init__(self, road: RoadMap) -> None:
        count, lane_V = road.num_lanes, np.repeat(np.arange(road.num_lanes), np.diff(road.offsets))
        self._tree = shapely.STRtree(lane_polygons([road.ring_of(lane) for lane in range(count)]))
        self._lines = shapely.linestrings(road.center_V2, indices=lane_V)
        self._headings = [_headings(road.center_of(k)) for k in range(count)]
        self._costs_LL = _transition_costs(road)

    def match(self, tracks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the lane of each pose of every track (S, int64), -1 off the lanes.

        Args:
            tracks: (S, 3) x, y, yaw in map coordinates, in time order; tracks do not influence one another.
        """
        lanes: list[np.ndarray] = []
        bounds = np.cumsum([0, *map(len, tracks)])
        low = 0
        while low < len(tracks):
            high = max(low + 1, int(np.searchsorted(bounds, bounds[low] + _POSES_AT_ONCE, side="right")) - 1)
            lanes += self._match(list(tracks[low:high]))
            low = high
        return lanes

    def _match(self, tracks: list[np.ndarray]) -> list[np.ndarray]:
        """Run one Viterbi search over all tracks side by side; tracks that ended wait at the back."""
        lengths = np.array([len(track) for track in tracks])
        starts = np.cumsum(lengths) - lengths
        lane_SC, cost_SC = self._options(np.concatenate(tracks))
        order = np.argsort(-lengths, kind="stable")
        num_options, num_steps = lane_SC.shape[1], int(lengths.max(initial=0))
        origin_SC = np.zeros(lane_SC.shape, dtype=np.int64)
        total_KC = np.zeros((len(tracks), num_options))
        for step in range(num_steps):
            rows = starts[order[: int((lengths > step).sum())]] + step
            if step:
                costs_KBC = self._costs_LL[lane_SC[rows - 1][:, :, None], lane_SC[rows][:, None, :]]
                reach_KBC = total_KC[: len(rows), :, None] + costs_KBC
                origin_SC[rows] = reach_KBC.argmin(axis=1)
                total_KC[: len(rows)] = reach_KBC.min(axis=1)
            total_KC[: len(rows)] += cost_SC[rows]
        position_K = total_KC.argmin(axis=1)
        chains = np.full(len(lane_SC), -1, dtype=np.int64)
        for step in range(num_steps - 1, -1, -1):
            num_active = int((lengths > step).sum())
            rows, here = starts[order[:num_active]] + step, position_K[:num_active]
            chains[rows] = lane_SC[rows, here]
            position_K[:num_active] = origin_SC[rows, here]
        return np.split(chains, starts[1:])

    def _options(self, poses_S3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lanes that each pose may lie on (S, C), last -1 for none, and what they cost; inf fills up."""
        sample_P, lane_P, cost_P = self._candidates(poses_S3)
        counts = np.bincount(sample_P, minlength=len(poses_S3))
        lane_SC = np.full((len(poses_S3), int(counts.max(initial=0)) + 1), -1, dtype=np.int64)
        cost_SC = np.full(lane_SC.shape, np.inf)
        rank_P = np.arange(len(sample_P)) - np.repeat(np.cumsum(counts) - counts, counts)
        lane_SC[sample_P, rank_P], cost_SC[sample_P, rank_P] = lane_P, cost_P
        cost_SC[:, -1] = NO_LANE_COST
        return lane_SC, cost_SC

    def _candidates(self, poses_S3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        points = shapely.points(poses_S3[:, :2])
        sample_P, lane_P = self._tree.query(points, predicate="dwithin", distance=MATCH_DISTANCE_M)
        order = np.lexsort((lane_P, sample_P))
        sample_P, lane_P = sample_P[order], lane_P[order]
        along_P = shapely.line_locate_point(self._lines[lane_P], points[sample_P])  # pyright: ignore[reportIndexIssue]
        heading_P = np.zeros(len(lane_P))
        for lane in np.unique(lane_P):
            here = lane_P == lane
            heading_P[here] = _at(self._headings[lane], along_P[here])
        angle_P = wrap_angle(heading_P - poses_S3[sample_P, 2])
        keep_P = np.abs(angle_P) <= MATCH_ANGLE_RAD
        sample_P, lane_P, angle_P = sample_P[keep_P], lane_P[keep_P], angle_P[keep_P]
        distance_P = shapely.distance(self._lines[lane_P], points[sample_P])  # pyright: ignore[reportIndexIssue]
        return sample_P, lane_P, (distance_P / 1.5) ** 2 + (angle_P / 0.35) ** 2


def _headings(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.diff(line, axis=0)
    return np.cumsum(np.linalg.norm(steps, axis=1)), np.arctan2(steps[:, 1], steps[:, 0])


def _at(headings: tuple[np.ndarray, np.ndarray], along: np.ndarray) -> np.ndarray:
    ends, values = headings
    return values[np.minimum(np.searchsorted(ends, along), len(values) - 1)]


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
        self._chains: dict[tuple[int, ...], tuple[tuple[int, ...], bool] | None] = {}

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
        chain = tuple(lane for lane, _ in itertools.groupby(driven.tolist()) if lane >= 0)
        chain = tuple(lane for lane, _ in itertools.groupby(chain))
        found = self._cached_lanes(chain)
        if found is None:
            return None
        lanes, changes = found
        key = (chain, *(np.round(position, 3).tolist() if changes else ()))
        if key not in self._known:
            blocks = self._road.roadblock_L[list({*lanes, *chain})]
            on_route_L, line = np.isin(self._road.roadblock_L, blocks), self._line(lanes, position)
            # Lanes of no length give no line to follow.
            self._known[key] = Route(lanes, on_route_L, line) if len(line) > 1 else None
        return self._known[key]

    def _cached_lanes(self, chain: tuple[int, ...]) -> tuple[tuple[int, ...], bool] | None:
        """Return the lanes of the centre line, and whether it changes lanes on them."""
        if chain not in self._chains:
            blocks = set(self._road.roadblock_L[list(chain)].tolist())
            # Lanes that the match jumped between (say, two exits of one fork) are joined by a way around the
            # jump.
            detour_m = DETOUR_M + float(self._lengths_L[list(chain)].sum())
            path = self._search(chain, blocks, math.inf) or self._search(chain, None, detour_m)
            lanes = () if path is None else self._extended(path)
            changes = any(after not in self._next.get(lane, ()) for lane, after in itertools.pairwise(lanes))
            self._chains[chain] = (lanes, changes) if lanes else None
        return self._chains[chain]

    def _search(
        self, chain: tuple[int, ...], allowed: set[int] | None, limit_m: float
    ) -> tuple[int, ...] | None:
        """Find the cheapest chain of lanes to the last roadblock (Dijkstra), inside `allowed` roadblocks."""
        block_L = self._road.roadblock_L
        goal = block_L[chain[-1]]
        queue: list[tuple[float, int, tuple[int, ...]]] = [(0.0, chain[0], (chain[0],))]
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
                    heapq.heappush(queue, (reached, lane_to, (*path, lane_to)))
        return None

    def _extended(self, path: tuple[int, ...]) -> tuple[int, ...]:
        missing = EXTENSION_M
        while missing > 0.0 and self._next.get(path[-1]):
            here = self._road.center_of(path[-1])
            leave = _direction(here[-2:])
            ahead = [lane for lane in self._next[path[-1]] if lane not in path]
            if not ahead:
                break
            turns = np.array([_turn(self._road.center_of(lane)) for lane in ahead])
            best = ahead[int(np.abs(wrap_angle(turns - leave)).argmin())]
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


def cut_lines(
    lines: Sequence[np.ndarray],
    line_M: np.ndarray,
    positions_M2: np.ndarray,
    behind_m: float,
    ahead_m: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut centre lines around positions and extend them straight where they end too early.

    Args:
        lines: (C, 2) each, C >= 2, no two vertices alike.
        line_M: Line of each position.
        positions_M2: Points beside the lines.
        behind_m: Length kept behind the foot point, >= 0.
        ahead_m: Length ahead of each foot point (M,), > 0.

    Returns:
        The vertices of all cuts laid end to end, x, y and yaw of the segment that starts there, and the number of
        vertices of each.
    """
    points_V2, along_V = np.concatenate(lines), np.concatenate([_along(line) for line in lines])
    ends_U = np.cumsum([len(line) for line in lines])
    last_M = ends_U[line_M] - 1
    count_M = np.diff(ends_U, prepend=0)[line_M]
    vertex_W = ragged(last_M + 1 - count_M, count_M)
    window_W = np.repeat(np.arange(len(line_M)), count_M)
    foot_M = _feet(points_V2, along_V, vertex_W, window_W, positions_M2, last_M)
    low_M, high_M = np.maximum(0.0, foot_M - behind_m), foot_M + ahead_m
    along_W = along_V[vertex_W]
    inside_W = (along_W > low_M[window_W] + 1e-3) & (along_W < high_M[window_W] - 1e-3)
    inside_M = np.bincount(window_W[inside_W], minlength=len(line_M))
    first_M = np.cumsum(inside_M + 2) - inside_M - 2
    cut = np.zeros((int(inside_M.sum()) + 2 * len(line_M), 3))
    cut[ragged(first_M + 1, inside_M), :2] = points_V2[vertex_W[inside_W]]
    for at_M, row_M in ((low_M, first_M), (high_M, first_M + inside_M + 1)):
        before_M = last_M - count_M + np.bincount(window_W[along_W <= at_M[window_W]], minlength=len(line_M))
        cut[row_M, :2] = _points_at(points_V2, along_V, before_M, at_M, last_M)
    steps = np.diff(cut[:, :2], axis=0)
    cut[:-1, 2] = np.arctan2(steps[:, 1], steps[:, 0])
    end_M = first_M + inside_M + 1
    cut[end_M, 2] = cut[end_M - 1, 2]
    return cut, inside_M + 2


def _feet(
    points_V2: np.ndarray,
    along_V: np.ndarray,
    vertex_W: np.ndarray,
    window_W: np.ndarray,
    positions_M2: np.ndarray,
    last_M: np.ndarray,
) -> np.ndarray:
    """Return the arc length of the point of its line that is nearest to each position (M,)."""
    is_segment = vertex_W != last_M[window_W]
    begin_S, window_S = vertex_W[is_segment], window_W[is_segment]
    steps, offset = points_V2[begin_S + 1] - points_V2[begin_S], positions_M2[window_S] - points_V2[begin_S]
    share_S = (offset * steps).sum(1) / np.maximum((steps * steps).sum(1), 1e-18)
    share_S = np.minimum(np.maximum(share_S, 0.0), 1.0)
    gap = offset - share_S[:, None] * steps
    distance_S = (gap * gap).sum(1)
    first_M = np.searchsorted(window_S, np.arange(len(last_M)))
    nearest_S = np.flatnonzero(distance_S == np.minimum.reduceat(distance_S, first_M)[window_S])
    near_M = nearest_S[np.searchsorted(window_S[nearest_S], np.arange(len(last_M)))]
    begin_M = begin_S[near_M]
    return along_V[begin_M] + share_S[near_M] * (along_V[begin_M + 1] - along_V[begin_M])


def _points_at(
    points_V2: np.ndarray, along_V: np.ndarray, before_M: np.ndarray, at_M: np.ndarray, last_M: np.ndarray
) -> np.ndarray:
    """Return the points at arc lengths, straight on behind the last vertex; `before_M` is the vertex before each."""
    is_last = (before_M == last_M)[:, None]
    begin_M = np.minimum(before_M, last_M - 1)
    length_M = (along_V[begin_M + 1] - along_V[begin_M])[:, None]
    step_M2 = points_V2[begin_M + 1] - points_V2[begin_M]
    inside = step_M2 / length_M * (at_M - along_V[begin_M])[:, None] + points_V2[begin_M]
    beyond = points_V2[last_M] + step_M2 / np.maximum(length_M, 1e-9) * (at_M - along_V[last_M])[:, None]
    return np.where(is_last, beyond, inside)
