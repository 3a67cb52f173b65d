"""What a driver shows of its run while it goes on: Ray metrics for Prometheus, scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

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


class Observer:
    """Keeps the metrics of one run alive and writes its scalars.

    Args:
        run: Name of the run, the tag of every metric.
        folder: Receives the TensorBoard files.
    """

    def __init__(self, run: str, folder: Path) -> None:
        self._run = run
        self._gauges = {name: Gauge(name, text, tag_keys=tags) for name, (text, tags) in GAUGES.items()}
        self._writer = SummaryWriter(log_dir=str(folder))

    def show(self, summary: Mapping[str, Any]) -> None:
        """Show the last round of a summary."""
        index = summary["rounds"][-1]["index"]
        for name, tags, value in samples(summary):
            self._gauges[name].set(value, tags={"run": self._run, **tags})
            self._writer.add_scalar("/".join([name.removeprefix("autoscale_"), *tags.values()]), value, index)
        self._writer.flush()
