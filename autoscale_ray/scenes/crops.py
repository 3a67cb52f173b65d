"""Cut the road around many windows of one recording at once, into each window's scene frame.

Shape legend: M windows, L lanes of the road map, V border vertices, J lanes in windows (over all windows), N their
vertices, E links, Q polygons in windows, W their vertices, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscale_ray.scenes.ragged import ragged
from autoscale_ray.scenes.rings import is_tangled, mend_rings
from autoscale_ray.scenes.road_map import RoadMap
from autoscale_ray.scenes.schema import NUM_FRAMES, POLYGON_LAYERS

CROP_RADIUS_M = 80.0
# A fast ego leaves the 80 m within its plan; the road must reach beyond 4 s of drive.
CROP_TIME_S, CROP_BEYOND_M = 4.5, 35.0
# Lanes are widened a little where they serve as drivable area, so that hairline gaps between them do not
# count.
AREA_MARGIN_M = 0.1

Flat = tuple[np.ndarray, np.ndarray]
"""Values and the number of them in each window."""


def to_scene_frame(points: np.ndarray, origins_M3: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Express map points in the frames of their windows.

    Args:
        points: (n, ..., 2) map coordinates.
        origins_M3: x, y, yaw of each window's frame.
        window: (n,) window of each row of points.

    Returns:
        (n, ..., 2) float64.
    """
    x0, y0, cos, sin = np.take(frames_of(origins_M3), window, axis=1).reshape(4, -1, *[1] * (points.ndim - 2))
    return np.stack(turned(points[..., 0] - x0, points[..., 1] - y0, cos, sin), axis=-1)


def frames_of(origins_M3: np.ndarray) -> np.ndarray:
    """Return x, y, cosine and sine of every frame (4, M)."""
    return np.stack([*origins_M3[:, :2].T, np.cos(origins_M3[:, 2]), np.sin(origins_M3[:, 2])])


def turned(x: np.ndarray, y: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Express vectors in a frame turned by the angle of `cos` and `sin`; x and y are overwritten."""
    along = cos * x
    along += sin * y
    y *= cos
    x *= sin
    y -= x
    return along, y


@dataclass(frozen=True, slots=True)
class _Cut:
    """Lanes cut at the crop radius: one entry for each (window, lane) that has a vertex inside."""

    window_J: np.ndarray
    lane_J: np.ndarray
    first_J: np.ndarray
    count_J: np.ndarray
    local_ML: np.ndarray
    """Number of a lane inside its window, -1 when cut away."""


def crop_radius(speed_mps: np.ndarray) -> np.ndarray:
    """Return how far the road of a window reaches: 80 m, or 4.5 s of drive and 35 m where that is more."""
    return np.maximum(CROP_RADIUS_M, CROP_TIME_S * np.abs(speed_mps) + CROP_BEYOND_M)


def crop_road(
    road: RoadMap,
    origins_M3: np.ndarray,
    radius_M: np.ndarray,
    on_route_ML: np.ndarray,
    red_MTL: np.ndarray | None,
) -> dict[str, Flat]:
    """Return the map columns of every window.

    A lane is kept from its first to its last vertex within the radius around the ego and one vertex more at
    each end. Each lane with borders gives two polygons: its own (lane or lane_connector), and the area it
    belongs to (roadblock or intersection), which is `AREA_MARGIN_M` larger; the union of those areas is the
    drivable area. Polygons that cross themselves are mended, see `rings.mend_rings`.

    Args:
        road: Road in map coordinates.
        origins_M3: Pose of each window's ego.
        radius_M: See `crop_radius`.
        on_route_ML: Bool, lane is on the route of the window.
        red_MTL: Bool, light of the lane is red in the frame; None without lights.

    Returns:
        Flat values and element counts by column of the scene schema.
    """
    cut = _cut_lanes(road, origins_M3, radius_M)
    count_M = np.bincount(cut.window_J, minlength=len(origins_M3))
    window_N = np.repeat(cut.window_J, cut.count_J)
    lines_BN2 = _lines(
        road, ragged(cut.first_J, cut.count_J), np.take(frames_of(origins_M3), window_N, axis=1)
    )
    columns: dict[str, Flat] = {
        "lane_points": per_window(lines_BN2[0], cut.window_J, cut.count_J, len(count_M)),
        "lane_offsets": local_offsets(cut.window_J, cut.count_J, len(count_M)),
        "lane_width_m": (road.width_L[cut.lane_J], count_M),
        "lane_speed_limit_mps": (road.speed_limit_L[cut.lane_J], count_M),
        "lane_on_route": (on_route_ML[cut.window_J, cut.lane_J], count_M),
        "lane_links": local_links(road.links_E3, cut.local_ML),
    }
    return columns | _polygons(road, cut, lines_BN2, origins_M3, radius_M, on_route_ML, red_MTL)


def _lines(road: RoadMap, vertex_N: np.ndarray, frames_4N: np.ndarray) -> np.ndarray:
    """Return centre line, left and right border, and both again for the areas that lanes belong to, at some vertices in
    their frames (5, N, 2), float32."""
    lines = (road.center_V2, road.left_V2, road.right_V2, *_widened(road))
    lines_BN2 = np.empty((len(lines), len(vertex_N), 2), dtype=np.float32)
    # One line after another: what is small stays in the processor's cache.
    for line_V2, line_N2 in zip(lines, lines_BN2, strict=True):
        x_N, y_N = (axis.take(vertex_N) for axis in line_V2.T.copy())
        with np.errstate(over="ignore"):  # A gate refuses what becomes infinite.
            line_N2[:, 0], line_N2[:, 1] = turned(x_N - frames_4N[0], y_N - frames_4N[1], *frames_4N[2:])
    return lines_BN2


def _cut_lanes(road: RoadMap, origins_M3: np.ndarray, radius_M: np.ndarray) -> _Cut:
    offsets = road.offsets
    distance2_MV = (road.center_V2[:, 0] - origins_M3[:, :1]) ** 2 + (
        road.center_V2[:, 1] - origins_M3[:, 1:2]
    ) ** 2
    inside_MV = distance2_MV <= radius_M[:, None] ** 2
    window, vertex = np.nonzero(inside_MV)
    lane = np.repeat(np.arange(road.num_lanes), np.diff(offsets))[vertex]
    new = np.flatnonzero((np.diff(window, prepend=-1) != 0) | (np.diff(lane, prepend=-1) != 0))
    last = np.append(new[1:], len(vertex)) - 1
    window_J, lane_J = window[new], lane[new]
    first_J = np.maximum(vertex[new] - 1, offsets[lane_J])
    end_J = np.minimum(vertex[last] + 2, offsets[lane_J + 1]) if len(new) else vertex[:0]
    local_ML = np.full((len(origins_M3), road.num_lanes), -1, dtype=np.int64)
    starts_M = np.searchsorted(window_J, np.arange(len(origins_M3)))
    local_ML[window_J, lane_J] = np.arange(len(lane_J)) - starts_M[window_J]
    return _Cut(window_J, lane_J, first_J, end_J - first_J, local_ML)


def per_window(values: np.ndarray, window: np.ndarray, count: np.ndarray, num_windows: int) -> Flat:
    """Return the values of runs with the number of them in each window; `window` and `count` are each run's."""
    return values, np.bincount(window, weights=count, minlength=num_windows).astype(np.int64)


def local_offsets(window_J: np.ndarray, count_J: np.ndarray, num_windows: int) -> Flat:
    """Return, for each window, 0 and the running sum of its counts."""
    items_M = np.bincount(window_J, minlength=num_windows)
    total = np.concatenate([[0], np.cumsum(count_J)])
    first_M = np.concatenate([[0], np.cumsum(items_M)])
    rows = ragged(first_M[:-1], items_M + 1)
    owner = np.repeat(np.arange(num_windows), items_M + 1)
    return total[rows] - total[first_M[owner]], items_M + 1


def local_links(links_E3: np.ndarray, local_ML: np.ndarray) -> Flat:
    """Return, for each window, the links between its lanes by their numbers there, -1 for a lane of others."""
    start_ME, end_ME = local_ML[:, links_E3[:, 0]], local_ML[:, links_E3[:, 1]]
    window, link = np.nonzero((start_ME >= 0) & (end_ME >= 0))
    links = np.stack([start_ME[window, link], end_ME[window, link], links_E3[link, 2]], axis=1)
    return links, np.bincount(window, minlength=len(local_ML))


@dataclass(frozen=True, slots=True)
class _Rings:
    """Polygons of all windows: each a run of vertices forwards and a run backwards."""

    window_Q: np.ndarray
    layer_Q: np.ndarray
    lane_Q: np.ndarray
    """Lane of the road map, -1 without."""
    area_Q: np.ndarray
    """Area of the road map, -1 for the borders of a lane."""
    start_Q2: np.ndarray
    """Where the run forwards and the run backwards begin."""
    length_Q2: np.ndarray


def _polygons(
    road: RoadMap,
    cut: _Cut,
    lines_BN2: np.ndarray,
    origins_M3: np.ndarray,
    radius_M: np.ndarray,
    on_route_ML: np.ndarray,
    red_MTL: np.ndarray | None,
) -> dict[str, Flat]:
    num_N = lines_BN2.shape[1]
    areas, area_points = _area_rings(road, origins_M3, radius_M, 5 * num_N)
    parts = [
        _lane_rings(road, cut, "lane", "lane_connector", num_N),
        _lane_rings(road, cut, "roadblock", "intersection", 3 * num_N),
        areas,
    ]
    order = np.argsort(np.concatenate([part.window_Q for part in parts]), kind="stable")
    window_Q, layer_Q, lane_Q, area_Q, start_Q2, length_Q2 = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("window_Q", "layer_Q", "lane_Q", "area_Q", "start_Q2", "length_Q2")
    )
    points_W2 = lines_BN2.reshape(-1, 2)
    points_W2 = np.concatenate([points_W2, area_points]) if len(area_points) else points_W2
    # A row of 8 bytes moves several times as fast as one number than as a pair.
    points_W2 = (
        points_W2.view(np.int64).take(_forth_and_back(start_Q2, length_Q2)).view(np.float32).reshape(-1, 2)
    )
    suspect_L, suspect_A = (
        _tangled_lanes(road, cut),
        is_tangled(road.area_points_W2, np.diff(road.area_offsets)),
    )
    suspects = np.flatnonzero(_at(suspect_L, lane_Q) & (area_Q < 0) | _at(suspect_A, area_Q))
    points_W2, count_Q, source_Q = mend_rings(points_W2, length_Q2.sum(1), suspects)
    window_Q, layer_Q, lane_Q = window_Q[source_Q], layer_Q[source_Q], lane_Q[source_Q]
    num_M = np.bincount(window_Q, minlength=len(origins_M3))
    has_lane_Q = lane_Q >= 0
    red_QT = np.zeros((len(window_Q), NUM_FRAMES), dtype=bool)
    if red_MTL is not None:
        connector_Q = has_lane_Q & (layer_Q == POLYGON_LAYERS.index("lane_connector"))
        red_QT[connector_Q] = red_MTL[window_Q[connector_Q], :, lane_Q[connector_Q]]
    own_Q = has_lane_Q & np.isin(
        layer_Q, [POLYGON_LAYERS.index("lane"), POLYGON_LAYERS.index("lane_connector")]
    )
    # A map can have areas and no lane.
    local_Q = np.where(own_Q, cut.local_ML[window_Q, lane_Q], -1) if road.num_lanes else lane_Q
    return {
        "polygon_points": per_window(points_W2, window_Q, count_Q, len(num_M)),
        "polygon_offsets": local_offsets(window_Q, count_Q, len(num_M)),
        "polygon_layer": (layer_Q, num_M),
        "polygon_lane": (local_Q, num_M),
        "polygon_on_route": (
            has_lane_Q & on_route_ML[window_Q, lane_Q] if road.num_lanes else has_lane_Q,
            num_M,
        ),
        "polygon_red": (red_QT, num_M),
    }


def _forth_and_back(start_Q2: np.ndarray, length_Q2: np.ndarray) -> np.ndarray:
    """Return the elements of runs laid end to end, the second of each pair backwards: starts [[5, 3]], lengths [[2, 2]]
    give [5, 6, 3, 2]."""
    lengths = length_Q2.reshape(-1)
    step = np.tile([1, -1], len(length_Q2))
    begin = start_Q2.reshape(-1) - step * (np.cumsum(lengths) - lengths)
    index = np.repeat(step, lengths)
    index *= np.arange(len(index))
    index += np.repeat(begin, lengths)
    return index


def _lane_rings(road: RoadMap, cut: _Cut, plain: str, crossing: str, base: int) -> _Rings:
    """Return the borders of the lanes as rings; `base` is where their left borders begin among the points."""
    keep = road.has_border_L[cut.lane_J]
    lane, count = cut.lane_J[keep], cut.count_J[keep]
    first = base + (np.cumsum(cut.count_J) - cut.count_J)[keep]
    layer = np.where(road.is_connector_L[lane], POLYGON_LAYERS.index(crossing), POLYGON_LAYERS.index(plain))
    starts = np.stack([first, first + cut.count_J.sum() + count - 1], axis=1)
    return _Rings(
        cut.window_J[keep], layer, lane, np.full(len(lane), -1), starts, np.stack([count, count], axis=1)
    )


def _tangled_lanes(road: RoadMap, cut: _Cut) -> np.ndarray:
    """Tell which lanes of the cut have borders, their own or the widened ones, that cross (bool, L).

    Whole lanes are looked at, because that is cheap. A ring that crosses itself only where its lane is cut off, or only
    once it is rounded to float32, is not among them: the scorer refuses its scene. None is known in the recordings.
    """
    flags = np.zeros(road.num_lanes, dtype=bool)
    lane_J = np.unique(cut.lane_J)
    count_J = np.diff(road.offsets)[lane_J]
    vertex_N = ragged(road.offsets[lane_J], count_J)
    starts = np.cumsum(count_J) - count_J
    starts_J2, counts_J2 = (
        np.stack([starts, starts + count_J - 1 + len(vertex_N)], axis=1),
        np.stack([count_J] * 2, axis=1),
    )
    turns = _forth_and_back(starts_J2, counts_J2)
    for left_V2, right_V2 in ((road.left_V2, road.right_V2), _widened(road)):
        rings = np.concatenate([left_V2[vertex_N], right_V2[vertex_N]])[turns]
        flags[lane_J] |= is_tangled(rings, 2 * count_J)
    return flags


def _at(flag: np.ndarray, index_Q: np.ndarray) -> np.ndarray:
    """Return the flags at an index, False where it is -1."""
    return np.append(flag, False)[index_Q]


def _widened(road: RoadMap) -> tuple[np.ndarray, np.ndarray]:
    """Return the borders moved outwards by `AREA_MARGIN_M`, at the ends of a lane also along it.

    Outwards is across the lane at each vertex. Where vertices of one border lie closer together than those of the
    other, that would turn the border back on itself; such vertices move as the last one before them that does not.
    """
    across_V2 = road.left_V2 - road.right_V2
    across_V2 = across_V2 / np.maximum(np.linalg.norm(across_V2, axis=1, keepdims=True), 1e-9) * AREA_MARGIN_M
    turn_V2 = np.diff(across_V2, axis=0, prepend=0.0)
    is_back_V = np.zeros(len(across_V2), dtype=bool)
    for border_V2, side in ((road.left_V2, 1.0), (road.right_V2, -1.0)):
        step_V2 = np.diff(border_V2, axis=0, prepend=0.0)
        is_back_V |= ((step_V2 + side * turn_V2) * step_V2).sum(axis=1) <= 0.0
    is_back_V[road.offsets[:-1]] = False
    if is_back_V.any():
        across_V2 = across_V2[np.maximum.accumulate(np.where(is_back_V, 0, np.arange(len(is_back_V))))]
    left_V2, right_V2 = road.left_V2 + across_V2, road.right_V2 - across_V2
    first, last = road.offsets[:-1], road.offsets[1:] - 1
    for ends, inner in ((first, first + 1), (last, last - 1)):
        along = road.center_V2[ends] - road.center_V2[inner]
        along = along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9) * AREA_MARGIN_M
        left_V2[ends] += along
        right_V2[ends] += along
    return left_V2, right_V2


def _area_rings(
    road: RoadMap, origins_M3: np.ndarray, radius_M: np.ndarray, base: int
) -> tuple[_Rings, np.ndarray]:
    """Return the areas whose bounding box touches the crop, whole, and their points in the windows' frames, float32;
    `base` is the number of the first of these."""
    counts = np.diff(road.area_offsets)
    layer = np.array([POLYGON_LAYERS.index(name) for name in road.area_layer], dtype=np.int64)
    near_MQ = np.zeros((len(origins_M3), len(counts)), dtype=bool)
    if len(counts):
        low = np.minimum.reduceat(road.area_points_W2, road.area_offsets[:-1])
        high = np.maximum.reduceat(road.area_points_W2, road.area_offsets[:-1])
        here = origins_M3[:, None, :2]
        near_MQ = (
            np.linalg.norm(np.maximum(np.maximum(low - here, here - high), 0.0), axis=2) <= radius_M[:, None]
        )
    window, area = np.nonzero(near_MQ)
    count_Q = counts[area]
    nothing = np.zeros(len(area), dtype=np.int64)
    starts = np.stack([base + np.cumsum(count_Q) - count_Q, nothing], axis=1)
    points = to_scene_frame(
        road.area_points_W2[ragged(road.area_offsets[area], count_Q)], origins_M3, np.repeat(window, count_Q)
    )
    lengths = np.stack([count_Q, nothing], axis=1)
    with np.errstate(over="ignore"):
        rings = _Rings(window, layer[area], road.area_lane_Q[area], area, starts, lengths)
        return rings, points.astype(np.float32)
