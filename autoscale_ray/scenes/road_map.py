"""The road of one recording in map coordinates: lanes with borders, their links, and areas beside them.

Shape legend: L lanes, V border vertices (left, centre and right are paired), E links, Q areas, W area
vertices.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import shapely
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from autoscale_ray.errors import InputRejectedError

MAX_SPACING_M = 10.0
BORDER_SPACING_M = 3.0
ROUNDING = 1e-6
"""Steps by which a lane may be longer than a whole number of them: where a map lies must not add a vertex."""
MAX_LANE_LENGTH_M = 200_000.0
MIN_CROSSING_AREA_M2 = 1.0
MIN_CROSSING_ANGLE_RAD = math.radians(30.0)
SUCCESSOR, LEFT, RIGHT = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One lane as a reader found it, in map coordinates (m), vertices in driving direction."""

    key: Hashable
    left: np.ndarray
    """(n, 2) left border."""
    right: np.ndarray
    """(n, 2) right border, paired with the left one; see `pair_borders`."""
    center: np.ndarray | None = None
    """(n, 2) centre line paired with the borders; their mean by default."""
    successors: tuple[Hashable, ...] = ()
    left_neighbour: Hashable | None = None
    """Neighbour with the same driving direction."""
    right_neighbour: Hashable | None = None
    speed_limit_mps: float = math.nan
    is_connector: bool | None = None
    """Inside an intersection; None lets geometry decide, see `crossing_lanes`."""
    has_border: bool = True
    """False where the source gives lane polygons of its own as areas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """One polygon as a reader found it."""

    layer: str
    """One of POLYGON_LAYERS."""
    ring: np.ndarray
    """(n, 2), not closed."""
    lane: Hashable | None = None
    """Lane that this polygon belongs to."""


@dataclass(frozen=True, kw_only=True)
class RoadMap:
    """Lanes and areas as flat float64 arrays."""

    keys: tuple[Hashable, ...]
    offsets: np.ndarray
    left_V2: np.ndarray
    center_V2: np.ndarray
    right_V2: np.ndarray
    speed_limit_L: np.ndarray
    """NaN when unknown, none, or no speed."""
    is_connector_L: np.ndarray
    has_border_L: np.ndarray
    links_E3: np.ndarray
    """From lane, to lane, SUCCESSOR, LEFT or RIGHT."""
    roadblock_L: np.ndarray
    """Group of lanes side by side in one direction."""
    area_offsets: np.ndarray
    area_points_W2: np.ndarray
    area_layer: tuple[str, ...] = ()
    area_lane_Q: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Lane of each area, -1 without."""

    @property
    def num_lanes(self) -> int:
        """Return L."""
        return len(self.offsets) - 1

    @property
    def width_L(self) -> np.ndarray:
        """Return the mean distance of the borders."""
        gaps_V = np.linalg.norm(self.left_V2 - self.right_V2, axis=1)
        if not self.num_lanes:
            return gaps_V
        return np.add.reduceat(gaps_V, self.offsets[:-1]) / np.diff(self.offsets)

    @property
    def lane_number(self) -> dict[Hashable, int]:
        """Return the position in L of each key."""
        return {key: lane for lane, key in enumerate(self.keys)}

    def center_of(self, lane: int) -> np.ndarray:
        """Return the centre line (n, 2) of one lane."""
        return self.center_V2[self.offsets[lane] : self.offsets[lane + 1]]


def empty_road_map() -> RoadMap:
    """Return the road map of a source without a map."""
    return make_road_map([])


def make_road_map(lanes: Sequence[Lane], areas: Sequence[Area] = ()) -> RoadMap:
    """Turn lanes and areas as read into flat arrays with links, roadblocks and connector flags.

    Links to lanes that the source does not hold are left out. A neighbour counts in both directions.

    Args:
        lanes: As read.
        areas: Further polygons.

    Raises:
        InputRejectedError: Two lanes have one key, or a lane is longer than `MAX_LANE_LENGTH_M`.
    """
    number = {lane.key: position for position, lane in enumerate(lanes)}
    if len(number) < len(lanes):
        twice = next(lane.key for position, lane in enumerate(lanes) if number[lane.key] != position)
        raise InputRejectedError("lanes", "ids must be unique", twice)
    offsets, left_V2, center_V2, right_V2 = _densified(lanes)
    links = _links(lanes, number)
    rings = [np.asarray(area.ring, dtype=np.float64) for area in areas]
    known = np.array([bool(lane.is_connector) for lane in lanes], dtype=bool)
    undecided = np.array([lane.is_connector is None for lane in lanes], dtype=bool)
    limits_L = np.array([lane.speed_limit_mps for lane in lanes], dtype=np.float64)
    crossing = known
    if undecided.any():
        crossing = crossing_lanes(offsets, left_V2, center_V2, right_V2, links)
    return RoadMap(
        keys=tuple(number),
        offsets=offsets,
        left_V2=left_V2,
        center_V2=center_V2,
        right_V2=right_V2,
        speed_limit_L=np.where(np.isfinite(limits_L) & (limits_L > 0.0), limits_L, math.nan),
        is_connector_L=np.where(undecided, crossing, known).astype(bool),
        has_border_L=np.array([lane.has_border for lane in lanes], dtype=bool),
        links_E3=links,
        roadblock_L=_components(len(lanes), links[links[:, 2] != SUCCESSOR]),
        area_offsets=np.cumsum([0, *map(len, rings)]),
        area_points_W2=_stack(rings),
        area_layer=tuple(area.layer for area in areas),
        area_lane_Q=np.array([number.get(area.lane, -1) for area in areas], dtype=np.int64),
    )


def pair_borders(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resample two borders by their own arc length so that their vertices are paired.

    Args:
        left: (n, 2) left border.
        right: (m, 2) right border, same direction.

    Returns:
        Left and right border with the same number of vertices, at least 2.
    """
    longest = max(arc_length(left)[-1], arc_length(right)[-1])
    if not longest <= MAX_LANE_LENGTH_M:
        raise InputRejectedError("border", f"must be at most {MAX_LANE_LENGTH_M:.0f} m long", longest)
    shares = np.linspace(0.0, 1.0, max(2, math.ceil(longest / BORDER_SPACING_M - ROUNDING) + 1))
    return _at_shares(left, shares), _at_shares(right, shares)


def offset_borders(
    center: np.ndarray, left_m: float | np.ndarray, right_m: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return left and right border of a lane known by centre line and half widths.

    Args:
        center: (n, 2), n >= 2.
        left_m: Distance of the left border, one value or one a vertex.
        right_m: Distance of the right border.
    """
    along = np.gradient(center, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    left, right = (np.broadcast_to(half_m, len(center))[:, None] * normal for half_m in (left_m, right_m))
    return center + left, center - right


def lane_polygons(offsets: np.ndarray, left_V2: np.ndarray, right_V2: np.ndarray) -> np.ndarray:
    """Return the areas between the borders of lanes as shapely polygons."""
    counts = np.diff(offsets)
    owner_V = np.repeat(np.arange(len(counts)), counts)
    vertex_V = np.arange(len(left_V2))
    ring = np.empty((2 * len(left_V2), 2))
    # A ring is the left border forwards, then the right one backwards.
    ring[vertex_V + offsets[owner_V]] = left_V2
    ring[2 * offsets[owner_V + 1] - 1 - (vertex_V - offsets[owner_V])] = right_V2
    rings = shapely.linearrings(ring, indices=np.repeat(np.arange(len(counts)), 2 * counts))
    return np.asarray(shapely.polygons(rings))


def crossing_lanes(
    offsets: np.ndarray, left_V2: np.ndarray, center_V2: np.ndarray, right_V2: np.ndarray, links: np.ndarray
) -> np.ndarray:
    """Tell which lanes lie inside an intersection, where the source does not say.

    A lane is a connector when it crosses another lane: their polygons share at least `MIN_CROSSING_AREA_M2`
    and their directions at that place differ by at least `MIN_CROSSING_ANGLE_RAD`. The other exits of a fork
    one of whose exits is a connector are connectors too, because they lie in the same junction.

    Returns:
        Bool, L.
    """
    flags = np.zeros(len(offsets) - 1, dtype=bool)
    one, two, low, high = _may_cross(offsets, left_V2, center_V2, right_V2)
    if not len(one):
        return flags
    shapes = shapely.make_valid(lane_polygons(offsets, left_V2, right_V2))
    shapely.prepare(shapes)
    meet = np.flatnonzero(shapely.intersects(shapes[one], shapes[two]))
    meet = meet[~shapely.touches(shapes[one[meet]], shapes[two[meet]])]
    one, two, is_sure = _cross_by_headings(offsets, center_V2, one[meet], two[meet], low[meet], high[meet])
    # Few of the dear intersections settle most lanes, and with them other pairs: one a lane of those that cross
    # wherever they share an area, then the others of these.
    is_first = np.zeros(len(one), dtype=bool)
    is_first[np.flatnonzero(is_sure)[np.unique(one[is_sure], return_index=True)[1]]] = True
    for part in (is_first, is_sure & ~is_first, ~is_sure):
        pair = np.flatnonzero(part & ~(flags[one] & flags[two]))
        crosses = pair[_cross(offsets, center_V2, shapes, one[pair], two[pair])]
        flags[one[crosses]] = flags[two[crosses]] = True
    exits = links[links[:, 2] == SUCCESSOR]
    forks = np.unique(exits[flags[exits[:, 1]], 0])
    several = forks[np.bincount(exits[:, 0], minlength=len(flags))[forks] > 1]
    flags[exits[np.isin(exits[:, 0], several), 1]] = True
    return flags


def _cross(
    offsets: np.ndarray, center_V2: np.ndarray, shapes: np.ndarray, one: np.ndarray, two: np.ndarray
) -> np.ndarray:
    """Tell of pairs of lanes whether they cross."""
    crosses = np.zeros(len(one), dtype=bool)
    if not len(one):
        return crosses
    overlap = shapely.intersection(shapes[one], shapes[two])
    large = np.flatnonzero(shapely.area(overlap) >= MIN_CROSSING_AREA_M2)
    places = shapely.get_coordinates(shapely.centroid(overlap[large]))
    first, second = (_heading_near(offsets, center_V2, lanes[large], places) for lanes in (one, two))
    crosses[large] = np.cos(first - second) <= math.cos(MIN_CROSSING_ANGLE_RAD)
    return crosses


def _may_cross(
    offsets: np.ndarray, left_V2: np.ndarray, center_V2: np.ndarray, right_V2: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of lanes that can cross by their bounding boxes and directions, and the box that each shares."""
    low_L2 = np.minimum.reduceat(np.minimum(left_V2, right_V2), offsets[:-1])
    high_L2 = np.maximum.reduceat(np.maximum(left_V2, right_V2), offsets[:-1])
    boxes = shapely.box(*low_L2.T, *high_L2.T)
    one, two = shapely.STRtree(boxes).query(boxes)
    one, two = one[one < two], two[one < two]
    begin_L, spread_L = _headings(offsets, center_V2)
    largest = _angle(begin_L[one] - begin_L[two]) + spread_L[one] + spread_L[two]
    low, high = np.maximum(low_L2[one], low_L2[two]), np.minimum(high_L2[one], high_L2[two])
    shares = (high - low).clip(min=0.0).prod(axis=1) >= MIN_CROSSING_AREA_M2 - 1e-6
    may = shares & (largest > MIN_CROSSING_ANGLE_RAD - 1e-6)
    return one[may], two[may], low[may], high[may]


def _cross_by_headings(
    offsets: np.ndarray,
    center_V2: np.ndarray,
    one: np.ndarray,
    two: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of lanes whose directions can differ enough inside their boxes, and whether they surely do."""
    (first, first_spread), (second, second_spread) = (
        _headings_near(offsets, center_V2, lanes, low, high) for lanes in (one, two)
    )
    between, spread = _angle(first - second), first_spread + second_spread
    may = between + spread > MIN_CROSSING_ANGLE_RAD - 1e-6
    return one[may], two[may], (between - spread > MIN_CROSSING_ANGLE_RAD + 1e-6)[may]


def _headings(offsets: np.ndarray, center_V2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the heading of each lane at its begin, and how far any other of its segments is turned from that."""
    segment_G = np.delete(np.arange(len(center_V2)), offsets[1:] - 1)
    step_G2 = center_V2[segment_G + 1] - center_V2[segment_G]
    heading_G = np.arctan2(step_G2[:, 1], step_G2[:, 0])
    first_L = offsets[:-1] - np.arange(len(offsets) - 1)
    begin_L = heading_G[first_L]
    turned_G = _angle(heading_G - np.repeat(begin_L, np.diff(offsets) - 1))
    return begin_L, np.maximum.reduceat(turned_G, first_L)


def _headings_near(
    offsets: np.ndarray, center_V2: np.ndarray, lane_P: np.ndarray, low_P2: np.ndarray, high_P2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a heading of each lane near its box, and how far `_heading_near` can be turned from that for any point of
    the box."""
    if not len(lane_P):
        return np.zeros(0), np.zeros(0)
    counts = np.diff(offsets)[lane_P] - 1
    starts = np.cumsum(counts) - counts
    begin = np.arange(counts.sum()) + np.repeat(offsets[lane_P] - starts, counts)
    from_low, from_high = (
        (center_V2[begin + 1] + center_V2[begin]) / 2.0 - np.repeat(corner_P2, counts, axis=0)
        for corner_P2 in (low_P2, high_P2)
    )
    least = np.square(np.maximum(np.maximum(-from_low, from_high), 0.0)).sum(axis=1)
    most = np.square(np.maximum(np.abs(from_low), np.abs(from_high))).sum(axis=1)
    # The nearest to some point is no further from the box than the most that another can be.
    may_be_nearest = least <= np.repeat(np.minimum.reduceat(most, starts), counts) + 1e-6
    dx, dy = (center_V2[begin + 1] - center_V2[begin]).T
    heading = np.arctan2(dy, dx)
    some_P = heading[np.maximum.reduceat(np.where(may_be_nearest, np.arange(len(begin)), -1), starts)]
    turned = np.where(may_be_nearest, _angle(heading - np.repeat(some_P, counts)), 0.0)
    return some_P, np.maximum.reduceat(turned, starts)


def _angle(difference: np.ndarray) -> np.ndarray:
    return np.abs((difference + np.pi) % (2.0 * np.pi) - np.pi)


def _heading_near(
    offsets: np.ndarray, center_V2: np.ndarray, lane_P: np.ndarray, points_P2: np.ndarray
) -> np.ndarray:
    """Return the heading of each lane at the segment whose middle is nearest to the point."""
    if not len(lane_P):
        return np.zeros(0)
    counts = np.diff(offsets)[lane_P] - 1
    starts = np.cumsum(counts) - counts
    begin = np.arange(counts.sum()) + np.repeat(offsets[lane_P] - starts, counts)
    middles = (center_V2[begin + 1] + center_V2[begin]) / 2.0
    distance = np.linalg.norm(middles - np.repeat(points_P2, counts, axis=0), axis=1)
    nearest = np.flatnonzero(distance == np.repeat(np.minimum.reduceat(distance, starts), counts))
    nearest = begin[nearest[np.searchsorted(nearest, starts)]]
    dx, dy = (center_V2[nearest + 1] - center_V2[nearest]).T
    return np.arctan2(dy, dx)


def _densified(lanes: Sequence[Lane]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return offsets, left borders, centre lines and right borders of all lanes, no step of a centre line longer than
    `MAX_SPACING_M`."""
    left_U2, right_U2 = _stack([lane.left for lane in lanes]), _stack([lane.right for lane in lanes])
    counts = np.array([len(lane.left) for lane in lanes], dtype=np.int64)
    offsets = np.cumsum([0, *counts])
    center_U2 = (left_U2 + right_U2) / 2.0
    for lane, low, high in zip(lanes, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if lane.center is not None:
            center_U2[low:high] = lane.center
    step_U = np.linalg.norm(np.diff(center_U2, axis=0, append=0.0), axis=1)
    step_U[offsets[1:] - 1] = 0.0
    lengths = np.add.reduceat(step_U, offsets[:-1]) if len(lanes) else step_U
    # A vertex that is far off would be joined by vertices without number.
    long = np.flatnonzero(~(lengths <= MAX_LANE_LENGTH_M))
    if len(long):
        rule = f"must be at most {MAX_LANE_LENGTH_M:.0f} m long"
        raise InputRejectedError(f"lane {lanes[long[0]].key}", rule, lengths[long[0]])
    parts_U = np.maximum(1, np.ceil(step_U / MAX_SPACING_M - ROUNDING)).astype(np.int64)
    parts_U[offsets[1:] - 1] = 1
    if (parts_U == 1).all():
        return offsets, left_U2, center_U2, right_U2
    # Vertex k of the parts of a step lies at k / parts of it; the last vertex of a lane is a step of one part.
    begin_V = np.repeat(np.arange(len(step_U)), parts_U)
    local_V = begin_V - np.repeat(offsets[:-1], np.add.reduceat(parts_U, offsets[:-1]))
    rank_V = np.arange(len(begin_V)) - np.repeat(np.cumsum(parts_U) - parts_U, parts_U)
    # The share is what is left of a place counted in steps, rounding included.
    share_V = (local_V + rank_V / parts_U[begin_V]) - local_V
    end_V = np.minimum(begin_V + 1, len(step_U) - 1)
    left, center, right = (
        np.where(
            share_V[:, None] > 0.0,
            (line[end_V] - line[begin_V]) * share_V[:, None] + line[begin_V],
            line[begin_V],
        )
        for line in (left_U2, center_U2, right_U2)
    )
    return np.cumsum([0, *np.add.reduceat(parts_U, offsets[:-1])]), left, center, right


def _links(lanes: Sequence[Lane], number: Mapping[Hashable, int]) -> np.ndarray:
    links: set[tuple[int, int, int]] = set()
    for lane in lanes:
        here = number[lane.key]
        links |= {(here, number[key], SUCCESSOR) for key in lane.successors if key in number}
        if lane.left_neighbour in number:
            links |= {(here, number[lane.left_neighbour], LEFT), (number[lane.left_neighbour], here, RIGHT)}
        if lane.right_neighbour in number:
            links |= {(here, number[lane.right_neighbour], RIGHT), (number[lane.right_neighbour], here, LEFT)}
    return np.array(sorted(links), dtype=np.int64).reshape(-1, 3)


def _components(count: int, links: np.ndarray) -> np.ndarray:
    if not count:
        return np.zeros(0, dtype=np.int64)
    graph = coo_matrix((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def arc_length(line: np.ndarray) -> np.ndarray:
    """Return the way along a line (n, 2) up to each vertex (n,), n >= 1."""
    along = np.zeros(len(line))
    lengths(line[1:] - line[:-1]).cumsum(out=along[1:])
    return along


def lengths(steps: np.ndarray) -> np.ndarray:
    """Return the lengths of vectors (n, 2)."""
    return np.sqrt(steps[:, 0] * steps[:, 0] + steps[:, 1] * steps[:, 1])


def direction(line: np.ndarray) -> float:
    """Return the direction from the first vertex of a line to its last."""
    dx, dy = line[-1] - line[0]
    return math.atan2(dy, dx)


def is_apart(points: np.ndarray, step_m: float = 1e-3) -> np.ndarray:
    """Tell which points (n, bool) are further than a step from the one before; the first one is."""
    return np.append(True, lengths(points[1:] - points[:-1]) > step_m)[: len(points)]


def _at_shares(line: np.ndarray, shares: np.ndarray) -> np.ndarray:
    along = arc_length(np.asarray(line, dtype=np.float64))
    return np.stack([np.interp(shares * along[-1], along, line[:, axis]) for axis in range(2)], axis=1)


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 2)), *parts])
