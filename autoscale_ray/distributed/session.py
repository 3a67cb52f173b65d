"""One run on Ray from its configuration to its end, seen from the process that asked for it."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from autoscale_ray.config import RunConfig
from autoscale_ray.distributed.driver import StoppedError, follow, is_at_work, leave_driver, start_driver
from autoscale_ray.distributed.resources import connect, wait_for_room
from autoscale_ray.preflight import check_ready
from autoscale_ray.records import Clusters
from autoscale_ray.reporting.tables import arm_table, round_table
from autoscale_ray.run_folder import is_url, where_things_are


def run_on_ray(config: RunConfig, console: Console) -> dict[str, Any]:
    """Run the loop and the final comparison on a Ray cluster, or join the driver that is at it already.

    SIGTERM and Ctrl-C let the round in hand finish; a later start goes on after it.

    Args:
        config: The run; everything is written below ``config.placement.run_dir``.
        console: Receives progress and tables.

    Returns:
        The last status of the driver: state, summary, stage.

    Raises:
        AutoScaleError: One clear line: bad configuration, pools or state, or too small a cluster.
    """
    config = with_absolute_paths(config)
    status = drive(config, console)
    if status["state"] == "finished":
        console.print(arm_table(status["summary"]))
    console.print(f"{status['state']}: {where_things_are(config)}", soft_wrap=True)
    return status


def embed_on_ray(config: RunConfig, console: Console) -> Clusters:
    """Train the encoder, embed and cluster the pools of a run on a Ray cluster; the loop can go on from there.

    Raises:
        StoppedError: It was asked to stop before its end.
        AutoScaleError: As `run_on_ray`.
    """
    status = drive(with_absolute_paths(config), console, embed_only=True)
    if status["state"] == "stopped":
        raise StoppedError("stopped when asked; the same command goes on")
    clusters: Clusters = status["clusters"]
    return clusters


def drive(config: RunConfig, console: Console, embed_only: bool = False) -> dict[str, Any]:
    """Start the driver of a run with absolute paths, or join it, and follow it to its end; return its last status."""
    check_ready(config)
    run_dir = config.placement.run_dir
    with console.status("reaching the cluster, or starting one on this machine"):
        connect(config.placement.ray)
        if not is_at_work(run_dir):
            wait_for_room(config.placement.ray)
        driver = start_driver(config, embed_only=embed_only)
    status = follow_to_the_end(driver, console)
    leave_driver(run_dir, driver)
    if status["state"] == "failed":
        raise status["error"]
    return status


def follow_to_the_end(driver: Any, console: Console) -> dict[str, Any]:
    """Show what a driver does until its run has ended; return its last status."""
    shown = -1
    status: dict[str, Any] = {}
    with stop_on_signal(driver, console), console.status("starting the driver") as line:
        for status in follow(driver):
            line.update(status["stage"])
            shown = show_rounds(status["summary"], shown, console)
    return status


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the same run with absolute folders: workers have other working directories."""
    paths = {
        name: str(Path(path).absolute()) for name, path in dataclasses.asdict(config.data).items() if path
    }
    run_dir = config.placement.run_dir
    if not is_url(run_dir):
        run_dir = str(Path(run_dir).absolute())
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **paths),
        placement=dataclasses.replace(config.placement, run_dir=run_dir),
    )


def show_rounds(summary: dict[str, Any] | None, shown: int, console: Console) -> int:
    """Print the tables of rounds that have not been shown; return the last one shown."""
    if summary is None:
        return shown
    last = len(summary["rounds"]) - 1
    for index in range(shown + 1, last + 1):
        console.print(round_table(summary, index))
    return last


@contextmanager
def stop_on_signal(driver: Any, console: Console) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into a stop after the round in hand."""

    def stop(number: int, frame: object) -> None:
        console.print(
            f"{signal.Signals(number).name}: what is in hand, a round or a stage, is finished first"
        )
        driver.stop.remote()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
