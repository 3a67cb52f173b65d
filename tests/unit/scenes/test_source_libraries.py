"""Each source against its own library (or the raw file, where there is none): within 1 cm and 0.1 degree.

commonroad-io and av2 pin other versions than this package does, so they are no development dependency; give them an
environment of their own and these tests run there.
"""

import gzip
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.feather
import pytest

from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.readers import argoverse2, commonroad, scenarionet, sumo

DATA = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the recordings of ../shared/data are not here")
TENTH_DEGREE = math.radians(0.1)


def _row(tracks, track: int, frame: int) -> int:
    row = int(tracks.offsets[track] + frame - tracks.first_frame_K[track])
    assert tracks.valid_R[row]
    return row


@pytest.mark.parametrize("folder", ["real/commonroad_ngsim", "synthetic/commonroad_sumo"])
def test_commonroad_equals_commonroad_io(folder, tmp_path):
    reader = pytest.importorskip("commonroad.common.file_reader", reason="commonroad-io is not installed")
    archive = DATA / folder / "scenarios.zip"
    name = commonroad.units(archive)[7]
    with zipfile.ZipFile(archive) as file:
        file.extract(name, tmp_path)
    scenario, _ = reader.CommonRoadFileReader(str(tmp_path / name)).open()
    (recording,) = commonroad.read(archive, name)
    tracks, road, compared = recording.tracks, recording.road, 0
    for obstacle in scenario.dynamic_obstacles:
        track = tracks.key_K.tolist().index(obstacle.obstacle_id)
        shape = obstacle.obstacle_shape
        np.testing.assert_allclose(tracks.size_K4[track, :2], [shape.length, shape.width], atol=1e-9)
        for state in [obstacle.initial_state, *obstacle.prediction.trajectory.state_list]:
            row = _row(tracks, track, state.time_step)
            assert np.linalg.norm(tracks.poses_R3[row, :2] - state.position) < 0.01
            assert abs(wrap_angle(tracks.poses_R3[row, 2] - state.orientation)) < TENTH_DEGREE
            assert abs(np.linalg.norm(tracks.velocities_R2[row]) - abs(state.velocity)) < 0.01
            compared += 1
    assert compared > 500
    number = {int(key): lane for lane, key in enumerate(road.keys)}
    for lanelet in scenario.lanelet_network.lanelets:
        lane = number[lanelet.lanelet_id]
        run = slice(road.offsets[lane], road.offsets[lane + 1])
        for ours, theirs in ((road.left_V2, lanelet.left_vertices), (road.right_V2, lanelet.right_vertices)):
            gaps = np.linalg.norm(ours[run][:, None] - theirs[None], axis=2).min(axis=0)
            assert gaps.max() < 0.01, "every vertex of theirs is one of ours"
        following = {road.keys[b] for a, b, kind in road.links_E3.tolist() if a == lane and kind == 0}
        assert following == {str(key) for key in lanelet.successor if key in number}


def test_argoverse_equals_av2():
    geometry = pytest.importorskip("av2.geometry.geometry", reason="av2 is not installed")
    se3 = pytest.importorskip("av2.geometry.se3", reason="av2 is not installed")
    root = DATA / "real" / "argoverse2" / "sensor"
    (name,) = argoverse2.sensor_units(root)
    (recording,) = argoverse2.read_sensor(root, name)
    boxes = pyarrow.feather.read_table(root / name / "annotations.feather").to_pandas()
    poses = pyarrow.feather.read_table(root / name / "city_SE3_egovehicle.feather").to_pandas()
    city = {
        row.timestamp_ns: se3.SE3(
            rotation=geometry.quat_to_mat(np.array([row.qw, row.qx, row.qy, row.qz])),
            translation=np.array([row.tx_m, row.ty_m, row.tz_m]),
        )
        for row in poses.itertuples()
    }
    uuids, first = sorted(boxes.track_uuid.unique()), boxes.timestamp_ns.min()
    for box in boxes.iloc[::53].itertuples():
        local = se3.SE3(
            rotation=geometry.quat_to_mat(np.array([box.qw, box.qx, box.qy, box.qz])),
            translation=np.array([box.tx_m, box.ty_m, box.tz_m]),
        )
        there = city[box.timestamp_ns].compose(local)
        track = recording.tracks.key_K.tolist().index(uuids.index(box.track_uuid))
        found = recording.tracks.poses_R3[
            _row(recording.tracks, track, round((box.timestamp_ns - first) / 1e8))
        ]
        assert np.linalg.norm(found[:2] - there.translation[:2]) < 0.01
        yaw = math.atan2(there.rotation[1, 0], there.rotation[0, 0])
        assert abs(wrap_angle(found[2] - yaw)) < TENTH_DEGREE


def test_sumo_equals_sumolib(tmp_path):
    sumolib = pytest.importorskip("sumolib", reason="sumolib is not installed")
    folder = DATA / "synthetic" / "sumo_generated"
    recording = next(sumo.read(folder, "rb.fcd.xml.gz"))
    net = sumolib.net.readNet(str(folder / "rb.net.xml"), withInternal=True)
    road = recording.road
    for key in road.keys:
        shape = np.array(net.getLane(key).getShape())
        center = road.center_of(road.keys.index(key))
        assert np.linalg.norm(center[[0, -1]] - shape[[0, -1]], axis=1).max() < 0.01
        width = np.linalg.norm(center[0] - road.left_V2[road.offsets[road.keys.index(key)]])
        assert abs(2.0 * width - net.getLane(key).getWidth()) < 0.01
    text = gzip.decompress((folder / "rb.fcd.xml.gz").read_bytes())
    (tmp_path / "fcd.xml").write_bytes(text)
    order: list[str] = []
    compared = 0
    for step in sumolib.xml.parse(str(tmp_path / "fcd.xml"), "timestep"):
        frame = round(float(step.time) / 0.5)
        if frame >= 300:
            break
        for vehicle in step.vehicle or ():
            if vehicle.id not in order:
                order.append(vehicle.id)
            track = order.index(vehicle.id)
            pose = recording.tracks.poses_R3[_row(recording.tracks, track, frame)]
            bearing = math.radians(float(vehicle.angle))
            half = recording.tracks.size_K4[track, 0] / 2.0
            center = [
                float(vehicle.x) - half * math.sin(bearing),
                float(vehicle.y) - half * math.cos(bearing),
            ]
            assert np.linalg.norm(pose[:2] - center) < 0.01
            assert abs(wrap_angle(pose[2] - (math.pi / 2.0 - bearing))) < TENTH_DEGREE
            compared += 1
    assert compared > 2000


class _AsDict(pickle.Unpickler):
    """Open a file that is known to be harmless; the one class it names is a dict."""

    def find_class(self, module, name):
        return dict if module.startswith("metadrive") else super().find_class(module, name)


def test_scenarionet_equals_its_pickle_opened_by_hand():
    root = DATA / "real" / "nuscenes_mini_scenarionet"
    for name in scenarionet.units(root)[:2]:
        with (root / name).open("rb") as file:
            scenario = _AsDict(file).load()
        (recording,) = scenarionet.read(root, name)
        ego = scenario["metadata"]["sdc_id"]
        keys, compared = list(scenario["tracks"]), 0
        for track, number in enumerate(recording.tracks.key_K.tolist()):
            state = scenario["tracks"][keys[number]]["state"]
            sizes = [
                float(np.median(np.asarray(state[side])[np.asarray(state["valid"]) > 0]))
                for side in ("length", "width")
            ]
            for frame in np.flatnonzero(np.asarray(state["valid"]))[::10]:
                pose = recording.tracks.poses_R3[_row(recording.tracks, track, int(frame))]
                yaw = float(np.asarray(state["heading"]).reshape(-1)[frame])
                where = np.array(state["position"][frame][:2], dtype=float)
                # nuScenes' ego stands at its rear axle, 0.28 of its length behind the centre.
                if keys[number] == ego:
                    where += 0.28 * max(sizes) * np.array([math.cos(yaw), math.sin(yaw)])
                assert np.linalg.norm(pose[:2] - where) < 0.01
                assert abs(wrap_angle(pose[2] - yaw)) < TENTH_DEGREE
                compared += 1
        assert compared > 100
