"""What a driver shows arrives where people look: Prometheus, TensorBoard, MLflow, W&B and the log of the run."""

from __future__ import annotations

import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoscale_ray.artifacts import RunStore
from autoscale_ray.distributed import observe
from autoscale_ray.distributed.observe import GAUGES, Observer
from autoscale_ray.distributed.status import read_events
from autoscale_ray.distributed.trackers import TRACKERS, Tracker, is_installed
from autoscale_ray.storage import Disk, FolderStorage
from tests.ray.small_run import SUMMARY

EXPORT_TIMEOUT_S = 90


def later(index: int, objective: float) -> dict[str, Any]:
    """Return the summary after one more round."""
    done = {**SUMMARY["rounds"][-1], "index": index, "totals": {"objective": objective}}
    return {**SUMMARY, "rounds": [*SUMMARY["rounds"], done]}


@pytest.fixture
def offline(monkeypatch) -> None:
    """Let no tracker reach for a server."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.timeout(180)
def test_metrics_are_exported_by_their_names_with_their_labels(cluster, tmp_path: Path) -> None:
    observer = ray.remote(Observer).options(num_cpus=0).remote("a-run", tmp_path)
    ray.get(observer.show.remote(SUMMARY))
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    address = ray.nodes()[0]["NodeManagerAddress"]
    give_up = time.monotonic() + EXPORT_TIMEOUT_S
    missing, lines = set(GAUGES), []
    while missing and time.monotonic() < give_up:
        pages = [
            urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10).read().decode()
            for port in ports
        ]
        lines = [line for page in pages for line in page.splitlines() if 'run="a-run"' in line]
        missing = {name for name in GAUGES if not any(line.startswith(f"ray_{name}{{") for line in lines)}
        time.sleep(0.5)
    ray.kill(observer)
    assert not missing
    line = next(
        line for line in lines if line.startswith("ray_autoscale_cluster_weight{") and 'cluster="c1"' in line
    )
    assert float(line.rsplit(" ", 1)[1]) == 0.75


@pytest.mark.timeout(120)
def test_the_log_tells_run_round_stage_and_seconds_and_trackers_start_again(
    cluster, tmp_path, offline
) -> None:
    store = RunStore.claim(FolderStorage(Disk(tmp_path / "a-run")), {"config": 1})
    observer = Observer("a-run", tmp_path / "a-run", store.log)
    with observer.watch("train"):
        pass
    observer.show(SUMMARY)
    with observer.watch("train"):
        pass
    observer.show(later(4, 0.6))
    with observer.watch("train", in_round=False):
        pass
    observer.close("finished")
    events = read_events(str(tmp_path / "a-run"))
    assert [event["event"] for event in events] == [
        "driver_started",
        *("stage_started", "stage_ended", "round_published") * 2,
        *("stage_started", "stage_ended"),
        "driver_ended",
    ]
    assert all(event["run"] == "a-run" and event["time_s"] > 0 for event in events)
    ended = [event for event in events if event["event"] == "stage_ended"]
    assert [(event["round"], event["stage"]) for event in ended] == [
        (0, "train"),
        (4, "train"),
        (None, "train"),
    ]
    assert all(0 <= event["seconds"] < 10 for event in ended)
    published = [event for event in events if event["event"] == "round_published"]
    assert [(event["round"], event["objective"]) for event in published] == [(3, 0.5), (4, 0.6)]
    assert ":" in events[0]["ray_address"]


def test_scalars_are_written_once_at_their_round_though_a_driver_replays_them(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = TRACKERS["tensorboard"](tmp_path, {})
        for index in range(3):
            tracker.write(index, {"cluster_weight/c1": 0.25 * index})
        tracker.close()
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = written.Scalars("cluster_weight/c1")
    assert [(point.step, point.value) for point in points] == [(0, 0.0), (1, 0.25), (2, 0.5)]


@pytest.mark.skipif(not is_installed("mlflow"), reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")  # those of mlflow are not ours
def test_mlflow_shows_each_round_once_in_one_run(tmp_path: Path, offline) -> None:
    import mlflow

    for objective in (0.5, 0.9):
        tracker = TRACKERS["mlflow"](tmp_path, {"loop.budget": 60})
        tracker.write(0, {"round": 0.0, "objective": objective})
        tracker.close()
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("autoscale")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"loop.budget": "60"}
    assert run.info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "objective")] == [0.5]


@pytest.mark.skipif(not is_installed("wandb"), reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")  # those of wandb are not ours
def test_wandb_writes_offline_without_a_key(tmp_path: Path, offline) -> None:
    tracker = TRACKERS["wandb"](tmp_path, {"loop.budget": 60})
    tracker.write(0, {"objective": 0.5})
    tracker.close()
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"objective" in record.read_bytes()


@pytest.mark.timeout(60)
def test_a_tracker_that_hangs_does_not_hold_the_end_of_a_run(cluster, tmp_path, monkeypatch) -> None:
    hangs = threading.Event()
    tracker = Tracker(lambda index, scalars: None, lambda: bool(hangs.wait(50)))
    monkeypatch.setattr(observe, "TRACKERS", {"tensorboard": lambda run_dir, settings: tracker})
    monkeypatch.setattr(observe, "CLOSE_TIMEOUT_S", 0.5)
    store = RunStore.claim(FolderStorage(Disk(tmp_path / "a-run")), {"config": 1})
    observer = Observer("a-run", tmp_path / "a-run", store.log)
    observer.show(SUMMARY)
    observer.close("failed", "RuntimeError: no reason")
    hangs.set()
    *_, failed, ended = read_events(str(tmp_path / "a-run"))
    assert (failed["tracker"], failed["reason"]) == ("trackers", "did not end in 0.5 s")
    assert (ended["state"], ended["reason"]) == ("failed", "RuntimeError: no reason")


@pytest.mark.timeout(120)
def test_a_tracker_that_fails_is_named_and_the_run_goes_on(cluster, tmp_path, offline, monkeypatch) -> None:
    if not is_installed("mlflow"):
        pytest.skip("mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    store = RunStore.claim(FolderStorage(Disk(tmp_path / "a-run")), {"config": 1})
    observer = Observer("a-run", tmp_path / "a-run", store.log)
    observer.show(SUMMARY)
    observer.show(later(4, 0.6))
    observer.close("finished")
    failed = [event for event in read_events(str(tmp_path / "a-run")) if event["event"] == "tracker_failed"]
    assert [event["tracker"] for event in failed] == ["mlflow"]
    assert "nonsense" in failed[0]["reason"]
    written = EventAccumulator(str(tmp_path / "a-run" / "tensorboard")).Reload()
    assert [point.step for point in written.Scalars("objective")] == [3, 4]


def test_a_tracker_that_is_not_installed_is_known_as_such() -> None:
    assert is_installed("tensorboard")
    assert not is_installed("no_such_tracker")
