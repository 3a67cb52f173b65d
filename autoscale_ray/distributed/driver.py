"""The driver: a detached, named actor without CPU that owns a run's loop, its Train run and its state.

State is on storage before it is returned, so the actor may die at any moment: Ray starts it again with the same
arguments, its loop thread opens the run anew, and every finished stage and round is found there.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayActorError

from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig, identity
from autoscale_ray.distributed.board import AnyTask, TaskBoard
from autoscale_ray.distributed.causes import own_error
from autoscale_ray.distributed.resources import NAMESPACE, set_environment, train_environment
from autoscale_ray.errors import AutoScaleError, ConfigError
from autoscale_ray.run_folder import STOP_FILE, one_name, work_dir

HEAD = "node:__internal_head__"
"""What Ray lets the head of a cluster offer; asking for a little of it leads there, softly wanted affinity does not."""
LEAST = 0.0001
"""The least amount of a resource that can be asked for; there is 1 of it."""
ENDED = ("finished", "stopped", "failed")
MAX_RESTARTS = 100
"""Times Ray starts a driver again; one that is killed by what it does itself must come to an end."""
LINGER_S = 600.0
"""How long a driver whose run has ended waits for somebody to ask how; the run's folder tells it afterwards."""
LEAVE_S = 2.0
"""The same once somebody who followed the run to its end has left: all others who follow it ask more often."""
LEAVE_TIMEOUT_S = 20.0
"""How long whoever leaves waits for the end of the driver before ending it."""


class StoppedError(AutoScaleError):
    """The run was asked to stop after a round; it can go on later."""


class RunFailedError(AutoScaleError, RuntimeError):
    """A run ended with an error that was not the user's."""


class Driver:
    """Runs one loop; every method may be called any number of times.

    Args:
        config: The run, with absolute paths.
        name: Name of this actor, by which trainers find it.
        embed_only: End with the clusters, before the first round.
        linger_s: How long it stays after the end of its run without being asked.
    """

    def __init__(
        self, config: RunConfig, name: str, embed_only: bool = False, linger_s: float = LINGER_S
    ) -> None:
        # Read when the Train run is made; a job's own environment does not come this far.
        set_environment(train_environment(config.placement.ray))
        self._config, self._name, self._embed_only = config, name, embed_only
        self._linger_s, self._asked_s = linger_s, time.monotonic()
        self._board = TaskBoard()
        self._go_on = threading.Event()
        self._go_on.set()
        self._stop, self._stop_file = False, work_dir(config) / STOP_FILE
        self._is_restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._status: dict[str, Any] = {
            "state": "running",
            "stage": "opening",
            "summary": None,
            "clusters": None,
            "error": None,
        }
        threading.Thread(target=self._run, name="loop", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """Return how the run is: state (running, paused, finished, stopped, failed), stage, error, what it has made.

        Beside a loop's summary that is, where only embeddings were wanted, the clusters: whoever asked for them would
        have to claim the run to read them, and might supersede a driver that has begun to go on with it.
        """
        self._asked_s = time.monotonic()
        about = {"pid": os.getpid(), "mark": mark_of(self._config), "embed_only": self._embed_only}
        return {**self._status, **about, "hand_over_s": list(self._board.hand_over_s)}

    def pause(self) -> None:
        """Hold the loop before its next stage."""
        self._go_on.clear()

    def resume(self) -> None:
        """Let a paused loop go on; a stop that was asked for and has not come is taken back."""
        self._keep_wish(stop=False)
        self._go_on.set()

    def stop(self) -> None:
        """End the loop once the current round is published."""
        self._keep_wish(stop=True)
        self._go_on.set()

    def leave(self) -> None:
        """Wait for others only shortly once the run has ended: whoever calls this knows how it did."""
        self._linger_s = min(self._linger_s, LEAVE_S)

    def fetch_task(self, last: str | None, wait_s: float) -> AnyTask | str:
        """Return the open training task, ``wait`` or ``end``; see `TaskBoard.fetch`."""
        return self._board.fetch(last, wait_s)

    def deliver_task(self, task_id: str, files: Mapping[str, bytes]) -> None:
        """Take the files of a trained planner; see `TaskBoard.deliver`."""
        self._board.deliver(task_id, files)

    def report_failure(self, task_id: str, rank: int, text: str, own: AutoScaleError | None = None) -> None:
        """Take a worker's error; see `TaskBoard.report_failure`."""
        self._board.report_failure(task_id, rank, text, own)

    def _keep_wish(self, *, stop: bool) -> None:
        """Remember whether to stop, in a file as well: Ray may start this actor again."""
        self._stop = stop
        with suppress(OSError):  # then it is kept by this process alone
            if stop:
                self._stop_file.parent.mkdir(parents=True, exist_ok=True)
                self._stop_file.touch()
            else:
                self._stop_file.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            self._status |= {**self._play(), "state": "finished"}
        except StoppedError:
            self._status["state"] = "stopped"
        except BaseException as error:  # the end of a thread: whoever asks for the status raises it
            told = own_error(error) or RunFailedError(traceback.format_exc())
            self._status |= {"state": "failed", "error": told}
        finally:
            self._board.close()
        self._asked_s = time.monotonic()
        while time.monotonic() - self._asked_s < self._linger_s:
            time.sleep(0.2)  # whoever asks meanwhile puts it off, and whoever leaves brings it nearer
        ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))  # nobody is left who would

    def _play(self) -> dict[str, Any]:
        # Imported here: whoever only follows a driver can do without torch and Ray Train.
        from autoscale_ray.distributed.driven import play_here

        self._keep_wish(stop=self._stop or (self._is_restarted and self._stop_file.exists()))
        return play_here(
            self._config, self._name, self._board, self._watch, self._show, embed_only=self._embed_only
        )

    def _show(self, summary: Mapping[str, Any], is_newest: bool) -> None:
        self._status["summary"] = summary
        if self._stop and is_newest and len(summary["rounds"]) <= self._config.loop.num_rounds:
            raise StoppedError(f"stopped after round {len(summary['rounds']) - 1}")

    @contextmanager
    def _watch(self, stage: str) -> Iterator[None]:
        outer, self._status["stage"] = self._status["stage"], stage
        if not self._go_on.is_set():
            self._status["state"] = "paused"
            self._go_on.wait()
            self._status["state"] = "running"
        if self._stop and self._embed_only:  # a loop ends after its round instead
            raise StoppedError(f"stopped before {stage}")
        yield
        self._status["stage"] = outer


def mark_of(config: RunConfig) -> str:
    """Return what tells one run from another in the same folder: nobody may join a driver that runs something else."""
    return fingerprint([identity(config), asdict(config.data), asdict(config.loop)])


def driver_name(run_dir: str) -> str:
    """Return the actor name of a run: one run directory, one driver on a cluster."""
    return f"driver-{fingerprint(one_name(run_dir))[:16]}"


def start_driver(
    config: RunConfig, lifetime: str | None = "detached", embed_only: bool = False, **more: Any
) -> Any:
    """Start the driver of a run, or find the one that is running it already.

    Args:
        config: The run, with absolute paths.
        lifetime: ``detached`` outlives whoever starts it; None ends with them.
        embed_only: End with the clusters, before the first round.
        more: Further arguments of `Driver`.

    Raises:
        ConfigError: A driver is running another configuration in the same folder, or the whole loop where only
            embeddings are wanted.
    """
    run_dir = config.placement.run_dir
    name = driver_name(run_dir)
    while (found := find_driver(run_dir)) is not None:
        try:
            _join_or_end(config, found, embed_only)
            break
        except RayActorError:  # it went between being found and answering
            _is_gone(run_dir, found, LEAVE_TIMEOUT_S)
    return (
        ray.remote(Driver)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime=lifetime,
            get_if_exists=True,
            num_cpus=0,
            # By itself Ray puts an actor without CPU on any node. The head is the one that is not taken away, and
            # the one whose memory is meant for drivers, those of trials as well.
            resources={HEAD: LEAST} if HEAD in ray.cluster_resources() else None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,
            max_concurrency=16,
            scheduling_strategy="DEFAULT",  # a trial's placement group has no CPUs
        )
        .remote(config, name, embed_only, **more)
    )


def _join_or_end(config: RunConfig, found: Any, embed_only: bool) -> None:
    """Let a driver go on that runs what is wanted; end one whose run has ended, or that made what is wanted first."""
    run_dir = config.placement.run_dir
    status = status_of(found)
    if status["state"] not in ENDED:
        if status["mark"] != mark_of(config):
            raise ConfigError(run_dir, "a driver is running another configuration in this folder")
        if embed_only and not status["embed_only"]:
            raise ConfigError(run_dir, "a driver is running the whole loop in this folder")
    if status["embed_only"] and not embed_only:
        with suppress(RunFailedError, RayActorError):  # who else waits for it may end it first
            ray.get(found.resume.remote())
            deque(follow(found), maxlen=0)
        end_driver(run_dir, found)
    elif status["state"] == "running":  # its last client may have been told to stop
        ray.get(found.resume.remote())
        status = status_of(found)
    if status["state"] in ENDED:
        end_driver(run_dir, found)


def is_at_work(run_dir: str) -> bool:
    """Tell whether a run has a driver that has not ended it yet, so that it holds its place on the cluster."""
    found = find_driver(run_dir)
    try:
        return found is not None and status_of(found)["state"] not in ENDED
    except RayActorError:
        return False


def find_driver(run_dir: str) -> Any | None:
    """Return the driver of a run, or None where none is running."""
    try:
        return ray.get_actor(driver_name(run_dir), namespace=NAMESPACE)
    except ValueError:
        return None


def end_driver(run_dir: str, driver: Any = None) -> None:
    """End the driver of a run with all that it started, and wait until it is gone.

    Args:
        run_dir: Folder of the run.
        driver: The one to end, whoever else has started another since; None ends the one that is found.
    """
    driver = driver or find_driver(run_dir)
    if driver is not None:
        ray.kill(driver)
        _is_gone(run_dir, driver)


def leave_driver(run_dir: str, driver: Any) -> None:
    """Let a driver whose run has ended tell all others who follow it how, then end it; wait until it is gone.

    Args:
        run_dir: Folder of the run.
        driver: One that was followed to the end of its run.
    """
    driver.leave.remote()
    if not _is_gone(run_dir, driver, LEAVE_TIMEOUT_S):
        end_driver(run_dir, driver)


def _is_gone(run_dir: str, driver: Any, patience_s: float = math.inf) -> bool:
    """Wait until a driver has ended; return whether it did in time."""
    latest = time.monotonic() + patience_s
    while (found := find_driver(run_dir)) is not None and found._actor_id == driver._actor_id:
        if time.monotonic() > latest:
            return False
        # Ray says of no actor that it has ended, so nothing can be waited for: its name is asked for.
        time.sleep(0.05)
    return True


def status_of(driver: Any) -> dict[str, Any]:
    """Ask a driver how its run is."""
    status: Any = ray.get(driver.status.remote())
    return status


def follow(driver: Any, poll_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """Yield the status of a driver again and again until the run has ended; the last one says how.

    Raises:
        RunFailedError: The driver is gone.
    """
    while True:
        try:
            status = status_of(driver)
        except RayActorError as error:
            raise RunFailedError("the driver was ended from elsewhere; the same command goes on") from error
        yield status
        if status["state"] in ENDED:
            return
        time.sleep(poll_s)
