"""Each source against values taken from its files by another path; tolerances 1 cm and 0.1 degree."""

import csv
import gzip
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow.feather
import pytest

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.readers import READERS, argoverse2, interaction, kitti, scenarionet, sumo
from autoscale_ray.scenes.trust import parse_xml
from autoscale_ray.scenes.windows import WindowOptions, find_anchors
from scenes.reader_files import SOURCES, write

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the recordings of ../shared/data are not here")

NET = """<net>
 <edge id=":J_0" function="internal"><lane id=":J_0_0" index="0" speed="10" shape="100,0 110,0"/></edge>
 <edge id="a"><lane id="a_0" index="0" speed="13.9" shape="0,0 100,0"/>
  <lane id="a_1" index="1" speed="13.9" shape="0,3.2 100,3.2"/>
  <lane id="a_2" index="2" disallow="all" shape="0,6 9,6"/></edge>
 <edge id="b"><lane id="b_0" index="0" speed="13.9" shape="110,0 400,0"/></edge>
 <tlLogic id="T" type="static" offset="0"><phase duration="4" state="G"/><phase duration="6" state="r"/></tlLogic>
 <junction id="J" type="traffic_light" shape="100,-2 110,-2 110,5 100,5" intLanes=":J_0_0"/>
 <connection from="a" to="b" fromLane="0" toLane="0" via=":J_0_0" tl="T" linkIndex="0"/>
 <connection from=":J_0" to="b" fromLane="0" toLane="0"/>
</net>"""


def _fcd(num_steps: int = 20, change=lambda text: text) -> str:
    steps = "".join(
        f'<timestep time="{0.5 * n:.2f}">'
        f'<vehicle id="v" x="{20 + 5 * n}" y="0" angle="90" type="t" speed="10"/></timestep>'
        for n in range(num_steps)
    )
    return f"<fcd-export>{change(steps)}</fcd-export>"


def _sumo_folder(tmp_path, fcd: str):
    (tmp_path / "x.net.xml").write_text(NET)
    (tmp_path / "x.rou.xml").write_text('<routes><vType id="t" length="4.0" width="1.9"/></routes>')
    (tmp_path / "x.fcd.xml.gz").write_bytes(gzip.compress(fcd.encode()))
    return tmp_path


def test_sumo_positions_are_front_bumpers_and_angles_compass_bearings(tmp_path):
    (recording,) = sumo.read(_sumo_folder(tmp_path, _fcd()), "x.fcd.xml.gz")
    tracks = recording.tracks
    np.testing.assert_allclose(tracks.poses_R3[0], [18.0, 0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(tracks.velocities_R2[0], [10.0, 0.0], atol=1e-9)
    assert tracks.size_K4[0, :2].tolist() == [4.0, 1.9]
    road = recording.road
    assert road.keys == (":J_0_0", "a_0", "a_1", "b_0")
    links = {(road.keys[a], road.keys[b], kind) for a, b, kind in road.links_E3.tolist()}
    assert links == {("a_0", ":J_0_0", 0), (":J_0_0", "b_0", 0), ("a_0", "a_1", 1), ("a_1", "a_0", 2)}
    assert road.is_connector_L.tolist() == [True, False, False, False]
    red = recording.red_FL[:, 0]
    assert red.tolist() == [time % 10.0 >= 4.0 for time in np.arange(20) * 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('x="25"', 'x="nan"'), "vehicle v: x must be finite"),
        (lambda text: text.replace('time="3.00"', 'time="1.00"'), "time must grow"),
        (lambda text: text.replace("</timestep>", "", 1), "well-formed"),
        (lambda text: "<a/>", "at least two time steps"),
        (lambda text: text.replace('time="', 'time="1000000000000'), r"time must be at most 1e\+09 s"),
    ],
)
def test_malformed_sumo_files_are_refused_with_their_element(tmp_path, change, message):
    with pytest.raises(InputRejectedError, match=message):
        list(sumo.read(_sumo_folder(tmp_path, _fcd(change=change)), "x.fcd.xml.gz"))


def test_a_sumo_name_with_dots_is_that_of_its_own_network_and_boxes(tmp_path):
    for name, length in (("town.1", 4.0), ("town.2", 6.0)):
        (tmp_path / f"{name}.net.xml").write_text(NET)
        (tmp_path / f"{name}.rou.xml").write_text(f'<routes><vType id="t" length="{length}"/></routes>')
        (tmp_path / f"{name}.fcd.xml").write_text(_fcd())
    found = [recording for unit in sumo.units(tmp_path) for recording in sumo.read(tmp_path, unit)]
    assert [recording.source for recording in found] == ["sumo/town.1", "sumo/town.2"]
    assert [recording.tracks.size_K4[0, 0] for recording in found] == [4.0, 6.0]


def test_a_sumo_lane_that_stands_twice_is_refused(tmp_path):
    folder = _sumo_folder(tmp_path, _fcd())
    (folder / "x.net.xml").write_text(NET.replace('id="b_0"', 'id="a_0"'))
    with pytest.raises(InputRejectedError, match="ids must be unique"):
        list(sumo.read(folder, "x.fcd.xml.gz"))


TRACKS = "recorded_trackfiles/town/vehicle_tracks_000.csv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0], *rows[1:], *rows[1:]], "must have a track that stands once in a frame"),
        (
            lambda rows: [*rows[:-1], rows[-1].replace(",6900,", ",1e300,")],
            r"timestamp_ms: must be finite, at most",
        ),
    ],
)
def test_malformed_interaction_files_are_refused_with_their_rule(tmp_path, change, message):
    files = SOURCES["interaction"]()
    rows = files[TRACKS].decode().split("\n")
    write({**files, TRACKS: "\n".join(change(rows)).encode()}, tmp_path)
    with pytest.raises(InputRejectedError, match=message):
        list(interaction.read(tmp_path, TRACKS))


def test_a_number_of_a_map_that_no_float_holds_is_refused(tmp_path):
    files = SOURCES["av2-sensor"]()
    write(
        {name: content.replace(b'"y": 2.0', b'"y": 1' + b"0" * 400) for name, content in files.items()},
        tmp_path,
    )
    with pytest.raises(InputRejectedError, match=r"log_map_archive_x\.json: must be a vector map"):
        list(argoverse2.read_sensor(tmp_path, "log"))


def _scenario(change):
    # Of the bytes that SOURCES has just made in this process; the package itself unpickles in a limited child.
    scenario = pickle.loads(SOURCES["scenarionet"]()["one.pkl"])
    change(scenario)
    return scenarionet.recording_of(scenario, "one.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["metadata"].update(sample_rate=None), "must be a scenario description"),
        (lambda found: found.update(length="long"), "must be a scenario description"),
        (lambda found: found["map_features"]["1"].update(polyline=[[1.0, 2.0], [3.0]]), "must be a scenario"),
        (lambda found: found["map_features"]["1"].update(exit_lanes=3), "must be a scenario description"),
        (lambda found: found["dynamic_map_states"]["1"].update(state=[1]), "must be a scenario description"),
        (
            lambda found: found["tracks"]["7"]["state"].update(valid=np.zeros(0)),
            "track 7: states must have one",
        ),
    ],
)
def test_malformed_scenario_descriptions_are_refused(change, message):
    with pytest.raises(InputRejectedError, match=message) as caught:
        _scenario(change)
    assert "\n" not in str(caught.value)


def test_a_scenario_of_arrays_without_elements_and_a_length_that_lies_is_read():
    def change(found):
        found["length"] = 10**13
        found["tracks"]["7"]["state"] = {
            name: column[:0] for name, column in found["tracks"]["7"]["state"].items()
        }
        found["map_features"]["1"]["exit_lanes"] = np.array(["2"])
        found["map_features"]["2"] = {
            "type": "LANE_SURFACE_STREET",
            "polyline": np.array([[150.0, 0.0], [190.0, 0.0]]),
        }
        found["map_features"]["3"] = {"type": "LANE_SURFACE_STREET", "polyline": np.zeros((0, 2))}

    recording = _scenario(change)
    assert len(recording.tracks) == 1
    assert recording.road.keys == ("1", "2")
    assert [0, 1, 0] in recording.road.links_E3.tolist()
    assert recording.red_FL[:, 0].tolist() == [True] * 70


@needs_data
def test_no_sumo_vehicle_enters_a_connector_whose_light_is_red():
    folder = DATA / "synthetic" / "sumo_generated"
    text = gzip.decompress((folder / "grid.fcd.xml.gz").read_bytes()).decode()
    net = parse_xml((folder / "grid.net.xml").read_bytes(), "net")
    road = sumo.read_road(net, "net")
    red_FL = sumo.red_lights(net, road, 0.0, 0.5, 1300)
    number = {key: lane for lane, key in enumerate(road.keys)}
    entered = ran_red = 0
    before: dict[str, str] = {}
    for frame, step in enumerate(re.findall(r"<timestep.*?</timestep>", text, re.S)[:400]):
        for vehicle, lane in re.findall(r'<vehicle id="(.*?)".*? lane="(.*?)"', step):
            if before.get(vehicle) != lane and lane.startswith(":") and red_FL[:, number[lane]].any():
                entered += 1
                ran_red += bool(red_FL[frame, number[lane]] and red_FL[frame - 1, number[lane]])
            before[vehicle] = lane
    assert entered > 100
    assert ran_red == 0


@needs_data
def test_argoverse_boxes_equal_rotation_matrices():
    from scipy.spatial.transform import Rotation

    root = DATA / "real" / "argoverse2" / "sensor"
    (name,) = argoverse2.sensor_units(root)
    (recording,) = argoverse2.read_sensor(root, name)
    boxes = pyarrow.feather.read_table(root / name / "annotations.feather").to_pandas()
    poses = (
        pyarrow.feather.read_table(root / name / "city_SE3_egovehicle.feather")
        .to_pandas()
        .set_index("timestamp_ns")
    )
    uuids = sorted(boxes.track_uuid.unique())
    times = sorted(boxes.timestamp_ns.unique())
    for row in range(0, len(boxes), 997):
        box = boxes.iloc[row]
        ego = poses.loc[box.timestamp_ns]
        turn = Rotation.from_quat([ego.qx, ego.qy, ego.qz, ego.qw])
        shift = np.array([ego.tx_m, ego.ty_m, ego.tz_m])
        city = turn.apply([box.tx_m, box.ty_m, box.tz_m]) + shift
        yaw = (turn * Rotation.from_quat([box.qx, box.qy, box.qz, box.qw])).as_euler("ZYX")[0]
        track = recording.tracks.key_K.tolist().index(uuids.index(box.track_uuid))
        frame = round((box.timestamp_ns - times[0]) / 1e8)
        at = recording.tracks.offsets[track] + frame - recording.tracks.first_frame_K[track]
        found = recording.tracks.poses_R3[at]
        assert np.linalg.norm(found[:2] - city[:2]) < 0.01
        assert abs(wrap_angle(found[2] - yaw)) < math.radians(0.1)


@needs_data
def test_kitti_frames_agree_with_the_devkit_chain_written_out():
    root = DATA / "real" / "kitti_tracking"
    (recording,) = kitti.read(root, "0001")
    oxts = np.loadtxt(root / "oxts" / "0001.txt")
    scale = math.cos(math.radians(oxts[0, 0])) * 6378137.0
    calib = {line.split()[0].rstrip(":"): np.array(line.split()[1:], float)
             for line in (root / "calib" / "0001.txt").read_text().splitlines() if line.strip()}  # fmt: skip
    rows = [line.split() for line in (root / "label" / "0001.txt").read_text().splitlines()]
    row = next(row for row in rows if row[2] == "Car" and row[0] == "5")
    camera = np.linalg.solve(calib["R_rect"].reshape(3, 3), np.array(row[13:16], float))
    velodyne = calib["Tr_velo_cam"].reshape(3, 4)
    point = np.linalg.solve(velodyne[:, :3], camera - velodyne[:, 3])
    imu = calib["Tr_imu_velo"].reshape(3, 4)
    local = np.linalg.solve(imu[:, :3], point - imu[:, 3])
    yaw = oxts[5, 5]
    east = scale * math.radians(oxts[5, 1]) + math.cos(yaw) * local[0] - math.sin(yaw) * local[1]
    north = (
        scale * math.log(math.tan(math.pi * (90 + oxts[5, 0]) / 360))
        + math.sin(yaw) * local[0]
        + math.cos(yaw) * local[1]
    )
    track = recording.tracks.key_K.tolist().index(int(row[1]))
    at = recording.tracks.offsets[track] + 5 - recording.tracks.first_frame_K[track]
    np.testing.assert_allclose(recording.tracks.poses_R3[at, :2], [east, north], atol=0.01)
    assert recording.tracks.size_K4[track, :2].tolist() == [float(row[12]), float(row[11])]


@needs_data
def test_interaction_positions_are_the_file_s_and_cars_drive_along_their_lanes():
    root = DATA / "real" / "fzi_taf_bw" / "datasets"
    for name in interaction.units(root):
        (recording,) = interaction.read(root, name)
        with (root / name).open() as file:
            rows = {(row["track_id"], row["timestamp_ms"]): row for row in csv.DictReader(file)}
        tracks = recording.tracks
        for track in range(0, len(tracks), 10):
            at, frame = tracks.offsets[track], tracks.first_frame_K[track]
            row = rows[(str(tracks.key_K[track]), str(frame * 100))]
            np.testing.assert_allclose(tracks.poses_R3[at, :2], [float(row["x"]), float(row["y"])], atol=1e-6)
        displaced = np.diff(tracks.poses_R3[:, :2], axis=0)
        fast = (np.linalg.norm(displaced, axis=1) > 0.5) & (np.linalg.norm(displaced, axis=1) < 3.0)
        motion = np.arctan2(displaced[fast, 1], displaced[fast, 0])
        assert (np.abs(wrap_angle(motion - tracks.poses_R3[:-1][fast, 2])) < math.pi / 2).mean() > 0.97


@needs_data
@pytest.mark.parametrize(
    ("format", "path", "egos", "num_windows"),
    [
        ("av2-sensor", "real/argoverse2/sensor", "recorder", 5),
        ("av2-forecasting", "real/argoverse2/motion_forecasting", "recorder", 31),
        ("kitti", "real/kitti_tracking", "recorder", 299),
    ],
)
def test_window_counts_agree_with_the_provenance(format, path, egos, num_windows):
    reader, root = READERS[format], DATA / path
    recordings = [recording for unit in reader.units(root) for recording in reader.read(root, unit)]
    options = WindowOptions(egos=egos)
    assert sum(len(find_anchors(recording, options).track_M) for recording in recordings) == num_windows


@needs_data
def test_a_scenarionet_scene_equals_its_pickle(tmp_path):
    root = DATA / "real" / "nuscenes_mini_scenarionet" / "nuscenes_2"
    ingest("scenarionet", root, tmp_path / "pool", "real")
    pool = open_pool(tmp_path / "pool")
    assert pool.manifest.num_scenes + pool.manifest.num_quarantined > 5
    batch = pool.batch(np.arange(len(pool)))
    assert (batch.ego_size_N4[:, 0] > batch.ego_size_N4[:, 1]).all()
    inside = batch.ego_states_NT7[:, 4, :3].abs().max()
    assert float(inside) < 1e-5, "the scene frame is the ego's rear axle"
