"""The torch backend on a CUDA device equals the CPU within 1e-6 in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoscale_ray.evaluation import RULES_V1, RULES_V2, epdms, pdms, prepare_all
from benchmarks.golden_scenes import load_inputs, load_version, trajectories_with
from benchmarks.navsim_parity import run_checks

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is there"),
]


@pytest.mark.parametrize(("score", "rules"), [(epdms, RULES_V2), (pdms, RULES_V1)])
def test_cuda_equals_cpu(score, rules):
    inputs = load_inputs(GOLDEN)
    golden = load_version(GOLDEN, inputs, rules.version)
    waypoints = trajectories_with(inputs, golden.scene_rows, 8)
    prepared = prepare_all(golden.scenes, rules, golden.outputs["pdm_poses"], backend="torch")
    on_cpu = score(prepared, waypoints, backend="torch", keep_states=True)
    on_gpu = score(prepared, waypoints, backend="torch", device="cuda", keep_states=True)
    assert on_gpu.score.value.is_cuda
    torch.testing.assert_close(on_gpu.states.cpu(), on_cpu.states, atol=1e-6, rtol=0)
    for name, metric in on_cpu.raw.items():
        torch.testing.assert_close(on_gpu.raw[name].value.cpu(), metric.value, atol=1e-6, rtol=0)
    torch.testing.assert_close(on_gpu.score.value.cpu(), on_cpu.score.value, atol=1e-6, rtol=0)


def test_cuda_equals_the_official_scorer():
    failed = [check for check in run_checks(GOLDEN, "torch", "cuda") if not check.passed]
    assert failed == []
