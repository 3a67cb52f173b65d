"""Where the scalars of a run go: TensorBoard always, MLflow and Weights & Biases when they are installed.

A driver that is started again replays its rounds, so every tracker takes the same round twice without showing it
twice. Addresses and keys come from the environment of the node (MLFLOW_TRACKING_URI, WANDB_API_KEY): nothing
secret enters a configuration or a run folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from autoscale_ray.canonical import fingerprint

PROJECT = "autoscale"


@dataclass(frozen=True)
class Tracker:
    """One place that shows the scalars of a run."""

    write: Callable[[int, Mapping[str, float]], None]
    """Takes a round and its scalars by name."""
    close: Callable[[], None]


def open_tensorboard(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Return the event files in ``<run>/tensorboard``."""
    # Rounds are replayed from the first one: what an earlier process wrote is hidden, not doubled.
    writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=0)

    def write(index: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, index)
        writer.flush()

    return Tracker(write, writer.close)


def open_mlflow(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Return the MLflow run of a run folder, at MLFLOW_TRACKING_URI or in ``<run>/mlflow``."""
    mlflow = importlib.import_module("mlflow")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # one writer, one folder: no database is needed
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlflow").as_uri()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(PROJECT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
    mark = fingerprint(str(run_dir))
    found = client.search_runs([experiment_id], f"tags.run_dir_sha256 = '{mark}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, run_name=run_dir.name)
    run_id = run.info.run_id
    if not found:
        client.set_tag(run_id, "run_dir_sha256", mark)
        for name, value in config.items():
            client.log_param(run_id, name, value)
    seen = {point.step for point in client.get_metric_history(run_id, "round")} if found else set()

    def write(index: int, scalars: Mapping[str, float]) -> None:
        if index not in seen:
            for name, value in scalars.items():
                client.log_metric(run_id, name, value, step=index)
            seen.add(index)

    return Tracker(write, lambda: client.set_terminated(run_id))


def open_wandb(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Return the W&B run of a run folder; offline, in ``<run>/wandb``, where no key is set."""
    wandb = importlib.import_module("wandb")
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_dir.name,
        id=fingerprint(str(run_dir))[:16],
        resume="allow",
        dir=str(run_dir),
        config=dict(config),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
    )

    def write(index: int, scalars: Mapping[str, float]) -> None:
        if index >= run.step:
            run.log(dict(scalars), step=index)

    return Tracker(write, run.finish)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": open_tensorboard,
    "mlflow": open_mlflow,
    "wandb": open_wandb,
}
"""Trackers by the name of their package."""


def is_installed(name: str) -> bool:
    """Return whether the package of a tracker is there."""
    return importlib.util.find_spec(name) is not None
