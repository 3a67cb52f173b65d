"""A cluster of hosts with networks of their own: the same run as in one process, whatever is cut off (slow)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.ray.conftest import processes_below
from tests.ray.hosts import PORT, Host, Hosts, start_ray, why_not
from tests.ray.small_run import SMALL, check_same_run, with_shared_pools

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
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


def start_run(host: Host, head: Host, run_dir: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "autoscale_ray.cli",
        "run",
        *SMALL,
        f"placement.run_dir={run_dir}",
        *more,
    ]
    return host.run(command, RAY_ADDRESS=f"{head.address}:{PORT}")


def until(run: subprocess.Popen, host: Host, look: Callable[[], bool], timeout_s: float = 400) -> None:
    """Look again and again until the moment has come; the run must not end before."""
    give_up = time.monotonic() + timeout_s
    while not look():
        assert run.poll() is None, host.output()
        assert time.monotonic() < give_up, host.output()
        time.sleep(0.05)


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
