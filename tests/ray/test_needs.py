"""What a run needs of a cluster and how long it waits for it: decided without one."""

from __future__ import annotations

import pytest

from autoscale_ray.config import RayConfig
from autoscale_ray.distributed import embed
from autoscale_ray.distributed.resources import (
    bundles_of,
    elastic_limit,
    gpus_of,
    needs_of,
    shortage,
    train_environment,
)

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("config", "total", "fits"),
    [
        (RayConfig(), {"CPU": 3}, True),
        (RayConfig(), {"CPU": 2}, False),
        (RayConfig(num_trainers=4, num_scorers=8), {"CPU": 12}, True),
        (RayConfig(num_trainers=4, num_scorers=8), {"CPU": 11}, False),
        (RayConfig(gpus_per_worker=1), {"CPU": 8}, False),
        (RayConfig(gpus_per_worker=1), {"CPU": 8, "GPU": 2}, True),
        (RayConfig(gpus_per_worker=0.5), {"CPU": 8, "GPU": 1}, True),
        (RayConfig(gpus_per_scorer=1, num_scorers=2), {"CPU": 8, "GPU": 1}, False),
        (RayConfig(gpus_per_scorer=1, num_scorers=2), {"CPU": 8, "GPU": 2}, True),
        (RayConfig(gpus_per_scorer=1, gpus_per_worker=1), {"CPU": 8, "GPU": 2}, True),
    ],
)
def test_a_shortage_is_seen_and_named(config: RayConfig, total: dict[str, float], fits: bool) -> None:
    line = shortage(needs_of(config), total)
    assert (line is None) == fits
    if line:
        assert f"{total['CPU']} CPUs" in line
        assert "\n" not in line


@pytest.mark.parametrize(
    "config",
    [
        RayConfig(),
        RayConfig(num_scorers=8, gpus_per_worker=0.5),
        RayConfig(num_trainers=4, gpus_per_worker=1),
        RayConfig(num_embedders=3, gpus_per_scorer=1),
        RayConfig(num_scorers=5, gpus_per_worker=1, gpus_per_scorer=0.5),
    ],
)
def test_a_growing_cluster_is_asked_for_all_that_is_needed(config: RayConfig) -> None:
    needs = needs_of(config)
    bundles = bundles_of(config)
    assert sum(bundle["CPU"] for bundle in bundles) == needs.cpus
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == needs.gpus


@pytest.mark.parametrize(
    ("num_workers", "each", "gpus"), [(4, 0, 0), (2, 1, 2), (2, 3, 6), (4, 0.5, 2), (4, 0.4, 2), (3, 0.3, 1)]
)
def test_parts_of_a_gpu_that_do_not_fill_it_are_lost(num_workers: int, each: float, gpus: float) -> None:
    assert gpus_of(num_workers, each) == gpus


@pytest.mark.parametrize(
    ("config", "total", "limit"),
    [
        (RayConfig(num_trainers=4), {"CPU": 3}, 4),  # not elastic: all or nothing
        (RayConfig(num_trainers=4, min_trainers=1), {"CPU": 6}, 4),
        (RayConfig(num_trainers=4, min_trainers=1, num_scorers=4), {"CPU": 6}, 2),
        (RayConfig(num_trainers=4, min_trainers=2, num_scorers=4), {"CPU": 5}, 2),
        (RayConfig(num_trainers=2, min_trainers=1, gpus_per_worker=1), {"CPU": 8, "GPU": 2}, 1),
        (RayConfig(num_trainers=2, min_trainers=1, gpus_per_worker=1), {"CPU": 8, "GPU": 3}, 2),
    ],
)
def test_elastic_trainers_leave_room_for_embedders_and_scorers(
    config: RayConfig, total: dict[str, float], limit: int
) -> None:
    assert elastic_limit(config, total) == limit


def test_a_driver_waits_for_new_nodes_as_long_as_its_run() -> None:
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    assert train_environment(RayConfig(start_timeout_s=1200))[name] == "1200"
    assert train_environment(RayConfig(start_timeout_s=1))[name] == "30"


@pytest.mark.parametrize(("min_trainers", "wait_s"), [(0, "1200"), (1, "30"), (4, "1200")])
def test_elastic_trainers_do_not_wait_for_new_nodes_where_fewer_can_go_on(min_trainers, wait_s) -> None:
    """After the loss of a node they used to wait 20 minutes an attempt for a place that had gone."""
    config = RayConfig(num_trainers=4, min_trainers=min_trainers, start_timeout_s=1200)
    assert train_environment(config)["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == wait_s


@pytest.mark.parametrize(
    ("stall_timeout_s", "start_timeout_s", "limit_s"), [(300, 30, 600), (300, 1200, 1500), (2, 2, 302)]
)
def test_embedders_that_wait_for_nodes_are_not_taken_for_standing_still(
    stall_timeout_s, start_timeout_s, limit_s
) -> None:
    """Nodes that come within `start_timeout_s` used to be too late after 300 s and `stall_timeout_s`."""
    config = RayConfig(stall_timeout_s=stall_timeout_s, start_timeout_s=start_timeout_s)
    assert embed.no_progress_timeout_s(config) == limit_s
