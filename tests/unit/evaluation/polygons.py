"""Scenes without a road, and scenes with a square for a road."""

from __future__ import annotations

import pyarrow as pa

NOTHING = {
    "polygon_points": [],
    "polygon_offsets": [0],
    "polygon_layer": [],
    "polygon_lane": [],
    "polygon_on_route": [],
    "polygon_red": [],
}


def without_polygons(table: pa.Table) -> pa.Table:
    """Return scenes as from a source without a map."""
    return _replaced(table, NOTHING)


def with_polygon(table: pa.Table, layer: int) -> pa.Table:
    """Return scenes whose only polygon is a square of 1 km on this layer."""
    square = {
        "polygon_points": [-500.0, -500.0, 500.0, -500.0, 500.0, 500.0, -500.0, 500.0],
        "polygon_offsets": [0, 4],
        "polygon_layer": [layer],
        "polygon_lane": [-1],
        "polygon_on_route": [False],
        "polygon_red": [False] * 15,
    }
    return _replaced(table, square)


def _replaced(table: pa.Table, values: dict[str, list]) -> pa.Table:
    for name, value in values.items():
        place, kind = table.schema.get_field_index(name), table.schema.field(name)
        table = table.set_column(place, kind, pa.array([value] * len(table), kind.type))
    return table
