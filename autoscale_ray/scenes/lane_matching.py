"""Which lanes a vehicle drove: its poses matched to lanes by the cheapest chain.

Shape legend: L lanes, V border vertices, G segments (from a vertex to the next one of its lane), S samples of one or
more tracks, P sample-lane pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import shapely

from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.ragged import ragged
from autoscale_ray.scenes.road_map import SUCCESSOR, RoadMap

MATCH_DISTANCE_M = 0.75
_SEARCH_M = MATCH_DISTANCE_M + 1e-3  # Rounding must not lose a segment.
MATCH_ANGLE_RAD = math.radians(75.0)
NO_LANE_COST = 12.0
NEIGHBOUR_COST = 3.0
SKIPPED_LANE_COST = 0.5
JUMP_COST = 8.0
_POSES_AT_ONCE = 50_000
_POSES_TO_LOCATE = 2_000
"""So many are compared with all segments of their lanes at once."""


class LaneMatcher:
    """Match driven paths to lanes by the cheapest chain of lanes (Viterbi).

    A pose may lie on a lane within `MATCH_DISTANCE_M` whose direction is within `MATCH_ANGLE_RAD` of its
    heading. It costs (distance to the centre line / 1.5 m)^2 + (heading difference / 0.35 rad)^2; a change of
    lane costs nothing along a successor and most between unconnected lanes.
    """

    def __init__(self, road: RoadMap) -> None:
        self._road = road
        self._lane_G = np.repeat(np.arange(road.num_lanes), np.diff(road.offsets) - 1)
        self._begin_G = np.delete(np.arange(road.offsets[-1]), road.offsets[1:] - 1)
        begin, end = self._begin_G, self._begin_G + 1
        corners = np.stack([border[at] for border in (road.left_V2, road.right_V2) for at in (begin, end)])
        # Widened boxes are searched by points: half as dear as boxes around the points. The exact distance follows.
        low, high = corners.min(axis=0) - _SEARCH_M, corners.max(axis=0) + _SEARCH_M
        self._tree = shapely.STRtree(shapely.box(*low.T, *high.T))
        self._center = _segments(road.center_V2[begin], road.center_V2[end])
        self._heading_G = np.arctan2(self._center[3], self._center[2])
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
        rows_S, bounds_T = _by_step(lengths)
        position_S = self._cheapest(lane_SC[rows_S], cost_SC[rows_S], bounds_T, len(tracks))
        chains = np.empty(len(rows_S), dtype=np.int64)
        chains[rows_S] = lane_SC[rows_S, position_S]
        return np.split(chains, starts[1:])

    def _cheapest(
        self, lane_SC: np.ndarray, cost_SC: np.ndarray, bounds_T: list[tuple[int, int]], num_tracks: int
    ) -> np.ndarray:
        """Return the option of each row on its track's cheapest chain (S,); rows by step, as `_by_step` orders them."""
        origin_SC = np.zeros(lane_SC.shape, dtype=np.int64)
        total_KC = np.zeros((num_tracks, lane_SC.shape[1]))
        before = 0
        for low, high in bounds_T:
            count = high - low
            if low:
                lanes_before = lane_SC[before : before + count, :, None]
                costs_KBC = self._costs_LL[lanes_before, lane_SC[low:high, None, :]]
                reach_KBC = total_KC[:count, :, None] + costs_KBC
                reach_KBC.argmin(axis=1, out=origin_SC[low:high])
                total_KC[:count] = reach_KBC.min(axis=1)
            total_KC[:count] += cost_SC[low:high]
            before = low
        position_K = total_KC.argmin(axis=1)
        position_S = np.zeros(len(lane_SC), dtype=np.int64)
        for low, high in reversed(bounds_T):
            position_S[low:high] = position_K[: high - low]
            position_K[: high - low] = origin_SC[np.arange(low, high), position_S[low:high]]
        return position_S

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
        """Return the sample, lane and cost of every pose on a lane (P), by sample, then lane."""
        parts = []
        for low in range(0, max(len(poses_S3), 1), _POSES_TO_LOCATE):
            sample_P, lane_P, cost_P = self._costs(poses_S3[low : low + _POSES_TO_LOCATE])
            parts.append((low + sample_P, lane_P, cost_P))
        sample_P, lane_P, cost_P = (np.concatenate(part) for part in zip(*parts, strict=True))
        return sample_P, lane_P, cost_P

    def _costs(self, poses_S3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sample_P, lane_P = self._near(poses_S3[:, :2])
        distance_P, heading_P = self._nearest(poses_S3[sample_P, :2], lane_P)
        angle_P = wrap_angle(heading_P - poses_S3[sample_P, 2])
        keep_P = np.abs(angle_P) <= MATCH_ANGLE_RAD
        cost_P = (distance_P / 1.5) ** 2 + (angle_P / 0.35) ** 2
        return sample_P[keep_P], lane_P[keep_P], cost_P[keep_P]

    def _near(self, points_S2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return sample and lane of every point within `MATCH_DISTANCE_M` of a lane's area.

        The area is cut into the quadrangles between two vertices and the next ones; a point lies in the lane's ring
        where it lies in an odd number of them.
        """
        sample, segment = self._tree.query(shapely.points(points_S2))
        order = np.argsort(sample * self._road.num_lanes + self._lane_G[segment], kind="stable")
        sample, segment = sample[order], segment[order]
        lane = self._lane_G[segment]
        if not len(sample):
            return sample, lane
        x, y = points_S2[sample].T.copy()
        begin = self._begin_G[segment]
        corners = [
            line[at] for line in (self._road.left_V2, self._road.right_V2) for at in (begin, begin + 1)
        ]
        edges, rungs = (corners[:2], corners[2:]), (corners[::2], corners[1::2])
        inside = np.logical_xor.reduce([_crosses(x, y, *edge) for edge in (*edges, *rungs)])
        first_P = np.flatnonzero((np.diff(sample, prepend=-1) != 0) | (np.diff(lane, prepend=-1) != 0))
        near_P = np.logical_xor.reduceat(inside, first_P)
        # Distances are measured only of points outside.
        is_outside = np.repeat(~near_P, np.diff(first_P, append=len(sample)))
        ends = (begin == self._road.offsets[lane], begin + 2 == self._road.offsets[lane + 1])
        close = np.zeros(len(sample), dtype=bool)
        for part, (line, to) in zip((is_outside, is_outside, *ends), (*edges, *rungs), strict=True):
            of = np.flatnonzero(part & is_outside)
            close[of] |= _distance(x[of], y[of], *_segments(line[of], to[of]))[0] <= MATCH_DISTANCE_M
        near_P |= np.logical_or.reduceat(close, first_P)
        return sample[first_P[near_P]], lane[first_P[near_P]]

    def _nearest(self, points_P2: np.ndarray, lane_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the distance of each point to its lane's centre line, and the heading there."""
        first_L = self._road.offsets[:-1] - np.arange(self._road.num_lanes)
        count_P = np.diff(self._road.offsets)[lane_P] - 1
        if not len(lane_P):
            return np.zeros(0), np.zeros(0)
        segment = ragged(first_L[lane_P], count_P)
        x, y = (np.repeat(axis_P, count_P) for axis_P in points_P2.T)
        distance, share = _distance(x, y, *np.take(self._center, segment, axis=1))
        start_P = np.cumsum(count_P) - count_P
        distance_P = np.minimum.reduceat(distance, start_P)
        nearest = np.flatnonzero(distance == np.repeat(distance_P, count_P))
        nearest = nearest[np.searchsorted(nearest, start_P)]
        # The start of a segment counts as the end of the one before it.
        before = (share[nearest] <= 0.0) & (nearest > start_P)
        return distance_P, self._heading_G[segment[nearest] - before]


def _by_step(lengths_K: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the rows of tracks laid end to end by their place in their track, longer tracks first (S,), and where each
    place begins and ends among them."""
    order = np.argsort(-lengths_K, kind="stable")
    starts_K = (np.cumsum(lengths_K) - lengths_K)[order]
    places_T = np.arange(int(lengths_K.max(initial=0)))
    active_T = np.searchsorted(-lengths_K[order], -places_T)
    rows_S = starts_K[ragged(np.zeros_like(active_T), active_T)] + np.repeat(places_T, active_T)
    ends_T = np.cumsum(active_T)
    return rows_S, list(zip((ends_T - active_T).tolist(), ends_T.tolist(), strict=True))


def _segments(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return x and y of the begins of segments and the steps to their ends (4, n)."""
    return np.concatenate([begin.T, (end - begin).T])


def _crosses(x: np.ndarray, y: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Tell whether rays from points along +x cross their segments (n, 2)."""
    spans = (begin[:, 1] > y) != (end[:, 1] > y)
    rise = np.where(spans, end[:, 1] - begin[:, 1], 1.0)
    return spans & (x < begin[:, 0] + (y - begin[:, 1]) / rise * (end[:, 0] - begin[:, 0]))


def _distance(
    x: np.ndarray, y: np.ndarray, begin_x: np.ndarray, begin_y: np.ndarray, dx: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each point to its segment, and the share of the segment before the foot, not clipped."""
    x, y = x - begin_x, y - begin_y
    squared = dx * dx + dy * dy
    safe = np.where(squared > 0.0, squared, 1.0)
    share = (x * dx + y * dy) / safe
    is_behind = share >= 1.0
    # Of a line's segments few lie beside a point.
    beside = np.flatnonzero((share > 0.0) & ~is_behind)
    across = np.abs(x[beside] * dy[beside] - y[beside] * dx[beside])
    across = across / squared[beside] * np.sqrt(squared[beside])
    x -= is_behind * dx
    y -= is_behind * dy
    distance = np.sqrt(x * x + y * y)
    distance[beside] = across
    return distance, share


def _transition_costs(road: RoadMap) -> np.ndarray:
    count = road.num_lanes
    follows = np.zeros((count, count), dtype=bool)
    beside = np.zeros((count, count), dtype=bool)
    is_successor_E = road.links_E3[:, 2] == SUCCESSOR
    for ends, links_E3 in (
        (follows, road.links_E3[is_successor_E]),
        (beside, road.links_E3[~is_successor_E]),
    ):
        ends[links_E3[:, 0], links_E3[:, 1]] = True
    skips = (follows.astype(np.float32) @ follows.astype(np.float32)) > 0
    costs = np.where(skips, SKIPPED_LANE_COST, JUMP_COST).astype(np.float32)
    costs[beside] = NEIGHBOUR_COST
    costs[follows] = 0.0
    np.fill_diagonal(costs, 0.0)
    return np.pad(costs, ((0, 1), (0, 1)))
