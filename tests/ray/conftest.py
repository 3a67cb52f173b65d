"""One Ray cluster for all tests of this folder, started as a process of its own and ended by its id."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
}
START_TIMEOUT_S = 120
NUM_GPUS = 2
"""Bookkeeping, like the CPUs: most machines that run these tests have none."""
EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the result for `pytest_unconfigure`."""
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End at once when everything is told: native threads (Ray, gRPC, storage clients) outlive the interpreter's
    teardown, and one of them crashed a process whose tests had all passed.
    """
    if EXIT_STATUS in config.stash and not hasattr(config, "workerinput"):
        config.get_terminal_writer().flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_head(folder: str, num_cpus: int) -> tuple[subprocess.Popen, str, str]:
    """Start a head on loopback; return its process, its address and that of its dashboard."""
    port, dashboard = free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = {
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        # A second head on this machine would otherwise take the agent's port from the first.
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": num_cpus,
        "num-gpus": NUM_GPUS,
        "resources": '{"trial_slot": 2}',
        "temp-dir": folder,
        "node-ip-address": "127.0.0.1",
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    log = Path(folder) / "head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT})
    for awaited in (port, dashboard):
        wait_for_port(process, awaited, log)
    return process, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"


def wait_for_port(process: subprocess.Popen, port: int, log: Path) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"no Ray head on port {port}: {log.read_text()[-500:]}")


def end_tree(process: subprocess.Popen) -> None:
    """End a process we started and everything it started."""
    members = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.terminate()
    _, alive = psutil.wait_procs(members, timeout=5)
    for member in alive:
        member.kill()
    process.wait(15)


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Return the processes below our own head whose title holds a word; Ray names its actors there."""
    return [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if title in " ".join(titled(process))
    ]


def titled(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="session")
def head() -> Iterator[dict[str, Any]]:
    """Return address and dashboard of a cluster with 8 logical CPUs."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: socket paths end at 107 characters
    process, address, dashboard = start_head(folder, num_cpus=8)
    yield {"address": address, "dashboard": dashboard, "pid": process.pid}
    end_tree(process)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(head, monkeypatch) -> Iterator[dict[str, Any]]:
    """Connect this process to the shared cluster for one test."""
    import ray

    for name, value in {**ENVIRONMENT, "RAY_ADDRESS": head["address"]}.items():
        monkeypatch.setenv(name, value)
    ray.init(address=head["address"], namespace="autoscale", log_to_driver=False)
    yield head
    ray.shutdown()


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory) -> Path:
    """Return the run directory of the undisturbed run in one process."""
    from rich.console import Console

    from autoscale_ray.session import run_local
    from tests.ray.small_run import config_of

    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run_local(config_of(run_dir), Console(quiet=True))
    return run_dir


@pytest.fixture(scope="session")
def reference(reference_run) -> Path:
    """Return the same by the name that most tests use."""
    return reference_run
