"""The state of a run is told from its folder alone, and its driver is asked where one can be reached."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from autoscale_ray.artifacts import RunStore
from autoscale_ray.cli import main
from autoscale_ray.distributed.driver import driver_name
from autoscale_ray.distributed.observe import where_ray_is
from autoscale_ray.distributed.status import event_line, read_events, status_lines
from autoscale_ray.storage import Disk, FolderStorage

NOBODY = "127.0.0.1:1"
"""An address where nothing listens."""


def payload(objective: float | None, count: int) -> dict:
    return {"totals": {"objective": objective}, "counts": {"c0": count, "c1": 0}}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch) -> Path:
    """Return a run with two published rounds and nobody at work."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = RunStore.claim(FolderStorage(Disk(tmp_path / "run")), {"config": 1}, clock=lambda: 1000.0)
    store.commit_round(0, payload(0.5, 0))
    store.commit_round(1, payload(None, 60))
    store.log("stage_ended", run="run", round=2, stage="train", seconds=12.34)
    return tmp_path / "run"


def test_a_folder_alone_tells_rounds_and_the_last_event(run_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    lines = status_lines(str(run_dir), now_s=1090.0)
    assert lines[0] == f"{run_dir}: 2 rounds published"
    assert lines[1].strip() == "round 0: dev objective x100 50.00, real scenes only"
    assert lines[2].strip() == "round 1: dev objective x100 missing, 60 synthetic scenes"
    assert lines[3] == "last event: stage ended train of round 2 in 12.3 s, 90 s ago"
    assert lines[4].startswith("driver: none known")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before, "nothing is claimed"


@pytest.mark.parametrize("line", ["[]", "3", "{}", '{"event": 1, "time_s": "x"}', "[" * 100_000])
def test_what_is_no_event_or_no_summary_is_left_out(line: str, run_dir: Path) -> None:
    before = status_lines(str(run_dir), now_s=1090.0)
    with (run_dir / "events" / "999999.jsonl").open("w") as file:
        file.write(f"{line}\n")
    (run_dir / "summary.json").write_text(line)
    assert status_lines(str(run_dir), now_s=1090.0) == before


def test_the_last_event_says_how_a_driver_ended() -> None:
    event = {"time_s": 10.0, "event": "driver_ended", "run": "run", "state": "stopped"}
    assert event_line(event, 15.0) == "driver ended (stopped), 5 s ago"


def test_no_ray_is_imported_where_no_cluster_is_known(run_dir: Path) -> None:
    code = "import sys; from autoscale_ray.cli import main; main(['status', sys.argv[1]]); "
    code += "assert 'ray' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 rounds published" in done.stdout


def test_a_cluster_that_is_gone_is_said_at_once(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)
    started = time.monotonic()
    assert status_lines(str(run_dir))[-1] == f"driver: none, no cluster answers at {NOBODY}"
    assert time.monotonic() - started < 10


def test_a_half_written_event_is_left_out(run_dir: Path) -> None:
    (log,) = run_dir.glob("events/*.jsonl")
    num_events = len(read_events(str(run_dir)))
    with log.open("a") as file:
        file.write(json.dumps({"event": "stage_started", "time_s": 2.0})[:-5])
    assert len(read_events(str(run_dir))) == num_events


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path)])
    assert ended.value.code == 2
    assert "no such run" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_the_driver_is_asked_on_the_cluster_the_run_was_started_on(cluster, run_dir, monkeypatch) -> None:
    class Standing:
        """Answers as a driver does."""

        def status(self) -> dict:
            return {"state": "paused", "stage": "train", "pid": 7}

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    event = {"time_s": 1001.0, "event": "driver_started", **where_ray_is()}
    (log,) = run_dir.glob("events/*.jsonl")
    log.write_text(log.read_text() + json.dumps(event) + "\n")
    assert status_lines(str(run_dir))[-1].startswith("driver: none on the cluster at")
    name = driver_name(str(run_dir))
    standing = ray.remote(Standing).options(num_cpus=0, name=name, namespace="autoscale").remote()
    assert status_lines(str(run_dir))[-1] == "driver: paused, train, process 7"
    assert ray.is_initialized(), "a caller's own connection is left alone"
    ray.kill(standing)
