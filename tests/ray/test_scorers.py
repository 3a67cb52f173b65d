"""Scorers on a cluster with less room than was counted."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import pytest
import ray
from ray.util.state.exception import RayStateApiException

from autoscale_ray import tasks, tasks_scores
from autoscale_ray.config import RayConfig
from autoscale_ray.distributed import evaluate
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.errors import ConfigError
from autoscale_ray.inputs import open_inputs
from tests.ray.conftest import processes_below
from tests.ray.small_run import config_of, wait_for


@ray.remote
class Holder:
    """Holds CPUs of the cluster."""

    def holds(self) -> None:
        pass


def hold(num_cpus: int):
    """Take some of the cluster's eight CPUs."""
    holder = Holder.options(num_cpus=num_cpus).remote()
    ray.get(holder.holds.remote())
    return holder


@pytest.fixture
def side(reference, tmp_path) -> evaluate.Side:
    """Return the dev pool of the reference run with what scoring needs."""
    planner, pool = (
        config_of(reference).planner,
        open_inputs(config_of(reference), reference / "pools").pools["dev"],
    )
    side = evaluate.Side(pool.path, tmp_path / "features", tmp_path / "references")
    for folder, make in (
        (side.features, lambda folder: tasks.pool_features(planner, pool, folder)),
        (side.references, lambda folder: tasks_scores.reference_drives(pool, folder)),
    ):
        folder.mkdir()
        make(folder)
    return side


@pytest.mark.timeout(150)
def test_the_share_of_a_scorer_that_finds_no_place_again_goes_to_the_others(
    cluster, reference, side, tmp_path, monkeypatch
) -> None:
    """A node goes and none comes in its place: here another tenant takes the CPU of a scorer that dies."""
    monkeypatch.setattr(evaluate, "START_TIMEOUT_S", 2)
    monkeypatch.setattr(evaluate, "LOOK_S", 1.0)
    weights = next((reference / "views").glob("train-*"))
    planner = config_of(reference).planner
    scorers = evaluate.ScorerPool(
        planner, RayConfig(num_scorers=2, start_timeout_s=1), Deadline(60, tmp_path)
    )
    expected = scorers.score(side, weights)
    wait_for(lambda: scorers.score(side, weights).equals(expected) and len(scorers._scorers) == 2)
    holder = hold(6)
    tenant = Holder.options(num_cpus=1).remote()  # waits for the next CPU that is free
    processes_below(cluster["pid"], "Scorer")[0].kill()
    ray.get(tenant.holds.remote())
    assert scorers.score(side, weights).equals(expected)
    assert len(scorers._scorers) == 1
    assert len(scorers._coming) == 1, "another is asked for"
    ray.kill(tenant)
    wait_for(lambda: scorers.score(side, weights).equals(expected) and len(scorers._scorers) == 2)
    scorers.close()
    ray.kill(holder)


@pytest.mark.timeout(60)
def test_a_planner_that_scorers_cannot_load_is_one_line(cluster, reference, side, tmp_path) -> None:
    """As where a node lacks the user's package, which the driver's has."""
    planner = dataclasses.replace(config_of(reference).planner, factory="only_on_the_head:planner")
    scorers = evaluate.ScorerPool(planner, RayConfig(), Deadline(60, tmp_path))
    with pytest.raises(ConfigError, match=r"^planner\.factory: cannot import module only_on_the_head"):
        scorers.score(side, tmp_path / "weights")
    scorers.close()


@pytest.mark.timeout(60)
def test_an_actor_is_looked_for_on_its_own_cluster_and_here_where_nobody_else_can_say(
    cluster, monkeypatch
) -> None:
    holder, alive = hold(1), hold(1)
    monkeypatch.delenv("RAY_ADDRESS")  # as in a driver; there may be other clusters on this machine
    asked = Mock(side_effect=evaluate.get_actor)
    monkeypatch.setattr(evaluate, "get_actor", asked)
    assert not evaluate.is_lost(holder)
    assert asked.call_args.args[1].rpartition(":")[2] == cluster["address"].rpartition(":")[2]
    ray.kill(holder)
    wait_for(lambda: evaluate.is_lost(holder))
    for error in (
        ConnectionError("two clusters"),
        RuntimeError("no dashboard"),
        RayStateApiException("busy"),
    ):
        monkeypatch.setattr(evaluate, "get_actor", Mock(side_effect=error))
        assert evaluate.is_lost(holder)
        assert not evaluate.is_lost(alive)
    ray.kill(alive)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_scorers_that_find_no_room_are_done_without_until_they_come(
    cluster, reference, side, tmp_path, monkeypatch
) -> None:
    planner = config_of(reference).planner
    weights = next((reference / "views").glob("train-*"))
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
