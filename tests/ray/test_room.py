"""Room for a run: what is asked of a cluster that is in use, what is given back, and what is said where none comes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import ray

# Ray has no public way to read what an autoscaler is told, which is what these tests are about.
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from autoscale_ray.config import RayConfig
from autoscale_ray.distributed import resources
from autoscale_ray.distributed.resources import ResourcesError, wait_for_room
from tests.ray.small_run import wait_for

pytestmark = pytest.mark.timeout(60)


@contextmanager
def another_run(num_cpus: int) -> Iterator[Any]:
    """Hold CPUs as another run does."""
    group = placement_group([{"CPU": 1}] * num_cpus)
    assert group.wait(30)
    yield group
    remove_placement_group(group)


def groups() -> list[str]:
    """Return the states of all groups that are there."""
    states = [group["state"] for group in placement_group_table().values()]
    return [state for state in states if state != "REMOVED"]


def asked_of_the_autoscaler() -> list[float]:
    """Return the CPUs of each group that an autoscaler would be told to make room for."""
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    state = get_cluster_resource_state(gcs)
    return [
        sum(bundle.resources_bundle["CPU"] for bundle in gang.bundle_selectors[0].resource_requests)
        for gang in state.pending_gang_resource_requests
    ]


def test_a_second_run_asks_for_nodes_while_the_first_holds_those_that_there_are(cluster) -> None:
    """It used to ask for none: the cluster is large enough, only not free."""
    config = RayConfig(num_trainers=2, num_scorers=3, start_timeout_s=25)
    with ThreadPoolExecutor(1) as elsewhere:
        with another_run(8):
            waiting = elsewhere.submit(wait_for_room, config)
            wait_for(asked_of_the_autoscaler, timeout_s=20)
            assert asked_of_the_autoscaler() == [5]
            assert not waiting.done()
        waiting.result(30)
    wait_for(lambda: not groups(), timeout_s=10)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (RayConfig(num_scorers=50, start_timeout_s=1), "needs 51 CPUs and 0 GPUs .* has 8 CPUs and 2 GPUs$"),
        (RayConfig(num_scorers=7, start_timeout_s=1), "needs 8 CPUs .* free: other runs hold the rest$"),
        (RayConfig(num_trainers=4, min_trainers=3, num_scorers=3, start_timeout_s=1), "needs 6 CPUs .* free"),
    ],
)
def test_a_run_that_finds_no_room_leaves_nothing_behind(config, line, cluster) -> None:
    """An autoscaler would go on making nodes for it."""
    with another_run(4):
        with pytest.raises(ResourcesError, match=line):
            wait_for_room(config)
        wait_for(lambda: groups() == ["CREATED"], timeout_s=10)


def test_elastic_trainers_begin_with_as_many_as_there_is_room_for(cluster) -> None:
    with another_run(4):
        wait_for_room(RayConfig(num_trainers=4, min_trainers=2, start_timeout_s=4))
        wait_for(lambda: groups() == ["CREATED"], timeout_s=10)


def test_room_that_lies_in_parts_is_told_apart(monkeypatch) -> None:
    """The GPUs of two nodes are no place for a trainer that wants both."""
    monkeypatch.setattr(resources, "_comes", lambda config: False)
    for what in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, what, lambda: {"CPU": 8.0, "GPU": 4.0})
    with pytest.raises(ResourcesError, match=r"^the run needs 3 CPUs and 4 GPUs .* each worker needs"):
        wait_for_room(RayConfig(gpus_per_worker=2))
