"""Losing and gaining a node in the middle of training (slow: two more Ray nodes on this machine)."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from autoscale_ray.distributed.driver import find_driver
from autoscale_ray.distributed.session import run_on_ray
from tests.ray.conftest import ENVIRONMENT
from tests.ray.small_run import check_same_run, config_of, with_shared_pools


@pytest.fixture
def nodes(monkeypatch) -> Any:
    """Return a cluster whose head has no CPU, with one node of 4."""
    for name, value in {**ENVIRONMENT, "RAY_health_check_period_ms": "1000"}.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    cluster.add_node(num_cpus=4)
    ray.init(address=cluster.address, namespace="autoscale", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_lost_and_another_gained_in_training_give_the_same_run(
    nodes, reference, tmp_path: Path
) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    for name in ("stages", "objects"):  # embedded and scored references are there already
        shutil.copytree(reference / name, run_dir / name)
    for record in (*(run_dir / "stages").glob("train-*"), *(run_dir / "stages").glob("evaluate*")):
        record.unlink()
    first = next(node for node in nodes.worker_nodes)
    config = config_of(run_dir, "placement.ray.num_trainers=2", "planner.num_steps=50")
    failed: list[BaseException] = []

    def lose_a_node() -> None:
        checkpoints = run_dir / "train" / "trainers"
        while not any(checkpoints.glob("*-*")):
            if find_driver(str(run_dir)) is None and run_dir.joinpath("report.html").exists():
                failed.append(AssertionError("training ended before a checkpoint was seen"))
                return
            threading.Event().wait(0.05)
        nodes.remove_node(first, allow_graceful=False)

    nodes.add_node(num_cpus=4)  # in the main thread: Ray installs a signal handler there
    watcher = threading.Thread(target=lose_a_node, daemon=True)
    watcher.start()
    assert run_on_ray(config, Console(quiet=True))["state"] == "finished"
    watcher.join(60)
    assert not failed
    assert first not in nodes.worker_nodes
    check_same_run(run_dir, reference)
