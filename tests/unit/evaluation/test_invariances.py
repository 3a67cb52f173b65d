"""What must never change a score: rigid motion, agent order, batch composition, padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.evaluation import RULES_V1, RULES_V2, epdms, pdms, prepare, prepare_all
from benchmarks.golden_scenes import golden_scene, load_inputs, trajectories_with

from .straight_road import moved, permuted, with_unseen_agents

GOLDEN = Path(__file__).parents[2] / "golden"
ROWS = np.array([8, 7, 9, 12])
"""No scene in which two obstacles are exactly equally near: there the official choice depends on the map's axes."""
INPUTS = load_inputs(GOLDEN)
SCENES = [golden_scene(INPUTS, int(row)) for row in ROWS]
WAYPOINTS = trajectories_with(INPUTS, ROWS, 8)
SETTINGS = settings(max_examples=6, deadline=None, derandomize=True)
CASES = [(epdms, RULES_V2), (pdms, RULES_V1)]


def scores(score, rules, scenes, waypoints, backend="numba") -> torch.Tensor:
    result = score([prepare(scene, rules, backend=backend) for scene in scenes], waypoints, backend=backend)
    return torch.stack([*(metric.value for metric in result.filtered.values()), result.score.value])


@SETTINGS
@given(
    st.floats(-3.0, 3.0),
    st.floats(-100.0, 100.0),
    st.floats(-100.0, 100.0),
    st.integers(0, 3),
    st.integers(0, 1),
)
def test_rigid_motion(yaw_rad, x_m, y_m, row, version):
    case = CASES[version]
    before = scores(*case, SCENES[row : row + 1], WAYPOINTS[row : row + 1])
    after = scores(*case, [moved(SCENES[row], yaw_rad, x_m, y_m)], WAYPOINTS[row : row + 1])
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@SETTINGS
@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(0, 1))
def test_order_of_agents(seed, row, version):
    order = np.random.default_rng(seed).permutation(SCENES[row].num_agents)
    case = CASES[version]
    before = scores(*case, SCENES[row : row + 1], WAYPOINTS[row : row + 1])
    after = scores(*case, [permuted(SCENES[row], order)], WAYPOINTS[row : row + 1])
    torch.testing.assert_close(after, before, atol=1e-9, rtol=0)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("score", "rules"), CASES)
def test_composition_of_the_batch(score, rules, backend):
    prepared, waypoints = prepare_all(SCENES[:2], rules, backend=backend), WAYPOINTS[:2, :3]
    together = score(prepared, waypoints, backend=backend)
    apart = [
        score([scene], row[None, None], backend=backend)
        for scene, rows in zip(prepared, waypoints, strict=True)
        for row in rows
    ]
    for name, metric in together.filtered.items():
        single = torch.cat([result.filtered[name].value for result in apart]).view(2, 3)
        torch.testing.assert_close(metric.value, single, atol=1e-9, rtol=0)
    single = torch.cat([result.score.value for result in apart]).view(2, 3)
    torch.testing.assert_close(together.score.value, single, atol=1e-9, rtol=0)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_agents_that_are_never_seen(backend):
    padded = [with_unseen_agents(scene, 3) for scene in SCENES[:2]]
    before = scores(epdms, RULES_V2, SCENES[:2], WAYPOINTS[:2], backend)
    after = scores(epdms, RULES_V2, padded, WAYPOINTS[:2], backend)
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


def test_a_prepared_scene_can_be_scored_again_and_again():
    prepared = prepare_all(SCENES, RULES_V2)
    first = epdms(prepared, WAYPOINTS).score.value
    epdms(prepared, WAYPOINTS[:, ::-1])
    assert torch.equal(epdms(prepared, WAYPOINTS).score.value, first)
    assert torch.equal(epdms(prepared, WAYPOINTS[:, ::-1].copy()).score.value, first.flip(1))


def test_forty_waypoints_on_the_line_of_eight_score_alike():
    eight = WAYPOINTS[:1, :1]
    nodes = np.concatenate([np.zeros((1, 1, 1, 3)), eight], axis=2)
    left, share = np.divmod(np.arange(1, 41), 5)
    after = np.minimum(left + 1, 8)
    forty = nodes[:, :, left] + (share / 5.0)[:, None] * (nodes[:, :, after] - nodes[:, :, left])
    ours, theirs = (epdms(SCENES[:1], poses, keep_states=True).states for poses in (forty, eight))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
