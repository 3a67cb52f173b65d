"""Broken and hostile logs, maps and filters: a quarantine row or one clear line, never a traceback or a hang."""

import os
import pickle
import sqlite3

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import AutoScaleError, InputRejectedError, InvalidInputError, MissingExtraError
from autoscale_ray.scenes import geopackage, geopackage_child
from autoscale_ray.scenes.batch import batch_from_table
from autoscale_ray.scenes.gates import gate
from autoscale_ray.scenes.geopackage import read_geopackage
from autoscale_ray.scenes.ingest import READER_FAULT, ingest
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.readers import navsim, nuplan_map
from autoscale_ray.scenes.readers.nuplan_map import map_files, open_map
from scenes import navsim_files as files
from scenes.navsim_town import LOCATION, VERSION, make_town, write_maps

LAYERS = {"meta": ("key", "value"), "intersections": ()}


@pytest.fixture(scope="module")
def town():
    return make_town(size=2)


@pytest.fixture(scope="module")
def maps(town, tmp_path_factory):
    return write_maps(town, tmp_path_factory.mktemp("town"))


@pytest.fixture(scope="module")
def drive(town):
    return files.make_drive(town, junctions=((0, 0), (1, 0), (1, 1)), num_frames=16, speed=5.0)


def _ingested(tmp_path, maps, **extra):
    """Ingest the logs of a folder; the pool and its quarantine rows."""
    ingest("navsim", tmp_path / "logs", tmp_path / "pool", "real", files={"maps": maps, **extra})
    pool = open_pool(tmp_path / "pool", allow_empty=True)
    return pool, pool.side_table("quarantine").to_pylist()


def _set(frame, *keys_and_value):
    *keys, last, value = keys_and_value
    for key in keys:
        frame = frame[key]
    frame[last] = value


LOGS = {
    "missing key": (lambda f: f[2].pop("timestamp"), "frame 2", "must have the key timestamp"),
    "missing annotations": (lambda f: f[2].pop("anns"), "frame 2", "must have the key anns"),
    "missing boxes": (lambda f: f[2]["anns"].pop("gt_boxes"), "frame 2: anns", "must have the key gt_boxes"),
    "box shape": (lambda f: _set(f[1], "anns", "gt_boxes", np.zeros((3, 6))), "frame 1: anns: gt_boxes", "n x 7"),
    "box count": (lambda f: _set(f[1], "anns", "gt_boxes", np.zeros((1, 7))), "frame 1: anns", "as many boxes"),
    "box texts": (lambda f: _set(f[1], "anns", "gt_boxes", [["a"] * 7]), "frame 1: anns: gt_boxes", "numbers"),
    "ragged boxes": (lambda f: _set(f[1], "anns", "gt_boxes", [[1.0], [2.0, 3.0]]), "gt_boxes", "numbers"),
    "unknown type": (lambda f: f[0]["anns"]["gt_names"].__setitem__(0, "dragon"), "gt_names", "must be one of"),
    "pose shape": (lambda f: _set(f[3], "ego2global_translation", np.zeros(2)), "ego2global_translation", "3 numbers"),
    "no rotation": (lambda f: _set(f[3], "ego2global_rotation", np.zeros(4)), "frame 3", "unit quaternion"),
    "command": (lambda f: _set(f[3], "driving_command", [1, 0, 0]), "driving_command", "4 numbers"),
    "time as text": (lambda f: _set(f[3], "timestamp", "now"), "frame 3: timestamp", "microseconds"),
    "lights": (lambda f: _set(f[3], "traffic_lights", [("x", True)]), "traffic_lights", "lane connector"),
    "long light": (lambda f: _set(f[3], "traffic_lights", [("9" * 5000, True)]), "traffic_lights", "lane connector"),
    "two lights": (lambda f: _set(f[3], "traffic_lights", [("9", np.ones(2))]), "traffic_lights", "lane connector"),
    "route": (lambda f: _set(f[3], "roadblock_ids", "12"), "roadblock_ids", "list of roadblock ids"),
    "token": (lambda f: _set(f[3], "token", ""), "frame 3: token", "must be a text"),
    "two logs": (lambda f: _set(f[3], "log_name", "other"), "log_name", "the same in every frame"),
    "unknown map": (lambda f: [_set(g, "map_location", "atlantis") for g in f], "map_location", "must be one of"),
    "no frames": (lambda f: f.clear(), "", "list of frames"),
    "mixed frames": (lambda f: f.insert(4, 7), "frame 4", "must have the key"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_a_malformed_log_is_one_quarantine_row(name, tmp_path, maps, drive):
    change, element, rule = LOGS[name]
    frames = files.frames_of(drive)
    change(frames)
    files.write_log(tmp_path / "logs", frames, "bad")
    pool, (row,) = _ingested(tmp_path, maps)
    assert len(pool) == 0
    assert row["file"] == "bad.pkl"
    assert element in row["element"]
    assert rule in row["rule"]


SCENES = {
    "NaN pose": (lambda f: _set(f[14], "ego2global_translation", np.array([np.nan, 0, 0])), 2, "finite"),
    "NaN speed": (lambda f: _set(f[14], "ego_dynamic_state", [np.nan, 0, 0, 0]), 2, "finite"),
    "NaN box": (lambda f: f[0]["anns"]["gt_boxes"].__setitem__((0, 0), np.inf), 1, "finite"),
    "unknown roadblock": (lambda f: _set(f[3], "roadblock_ids", ["999999"]), 1, "roadblocks of the route"),
    "long roadblock": (lambda f: _set(f[3], "roadblock_ids", ["9" * 5000]), 1, "roadblocks of the route"),
    "roadblock text": (lambda f: _set(f[3], "roadblock_ids", ["12x"]), 1, "roadblocks of the route"),
    "missing second": (lambda f: [_set(g, "timestamp", g["timestamp"] + 500_000) for g in f[14:]], 2, "0.5 s apart"),
    "time backwards": (lambda f: _set(f[15], "timestamp", f[14]["timestamp"] - 1), 1, "0.5 s apart"),
    "track twice": (
        lambda f: _set(f[1], "anns", "track_tokens", ["t"] * len(f[1]["anns"]["track_tokens"])), 2, "unique in a frame"
    ),
    "token twice": (lambda f: _set(f[5], "token", f[4]["token"]), 1, "unique in a log"),
    "teleport": (lambda f: _set(f[15], "ego2global_translation", f[3]["ego2global_translation"] + 40.0), 1, "velocity"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_a_bad_scene_goes_alone(name, tmp_path, maps, drive):
    change, num_bad, rule = SCENES[name]
    frames = files.frames_of(drive)
    change(frames)
    files.write_log(tmp_path / "logs", frames)
    pool, rows = _ingested(tmp_path, maps)
    assert len(rows) == num_bad
    assert all(rule in row["rule"] for row in rows)
    assert len(pool) == 3 - num_bad, "16 frames give three windows"


@pytest.mark.parametrize("no_route", [[], ["None"], np.array(["None"])])
def test_frames_without_a_route_are_no_scenes(no_route, tmp_path, maps, drive):
    """OpenScene writes the roadblocks of a nuPlan scene without any as the text None."""
    frames = files.frames_of(drive)
    frames[4]["roadblock_ids"] = no_route
    files.write_log(tmp_path / "logs", frames)
    pool, rows = _ingested(tmp_path, maps)
    assert (len(pool), rows) == (2, [])
    chosen = files.write_filter(tmp_path / "all.yaml", has_route=False)
    ingest("navsim", tmp_path / "logs", tmp_path / "other", "real", files={"maps": maps, "filter": chosen})
    (row,) = open_pool(tmp_path / "other").side_table("quarantine").to_pylist()
    assert row["rule"] == "must have a route"


def test_the_same_token_in_two_logs_is_kept_once(tmp_path, maps, drive):
    for name in ("a", "b"):
        files.write_log(tmp_path / "logs", files.frames_of(drive), name)
    pool, rows = _ingested(tmp_path, maps)
    assert (len(pool), len(rows)) == (3, 3)
    assert {row["rule"] for row in rows} == {"scene_id must be unique in a pool"}


class _Attack:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


@pytest.mark.parametrize("place", ["whole", "frame", "field", "array"])
def test_a_pickle_that_runs_a_command_is_refused(place, tmp_path, maps, drive, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = files.frames_of(drive)
    payload = {"whole": _Attack(), "frame": [*frames, _Attack()]}.get(place, frames)
    if place == "field":
        frames[3]["vehicle_name"] = _Attack()
    if place == "array":
        frames[3]["can_bus"] = np.array([_Attack()], dtype=object)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad.pkl").write_bytes(pickle.dumps(payload, protocol=2))
    pool, (row,) = _ingested(tmp_path, maps)
    assert len(pool) == 0
    assert "plain values" in row["rule"]
    assert not (tmp_path / "pickle-was-run").exists()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_logs_give_scenes_or_one_refusal(data, tmp_path, maps, drive):
    content = bytearray(pickle.dumps(files.frames_of(drive)[:15], protocol=4))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 6))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "log.pkl"
    path.write_bytes(content)
    try:
        tables = list(navsim.read_scenes({"maps": maps}, path, "log.pkl", "real"))
    except InputRejectedError:
        return
    for table, refused in tables:
        kept, gated = gate(table, "log.pkl") if len(table) else (table, refused[:0])
        assert len(kept) + len(gated) == len(table)
        batch = batch_from_table(kept)
        assert bool(batch.ego_states_NT7.isfinite().all())
        assert bool(batch.agent_states_AT5.isfinite().all())


POINT = "47500001E6100000010100000000000000000000000000000000000000"


def _sql(*statements):
    return lambda database: [database.execute(statement) for statement in statements]


MAPS = {
    "no meta": (_sql("DROP TABLE meta", "DELETE FROM gpkg_contents WHERE table_name='meta'"), "has no layer meta"),
    "no projection": (_sql("DELETE FROM meta WHERE key='projectedCoordSystem'"), "projectedCoordSystem"),
    "unknown projection": (_sql("UPDATE meta SET value='epsg:99999' WHERE fid=2"), "projectedCoordSystem"),
    "projection program": (_sql("UPDATE meta SET value='+proj=utm +nadgrids=/etc/passwd'"), "projectedCoordSystem"),
    "no lanes": (
        _sql(
            "DROP TABLE lanes_polygons",
            "DELETE FROM gpkg_contents WHERE table_name='lanes_polygons'",
            "DELETE FROM gpkg_geometry_columns WHERE table_name='lanes_polygons'",
        ),
        "has no layer lanes_polygons",
    ),
    "no column": (_sql("ALTER TABLE lanes_polygons DROP COLUMN lane_group_fid"), "no column lane_group_fid"),
    "view": (_sql("CREATE VIEW v AS WITH RECURSIVE c AS (SELECT 1 UNION ALL SELECT 2 FROM c) SELECT * FROM c"), "view"),
    "trigger": (_sql("CREATE TRIGGER t AFTER INSERT ON meta BEGIN SELECT load_extension('x'); END"), "trigger"),
    "virtual table": (_sql("CREATE VIRTUAL TABLE f USING fts5(x)"), "virtual table"),
    "broken geometry": (_sql("UPDATE intersections SET geom = x'47500001E6100000010300'"), "intersections must have"),
    "geometry as text": (_sql("UPDATE carpark_areas SET geom = 'road'"), "layer carpark_areas must have polygons"),
    "points": (_sql(f"UPDATE baseline_paths SET geom = x'{POINT}'"), "lines or polygons"),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_a_bad_map_gives_one_clear_line(name, tmp_path, town, monkeypatch):
    # The child's work is done in this process, which is much faster; two tests below go through the child.
    monkeypatch.setattr(
        geopackage,
        "_asked",
        lambda path, layers, optional: geopackage_child.answer(str(path), layers, optional),
    )
    change, message = MAPS[name]
    write_maps(town, tmp_path / "maps", change=change)
    with pytest.raises(InputRejectedError, match=message) as caught:
        open_map(tmp_path / "maps", LOCATION)
    assert "\n" not in str(caught.value)
    assert "map.gpkg" in str(caught.value)


def test_a_bad_map_refuses_its_logs_and_not_the_run(tmp_path, town, drive):
    write_maps(town, tmp_path / "maps", change=MAPS["no projection"][0])
    files.write_log(tmp_path / "logs", files.frames_of(drive))
    pool, (row,) = _ingested(tmp_path, tmp_path / "maps")
    assert len(pool) == 0
    assert row["rule"] != READER_FAULT


GAPS = {
    "no base line": (_sql("DELETE FROM baseline_paths WHERE lane_fid IS NOT NULL"), "lane"),
    "no connector area": (_sql("DELETE FROM gen_lane_connectors_scaled_width_polygons"), "lane_connector"),
}


@pytest.mark.parametrize("name", GAPS)
def test_scenes_beside_a_gap_of_the_map_are_refused_with_its_place(name, tmp_path, town, drive):
    change, layer = GAPS[name]
    write_maps(town, tmp_path / "maps", change=change)
    files.write_log(tmp_path / "logs", files.frames_of(drive))
    pool, rows = _ingested(tmp_path, tmp_path / "maps")
    assert (len(pool), len(rows)) == (0, 3)
    for row in rows:
        assert "must have a base line" in row["rule"] or "must have lanes" in row["rule"]
        kind, _, fid = row["value"].partition(" ")
        assert kind == layer or row["rule"] == "the route must have lanes"
        assert fid.isdecimal() or row["value"].isdecimal()


def test_files_that_are_no_database_or_damaged_are_refused(tmp_path, maps):
    whole = (maps / LOCATION / VERSION / "map.gpkg").read_bytes()
    for number, content in enumerate((b"road", b"SQLite format 3\0" + b"x" * 5000, whole[:-4096])):
        path = tmp_path / f"{number}.gpkg"
        path.write_bytes(content)
        with pytest.raises(InputRejectedError, match="sound GeoPackage"):
            read_geopackage(path, LAYERS)
    plain = tmp_path / "plain.gpkg"
    with sqlite3.connect(plain) as database:
        database.execute("CREATE TABLE t (x)")
    database.close()
    with pytest.raises(InputRejectedError, match="gpkg_contents"):
        read_geopackage(plain, LAYERS)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    places=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 7)), min_size=1, max_size=40),
    cut=st.booleans(),
)
def test_damaged_maps_give_a_map_or_one_refusal(places, cut, tmp_path, maps):
    content = bytearray((maps / LOCATION / VERSION / "map.gpkg").read_bytes())
    content = content[: places[0][0] % len(content)] if cut else content
    for place, bit in places:
        if content:
            content[place % len(content)] ^= 1 << bit
    path = tmp_path / "damaged.gpkg"
    path.write_bytes(content)
    # In this process for speed; the reader does the same in a child under limits.
    reply = geopackage_child.answer(str(path), nuplan_map._LAYERS, nuplan_map._OPTIONAL)
    assert reply[:1] in (b"+", b"-")
    if reply[:1] == b"-":
        return
    try:
        road = nuplan_map.build_map(geopackage.decoded(reply[1:], nuplan_map._LAYERS), LOCATION, "map.gpkg")
    except InputRejectedError:
        return
    assert np.isfinite(road.base_V3).all()
    assert np.isfinite(road.ring_points_W2).all()


def test_a_geopackage_written_by_gdal_with_its_indexes_is_read(tmp_path):
    import pyogrio
    from pyogrio import raw

    pyogrio.set_gdal_config_options({"OGR_SQLITE_PRAGMA": None})  # other tests read in this process, guarded
    path = tmp_path / "gdal.gpkg"
    square = shapely.to_wkb(np.array([shapely.box(0, 1, 2, 3)], dtype=object))
    raw.write(str(path), square, [np.array([7.5])], ["height"], layer="squares", driver="GPKG", geometry_type="Polygon",
              crs="EPSG:4326", SPATIAL_INDEX="YES")  # fmt: skip
    with sqlite3.connect(path) as database:
        kinds = [kind for (kind,) in database.execute("SELECT type FROM sqlite_master")]
    database.close()
    assert "trigger" in kinds
    layer = read_geopackage(path, {"squares": ("height",), "other": ()}, optional=("other",))["squares"]
    assert (layer.crs, layer.columns["height"].tolist()) == ("EPSG:4326", [7.5])
    assert sorted(map(tuple, layer.points_W2.tolist())) == [(0, 1), (0, 3), (2, 1), (2, 3)]


def _add_tiles(database, data_type="tiles", suffix="zoom_insert"):
    """Add a picture as OGC 12-128 (tables for tiles, annex on their triggers) and GDAL have it."""
    database.executescript("""
        CREATE TABLE IF NOT EXISTS gpkg_tile_matrix_set (table_name TEXT PRIMARY KEY, srs_id INTEGER NOT NULL,
          min_x DOUBLE NOT NULL, min_y DOUBLE NOT NULL, max_x DOUBLE NOT NULL, max_y DOUBLE NOT NULL);
        CREATE TABLE IF NOT EXISTS gpkg_tile_matrix (table_name TEXT NOT NULL, zoom_level INTEGER NOT NULL,
          matrix_width INTEGER NOT NULL, matrix_height INTEGER NOT NULL, tile_width INTEGER NOT NULL,
          tile_height INTEGER NOT NULL, pixel_x_size DOUBLE NOT NULL, pixel_y_size DOUBLE NOT NULL,
          PRIMARY KEY (table_name, zoom_level));
        CREATE TABLE intensity (id INTEGER PRIMARY KEY AUTOINCREMENT, zoom_level INTEGER NOT NULL,
          tile_column INTEGER NOT NULL, tile_row INTEGER NOT NULL, tile_data BLOB NOT NULL,
          UNIQUE (zoom_level, tile_column, tile_row));
        INSERT INTO gpkg_tile_matrix_set VALUES ('intensity', 4326, -116, 35, -115, 37);
        INSERT INTO gpkg_tile_matrix VALUES ('intensity', 0, 1, 1, 256, 256, 0.004, 0.008);
        INSERT INTO intensity (zoom_level, tile_column, tile_row, tile_data) VALUES (0, 0, 0, x'89504E47');
    """)
    database.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, srs_id) VALUES ('intensity', ?, 'i', 4326)",
        (data_type,),
    )
    for ending in (suffix, "tile_column_update", "tile_row_insert"):
        event = "UPDATE OF zoom_level" if ending.endswith("update") else "INSERT"
        database.execute(f"""CREATE TRIGGER "intensity_{ending}" BEFORE {event} ON "intensity" FOR EACH ROW BEGIN
            SELECT RAISE(ABORT, 'constraint') WHERE NOT (NEW.zoom_level IN (SELECT zoom_level FROM gpkg_tile_matrix
            WHERE table_name = 'intensity')); END""")


@pytest.mark.parametrize("data_type", ["tiles", "2d-gridded-coverage"])
def test_a_map_with_pictures_beside_its_layers_is_read(data_type, tmp_path, town):
    write_maps(town, tmp_path / "maps", change=lambda database: _add_tiles(database, data_type))
    road = open_map(tmp_path / "maps", LOCATION)
    assert road.num_lanes == len(town.lanes) + len(town.connectors)


STRANGE_TRIGGERS = {
    "another table": (lambda database: _add_tiles(database, "features"), "trigger intensity_zoom_insert"),
    "another name": (lambda database: _add_tiles(database, suffix="zoom_inserted"), "trigger intensity_zoom_inserted"),
    "on another table": (
        lambda database: [
            _add_tiles(database),
            database.execute("DROP TRIGGER intensity_zoom_insert"),
            database.execute("CREATE TRIGGER intensity_zoom_insert AFTER INSERT ON meta BEGIN SELECT 1; END"),
        ],
        "trigger intensity_zoom_insert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE_TRIGGERS)
def test_triggers_that_are_not_those_of_a_table_of_tiles_are_refused(name, tmp_path, town):
    change, message = STRANGE_TRIGGERS[name]
    write_maps(town, tmp_path / "maps", change=change)
    reply = geopackage_child.answer(str(tmp_path / "maps" / LOCATION / VERSION / "map.gpkg"), LAYERS, ())
    assert reply == b"-holds the " + message.encode()


INDEXES = {
    "none": None,
    "no JSON": "{",
    "a list": "[1]",
    "no version": '{"a": {}}',
    "outside": '{"a": {"version": "../../secret"}}',
    "absolute": '{"/etc": {"version": "1"}}',
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_bad_index_of_maps_gives_one_clear_line(name, tmp_path):
    if INDEXES[name] is not None:
        (tmp_path / "nuplan-maps-v1.0.json").write_text(INDEXES[name])
    with pytest.raises(InputRejectedError, match="nuplan-maps"):
        map_files(tmp_path)


def test_what_is_needed_beside_the_logs_is_asked_for(tmp_path, maps, drive):
    files.write_log(tmp_path / "logs", files.frames_of(drive))
    run = lambda **beside: ingest("navsim", tmp_path / "logs", tmp_path / "pool", "real", files=beside)  # noqa: E731
    with pytest.raises(InvalidInputError, match="maps: the format navsim needs"):
        run()
    with pytest.raises(InvalidInputError, match="nuplan-maps"):
        run(maps=tmp_path)
    with pytest.raises(InvalidInputError, match="vocabulary: is nothing"):
        run(maps=maps, vocabulary=tmp_path)
    with pytest.raises(InvalidInputError, match="maps: is nothing that the format kitti uses"):
        ingest("kitti", tmp_path / "logs", tmp_path / "pool", "real", files={"maps": maps})


def test_missing_packages_give_one_clear_line(tmp_path, maps, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyproj", None)
    (tmp_path / "log.pkl").touch()
    with pytest.raises(
        MissingExtraError, match=r"pyproj is not installed: pip install '\.\[navsim\]' in a clone"
    ):
        ingest("navsim", tmp_path / "log.pkl", tmp_path / "pool", "real", files={"maps": maps})
    nuplan_map._cached_map.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[navsim\]'"):
        open_map(maps, LOCATION)
    blocker = tmp_path / "pyogrio.py"
    blocker.write_text("raise ImportError('blocked', name='pyogrio')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingExtraError, match="pyogrio is not installed") as caught:
        read_geopackage(maps / LOCATION / VERSION / "map.gpkg", LAYERS)
    assert isinstance(caught.value, AutoScaleError)
