"""NAVSIM's pickles: what is read from them, and what is refused, always with one clear line."""

import collections
import lzma
import os
import pickle
import struct
import typing
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.navsim_child import plain_file
from autoscale_ray.scenes.navsim_pickle import Geometry, decode_wkb, unpack
from autoscale_ray.scenes.pickle_child import Refused, answer
from autoscale_ray.scenes.readers.metric_cache import (
    cache_names,
    metric_cache,
    open_reader,
    read_metric_cache,
    read_submission,
)
from autoscale_ray.scenes.schema import POLYGON_LAYERS
from benchmarks.golden_scenes import load_arrays, load_inputs
from tests.unit.scenes import metric_cache_files as files

GOLDEN = Path(__file__).parents[2] / "golden"
CANARY = Path("/tmp/metric-cache-was-run")


@pytest.fixture(scope="module")
def scene():
    """A small golden scene with moving and static agents."""
    inputs = load_inputs(GOLDEN)
    kinds = [inputs["agent_type"][inputs["agent_scene"] == row] for row in range(len(inputs["hist_t_us"]))]
    rows = [row for row, found in enumerate(kinds) if (found <= 2).sum() >= 2 and (found > 2).any()]
    return files.golden_arrays(inputs, min(rows, key=lambda row: int((inputs["poly_scene"] == row).sum())))


@pytest.fixture(scope="module")
def reference(scene):
    outputs = load_arrays(GOLDEN, "outputs_v2")
    return files.golden_reference(outputs, 0, int(scene["hist_t_us"][-1]))


@pytest.fixture(scope="module")
def content(scene, reference):
    return {version: files.packed(files.metric_cache(version, scene, reference)) for version in ("v1", "v2")}


@pytest.fixture(scope="module")
def reader():
    with open_reader() as opened:
        yield opened


def _read(reader, folder, data, token="token"):
    files.write_cache(folder, token, data)
    return read_metric_cache(reader, folder, cache_names(folder)[token], token)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_field_comes_back(reader, scene, reference, content, version, tmp_path):
    cache = _read(reader, tmp_path, content[version])
    assert (cache.version, cache.token, cache.start_us) == (version, "token", scene["hist_t_us"][-1])
    np.testing.assert_allclose(cache.ego_state[:7], scene["hist_states"][-1], rtol=0, atol=1e-8)
    np.testing.assert_allclose(cache.reference_poses, reference[1], rtol=0, atol=1e-8)
    np.testing.assert_array_equal(cache.centreline, scene["cl_xyh"])
    np.testing.assert_array_equal(cache.polygon_xy, scene["poly_xy"])
    np.testing.assert_array_equal(cache.polygon_offsets, scene["poly_offsets"])
    names = [POLYGON_LAYERS[code].upper() for code in cache.polygon_layer]
    assert names == [files.LAYER_OF_CODE[code] for code in scene["poly_layer"]]
    np.testing.assert_array_equal(cache.polygon_on_route, scene["poly_on_route"])
    num_frames = 11 if version == "v1" else 9
    seen = scene["agent_mask"][:, :num_frames].any(axis=1)
    assert sorted(cache.track_type) == sorted(scene["agent_type"][seen])
    assert cache.track_present.shape == (seen.sum(), 51 if version == "v1" else 41)
    if version == "v2":
        np.testing.assert_allclose(cache.past_states, scene["hist_states"], rtol=0, atol=1e-8)
        np.testing.assert_array_equal(cache.past_times_us, scene["hist_t_us"])
        np.testing.assert_array_equal(cache.human_poses, scene["human_poses"])
        assert (cache.log_name[:10], cache.is_synthetic) == ("2021.06.09", False)
    else:
        assert cache.past_states is None
        assert cache.human_poses is None


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_boxes_follow_the_sightings(reader, scene, content, version, tmp_path):
    """At every 2 Hz sighting the box of the 10 Hz track is the sighting's, position and yaw within 1e-7."""
    cache = _read(reader, tmp_path, content[version])
    worst = 0.0
    for states, mask in zip(scene["agent_states"], scene["agent_mask"], strict=True):
        frames = np.flatnonzero(mask[: 11 if version == "v1" else 9])
        if not len(frames):
            continue
        wanted = states[frames][:, :3]
        away = np.linalg.norm(cache.track_poses[:, 5 * frames, :2] - wanted[:, :2], axis=2).max(axis=1)
        track = int(np.argmin(away))
        turn = cache.track_poses[track, 5 * frames, 2] - wanted[:, 2]
        worst = max(worst, away[track], float(np.abs(np.angle(np.exp(1j * turn))).max()))
        assert cache.track_present[track, 5 * frames].all()
    assert worst < 1e-7


def _calls(function, *arguments):
    class Payload:
        def __reduce__(self):
            return function, arguments

    return Payload()


def _with(value):
    """Return a function that puts something into a field of a cache."""

    def attack(cache):
        cache.file_path = value
        return files.packed(cache)

    return attack


def _nested(cache):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    del cache
    head, tail = b"\x80\x04", b"."
    return lzma.compress(head + b"]" * 100_000 + b"a" * 99_999 + tail)


def _deep_centerline(cache):
    cache.centerline = cache.trajectory
    return files.packed(cache)


def _unknown(cache):
    unknown = type("Planner", (), {"__module__": "nuplan.planning.simulation.planner"})
    cache.file_path = unknown()
    with files.importable({**files.CLASSES, "Planner": unknown}):
        return lzma.compress(pickle.dumps(cache, protocol=5))


ATTACKS = {
    "system call": (_with(_calls(os.system, f"touch {CANARY}")), "global posix.system"),
    "evaluation": (_with(_calls(eval, f"open({str(CANARY)!r}, 'w')")), "global builtins.eval"),
    "shapely function": (_with(_calls(shapely.from_wkt, "POINT (0 0)")), r"global shapely\.\S*from_wkt"),
    "unknown class": (_unknown, r"global nuplan\.\S*Planner"),
    "2 GB memo": (lambda _: lzma.compress(b"\x80\x02Nr\xff\xff\xff\x07."), "memo index"),
    "8 GB of bytes": (
        lambda _: lzma.compress(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b"."),
        "damaged",
    ),
    "32 GB array": (_with(_calls(np.ndarray, (1 << 32,))), "MemoryError"),
    "100,000 lists deep": (_nested, "neither metric cache"),
    "another object in a field": (_deep_centerline, "InterpolatedTrajectory where a PDMPath"),
    "second pickle": (
        lambda cache: lzma.compress(files.dumps(cache) + files.dumps(1)),
        "bytes after the end",
    ),
    "plain list": (lambda _: lzma.compress(pickle.dumps([1, 2])), "neither metric cache"),
    "not packed, not a pickle": (lambda _: b"hello", "must hold plain values"),
    "empty": (lambda _: b"", "damaged"),
    "zeros that unpack 7,000-fold": (
        lambda _: lzma.compress(bytes(16 << 20)),
        "more than [0-9]+ bytes unpacked",
    ),
    "cut in half": (lambda cache: files.packed(cache)[: len(files.packed(cache)) // 2], "truncated"),
    "two streams": (lambda cache: files.packed(cache) * 2, "xz stream: bytes after the end"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_run_nothing(reader, scene, reference, name, tmp_path):
    attack, reason = ATTACKS[name]
    cache = files.metric_cache("v2", scene, reference)
    with pytest.raises(InputRejectedError, match=reason) as refused:
        _read(reader, tmp_path, attack(cache))
    assert "metric_cache.pkl" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not CANARY.exists()


def test_the_child_reads_on_after_a_refusal(reader, scene, reference, content, tmp_path):
    with pytest.raises(InputRejectedError):
        _read(reader, tmp_path / "bad", ATTACKS["32 GB array"][0](files.metric_cache("v2", scene, reference)))
    assert _read(reader, tmp_path / "good", content["v2"]).version == "v2"


@pytest.mark.parametrize(("gap_s", "is_read"), [(20, True), (70, False)])
def test_a_past_across_a_gap_of_the_log_is_read_as_it_stands(
    reader, scene, reference, gap_s, is_read, tmp_path
):
    """NAVSIM takes the four frames before, whatever the time between them; a minute is the most here."""
    times_us = scene["hist_t_us"] - np.array([gap_s, 0, 0, 0]) * 1_000_000
    cache = files.packed(files.metric_cache("v2", {**scene, "hist_t_us": times_us}, reference))
    if is_read:
        np.testing.assert_array_equal(_read(reader, tmp_path, cache).past_times_us, times_us)
    else:
        with pytest.raises(InputRejectedError, match="must span"):
            _read(reader, tmp_path, cache)


WRONG = {
    "NaN pose": lambda cache: setattr(cache.ego_state._car_footprint._center, "x", float("nan")),
    "text for a number": lambda cache: setattr(cache.ego_state._car_footprint._center, "x", "1"),
    "no centre line": lambda cache: setattr(cache.centerline, "arguments", ([],)),
    "short reference": lambda cache: setattr(
        cache.trajectory, "arguments", (cache.trajectory.arguments[0][:30],)
    ),
    "reversed reference": lambda cache: setattr(
        cache.trajectory, "arguments", (cache.trajectory.arguments[0][::-1],)
    ),
    "short past": lambda cache: setattr(
        cache.past_human_trajectory, "arguments", (cache.past_human_trajectory.arguments[0][1:],)
    ),
    "past of another scene": lambda cache: setattr(
        cache.past_human_trajectory.arguments[0][-1]._car_footprint._center, "x", 0.0
    ),
    "few steps": lambda cache: setattr(cache.observation, "_detections_tracks", []),
    "one track twice": lambda cache: cache.observation._detections_tracks[
        3
    ].tracked_objects.tracked_objects.append(
        cache.observation._detections_tracks[3].tracked_objects.tracked_objects[0]
    ),
    "unequal map": lambda cache: cache.drivable_area_map.arguments[0].append("more"),
    "human of 3 poses": lambda cache: setattr(cache.human_trajectory, "poses", np.zeros((3, 3))),
    "missing field": lambda cache: delattr(cache, "observation"),
    "hole in a light": lambda cache: setattr(
        cache.observation,
        "_occupancy_maps_tl",
        [(["red_light_1"], [shapely.Point(0, 0).buffer(9) - shapely.Point(0, 0).buffer(1)])] * 41,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_content_is_refused(reader, scene, reference, name, tmp_path):
    cache = files.metric_cache("v2", scene, reference)
    WRONG[name](cache)
    with pytest.raises(InputRejectedError, match=r"metric_cache\.pkl") as refused:
        _read(reader, tmp_path, files.packed(cache))
    assert "\n" not in str(refused.value)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_files_are_refused(content, data):
    """Cut or with flipped bits: the check sum of the xz stream leaves no way to a changed scene."""
    good = content[data.draw(st.sampled_from(["v1", "v2"]))]
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        bad = bytes(bad)
    if bad != good:
        reply = answer(bad, plain_file)
        assert reply[:1] == b"-", "a damaged file was read"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_pickles_behind_a_good_check_sum_give_a_refusal_or_a_checked_scene(unpacked, data):
    bad = bytearray(unpacked)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    found = []
    if answer(bytes(bad), lambda data: found.append(plain_file(data)))[:1] == b"-":
        return
    try:
        cache = metric_cache(found[0], "token", "f.pkl")
    except InputRejectedError:
        return
    assert np.isfinite(cache.ego_state).all()
    assert np.isfinite(cache.polygon_xy).all()
    assert (cache.track_size > 0).all()


@pytest.fixture(scope="module")
def unpacked(content):
    return unpack(content["v2"])


def _even_odd(chain, points):
    """Count crossings of a ray to the right with the edges of a closed chain."""
    begin, end = chain, np.roll(chain, -1, axis=0)
    inside = np.zeros(len(points), dtype=bool)
    for (x1, y1), (x2, y2) in zip(begin, end, strict=True):
        spans = (y1 > points[:, 1]) != (y2 > points[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= spans & (points[:, 0] < x1 + (points[:, 1] - y1) / (y2 - y1) * (x2 - x1))
    return inside


SHAPES = {
    "hole": shapely.box(0, 0, 20, 10) - shapely.box(4, 3, 7, 6),
    "two holes": shapely.box(0, 0, 20, 10) - shapely.box(4, 3, 7, 6) - shapely.box(11, 2, 15, 8),
    "parts": shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(9, 1, 14, 9)]),
    "parts with holes": shapely.MultiPolygon(
        [
            shapely.box(0, 0, 8, 8) - shapely.box(2, 2, 5, 5),
            shapely.box(9, 1, 16, 9) - shapely.box(11, 3, 12, 7),
        ]
    ),
    "3-D": shapely.force_3d(shapely.box(0, 0, 20, 10), 7.0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_polygons_with_holes_and_parts_keep_their_area(reader, scene, reference, name, tmp_path):
    """Random points lie inside the chain exactly where shapely finds them inside the polygon."""
    rings = files.rings_of(scene)
    cache = files.metric_cache("v2", scene, reference, polygons=[SHAPES[name], *rings[1:]])
    cache.observation._occupancy_maps_tl = None
    found = _read(reader, tmp_path, files.packed(cache))
    chain = found.polygon_xy[: found.polygon_offsets[1]]
    points = np.random.default_rng(0).uniform([-1, -1], [21, 11], (2000, 2))
    np.testing.assert_array_equal(_even_odd(chain, points), shapely.contains_xy(SHAPES[name], points))
    assert 200 < _even_odd(chain, points).sum() < 1950


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("flavor", ["extended", "iso"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_well_known_binary_is_decoded_as_shapely_does(order, flavor, dimension):
    shape = SHAPES["parts with holes"]
    shape = shapely.set_srid(shapely.force_3d(shape, 3.0) if dimension == 3 else shape, 32611)
    content = shapely.to_wkb(shape, byte_order=order, flavor=flavor, include_srid=flavor == "extended")
    parts = decode_wkb(Geometry(content))
    rebuilt = shapely.MultiPolygon([shapely.Polygon(rings[0], rings[1:]) for rings in parts])
    assert rebuilt.equals(SHAPES["parts with holes"])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_geometries_are_polygons_or_refused(data):
    content = bytearray(shapely.to_wkb(SHAPES["parts with holes"]))
    content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        parts = decode_wkb(Geometry(bytes(content)))
    except Refused:
        return
    assert all(ring.shape[1] == 2 and len(ring) >= 3 for rings in parts for ring in rings)


def test_geometries_of_shapely_1_are_read(reader, scene, reference, tmp_path):
    """Shapely 1 pickles the class with the binary as its state."""
    old = type("Polygon", (), {"__module__": "shapely.geometry.polygon"})
    shape = files.rings_of(scene)[0]

    def reduce(self, _):
        return old, (), shapely.to_wkb(shape)

    old.__reduce_ex__ = reduce
    cache = files.metric_cache("v2", scene, reference)
    cache.drivable_area_map.arguments[2][0] = old()
    with files.importable({**files.CLASSES, "Polygon": old}):
        content = lzma.compress(pickle.dumps(cache, protocol=5))
    found = _read(reader, tmp_path, content)
    np.testing.assert_array_equal(found.polygon_xy, scene["poly_xy"])


def test_two_caches_of_one_scene_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(InputRejectedError, match=r"must hold files metric_cache\.pkl"):
        cache_names(tmp_path)
    for log in ("a", "b"):
        files.write_cache(tmp_path, "token", b"", log)
    with pytest.raises(InputRejectedError, match="only cache of its scene"):
        cache_names(tmp_path)


def test_a_cache_is_no_submission(tmp_path, content):
    (tmp_path / "plans.pkl").write_bytes(content["v2"])
    with pytest.raises(InputRejectedError, match="must be a NAVSIM submission"):
        read_submission(tmp_path / "plans.pkl")


def test_merged_submissions_are_refused_by_their_cause(tmp_path):
    poses = np.zeros((8, 3))
    predicted = {"token": files.make("Trajectory", poses=poses, trajectory_sampling=None)}
    (tmp_path / "plans.pkl").write_bytes(files.dumps({"predictions": [predicted, predicted]}))
    with pytest.raises(InputRejectedError, match=r"merged are scored one by one \(found '?2 in one file"):
        read_submission(tmp_path / "plans.pkl")


def test_a_submission_with_settings_of_omegaconf_is_read(tmp_path):
    """Authors given as a list stand in a submission as a ListConfig: types, a cache of resolvers, and the whole run."""
    places = {
        "ListConfig": "listconfig",
        "DictConfig": "dictconfig",
        "AnyNode": "nodes",
        "ContainerMetadata": "base",
    }
    classes = {name: type(name, (), {"__module__": f"omegaconf.{place}"}) for name, place in places.items()}

    def node(kind, **state):
        types = {"ref_type": typing.Any, "object_type": list, "key_type": int, "element_type": typing.Any}
        metadata = classes["ContainerMetadata"]()
        metadata.__dict__.update(types, optional=True, key=0, flags={}, flags_root=False,
                                 resolver_cache=collections.defaultdict(dict, {"now": {"%H": "12"}}))  # fmt: skip
        made = classes[kind]()
        made.__dict__.update(state, _metadata=metadata)
        return made

    run = node("DictConfig", _parent=None, _content={})
    authors = node("ListConfig", _parent=run, _content=[node("AnyNode", _val="a"), node("AnyNode", _val="b")])
    run._content["authors"] = authors
    poses = np.arange(24.0).reshape(8, 3)
    predicted = {"token": files.make("Trajectory", poses=poses, trajectory_sampling=None)}
    with files.importable({**files.CLASSES, **classes}):
        content = pickle.dumps({"authors": authors, "predictions": [predicted]})
    (tmp_path / "plans.pkl").write_bytes(content)
    found = read_submission(tmp_path / "plans.pkl")
    np.testing.assert_array_equal(found["token"], poses)
