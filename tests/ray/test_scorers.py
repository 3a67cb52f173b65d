"""Scorers on a cluster with less room than was counted."""

from __future__ import annotations

import pytest
import ray

from autoscale_ray import tasks
from autoscale_ray.distributed import evaluate
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.inputs import open_inputs
from tests.ray.small_run import config_of


@pytest.mark.timeout(150)
def test_scorers_that_find_no_room_are_done_without(cluster, reference, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "START_TIMEOUT_S", 20)
    config = config_of(reference)
    planner, pool = config.planner, open_inputs(config, reference / "pools").pools["dev"]
    weights = next((reference / "views").glob("train-*"))
    side = evaluate.Side(pool.path, tmp_path / "features", tmp_path / "references")
    for folder, make in (
        (side.features, lambda folder: tasks.pool_features(planner, pool, folder)),
        (side.references, lambda folder: tasks.reference_drives(pool, folder)),
    ):
        folder.mkdir()
        make(folder)

    def score(num_scorers: int, num_cpus_taken: int):
        """Score beside somebody who holds some of the cluster's eight CPUs."""

        @ray.remote(num_cpus=num_cpus_taken)
        class Holder:
            def holds(self) -> None:
                pass

        holder = Holder.remote()
        ray.get(holder.holds.remote())
        scorers = evaluate.ScorerPool(planner, num_scorers, 0, Deadline(60, tmp_path))
        try:
            return scorers.score(side, weights), len(scorers._scorers)
        finally:
            scorers.close()
            ray.kill(holder)

    (expected, alone), (found, together) = score(1, 1), score(3, 6)
    assert (alone, together) == (1, 2)
    assert found.equals(expected)
    with pytest.raises(evaluate.ScoringFailedError, match=r"no scorer got its CPU in 20 s; free are 0 CPUs"):
        score(1, 8)
