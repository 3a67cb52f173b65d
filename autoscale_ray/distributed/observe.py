"""What a driver shows of its run while it goes on: Ray metrics for Prometheus, scalars for trackers, a JSON log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from autoscale_ray.distributed.trackers import TRACKERS, Tracker, is_installed

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "autoscale_round": ("Last published round", ("run",)),
    "autoscale_objective": ("Dev objective of the last round, in [0, 1]", ("run",)),
    "autoscale_scenes": ("Synthetic scenes of the last round", ("run",)),
    "autoscale_cluster_weight": ("Share of a cluster in the last mixture", ("run", "cluster")),
    "autoscale_cluster_score": ("Dev score of a cluster in the last round, in [0, 1]", ("run", "cluster")),
    "autoscale_stage_seconds": ("Wall seconds spent in a stage so far", ("run", "stage")),
    "autoscale_scenes_per_second": (
        "Scenes a stage went through per second, over the run so far",
        ("run", "stage"),
    ),
}
"""Metrics by name: description and tags. Ray exports them as ``ray_<name>``."""


def samples(summary: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield (metric, tags without run, value) of a summary; missing values are left out, never shown as 0."""
    done, seconds = summary["rounds"][-1], summary["spent"]["seconds"]
    found: list[tuple[str, dict[str, str], float | None]] = [
        ("autoscale_round", {}, done["index"]),
        ("autoscale_objective", {}, done["totals"]["objective"]),
        ("autoscale_scenes", {}, done["num_scenes"]),
    ]
    found += [
        ("autoscale_cluster_weight", {"cluster": name}, value) for name, value in done["weights"].items()
    ]
    found += [
        ("autoscale_cluster_score", {"cluster": name}, value)
        for name, value in done["cluster_scores"].items()
    ]
    found += [("autoscale_stage_seconds", {"stage": name}, value) for name, value in seconds.items()]
    found += [
        ("autoscale_scenes_per_second", {"stage": name}, value) for name, value in rates(summary).items()
    ]
    for name, tags, value in found:
        if value is not None:
            yield name, tags, float(value)


def rates(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return scenes per second of training (steps x batch) and dev scoring, averaged over the run so far."""
    seconds, runs = summary["spent"]["seconds"], summary["spent"]["search_runs"]
    seen = {
        "train": runs * summary["steps"] * summary["batch_size"],
        "evaluate_dev": runs * sum(cluster["dev"] for cluster in summary["clusters"]),
    }
    return {stage: count / seconds[stage] for stage, count in seen.items() if seconds.get(stage)}


CLOSE_TIMEOUT_S = 60.0
"""How long the end of a run waits for trackers; a server that hangs must not hold it."""


class Observer:
    """Keeps the metrics of one run alive, writes its scalars and logs its stages.

    Trackers work in a thread of their own, so that a slow server holds up no round; one that fails is named in
    the log and left out from then on.

    Args:
        run: Name of the run, the tag of every metric.
        run_dir: Folder of the run.
        log: Appends one event with fields to the log of the run (`RunStore.log`).
        settings: Values that tell runs apart, shown by trackers that can.
    """

    def __init__(
        self,
        run: str,
        run_dir: Path,
        log: Callable[..., None] = lambda event, **fields: None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._run, self._run_dir, self._log, self._settings = run, run_dir, log, settings or {}
        self._round = 0
        self._gauges = {name: Gauge(name, text, tag_keys=tags) for name, (text, tags) in GAUGES.items()}
        self._trackers: dict[str, Tracker] | None = None
        self._late: list[tuple[str, dict[str, str]]] = []
        """Events of other threads; the log of a run is written by one."""
        self._thread = ThreadPoolExecutor(1, "trackers")
        log("driver_started", run=run, pid=os.getpid(), **where_ray_is())

    @contextmanager
    def watch(self, stage: str, in_round: bool = True) -> Iterator[None]:
        """Log the start and the end of a stage, of the round in hand or, after the rounds, of none."""
        fields = {"run": self._run, "round": self._round if in_round else None, "stage": stage}
        started_s = time.perf_counter()
        self._log("stage_started", **fields)
        yield
        self._log("stage_ended", **fields, seconds=round(time.perf_counter() - started_s, 3))

    def show(self, summary: Mapping[str, Any]) -> None:
        """Show the last round of a summary."""
        done = summary["rounds"][-1]
        scalars = {}
        for name, tags, value in samples(summary):
            self._gauges[name].set(value, tags={"run": self._run, **tags})
            scalars["/".join([name.removeprefix("autoscale_"), *tags.values()])] = value
        self._round = done["index"] + 1
        self._thread.submit(self._track, done["index"], scalars)
        fields = {"objective": done["totals"]["objective"], "num_scenes": done["num_scenes"]}
        self._log("round_published", run=self._run, round=done["index"], **fields)
        self._log_late()

    def tell(self, event: str, **fields: str) -> None:
        """Log an event of another thread, after the next round or at the end."""
        self._late.append((event, fields))

    def close(self, state: str, reason: str | None = None) -> None:
        """Wait a while until everything is shown, end the trackers and say how the run ended.

        Args:
            state: How the run ended, for the log.
            reason: Why it failed.
        """
        try:
            self._thread.submit(self._close_trackers).result(CLOSE_TIMEOUT_S)
        except TimeoutError:
            self.tell("tracker_failed", tracker="trackers", reason=f"did not end in {CLOSE_TIMEOUT_S:g} s")
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._log_late()
        self._log("driver_ended", run=self._run, state=state, **({"reason": reason} if reason else {}))

    def _track(self, index: int, scalars: Mapping[str, float]) -> None:
        if self._trackers is None:
            self._trackers = {}
            for name in filter(is_installed, TRACKERS):
                self._guard(name, lambda name=name: self._open(name))
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.write(index, scalars))

    def _open(self, name: str) -> None:
        assert self._trackers is not None
        self._trackers[name] = TRACKERS[name](self._run_dir, self._settings)

    def _close_trackers(self) -> None:
        for name, tracker in list((self._trackers or {}).items()):
            self._guard(name, tracker.close)

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            # Trackers are other people's clients of other people's servers: what they raise has no common class, and
            # a display must not end a run of hours. It is named in the log of the run.
            self.tell("tracker_failed", tracker=name, reason=f"{type(error).__name__}: {error}")
            assert self._trackers is not None
            self._trackers.pop(name, None)

    def _log_late(self) -> None:
        while self._late:
            event, fields = self._late.pop(0)
            self._log(event, run=self._run, **fields)


def where_ray_is() -> dict[str, str]:
    """Return how a later process reaches this cluster."""
    address = ray.get_runtime_context().gcs_address
    return {"ray_address": address, "ray_auth_mode": os.environ.get("RAY_AUTH_MODE", "disabled")}
