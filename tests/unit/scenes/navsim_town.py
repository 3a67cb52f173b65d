"""A made-up town in nuPlan's map layout: a grid of streets whose geometry is known in UTM metres.

The projection and the GeoPackage are written out here from their definitions (Krueger's series; OGC 12-128), so that
the reader's way through GDAL and PROJ is checked against another one. Layers and columns are those of nuPlan maps.
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import shapely

LOCATION, VERSION, ZONE = "us-nv-las-vegas-strip", "9.15.1915", 11
CORNER = np.array([664_300.0, 3_997_400.0])
BLOCK_M, HALF_JUNCTION_M, LANE_M = 120.0, 12.0, 3.5


def from_utm(points: np.ndarray, zone: int = ZONE) -> np.ndarray:
    """Longitude and latitude (degrees, WGS84) of northern UTM points: inverse Krueger series, order 4."""
    n = 1.0 / (2.0 * 298.257223563 - 1.0)
    a = 6378137.0 / (1.0 + n) * (1.0 + n**2 / 4.0 + n**4 / 64.0)
    betas = (n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96 - n**4 / 360, n**2 / 48 + n**3 / 15 - 437 * n**4 / 1440,
             17 * n**3 / 480 - 37 * n**4 / 840, 4397 * n**4 / 161280)  # fmt: skip
    deltas = (2 * n - 2 * n**2 / 3 - 2 * n**3 + 116 * n**4 / 45, 7 * n**2 / 3 - 8 * n**3 / 5 - 227 * n**4 / 45,
              56 * n**3 / 15 - 136 * n**4 / 35, 4279 * n**4 / 630)  # fmt: skip
    xi, eta = points[:, 1] / (0.9996 * a), (points[:, 0] - 500_000.0) / (0.9996 * a)
    real = xi - sum(b * np.sin(2 * k * xi) * np.cosh(2 * k * eta) for k, b in enumerate(betas, 1))
    imaginary = eta - sum(b * np.cos(2 * k * xi) * np.sinh(2 * k * eta) for k, b in enumerate(betas, 1))
    chi = np.arcsin(np.sin(real) / np.cosh(imaginary))
    latitude = chi + sum(d * np.sin(2 * k * chi) for k, d in enumerate(deltas, 1))
    longitude = math.radians(zone * 6 - 183) + np.arctan2(np.sinh(imaginary), np.cos(real))
    return np.degrees(np.stack([longitude, latitude], axis=1))


@dataclass
class Lane:
    fid: int
    block: int
    index: int
    line: np.ndarray
    ring: np.ndarray
    limit: float | None
    start_lane: int = -1
    end_lane: int = -1


@dataclass
class Block:
    fid: int
    ring: np.ndarray
    lanes: list[int]
    start_block: int = -1
    end_block: int = -1


@dataclass
class Town:
    """Everything in UTM metres; lanes and connectors by fid, as are roadblocks and roadblock connectors."""

    lanes: dict[int, Lane] = field(default_factory=dict)
    connectors: dict[int, Lane] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    block_connectors: dict[int, Block] = field(default_factory=dict)
    intersections: dict[int, np.ndarray] = field(default_factory=dict)
    carparks: dict[int, np.ndarray] = field(default_factory=dict)
    crosswalks: dict[int, np.ndarray] = field(default_factory=dict)
    street: dict[tuple, int] = field(default_factory=dict)
    """Roadblock by its two junctions."""

    def lane(self, fid: int) -> Lane:
        return self.lanes.get(fid) or self.connectors[fid]


def strip(line: np.ndarray, width: float) -> np.ndarray:
    """The ring (left side forward, right side back) of a strip around a line."""
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    return np.concatenate([line + normal * width / 2, (line - normal * width / 2)[::-1]])


def make_town(size: int = 3, num_lanes: int = 2, spacing: float = 2.0, seed: int = 5) -> Town:
    """A grid of size x size junctions with streets both ways, `num_lanes` each, turned by 0.3 rad."""
    town, fids = Town(), _fids(seed)
    for a in itertools.product(range(size), repeat=2):
        for step in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            b = (a[0] + step[0], a[1] + step[1])
            if 0 <= b[0] < size and 0 <= b[1] < size:
                _add_street(town, fids, a, b, num_lanes, spacing)
        town.intersections[next(fids)] = _placed(_square(a, HALF_JUNCTION_M))
        if sum(a) % 2 == 0:
            town.carparks[next(fids)] = _placed(_square((a[0] + 0.5, a[1] + 0.5), 15.0))
        town.crosswalks[next(fids)] = _placed(_square((a[0] + 0.3, a[1]), 4.0))
    for (a, b), (b2, c) in itertools.product(town.street, repeat=2):
        if b == b2 and a != c:
            _add_turn(town, fids, (a, b), (b, c), spacing)
    return town


def _fids(seed: int):
    """Unordered fids, as in files that were edited."""
    return iter((np.random.default_rng(seed).permutation(200_000) + 1).tolist())


def _square(at: tuple[float, float], half: float) -> np.ndarray:
    return np.array(at) * BLOCK_M + half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


def _placed(points: np.ndarray) -> np.ndarray:
    cos, sin = math.cos(0.3), math.sin(0.3)
    return points @ np.array([[cos, sin], [-sin, cos]]) + CORNER


def _add_street(town: Town, fids, a: tuple, b: tuple, num_lanes: int, spacing: float) -> None:
    start, end = np.array(a) * BLOCK_M, np.array(b) * BLOCK_M
    unit = (end - start) / np.linalg.norm(end - start)
    right = np.array([unit[1], -unit[0]])
    along = np.linspace(
        HALF_JUNCTION_M, BLOCK_M - HALF_JUNCTION_M, round((BLOCK_M - 2 * HALF_JUNCTION_M) / spacing) + 1
    )
    block, lanes = next(fids), []
    for index in range(num_lanes):
        line = _placed(start + along[:, None] * unit + right * LANE_M * (index + 0.5))
        lane = Lane(next(fids), block, index, line, strip(line, LANE_M), None if index else 11.2)
        town.lanes[lane.fid] = lane
        lanes.append(lane.fid)
    middle = _placed(start + along[[0, -1], None] * unit + right * LANE_M * num_lanes / 2)
    town.blocks[block] = Block(block, strip(middle, LANE_M * num_lanes), lanes)
    town.street[a, b] = block


def _add_turn(town: Town, fids, before: tuple, after: tuple, spacing: float) -> None:
    into, out_of = town.blocks[town.street[before]], town.blocks[town.street[after]]
    step = [np.subtract(*pair[::-1]) for pair in (before, after)]
    turn = int(step[0][0] * step[1][1] - step[0][1] * step[1][0])
    pairs = list(zip(into.lanes, out_of.lanes, strict=True))
    pairs = pairs if turn == 0 else pairs[:1] if turn > 0 else pairs[-1:]
    group = Block(next(fids), np.zeros((0, 2)), [], into.fid, out_of.fid)
    for begin, end in pairs:
        line = _curve(town.lanes[begin].line, town.lanes[end].line, spacing)
        connector = Lane(next(fids), group.fid, 0, line, strip(line, LANE_M + 0.4), 8.0, begin, end)
        town.connectors[connector.fid] = connector
        group.lanes.append(connector.fid)
    outline = shapely.MultiPolygon([shapely.Polygon(town.connectors[fid].ring) for fid in group.lanes])
    group.ring = shapely.get_coordinates(outline.convex_hull.exterior)[:-1]
    town.block_connectors[group.fid] = group


def _curve(before: np.ndarray, after: np.ndarray, spacing: float) -> np.ndarray:
    first, last = before[-1], after[0]
    unit_in, unit_out = before[-1] - before[-2], after[1] - after[0]
    reach = np.linalg.norm(last - first) * 0.45
    a, b = (
        first + reach * unit_in / np.linalg.norm(unit_in),
        last - reach * unit_out / np.linalg.norm(unit_out),
    )
    t = np.linspace(0.0, 1.0, max(5, round(2.4 * reach / spacing)))[:, None]
    return (1 - t) ** 3 * first + 3 * t * (1 - t) ** 2 * a + 3 * t**2 * (1 - t) * b + t**3 * last


_POLYGONS, _LINES = "MULTIPOLYGON", "LINESTRING"


def write_maps(town: Town, folder: Path, change=None) -> Path:
    """Write the maps folder; `change` gets the open database before it is closed."""
    path = folder / LOCATION / VERSION / "map.gpkg"
    path.parent.mkdir(parents=True)
    (folder / "nuplan-maps-v1.0.json").write_text(json.dumps({LOCATION: {"version": VERSION, "layers": {}}}))
    database = sqlite3.connect(path)
    _write_skeleton(database)
    for layer, (kind, columns, rows) in _layers(town).items():
        _write_layer(database, layer, kind, columns, rows)
    if change is not None:
        change(database)
    database.commit()
    database.close()
    return folder


def _layers(town: Town) -> dict[str, tuple]:
    lanes, connectors = town.lanes.values(), town.connectors.values()
    paths = [(k, lane.line, (lane.fid, None)) for k, lane in enumerate(lanes, 1)]
    paths += [(k, lane.line, (None, lane.fid)) for k, lane in enumerate(connectors, 1 + len(paths))]
    areas = {
        "intersections": town.intersections,
        "carpark_areas": town.carparks,
        "crosswalks": town.crosswalks,
    }
    return {
        "lanes_polygons": (_POLYGONS, ("lane_fid", "lane_group_fid", "lane_index", "speed_limit_mps"), [
            (lane.fid, lane.ring, (lane.fid, lane.block, lane.index, lane.limit)) for lane in lanes]),
        "lane_groups_polygons": (_POLYGONS, ("lane_group_fid",), [
            (block.fid, block.ring, (block.fid,)) for block in town.blocks.values()]),
        # In these files the lane that a connector leaves is its exit lane, the one it enters its entry lane.
        "lane_connectors": (
            _LINES, ("lane_group_connector_fid", "exit_lane_fid", "entry_lane_fid", "speed_limit_mps"), [
            (c.fid, c.line, (c.block, c.start_lane, c.end_lane, c.limit)) for c in connectors]),
        "gen_lane_connectors_scaled_width_polygons": (_POLYGONS, ("lane_connector_fid",), [
            (k, c.ring, (c.fid,)) for k, c in enumerate(connectors, 1)]),
        "lane_group_connectors": (_POLYGONS, ("from_lane_group_fid", "to_lane_group_fid"), [
            (b.fid, b.ring, (b.start_block, b.end_block)) for b in town.block_connectors.values()]),
        "baseline_paths": (_LINES, ("lane_fid", "lane_connector_fid"), paths),
        **{name: (_POLYGONS, (), [(fid, ring, ()) for fid, ring in rings.items()]) for name, rings in areas.items()},
    }  # fmt: skip


def _write_skeleton(database: sqlite3.Connection) -> None:
    database.executescript("""
        PRAGMA application_id = 1196444487; PRAGMA user_version = 10300;
        CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER PRIMARY KEY,
          organization TEXT NOT NULL,
          organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
        CREATE TABLE gpkg_contents (table_name TEXT PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
          description TEXT, last_change DATETIME, min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE,
          srs_id INTEGER);
        CREATE TABLE gpkg_geometry_columns (table_name TEXT PRIMARY KEY, column_name TEXT NOT NULL,
          geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL, z TINYINT NOT NULL, m TINYINT NOT NULL);
        CREATE TABLE meta (fid INTEGER PRIMARY KEY, key TEXT, value TEXT);
        INSERT INTO gpkg_contents (table_name, data_type, identifier) VALUES ('meta', 'attributes', 'meta');
    """)
    definition = (
        'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],PRIMEM["Greenwich",0],'
        'UNIT["degree",0.0174532925199433],AUTHORITY["EPSG","4326"]]'
    )
    systems = [("WGS 84", 4326, "EPSG", 4326, definition, None), ("none", -1, "NONE", -1, "undefined", None)]
    database.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?,?,?,?,?,?)", systems)
    meta = [(1, "geographicCoordSystem", "epsg:4326"), (2, "projectedCoordSystem", f"epsg:{32600 + ZONE}")]
    database.executemany("INSERT INTO meta VALUES (?,?,?)", meta)


def _write_layer(database: sqlite3.Connection, layer: str, kind: str, columns: tuple, rows: list) -> None:
    names = "".join(f', "{name}"' for name in columns)
    typed = "".join(f', "{name}" {"REAL" if name.endswith("mps") else "INTEGER"}' for name in columns)
    database.execute(f'CREATE TABLE "{layer}" (fid INTEGER PRIMARY KEY, geom {kind}{typed})')
    database.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, srs_id) VALUES (?, 'features', ?, 4326)",
        (layer, layer),
    )
    database.execute("INSERT INTO gpkg_geometry_columns VALUES (?, 'geom', ?, 4326, 0, 0)", (layer, kind))
    marks = ", ".join("?" * (2 + len(columns)))
    database.executemany(
        f'INSERT INTO "{layer}" (fid, geom{names}) VALUES ({marks})',
        [(fid, geometry_blob(points, kind), *values) for fid, points, values in rows],
    )


def geometry_blob(points: np.ndarray, kind: str) -> bytes:
    """GeoPackage binary: header GP, version 0, little endian without envelope, srs 4326; then WKB."""
    degrees = from_utm(np.asarray(points))
    if kind == _LINES:
        shape = shapely.LineString(degrees)
    else:
        shape = shapely.MultiPolygon([shapely.Polygon(degrees)])
    return b"GP" + struct.pack("<BBi", 0, 1, 4326) + shapely.to_wkb(shape, byte_order=1)
