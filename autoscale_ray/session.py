"""One run from its configuration to its report; `run_local` does all of it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow.csv import write_csv
from rich.console import Console

from autoscale_ray import loop, tasks_scores
from autoscale_ray.artifacts import RunStore, check_same_run
from autoscale_ray.config import RunConfig, identity
from autoscale_ray.config_file import dump_config
from autoscale_ray.errors import ArtifactError
from autoscale_ray.evaluation.from_pool import SCORER_VERSION
from autoscale_ray.files import in_one_step
from autoscale_ray.inputs import Inputs, open_inputs
from autoscale_ray.local import LocalStages
from autoscale_ray.mixture.clusters import ClusterModel
from autoscale_ray.planning.features import FEATURES_VERSION
from autoscale_ray.preflight import check_ready
from autoscale_ray.recorded import RecordedStages
from autoscale_ray.records import Clusters, Round, Selection
from autoscale_ray.reporting.summary import summarise
from autoscale_ray.reporting.tables import arm_table, cluster_table, round_table
from autoscale_ray.representation import ENCODER_VERSION
from autoscale_ray.run_folder import (
    CONFIG_FILE,
    REPORT_FILE,
    SELECTION_FILE,
    SUMMARY_FILE,
    check_free,
    where_things_are,
    work_dir,
)
from autoscale_ray.scenes.parquet import read_parquet
from autoscale_ray.scenes.pool import ScenePool


def run_local(config: RunConfig, console: Console) -> dict[str, Any]:
    """Run the loop and the final comparison here, or go on where an earlier start of the same run stopped.

    Args:
        config: The run; everything is written below ``config.placement.run_dir``.
        console: Receives progress and tables.

    Returns:
        The summary of the run.

    Raises:
        AutoScaleError: One clear line: bad configuration, pools or state.
    """
    stages = _open_local(config, console)

    def show(summary: Mapping[str, Any]) -> None:
        console.print(round_table(summary, len(summary["rounds"]) - 1))

    finished = play(stages, show)
    console.print(arm_table(finished))
    console.print(f"finished: {where_things_are(config)}", soft_wrap=True)
    return finished


def embed_local(config: RunConfig, console: Console, plot: bool = False) -> Clusters:
    """Embed and cluster the pools of a run; the loop can go on from there.

    Returns:
        The clusters.
    """
    from autoscale_ray.reporting.embedding_map import write_embedding_map, write_retrieval_sheet

    stages = _open_local(config, console)
    clusters = stages.cluster(stages.embed())
    console.print(cluster_table(clusters))
    if plot:
        folder, pools = work_dir(config) / "plots", stages.inputs.pools
        whiten = _whitening(clusters)
        console.print(f"drawn: {write_embedding_map(clusters, whiten, pools, folder / 'embedding_map.png')}")
        console.print(
            f"drawn: {write_retrieval_sheet(clusters, whiten, pools, folder / 'retrieval_sheet.png')}"
        )
    return clusters


def _whitening(clusters: Clusters) -> Callable[[np.ndarray], np.ndarray]:
    return ClusterModel.load(clusters.files["model"]).whitening.apply


def _open_local(config: RunConfig, console: Console) -> LocalStages:
    check_ready(config)
    torch.set_num_threads(config.placement.num_threads)
    with console.status("opening scene pools (the built-in world draws them on the first run)"):
        inputs, store = open_run(config)
    return LocalStages(config, inputs, store, watch=console.status)


def open_run(config: RunConfig) -> tuple[Inputs, RunStore]:
    """Open the pools of a run and claim its folder; write the configuration beside it."""
    versions = {"encoder": ENCODER_VERSION, "features": FEATURES_VERSION, "scorer": SCORER_VERSION}
    folder, marks = work_dir(config), {"config": identity(config), "versions": versions}
    check_same_run(config.placement.run_dir, marks)  # told now, not after pools were drawn
    check_free(config.placement.run_dir)
    inputs = open_inputs(config, folder / "pools")
    store = RunStore.open(config.placement.run_dir, {**marks, "pools": inputs.identity()})
    folder.mkdir(parents=True, exist_ok=True)
    with in_one_step(folder / CONFIG_FILE) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")
    return inputs, store


def play(stages: RecordedStages, show: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Run the loop and the final comparison; write summary, plots and report.

    Args:
        stages: The stages of the run.
        show: Called with the summary after every published round; may raise to stop the run there.

    Returns:
        The summary of the run.
    """
    from autoscale_ray.reporting.embedding_map import write_embedding_map

    config, inputs = stages.config, stages.inputs
    run_dir = work_dir(config)
    num_told = _num_rounds_told(run_dir / SUMMARY_FILE)
    seconds: list[dict[str, float]] = []

    def summary(clusters: Clusters, history: Sequence[Round], **more: Any) -> dict[str, Any]:
        seconds.append(dict(stages.seconds))
        num_real = len(inputs.pools["real"])
        made = summarise(config, clusters, history, seconds=seconds, num_real=num_real, **more)
        if more or len(history) > num_told:  # a replay that is cut off leaves what was told before
            write_summary(made, run_dir)
        return made

    stages.observe = lambda clusters, history: show(summary(clusters, history))
    try:
        clusters, history, final_counts = loop.run(config, stages)
        stages.is_searching = False
        arms = loop.compare(config, stages, clusters, history, final_counts)
    finally:
        stages.work.close()
    gains = tasks_scores.paired_gains(arms, inputs.pools["test"])
    finished = summary(clusters, history, final_counts=final_counts, arms=arms, gains=gains)
    write_selection(arms[-1].selection, inputs.pools["synthetic"], run_dir / SELECTION_FILE)
    write_embedding_map(clusters, _whitening(clusters), inputs.pools, run_dir / "plots" / "embedding_map.png")
    render(run_dir)
    return finished


def write_selection(selection: Selection, pool: ScenePool, path: Path) -> None:
    """Write the chosen synthetic scenes as CSV in one step: scene_id, cluster, log_id, origin_id, source."""
    chosen = read_parquet(selection.file)
    rows = pool.rows_of(chosen["scene_id"].to_pylist())
    for name in ("log_id", "origin_id", "source"):
        chosen = chosen.append_column(name, pa.array(pool.column(name)[rows].tolist(), pa.string()))
    # Through an open file: an error of Arrow by itself does not name the file.
    with in_one_step(path) as temporary, temporary.open("wb") as file:
        write_csv(chosen, file)


def write_summary(summary: Mapping[str, Any], run_dir: Path) -> None:
    """Write the summary beside the run in one step."""
    with in_one_step(run_dir / SUMMARY_FILE) as temporary:
        temporary.write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")


def _num_rounds_told(path: Path) -> int:
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["rounds"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0  # none there, or a damaged one, which is written anew


def render(run_dir: Path) -> Path:
    """Draw plots and report of a run, finished or not, from its summary.

    Returns:
        The report.

    Raises:
        ArtifactError: No summary there, or it is damaged.
    """
    # Imported here: matplotlib and the report cost a second in processes that only run the loop.
    from jinja2 import TemplateError

    from autoscale_ray.reporting.html import write_report
    from autoscale_ray.reporting.plots import write_plots

    path = run_dir / SUMMARY_FILE
    pictures = [("Embedding map", run_dir / "plots" / "embedding_map.png")]
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        write_plots(summary, run_dir / "plots")
        return write_report(summary, run_dir / REPORT_FILE, pictures)
    except FileNotFoundError as error:
        raise ArtifactError(str(path), "no run with a finished round here") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, TemplateError) as error:
        raise ArtifactError(str(path), f"is damaged: {type(error).__name__} {error}") from error
