"""A cluster of hosts with networks of their own: the same run as in one process, whatever is cut off (slow)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from autoscale_ray.journal import read_rounds
from tests.ray.conftest import processes_below
from tests.ray.hosts import PORT, Host, Hosts, start_ray, why_not
from tests.ray.small_run import SMALL, check_same_run, with_cached_stages, with_shared_pools

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
FASTER = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
"""A node that does not answer is given up after seconds; Ray's own default is most of a minute."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


def cluster_of(hosts: Hosts, *num_cpus: int) -> tuple[Host, ...]:
    """Start a head without CPUs and a worker for every number."""
    head, *workers = (hosts.add() for _ in range(1 + len(num_cpus)))
    start_ray(head, 0, **FASTER)
    for worker, cpus in zip(workers, num_cpus, strict=True):
        start_ray(worker, cpus, head, **FASTER)
    return head, *workers


def autoscale(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "autoscale_ray.cli", *arguments]


def start_run(host: Host, head: Host, run_dir: Path, *more: str) -> subprocess.Popen:
    command = autoscale("run", *SMALL, f"placement.run_dir={run_dir}", *more)
    return host.run(command, RAY_ADDRESS=f"{head.address}:{PORT}")


def after_a_round(hosts: Hosts, run_dir: Path, *more: str) -> tuple[Host, Host, subprocess.Popen]:
    """Start a cluster of two and a run in it; return head, worker and run once a round is published."""
    head, worker = cluster_of(hosts, 4)
    run = start_run(head, head, run_dir, *more)
    until(run, head, lambda: any((run_dir / "rounds").glob("*.json")))
    return head, worker, run


def until(run: subprocess.Popen, host: Host, look: Callable[[], bool], timeout_s: float = 400) -> None:
    """Look again and again until the moment has come; the run must not end before."""
    give_up = time.monotonic() + timeout_s
    while not look():
        assert run.poll() is None, host.output()
        assert time.monotonic() < give_up, host.output()
        time.sleep(0.05)  # polls processes and files of others; nothing is asserted on time


def end_of(run: subprocess.Popen, host: Host, timeout_s: float = 600) -> str:
    try:
        code = run.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    assert code == 0, host.output()
    return host.output()


def where(hosts: Sequence[Host], title: str) -> set[str]:
    """Return the hosts on which an actor of Ray is running."""
    return {host.name for host in hosts if processes_below(host.space.pid, title)}


@pytest.mark.timeout(1200)
def test_a_run_on_three_hosts_is_that_of_one_process(hosts: Hosts, reference: Path, tmp_path: Path) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    head, *workers = cluster_of(hosts, 2, 2, 2)
    more = [f"placement.ray.num_{name}" for name in ("trainers=4", "embedders=1", "scorers=2")]
    run = start_run(head, head, run_dir, *more)
    trained: set[str] = set()
    until(run, head, lambda: trained.update(where(workers, "TrainWorker")) or len(trained) > 1)
    assert where([head, *workers], "Driver") == {head.name}, "the head is the one node that is not taken away"
    assert str(run_dir) in end_of(run, head)
    check_same_run(run_dir, reference)


@pytest.mark.timeout(1200)
def test_a_host_cut_off_in_training_is_done_without(hosts: Hosts, reference: Path, tmp_path: Path) -> None:
    """The processes of the host go on and can still write to the folder; nobody hears them."""
    run_dir = with_cached_stages(tmp_path / "run", reference)
    head, first, second = cluster_of(hosts, 3, 3)
    run = start_run(head, head, run_dir, "placement.ray.num_trainers=2", "placement.ray.min_trainers=1")

    def trainers() -> set[str]:
        return where([first, second], "TrainWorker")

    until(run, head, lambda: bool(trainers()) and any((run_dir / "train" / "trainers").glob("*-*")))
    lost = first if first.name in trainers() else second
    lost.unplug()
    finished = read_rounds(str(run_dir))
    assert str(run_dir) in end_of(run, head)
    assert read_rounds(str(run_dir))[: len(finished)] == finished
    assert len(finished) < 3, "the host was cut off before the run ended"
    check_same_run(run_dir, reference)


@pytest.mark.timeout(1200)
def test_a_run_goes_on_in_another_cluster_after_its_head_lost_power(
    hosts: Hosts, reference: Path, tmp_path: Path
) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    head, _, run = after_a_round(hosts, run_dir)
    head.power_off()
    run.wait(30)
    finished = read_rounds(str(run_dir))
    assert len(finished) < 3, "the head was lost before the run ended"
    other, _ = cluster_of(hosts, 4)
    assert str(run_dir) in end_of(start_run(other, other, run_dir), other)
    assert read_rounds(str(run_dir))[: len(finished)] == finished
    check_same_run(run_dir, reference)


@pytest.mark.timeout(600)
def test_a_run_is_watched_and_stopped_from_another_host(
    hosts: Hosts, reference: Path, tmp_path: Path
) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    head, worker, run = after_a_round(hosts, run_dir, "loop.num_rounds=20")  # time to ask before the last
    for command in ("status", "stop"):
        asked = worker.run(autoscale(command, str(run_dir)), RAY_ADDRESS=f"{head.address}:{PORT}")
        assert asked.wait(120) == 0, worker.output()
    assert "running" in worker.output()
    assert "stopped" in end_of(run, head)
    assert len(read_rounds(str(run_dir))) <= 20
