import csv
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.evaluation.from_pool import row_values, scoring_scene
from autoscale_ray.scenes.batch import batch_from_table
from autoscale_ray.scenes.readers import commonroad
from autoscale_ray.scenes.trust import parse_xml
from autoscale_ray.scenes.windows import WindowOptions, cut_windows, find_anchors
from scenes.scenario_files import lanelet, obstacle, scenario, straight_drive

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the recordings of ../shared/data are not here")


def _recording(content: bytes, name: str = "USA_Here-1_1_T-1.xml"):
    return commonroad.recording_of(parse_xml(content, name), name)


def test_a_scenario_becomes_a_recording():
    recording = _recording(straight_drive())
    assert recording.source == "commonroad/USA_Here"
    assert recording.tags == ("urban",)
    assert recording.tracks.key_K.tolist() == [5]
    np.testing.assert_allclose(recording.tracks.poses_R3[30], [24.0, 0.0, 0.0])
    np.testing.assert_allclose(recording.tracks.velocities_R2[30], [8.06, 0.0])
    assert recording.road.speed_limit_L.tolist() == [13.89]


def test_both_versions_and_roles_are_read():
    parked = (
        '<staticObstacle id="9"><type>parkedVehicle</type><shape><circle><radius>1.0</radius></circle></shape>'
        "<initialState><position><point><x>3</x><y>4</y></point></position><orientation><exact>0.5</exact>"
        "</orientation><time><exact>0</exact></time></initialState></staticObstacle>"
    )
    sign = (
        '<trafficSign id="7"><trafficSignElement><trafficSignID>274</trafficSignID><additionalValue>8.33'
        "</additionalValue></trafficSignElement></trafficSign>"
    )
    moving = obstacle(5, range(80), 0.0, 8.0, tag="dynamicObstacle", kind="bicycle")
    lane = lanelet(1, -50.0, 300.0, 0.0, '<trafficSignRef ref="7"/>')
    recording = _recording(scenario(lane + moving + parked + sign, version="2020a"))
    assert recording.tracks.type_K.tolist() == [2, 0]
    assert recording.tracks.can_be_ego_K.tolist() == [False, False]
    assert recording.tracks.size_K4[1, :2].tolist() == [2.0, 2.0]
    assert (recording.tracks.poses_R3[80:] == [3.0, 4.0, 0.5]).all()
    assert recording.road.speed_limit_L.tolist() == [8.33]


def _lit(red: int, green: int, start: int = 0) -> bytes:
    """A lane with a light of two phases, and a car from a time step on."""
    phases = "".join(
        f"<cycleElement><duration>{steps}</duration><color>{color}</color></cycleElement>"
        for steps, color in ((red, "red"), (green, "green"))
    )
    light = f'<trafficLight id="3"><cycle>{phases}<timeOffset>5</timeOffset></cycle></trafficLight>'
    before = lanelet(1, -50.0, 0.0, 0.0, '<trafficLightRef ref="3"/><successor ref="2"/>')
    drive = obstacle(5, range(start, start + 80), 0.0, 8.0 if start == 0 else 0.0, tag="dynamicObstacle")
    return scenario(before + lanelet(2, 0.0, 300.0, 0.0) + drive + light, version="2020a")


def _far_off() -> bytes:
    """Two cars a million million time steps apart, and one that is parked."""
    cars = "".join(obstacle(key, range(at, at + 3), 0.0, 0.0) for key, at in ((5, 0), (6, 10**12)))
    parked = (
        obstacle(7, range(1), 0.0, 0.0).replace("dynamic", "static").replace("<trajectory></trajectory>", "")
    )
    return scenario(cars + parked)


def test_traffic_lights_turn_the_lanes_behind_them_red():
    red_FL = _recording(_lit(10, 20)).red_FL
    assert not red_FL[:, 0].any()
    assert np.flatnonzero(red_FL[:, 1]).tolist() == [*range(5, 15), *range(35, 45), *range(65, 75)]


BROKEN = {
    "version": (scenario("", version="2017a"), "version 2018b or 2020a"),
    "step": (scenario("", step="0"), "timeStepSize"),
    "number": (straight_drive().replace(b"<x>8.0000</x>", b"<x>eight</x>"), "obstacle 5: x must be a number"),
    "nan": (straight_drive().replace(b"<x>8.0000</x>", b"<x>nan</x>"), "obstacle 5: x must be finite"),
    "missing value": (straight_drive().replace(b"<x>8.0000</x>", b""), "obstacle 5: each of its 100 states"),
    "time": (straight_drive().replace(b"<exact>7</exact></time>", b"<exact>6</exact></time>"), "ascending"),
    "shape": (straight_drive().replace(b"rectangle", b"ellipse"), "obstacle 5: shape must be"),
    "border": (
        straight_drive().replace(b"<y>2.0</y></point></leftBound>", b"</point></leftBound>"),
        "lanelet 1",
    ),
    "phase": (_lit(-3, 10), "trafficLight 3: cycle must last"),
    "cycle": (_lit(10**15, 5 - 10**15), "trafficLight 3: cycle must last"),
    "far off": (_far_off(), "time steps must not be so far apart"),
    "many lights": (_lit(1, 1, 10**12), "frames times lanes must be at most"),
    "lane twice": (
        straight_drive().replace(b"</lanelet>", b"</lanelet>" + lanelet(1, 0, 9, 5).encode()),
        "unique",
    ),
    "identity": (straight_drive().replace(b'id="5"', b'id="five"'), "must be an integer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_elements_are_named(name):
    content, message = BROKEN[name]
    with pytest.raises(InputRejectedError, match=message):
        _recording(content)


def _states_by_hand(root: ElementTree.Element, key: str) -> dict[int, list[float]]:
    node = next(node for node in root.iter("obstacle") if node.get("id") == key)
    fields = ("position/point/x", "position/point/y", "orientation/exact", "velocity/exact")
    return {
        int(state.findtext("time/exact")): [float(state.findtext(field)) for field in fields]
        for state in [node.find("initialState"), *node.findall("trajectory/state")]
    }


@needs_data
def test_a_recorded_scene_equals_values_taken_from_the_file_by_another_path():
    archive = DATA / "real" / "commonroad_ngsim" / "scenarios.zip"
    name = "USA_Lanker-2_10_T-1.xml"
    with zipfile.ZipFile(archive) as file:
        root = ElementTree.fromstring(file.read(name))
    table = next(cut_windows(next(commonroad.read(archive, name)), "real", WindowOptions()))
    row = 3
    key, time_ms = table["scene_id"][row].as_py().split("/")[-2:]
    ego = _states_by_hand(root, key)
    frame = int(time_ms) // 100
    here = complex(*ego[frame][:2]) - 0.28 * table["ego_length_m"][row].as_py() * np.exp(1j * ego[frame][2])
    turn = np.exp(-1j * ego[frame][2])
    batch = batch_from_table(table.slice(row, 1))
    tracks = table["agent_track"][row].as_py()
    compared = 0
    for agent, track in enumerate(tracks):
        states = _states_by_hand(root, str(track))
        for number, at in enumerate(range(frame - 20, frame + 51, 5)):
            assert bool(batch.agent_valid_AT[agent, number]) == (at in states)
            if at in states:
                local = (complex(*states[at][:2]) - here) * turn
                found = batch.agent_states_AT5[agent, number].numpy()
                assert abs(complex(*found[:2]) - local) < 0.01
                yaw_error = (found[2] - states[at][2] + ego[frame][2] + np.pi) % (2 * np.pi) - np.pi
                assert abs(yaw_error) < np.radians(0.1)
                assert np.hypot(*found[3:]) == pytest.approx(abs(states[at][3]), abs=1e-3)
                compared += 1
    assert compared > 300


@needs_data
@pytest.mark.parametrize(
    ("folder", "site", "num_windows"),
    [("synthetic/commonroad_sumo", "DEU_Muc", 1543)],
)
def test_window_counts_agree_with_the_provenance(folder, site, num_windows):
    archive = DATA / folder / "scenarios.zip"
    names = [name for name in commonroad.units(archive) if name.startswith(site)]
    count = 0
    for name in names:
        recording = next(commonroad.read(archive, name))
        count += len(find_anchors(recording, WindowOptions()).track_M)
    assert count == num_windows


@needs_data
@pytest.mark.parametrize("name", ["USA_US101-13_1_T-1.xml", "USA_US101-22_1_T-1.xml"])
def test_every_recorded_scene_can_be_scored(name):
    """Vertices of this motorway's borders lie aslant; areas made wider across them crossed themselves by a hair."""
    archive = DATA / "real" / "commonroad_ngsim" / "scenarios.zip"
    (recording,) = commonroad.read(archive, name)
    for table in cut_windows(recording, "real", WindowOptions()):
        for row in range(len(table)):
            scoring_scene(row_values(table, row))


@needs_data
def test_the_index_names_no_file_that_is_missing():
    with (DATA / "INDEX_commonroad.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == "real/commonroad_ngsim"]
    units = commonroad.units(DATA / "real" / "commonroad_ngsim" / "scenarios.zip")
    assert sorted(row["file"] for row in rows) == units
