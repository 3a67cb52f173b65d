"""Losing and gaining a node in the middle of training (slow: more Ray nodes on this machine)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from autoscale_ray.distributed.driver import end_driver, follow, start_driver
from autoscale_ray.journal import read_rounds
from tests.ray.conftest import ENVIRONMENT, free_port
from tests.ray.small_run import check_same_run, config_of, with_cached_stages


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Cluster]:
    """Return a cluster whose head has no CPU, with one node of 4."""
    faster = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    for name, value in {**ENVIRONMENT, **faster}.items():
        monkeypatch.setenv(name, value)
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=4)
    ray.init(address=cluster.address, namespace="autoscale", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_lost_and_another_gained_in_training_give_the_same_run(
    nodes: Cluster, reference: Path, tmp_path: Path
) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    config = config_of(run_dir, "placement.ray.num_trainers=2", "placement.ray.min_trainers=1")
    (first,) = nodes.worker_nodes
    finished, checkpoints = (), run_dir / "train" / "trainers"
    driver = start_driver(config)
    for status in follow(driver, poll_s=0.02):
        if first in nodes.worker_nodes and status["stage"] == "train" and any(checkpoints.glob("*-*")):
            finished = read_rounds(str(run_dir))
            nodes.remove_node(first, allow_graceful=False)
            nodes.add_node(num_cpus=4)
    assert status["error"] is None
    assert status["state"] == "finished"
    assert first not in nodes.worker_nodes, "the node was lost before the run ended"
    assert read_rounds(str(run_dir))[: len(finished)] == finished
    check_same_run(run_dir, reference)
    end_driver(str(run_dir))
