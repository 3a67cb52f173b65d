"""Sweeps: one trial is one whole loop; embeddings and clusters are computed once for all of them.

A trial holds one `trial_slot` and no CPU: its driver, trainers and scorers take theirs inside. No more trials run at
a time than slots and CPUs allow, so nested runs cannot starve one another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.searcher import Searcher
from rich.console import Console

from autoscale_ray.distributed.driver import StoppedError, end_driver, follow, start_driver
from autoscale_ray.distributed.resources import connect, set_environment, wait_for_room
from autoscale_ray.distributed.sweep_plan import (
    SLOT,
    Range,
    SweepPlan,
    needs_of_trial,
    read_plan,
    trials_at_once,
    with_swept,
)
from autoscale_ray.distributed.sweep_report import sweep_table, write_sweep
from autoscale_ray.distributed.trial import SCORE, TIME, run_trial, swept_of, trial_dir
from autoscale_ray.errors import ArtifactError, AutoScaleError
from autoscale_ray.journal import read_rounds

FIRST_STOP = 2
"""Rounds before a trial may stop: the first round is real-only, the same for all budgets."""
CTRL_C = {"TUNE_DISABLE_SIGINT_HANDLER": "1"}
"""Tune would catch Ctrl-C itself and tell of trials in hand that they have ended."""


class SweepFailedError(AutoScaleError, RuntimeError):
    """Some trials of a sweep failed; the others are in the table."""


def sweep(arguments: Sequence[str], console: Console) -> Path:
    """Run one loop for every point of the swept fields, or go on where an earlier start was killed.

    Args:
        arguments: See `read_plan`.
        console: Receives progress and the table.

    Returns:
        Folder with ``sweep.csv``, ``sweep.png`` and one run folder for each trial.

    Raises:
        AutoScaleError: Bad arguments, a cluster that cannot hold one trial, or failed trials.
    """
    plan = read_plan(arguments)
    placement = plan.base.placement
    folder = Path(placement.run_dir)
    connect(placement.ray)
    wait_for_room(placement.ray)
    at_once = trials_at_once(plan.at_once, needs_of_trial(plan), ray.cluster_resources())
    with console.status("embedding and clustering once for all trials"):
        shared = prepare_shared(plan)
    with console.status(f"running trials, {at_once} at a time"):
        set_environment(CTRL_C)
        results = make_tuner(plan, shared, at_once).fit()
    # What a trial was given is told by its result only once its actor has begun.
    trials = results._experiment_analysis.trials
    rows = [row_of(results[number], trial.config, plan) for number, trial in enumerate(trials)]
    write_sweep(rows, list(plan.space), folder)
    console.print(sweep_table(rows, list(plan.space)))
    failed = [row["error"] for row in rows if row["error"]]
    if failed:
        raise SweepFailedError(f"{len(failed)} of {len(rows)} trials failed, the first with: {failed[0]}")
    return folder


def prepare_shared(plan: SweepPlan) -> Path:
    """Embed and cluster the pools in a run of their own; trials take the finished stages from there."""
    shared = Path(plan.base.placement.run_dir) / "shared"
    config = with_swept(plan.sections, {"placement.run_dir": shared})
    try:
        (status,) = deque(follow(start_driver(config, lifetime=None, embed_only=True)), maxlen=1)
    finally:
        end_driver(str(shared))
    if status["state"] != "finished":
        raise status["error"] or StoppedError("the embedding that all trials share was stopped")
    return shared


def make_tuner(plan: SweepPlan, shared: Path, at_once: int) -> ray.tune.Tuner:
    """Return the tuner of a sweep; one that was killed is restored, its trials go on in their run folders."""
    folder = Path(plan.base.placement.run_dir)
    trainable = ray.tune.with_resources(run_trial, {SLOT: 1})
    path = folder / plan.name
    if ray.tune.Tuner.can_restore(str(path)) and any(path.glob("experiment_state-*.json")):
        return ray.tune.Tuner.restore(str(path), trainable, resume_unfinished=True, restart_errored=True)
    fixed = {"base": plan.sections, "shared": str(shared), "folder": str(folder)}
    return ray.tune.Tuner(
        trainable,
        param_space={"fixed": fixed, **{name: domain(plan, values) for name, values in plan.space.items()}},
        tune_config=ray.tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=searcher(plan),
            scheduler=scheduler(plan),
            num_samples=max(plan.num_trials, 1),
            max_concurrent_trials=at_once,
        ),
        run_config=ray.tune.RunConfig(name=plan.name, storage_path=str(folder), verbose=0),
    )


def domain(plan: SweepPlan, values: list[Any] | Range) -> Any:
    """Return the values of a field as Tune takes them."""
    if isinstance(values, Range):
        if isinstance(values.low, int) and isinstance(values.high, int):
            return ray.tune.randint(values.low, values.high + 1)
        return ray.tune.uniform(values.low, values.high)
    return ray.tune.grid_search(values) if plan.search == "grid" else ray.tune.choice(values)


def searcher(plan: SweepPlan) -> Searcher | None:
    """Return what chooses the points; None runs the grid."""
    if plan.search == "grid":
        return None
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=plan.base.seed)


def scheduler(plan: SweepPlan) -> TrialScheduler:
    """Return what stops poor trials."""
    num_reports = plan.base.loop.num_rounds + 2
    if not plan.early_stop or num_reports <= FIRST_STOP:
        return FIFOScheduler()
    # One report more than there are rounds: at its maximum ASHA ends a trial, and the comparison is still to come.
    return RoundHalving(
        time_attr=TIME, max_t=num_reports, grace_period=FIRST_STOP, reduction_factor=2, stop_last_trials=False
    )


class RoundHalving(ASHAScheduler):
    """ASHA on rounds that remembers finished trials of a sweep that was killed: Tune itself forgets them."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial; one that has ended is heard again from its published rounds."""
        super().on_trial_add(tune_controller, trial)
        if trial.status != "TERMINATED":
            return
        for report in published_reports(trial.config):
            self.on_trial_result(tune_controller, trial, report)


def published_reports(params: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what ASHA reads of every published round of a trial."""
    try:
        rounds = read_rounds(str(trial_dir(Path(params["fixed"]["folder"]), swept_of(params))))
    except ArtifactError:
        return []
    scores: list[Any] = [(record.index, record.payload["totals"]) for record in rounds]
    return [
        {TIME: index + 1, SCORE: totals["objective"]}
        for index, totals in scores
        if totals["objective"] is not None
    ]


def row_of(result: Any, params: Mapping[str, Any], plan: SweepPlan) -> dict[str, Any]:
    """Return one line of the result table.

    Args:
        result: What Tune heard of a trial.
        params: What the trial was given.
        plan: The sweep.
    """
    metrics = result.metrics or {}
    names = (SCORE, "se", "test_objective", "test_se", "num_scenes", "ended", "run_dir")
    row = {field: params[field] for field in plan.space}
    row |= {
        "rounds": metrics.get(TIME, 0) - (metrics.get("ended") == "finished")
    }  # the comparison counts as one
    row |= {name: metrics.get(name) for name in names}
    error = str(result.error or "").strip().rpartition("\n")[2]
    return {**row, "ended": "failed" if error else row["ended"], "error": error}
