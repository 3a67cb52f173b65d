import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
import shapely

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.from_pool import row_values, scoring_scene
from autoscale_ray.scenes.batch import batch_from_table
from autoscale_ray.scenes.crops import _cut_lanes, _tangled_lanes, _widened
from autoscale_ray.scenes.recording import Recording, Track, gather_tracks
from autoscale_ray.scenes.road_map import Lane, make_road_map
from autoscale_ray.scenes.schema import DRIVING_COMMANDS, POLYGON_LAYERS
from autoscale_ray.scenes.windows import WindowOptions, cut_windows
from scenes.small_world import car, fork_road, lane, place, two_cars


def _cut(recording, **options) -> pa.Table:
    return pa.concat_tables(list(cut_windows(recording, "real", WindowOptions(**options))))


def _ids(table) -> list[str]:
    return table["scene_id"].to_pylist()


def test_windows_start_with_the_track_and_follow_every_two_seconds():
    # Car 1 is seen 0 to 12 s: 0 s of the window at 2, 4, 6, 8 s. Car 2, 1 to 9 s: at 3 and 5 s.
    assert _ids(_cut(two_cars())) == [f"test/drive/1/{t}" for t in (2000, 4000, 6000, 8000)] + [
        "test/drive/2/3000",
        "test/drive/2/5000",
    ]
    assert _ids(_cut(two_cars(), stride_s=4.0)) == [
        "test/drive/1/2000",
        "test/drive/1/6000",
        "test/drive/2/3000",
    ]


def test_a_gap_in_a_track_parts_its_windows():
    frames = np.concatenate([np.arange(0, 70), np.arange(75, 140)])
    poses = np.column_stack([place(np.column_stack([frames * 0.5, 0.0 * frames])), np.full(len(frames), 0.7)])
    track = Track(
        key=7, kind="vehicle", length_m=4.0, width_m=1.8, frames=frames, poses=poses, can_be_ego=True
    )
    recording = dataclasses.replace(two_cars(), tracks=gather_tracks([track]))
    assert _ids(_cut(recording)) == ["test/drive/7/2000", "test/drive/7/9500"]


def test_standing_egos_are_left_out_unless_asked_for():
    recording = dataclasses.replace(two_cars(), tracks=gather_tracks([car(1, 20.0, 0.4, 0.0, 0, 60)]))
    assert list(cut_windows(recording, "real", WindowOptions())) == []
    assert len(_cut(recording, min_displacement_m=0.0)) == 1


def test_ego_and_agent_states_equal_the_closed_form():
    batch = batch_from_table(_cut(two_cars()).slice(1, 1))  # car 1 at 4 s
    times = (np.arange(15) - 4) * 0.5
    ego = batch.ego_states_NT7[0].numpy()
    np.testing.assert_allclose(ego[:, 0], 5.0 * times, atol=1e-4)
    np.testing.assert_allclose(ego[:, 1:3], 0.0, atol=1e-4)
    np.testing.assert_allclose(ego[:, 3], 5.0, atol=1e-3)
    np.testing.assert_allclose(ego[:, 4:], 0.0, atol=1e-3)
    assert batch.ego_valid_NT[0].all()
    agent = batch.agent_states_AT5[0].numpy()
    # The centre of the ego is 0.28 of its 4 m ahead of the rear axle; the other car is 10 m further ahead, 4 m right.
    np.testing.assert_allclose(agent[:, 0], 1.12 + 10.0 + 5.0 * times, atol=1e-3)
    np.testing.assert_allclose(agent[:, 1], -4.0, atol=1e-3)
    np.testing.assert_allclose(agent[:, 3:], [[5.0, 0.0]] * 15, atol=1e-3)
    assert batch.agent_valid_AT[0].all()


def test_frames_not_recorded_are_invalid_and_zero():
    table = _cut(two_cars())
    early = batch_from_table(table.slice(0, 1))  # car 1 at 2 s; car 2 appears at 1 s
    assert early.agent_valid_AT[0].tolist() == [False, False] + [True] * 13
    assert not early.agent_states_AT5[0, :2].any()
    late = batch_from_table(table.slice(3, 1))  # car 1 at 8 s; car 2 leaves at 9 s, car 1 at 12 s
    assert late.agent_valid_AT[0].tolist() == [True] * 7 + [False] * 8
    assert late.ego_valid_NT[0].tolist() == [True] * 13 + [False] * 2


def test_origin_is_the_rear_axle_on_the_map():
    table = _cut(two_cars()).slice(1, 1)
    expected = place(np.array([[20.0 + 5.0 * 4.0 - 1.12, 0.0]]))[0]
    np.testing.assert_allclose(
        [table["origin_x_m"][0].as_py(), table["origin_y_m"][0].as_py()], expected, atol=1e-6
    )
    assert table["timestamp_us"][0].as_py() == 4_000_000
    assert table["route_speed_limit_mps"][0].as_py() == 13.9


def test_lanes_polygons_and_links_of_a_window():
    batch = batch_from_table(_cut(two_cars()).slice(1, 1))
    assert len(batch.lane_width_L) == 5
    np.testing.assert_allclose(batch.lane_width_L.numpy()[:4], 4.0, atol=1e-6)
    layers = [POLYGON_LAYERS[k] for k in batch.polygon_layer_Q.tolist()]
    assert layers.count("lane") + layers.count("lane_connector") == 5
    assert layers.count("roadblock") + layers.count("intersection") == 5
    # The route goes straight on along lane a: roadblocks a+b and a2+b2, not the turn.
    assert batch.lane_on_route_L.tolist() == [True, True, True, True, False]
    successors = {tuple(link[:2]) for link in batch.links_E3.tolist() if link[2] == 0}
    assert successors == {(0, 2), (0, 4), (1, 3)}
    neighbours = {tuple(link) for link in batch.links_E3.tolist() if link[2] != 0}
    assert neighbours == {(0, 1, 2), (1, 0, 1), (2, 3, 2), (3, 2, 1)}


def test_lanes_are_cut_near_the_crop_radius_and_never_inside_it():
    long = make_road_map([lane("far", [(-500, 0), (500, 0)])])
    batch = batch_from_table(_cut(dataclasses.replace(two_cars(), road=long)).slice(1, 1))
    x = batch.lane_points_V2[:, 0].numpy()
    assert -91.0 <= x.min() <= -80.0
    assert 80.0 <= x.max() <= 91.0


def test_a_border_that_crosses_itself_gives_simple_polygons_and_a_scene_that_is_scored():
    """The left border of lane a loops back over itself; a parking space is a bow tie."""
    road = two_cars().road
    steps_back = road.left_V2.copy()
    steps_back[2:5] = place(np.array([(20.0, 2.0), (15.0, 2.5), (16.0, 1.5)]))
    assert not shapely.Polygon(np.concatenate([steps_back[:11], road.right_V2[:11][::-1]])).is_valid
    bow_tie = place(np.array([(20.0, 5.0), (30.0, 9.0), (30.0, 5.0), (20.0, 9.0)]))
    tangled = dataclasses.replace(
        road,
        left_V2=steps_back,
        area_offsets=np.array([0, 4]),
        area_points_W2=bow_tie,
        area_layer=("carpark_area",),
        area_lane_Q=np.array([-1]),
    )
    table = _cut(dataclasses.replace(two_cars(), road=tangled)).slice(1, 1)
    batch = batch_from_table(table)
    layers = [POLYGON_LAYERS[k] for k in batch.polygon_layer_Q.tolist()]
    assert layers.count("carpark_area") == 2
    assert layers.count("lane") == 5 + 1
    rings = np.split(batch.polygon_points_W2.numpy(), batch.polygon_point_offsets[1:-1].numpy())
    assert all(shapely.Polygon(ring).is_valid for ring in rings)
    on_lane = batch.polygon_lane_Q == 0
    area = sum(shapely.Polygon(rings[row]).area for row in np.flatnonzero(on_lane.numpy()))
    assert area == pytest.approx(400.0, rel=0.05)
    scoring_scene(row_values(table, 0))


def test_lanes_are_suspects_by_their_own_borders_and_by_the_wider_ones():
    """The borders of one lane meet in a point; the ends of another, a circle, are 15 cm apart."""
    turn = np.linspace(0.0, 2 * np.pi - 0.015, 60)
    around = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    pinched = Lane(
        key="pinched",
        left=np.array([(0, 1), (5, 0), (10, 1)], dtype=float),
        right=np.array([(0, -1), (5, 0), (10, -1)], dtype=float),
    )
    circle = Lane(key="circle", left=9 * around, right=11 * around)
    plain = Lane(
        key="plain", left=np.array([(0.0, 9.0), (9.0, 9.0)]), right=np.array([(0.0, 5.0), (9.0, 5.0)])
    )
    road = make_road_map([pinched, circle, plain])
    cut = _cut_lanes(road, np.zeros((1, 3)), np.array([50.0]))
    assert _tangled_lanes(road, cut).tolist() == [True, True, False]
    alone = [
        shapely.Polygon(np.concatenate([lane.left, lane.right[::-1]])).is_valid for lane in (pinched, circle)
    ]
    assert alone == [False, True]


def test_wider_areas_do_not_turn_borders_back():
    """Vertices of the left border stand closer than those of the right one, some in one place."""
    left = place(np.array([(0, 2), (10, 2), (10.002, 2), (10.004, 2), (10.004, 2), (20, 2)]))
    right = place(np.array([(0, -2), (10, -2), (10.3, -2), (10.6, -2), (10.9, -2), (20, -2)]))
    road = make_road_map([Lane(key="a", left=left, right=right)])
    for wider_V2, border_V2 in zip(_widened(road), (left, right), strict=True):
        along = place(np.array([[1.0, 0.0]])) - place(np.zeros((1, 2)))
        assert (np.diff(wider_V2, axis=0) @ along[0] >= -1e-9).all()
        assert np.linalg.norm(wider_V2[1:-1] - border_V2[1:-1], axis=1) == pytest.approx(0.1)


def test_centerline_reaches_beyond_the_drive_and_bears_its_direction():
    batch = batch_from_table(_cut(two_cars()).slice(1, 1))
    line = batch.centerline_C3.numpy()
    assert line[-1, 0] > 4.0 * 5.0 + 50.0
    assert line[0, 0] == pytest.approx(-30.0, abs=0.1)
    np.testing.assert_allclose(line[:, 1:], 0.0, atol=1e-3)
    assert DRIVING_COMMANDS[int(batch.command_N[0])] == "forward"


def _turning(recording: Recording) -> Recording:
    """Car 1 follows lane a and the turn at 5 m/s."""
    road = recording.road
    path = np.concatenate([road.center_of(0), road.center_of(4)[1:]])
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    frames = np.arange(0, 121)
    xy = np.stack([np.interp(60.0 + 0.5 * frames, along, path[:, k]) for k in range(2)], axis=1)
    step = np.gradient(xy, axis=0)
    poses = np.column_stack([xy, np.arctan2(step[:, 1], step[:, 0])])
    track = Track(
        key=1, kind="vehicle", length_m=4.0, width_m=1.8, frames=frames, poses=poses, can_be_ego=True
    )
    return dataclasses.replace(recording, tracks=gather_tracks([track]))


def test_the_route_follows_the_turn_that_is_driven():
    table = _cut(_turning(two_cars()))
    batch = batch_from_table(table)
    commands = [DRIVING_COMMANDS[k] for k in batch.command_N.tolist()]
    assert commands[0] == "forward"  # at 2 s the turn is 30 m ahead
    assert commands[2] == "left"  # at 6 s it is 10 m ahead
    first = batch.select([0])
    assert first.lane_on_route_L.tolist() == [True, True, False, False, True]
    last_yaw = float(first.centerline_C3[-1, 2])
    assert last_yaw == pytest.approx(math.pi / 2, abs=0.1)


def test_without_a_map_the_driven_path_is_the_centerline_and_the_command_unknown():
    batch_table = _cut(dataclasses.replace(two_cars(), road=make_road_map([])))
    batch = batch_from_table(batch_table)
    assert "no_map" in batch_table["tags"][0].as_py()
    assert len(batch.lane_width_L) == 0
    assert DRIVING_COMMANDS[int(batch.command_N[0])] == "unknown"
    assert float(batch.select([0]).centerline_C3[-1, 0]) > 70.0


def test_pairs_link_to_the_window_half_a_second_earlier():
    table = _cut(two_cars(), pairs=True)
    previous = dict(zip(_ids(table), table["prev_scene_id"].to_pylist(), strict=True))
    assert previous["test/drive/1/4000"] == "test/drive/1/3500"
    assert previous["test/drive/1/3500"] is None
    row = _ids(table).index("test/drive/1/1500")
    batch = batch_from_table(table.slice(row, 1))
    assert not batch.ego_valid_NT[0, 0], "-2.0 s lies before the track"
    assert batch.ego_valid_NT[0, 1:13].all()
    assert "pair_first" in table["tags"][row].as_py()


def test_red_lights_mark_the_connector_in_their_frames():
    road = fork_road()
    red_FL = np.zeros((121, road.num_lanes), dtype=bool)
    red_FL[45:, road.keys.index("turn")] = True
    connector = dataclasses.replace(road, is_connector_L=np.array([key == "turn" for key in road.keys]))
    batch = batch_from_table(_cut(dataclasses.replace(two_cars(red_FL=red_FL), road=connector)).slice(1, 1))
    red = batch.polygon_red_QT.numpy()
    marked = [POLYGON_LAYERS[k] for k in batch.polygon_layer_Q[batch.polygon_red_QT.any(1)].tolist()]
    assert marked == ["lane_connector"]
    assert red.any(axis=0).tolist() == [False] * 5 + [True] * 10


def test_a_time_step_that_does_not_divide_half_a_second_is_refused():
    with pytest.raises(InvalidInputError, match="whole multiple"):
        list(cut_windows(dataclasses.replace(two_cars(), frame_interval_s=0.04), "real", WindowOptions()))
