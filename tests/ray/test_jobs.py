"""The job scripts on a real head: submitted, stopped, submitted again; refused with one line where they must be."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray.job_submission import JobStatus, JobSubmissionClient

from autoscale_ray.distributed.driver import find_driver
from autoscale_ray.distributed.jobs import prepare_pools, run_autoscale
from autoscale_ray.journal import read_rounds
from tests.ray.conftest import ENVIRONMENT, free_port
from tests.ray.small_run import SMALL, check_same_run, with_cached_stages, with_shared_pools

ROOT = Path(__file__).parents[2]
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def submit(client: JobSubmissionClient, script: str, run_dir: Path, *more: str) -> str:
    command = [sys.executable, str(ROOT / "jobs" / script), *SMALL, f"placement.run_dir={run_dir}", *more]
    environment = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    give_up = time.monotonic() + 120
    while True:
        try:
            return client.submit_job(entrypoint=shlex.join(command), runtime_env={"env_vars": environment})
        except RuntimeError as error:  # the agent of a new head comes up after its dashboard
            if "No available agent" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.5)


def wait(client: JobSubmissionClient, job: str, until, timeout_s: float = 300) -> JobStatus:
    give_up = time.monotonic() + timeout_s
    while not until(status := client.get_job_status(job)):
        assert time.monotonic() < give_up, client.get_job_logs(job)
        time.sleep(0.2)
    return status


@pytest.mark.timeout(400)
def test_a_job_stopped_and_submitted_again_ends_with_the_same_run(cluster, reference, tmp_path) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    client = JobSubmissionClient(cluster["dashboard"])
    first = submit(client, "run_autoscale.py", run_dir)
    wait(client, first, lambda status: status in ENDED or any((run_dir / "rounds").glob("*.json")))
    finished = read_rounds(str(run_dir))
    client.stop_job(first)
    assert wait(client, first, lambda status: status in ENDED) == JobStatus.STOPPED
    again = submit_by_command(cluster["dashboard"], "run_autoscale.py", run_dir)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"everything lies in {run_dir}" in again.stdout
    assert read_rounds(str(run_dir))[: len(finished)] == finished
    check_same_run(run_dir, reference)
    assert json.loads((run_dir / "summary.json").read_text())["arms"]
    assert find_driver(str(run_dir)) is None


def submit_by_command(dashboard: str, script: str, run_dir: Path) -> subprocess.CompletedProcess:
    """Submit a job as a user does and wait for its end."""
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}}
    ray_command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", dashboard]
    job = [sys.executable, str(ROOT / "jobs" / script), *SMALL, f"placement.run_dir={run_dir}"]
    command = [*ray_command, "--runtime-env-json", json.dumps(environment), "--", *job]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.timeout(200)
def test_a_job_that_fails_says_so_and_exits_non_zero(cluster, tmp_path) -> None:
    client = JobSubmissionClient(cluster["dashboard"])
    job = submit(client, "run_autoscale.py", tmp_path / "run", "loop.budget=0")
    assert wait(client, job, lambda status: status in ENDED) == JobStatus.FAILED
    assert client.get_job_info(job).driver_exit_code == 2
    assert "failed: overrides: loop.budget" in client.get_job_logs(job)
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("placement.ray.num_scorers=50", "the run needs 51 CPUs and 0 GPUs at once"),
        ("placement.ray.gpus_per_worker=2", "the cluster has 8 CPUs and 2 GPUs"),
        ("placement.ray.gpus_per_scorer=3", "needs 3 CPUs and 3 GPUs at once"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_in_time(override, message, cluster, tmp_path, capsys) -> None:
    started = time.monotonic()
    arguments = [*SMALL, f"placement.run_dir={tmp_path / 'run'}", "placement.ray.start_timeout_s=1", override]
    assert run_autoscale(arguments) == 1
    assert time.monotonic() - started < 30
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert find_driver(str(tmp_path / "run")) is None


@pytest.mark.timeout(60)
# The cluster of the tests counts GPUs that are not there; where they are, nothing is to be refused.
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs of this machine")
@pytest.mark.parametrize("name", ["gpus_per_worker", "gpus_per_scorer"])
def test_gpus_that_torch_cannot_use_are_refused_in_time(name, cluster, tmp_path, capsys) -> None:
    assert run_autoscale([*SMALL, f"placement.run_dir={tmp_path / 'run'}", f"placement.ray.{name}=1"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        f"placement.ray.{name}=1: a worker with a GPU sees no CUDA device (torch {torch.__version__}" in line
    )
    assert find_driver(str(tmp_path / "run")) is None


@pytest.mark.timeout(120)
def test_a_cluster_that_cannot_be_reached_is_one_line(tmp_path) -> None:
    command = [sys.executable, "-m", "autoscale_ray.cli", "run", "--out", tmp_path / "run", *SMALL]
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "no Ray cluster answers" in line
    assert "--backend local" in line


@pytest.mark.timeout(120)
def test_pools_are_prepared_once(reference, tmp_path, capsys) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    assert prepare_pools([*SMALL, f"placement.run_dir={run_dir}"]) == 0
    assert "synthetic: 300 scenes" in capsys.readouterr().out


def test_two_configuration_files_are_refused(capsys) -> None:
    assert run_autoscale(["one.yaml", "two.yaml"]) == 2
    assert "only one configuration file" in capsys.readouterr().err
