"""Waymo Open Motion scenarios, fabricated with a wire encoder of our own: no file of Waymo was at hand."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.readers.waymo import MAX_RECORD_BYTES, read
from autoscale_ray.scenes.recording import Recording
from autoscale_ray.scenes.tfrecord import crc32c, masked, records

ORIGIN = np.array([8250.0, -3120.0])
NUM_FRAMES = 91
LANE_M, JUNCTION_M, SPEED = 3.6, (60.0, 80.0), 9.0


def crc_by_bits(content: bytes) -> int:
    """The definition: one bit after another."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: object) -> bytes:
    """Encode one field: doubles and np.float32 fixed, whole numbers and flags as varint, the rest framed."""
    if isinstance(value, np.float32):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, (bool, int)):
        return varint(number << 3) + varint(int(value))
    data = value.encode() if isinstance(value, str) else value
    assert isinstance(data, bytes)
    return varint(number << 3 | 2) + varint(len(data)) + data


def message(*fields: tuple[int, object]) -> bytes:
    return b"".join(field(number, value) for number, value in fields)


def points(number: int, line: np.ndarray) -> list[tuple[int, object]]:
    return [(number, message((1, float(x)), (2, float(y)), (3, 12.5))) for x, y in line]


def frame(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    sums = (struct.pack("<I", masked(crc32c(part))) for part in (length, content))
    return length + next(sums) + content + next(sums)


def straight(offset: float, start: float, end: float, step: float = 0.5) -> np.ndarray:
    along = np.arange(start, end + step / 2, step)
    return np.column_stack([along, np.full(len(along), offset)]) + ORIGIN


def track(
    number: int, kind: int, x0: float, y: float, speed: float, size: tuple[float, float], valid=None
) -> bytes:
    states = []
    for step in range(NUM_FRAMES):
        seen = valid is None or valid[step]
        x = x0 + speed * 0.1 * step
        values = [(2, float(ORIGIN[0] + x)), (3, float(ORIGIN[1] + y)), (4, 1.0), (5, np.float32(size[0])),
                  (6, np.float32(size[1])), (7, np.float32(1.6)), (8, np.float32(0.0)), (9, np.float32(speed)),
                  (10, np.float32(0.0))]  # fmt: skip
        states.append((3, message(*(values if seen else []), (11, bool(seen)))))
    return message((1, 100 + number), (2, kind), *states)


def lane(
    key: int, line: np.ndarray, exits: list[int], borders: tuple[int, int] | None, left: int | None = None
):
    ends = (1, 0), (2, len(line) - 1)
    fields: list[tuple[int, object]] = [(1, 35.0), (2, 2), *points(8, line)]
    fields.append((10, b"".join(map(varint, exits))))
    if left is not None:
        fields.append((11, message((1, left), (2, 0), (3, len(line) - 1))))
    if borders is not None:
        fields += [(13, message(*ends, (3, borders[0]))), (14, message(*ends, (3, borders[1])))]
    return message((1, key), (3, message(*fields)))


def scenario(title: str = "a1b2c3", speed: float = SPEED, **changes: object) -> bytes:
    """Two lanes side by side, a junction without borders on the right one, a light, an ego and three objects."""
    right, left = -LANE_M / 2, LANE_M / 2
    gap, end = JUNCTION_M
    features = [
        lane(1, straight(right, -40, gap), [3], (20, 10), left=2),
        lane(2, straight(left, -40, 200), [], (30, 20)),
        lane(3, straight(right, gap, end), [4, 999], None),
        lane(4, straight(right, end, 200), [], (20, 10), left=2),
        message((1, 5), (3, message((2, 3), *points(8, straight(-6.0, 0, 20))))),
        message((1, 10), (5, message((1, 1), *points(2, straight(-LANE_M, -40, 200, 7.0))))),
        message((1, 20), (4, message((1, 1), *points(2, straight(0.0, -40, 200))))),
        message((1, 30), (5, message((1, 1), *points(2, straight(LANE_M, -40, 200))))),
        message((1, 40), (8, message(*points(1, np.array([[50, -4], [53, -4], [53, 4], [50, 4]]) + ORIGIN)))),
        message(
            (1, 41), (10, message(*points(1, np.array([[5, -8], [9, -8], [9, -3.6], [5, -3.6]]) + ORIGIN)))
        ),
        message((1, 42), (7, message((1, 1), *points(2, ORIGIN[None])))),
    ]
    lights = [message((1, message((1, 3), (2, 4 if step < 30 else 6)))) for step in range(NUM_FRAMES)]
    tracks = [
        track(0, 1, 30.0, left, 7.0, (4.6, 1.9)),
        track(1, 1, -5.0, right, speed, (5.2, 2.1)),
        track(2, 2, 40.0, -5.0, 1.2, (0.7, 0.6), valid=[30 <= step < 50 for step in range(NUM_FRAMES)]),
        track(3, 3, 60.0, left, 0.0, (1.8, 0.6)),
    ]
    fields: dict[str, list[tuple[int, object]]] = {
        "times": [(1, 0.1 * step) for step in range(NUM_FRAMES)],
        "tracks": [(2, item) for item in tracks],
        "name": [(5, title)],
        "recorder": [(6, 1)],
        "lights": [(7, item) for item in lights],
        "features": [(8, item) for item in features],
        "current": [(10, 10)],
        "more": [(12, b"\x00" * 40)],
    }
    fields |= changes  # type: ignore[arg-type]
    return message(*(item for part in fields.values() for item in part))


@pytest.fixture
def recording(tmp_path) -> Recording:
    (tmp_path / "training.tfrecord-00000-of-01000").write_bytes(frame(scenario()))
    (found,) = read(tmp_path, "training.tfrecord-00000-of-01000")
    return found


@pytest.mark.parametrize("size", [4, 5, 8, 9, 63, 64, 65, 1000, 4099])
def test_check_sums_follow_the_definition(size):
    content = np.random.default_rng(size).bytes(size)
    assert crc32c(content) == crc_by_bits(content)


def test_published_check_sums():
    """RFC 3720, appendix B.4, and the common check value."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_tracks_come_back(recording):
    """Box centres to the last bit, float32 values to float32; the recorder and the gaps are the file's."""
    tracks = recording.tracks
    assert (recording.name, recording.source, len(tracks)) == ("a1b2c3", "waymo/motion", 4)
    assert tracks.is_recorder_K.tolist() == [False, True, False, False]
    assert tracks.can_be_ego_K.tolist() == [True, True, False, False]
    assert tracks.type_K.tolist() == [0, 0, 1, 2]
    assert (tracks.first_frame_K[2], tracks.last_frame_K[2]) == (30, 49)
    ego = tracks.poses_R3[tracks.offsets[1] : tracks.offsets[2]]
    np.testing.assert_allclose(
        ego[:, 0], ORIGIN[0] - 5.0 + SPEED * 0.1 * np.arange(NUM_FRAMES), rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(tracks.size_K4[1, :2], (5.2, 2.1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(tracks.velocities_R2[tracks.offsets[1]], (SPEED, 0.0), rtol=0, atol=1e-6)


def test_lanes_lights_and_areas_come_back(recording):
    road = recording.road
    assert road.keys == (1, 2, 3, 4), "the bicycle lane is left out"
    np.testing.assert_allclose(road.width_L, LANE_M, rtol=0, atol=0.3)
    assert road.is_connector_L.tolist() == [False, False, True, False]
    np.testing.assert_allclose(road.speed_limit_L, 35.0 * 0.44704)
    links = {tuple(row) for row in road.links_E3.tolist()}
    assert {(0, 2, 0), (2, 3, 0), (0, 1, 1), (1, 0, 2), (3, 1, 1)} <= links
    border = road.left_V2[road.offsets[0] : road.offsets[1]]
    np.testing.assert_allclose(border[:, 1], ORIGIN[1], rtol=0, atol=0.01)
    assert road.area_layer == ("crosswalk", "carpark_area")
    assert recording.red_FL is not None
    assert recording.red_FL.sum(axis=0).tolist() == [0, 0, 30, 0]
    assert recording.red_FL[:30, 2].all()


def test_a_file_becomes_a_pool_with_lanes_under_its_ego(tmp_path):
    """Scenes of the recording car, on the road, with its speed, route and light within 1 cm and 0.1 degree."""
    (tmp_path / "x.tfrecord").write_bytes(frame(scenario()))
    manifest = ingest("waymo", tmp_path / "x.tfrecord", tmp_path / "pool", "real")
    assert (manifest.num_scenes, manifest.num_quarantined) == (2, 0)
    row = open_pool(tmp_path / "pool").table(np.array([0])).to_pylist()[0]
    states = np.array(row["ego_states"]).reshape(15, 7)
    rear_m = 0.28 * 5.2
    anchor = -5.0 + SPEED * 2.0 - rear_m
    np.testing.assert_allclose(
        [row["origin_x_m"], row["origin_y_m"]], ORIGIN + np.array([anchor, -LANE_M / 2]), atol=0.01
    )
    np.testing.assert_allclose(states[4:13, 0], SPEED * 0.5 * np.arange(9), atol=0.01)
    np.testing.assert_allclose(states[4:13, 3], SPEED, atol=0.01)
    assert abs(row["origin_yaw_rad"]) < math.radians(0.1)
    assert "no_route" not in row["tags"]
    assert np.array(row["polygon_red"]).reshape(-1, 15).any()


def test_scenarios_that_share_motion_are_one_log(tmp_path):
    """Overlapping cuts of one drive must not fall on both sides of a split."""
    wave = [SPEED + math.sin(step / 3.0) for step in range(NUM_FRAMES)]

    def wavy(name: str, shift: float) -> bytes:
        states = []
        for step, speed in enumerate(wave):
            x = float(ORIGIN[0] + shift + sum(wave[:step]) * 0.1)
            states.append((3, message((2, x), (3, float(ORIGIN[1] - LANE_M / 2)), (5, np.float32(4.5)),
                                      (6, np.float32(1.9)), (8, np.float32(0)), (9, np.float32(speed)),
                                      (10, np.float32(0)), (11, True))))  # fmt: skip
        return scenario(name, tracks=[(2, message((1, 1), (2, 1), *states))], recorder=[(6, 0)])

    (tmp_path / "x.tfrecord").write_bytes(
        frame(wavy("one", 0.0)) + frame(wavy("two", 3.0)) + frame(scenario("other"))
    )
    ingest("waymo", tmp_path / "x.tfrecord", tmp_path / "pool", "real")
    assert set(open_pool(tmp_path / "pool").log_ids.tolist()) == {"waymo/one", "waymo/other"}


def test_bad_records_lose_themselves_and_are_counted(tmp_path):
    bad = bytearray(frame(scenario("second")))
    bad[len(bad) // 2] ^= 1
    content = frame(scenario("first")) + bytes(bad) + frame(b"no scenario") + frame(scenario("fourth"))
    (tmp_path / "x.tfrecord").write_bytes(content + frame(scenario("last"))[:-9])
    names = []
    with pytest.raises(
        InputRejectedError, match="3 of 5 records were refused, the first: content must agree"
    ) as error:
        names.extend(found.name for found in read(tmp_path, "x.tfrecord"))
    assert "record 1" in error.value.where
    assert names == ["first", "fourth"]


def test_a_damaged_length_ends_the_file(tmp_path):
    content = bytearray(frame(scenario("first")) + frame(scenario("second")))
    content[len(content) // 2 + 3] ^= 4
    (tmp_path / "x.tfrecord").write_bytes(bytes(content))
    names = []
    with pytest.raises(InputRejectedError, match="rest of the file is lost"):
        names.extend(found.name for found in read(tmp_path, "x.tfrecord"))
    huge = struct.pack("<Q", MAX_RECORD_BYTES + 1)
    stream = io.BytesIO(huge + struct.pack("<I", masked(crc32c(huge))))
    (refused,) = records(stream, "x", MAX_RECORD_BYTES)
    assert isinstance(refused, InputRejectedError)


def _far() -> list[tuple[int, object]]:
    return [(8, lane(1, np.array([[0.0, 0.0], [1e9, 0.0]]), [], None))]


WRONG = {
    "no name": {"name": []},
    "name with a line break": {"name": [(5, "a\nb")]},
    "no tracks": {"tracks": []},
    "few times": {"times": [(1, 0.0)]},
    "times of 2 Hz": {"times": [(1, 0.5 * step) for step in range(NUM_FRAMES)]},
    "NaN time": {"times": [(1, math.nan) for _ in range(NUM_FRAMES)]},
    "few states": {"tracks": [(2, message((1, 1), (2, 1), (3, message((11, True)))))]},
    "nothing seen": {"tracks": [(2, track(0, 1, 0.0, 0.0, 1.0, (4.0, 2.0), valid=[False] * NUM_FRAMES))]},
    "NaN place": {"tracks": [(2, track(0, 1, math.nan, 0.0, 1.0, (4.0, 2.0)))]},
    "lane to the moon": {"features": _far()},
    "long step": {"features": [(8, lane(1, np.array([[0.0, 0.0], [900.0, 0.0]]), [], None))]},
    "broken message": {"more": [(8, b"\xff\xff\xff")]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scenarios_are_refused_with_one_line(tmp_path, name):
    (tmp_path / "x.tfrecord").write_bytes(frame(scenario(**WRONG[name])))
    with pytest.raises(InputRejectedError, match=r"x\.tfrecord: record 0") as error:
        list(read(tmp_path, "x.tfrecord"))
    assert "\n" not in str(error.value)


def test_tf_examples_are_refused_with_a_hint(tmp_path):
    value = message((1, message((1, b"scenario/id"), (2, message((1, message((1, b"abc"))))))))
    (tmp_path / "x.tfrecord").write_bytes(frame(message((1, value))))
    with pytest.raises(InputRejectedError, match="Scenario message"):
        list(read(tmp_path, "x.tfrecord"))


GOOD = scenario()


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.data())
def test_damaged_messages_behind_good_check_sums_give_recordings_or_refusals(tmp_path_factory, data):
    bad = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.tfrecord"
    path.write_bytes(frame(bytes(bad[: data.draw(st.integers(len(bad) // 2, len(bad)))])))
    try:
        found = list(read(path, path.name))
    except InputRejectedError:
        return
    assert all(np.isfinite(item.tracks.poses_R3).all() for item in found)
