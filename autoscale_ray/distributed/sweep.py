"""Sweeps: one trial is one whole loop; embeddings and clusters are computed once for all of them.

A trial holds one `trial_slot` and no CPU: its driver, trainers and scorers take theirs inside. The number of slots a
cluster declares is therefore the number of loops at a time, and nested runs cannot starve one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune
import yaml
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console

from autoscale_ray.artifacts import RunStore, fingerprint, share_stages
from autoscale_ray.config import RunConfig, identity, load_config
from autoscale_ray.distributed.board import TaskBoard
from autoscale_ray.distributed.driver import end_driver, follow, start_driver
from autoscale_ray.distributed.resources import ResourcesError, connect, wait_for_room
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.distributed.stages import RayStages
from autoscale_ray.distributed.sweep_report import write_sweep
from autoscale_ray.errors import ConfigError
from autoscale_ray.inputs import open_inputs

PREFIX = "sweep."
SLOT = "trial_slot"


def sweep(arguments: Sequence[str], console: Console) -> Path:
    """Run one loop for every combination of the swept fields, or go on where an earlier start was killed.

    Args:
        arguments: ``[run.yaml] [section.field=value ...] sweep.section.field=v1,v2,...``.
        console: Receives progress.

    Returns:
        Folder with ``sweep.csv``, ``sweep.png`` and one run directory for each trial.

    Raises:
        AutoScaleError: Bad arguments, or a cluster that cannot hold one trial.
    """
    space, rest = read_space(arguments)
    config = config_of(rest)
    folder = Path(config.placement.run_dir)
    connect(config.placement.ray)
    wait_for_room(config.placement.ray)
    if ray.cluster_resources().get(SLOT, 0) < 1:
        raise ResourcesError(
            f"a sweep needs the resource {SLOT} on the head: ray start --resources='{{\"{SLOT}\": 2}}'"
        )
    with console.status("embedding and clustering once for all trials"):
        shared = prepare_shared(config)
    tuner = make_tuner(rest, space, shared, folder, config.loop.num_rounds + 1)
    with console.status("running trials"):
        results = tuner.fit()
    rows = [row_of(result, space) for result in results]
    write_sweep(rows, list(space), folder)
    return folder


def read_space(arguments: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Split the swept fields from the other arguments.

    Raises:
        ConfigError: No field is swept, or one has no values.
    """
    swept = [item.removeprefix(PREFIX).partition("=") for item in arguments if item.startswith(PREFIX)]
    space = {
        field: [yaml.safe_load(value) for value in values.split(",") if value] for field, _, values in swept
    }
    if not space:
        raise ConfigError("sweep", f"name at least one field, for example {PREFIX}loop.budget=350,700")
    for field, values in space.items():
        if not values:
            raise ConfigError(f"{PREFIX}{field}", "needs at least one value")
    return space, [item for item in arguments if not item.startswith(PREFIX)]


def config_of(arguments: Sequence[str], **more: Any) -> RunConfig:
    """Return the configuration of ``[run.yaml] [section.field=value ...]`` with absolute paths."""
    files = [item for item in arguments if "=" not in item]
    overrides = [item for item in arguments if "=" in item] + [
        f"{key}={value}" for key, value in more.items()
    ]
    return with_absolute_paths(load_config(files[0] if files else None, overrides))


def prepare_shared(config: RunConfig) -> Path:
    """Embed and cluster the pools in a run of their own; trials take the finished stages from there."""
    shared = Path(config.placement.run_dir) / "shared"
    inputs = open_inputs(config, shared / "pools")
    store = RunStore.open(str(shared), {"config": identity(config), "pools": inputs.identity()})
    stages = RayStages(config, inputs, store, TaskBoard())
    stages.cluster(stages.embed())
    return shared


def make_tuner(
    arguments: Sequence[str], space: Mapping[str, list[Any]], shared: Path, folder: Path, num_reports: int
) -> ray.tune.Tuner:
    """Return the tuner of a sweep; one that was killed is restored, its trials go on in their run directories."""
    trainable = ray.tune.with_resources(run_trial, {SLOT: 1})
    path = folder / "tune"
    fixed = {"arguments": list(arguments), "shared": str(shared), "folder": str(folder)}
    param_space = {"fixed": fixed, **{field: ray.tune.grid_search(values) for field, values in space.items()}}
    if ray.tune.Tuner.can_restore(str(path)):
        return ray.tune.Tuner.restore(str(path), trainable, resume_unfinished=True, resume_errored=True)
    return ray.tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=ray.tune.TuneConfig(
            metric="objective",
            mode="max",
            scheduler=ASHAScheduler(max_t=num_reports, grace_period=min(2, num_reports), reduction_factor=2),
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )


def run_trial(params: dict[str, Any]) -> None:
    """Run one loop and report every round; the driver belongs to the trial and ends with it."""
    fixed = params["fixed"]
    swept = {field: value for field, value in params.items() if field != "fixed"}
    run_dir = Path(fixed["folder"]) / "trials" / trial_name(swept)
    config = config_of(fixed["arguments"], **swept, **{"placement.run_dir": run_dir})
    share_stages(Path(fixed["shared"]), run_dir)
    if not (run_dir / "pools").exists():
        (run_dir / "pools").symlink_to(Path(fixed["shared"]) / "pools")
    driver = start_driver(config, lifetime=None)
    reported = 0
    for status in follow(driver):
        rounds = (status["summary"] or {}).get("rounds", [])
        for done in rounds[reported:]:
            report_round(done, run_dir)
        reported = len(rounds)
    end_driver(config.placement.run_dir)
    if status["error"]:
        raise status["error"]


def report_round(done: Mapping[str, Any], run_dir: Path) -> None:
    """Report one round to Tune."""
    ray.tune.report(
        {
            "objective": done["totals"]["objective"],
            "se": done["total_se"],
            "round": done["index"],
            "num_scenes": done["num_scenes"],
            "run_dir": str(run_dir),
        }
    )


def trial_name(swept: Mapping[str, Any]) -> str:
    """Return a folder name that depends on the swept values alone, so that a restored trial finds its run."""
    words = "-".join(f"{field.rpartition('.')[2]}={value}" for field, value in sorted(swept.items()))
    return f"{''.join(c if c.isalnum() or c in '-=._' else '_' for c in words)[:80]}-{fingerprint(swept)[:8]}"


def row_of(result: Any, space: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return one line of the result table."""
    metrics = result.metrics or {}
    values = {name: metrics.get(name) for name in ("objective", "se", "round", "num_scenes", "run_dir")}
    return {**{field: result.config[field] for field in space}, **values, "error": str(result.error or "")}
