"""Where a run keeps what people read, told from its configuration alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.files import cache_folder

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
SELECTION_FILE = "selection.csv"
STOP_FILE = "stop"
"""There while a run on Ray is to stop after the round in hand."""


def work_dir(config: RunConfig) -> Path:
    """Return the local folder of a run; see `local_folder`."""
    return local_folder(config.placement.run_dir)


def local_folder(run_dir: str) -> Path:
    """Return the local folder for what no resumed run reads: summary, plots, checkpoints, built-in pools.

    It is the run folder, or a folder of this machine's cache for a run in a bucket.
    """
    return cache_folder() / "runs" / fingerprint(one_name(run_dir))[:16] if is_url(run_dir) else Path(run_dir)


def one_name(run_dir: str) -> str:
    """Return the one name of a run's folder: a URL without slashes at its end, or an absolute path."""
    return run_dir.rstrip("/") if is_url(run_dir) else os.path.abspath(run_dir)


def is_url(run_dir: str) -> bool:
    """Return whether a run lies in a bucket."""
    return "://" in run_dir


def check_free(run_dir: str) -> None:
    """Refuse a folder that holds no run but files whose names a run would write, or a pool.

    Raises:
        ConfigError: Names the first such file.
    """
    folder = Path(run_dir)
    if is_url(run_dir) or (folder / "run.json").exists() or (folder / "journal").exists():
        return
    for name in (CONFIG_FILE, SUMMARY_FILE, REPORT_FILE, SELECTION_FILE, "manifest.json"):
        if (folder / name).exists():
            rule = "is of no run and would be overwritten: take another run folder"
            raise ConfigError(str(folder / name), rule)


def check_local(arguments: Sequence[str]) -> None:
    """Refuse URLs among the arguments of a command that knows local paths only: as a path one is a folder ``s3:``.

    Raises:
        ConfigError: One of the arguments is a URL.
    """
    for argument in arguments:
        if is_url(argument):
            raise ConfigError(argument, "must be a local path: only a run folder may lie in a bucket")


def where_things_are(config: RunConfig) -> str:
    """Say where a finished run has left what people read."""
    folder = work_dir(config)
    named = {
        "chosen scenes": folder / SELECTION_FILE,
        "report": folder / REPORT_FILE,
        "plots": folder / "plots",
    }
    shown = [f"{name} {path}" for name, path in named.items() if path.exists()]
    return ", ".join([*shown, f"rounds {config.placement.run_dir}/rounds"])
