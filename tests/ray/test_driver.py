"""The loop on Ray: the same run as in one process, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rich.console import Console

from autoscale_ray.cli import main
from autoscale_ray.config import PlacementConfig, RunConfig
from autoscale_ray.distributed.driver import (
    RunFailedError,
    driver_name,
    end_driver,
    find_driver,
    follow,
    leave_driver,
    start_driver,
    status_of,
)
from autoscale_ray.distributed.session import embed_on_ray, run_on_ray
from autoscale_ray.distributed.status import read_events
from autoscale_ray.errors import AutoScaleError, exit_code
from autoscale_ray.journal import read_rounds
from autoscale_ray.local import LocalStages
from autoscale_ray.session import open_run, run_local
from tests.ray.conftest import processes_below
from tests.ray.small_run import (
    TWO_OF_EACH,
    check_same_run,
    config_of,
    wait_for,
    with_cached_stages,
    with_shared_pools,
)


def hold(driver: Any) -> dict[str, Any]:
    """Hold a driver before its next stage, whichever that is."""
    ray.get(driver.pause.remote())
    return wait_for(lambda: (status := ask(driver))["state"] == "paused" and status)


def hold_before(driver: Any, stage: str) -> None:
    """Let a driver go from stage to stage until it is held before the one that is wanted."""
    while hold(driver)["stage"] != stage:
        ray.get(driver.resume.remote())


def ask(driver: Any) -> dict[str, Any]:
    status = ray.get(driver.status.remote())
    assert status["state"] in ("running", "paused"), status
    return status


def end_of(driver: Any) -> dict[str, Any]:
    *_, last = follow(driver, poll_s=0.1)
    if last["error"]:
        raise last["error"]
    return last


@pytest.mark.timeout(400)
def test_a_driver_killed_in_training_evaluation_and_retrieval_ends_with_the_same_run(
    cluster, reference, tmp_path
) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    driver = start_driver(config_of(run_dir))
    pids = []
    for stage in ("train", "evaluate dev", "retrieve"):
        hold_before(driver, stage)
        finished = read_rounds(str(run_dir))
        before = checkpoints(run_dir)
        pids.append(ask(driver)["pid"])
        ray.get(driver.resume.remote())
        wait_for(lambda: any((run_dir / "scratch").iterdir()))
        if stage == "train":
            wait_for(lambda before=before: checkpoints(run_dir) - before)
        os.kill(pids[-1], signal.SIGKILL)
        wait_for(lambda: ray.get(driver.status.remote())["pid"] != pids[-1])
        assert read_rounds(str(run_dir))[: len(finished)] == finished, "no finished round is lost"
    assert end_of(driver)["state"] == "finished"
    end_driver(str(run_dir))
    assert len(set(pids)) == 3
    check_same_run(run_dir, reference)


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "train" / "trainers").glob("*-*") if path.is_dir()}


@pytest.mark.timeout(400)
def test_two_of_each_of_which_a_trainer_is_killed_give_the_run_of_one_process(
    cluster, reference, tmp_path
) -> None:
    run_dir = with_shared_pools(tmp_path / "run", reference)
    driver = start_driver(config_of(run_dir, *TWO_OF_EACH))
    hold_before(driver, "train")
    before = checkpoints(run_dir)
    ray.get(driver.resume.remote())
    wait_for(lambda: checkpoints(run_dir) - before)
    assert ask(driver)["stage"] == "train"
    workers = processes_below(cluster["pid"], "RayTrainWorker")
    assert len(workers) == 2
    workers[0].kill()
    assert end_of(driver)["state"] == "finished"
    end_driver(str(run_dir))
    check_same_run(run_dir, reference)
    assert (run_dir / "report.html").is_file()
    assert not (run_dir / "parts").exists()
    assert find_driver(str(run_dir)) is None


@pytest.mark.timeout(120)
def test_a_second_driver_is_refused_and_the_first_is_not_disturbed(cluster, reference, tmp_path) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    config = config_of(run_dir)
    driver = start_driver(config)
    hold(driver)
    assert start_driver(config)._actor_id == driver._actor_id, "the same run is joined"
    for other in ("loop.budget=61", "loop.final_seeds=9", f"data.dev={run_dir}/another"):
        with pytest.raises(AutoScaleError, match="another configuration"):
            start_driver(config_of(run_dir, other))
    with pytest.raises(AutoScaleError, match="running the whole loop"):
        start_driver(config, embed_only=True)
    with pytest.raises(AutoScaleError, match="another process"):
        run_local(config, Console(quiet=True))
    assert ask(driver)["state"] == "paused"
    end_driver(str(run_dir))
    assert find_driver(str(run_dir)) is None


@pytest.mark.timeout(120)
def test_all_who_follow_a_run_hear_how_it_ended(cluster, reference, tmp_path) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    config = config_of(run_dir, "planner.factory=no_such_module:make")
    driver = start_driver(config)
    hold(driver)
    with ThreadPoolExecutor(1) as pool:
        heard: list[dict[str, Any]] = []
        slow = pool.submit(lambda: heard.extend(follow(driver, poll_s=1.0)))
        wait_for(lambda: heard)
        ray.get(driver.resume.remote())
        *_, last = follow(driver, poll_s=0.1)  # hears of the end first, and leaves
        leave_driver(str(run_dir), driver)
        slow.result()
    assert heard[0]["state"] != last["state"] == heard[-1]["state"] == "failed"
    assert "no_such_module" in str(heard[-1]["error"])
    assert find_driver(str(run_dir)) is None


@pytest.mark.timeout(120)
def test_a_driver_that_nobody_follows_says_why_it_failed_and_goes(
    cluster, reference, tmp_path, capsys
) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    config = config_of(run_dir, "planner.factory=no_such_module:make")
    driver = start_driver(config, linger_s=1.0)
    wait_for(lambda: find_driver(str(run_dir)) is None)
    (ended,) = [event for event in read_events(str(run_dir)) if event["event"] == "driver_ended"]
    assert ended["state"] == "failed"
    assert "no_such_module" in ended["reason"]
    main(["status", str(run_dir)])
    assert "driver ended (failed) since" in capsys.readouterr().out
    with pytest.raises(RunFailedError, match="ended from elsewhere"):
        list(follow(driver))


@pytest.mark.timeout(120)
def test_a_loop_waits_for_the_driver_that_embeds_its_pools_and_is_no_part_of_it(
    cluster, reference, tmp_path
) -> None:
    """It used to join that driver, which ends without a summary: a TypeError."""
    run_dir = with_cached_stages(tmp_path / "run", reference)
    config = config_of(run_dir)
    first = start_driver(config, embed_only=True)
    hold(first)
    with ThreadPoolExecutor(
        1
    ) as elsewhere:  # the client of the first one ends it while the second waits for it
        waiting = elsewhere.submit(start_driver, config)
        wait_for(lambda: status_of(first)["state"] != "paused")
        end_driver(str(run_dir), first)
        second = waiting.result(60)
    assert second._actor_id != first._actor_id
    assert not hold(second)["embed_only"]
    end_driver(str(run_dir))


@pytest.mark.timeout(120)
def test_embedding_stops_before_its_next_stage_when_asked(cluster, reference, tmp_path) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    driver = start_driver(config_of(run_dir), embed_only=True)
    hold(driver)
    ray.get(driver.stop.remote())
    *_, last = follow(driver, poll_s=0.1)
    assert last["state"] == "stopped"
    end_driver(str(run_dir))


@pytest.mark.timeout(120)
def test_whoever_asked_for_embeddings_hears_of_the_clusters_and_claims_nothing(
    cluster, reference, tmp_path
) -> None:
    """It used to open the run itself, and so superseded a driver that had begun to go on with it meanwhile."""
    run_dir = with_cached_stages(tmp_path / "run", reference)
    clusters = embed_on_ray(config_of(run_dir), Console(quiet=True))
    inputs, store = open_run(config_of(run_dir))
    assert store.epoch == 2, "before us the driver alone"
    stages = LocalStages(config_of(run_dir), inputs, store)
    expected = stages.cluster(stages.embed())
    for field in dataclasses.fields(expected):
        ours, theirs = (getattr(found, field.name) for found in (clusters, expected))
        assert np.array_equal(ours, theirs) if isinstance(theirs, np.ndarray) else ours == theirs, field.name


@pytest.mark.timeout(120)
def test_a_folder_that_cannot_be_made_is_one_line(cluster) -> None:
    """It used to be the driver's whole traceback."""
    driver = start_driver(RunConfig(placement=PlacementConfig(run_dir="/proc/none/run")))
    *_, last = follow(driver, poll_s=0.1)
    end_driver("/proc/none/run")
    assert (last["state"], str(last["error"]).count("\n")) == ("failed", 0)
    assert str(last["error"]).startswith("/proc/none")
    assert exit_code(last["error"]) == 2


@pytest.mark.timeout(120)
def test_the_end_of_one_driver_leaves_its_successor_alone(cluster, reference, tmp_path) -> None:
    run_dir = with_cached_stages(tmp_path / "run", reference)
    first = start_driver(config_of(run_dir))
    end_driver(str(run_dir), first)
    second = start_driver(config_of(run_dir))
    hold(second)
    end_driver(str(run_dir), first)
    assert ask(second)["state"] == "paused"
    end_driver(str(run_dir))
    assert find_driver(str(run_dir)) is None


@pytest.mark.timeout(400)
def test_a_run_is_stopped_by_a_command_that_outlives_its_driver_and_goes_on_by_another(
    cluster, reference, tmp_path, capsys
) -> None:
    """Ray starts the killed driver again, which stops where the last round was published."""
    run_dir = with_cached_stages(tmp_path / "run", reference)
    driver = start_driver(config_of(run_dir))
    wait_for((run_dir / "rounds" / "00001.json").exists)
    hold(driver)
    main(["stop", str(run_dir)])
    assert "stops after the round in hand" in " ".join(capsys.readouterr().out.split())
    os.kill(ray.get(driver.status.remote())["pid"], signal.SIGKILL)
    status = end_of(driver)
    assert (status["state"], len(status["summary"]["rounds"])) == ("stopped", 2)
    assert len(read_rounds(str(run_dir))) == 2
    end_driver(str(run_dir))
    for told in ("no driver is at work", "nothing was stopped"):
        with pytest.raises(SystemExit) as ended:
            main(["stop", str(run_dir)])
        assert ended.value.code == 1
        assert told in capsys.readouterr().err
    assert run_on_ray(config_of(run_dir), Console(quiet=True))["state"] == "finished"
    check_same_run(run_dir, reference)


def test_the_name_of_a_driver_depends_on_the_run_directory_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert driver_name("run") == driver_name(str(tmp_path / "run"))
    assert driver_name("run") != driver_name("other")
