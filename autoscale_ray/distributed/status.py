"""What there is to say about a run, from its folder alone; its driver is asked as well when one can be reached.

Ray is imported only to ask a driver, so that the state of a run can be read where there is no cluster.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoscale_ray.errors import AutoScaleError
from autoscale_ray.event_log import read_log
from autoscale_ray.journal import RoundRecord, open_storage, read_rounds
from autoscale_ray.run_folder import SUMMARY_FILE, local_folder

REACH_TIMEOUT_S = 2.0
"""How long the address of a cluster may take to answer."""
ANSWER_TIMEOUT_S = 30.0
"""How long a driver may take to answer; it may just be starting again."""


class UnreachableError(AutoScaleError, RuntimeError):
    """A cluster answers, but could not be joined or its driver did not answer."""


def status_lines(run_dir: str, now_s: float | None = None) -> list[str]:
    """Return the state of a run: published rounds, the last thing that happened, and its driver.

    Args:
        run_dir: Folder or URL of the run.
        now_s: Wall clock, s; None reads it.

    Raises:
        ArtifactError: No run there, or its state is damaged.
    """
    now_s = time.time() if now_s is None else now_s
    rounds, events = read_rounds(run_dir), read_events(run_dir)
    lines = [f"{run_dir}: {len(rounds)} rounds published", *(f"  {round_line(record)}" for record in rounds)]
    if events:
        lines.append(f"last event: {event_line(events[-1], now_s)}")
    if has_arms(local_folder(run_dir)):
        lines.append("the final comparison is done; autoscale report draws it again")
    return [*lines, driver_line(run_dir, events)]


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first."""
    return read_log(open_storage(str(run_dir)))


def round_line(record: RoundRecord) -> str:
    """Return one published round in words."""
    payload: Mapping[str, Any] = record.payload
    value, scenes = payload["totals"]["objective"], sum(payload["counts"].values())
    kind = f"{scenes} synthetic scenes" if scenes else "real scenes only"
    return f"round {record.index}: dev objective x100 {points(value)}, {kind}"


def event_line(event: Mapping[str, Any], now_s: float) -> str:
    """Return an event in words: what, of which stage and round, how long it took, how long ago."""
    words = [str(event["event"]).replace("_", " ")]
    stage, seconds = event.get("stage") or event.get("name"), event.get("seconds")
    words += [str(stage)] if stage else []
    words += [f"({event['state']})"] if event.get("state") else []
    words += [f"since {event['reason']}"] if event.get("reason") else []
    words += [f"of round {event['round']}"] if event.get("round") is not None else []
    words += [f"in {seconds:.1f} s"] if seconds is not None else []
    return f"{' '.join(words)}, {max(now_s - event['time_s'], 0):.0f} s ago"


def has_arms(run_dir: Path) -> bool:
    """Return whether the final comparison of a run is in its summary."""
    try:
        return bool(json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))["arms"])
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return False


def driver_line(run_dir: str, events: Sequence[Mapping[str, Any]]) -> str:
    """Return what the driver of a run is doing, or why nobody could be asked."""
    address = cluster_address(events)
    if address is None:
        return "driver: none known (set RAY_ADDRESS to look on a cluster)"
    if not answers(address):
        return f"driver: none, no cluster answers at {address}"
    authenticate(events)
    try:
        status = ask_driver(run_dir, address)
    except UnreachableError as error:
        return f"driver: unknown, the cluster at {address} was not joined: {error}"
    if status is None:
        return f"driver: none on the cluster at {address}"
    why = f": {' '.join(str(status['error']).split())}" if status.get("error") else ""
    return f"driver: {status['state']}, {status['stage']}, process {status['pid']}{why}"


def stop_run(run_dir: str) -> None:
    """Ask the driver of a run to stop after the round in hand.

    Raises:
        UnreachableError: No driver is running, or nobody could be asked.
        ArtifactError: No run there, or its state is damaged.
    """
    read_rounds(run_dir)
    events = read_events(run_dir)
    address = cluster_address(events)
    if address is None or not answers(address):
        raise UnreachableError(
            f"{run_dir}: no cluster answers at {address or 'RAY_ADDRESS'}; nothing was stopped"
        )
    authenticate(events)
    status = ask_driver(run_dir, address)
    if status is None or status["state"] not in ("running", "paused"):
        raise UnreachableError(
            f"{run_dir}: no driver is at work on the cluster at {address}; nothing was stopped"
        )
    ask_driver(run_dir, address, "stop")


def authenticate(events: Sequence[Mapping[str, Any]]) -> None:
    """Use the authentication of the cluster that a run was started on, where none is chosen."""
    for event in events:
        if event.get("ray_auth_mode"):
            os.environ.setdefault("RAY_AUTH_MODE", event["ray_auth_mode"])


def cluster_address(events: Sequence[Mapping[str, Any]]) -> str | None:
    """Return where to look for a driver: RAY_ADDRESS, or the cluster on which the last driver started."""
    started = [event["ray_address"] for event in events if event.get("ray_address")]
    return os.environ.get("RAY_ADDRESS") or (started[-1] if started else None)


def answers(address: str) -> bool:
    """Return whether something listens at ``[ray://]host:port``; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return True  # `auto` and the like: only Ray can tell
    try:
        with socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S):
            return True
    except OSError:
        return False


def ask_driver(run_dir: str, address: str, what: str = "status") -> Any:
    """Return what a method of a run's driver on a cluster answers, or None where there is no driver.

    Raises:
        UnreachableError: Ray could not join the cluster, for want of a token for example.
    """
    import ray
    from ray.exceptions import RayError

    from autoscale_ray.distributed.driver import find_driver
    from autoscale_ray.distributed.resources import NAMESPACE

    joined = not ray.is_initialized()
    try:
        if joined:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        driver = find_driver(run_dir)
        return None if driver is None else ray.get(getattr(driver, what).remote(), timeout=ANSWER_TIMEOUT_S)
    except (RayError, ConnectionError, RuntimeError) as error:
        raise UnreachableError(str(error).strip().partition("\n")[0]) from error
    finally:
        if joined:
            ray.shutdown()


def points(value: float | None) -> str:
    """Return a score in [0, 1] as x100, or say that it is missing."""
    return "missing" if value is None else f"{100 * value:.2f}"
