"""The parts of the Ray backend that decide: each without a cluster."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import ray.train
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayTaskError
from rich.console import Console
from safetensors.torch import load_file, save_file

from autoscale_ray.config import PlannerConfig, RayConfig
from autoscale_ray.config_file import load_config
from autoscale_ray.distributed import driven, driver, evaluate, session, train
from autoscale_ray.distributed.board import Task, TaskBoard, TrainingFailedError
from autoscale_ray.distributed.causes import own_error
from autoscale_ray.distributed.collective import CollectiveConfig
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.distributed.driver import RunFailedError
from autoscale_ray.distributed.evaluate import shares
from autoscale_ray.distributed.observe import GAUGES, samples
from autoscale_ray.distributed.resources import (
    ResourcesError,
    connect,
)
from autoscale_ray.distributed.steps import shards_of
from autoscale_ray.distributed.train import Keeper, drop_damaged, make_trainer, newest_checkpoint
from autoscale_ray.errors import AutoScaleError, ConfigError, PoolError, exit_code
from autoscale_ray.planning.checkpoint import load_state
from tests.ray.small_run import SUMMARY, config_of

GRAFANA = Path(__file__).parents[2] / "cluster_configs" / "grafana.json"
pytestmark = pytest.mark.timeout(60)


def task(name: str) -> Task:
    return Task(name, PlannerConfig(), ("real", "synthetic"), np.arange(3), 0)


def test_the_loop_and_everything_local_leave_ray_alone() -> None:
    code = "import sys, autoscale_ray.loop, autoscale_ray.local; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_task_goes_to_a_worker_and_its_files_come_back() -> None:
    board, got = TaskBoard(), []
    loop = threading.Thread(target=lambda: got.append(board.post(task("a"))))
    loop.start()
    fetched = board.fetch(None, 10)
    assert isinstance(fetched, Task)
    assert fetched.task_id == "a"
    assert board.fetch("a", 0.0) == "wait", "a worker does not get its last task again"
    assert isinstance(board.fetch(None, 10), Task), (
        "a worker group that was started again gets the open task again"
    )
    board.deliver("late task of a dead worker", {"w": b"no"})
    board.deliver("a", {"w": b"yes"})
    board.deliver("a", {"w": b"told twice"})
    loop.join(10)
    assert got == [{"w": b"yes"}]
    assert board.fetch(None, 0.0) == "wait"
    assert len(board.hand_over_s) == 1
    board.close()
    assert board.fetch(None, 10) == "end"


def test_a_task_that_comes_again_is_not_trained_again() -> None:
    """Two arms may choose the same scenes; no worker takes again what it had last, so the second arm hung."""
    board, files, got = TaskBoard(), {"w": b"yes"}, []
    loop = threading.Thread(target=lambda: got.append(board.post(task("a"))))
    loop.start()
    board.fetch(None, 10)
    board.deliver("a", files)
    loop.join(10)
    assert [*got, board.post(task("a"))] == [files, files]
    assert board.num_delivered == 1


def test_a_failed_training_run_wakes_the_loop() -> None:
    board = TaskBoard()
    threading.Timer(0.05, board.fail, [RuntimeError("out of workers")]).start()
    with pytest.raises(RuntimeError, match="out of workers"):
        board.post(task("a"))


def test_a_closed_board_hands_out_nothing() -> None:
    board = TaskBoard()
    loop = threading.Thread(target=board.post, args=[task("a")], daemon=True)
    loop.start()
    assert isinstance(board.fetch(None, 10), Task)
    board.close()
    assert board.fetch(None, 0.0) == "end", "nobody waits for its files any more"
    assert board.is_over
    board.deliver("a", {})
    loop.join(10)


WORKERS, CONTROLLER = ray.train.TrainingFailedError("the ninth worker was lost"), ActorDiedError()


@pytest.mark.parametrize(
    ("signs", "error", "num_runs"),
    [
        ([0], WORKERS, 1),
        ([1, 2, 2], WORKERS, 3),
        ([0] * 9, CONTROLLER, 9),  # used to end the run at once
        ([0] * 8 + [1] * 9, CONTROLLER, 17),
    ],
)
def test_trainers_are_started_again_as_long_as_they_get_on(
    signs, error, num_runs, tmp_path, monkeypatch
) -> None:
    """Ray counts what a Train run loses over all its life; here only what it loses without a sign of progress."""
    board, runs = TaskBoard(), []

    class Trainer:
        """Fails like a Train run that has lost too many workers or its controller, after some progress or none."""

        def fit(self) -> None:
            runs.append(signs[len(runs)])
            board.num_delivered = runs[-1]
            raise error

    monkeypatch.setattr(driven, "make_trainer", lambda *_: Trainer())
    driven._train(config_of(tmp_path / "run"), "driver", board, lambda event, **fields: None)
    assert len(runs) == num_runs
    with pytest.raises(RunFailedError, match="the training run failed"):
        board.post(task("a"))


@pytest.mark.parametrize(("left", "sizes"), [(3, [4, 1]), (8, [4])])
def test_elastic_trainers_go_on_with_as_many_as_the_nodes_that_are_left_can_hold(
    left, sizes, tmp_path, monkeypatch
) -> None:
    """Ray counts the CPUs of scorers as theirs, so that all its attempts were with too many and the run ended."""
    board, made, total = TaskBoard(), [], {"CPU": 8.0}

    class Trainer:
        """Cannot be started after the loss of a node, unless it has been made since."""

        def __init__(self, config: RayConfig, *_: object) -> None:
            made.append(train.most_trainers(config))

        def fit(self) -> None:
            if len(made) == 1:
                total["CPU"] = left
                raise WORKERS

    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(driven, "make_trainer", Trainer)
    sizes_of = ("num_trainers=4", "min_trainers=1", "num_scorers=2")
    config = config_of(tmp_path / "run", *(f"placement.ray.{size}" for size in sizes_of))
    driven._train(config, "driver", board, lambda event, **fields: None)
    assert made == sizes


@pytest.mark.parametrize("damage", ["empty", "half", "no checkpoint"])
def test_a_snapshot_that_a_kill_left_half_written_costs_its_checkpoints_alone(
    damage, tmp_path, monkeypatch
) -> None:
    """Every later controller used to fail on it, so that the run could never go on."""
    told, runs, folder = [], [], tmp_path / "run" / "train" / "trainers"
    for step in (10, 20):
        checkpoint = folder / f"a-{step:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / train.STATE_FILE).touch()
        (checkpoint / train.TASK_FILE).touch()
    snapshot = folder / train.SNAPSHOT_FILE
    kept = [{"checkpoint_dir_name": name, "metrics": {}} for name in ("a-0000010", "a-0000020")]
    snapshot.write_text(json.dumps({"checkpoint_results": kept}))
    assert drop_damaged(tmp_path / "run" / "train") is None
    if damage == "no checkpoint":
        (folder / "a-0000020" / train.TASK_FILE).unlink()
    else:
        snapshot.write_bytes(snapshot.read_bytes()[:40] if damage == "half" else b"")

    class Trainer:
        """Looks for what an earlier one has left."""

        def fit(self) -> None:
            runs.append(folder.exists())

    monkeypatch.setattr(driven, "make_trainer", lambda *_: Trainer())
    driven._train(config_of(tmp_path / "run"), "driver", TaskBoard(), lambda *event, **_: told.append(event))
    assert (runs, told) == ([False], [("checkpoints_dropped",)])
    assert drop_damaged(tmp_path / "run" / "train") is None


def test_a_checkpoint_of_which_half_was_written_is_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: ray.train.Checkpoint(tmp_path))
    keeper = Keeper("a", 10, Deadline(60, tmp_path))
    state = tmp_path / train.STATE_FILE
    save_file({"weights": torch.zeros(100)}, state)
    (tmp_path / train.TASK_FILE).write_text("a")
    found = keeper.found(load_file)
    assert found is not None
    assert found["weights"].shape == (100,)
    state.write_bytes(state.read_bytes()[:200])
    assert keeper.found(load_file) is keeper.found(load_state) is None
    state.unlink()  # another worker may see it
    for load in (load_file, load_state):
        with pytest.raises((OSError, AutoScaleError)):
            keeper.found(load)


@pytest.mark.parametrize(("stall_timeout_s", "timeout_s"), [(60, 120), (900, 900)])
def test_a_collective_waits_for_the_longest_step_that_is_allowed(
    stall_timeout_s, timeout_s, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", dict)
    trainer = make_trainer(RayConfig(stall_timeout_s=stall_timeout_s), "driver", "autoscale", tmp_path)
    assert isinstance(trainer.backend_config, CollectiveConfig)
    assert trainer.backend_config.timeout_s == timeout_s


def test_the_newest_checkpoint_tells_progress_inside_a_task(tmp_path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step, name in enumerate(["aa-0000010", "aa-0000020", "0b-0000010"]):
        folder = tmp_path / "trainers" / name
        folder.mkdir(parents=True)
        os.utime(folder, (step, step))
    assert newest_checkpoint(tmp_path) == "0b-0000010"


def test_an_error_that_comes_back_ends_the_run() -> None:
    board, raised = TaskBoard(), []

    def loop() -> None:
        try:
            board.post(task("a"))
        except TrainingFailedError as error:
            raised.append(str(error))

    thread = threading.Thread(target=loop)
    thread.start()
    board.fetch(None, 10)
    for rank in (0, 1, 2):  # one accident, told by all who are left
        board.report_failure("a", rank, "a worker was lost")
    board.report_failure("a", 0, "TypeError: no such argument")
    assert isinstance(board.fetch(None, 10), Task)
    board.report_failure("a", 0, "TypeError: no such argument")
    thread.join(10)
    assert raised == ["TypeError: no such argument"]


def test_the_same_error_after_some_progress_is_another_accident() -> None:
    board, checkpoints = TaskBoard(), iter(["a-0000010", "a-0000020", "a-0000020"])
    board.newest = lambda: next(checkpoints)
    board.report_failure("a", 0, "the connection was lost")
    board.report_failure("a", 0, "the connection was lost")
    assert not board.is_over
    board.report_failure("a", 0, "the connection was lost")
    assert board.is_over


def test_an_error_that_a_user_can_mend_ends_training_in_its_own_words() -> None:
    board, own = TaskBoard(), PoolError("pools/real", "is damaged")
    for _ in range(2):
        board.report_failure("a", 0, "Traceback ...", own)
    with pytest.raises(PoolError, match="pools/real: is damaged"):
        board.post(task("a"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PoolError("pools/real", "is damaged"), "pools/real: is damaged"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/pools/real"), "/pools/real: No such file"),
        (ValueError("a bug"), None),
    ],
)
def test_an_error_of_a_worker_is_told_without_the_layers_of_ray(error, line) -> None:
    """A damaged pool and a full disk used to be a traceback of many lines and exit code 1."""
    layer = RayTaskError("task", "Traceback ...", error, ip="127.0.0.1").as_instanceof_cause()
    own = own_error(layer)
    assert (own and str(own)) == line
    assert own is None or exit_code(own) == 2


DAMAGED = RayTaskError("task", "Traceback ...", PoolError("pools/real", "is damaged"), ip="127.0.0.1")


def test_the_error_of_a_scorer_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(ray, "get", Mock(side_effect=DAMAGED.as_instanceof_cause()))
    with pytest.raises(PoolError, match=r"^pools/real: is damaged$"):
        evaluate._answers(["call"], "scoring was lost")


def test_the_error_that_a_driver_tells_is_one_line(monkeypatch) -> None:
    """It is of our class as well as of Ray's, whose words are a traceback."""
    for name in ("kill", "get_actor"):
        monkeypatch.setattr(ray, name, Mock())
    failing = Mock(_status={}, _play=Mock(side_effect=DAMAGED.as_instanceof_cause()), _linger_s=0)
    driver.Driver._run(failing)
    assert (failing._status["state"], str(failing._status["error"])) == ("failed", "pools/real: is damaged")


def test_a_trainer_tells_an_error_that_a_user_can_mend(tmp_path, monkeypatch) -> None:
    """A full disk used to end the run with a traceback."""
    trainer = Mock()
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: trainer)
    monkeypatch.setattr(ray, "get", Mock())
    monkeypatch.setattr(train, "_rank_and_size", lambda: (0, 1))
    monkeypatch.setattr(train, "worker_device", lambda: "cpu")
    monkeypatch.setattr(train, "next_task", lambda *_: task("a"))
    monkeypatch.setattr(train, "train_task", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    settings = {"driver": "driver", "namespace": "autoscale", "checkpoint_steps": 10}
    with pytest.raises(OSError, match="No space left"):
        train.train_loop({**settings, "stall_timeout_s": 60, "stacks": str(tmp_path)})
    *_, text, own = trainer.report_failure.remote.call_args.args
    assert "Traceback" in text
    assert str(own) == "storage: No space left"


class Gone:
    """The handle of a driver that goes between being found and answering."""

    _actor_id = 1

    class status:
        """Its method."""

        @staticmethod
        def remote() -> None:
            raise ActorDiedError


def test_a_driver_that_goes_while_it_is_asked_gives_way_to_another(tmp_path, monkeypatch) -> None:
    """It used to be Ray's own error."""
    found, started = [Gone(), Gone(), None, None], Mock()
    monkeypatch.setattr(driver, "find_driver", lambda run_dir: found.pop(0))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "remote", lambda made: started)
    assert driver.start_driver(config_of(tmp_path)) is started.options().remote()
    assert found == []


@pytest.mark.parametrize(
    ("total", "resources"), [({driver.HEAD: 1.0}, {driver.HEAD: driver.LEAST}), ({}, None)]
)
@pytest.mark.parametrize("lifetime", ["detached", None])
def test_every_driver_sits_on_the_head_where_there_is_one(
    lifetime, total, resources, tmp_path, monkeypatch
) -> None:
    """Those of trials used to be put on any node: spot workers, too, which are taken away."""
    started = Mock()
    monkeypatch.setattr(driver, "find_driver", lambda run_dir: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "remote", lambda made: started)
    driver.start_driver(config_of(tmp_path), lifetime=lifetime)
    assert started.options.call_args.kwargs["resources"] == resources


@pytest.mark.parametrize(("state", "waits"), [("running", False), ("paused", False), ("failed", True)])
def test_a_run_whose_driver_has_ended_waits_for_room(state, waits, tmp_path, monkeypatch) -> None:
    """A driver that lingers after its run used to spare its successor the checks."""
    waited = []
    monkeypatch.setattr(driver, "find_driver", lambda run_dir: "lingering")
    monkeypatch.setattr(driver, "status_of", lambda found: {"state": state})
    for name in ("check_ready", "connect", "leave_driver", "start_driver"):
        monkeypatch.setattr(session, name, Mock())
    monkeypatch.setattr(session, "wait_for_room", waited.append)
    monkeypatch.setattr(session, "follow_to_the_end", lambda *_: {"state": "finished"})
    session.drive(config_of(tmp_path), Console(quiet=True))
    assert bool(waited) == waits


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_every_shard_belongs_to_one_worker_in_order(num_workers: int) -> None:
    dealt = [shard for rank in range(num_workers) for shard in shards_of(rank, num_workers)]
    assert dealt == [0, 1, 2, 3]
    assert all(shards_of(rank, num_workers) for rank in range(num_workers))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(logs=st.lists(st.integers(0, 8), min_size=1, max_size=60), num_shares=st.integers(1, 6))
def test_shares_hold_every_row_once_and_logs_whole(logs: list[int], num_shares: int) -> None:
    ids = np.array([f"log{number}" for number in logs])
    dealt = shares(ids, num_shares)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(ids)))
    assert all(len(rows) for rows in dealt)
    owners = [set(ids[rows].tolist()) for rows in dealt]
    assert sum(map(len, owners)) == len(set(ids.tolist()))
    largest = max(np.unique(ids, return_counts=True)[1])
    assert max(map(len, dealt)) <= len(ids) / len(dealt) + largest


def test_switches_that_run_code_from_parquet_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "1")
    with pytest.raises(ResourcesError, match="must not be set"):
        connect(RayConfig())


@pytest.mark.parametrize("override", ["placement.ray.num_trainers=5", "placement.ray.num_trainers=0"])
def test_more_trainers_than_shards_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="num_trainers"):
        load_config(None, [override])


def test_samples_leave_out_what_is_missing() -> None:
    found = {(name, tuple(tags.values())): value for name, tags, value in samples(SUMMARY)}
    assert found["autoscale_cluster_score", ("c0",)] == 0.4
    assert ("autoscale_cluster_score", ("c1",)) not in found
    assert found["autoscale_scenes_per_second", ("train",)] == 4 * 50 * 64 / 8.0
    assert found["autoscale_scenes_per_second", ("evaluate_dev",)] == 4 * 40 / 2.0
    assert {name for name, _ in found} == set(GAUGES)


def test_every_expression_of_the_dashboard_is_exported_with_its_labels() -> None:
    dashboard = json.loads(GRAFANA.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    legends = [target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = set()
    for expression, legend in zip(expressions, legends, strict=True):
        (name,) = re.findall(r"\bray_(\w+)", expression)
        used.add(name)
        labels = re.findall(r"(\w+)=", expression) + re.findall(r"\{\{(\w+)\}\}", legend)
        assert set(labels) <= set(GAUGES[name][1])
    assert used == set(GAUGES)
