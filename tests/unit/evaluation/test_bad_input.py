"""Bad input is refused with the scene, the field and the rule; in batch jobs the rest is scored."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoscale_ray.errors import InvalidInputError, InvalidSceneError
from autoscale_ray.evaluation import (
    RULES_V2,
    epdms,
    make_scene,
    pack_rings,
    pdms,
    prepare,
    two_frame_extended_comfort,
    validate_scene,
)
from autoscale_ray.evaluation.score_file import check_waypoints, read_trajectories

from .straight_road import constant_speed, straight_road

BOW_TIE = np.array([[0.0, 0.0], [5.0, 5.0], [5.0, 0.0], [0.0, 5.0]])
ROAD = straight_road(agents=[{"x": 20.0, "y": 3.0}])


def changed(name: str, index: object, value: float) -> dict[str, np.ndarray]:
    array = np.array(getattr(ROAD, name), copy=True)
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (changed("ego_history_states", (0, 0), np.nan), "ego_history_states"),
        (changed("ego_history_times_us", 1, 0), "ego_history_times_us"),
        (
            changed("ego_history_times_us", 0, ROAD.ego_history_times_us[-1] - 60_100_000),
            "ego_history_times_us",
        ),
        (changed("agent_states", (0, 0, 0), np.nan), "agent_states"),
        (changed("agent_dims", (0, 0), 0.0), "agent_dims"),
        (changed("agent_types", 0, 7), "agent_types"),
        (changed("polygon_layers", 0, 5), "polygon_layers"),
        (changed("polygon_xy", (0, 0), np.inf), "polygon_xy"),
        (changed("polygon_offsets", 1, 2), "polygon_offsets"),
        (changed("polygon_red", (1, 0), True), "polygon_red"),
        (changed("centreline", (3, 2), np.nan), "centreline"),
        ({"polygon_xy": np.concatenate([BOW_TIE, ROAD.polygon_xy[4:]])}, "polygon_xy"),
        ({"polygon_xy": np.concatenate([BOW_TIE * [1, 0], ROAD.polygon_xy[4:]])}, "polygon_xy"),
        ({"centreline": ROAD.centreline[:1]}, "centreline"),
        ({"centreline": np.zeros((3, 3))}, "centreline"),
        ({"speed_limit_mps": 0.0}, "speed_limit_mps"),
        ({"human_poses": np.zeros((7, 3))}, "human_poses"),
        ({"agent_mask": np.ones((1, 9), bool)}, "agent_mask"),
        ({"agent_states": np.zeros((1, 8, 5))}, "agent_states"),
    ],
)
def test_a_broken_scene_names_scene_field_and_rule(changes, field):
    with pytest.raises(ValueError, match=f"straight: {field}: .*must"):
        validate_scene(dataclasses.replace(ROAD, **changes))


@pytest.mark.parametrize("number", [0, 1])
def test_a_ring_that_crosses_itself_is_told_by_its_number(number):
    xy = np.array(ROAD.polygon_xy)
    xy[4 * number : 4 * number + 4] = BOW_TIE
    with pytest.raises(InvalidSceneError, match=f"straight: polygon_xy: ring {number} must be simple"):
        validate_scene(dataclasses.replace(ROAD, polygon_xy=xy))


def test_arrays_that_are_no_numbers_are_refused():
    with pytest.raises(InvalidSceneError, match="s: agent_dims: must be an array of float64"):
        make_scene("s", agent_dims=[["wide", 1, 2]])


def test_nan_where_an_agent_was_not_seen_is_no_fault():
    mask = np.array(ROAD.agent_mask)
    mask[0, 0] = False
    states = np.array(ROAD.agent_states)
    states[0, 0] = np.nan
    scene = dataclasses.replace(ROAD, agent_mask=mask, agent_states=states)
    assert 0.0 < float(epdms([scene], constant_speed(8.0)[None, None]).score.value) <= 1.0


@pytest.mark.parametrize(
    "trajectories", [np.zeros((1, 8, 3)), np.zeros((1, 1, 9, 3)), np.zeros((1, 1, 8, 2)), np.zeros((2, 1, 8, 3)),
                     [[[[0, 0, 0]], [[1, 2]]]], "fast"])  # fmt: skip
def test_trajectories_of_a_wrong_shape(trajectories):
    with pytest.raises(InvalidSceneError, match="trajectories: must have"):
        epdms([ROAD], trajectories)


@pytest.mark.parametrize("poses", [np.zeros((8, 3)), np.full((41, 3), np.nan)])
def test_a_reference_that_is_no_drive_is_refused(poses):
    with pytest.raises(InvalidSceneError, match=r"straight: reference_poses: must be \(41, 3\) and finite"):
        prepare(ROAD, RULES_V2, poses)


def test_an_unknown_backend_is_refused():
    with pytest.raises(InvalidInputError, match=r"backend: must be auto, torch or numba .found 'cuda'"):
        epdms([ROAD], constant_speed(8.0)[None, None], backend="cuda")


def test_a_trajectory_with_nan_names_its_scene():
    with pytest.raises(ValueError, match="straight: trajectory: must be finite"):
        epdms([ROAD], np.full((1, 1, 8, 3), np.nan))


def test_v1_needs_eleven_frames():
    arrays = {name: getattr(ROAD, name)[:, :9] for name in ("agent_states", "agent_mask", "polygon_red")}
    short = dataclasses.replace(ROAD, **arrays)
    assert float(epdms([short], constant_speed(8.0)[None, None]).score.value) > 0.0
    with pytest.raises(ValueError, match="straight: agent_states: must have 11 frames for v1"):
        pdms([short], constant_speed(8.0)[None, None])


def test_unclosed_rings_are_refused_and_closed_ones_packed():
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    offsets, xy = pack_rings([square, square + 2.0])
    assert offsets.tolist() == [0, 4, 8]
    assert np.array_equal(xy[4:], square[:-1] + 2.0)
    with pytest.raises(ValueError, match="here: polygon 1: must be closed"):
        pack_rings([square, square[:-1]], "here")
    for ring in ([[0, 0], [1]], "square"):
        with pytest.raises(InvalidSceneError, match="here: polygon 1: must be an array of float64"):
            pack_rings([square, ring], "here")


def test_frames_too_far_apart_have_no_extended_comfort():
    states = np.zeros((2, 41, 11))
    with pytest.raises(ValueError, match="interval_s"):
        two_frame_extended_comfort(states, states, np.array([0.5, 0.6]))
    comfort = two_frame_extended_comfort(states, states, np.array([0.5, np.nan]))
    assert comfort.valid.tolist() == [True, False]


def test_trajectories_are_read_from_npz_and_parquet(tmp_path):
    poses = np.stack([constant_speed(8.0), constant_speed(5.0)])[None]
    np.savez(tmp_path / "t.npz", scene_id=np.array(["straight"]), trajectories=poses)
    pq.write_table(
        pa.table({"scene_id": ["straight"], "trajectories": poses.tolist()}), tmp_path / "t.parquet"
    )
    for name in ("t.npz", "t.parquet"):
        assert np.array_equal(read_trajectories(tmp_path / name)["straight"], poses[0])
    np.savez(
        tmp_path / "twice.npz", scene_id=np.array(["a", "a"]), trajectories=np.concatenate([poses, poses])
    )
    np.savez(tmp_path / "empty.npz", other=poses)
    np.savez(tmp_path / "number.npz", scene_id=np.array(["a", "b"]), trajectories=np.float64(3.0))
    np.savez(tmp_path / "none.npz", scene_id=np.array([], str), trajectories=poses[:0])
    pq.write_table(pa.table({"scene_id": ["straight"]}), tmp_path / "column.parquet")
    lists = pa.table({"scene_id": [["a"], ["a"]], "trajectories": [poses[0].tolist()] * 2})
    pq.write_table(lists, tmp_path / "lists.parquet")
    names = ("twice.npz", "empty.npz", "number.npz", "none.npz", "column.parquet", "lists.parquet")
    for name in names:
        with pytest.raises(InvalidInputError, match=name):
            read_trajectories(tmp_path / name)


def test_one_irregular_row_of_a_file_does_not_refuse_the_others(tmp_path):
    poses = constant_speed(8.0)[None].tolist()
    rows = {
        "good": poses,
        "ragged": [poses[0], poses[0][:3]],
        "missing": None,
        "empty": [],
        "hole": [[[None, 0.0, 0.0]] * 8],
        "short": [poses[0][:7]],
    }
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"scene_id": list(rows), "trajectories": list(rows.values())}), path)
    found = read_trajectories(path)
    assert list(found) == list(rows)
    np.testing.assert_array_equal(check_waypoints("good", found["good"]), poses)
    assert np.isnan(check_waypoints("hole", found["hole"])).any(), "refused by the scorer"
    for name in ("ragged", "missing", "empty", "short"):
        with pytest.raises(
            InvalidSceneError, match=f"^{name}: trajectory: must be an array P x 8 x 3 or P x 40"
        ):
            check_waypoints(name, found[name])
