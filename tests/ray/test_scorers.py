"""Scorers on a cluster with less room than was counted."""

from __future__ import annotations

import pytest
import ray

from autoscale_ray import tasks
from autoscale_ray.config import RayConfig
from autoscale_ray.distributed import evaluate
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.inputs import open_inputs
from tests.ray.small_run import config_of, wait_for


@pytest.mark.timeout(150)
def test_scorers_that_find_no_room_are_done_without_until_they_come(
    cluster, reference, tmp_path, monkeypatch
) -> None:
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

    @ray.remote
    class Holder:
        def holds(self) -> None:
            pass

    def hold(num_cpus: int):
        """Take some of the cluster's eight CPUs."""
        holder = Holder.options(num_cpus=num_cpus).remote()
        ray.get(holder.holds.remote())
        return holder

    deadline = Deadline(60, tmp_path)
    alone = evaluate.ScorerPool(planner, RayConfig(), deadline)
    expected = alone.score(side, weights)
    alone.close()

    holder = hold(6)
    scorers = evaluate.ScorerPool(planner, RayConfig(num_scorers=3), deadline)
    wait_for(lambda: scorers.score(side, weights).equals(expected) and len(scorers._scorers) == 2)
    assert len(scorers._coming) == 1
    ray.kill(holder)
    wait_for(lambda: scorers.score(side, weights).equals(expected) and len(scorers._scorers) == 3)
    scorers.close()

    monkeypatch.setattr(evaluate, "START_TIMEOUT_S", 3)
    holder = hold(8)
    nobody = evaluate.ScorerPool(planner, RayConfig(start_timeout_s=1), deadline)
    with pytest.raises(evaluate.ScoringFailedError, match="no scorer got its CPU in 3 s; free are 0 CPUs"):
        nobody.score(side, weights)
    ray.kill(holder)
