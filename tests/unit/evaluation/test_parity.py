"""Equality with the official scorer on a subset of its golden vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.navsim_parity import main, run_checks

GOLDEN = Path(__file__).parents[2] / "golden"


def test_every_quantity_equals_the_official_one():
    failed = [check for check in run_checks(GOLDEN) if not check.passed]
    assert failed == []


def test_a_changed_golden_value_is_found(tmp_path):
    """The comparison itself can fail: one flipped score, one moved state."""
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as archive:
            arrays = dict(archive)
        if path.stem == "aggregation":
            arrays["out_score"][3] += 1e-8
        if path.stem == "lqr":
            arrays["sim_states"][0, 0, 40, 0] += 2e-8
        if path.stem in ("inputs", "aggregation", "lqr"):
            np.savez(tmp_path / path.name, **arrays)
    failed = {check.name for check in run_checks(tmp_path) if not check.passed}
    assert failed == {"two stages: out_score", "tracker: driven states, x and y"}
    assert main(["--golden", str(tmp_path)]) == 1


def test_a_folder_without_inputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"inputs\.npz"):
        run_checks(tmp_path)
