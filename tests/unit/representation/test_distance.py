"""The scenario distance against exact transport, empirical ranks and brute force."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata, spearmanr

from autoscale_ray.representation.distance import (
    ASPECTS,
    NEGLIGIBLE,
    aspect_distances,
    fit_scenario_distance,
    scenario_signature,
    select_signature,
)
from autoscale_ray.representation.scene_graph import graph_from_batch
from autoscale_ray.scenes.schema import CURRENT_FRAME
from tests.unit.representation.random_scenes import random_batch

EQUAL = dict.fromkeys(ASPECTS, 1.0)


def signature_of(batch):
    return scenario_signature(graph_from_batch(batch))


def test_distance_to_itself_is_zero_and_both_ways_equal():
    signature = signature_of(random_batch(80, 0))
    delta = fit_scenario_distance(signature, EQUAL, 0)(signature, signature)
    assert float(delta.diagonal().abs().max()) == 0
    torch.testing.assert_close(delta, delta.T, atol=1e-5, rtol=0)
    assert float(delta.min()) >= 0
    assert float(delta.max()) <= 1


def test_ranks_are_the_share_of_closer_pairs():
    signature = signature_of(random_batch(60, 1))
    found = fit_scenario_distance(signature, {"speed": 1.0}, 0, num_scenes=400)(signature, signature)
    raw = aspect_distances(signature, signature)["speed"].numpy().ravel()
    expected = (rankdata(raw, method="min") - 1) / len(raw)
    # 400 x 400 pairs sampled with repeats from 60 scenes, read off 256 quantiles.
    assert np.abs(found.numpy().ravel() - expected).max() < 0.06


def test_motion_is_compared_over_common_frames():
    batch, rng = random_batch(2, 2), np.random.default_rng(0)
    states = batch.ego_states_NT7
    states[:, :, 2] = torch.from_numpy(
        rng.uniform(-4, 4, states.shape[:2])
    ).float()  # also more than half a turn apart
    states[:, :, 3:5] = torch.from_numpy(rng.uniform(0, 9, (*states.shape[:2], 2))).float()
    batch.ego_valid_NT[1, 6:] = False
    found = aspect_distances(signature_of(batch), signature_of(batch))
    frames = [frame for frame in range(1, 13) if bool(batch.ego_valid_NT[1, frame])]
    assert len(frames) == 5
    yaw = batch.ego_states_NT7.numpy()[:, :, 2]
    speed = np.hypot(*np.moveaxis(batch.ego_states_NT7.numpy()[:, :, 3:5], 2, 0))
    change = speed - speed[:, [CURRENT_FRAME]]
    turn = np.abs(np.angle(np.exp(1j * (yaw[0, frames] - yaw[1, frames])))).mean()
    assert float(found["heading"][0, 1]) == pytest.approx(turn - NEGLIGIBLE["heading"], rel=1e-4)
    for name, table in {"speed": speed, "speed_change": change}.items():
        expected = np.abs(table[0, frames] - table[1, frames]).mean() - NEGLIGIBLE.get(name, 0.0)
        assert expected > 0.5
        assert float(found[name][0, 1]) == pytest.approx(expected, rel=1e-4)


def test_turns_stand_out_from_drives_that_are_as_good_as_straight():
    """Of 40 drives 36 go straight on, each with a little noise of its own, 4 turn: a turn is far from all others."""
    batch, rng = random_batch(40, 4), np.random.default_rng(0)
    states = batch.ego_states_NT7
    states[:, :, 2] = torch.from_numpy(rng.normal(scale=0.01, size=(40, 1))).float()
    states[:4, CURRENT_FRAME + 1 :, 2] += torch.linspace(0.1, 1.2, states.shape[1] - CURRENT_FRAME - 1)
    batch.ego_valid_NT[:] = True
    signature = signature_of(batch)
    delta = fit_scenario_distance(signature, {"heading": 1.0}, 0)(signature, signature)
    assert float(delta[4:, 4:].max()) == 0
    assert float(delta[:4, 4:].min()) > 0.6


def test_agent_distance_follows_exact_transport():
    """Standing cars at random places near a straight road: the histogram distance orders pairs as matching does."""
    batch = random_batch(40, 3, num_agents=4)
    rng = np.random.default_rng(0)
    base = rng.uniform([-15, -8], [40, 8], (4, 2))
    spread = rng.uniform(0, 6, 40)
    places = base[None] + rng.normal(size=(40, 4, 2)) * spread[:, None, None]
    states = torch.zeros(160, 15, 5)
    states[:, :, :2] = torch.from_numpy(places).float().reshape(-1, 1, 2)
    line = torch.stack([torch.arange(-50.0, 80.0, 2.5), torch.zeros(52), torch.zeros(52)], dim=1)
    batch = dataclasses.replace(
        batch,
        agent_type_A=torch.zeros(160, dtype=torch.int64),
        agent_states_AT5=states,
        agent_valid_AT=torch.ones(160, 15, dtype=torch.bool),
        centerline_C3=line.repeat(40, 1),
        centerline_offsets=torch.arange(41) * 52,
    )
    found = aspect_distances(signature_of(batch), signature_of(batch))["agents"].numpy()
    exact = np.zeros((40, 40))
    for i in range(40):
        for j in range(40):
            cost = np.linalg.norm(places[i][:, None] - places[j][None], axis=2)
            exact[i, j] = cost[linear_sum_assignment(cost)].mean()
    pairs = np.triu_indices(40, 1)
    assert spearmanr(found[pairs], exact[pairs]).statistic > 0.7


def test_interaction_sees_how_near_a_drive_comes():
    batch = random_batch(2, 4, num_agents=1)
    states = torch.zeros(2, 15, 5)
    states[0, :, :2] = batch.ego_states_NT7[0, :, :2] + torch.tensor([0.0, 3.0])  # passes 3 m beside the ego
    states[0, :, 3] = batch.ego_states_NT7[0, :, 3]
    states[1, :, 1] = 50.0
    batch = dataclasses.replace(
        batch,
        agent_type_A=torch.zeros(2, dtype=torch.int64),
        agent_states_AT5=states,
        agent_valid_AT=torch.ones(2, 15, dtype=torch.bool),
    )
    approach = signature_of(batch)["interaction"][:, 0]
    assert float(approach[0]) == pytest.approx(np.exp(-3 / 5), rel=1e-4)
    assert float(approach[1]) < np.exp(-4)


def test_an_aspect_without_weight_is_left_out():
    batch = random_batch(50, 5)
    other = dataclasses.replace(batch, polygon_red_QT=batch.polygon_red_QT.clone())
    other.polygon_red_QT[:25, CURRENT_FRAME] ^= True
    first, second = signature_of(batch), signature_of(other)
    with_controls = fit_scenario_distance(first, EQUAL, 0)
    without = fit_scenario_distance(first, {**EQUAL, "controls": 0.0}, 0)
    assert torch.equal(without(first, first), without(second, second))
    assert not torch.equal(with_controls(first, first), with_controls(second, second))


def test_selected_rows_keep_their_distances():
    signature = signature_of(random_batch(30, 6))
    distance = fit_scenario_distance(signature, EQUAL, 0)
    rows = torch.tensor([4, 20, 4])
    part = select_signature(signature, rows)
    expected = distance(signature, signature)[rows][:, rows]
    torch.testing.assert_close(distance(part, part), expected, atol=2e-3, rtol=0)
