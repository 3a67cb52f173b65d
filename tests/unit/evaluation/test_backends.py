"""Plain torch and compiled kernels give the same numbers."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autoscale_ray.errors import MissingExtraError
from autoscale_ray.evaluation import RULES_V1, RULES_V2, epdms, pdms, prepare
from autoscale_ray.evaluation.backends import choose_backend
from autoscale_ray.evaluation.metrics import Measures
from benchmarks.golden_scenes import golden_scene, load_inputs, trajectories_with

GOLDEN = Path(__file__).parents[2] / "golden"
ROWS = np.array([2, 4, 8, 16, 20])
"""A red light, a tie of obstacles, a red light again, a one-frame track, the dense scene."""


@pytest.fixture(scope="module")
def golden():
    inputs = load_inputs(GOLDEN)
    return [golden_scene(inputs, int(row)) for row in ROWS], trajectories_with(inputs, ROWS, 8)


@pytest.mark.parametrize(("score", "rules"), [(epdms, RULES_V2), (pdms, RULES_V1)])
def test_torch_and_numba_agree(golden, score, rules):
    scenes, waypoints = golden
    compiled, plain = (
        score(
            [prepare(scene, rules, backend=name) for scene in scenes],
            waypoints,
            backend=name,
            keep_states=True,
        )
        for name in ("numba", "torch")
    )
    torch.testing.assert_close(compiled.states, plain.states, atol=1e-8, rtol=0)
    for item in dataclasses.fields(Measures):
        ours, theirs = getattr(compiled.measures, item.name), getattr(plain.measures, item.name)
        if item.name != "comfort_flags" or score is pdms or ours.shape == theirs.shape:
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    torch.testing.assert_close(compiled.score.value, plain.score.value, atol=1e-9, rtol=0)
    torch.testing.assert_close(compiled.raw_score.value, plain.raw_score.value, atol=1e-9, rtol=0)


def test_a_prepared_scene_survives_pickling(golden):
    scenes, waypoints = golden
    prepared = prepare(scenes[0], RULES_V2)
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(
        epdms([again], waypoints[:1]).score.value, epdms([prepared], waypoints[:1]).score.value
    )


def test_without_numba_torch_is_chosen_and_numba_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert choose_backend("auto") == "torch"
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[cpu\]'"):
        choose_backend("numba")


def test_a_gpu_device_chooses_torch():
    assert choose_backend("auto", "cuda") == "torch"
