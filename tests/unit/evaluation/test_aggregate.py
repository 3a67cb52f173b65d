"""Aggregation by hand; equality with the official one is part of the parity test."""

from __future__ import annotations

import numpy as np
import pytest

from autoscale_ray.evaluation import StageFrames, aggregate_one_stage, aggregate_two_stage
from autoscale_ray.evaluation.combine import COLUMNS_V2


def frames(progress: list[float], starts: list[float], count: int) -> StageFrames:
    columns = {name: np.ones(count) for name in COLUMNS_V2}
    columns["ego_progress"] = np.array(progress)
    now_and_previous = np.tile([0.5, 0.0], count // 2)
    return StageFrames(
        columns=columns,
        start_times_s=now_and_previous,
        endpoints=np.zeros((count, 2)),
        start_points=np.column_stack([starts, np.zeros(count)]),
        states=np.zeros((count, 41, 11)),
    )


def test_one_stage_is_the_mean_of_frames_and_leaves_out_what_is_missing():
    means = aggregate_one_stage({"score": np.array([1.0, 0.0, 0.5]), "ec": np.array([np.nan, 1.0, 0.0])})
    assert means == {"score": 0.5, "ec": 0.5}
    assert np.isnan(aggregate_one_stage({"ec": np.array([np.nan])})["ec"])


def test_two_stages_weigh_synthetic_starts_by_their_distance():
    distance_m = 0.3
    table = frames([1, 1, 1, 1, 0, 0], [0, 0, 0, 0, distance_m, distance_m], 6)
    result = aggregate_two_stage(table, np.array([[0, 1, 2, 3], [0, 1, 4, 5]]))
    near = 1.0 / (1.0 + np.exp(-(distance_m**2) / 0.2))
    np.testing.assert_allclose(result.weights, [1, 1, near, near, 1 - near, 1 - near], atol=1e-12)
    assert result.combined["ego_progress"] == pytest.approx(near)
    assert result.combined["score"] == pytest.approx(near + (1 - near) * 11 / 16)
    assert result.stage_one["score"] == 1.0


def test_starts_that_are_all_far_away_weigh_the_same():
    table = frames([1, 1, 1, 1, 0, 0], [0, 0, 50, 50, 60, 60], 6)
    result = aggregate_two_stage(table, np.array([[0, 1, 2, 3], [0, 1, 4, 5]]))
    assert result.combined["ego_progress"] == pytest.approx(0.5)


def test_a_mapping_outside_the_frames_is_refused():
    with pytest.raises(ValueError, match="mapping"):
        aggregate_two_stage(frames([1, 1], [0, 0], 2), np.array([[0, 1, 2, 3]]))
