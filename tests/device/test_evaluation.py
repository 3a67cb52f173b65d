"""The torch backend on another device equals the CPU within 1e-6 in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoscale_ray.evaluation import RULES_V1, RULES_V2, epdms, pdms, prepare_all
from benchmarks.golden_scenes import load_inputs, load_version, trajectories_with
from benchmarks.navsim_parity import run_checks

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(("score", "rules"), [(epdms, RULES_V2), (pdms, RULES_V1)])
def test_scores_equal_the_cpu(score, rules, device):
    inputs = load_inputs(GOLDEN)
    golden = load_version(GOLDEN, inputs, rules.version)
    waypoints = trajectories_with(inputs, golden.scene_rows, 8)
    prepared = prepare_all(golden.scenes, rules, golden.outputs["pdm_poses"], backend="torch")
    expected = score(prepared, waypoints, backend="torch", keep_states=True)
    found = score(prepared, waypoints, backend="torch", device=device, keep_states=True)
    assert found.score.value.device.type == device
    torch.testing.assert_close(found.states.cpu(), expected.states, atol=1e-6, rtol=0)
    for name, metric in expected.raw.items():
        torch.testing.assert_close(found.raw[name].value.cpu(), metric.value, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.score.value.cpu(), expected.score.value, atol=1e-6, rtol=0)


def test_scores_equal_the_official_scorer(device):
    failed = [check for check in run_checks(GOLDEN, "torch", device) if not check.passed]
    assert failed == []
