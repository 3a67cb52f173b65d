"""One trial of a sweep: a whole loop in a run folder of its own, reported to Tune round by round."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.tune

from autoscale_ray.artifacts import share_with
from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import LoopConfig, RunConfig, identity
from autoscale_ray.config_file import load_config
from autoscale_ray.distributed.driver import RunFailedError, end_driver, follow, start_driver
from autoscale_ray.distributed.sweep_plan import with_swept
from autoscale_ray.errors import AutoScaleError
from autoscale_ray.run_folder import CONFIG_FILE, SUMMARY_FILE

SCORE = "objective"
TIME = "rounds_done"


def run_trial(params: dict[str, Any]) -> None:
    """Run one loop and report every round; the driver belongs to the trial and ends with it.

    Args:
        params: The swept fields, and under ``fixed`` what all trials share: base, folder, shared folder.
    """
    fixed, swept = params["fixed"], swept_of(params)
    run_dir = trial_dir(Path(fixed["folder"]), swept)
    config = with_swept(fixed["base"], {**swept, "placement.run_dir": run_dir})
    summary = finished_summary(run_dir, config)
    if summary is None:
        share_with(run_dir, Path(fixed["shared"]))
        if not (run_dir / "pools").exists():
            (run_dir / "pools").symlink_to(Path(fixed["shared"]) / "pools")
        summary = run_loop(config)
    else:
        for done in summary["rounds"]:
            ray.tune.report(round_report(done, run_dir))
    ray.tune.report(final_report(summary, run_dir))


def run_loop(config: RunConfig) -> dict[str, Any]:
    """Run the loop of a trial until it ends or is asked to stop; rounds of an earlier start are reported again.

    Raises:
        AutoScaleError: Whatever ended the run.
    """
    run_dir, reported = Path(config.placement.run_dir), 0
    status: dict[str, Any] = {"error": None, "summary": None}
    try:
        for status in follow(start_driver(config, lifetime=None)):
            rounds = (status["summary"] or {}).get("rounds", [])
            for done in rounds[reported:]:
                ray.tune.report(round_report(done, run_dir))
            reported = len(rounds)
    except RunFailedError:
        # Another trial of the same values, which a search may name twice, has ended the driver first.
        if (summary := finished_summary(run_dir, config)) is None:
            raise
        return summary
    finally:
        end_driver(config.placement.run_dir)
    if status["error"]:
        raise status["error"]
    return status["summary"]


def round_report(done: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return what Tune hears of a round."""
    value, se = done["totals"]["objective"], done["total_se"]["objective"]
    return {
        SCORE: math.nan if value is None else value,
        "se": math.nan if se is None else se,
        TIME: done["index"] + 1,
        "num_scenes": done["num_scenes"],
        "run_dir": str(run_dir),
        "ended": "early",
    }


def final_report(summary: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return what Tune hears at the end: the last round again, and the recommended mixture on test.

    A run that was asked to stop has no comparison: its last round is told to be the end.
    """
    last = round_report(summary["rounds"][-1], run_dir)
    if not summary["arms"]:
        return {**last, "ended": "stopped"}
    (arm,) = [arm for arm in summary["arms"] if arm["name"] == "autoscale"]
    test = {"test_objective": arm["totals"]["objective"], "test_se": arm["total_se"]["objective"]}
    return {**last, **test, TIME: last[TIME] + 1, "ended": "finished"}


def finished_summary(run_dir: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of a trial that an earlier sweep finished with this configuration, or None."""
    try:
        before = load_config(run_dir / CONFIG_FILE)
        summary = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, AutoScaleError, json.JSONDecodeError):
        return None
    same = identity(before) == identity(config) and before.loop == config.loop
    return summary if same and is_of(summary, config.loop) else None


def is_of(summary: Mapping[str, Any], loop: LoopConfig) -> bool:
    """Tell whether a summary ends with the comparison that is asked for; the file may be of an earlier start."""
    compared = {arm["name"]: len(arm["seed_totals"]["objective"]) for arm in summary["arms"]}
    rounds_are_there = loop.stop_early or len(summary["rounds"]) == loop.num_rounds + 1
    return rounds_are_there and compared == dict.fromkeys((*loop.baselines, "autoscale"), loop.final_seeds)


def swept_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the swept fields of a trial."""
    return {field: value for field, value in params.items() if field != "fixed"}


def trial_dir(folder: Path, swept: Mapping[str, Any]) -> Path:
    """Return a run folder that depends on the swept values alone, so that a restored trial finds its run."""
    words = "-".join(f"{field.rpartition('.')[2]}={value}" for field, value in sorted(swept.items()))
    readable = "".join(c if c.isalnum() or c in "-=._" else "_" for c in words)[:80]
    return folder / "trials" / f"{readable}-{fingerprint(dict(swept))[:8]}"
