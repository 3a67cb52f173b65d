"""Traffic: against a scalar IDM loop and obvious cases."""

import numpy as np
import pytest

from autoscale_ray.world.traffic import (
    EGO,
    FAR_M,
    NUM_STEPS,
    PAST_TIMES_S,
    STEP_S,
    TIMES_S,
    agent,
    gather,
    roll_out,
)

FAR_EGO = np.full((1, NUM_STEPS + 1), -FAR_M), np.zeros((1, NUM_STEPS + 1))


def one(value):
    return np.array([float(value)])


def test_the_past_has_constant_acceleration():
    traffic = gather([agent(one(0), one(8), acceleration=one(-1.5))], 1)
    travel, speed = roll_out(traffic, *FAR_EGO)
    np.testing.assert_allclose(travel[0, 0, :4], 8 * PAST_TIMES_S - 0.75 * PAST_TIMES_S**2)
    np.testing.assert_allclose(speed[0, 0, :4], 8 - 1.5 * PAST_TIMES_S)


def test_a_vehicle_that_started_late_stood_before():
    traffic = gather([agent(one(0), one(1), acceleration=one(1.0))], 1)
    travel, speed = roll_out(traffic, *FAR_EGO)
    np.testing.assert_allclose(speed[0, 0, :5], [0, 0, 0, 0.5, 1.0])
    np.testing.assert_allclose(travel[0, 0, :4], [-0.5, -0.5, -0.5, -0.375])


def _scalar_idm(speed, leader_position, leader_speed, desired):
    """Follow a leader at constant speed: the textbook formula, one step at a time."""
    position, positions = 0.0, [0.0]
    for step in range(NUM_STEPS):
        gap = leader_position + leader_speed * step * STEP_S - position - 4.6
        closing = speed - leader_speed
        wanted_gap = 2.0 + max(0.0, speed * 1.4 + speed * closing / (2 * (1.5 * 2.0) ** 0.5))
        acceleration = 1.5 * (1 - (speed / desired) ** 4 - (wanted_gap / max(gap, 0.3)) ** 2)
        speed = max(speed + STEP_S * min(max(acceleration, -6.0), 1.5), 0.0)
        position += STEP_S * speed
        positions.append(position)
    return np.array(positions[::2])


@pytest.mark.parametrize(("speed", "gap", "lead"), [(10, 25, 4), (6, 12, 6), (12, 60, 0.0)])
def test_following_agrees_with_a_scalar_loop(speed, gap, lead):
    slots = [agent(one(0), one(speed), leader=1, desired=one(13)), agent(one(gap + 4.6), one(lead))]
    travel, _ = roll_out(gather(slots, 1), *FAR_EGO)
    np.testing.assert_allclose(travel[0, 0, 4:], _scalar_idm(speed, gap + 4.6, lead, 13.0), atol=1e-9)


def test_nobody_drives_into_a_leader_or_over_a_red_line():
    rng = np.random.default_rng(3)
    num, speed = 200, np.random.default_rng(4).uniform(3, 12, 200)
    slots = [
        agent(np.zeros(num), speed, leader=1, desired=np.full(num, 13.0)),
        agent(4.6 + 3 + speed * rng.uniform(1, 2, num), speed * rng.uniform(0.5, 1, num), leader=2),
        agent(4.6 + 70 + np.zeros(num), 0.0),
        agent(np.zeros(num), speed, path=0, stop_station=5 + speed**2 / 3, desired=np.full(num, 13.0)),
    ]
    travel, _ = roll_out(
        gather(slots, num), np.full((num, NUM_STEPS + 1), -FAR_M), np.zeros((num, NUM_STEPS + 1))
    )
    position = np.stack([slot["station"] for slot in slots], axis=1)[..., None] + travel
    future = position[..., 4:]
    assert (future[:, 1] - future[:, 0]).min() > 4.6
    assert (future[:, 2] - future[:, 1]).min() > 4.6
    assert (5 + speed**2 / 3 - 2.3 - future[:, 3, -1]).min() > 0


def test_a_follower_reacts_to_the_ego_and_others_do_not():
    slots = [agent(one(-15), one(10), leader=EGO), agent(one(20), one(9))]
    braking = np.cumsum(np.maximum(10 - 3 * STEP_S * np.arange(NUM_STEPS + 1), 0))[None] * STEP_S
    steady = 10 * STEP_S * np.arange(NUM_STEPS + 1)[None]
    slow, _ = roll_out(
        gather(slots, 1), braking, np.maximum(10 - 3 * STEP_S * np.arange(NUM_STEPS + 1), 0)[None]
    )
    fast, _ = roll_out(gather(slots, 1), steady, np.full_like(steady, 10.0))
    assert slow[0, 0, -1] < fast[0, 0, -1] - 5
    np.testing.assert_array_equal(slow[0, 1], fast[0, 1])


def test_orders_hold_an_agent_back_until_its_time():
    traffic = gather([agent(one(0), 0.0, desired=one(1.5), go_from=one(2.0), agility=one(3.0))], 1)
    travel, _ = roll_out(traffic, *FAR_EGO)
    assert np.all(travel[0, 0, TIMES_S <= 2.0] == 0)
    assert travel[0, 0, -1] > 3.0
