"""The child process that opens GeoPackage files from outside; it answers with plain arrays only.

A GeoPackage is an SQLite database, and a database can hold programs: views, triggers, virtual tables. So the file is
first opened by SQLite alone with its guarded settings (https://www.sqlite.org/security.html: untrusted schema, checked
cells, reduced limits, a budget of steps, no memory map) and only then by GDAL, which gets the same settings. What a
damaged file may do to these libraries stays in this process, which runs under limits on memory, time and files.
"""

from __future__ import annotations

import io
import json
import re
import resource
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

import numpy as np
import shapely

MEMORY_BYTES = 6 << 30
CPU_SECONDS = 300
MAX_STEPS = 20_000_000
MAX_HOLES = 1000
_PROCESS_LIMITS = {
    resource.RLIMIT_AS: MEMORY_BYTES,
    resource.RLIMIT_CPU: CPU_SECONDS,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_FSIZE: 0,
}
_PRAGMAS = {"trusted_schema": "OFF", "cell_size_check": "ON", "mmap_size": "0", "query_only": "ON"}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 64 << 20,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 20,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 3,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
}
# What the standard itself (and GDAL) puts into a file: spatial indexes, kept up by triggers that fire on writing only.
_STANDARD_TRIGGER = re.compile(r"(rtree_|trigger_(insert|delete)_feature_count_|gpkg_)\w*")
# The same for tables of raster tiles, whose triggers GDAL names after the table.
_TILE_TRIGGERS = tuple(
    f"_{column}_{event}" for column in ("zoom", "tile_column", "tile_row") for event in ("insert", "update")
)
_TILE_TABLES = "SELECT table_name FROM gpkg_contents WHERE data_type IN ('tiles', '2d-gridded-coverage')"
_SPATIAL_INDEX = re.compile(r"CREATE VIRTUAL TABLE \"?rtree_\w+\"? USING rtree\s*\(\s*[\w\s,]*\)\s*")


class Refused(ValueError):
    """The file was not read."""


def check_database(path: str) -> None:
    """Refuse a file that is no GeoPackage, is damaged, or holds programs other than the standard's own.

    Raises:
        Refused: With the reason.
    """
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise Refused("is not an SQLite database")
    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True)
    try:
        for category, limit in _LIMITS.items():
            connection.setlimit(category, limit)
        connection.set_progress_handler(_step_counter(), 1000)
        for name, value in _PRAGMAS.items():
            connection.execute(f"PRAGMA {name}={value}")
        _check_schema(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall())
        _check_triggers(connection)
        found = connection.execute("PRAGMA quick_check(1)").fetchall()
    except (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise Refused(f"damaged: {error}") from None
    finally:
        connection.close()
    if found != [("ok",)]:
        raise Refused(f"damaged: {str(found[:1])[:200]}")


def _step_counter() -> Callable[[], int]:
    left = [MAX_STEPS // 1000]

    def count() -> int:
        left[0] -= 1
        return int(left[0] < 0)

    return count


def _check_schema(entries: Sequence[tuple[object, object, object]]) -> None:
    for kind, name, sql in entries:
        text = str(sql or "")
        virtual = re.match(r"\s*CREATE\s+VIRTUAL", text, re.IGNORECASE) is not None
        if kind == "view" or (virtual and not _SPATIAL_INDEX.fullmatch(text)):
            raise Refused(f"holds the view or virtual table {name}")
    if not any(kind == "table" and name == "gpkg_contents" for kind, name, _ in entries):
        raise Refused("has no table gpkg_contents")


def _check_triggers(connection: sqlite3.Connection) -> None:
    """Refuse triggers that neither the standard nor, on a table of tiles, GDAL writes; there are no views any more."""
    found = connection.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger'").fetchall()
    others = [entry for entry in found if not _STANDARD_TRIGGER.fullmatch(str(entry[0]))]
    tables = {name for (name,) in connection.execute(_TILE_TABLES)} if others else set()
    for name, table in others:
        if table not in tables or name not in [f"{table}{ending}" for ending in _TILE_TRIGGERS]:
            raise Refused(f"holds the trigger {name}")


def read_layers(
    path: str, layers: Mapping[str, Sequence[str]], optional: Sequence[str]
) -> dict[str, np.ndarray]:
    """Read layers as arrays named ``layer/part``.

    Parts: ``fid``, each wanted column (numbers as float64, NaN for null, or texts), and for geometries ``crs``, the
    vertices of their parts (``points``, ``offsets``; outer rings of polygons, unclosed), the row of each part
    (``row``) and whether it is a polygon with holes (``holes``). A polygon with holes comes as several without.

    Args:
        path: A file that `check_database` accepted.
        layers: Wanted columns by layer.
        optional: Layers that may be missing.

    Raises:
        Refused: A layer or column is missing or malformed.
    """
    import pyogrio

    pyogrio.set_gdal_config_options(
        {"OGR_SQLITE_PRAGMA": ",".join(f"{name}={value}" for name, value in _PRAGMAS.items())}
    )
    present = {str(name) for name in pyogrio.list_layers(path)[:, 0]}
    arrays: dict[str, np.ndarray] = {}
    for layer, columns in layers.items():
        if layer in present:
            parts = _read_layer(path, layer, list(columns))
            arrays |= {f"{layer}/{name}": value for name, value in parts.items()}
        elif layer not in optional:
            raise Refused(f"has no layer {layer}")
    return arrays


def _read_layer(path: str, layer: str, columns: list[str]) -> dict[str, np.ndarray]:
    from pyogrio import raw

    meta, fid, geometry, values = raw.read(
        path, layer=layer, columns=columns, return_fids=True, force_2d=True
    )
    found = dict(zip(meta["fields"].tolist(), values, strict=True))
    missing = [name for name in columns if name not in found]
    if missing:
        raise Refused(f"layer {layer} has no column {missing[0]}")
    parts = {name: _column(found[name], f"layer {layer}: {name}") for name in columns}
    parts["fid"] = np.asarray(fid, dtype=np.int64)
    if geometry is None:
        return parts
    parts["crs"] = np.array(str(meta["crs"] or ""))
    return parts | _geometry_parts(geometry, layer)


def _column(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    if values.dtype.kind == "O" and all(value is None or isinstance(value, str) for value in values):
        return np.array(["" if value is None else value for value in values], dtype=str)
    raise Refused(f"{where} must hold numbers or texts")


def _geometry_parts(wkb: np.ndarray, layer: str) -> dict[str, np.ndarray]:
    try:
        shapes = shapely.from_wkb(wkb)
    except shapely.GEOSException as error:
        raise Refused(f"layer {layer}: geometry must be readable: {error}") from None
    parts, row = _without_holes(*shapely.get_parts(shapes, return_index=True), layer)
    kind = shapely.get_type_id(parts)
    polygon = kind == shapely.GeometryType.POLYGON
    if not (polygon | (kind == shapely.GeometryType.LINESTRING)).all():
        raise Refused(f"layer {layer}: geometries must be lines or polygons")
    outline = np.where(polygon, shapely.get_exterior_ring(parts), parts)
    points, owner = shapely.get_coordinates(outline, return_index=True)
    if not np.isfinite(points).all():
        raise Refused(f"layer {layer}: coordinates must be finite")
    counts = np.bincount(owner, minlength=len(parts))
    ends = np.cumsum(counts)
    kept = np.ones(len(points), dtype=bool)
    kept[ends[polygon & (counts > 0)] - 1] = False  # the closing vertex repeats the first
    return {
        "points": points[kept],
        "offsets": np.concatenate([[0], np.cumsum(counts - (polygon & (counts > 0)))]),
        "row": row,
        "holes": shapely.get_num_interior_rings(parts) > 0,
    }


def _without_holes(parts: np.ndarray, row: np.ndarray, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Cut polygons with holes into strips whose borders run through the holes: simple rings can tell these."""
    num_holes = shapely.get_num_interior_rings(parts)
    if not num_holes.any():
        return parts, row
    if num_holes.max() > MAX_HOLES:
        raise Refused(f"layer {layer}: a polygon must have at most {MAX_HOLES} holes")
    cut = [_strips(part) if holes else np.array([part]) for part, holes in zip(parts, num_holes, strict=True)]
    return np.concatenate(cut), np.repeat(row, [len(pieces) for pieces in cut])


def _strips(polygon: shapely.Polygon) -> np.ndarray:
    """Return polygons that touch along lines and cover one with holes; one that cannot be cut as it is."""
    holes = shapely.polygons(shapely.get_rings(polygon)[1:])
    try:
        whole = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
        low, bottom, high, top = whole.bounds
        cuts = np.unique(np.clip(shapely.get_x(shapely.point_on_surface(holes)), low, high))
        sides = np.concatenate([[low], cuts, [high]])
        below, above = np.full(len(cuts) + 1, bottom), np.full(len(cuts) + 1, top)
        strips = shapely.intersection(whole, shapely.box(sides[:-1], below, sides[1:], above))
    except shapely.GEOSException:
        return np.array([polygon])
    pieces = shapely.get_parts(strips)
    kept = pieces[shapely.area(pieces) > 0.0]
    return kept if len(kept) else np.array([polygon])


def answer(path: str, layers: Mapping[str, Sequence[str]], optional: Sequence[str]) -> bytes:
    """Return ``+`` and the arrays of a GeoPackage, ``-`` and why it was refused, or ``?`` and a missing package."""
    body = io.BytesIO()
    try:
        check_database(path)
        np.savez(body, **read_layers(path, layers, optional))  # pyright: ignore[reportArgumentType]
    except Refused as error:
        return b"-" + str(error).encode(errors="replace")[:500]
    except ImportError as error:
        return b"?" + str(error.name).encode()
    except (Exception, RecursionError) as error:
        return b"-" + f"damaged: {type(error).__name__}: {error}".encode(errors="replace")[:500]
    return b"+" + body.getvalue()


def main(path: str, layers: str, optional: str) -> None:
    """Write the answer about a file to standard output, under limits; the arguments are JSON but for the path."""
    for kind, limit in _PROCESS_LIMITS.items():
        resource.setrlimit(kind, (limit, limit))
    sys.stdout.buffer.write(answer(path, json.loads(layers), json.loads(optional)))
    sys.stdout.buffer.flush()
