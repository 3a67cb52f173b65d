"""The loop on Ray: the same run as in one process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from autoscale_ray.artifacts import read_rounds
from autoscale_ray.config import RunConfig
from autoscale_ray.distributed.driver import driver_name, find_driver, follow, start_driver
from autoscale_ray.distributed.session import run_on_ray
from tests.ray.small_run import check_same_run, config_of, with_shared_pools

pytestmark = pytest.mark.slow  # minutes each, and not yet shown to pass on an idle machine


def run_with_fault(config: RunConfig, fault: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Run a driver to its end; call the fault with every status until it says that it struck."""
    driver = start_driver(config)
    struck = False
    status: dict[str, Any] = {}
    for status in follow(driver, poll_s=0.02):
        struck = struck or fault(status)
    ray.kill(driver)
    assert struck, "the fault never found its moment"
    if status["error"]:
        raise status["error"]
    assert status["state"] == "finished"
    return status


@pytest.mark.timeout(900)
def test_two_workers_and_two_scorers_give_the_run_of_one_process(cluster, reference, tmp_path) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    more = ("placement.ray.num_trainers=2", "placement.ray.num_scorers=2", "placement.ray.num_embedders=2")
    status = run_on_ray(config_of(run_dir, *more), Console(quiet=True))
    assert status["state"] == "finished"
    check_same_run(run_dir, reference)
    assert (run_dir / "report.html").is_file()
    assert find_driver(str(run_dir)) is None


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["train", "evaluate dev", "retrieve"])
def test_a_driver_killed_in_a_stage_ends_with_the_same_run(stage: str, cluster, reference, tmp_path) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    published: list[int] = []

    def kill_driver(status: dict[str, Any]) -> bool:
        if status["stage"] != stage or not (run_dir / "journal").exists():
            return False
        published.append(len(read_rounds(str(run_dir))))
        os.kill(status["pid"], signal.SIGKILL)
        return True

    run_with_fault(config_of(run_dir), kill_driver)
    check_same_run(run_dir, reference)


@pytest.mark.timeout(900)
def test_a_killed_training_worker_ends_with_the_same_run(cluster, reference, tmp_path) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)

    def kill_worker(status: dict[str, Any]) -> bool:
        checkpoints = [path for path in (run_dir / "train" / "trainers").glob("*-*") if path.is_dir()]
        workers = train_workers(cluster["pid"])
        if status["stage"] != "train" or not checkpoints or not workers:
            return False
        workers[0].kill()
        return True

    run_with_fault(config_of(run_dir), kill_worker)
    check_same_run(run_dir, reference)


def train_workers(head_pid: int) -> list[psutil.Process]:
    """Return the training workers below our own head; Ray names them in their titles."""
    below = psutil.Process(head_pid).children(recursive=True)
    return [process for process in below if "RayTrainWorker" in " ".join(command_of(process))]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.timeout(900)
def test_stop_and_start_again_and_one_driver_for_a_run(cluster, reference, tmp_path) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    config = config_of(run_dir)
    driver = start_driver(config)
    assert start_driver(config)._actor_id == driver._actor_id
    ray.get(driver.stop.remote())
    last = list(follow(driver, poll_s=0.1))[-1]
    ray.kill(driver)
    assert last["state"] == "stopped"
    assert len(read_rounds(str(run_dir))) == 1
    assert run_on_ray(config, Console(quiet=True))["state"] == "finished"
    check_same_run(run_dir, reference)


@pytest.mark.timeout(200)
def test_pause_holds_the_loop_and_resume_lets_it_go(cluster, reference, tmp_path) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    driver = start_driver(config_of(run_dir))
    ray.get(driver.pause.remote())
    give_up = time.monotonic() + 60
    while ray.get(driver.status.remote())["state"] != "paused":
        assert time.monotonic() < give_up
    ray.get(driver.resume.remote())
    while ray.get(driver.status.remote())["state"] == "paused":
        assert time.monotonic() < give_up
    ray.kill(driver)


def test_the_name_of_a_driver_depends_on_the_run_directory_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert driver_name("run") == driver_name(str(tmp_path / "run"))
    assert driver_name("run") != driver_name("other")
