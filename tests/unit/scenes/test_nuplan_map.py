"""Areas of nuPlan maps that the scorer cannot take as they are: missing, crossing themselves, or with holes."""

import struct

import numpy as np
import pytest
import shapely

from autoscale_ray.evaluation import epdms
from autoscale_ray.evaluation.from_pool import scoring_scenes
from autoscale_ray.scenes.geopackage_child import _strips
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.readers.nuplan_map import open_map
from autoscale_ray.scenes.schema import POLYGON_LAYERS
from scenes import navsim_files as files
from scenes.navsim_town import LOCATION, from_utm, make_town, write_maps


@pytest.fixture(scope="module")
def town():
    return make_town(size=2)


@pytest.fixture(scope="module")
def drive(town):
    return files.make_drive(town, junctions=((0, 0), (1, 0), (1, 1)), num_frames=14, speed=5.0)


def _blob(shape, is_empty=False):
    """Return a GeoPackage geometry of a shape in UTM metres."""
    degrees = shapely.transform(shape, from_utm)
    return b"GP" + struct.pack("<BBi", 0, 17 if is_empty else 1, 4326) + shapely.to_wkb(degrees, byte_order=1)


def _setting(layer, fid, shape):
    blob = None if shape is None else _blob(shape, shape.is_empty)
    return lambda database: database.execute(f"UPDATE {layer} SET geom = ? WHERE fid = ?", (blob, fid))


def _pool(folder, town, drive, change=None):
    write_maps(town, folder / "maps", change=change)
    files.write_log(folder / "logs", files.frames_of(drive))
    ingest("navsim", folder / "logs", folder / "pool", "real", files={"maps": folder / "maps"})
    pool = open_pool(folder / "pool")
    assert pool.side_table("quarantine").num_rows == 0
    return pool


def _rings(pool, layer):
    """Return the rings of one layer of the only scene as polygons in map coordinates."""
    (row,) = pool.table([0]).to_pylist()
    cos, sin = np.cos(row["origin_yaw_rad"]), np.sin(row["origin_yaw_rad"])
    points = np.array(row["polygon_points"]).reshape(-1, 2) @ np.array([[cos, sin], [-sin, cos]])
    points += [row["origin_x_m"], row["origin_y_m"]]
    rings = np.split(points, row["polygon_offsets"][1:-1])
    wanted = POLYGON_LAYERS.index(layer)
    return [
        shapely.Polygon(ring)
        for ring, code in zip(rings, row["polygon_layer"], strict=True)
        if code == wanted
    ]


def _is_scored(pool):
    ((_, scene),) = scoring_scenes(pool)
    ahead = np.linspace(2.5, 20.0, 8)
    result = epdms([scene], np.stack([ahead, 0 * ahead, 0 * ahead], axis=1)[None, None])
    return bool(result.score.valid.all())


@pytest.mark.parametrize("shape", [None, shapely.Polygon(), shapely.MultiPolygon()])
def test_a_row_without_a_shape_is_left_out_of_its_layer(shape, tmp_path, town, drive):
    fid = min(town.intersections)
    whole = _rings(_pool(tmp_path / "whole", town, drive), "intersection")
    pool = _pool(tmp_path / "gap", town, drive, _setting("intersections", fid, shape))
    found = _rings(pool, "intersection")
    assert len(found) == len(whole) - 1
    missing = shapely.Polygon(town.intersections[fid])
    assert shapely.area(shapely.intersection(found, missing)).max() < 0.1
    assert _is_scored(pool)


def test_a_polygon_that_crosses_itself_is_mended(tmp_path, town, drive):
    """The corner of a junction is folded over: the scorer refuses the ring as it is stored."""
    fid, ring = next(iter(town.intersections.items()))
    to_second, to_first = ring[2] - ring[3], ring[0] - ring[3]
    crossed = shapely.Polygon([*ring[:3], ring[3] + 0.1 * to_first, ring[3] + 0.1 * to_second])
    assert not crossed.is_valid
    pool = _pool(tmp_path, town, drive, _setting("intersections", fid, crossed))
    found = _rings(pool, "intersection")
    assert all(polygon.is_valid for polygon in found)
    near = [polygon for polygon in found if shapely.intersects(polygon, crossed.envelope)]
    expected = shapely.make_valid(crossed).area
    assert sum(polygon.area for polygon in near) == pytest.approx(expected, abs=0.1)
    assert _is_scored(pool)


HOLES = {"one": [(0.0, 0.0, 3.0)], "three": [(-6.0, 5.0, 2.0), (-6.0, -5.0, 2.0), (5.0, 0.0, 2.5)]}


@pytest.mark.parametrize("name", HOLES)
def test_an_area_with_holes_comes_as_rings_that_leave_them_out(name, tmp_path, town, drive):
    """Random points: on the area by shapely's polygon with holes, and in one of the pool's rings."""
    fid, ring = next(iter(town.intersections.items()))
    center = np.mean(ring, axis=0)
    holes = [shapely.Point(np.add(center, (x, y))).buffer(radius).exterior for x, y, radius in HOLES[name]]
    area = shapely.Polygon(ring, holes)
    pool = _pool(tmp_path, town, drive, _setting("intersections", fid, area))
    found = [polygon for polygon in _rings(pool, "intersection") if polygon.distance(area) < 1.0]
    assert len(found) > 1
    assert sum(polygon.area for polygon in found) == pytest.approx(area.area, abs=0.1)
    points = shapely.points(np.random.default_rng(0).uniform(-14.0, 14.0, (4000, 2)) + center)
    clear = shapely.distance(area.boundary, points) > 0.01
    inside = np.sum([shapely.contains(polygon, points) for polygon in found], axis=0)
    cut = np.min([shapely.distance(polygon.boundary, points) for polygon in found], axis=0) > 0.01
    np.testing.assert_array_equal(inside[clear & cut], shapely.contains(area, points)[clear & cut])
    assert _is_scored(pool)
    road = open_map(tmp_path / "maps", LOCATION)
    (stored,) = road.shapes_S[(road.fid_S == fid) & (road.layer_S == POLYGON_LAYERS.index("intersection"))]
    assert stored.symmetric_difference(area).area < 0.1


def test_strips_have_no_holes_and_cover_the_area():
    """Also where the outer ring crosses itself, and holes lie above one another or touch."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        outer = shapely.Point(0.0, 0.0).buffer(20.0)
        places = rng.uniform(-12.0, 12.0, (5, 2))
        area = outer.difference(
            shapely.union_all([shapely.Point(*place).buffer(2.0, quad_segs=2) for place in places])
        )
        strips = _strips(area)
        assert not shapely.get_num_interior_rings(strips).any()
        assert shapely.area(strips).sum() == pytest.approx(area.area, rel=1e-9)
        assert shapely.union_all(strips).symmetric_difference(area).area < 1e-9
    crossed = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)], [[(8, 4), (9, 4), (9, 6), (8, 6)]])
    assert shapely.is_valid(_strips(crossed)).all()
