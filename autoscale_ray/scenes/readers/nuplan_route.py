"""The route of a NAVSIM scene on its map: corrected roadblocks, starting lane, and centre line by Dijkstra.

These are NAVSIM's own steps (PDM planner: route correction, starting lane, lane graph search), because progress, lane
keeping and direction are scored against their result.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import shapely

from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.readers.nuplan_map import NuplanMap

CANDIDATE_RADIUS_M = 1.0
MAX_HEADING_RAD = math.pi / 4.0
MAX_DISPLACEMENT_M = 3.0
SEARCH_DEPTH_BACKWARD, SEARCH_DEPTH_FORWARD = 15, 30
FIRST_ROADBLOCKS = 3
MIN_LOOP_AREA_M2 = 1.0


@dataclass(frozen=True, slots=True)
class NavsimRoute:
    """A route in map coordinates."""

    start_lane: int
    lanes: tuple[int, ...]
    """Lanes of the centre line."""
    route_lanes: tuple[int, ...]
    """Lanes and connectors of all roadblocks of the route."""
    centerline_C3: np.ndarray
    """x, y, heading; where lanes meet, vertices may coincide."""


class RouteFinder:
    """Find routes on one map; what does not depend on the ego is worked out once."""

    def __init__(self, road: NuplanMap) -> None:
        self._road = road
        self._corrected: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._plans: dict[tuple[tuple[int, ...], int], NavsimRoute] = {}
        self._route_lanes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def route(
        self, blocks: tuple[int, ...], pose: np.ndarray, footprint: shapely.Polygon
    ) -> NavsimRoute | None:
        """Return the route from a pose along roadblocks.

        Args:
            blocks: Roadblocks and connectors of the map, in driving order, at least one.
            pose: (3,) rear axle x, y, yaw.
            footprint: The ego's box.

        Returns:
            The route, or None where its roadblocks have no lanes.
        """
        corrected = self._correct(tuple(dict.fromkeys(blocks)), pose)
        if corrected not in self._route_lanes:
            lanes = [int(lane) for block in corrected for lane in self._road.lanes_of(block)]
            self._route_lanes[corrected] = tuple(dict.fromkeys(lanes))
        route_lanes = self._route_lanes[corrected]
        if not route_lanes:
            return None
        start = self._starting_lane(route_lanes, pose, footprint)
        key = (corrected, start)
        if key not in self._plans:
            at = corrected.index(int(self._road.lane_block_L[start]))
            window = corrected[at : at + SEARCH_DEPTH_FORWARD]
            lanes = self._shortest(start, set(route_lanes), window[-1])
            line = np.concatenate([self._road.base_line(lane) for lane in lanes])
            self._plans[key] = NavsimRoute(start, tuple(lanes), route_lanes, line)
        return self._plans[key]

    def _correct(self, blocks: tuple[int, ...], pose: np.ndarray) -> tuple[int, ...]:
        start, candidates = self._current_block(pose, frozenset(blocks))
        if start not in blocks:
            blocks = self._joined_to(start, candidates, blocks)
        if blocks not in self._corrected:
            self._corrected[blocks] = tuple(dict.fromkeys(self._without_loops(self._linked(blocks))))
        return self._corrected[blocks]

    def _current_block(self, pose: np.ndarray, route: frozenset[int]) -> tuple[int, list[int]]:
        """Return the roadblock the ego is most likely on, and all candidates, on-route ones first."""
        road = self._road
        x, y = pose[:2]
        box = shapely.box(*(pose[:2] - CANDIDATE_RADIUS_M), *(pose[:2] + CANDIDATE_RADIUS_M))
        found = road.tree_shape[road.tree.query(box, predicate="intersects")]
        blocks = sorted(found[found < road.num_blocks].tolist()) or self._nearest_blocks(shapely.Point(x, y))
        on_route: list[tuple[float, int]] = []
        aside: list[tuple[float, int]] = []
        nearest: list[tuple[float, int]] = []
        for block in blocks:
            offsets = [self._offset(int(lane), pose) for lane in road.lanes_of(block)]
            nearest.append((min((distance for distance, _ in offsets), default=math.inf), block))
            fitting = on_route if block in route else aside
            fitting += [
                (distance, block)
                for distance, angle in offsets
                if angle < MAX_HEADING_RAD and distance < MAX_DISPLACEMENT_M
            ]
        chosen = on_route or aside or nearest
        return min(chosen, key=lambda item: item[0])[1], [block for _, block in chosen]

    def _nearest_blocks(self, point: shapely.Point) -> list[int]:
        """Return the nearest roadblock and the nearest connector."""
        road, blocks = self._road, []
        for low, high in ((0, road.num_roadblocks), (road.num_roadblocks, road.num_blocks)):
            distances = shapely.distance(road.shapes_S[low:high], point)
            if np.isfinite(distances).any():
                blocks.append(low + int(np.nanargmin(distances)))
        return blocks

    def _offset(self, lane: int, pose: np.ndarray) -> tuple[float, float]:
        """Return distance and heading difference to the nearest vertex of a lane's base line."""
        line = self._road.base_line(lane)
        if len(line) == 0:
            return math.inf, math.inf
        distances = np.hypot(line[:, 0] - pose[0], line[:, 1] - pose[1])
        nearest = int(np.argmin(distances))
        return float(distances[nearest]), abs(float(wrap_angle(line[nearest, 2] - pose[2])))

    def _joined_to(self, start: int, candidates: list[int], blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Lead from a start beside the route onto it: back from its first roadblock, else on to one of the first."""
        path = self._search(blocks[0], set(candidates), SEARCH_DEPTH_BACKWARD, forward=False)
        if path is not None:
            return (*path[:-1], *blocks)
        path = self._search(start, set(blocks[:FIRST_ROADBLOCKS]), SEARCH_DEPTH_FORWARD, forward=True)
        return blocks if path is None else (*path, *blocks[blocks.index(path[-1]) + 1 :])

    def _linked(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Fill gaps between roadblocks that do not follow one another."""
        filled: list[int] = []
        for here, there in itertools.pairwise(blocks):
            filled.append(here)
            if here not in self._road.previous_blocks[there]:
                path = self._search(here, {there}, SEARCH_DEPTH_FORWARD, forward=True)
                filled += path[1:-1] if path is not None else ()
        return (*filled, blocks[-1])

    def _search(
        self, start: int, goals: set[int], max_depth: int, *, forward: bool
    ) -> tuple[int, ...] | None:
        """Search breadth first; the path is in driving order, and of equal ones the last that was found."""
        neighbours = self._road.next_blocks if forward else self._road.previous_blocks
        parent: dict[int, int] = {start: -1}
        layer = [start]
        for _ in range(max_depth):
            goal = next((block for block in layer if block in goals), None)
            if goal is not None:
                path = [goal]
                while parent[path[-1]] >= 0:
                    path.append(parent[path[-1]])
                return tuple(reversed(path)) if forward else tuple(path)
            reached: dict[int, int] = {}
            for block in layer:
                reached |= {after: block for after in neighbours[block] if after not in parent}
            parent |= reached
            layer = list(reached)
        return None

    def _without_loops(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Cut the route where a connector overlaps an earlier one of it."""
        road = self._road
        seen: list[object] = []
        for position, block in enumerate(blocks):
            shape = road.shapes_S[block]
            if block < road.num_roadblocks or shape is None:
                continue
            if any(shapely.intersection(other, shape).area > MIN_LOOP_AREA_M2 for other in seen):  # pyright: ignore[reportCallIssue, reportArgumentType]
                return blocks[:position]
            seen.append(shape)
        return blocks

    def _starting_lane(self, lanes: tuple[int, ...], pose: np.ndarray, footprint: shapely.Polygon) -> int:
        """Return the lane of the route under the rear axle with the least heading error, else the closest one."""
        shapes = self._road.shapes_S[self._road.num_blocks + np.array(lanes)]
        under = np.flatnonzero(shapely.intersects(shapes, shapely.Point(*pose[:2])))
        if len(under):
            return min((lanes[k] for k in under), key=lambda lane: self._offset(lane, pose)[1])
        holds = np.flatnonzero(shapely.contains(shapes, shapely.centroid(footprint)))
        if len(holds):
            return lanes[int(holds[0])]
        distances = shapely.distance(shapes, footprint)
        return lanes[int(np.nanargmin(distances))] if np.isfinite(distances).any() else lanes[0]

    def _shortest(self, start: int, allowed: set[int], goal_block: int) -> list[int]:
        """Search the cheapest chain of lanes to a roadblock (Dijkstra on lengths); else the deepest one."""
        road = self._road
        parent, queue = {start: -1}, {start: (1.0, 1)}
        done: dict[int, tuple[float, int]] = {}
        end = start
        while queue:
            lane = min(queue, key=lambda key: queue[key][0])
            cost, depth = queue.pop(lane)
            done[lane] = (cost, depth)
            if road.lane_block_L[lane] == goal_block:
                return _path(parent, lane)
            for after in road.next_lanes[lane]:
                reached = cost + float(road.length_L[after])
                if after in allowed and after not in done and reached < queue.get(after, (math.inf, 0))[0]:
                    queue[after], parent[after] = (reached, depth + 1), lane
        deepest = max(depth for _, depth in done.values())
        end = min((lane for lane in done if done[lane][1] == deepest), key=lambda lane: done[lane][0])
        return _path(parent, end)


def _path(parent: dict[int, int], end: int) -> list[int]:
    path = [end]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path[::-1]
