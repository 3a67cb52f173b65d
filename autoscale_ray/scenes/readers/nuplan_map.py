"""nuPlan maps (``<location>/<version>/map.gpkg``) as flat arrays in UTM metres.

Facts of the format: geometries are stored in degrees, and the layer ``meta`` names the projection. A roadblock (layer
``lane_groups_polygons``) holds lanes, a roadblock connector (``lane_group_connectors``) holds lane connectors. The lane
that a connector leaves is its ``exit_lane_fid``, the one it enters its ``entry_lane_fid``. Lanes of a roadblock are
numbered from left to right. Connector areas are the layer ``gen_lane_connectors_scaled_width_polygons``.

Shape legend: L lanes and connectors, B roadblocks and roadblock connectors, O other areas, S shapes (all blocks, then
all lanes, then the other areas), R rings, W ring vertices, V base line vertices, C simplified centre line vertices.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import shapely

from autoscale_ray.errors import InputRejectedError, MissingExtraError
from autoscale_ray.scenes.geopackage import INSTALL, Layer, read_geopackage
from autoscale_ray.scenes.ragged import ragged
from autoscale_ray.scenes.rings import mend_rings
from autoscale_ray.scenes.schema import POLYGON_LAYERS
from autoscale_ray.scenes.trust import read_file

SIMPLIFY_M = 0.01
"""Lane centre lines (not the route's centre line) are thinned by at most this much."""
_ALIASES = {"las_vegas": "us-nv-las-vegas-strip"}
_LAYERS = {
    "meta": ("key", "value"),
    "lanes_polygons": ("lane_group_fid", "lane_index", "speed_limit_mps"),
    "lane_groups_polygons": (),
    "lane_connectors": ("lane_group_connector_fid", "exit_lane_fid", "entry_lane_fid", "speed_limit_mps"),
    "gen_lane_connectors_scaled_width_polygons": ("lane_connector_fid",),
    "lane_group_connectors": ("from_lane_group_fid", "to_lane_group_fid"),
    "baseline_paths": ("lane_fid", "lane_connector_fid"),
    "intersections": (),
    "carpark_areas": (),
    "crosswalks": (),
}
_OPTIONAL = ("carpark_areas", "crosswalks")
_AREAS = {"intersections": "intersection", "carpark_areas": "carpark_area", "crosswalks": "crosswalk"}
_MAX_INDEX_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class NuplanMap:
    """One location; lanes before connectors, roadblocks before roadblock connectors."""

    location: str
    connector_number: Mapping[int, int]
    """Position in L by the connector's fid."""
    block_number: Mapping[int, int]
    """Position in B by fid; where a roadblock and a connector share a fid, the roadblock."""
    num_roadblocks: int
    lane_block_L: np.ndarray
    """-1 where the roadblock is not in the map."""
    speed_limit_L: np.ndarray
    """NaN when unknown."""
    length_L: np.ndarray
    width_L: np.ndarray
    next_lanes: tuple[tuple[int, ...], ...]
    links_E3: np.ndarray
    """From lane, to lane, index into LINK_KINDS."""
    base_offsets: np.ndarray
    base_V3: np.ndarray
    """x, y and heading of the base lines as they are; a line's last heading is that before."""
    center_offsets: np.ndarray
    center_C2: np.ndarray
    block_lane_offsets: np.ndarray
    block_lanes: np.ndarray
    next_blocks: tuple[tuple[int, ...], ...]
    previous_blocks: tuple[tuple[int, ...], ...]
    shapes_S: np.ndarray
    """shapely geometries; None where missing."""
    sound_S: np.ndarray
    """The shape is there, and a lane has a base line."""
    shape_ring_offsets: np.ndarray
    ring_offsets: np.ndarray
    ring_points_W2: np.ndarray
    fid_S: np.ndarray
    layer_S: np.ndarray
    """Index into POLYGON_LAYERS; that of a roadblock connector means nothing."""
    tree: shapely.STRtree
    """Over `shapes_S` without the lanes' own."""
    tree_shape: np.ndarray
    """Position in S of each entry of the tree."""

    @property
    def num_lanes(self) -> int:
        """Return L."""
        return len(self.lane_block_L)

    @property
    def num_blocks(self) -> int:
        """Return B."""
        return len(self.block_lane_offsets) - 1

    def base_line(self, lane: int) -> np.ndarray:
        """Return x, y, heading (n, 3) of one lane's base line."""
        return self.base_V3[self.base_offsets[lane] : self.base_offsets[lane + 1]]

    def lanes_of(self, block: int) -> np.ndarray:
        """Return the lanes of one roadblock."""
        return self.block_lanes[self.block_lane_offsets[block] : self.block_lane_offsets[block + 1]]


def map_files(folder: Path) -> dict[str, Path]:
    """Return the map file of every location that the index of a maps folder names.

    Args:
        folder: Holds one ``nuplan-maps-*.json`` and a folder for each location.

    Raises:
        InputRejectedError: No index, several, or one that is malformed.
    """
    found = sorted(folder.glob("nuplan-maps-*.json"))
    if len(found) != 1:
        raise InputRejectedError(str(folder), "must hold one nuplan-maps-*.json", len(found))
    where = str(found[0])
    try:
        index = json.loads(read_file(found[0], _MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputRejectedError):
            raise
        raise InputRejectedError(where, "must be JSON", str(error)) from None
    files = {}
    for location, entry in index.items() if isinstance(index, dict) else ():
        version = entry.get("version") if isinstance(entry, dict) else None
        if not all(
            isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) for name in (location, version)
        ):
            raise InputRejectedError(where, "must give a location and its version", f"{location}: {version}")
        files[location] = folder / location / str(version) / "map.gpkg"
    if not files:
        raise InputRejectedError(where, "must map locations to versions")
    return files


def open_map(folder: Path, location: str) -> NuplanMap:
    """Return the map of a location, read once in each process.

    Args:
        folder: The maps folder.
        location: As logs name it.

    Raises:
        InputRejectedError: No such location, or its file is refused.
        MissingExtraError: The extra ``navsim`` is not installed.
    """
    files = map_files(folder)
    name = _ALIASES.get(location, location)
    if name not in files:
        raise InputRejectedError("map_location", f"must be one of {', '.join(files)}", location)
    if not files[name].is_file():
        raise InputRejectedError(str(files[name]), "must be a file")
    state = files[name].stat()
    return _cached_map(files[name], name, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _cached_map(path: Path, location: str, size: int, time_ns: int) -> NuplanMap:
    layers = read_geopackage(path, _LAYERS, _OPTIONAL)
    return build_map(layers, location, str(path))


def _projected(layers: Mapping[str, Layer], where: str) -> dict[str, Layer]:
    """Turn degrees into metres by the projection that the layer ``meta`` names."""
    try:
        import pyproj
        from pyproj.exceptions import ProjError
    except ImportError:
        raise MissingExtraError("pyproj", INSTALL) from None
    meta = layers["meta"].columns
    target = dict(zip(meta["key"].tolist(), meta["value"].tolist(), strict=True)).get("projectedCoordSystem")
    rule = "layer meta must name a known projectedCoordSystem such as epsg:32611"
    projected = {}
    for name, layer in layers.items():
        if name == "meta":
            continue
        # Only codes of the register: other texts could name files or addresses to PROJ.
        codes = (str(layer.crs).upper(), str(target).upper())
        if not all(re.fullmatch(r"EPSG:\d{4,6}", code) for code in codes):
            raise InputRejectedError(where, rule, f"{layer.crs} to {target}")
        try:
            transformer = pyproj.Transformer.from_crs(*codes, always_xy=True)
            points = np.stack(transformer.transform(*layer.points_W2.T), axis=1)
        except ProjError:
            raise InputRejectedError(where, rule, f"{layer.crs} to {target}") from None
        if not np.isfinite(points).all():
            raise InputRejectedError(where, f"layer {name} must lie where {target} is defined")
        projected[name] = replace(layer, crs=codes[1], points_W2=points)
    return projected


@dataclass(frozen=True, slots=True)
class _Rings:
    """Rings of shapes laid end to end."""

    shapes_S: np.ndarray
    sound_S: np.ndarray
    shape_offsets: np.ndarray
    ring_offsets: np.ndarray
    points_W2: np.ndarray


def _rings(layer: Layer, rows: np.ndarray | None = None) -> _Rings:
    """Return the areas of a layer's rows, -1 for a shape that is missing."""
    rows = np.arange(len(layer)) if rows is None else rows
    lengths_P = np.diff(layer.part_offsets)
    usable_P = lengths_P >= 3
    first = np.searchsorted(layer.part_row_P, rows)
    count = np.where(rows >= 0, np.searchsorted(layer.part_row_P, rows, side="right") - first, 0)
    part = ragged(first, count)
    owner = np.repeat(np.arange(len(rows)), count)
    holed = np.unique(owner[layer.part_holes_P[part]])
    part, owner = part[usable_P[part]], owner[usable_P[part]]
    vertex = ragged(layer.part_offsets[part], lengths_P[part])
    # The scorer refuses a scene with a ring that crosses itself.
    points, counts, source = mend_rings(layer.points_W2[vertex], lengths_P[part], np.arange(len(part)))
    owner = owner[source]
    sound = np.isin(np.arange(len(rows)), owner) & ~np.isin(np.arange(len(rows)), holed)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    polygons = [shapely.Polygon(points[a:b]) for a, b in itertools.pairwise(offsets.tolist())]
    shapes = np.full(len(rows), None, dtype=object)
    bounds = np.searchsorted(owner, np.arange(len(rows) + 1))
    for number, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
        if high > low:
            # Strips of one area touch along lines, which the parts of a MultiPolygon must not.
            shapes[number] = polygons[low] if high == low + 1 else _union(polygons[low:high])
    return _Rings(shapes, sound, bounds, offsets, points)


def _union(polygons: list[shapely.Polygon]) -> shapely.Geometry:
    try:
        return shapely.union_all(polygons)
    except shapely.GEOSException:  # a ring that could not be mended
        return shapely.MultiPolygon(polygons)


def _joined(parts: list[_Rings]) -> _Rings:
    def chained(name: str) -> np.ndarray:
        lengths = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)

    return _Rings(
        np.concatenate([part.shapes_S for part in parts]),
        np.concatenate([part.sound_S for part in parts]),
        chained("shape_offsets"),
        chained("ring_offsets"),
        np.concatenate([part.points_W2 for part in parts]),
    )


def _floats(layer: Layer, column: str, where: str) -> np.ndarray:
    """Return a column of numbers, also where they are stored as texts; NaN for null."""
    values = layer.columns[column]
    try:
        return np.where(values == "", "nan", values).astype(float) if values.dtype.kind == "U" else values
    except ValueError:
        raise InputRejectedError(where, f"column {column} must hold numbers") from None


def _numbers(layer: Layer, column: str, where: str) -> np.ndarray:
    """Return a column of fids or indexes as int64, -1 for null."""
    numbers = _floats(layer, column, where)
    valid = np.isfinite(numbers) & (np.abs(numbers) < 1e15)
    return np.where(valid, numbers, -1.0).astype(np.int64)


def _positions(number: Mapping[int, int], fids: np.ndarray) -> np.ndarray:
    return np.array([number.get(fid, -1) for fid in fids.tolist()], dtype=np.int64)


def build_map(layers: Mapping[str, Layer], location: str, where: str) -> NuplanMap:
    """Lay out the layers of a map file as flat arrays in metres.

    Args:
        layers: As stored.
        location: Name of the map.
        where: File for messages.

    Raises:
        InputRejectedError: The projection is not known, or a column is malformed.
    """
    layers = _projected(layers, where)
    lanes, connectors = layers["lanes_polygons"], layers["lane_connectors"]
    groups, turns = layers["lane_groups_polygons"], layers["lane_group_connectors"]
    lane_number, connector_number = _numbered(lanes, 0), _numbered(connectors, len(lanes))
    group_number, turn_number = _numbered(groups, 0), _numbered(turns, len(groups))
    lane_blocks = _positions(group_number, _numbers(lanes, "lane_group_fid", where))
    connector_blocks = _positions(turn_number, _numbers(connectors, "lane_group_connector_fid", where))
    block_L = np.concatenate([lane_blocks, connector_blocks])
    num_blocks, num_lanes = len(groups) + len(turns), len(lanes) + len(connectors)
    base_offsets, base_V3 = _base_lines(layers["baseline_paths"], lane_number, connector_number, where)
    rings = _all_rings(layers, where)
    lane_S = slice(num_blocks, num_blocks + num_lanes)
    rings.sound_S[lane_S] &= (np.diff(base_offsets) >= 2) & (block_L >= 0)
    sizes = {name: len(layers[name]) for name in _shape_layers(layers)}
    in_tree = _searched(rings.shapes_S, sizes, lane_S, where)
    order = np.argsort(block_L, kind="stable")
    length_L = _lengths(base_offsets, base_V3)
    successors = _successors(connectors, lane_number, ("exit_lane_fid", "entry_lane_fid"), where)
    blocks_after = _successors(turns, group_number, ("from_lane_group_fid", "to_lane_group_fid"), where)
    center_offsets, center_C2 = _thinned(base_offsets, base_V3)
    return NuplanMap(
        location=location,
        connector_number=connector_number,
        block_number=turn_number | group_number,
        num_roadblocks=len(groups),
        lane_block_L=block_L,
        speed_limit_L=_speed_limits((lanes, connectors), where),
        length_L=length_L,
        width_L=np.nan_to_num(shapely.area(rings.shapes_S[lane_S])) / np.maximum(length_L, 1e-9),
        next_lanes=_adjacent(num_lanes, successors),
        links_E3=_links(successors, block_L, _numbers(lanes, "lane_index", where)),
        base_offsets=base_offsets,
        base_V3=base_V3,
        center_offsets=center_offsets,
        center_C2=center_C2,
        block_lane_offsets=np.searchsorted(block_L[order], np.arange(num_blocks + 1)),
        block_lanes=order,
        next_blocks=_adjacent(num_blocks, blocks_after),
        previous_blocks=_adjacent(num_blocks, blocks_after[:, ::-1]),
        shapes_S=rings.shapes_S,
        sound_S=rings.sound_S,
        shape_ring_offsets=rings.shape_offsets,
        ring_offsets=rings.ring_offsets,
        ring_points_W2=rings.points_W2,
        fid_S=np.concatenate([layers[name].fid_N for name in _shape_layers(layers)]),
        layer_S=_layer_numbers(layers),
        tree=shapely.STRtree(rings.shapes_S[in_tree]),
        tree_shape=in_tree,
    )


def _searched(shapes_S: np.ndarray, layer_sizes: Mapping[str, int], lane_S: slice, where: str) -> np.ndarray:
    """Return the shapes that are looked for by place: all that are there but those of lanes.

    Raises:
        InputRejectedError: One of these layers has rows and not one shape.
    """
    there_S = ~shapely.is_missing(shapes_S)
    there_S[lane_S] = False
    ends = np.cumsum(list(layer_sizes.values()))
    for (name, size), end in zip(layer_sizes.items(), ends.tolist(), strict=True):
        is_of_lanes = lane_S.start <= end - size < lane_S.stop
        if size and not is_of_lanes and not there_S[end - size : end].any():
            raise InputRejectedError(where, f"layer {name} must have polygons")
    return np.flatnonzero(there_S)


def _numbered(layer: Layer, first: int) -> dict[int, int]:
    return {fid: number for number, fid in enumerate(layer.fid_N.tolist(), first)}


def _all_rings(layers: Mapping[str, Layer], where: str) -> _Rings:
    """Return the areas of all shapes, in the order of S."""
    polygons = layers["gen_lane_connectors_scaled_width_polygons"]
    row_of = {fid: row for row, fid in enumerate(_numbers(polygons, "lane_connector_fid", where).tolist())}
    turns = _rings(polygons, _positions(row_of, layers["lane_connectors"].fid_N))
    names = ("lane_groups_polygons", "lane_group_connectors", "lanes_polygons")
    others = [_rings(layers[name]) for name in _AREAS if name in layers]
    return _joined([*(_rings(layers[name]) for name in names), turns, *others])


def _base_lines(
    paths: Layer, lane_number: Mapping[int, int], connector_number: Mapping[int, int], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the base line of every lane, empty where there is none or it comes in parts."""
    lanes = _positions(lane_number, _numbers(paths, "lane_fid", where))
    connectors = _positions(connector_number, _numbers(paths, "lane_connector_fid", where))
    owner_N = np.where(lanes >= 0, lanes, connectors)
    num_parts_N = np.bincount(paths.part_row_P, minlength=len(paths))
    row_L = np.full(len(lane_number) + len(connector_number), -1, dtype=np.int64)
    whole = (owner_N >= 0) & (num_parts_N == 1)
    row_L[owner_N[whole]] = np.flatnonzero(whole)
    part_L = np.searchsorted(paths.part_row_P, row_L)
    lengths_P = np.append(np.diff(paths.part_offsets), 0)
    starts_P = np.append(paths.part_offsets[:-1], 0)
    count_L = np.where(row_L >= 0, lengths_P[part_L], 0)
    points = paths.points_W2[ragged(starts_P[part_L], count_L)]
    offsets = np.concatenate([[0], np.cumsum(count_L)])
    yaw = np.zeros(len(points))
    yaw[:-1] = np.arctan2(*np.diff(points, axis=0).T[::-1])
    last = offsets[1:][count_L >= 2] - 1
    yaw[last] = yaw[last - 1]
    return offsets, np.column_stack([points, yaw])


def _thinned(offsets: np.ndarray, base_V3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the base lines without vertices that lie within `SIMPLIFY_M` of the line without them."""
    lines = [shapely.LineString(base_V3[a:b, :2] if b - a >= 2 else np.zeros((0, 2)))
             for a, b in itertools.pairwise(offsets.tolist())]  # fmt: skip
    thin = shapely.simplify(np.array(lines, dtype=object), SIMPLIFY_M)
    points, owner = shapely.get_coordinates(thin, return_index=True)
    return np.searchsorted(owner, np.arange(len(lines) + 1)), points


def _lengths(offsets: np.ndarray, base_V3: np.ndarray) -> np.ndarray:
    steps = np.linalg.norm(np.diff(base_V3[:, :2], axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    first, last = offsets[:-1], np.maximum(offsets[1:] - 1, offsets[:-1])
    top = max(len(along) - 1, 0)
    return along[np.minimum(last, top)] - along[np.minimum(first, top)]


def _shape_layers(layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return the layers in the order of S, each with its name in POLYGON_LAYERS (a stand-in for connectors of
    roadblocks, which no scene shows)."""
    names = {"lane_groups_polygons": "roadblock", "lane_group_connectors": "roadblock", "lanes_polygons": "lane",
             "lane_connectors": "lane_connector", **_AREAS}  # fmt: skip
    return {name: kind for name, kind in names.items() if name in layers}


def _layer_numbers(layers: Mapping[str, Layer]) -> np.ndarray:
    numbers = [POLYGON_LAYERS.index(kind) for kind in _shape_layers(layers).values()]
    return np.repeat(numbers, [len(layers[name]) for name in _shape_layers(layers)]).astype(np.int8)


def _speed_limits(layers: Sequence[Layer], where: str) -> np.ndarray:
    limits = np.concatenate([_floats(layer, "speed_limit_mps", where) for layer in layers])
    return np.where(limits > 0.0, limits, np.nan)


def _successors(links: Layer, number: Mapping[int, int], columns: tuple[str, str], where: str) -> np.ndarray:
    """Return pairs (from, to): from what a connector leaves to the connector, and on to what it enters."""
    own = len(number) + np.arange(len(links))
    leaves, enters = (_positions(number, _numbers(links, column, where)) for column in columns)
    pairs = np.concatenate([np.stack([leaves, own], axis=1), np.stack([own, enters], axis=1)])
    return pairs[(pairs >= 0).all(axis=1)]


def _adjacent(count: int, pairs: np.ndarray) -> tuple[tuple[int, ...], ...]:
    lists: list[list[int]] = [[] for _ in range(count)]
    for start, end in pairs.tolist():
        lists[start].append(end)
    return tuple(tuple(items) for items in lists)


def _links(successors: np.ndarray, block_L: np.ndarray, index_L: np.ndarray) -> np.ndarray:
    """Return successors, and the neighbours inside each roadblock: the next smaller index is on the left."""
    links = [np.column_stack([successors, np.zeros(len(successors), dtype=np.int64)])]
    places = zip(block_L[: len(index_L)].tolist(), index_L.tolist(), strict=True)
    lane_at = {place: lane for lane, place in enumerate(places) if place[0] >= 0}
    left = {lane: lane_at.get((block, index - 1)) for (block, index), lane in lane_at.items()}
    pairs = [(other, lane) for lane, other in left.items() if other is not None]
    beside = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    links.append(np.column_stack([beside[:, ::-1], np.ones(len(beside), dtype=np.int64)]))
    links.append(np.column_stack([beside, np.full(len(beside), 2, dtype=np.int64)]))
    return np.concatenate(links)
