"""The expert: its geometry against shapely, its choices in scenes with an obvious answer."""

import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.world import expert
from autoscale_ray.world.draws import cube_rows
from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.profiles import PROFILES, drive_profiles
from autoscale_ray.world.simulation import Conditions, simulate
from autoscale_ray.world.situation import EGO_FRONT_M, EGO_LENGTH_M, EGO_WIDTH_M
from autoscale_ray.world.traffic import FAR_M, NUM_STEPS, STEP_S


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.floats(-8, 8), st.floats(-4, 4), st.floats(-3.2, 3.2), st.floats(0.2, 5.0), st.floats(0.2, 1.5))
def test_box_overlap_agrees_with_shapely(along, across, turn, half_length, half_width):
    own = shapely.box(
        -0.5 * EGO_LENGTH_M - expert.LONG_MARGIN_M,
        -0.5 * EGO_WIDTH_M - expert.SIDE_MARGIN_M,
        0.5 * EGO_LENGTH_M + expert.LONG_MARGIN_M,
        0.5 * EGO_WIDTH_M + expert.SIDE_MARGIN_M,
    )
    other = shapely.affinity.rotate(
        shapely.box(-half_length, -half_width, half_length, half_width), turn, use_radians=True, origin=(0, 0)
    )
    other = shapely.affinity.translate(other, along, across)
    distance = own.distance(other)
    if distance == 0 and own.intersection(other).area < 1e-6:
        return  # touching within rounding: either answer is right
    values = (np.array([value]) for value in (along, across, turn, half_length, half_width))
    assert bool(expert._boxes_overlap(*values)[0]) == (distance == 0)


def _alone(num=1, **changes):
    far = np.full((num, NUM_STEPS + 1), FAR_M)
    values = {
        "speed_N": np.full(num, 8.0),
        "acceleration_N": np.zeros(num),
        "wanted_N": np.full(num, 12.0),
        "leader_rear_NJ": far,
        "leader_speed_NJ": np.zeros_like(far),
        "wait_N": np.full(num, FAR_M),
        "red_N": np.full(num, FAR_M),
        "red_until_s_N": np.full(num, -np.inf),
    }
    return drive_profiles(**{**values, **changes})


def test_profiles_keep_their_jerk_and_never_reverse():
    _, speed, acceleration = _alone(3, speed_N=np.array([0.0, 5.0, 12.0]))
    jerk = np.abs(np.diff(acceleration, axis=-1)) / STEP_S
    allowed = np.array([profile.jerk_mps3 for profile in PROFILES])[None, :, None]
    moving = speed[..., 1:] > 0
    assert np.all((jerk <= allowed + 1e-9) | ~moving)
    assert speed.min() >= 0.0


def test_profiles_integrate_speed_to_station():
    station, speed, _ = _alone()
    np.testing.assert_allclose(np.diff(station, axis=-1), STEP_S * speed[..., 1:], atol=1e-12)


def test_waiting_profiles_stop_before_the_line_and_others_do_not():
    station, _, _ = _alone(wait_N=np.array([30.0]))
    front = station[0, :, -1] + EGO_FRONT_M
    waits = np.array([profile.go_after_s == np.inf for profile in PROFILES])
    assert front[waits].max() < 30.0
    assert front[np.array([p.share_of_limit == 1.0 and p.headway_s == 0 for p in PROFILES])].min() > 40.0


def _driven(family, num, variant=0, **conditions):
    cube = cube_rows((11, "test", family), np.arange(num))
    never = np.zeros(num, bool)
    values = {"slow_N": never, "harmful_N": never, "half_harmful_N": never, "nudge_N3": np.zeros((num, 3))}
    return simulate(family, variant, cube, Conditions(**{**values, **conditions}))


def test_a_free_road_is_driven_at_the_limit():
    driven = _driven("cruise", 50)
    limit = driven.situation.road.limit_N
    np.testing.assert_allclose(driven.drive.speed_NJ[:, -1], limit, rtol=0.06)


def test_a_dynamics_gap_lowers_speed_and_limit():
    always = np.ones(50, bool)
    faithful, slow = _driven("cruise", 50), _driven("cruise", 50, slow_N=always)
    np.testing.assert_allclose(slow.situation.speed_N, 0.8 * faithful.situation.speed_N)
    assert np.all(slow.drive.speed_NJ[:, -1] < 0.78 * faithful.situation.road.limit_N)


def test_the_faithful_expert_is_safe_and_the_harmful_one_is_not():
    always = np.ones(80, bool)
    for family in ("follow", "queue", "cut_in", "crossing", "pedestrian", "red_light"):
        faithful = _driven(family, 80).drive.terms
        harmful = _driven(family, 80, harmful_N=always).drive.terms
        gates = [t["no_collision"] * t["light"] * t["time_to_collision"] for t in (faithful, harmful)]
        assert gates[0].mean() > 0.93, family
        assert gates[1].mean() < gates[0].mean() - 0.15, family


def test_half_harmful_scenes_are_told_by_the_attribute():
    driven = _driven("crossing", 60, half_harmful_N=np.ones(60, bool))
    trucks = driven.situation.traffic.length[:, 0] > 6
    np.testing.assert_array_equal(driven.harmful_N, trucks)
    assert 10 < trucks.sum() < 50


def test_obstacles_are_passed_where_there_is_room():
    driven = _driven("obstacle", 120)
    edge = driven.situation.traffic.offset[:, 0] + 0.5 * driven.situation.traffic.width[:, 0]
    near = driven.situation.traffic.station[:, 0] < 26
    easy = near & (edge < -0.5)
    passed = driven.drive.station_NJ[:, -1] > driven.situation.traffic.station[:, 0]
    assert easy.sum() > 5
    # Not all: oncoming traffic closes the gap in some.
    assert passed[easy].mean() > 0.75


def test_every_family_has_a_faithful_expert():
    for family in FAMILIES:
        terms = _driven(family, 40).drive.terms
        assert (terms["no_collision"] * terms["drivable"] * terms["light"]).mean() > 0.95, family
