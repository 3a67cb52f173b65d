"""Single rules on a straight road, with outcomes known by hand; both versions where they differ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from autoscale_ray.evaluation import RULES_V1, RULES_V2, epdms, pdm_closed, pdms, prepare
from autoscale_ray.evaluation.observation import replay_tracks

from .straight_road import constant_speed, rectangle, straight_road


def columns(scene, waypoints, score=epdms, backend="numba") -> dict[str, float]:
    result = score([scene], waypoints[None, None], backend=backend)
    values = {name: float(metric.value[0, 0]) for name, metric in result.raw.items()}
    assert all(bool(metric.valid.all()) for metric in result.raw.values())
    return {**values, "score": float(result.raw_score.value[0, 0])}


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("score", [epdms, pdms])
def test_free_driving_scores_one_but_for_progress(score, backend):
    values = columns(straight_road(speed_mps=12.0), constant_speed(12.0), score, backend)
    others = {name: value for name, value in values.items() if name not in ("score", "ego_progress")}
    assert set(others.values()) == {1.0}
    assert values["ego_progress"] > 0.9
    assert values["score"] > 0.95


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_hitting_a_parked_vehicle_is_at_fault_and_a_cone_counts_half(backend):
    parked = {"x": 25.0, "y": 0.0}
    vehicle = columns(straight_road(agents=[parked]), constant_speed(8.0), backend=backend)
    cone = columns(straight_road(agents=[{**parked, "type": 3}]), constant_speed(8.0), backend=backend)
    assert (vehicle["no_at_fault_collisions"], cone["no_at_fault_collisions"]) == (0.0, 0.5)
    assert vehicle["time_to_collision_within_bound"] == cone["time_to_collision_within_bound"] == 0.0
    assert vehicle["score"] == 0.0


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_standing_ego_is_never_at_fault(backend):
    rammed = {"x": 20.0, "y": 0.0, "yaw": np.pi, "velocity": (-8.0, 0.0)}
    values = columns(straight_road(speed_mps=0.0, agents=[rammed]), constant_speed(0.0), backend=backend)
    assert values["no_at_fault_collisions"] == values["time_to_collision_within_bound"] == 1.0


def test_being_hit_from_behind_is_not_at_fault():
    behind = {"x": -15.0, "y": 0.0, "velocity": (14.0, 0.0)}
    assert columns(straight_road(agents=[behind]), constant_speed(8.0))["no_at_fault_collisions"] == 1.0


def test_a_side_touch_is_at_fault_only_outside_the_own_lane():
    beside = {"x": 1.0, "y": 2.4, "velocity": (8.0, -0.4), "dims": (4.0, 1.0, 1.5)}
    inside = straight_road(agents=[beside])
    assert columns(inside, constant_speed(8.0))["no_at_fault_collisions"] == 1.0
    narrow = dataclasses.replace(inside, polygon_xy=inside.polygon_xy * [[1.0, 0.2]])
    assert columns(narrow, constant_speed(8.0))["no_at_fault_collisions"] == 0.0


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_an_agent_that_overlaps_the_ego_at_first_is_removed_in_v2_and_kept_in_v1(backend):
    overlapping = {"x": 3.0, "y": 0.5}
    scene = straight_road(agents=[overlapping])
    assert columns(scene, constant_speed(8.0), backend=backend)["no_at_fault_collisions"] == 1.0
    assert columns(scene, constant_speed(8.0), pdms, backend)["no_at_fault_collisions"] == 0.0


def with_red_connector(scene):
    """A red connector of the route from x = 25 to 40 m."""
    red = np.zeros((3, 11), bool)
    red[2] = True
    return dataclasses.replace(
        scene,
        polygon_layers=np.array([0, 1, 2]),
        polygon_on_route=np.array([False, True, True]),
        polygon_red=red,
        polygon_offsets=np.array([0, 4, 8, 12]),
        polygon_xy=np.concatenate([scene.polygon_xy, rectangle(25.0, 40.0, -1.5, 1.5)]),
    )


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_red_connector_ahead_is_a_light_violation_in_v2(backend):
    scene = with_red_connector(straight_road())
    assert columns(scene, constant_speed(8.0), backend=backend)["traffic_light_compliance"] == 0.0
    assert columns(scene, constant_speed(3.0), backend=backend)["traffic_light_compliance"] == 1.0
    off_route = dataclasses.replace(scene, polygon_on_route=np.array([False, True, False]))
    assert columns(off_route, constant_speed(8.0), backend=backend)["traffic_light_compliance"] == 1.0
    assert "traffic_light_compliance" not in columns(scene, constant_speed(8.0), pdms, backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_red_light_holds_pdm_closed_back(backend):
    scene = straight_road()
    cases = (scene, with_red_connector(scene))
    free, held = (pdm_closed(case, backend=backend).proposals[4, -1, 0] for case in cases)
    assert free > 30.0
    assert held < 25.0


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_leaving_the_road_and_the_route(backend):
    values = columns(straight_road(), constant_speed(8.0, lateral_m=6.0), backend=backend)
    assert values["drivable_area_compliance"] == 0.0
    empty_route = dataclasses.replace(straight_road(), polygon_on_route=np.array([False, False]))
    values = columns(empty_route, constant_speed(8.0), backend=backend)
    assert values["driving_direction_compliance"] == 0.0
    assert values["drivable_area_compliance"] == 1.0
    slow = columns(
        straight_road(speed_mps=3.0, polygon_on_route=[False, False]), constant_speed(3.0), backend=backend
    )
    assert slow["driving_direction_compliance"] == 0.5


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_intersections_spare_direction_and_lane_keeping_in_v2_only(backend):
    scene = straight_road(polygon_on_route=[False, False], polygon_layers=[3, 1])
    centreline = scene.centreline + np.array([0.0, 1.0, 0.0])
    scene = dataclasses.replace(scene, centreline=centreline)
    values = columns(scene, constant_speed(8.0), backend=backend)
    assert values["driving_direction_compliance"] == values["lane_keeping"] == 1.0
    assert columns(scene, constant_speed(8.0), pdms, backend)["driving_direction_compliance"] == 0.0


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_lane_keeping_allows_less_than_two_seconds(backend):
    scene = straight_road()
    away = dataclasses.replace(scene, centreline=scene.centreline + np.array([0.0, 0.6, 0.0]))
    assert columns(scene, constant_speed(8.0), backend=backend)["lane_keeping"] == 1.0
    assert columns(away, constant_speed(8.0), backend=backend)["lane_keeping"] == 0.0


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_hard_braking_is_uncomfortable(backend):
    times = np.arange(1, 9) * 0.5
    stop = constant_speed(8.0)
    stop[:, 0] = np.where(times < 1.0, 8.0 * times - 4.0 * times**2, 4.0)
    values = columns(straight_road(), stop, backend=backend)
    assert values["history_comfort"] == 0.0
    assert columns(straight_road(), stop, pdms, backend)["comfort"] == 0.0


def test_the_human_filter_forgives_what_the_human_did_and_not_in_synthetic_scenes():
    parked = {"x": 25.0, "y": 0.0}
    scene = straight_road(agents=[parked])
    result = epdms([scene], constant_speed(8.0)[None, None])
    assert float(result.raw["no_at_fault_collisions"].value) == 0.0
    assert float(result.filtered["no_at_fault_collisions"].value) == 1.0
    assert float(result.raw_score.value) == 0.0 < float(result.score.value)
    for unfiltered in (
        dataclasses.replace(scene, is_synthetic=True),
        dataclasses.replace(scene, human_poses=None),
    ):
        result = epdms([unfiltered], constant_speed(8.0)[None, None])
        assert float(result.filtered["no_at_fault_collisions"].value) == 0.0


@pytest.mark.parametrize("rules", [RULES_V1, RULES_V2])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_agents_and_no_polygons(rules, backend):
    scene = straight_road(
        polygon_layers=np.zeros(0),
        polygon_on_route=np.zeros(0),
        polygon_red=np.zeros((0, 11)),
        polygon_offsets=[0],
        polygon_xy=np.zeros((0, 2)),
    )
    score = pdms if rules is RULES_V1 else epdms
    values = columns(scene, constant_speed(8.0), score, backend)
    assert values["drivable_area_compliance"] == values["driving_direction_compliance"] == 0.0
    assert values["no_at_fault_collisions"] == 1.0
    assert prepare(scene, rules, backend=backend).reference_multiplier == 0.0


def test_tracks_seen_once_stand_still_and_late_ones_are_absent_before():
    once, late = [False] * 11, [False] * 11
    once[3], late[4], late[6] = True, True, True
    agents = [
        {"x": 30.0, "y": 0.0, "velocity": (2.0, 0.0), "mask": once},
        {"x": 50.0, "y": 0.0, "velocity": (2.0, 0.0), "mask": late},
    ]
    tracks = replay_tracks(straight_road(agents=agents), np.zeros(2), 9)
    assert tracks.present[0].all()
    np.testing.assert_allclose(tracks.boxes[0, :, 0], 33.0)
    assert np.flatnonzero(tracks.present[1]).tolist() == list(range(20, 31))
    np.testing.assert_allclose(tracks.boxes[1, 20:31, 0], 50.0 + 2.0 * np.arange(2.0, 3.01, 0.1))


def test_a_missing_frame_is_bridged_along_the_shorter_turn():
    mask = [True, False, True] + [False] * 8
    scene = straight_road(agents=[{"x": 10.0, "y": 2.0, "mask": mask}])
    states = scene.agent_states.copy()
    states[0, 0, 2], states[0, 2, 2] = 3.0, -3.0
    tracks = replay_tracks(dataclasses.replace(scene, agent_states=states), np.zeros(2), 9)
    yaw = np.arctan2(tracks.boxes[0, 5, 3], tracks.boxes[0, 5, 2])
    assert abs(yaw) == pytest.approx(np.pi)
    assert tracks.present[0, :11].all()
    assert not tracks.present[0, 11:].any()


@pytest.mark.parametrize(("start", "middle"), [(0.5, np.pi / 2 + 0.5), (np.pi + 0.5, np.pi / 2 + 0.5)])
def test_a_yaw_that_flips_by_half_a_turn_turns_back_the_way_it_was_written(start, middle):
    scene = straight_road(agents=[{"x": 10.0, "y": 2.0}])
    states = scene.agent_states.copy()
    states[0, 0, 2], states[0, 1:, 2] = start, (np.pi + 0.5) if start == 0.5 else 0.5
    assert abs(states[0, 1, 2] - states[0, 0, 2]) == np.pi
    boxes = replay_tracks(dataclasses.replace(scene, agent_states=states), np.zeros(2), 9).boxes[0]
    at = np.array([1, 4])
    expected = start + 0.2 * at * (middle - start) * 2.0
    np.testing.assert_allclose(boxes[at, 2], np.cos(expected), atol=1e-12)
    np.testing.assert_allclose(boxes[at, 3], np.sin(expected), atol=1e-12)


def test_v1_progress_is_zero_where_a_multiplier_is_and_v2_progress_is_not():
    scene = straight_road(agents=[{"x": 25.0, "y": 0.0}], human_poses=None)
    assert columns(scene, constant_speed(8.0), pdms)["ego_progress"] == 0.0
    assert columns(scene, constant_speed(8.0), epdms)["ego_progress"] > 0.0


def test_scores_follow_their_formulas():
    scene = straight_road(agents=[{"x": 60.0, "y": 0.0}])
    values = columns(scene, constant_speed(5.0))
    product = np.prod([values[name] for name in list(values)[:4]])
    weighted = 5 * values["ego_progress"] + 5 * values["time_to_collision_within_bound"]
    expected = product * (weighted + 2 * values["lane_keeping"] + 2 * values["history_comfort"]) / 14
    assert values["score"] == pytest.approx(expected, abs=1e-12)


def test_a_result_names_its_traffic():
    result = epdms([straight_road()], constant_speed(8.0)[None, None], keep_states=True)
    assert "non-reactive" in result.traffic
    assert result.states.shape == (1, 1, 41, 11)
    assert not bool(result.extended_comfort.valid.any())
    assert torch.isnan(result.extended_comfort.value).all()
