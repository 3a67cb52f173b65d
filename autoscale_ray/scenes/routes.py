"""The route that the lanes a vehicle drove give: lanes, roadblocks and a centre line that goes on beyond.

Shape legend: L lanes, C centre line vertices.
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
from autoscale_ray.scenes.ragged import ragged
from autoscale_ray.scenes.road_map import SUCCESSOR, RoadMap, arc_length, direction, is_apart, lengths

LANE_CHANGE_COST_M = 50.0
LANE_CHANGE_START_M = 10.0
LANE_CHANGE_LENGTH_M = 30.0
EXTENSION_M = 150.0
DETOUR_M = 100.0


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
        steps_V = lengths(np.diff(road.center_V2, axis=0, append=0.0))
        runs = zip(road.offsets[:-1].tolist(), (road.offsets[1:] - 1).tolist(), strict=True)
        self._lengths_L = [float(steps_V[low:high].cumsum()[-1]) for low, high in runs]
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
            on_route_L = self._in_blocks([*lanes, *chain])
            line = self._line(lanes, position)
            # Lanes of no length give no line to follow.
            self._known[key] = Route(lanes, on_route_L, line) if len(line) > 1 else None
        return self._known[key]

    def _in_blocks(self, lanes: list[int]) -> np.ndarray:
        """Tell which lanes (bool, L) lie in the roadblock of one of `lanes`."""
        block_L = self._road.roadblock_L
        is_driven = np.zeros(len(block_L), dtype=bool)
        is_driven[block_L[lanes]] = True
        return is_driven[block_L]

    def _cached_lanes(self, chain: tuple[int, ...]) -> tuple[tuple[int, ...], bool] | None:
        """Return the lanes of the centre line, and whether it changes lanes on them."""
        if chain not in self._chains:
            blocks = set(self._road.roadblock_L[list(chain)].tolist())
            # Lanes that the match jumped between (say, two exits of one fork) are joined by a way around the
            # jump.
            detour_m = DETOUR_M + sum(self._lengths_L[lane] for lane in chain)
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
            ahead = [lane for lane in self._next[path[-1]] if lane not in path]
            if not ahead:
                break
            best = ahead[0]
            if len(ahead) > 1:
                leave = direction(self._road.center_of(path[-1])[-2:])
                # From the start of a lane to its end: that tells turns from going straight.
                turns = np.array([direction(self._road.center_of(lane)) for lane in ahead])
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
        return line[is_apart(line)]


def _changed_over(line: np.ndarray, following: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Leave `line` a little ahead of `position` and join `following` further on."""
    first, second = shapely.LineString(line), shapely.LineString(following)
    leave = first.project(shapely.Point(position)) + LANE_CHANGE_START_M
    join = second.project(first.interpolate(leave)) + LANE_CHANGE_LENGTH_M
    join = min(join, second.length)
    kept = line[arc_length(line) < leave]
    joined = following[arc_length(following) > join]
    parts = [kept, np.array(second.interpolate(join).coords), joined]
    return np.concatenate([part for part in parts if len(part)])


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
    points_V2, along_V = np.concatenate(lines), np.concatenate([arc_length(line) for line in lines])
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
    # Single columns: NumPy adds along an axis of two many times as slowly.
    dx, dy = (axis_V[begin_S + 1] - axis_V[begin_S] for axis_V in points_V2.T)
    x, y = (
        at_M[window_S] - axis_V[begin_S] for at_M, axis_V in zip(positions_M2.T, points_V2.T, strict=True)
    )
    share_S = (x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-18)
    share_S = np.minimum(np.maximum(share_S, 0.0), 1.0)
    x, y = x - share_S * dx, y - share_S * dy
    distance_S = x * x + y * y
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
