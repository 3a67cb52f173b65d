"""Sweeps: what is asked for is read and refused in time, poor trials stop early, a killed sweep goes on."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.tune import _setup_signal_catching
from rich.console import Console
from scipy import stats

from autoscale_ray.cli import main
from autoscale_ray.config import LoopConfig, RunConfig
from autoscale_ray.distributed.driver import find_driver
from autoscale_ray.distributed.jobs import sweep_budgets
from autoscale_ray.distributed.resources import Needs, ResourcesError
from autoscale_ray.distributed.status import read_events
from autoscale_ray.distributed.sweep import domain, published_reports, row_of, scheduler, searcher, sweep
from autoscale_ray.distributed.sweep_plan import SLOT, Range, needs_of_trial, read_plan, trials_at_once
from autoscale_ray.distributed.sweep_report import curves, write_sweep
from autoscale_ray.distributed.trial import is_of, run_trial, trial_dir
from autoscale_ray.errors import ConfigError, MissingExtraError
from autoscale_ray.journal import read_rounds
from tests.ray.small_run import SMALL, link_stages, with_shared_pools

JOB = str(Path(__file__).parents[2] / "jobs" / "sweep_budgets.py")
KILL_TIMEOUT_S = 240
GOOD, POOR = 160, 60
"""Budgets: with the first, dev scores 0.65 after the first mixed round, with the second 0.56."""


def test_a_plan_has_values_ranges_and_options() -> None:
    plan = read_plan(["loop.num_rounds=3", "sweep.loop.budget=20,60", "sweep.at_once=2"])
    assert plan.space == {"loop.budget": [20, 60]}
    assert (plan.base.loop.num_rounds, plan.at_once, plan.search) == (3, 2, "grid")
    plan = read_plan(["sweep.loop.budget=20..60", "sweep.search=optuna", "sweep.num_trials=4"])
    assert plan.space == {"loop.budget": Range(20, 60)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sweep: name at least one field, for example sweep.loop.budget=350,700"),
        (["sweep.loop.budget="], "sweep.loop.budget: needs at least one value"),
        (["sweep.loop.bugdet=1,2"], "loop.bugdet"),
        (["sweep.loop.budget=20,0"], "loop.budget"),
        (["sweep.loop.budget=[20,60]"], "sweep.loop.budget: every value must be YAML without commas"),
        (["sweep.loop.budget=20..60"], "a range needs sweep.search=optuna"),
        (
            ["sweep.loop.budget=60..20", "sweep.search=optuna", "sweep.num_trials=4"],
            "low..high with low < high",
        ),
        (["sweep.loop.budget=20,60", "sweep.search=optuna"], "sweep.num_trials: a search by optuna needs"),
        (["sweep.loop.budget=20,60", "sweep.search=magic"], "sweep.search: must be one of grid, optuna"),
        (["sweep.loop.budget=20,60", "sweep.at_once=0"], "sweep.at_once: must be an integer >= 1"),
        (["one.yaml", "two.yaml", "sweep.loop.budget=20,60"], "only one configuration file"),
    ],
)
def test_a_bad_plan_is_one_line_before_anything_starts(arguments, message, tmp_path, capsys) -> None:
    with pytest.raises(ConfigError) as raised:
        read_plan(arguments)
    assert message in str(raised.value)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_optuna_is_named_where_it_is_missing(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"optuna is not installed: pip install '\.\[optuna\]' in a clone"
    ):
        read_plan(["sweep.loop.budget=20..60", "sweep.search=optuna", "sweep.num_trials=4"])


def test_a_trial_starts_with_two_links_however_many_have_finished(tmp_path, monkeypatch) -> None:
    shared, found = tmp_path / "shared", []
    (shared / "pools").mkdir(parents=True)
    fixed = {"base": {"loop": {"num_rounds": 1}}, "shared": str(shared), "folder": str(tmp_path)}
    totals = {"totals": {"objective": 0.5}, "total_se": {"objective": 0.1}}
    summary = {"rounds": [{"index": 0, "num_scenes": 0, **totals}], "arms": [{"name": "autoscale", **totals}]}

    def run_loop(config: RunConfig) -> dict:
        run_dir = Path(config.placement.run_dir)
        found.append({path.name: path.resolve() for path in run_dir.iterdir()})
        (run_dir / "stages").mkdir()
        (run_dir / "stages" / "train-0.json").touch()
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr("autoscale_ray.distributed.trial.run_loop", run_loop)
    monkeypatch.setattr("ray.tune.report", lambda metrics: None)
    for budget in (20, 40, 60):
        run_trial({"loop.budget": budget, "fixed": fixed})
    assert found == [{"pools": shared / "pools", "shared": shared}] * 3


def test_a_trial_that_was_asked_to_stop_does_not_fail_and_is_told_apart(tmp_path, monkeypatch) -> None:
    """Its summary has no arm; it used to end in a ValueError."""
    totals = {"totals": {"objective": 0.5}, "total_se": {"objective": 0.1}}
    rounds = [{"index": index, "num_scenes": 60 * index, **totals} for index in (0, 1)]
    heard = []
    monkeypatch.setattr(
        "autoscale_ray.distributed.trial.run_loop", lambda config: {"rounds": rounds, "arms": []}
    )
    monkeypatch.setattr("ray.tune.report", heard.append)
    fixed = {"base": {}, "shared": str(tmp_path / "shared"), "folder": str(tmp_path)}
    run_trial({"loop.budget": 60, "fixed": fixed})
    assert [(report["ended"], report["rounds_done"]) for report in heard] == [("stopped", 2)]
    assert "test_objective" not in heard[0]


def test_only_the_comparison_that_is_asked_for_counts_as_finished() -> None:
    """The file may be of an earlier start of the trial, with other arms, seeds or rounds."""
    loop = LoopConfig(num_rounds=1, final_seeds=2, baselines=("uniform",))
    arms = [{"name": name, "seed_totals": {"objective": [0.5, 0.6]}} for name in ("uniform", "autoscale")]
    assert is_of({"rounds": [0, 1], "arms": arms}, loop)
    assert not is_of({"rounds": [0, 1], "arms": []}, loop)
    assert not is_of({"rounds": [0, 1], "arms": arms[1:]}, loop)
    assert not is_of({"rounds": [0, 1], "arms": arms}, dataclasses.replace(loop, final_seeds=4))
    longer = dataclasses.replace(loop, num_rounds=2)
    assert not is_of({"rounds": [0, 1], "arms": arms}, longer)
    assert is_of({"rounds": [0, 1], "arms": arms}, dataclasses.replace(longer, stop_early=True))


@pytest.mark.parametrize(("ended", "rounds"), [("finished", 9), ("early", 10)])
def test_rounds_in_the_table_are_those_of_the_trial(ended, rounds) -> None:
    """They used to be cut to those of the base; the comparison after the last round counts as one more."""
    plan = read_plan(["loop.num_rounds=6", "sweep.loop.num_rounds=2,8"])
    metrics = {"rounds_done": 10, "objective": 0.5, "ended": ended}
    result = SimpleNamespace(metrics=metrics, error=None)
    assert row_of(result, {"loop.num_rounds": 8}, plan)["rounds"] == rounds


def test_a_trial_that_never_began_has_a_line_of_its_own() -> None:
    """It used to be a TypeError: nothing was heard of it."""
    plan = read_plan(["sweep.loop.budget=20,60"])
    result = SimpleNamespace(metrics={}, config=None, error=RuntimeError("no node\nit died"))
    told = row_of(result, {"loop.budget": 20}, plan)
    assert (told["loop.budget"], told["rounds"], told["ended"], told["error"]) == (20, 0, "failed", "it died")


def test_ctrl_c_in_a_sweep_ends_it_and_is_no_result(tmp_path, monkeypatch, capsys) -> None:
    """Tune would catch it and return as if all trials in hand had ended: `finished` and code 0."""

    class Tuner:
        """Catches what Tune would catch, as long as it is let."""

        def fit(self) -> None:
            _setup_signal_catching()
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("nobody was interrupted")

    module = "autoscale_ray.distributed.sweep"
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr(f"{module}.trials_at_once", lambda *_: 1)
    monkeypatch.setattr(f"{module}.make_tuner", lambda *_: Tuner())
    for name in ("connect", "wait_for_room", "prepare_shared"):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: None)
    # A process in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["sweep", "sweep.loop.budget=20,60", "--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.value.code, capsys.readouterr().err) == (130, "autoscale: interrupted\n")


def test_a_sweep_into_a_bucket_is_one_line_before_anything_starts(tmp_path, monkeypatch, capsys) -> None:
    """It used to run in a folder named `s3:` here."""
    monkeypatch.chdir(tmp_path)
    told = (
        "placement.run_dir: a sweep needs a folder that every node mounts; only a single run may lie in a bucket "
        "(found 's3://bucket/sweep')\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "sweep.loop.budget=20,60", "--out", "s3://bucket/sweep"])
    assert (ended.value.code, capsys.readouterr().err) == (2, f"autoscale: {told}")
    assert sweep_budgets(["sweep.loop.budget=20,60", "placement.run_dir=s3://bucket/sweep"]) == 2
    assert capsys.readouterr().err == f"failed: {told}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "needs", "total", "expected"),
    [
        (0, Needs(2, 0), {"CPU": 2, SLOT: 4}, 1),
        (0, Needs(2, 0), {"CPU": 9, SLOT: 8}, 4),
        (0, Needs(2, 0), {"CPU": 64, SLOT: 3}, 3),
        (0, Needs(2, 1), {"CPU": 64, "GPU": 2, SLOT: 8}, 2),
        (0, Needs(3, 0), {"CPU": 2, SLOT: 8}, 1),
        (5, Needs(2, 0), {"CPU": 2, SLOT: 8}, 5),
        (9, Needs(2, 0), {"CPU": 2, SLOT: 4}, 4),
    ],
)
def test_no_more_trials_at_a_time_than_can_all_have_what_they_need(asked, needs, total, expected) -> None:
    assert trials_at_once(asked, needs, total) == expected


SWEEP_OF_BUDGETS = "sweep.loop.budget=20,60"


@pytest.mark.parametrize(
    ("arguments", "needs", "total", "expected"),
    [
        # Two of them used to start, take four trainers each and leave no CPU for a scorer.
        (
            [SWEEP_OF_BUDGETS, *(f"placement.ray.{name}" for name in ("num_trainers=4", "min_trainers=1"))],
            Needs(5, 0),
            {"CPU": 8},
            1,
        ),
        # Two of them used to run on four GPUs, of which embedders that nobody started had half.
        (
            [SWEEP_OF_BUDGETS, *(f"placement.ray.{name}" for name in ("gpus_per_worker=1", "num_scorers=4"))],
            Needs(5, 1),
            {"CPU": 48, "GPU": 4},
            4,
        ),
        (["sweep.seed=0,1", "placement.ray.gpus_per_worker=1"], Needs(3, 2), {"CPU": 48, "GPU": 4}, 2),
        (["sweep.planner.num_steps=100,200", "sweep.clusters.num_coarse=4,8"], Needs(2, 0), {"CPU": 8}, 4),
        ([SWEEP_OF_BUDGETS, "sweep.representation.num_steps=5,9"], Needs(3, 0), {"CPU": 8}, 2),
    ],
)
def test_a_trial_counts_with_all_that_it_may_take_and_no_more(arguments, needs, total, expected) -> None:
    plan = read_plan(arguments)
    assert needs_of_trial(plan) == needs
    assert trials_at_once(plan.at_once, needs_of_trial(plan), {**total, SLOT: 8}) == expected


def test_a_cluster_without_slots_is_told_how_to_declare_them() -> None:
    with pytest.raises(ResourcesError, match="--resources="):
        trials_at_once(0, Needs(2, 0), {"CPU": 8})


def row(budget: int, objective: float, **more) -> dict:
    filled = {"se": 0.01, "test_objective": None, "test_se": None, "rounds": 3, "num_scenes": budget}
    return {"loop.budget": budget, "objective": objective, **filled, "ended": "finished", "error": "", **more}


def test_intervals_come_from_scenes_for_one_trial_and_from_repetitions_for_more() -> None:
    rows = [row(20, 0.5, seed=0), row(60, 0.6, seed=0), row(60, 0.7, seed=1), row(60, 0.8, seed=2)]
    ((label, (alone, repeated)),) = curves(rows, ["loop.budget", "seed"], "loop.budget")
    assert label == "dev, last round"
    assert (alone.x, alone.mean, alone.num_trials) == (20, 0.5, 1)
    assert alone.half_width == pytest.approx(1.959964 * 0.01, rel=1e-6)
    low, high = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem([0.6, 0.7, 0.8]))
    assert (repeated.mean, repeated.num_trials) == (pytest.approx(0.7), 3)
    np.testing.assert_allclose(
        [repeated.mean - repeated.half_width, repeated.mean + repeated.half_width], [low, high]
    )


def test_other_fields_make_curves_of_their_own_and_test_scores_too() -> None:
    rows = [row(20, 0.5, **{"ascent.method": name}, test_objective=0.4, test_se=0.02) for name in ("a", "b")]
    labels = [label for label, _ in curves(rows, ["loop.budget", "ascent.method"], "loop.budget")]
    scores = ("dev, last round", "test, recommended mixture")
    assert labels == [f"{score}, method {name}" for name in ("a", "b") for score in scores]


def test_the_table_is_in_order_and_missing_scores_stay_empty(tmp_path: Path) -> None:
    write_sweep(
        [row(100, 0.6), row(20, float("nan")), row(60, 0.5, ended="early")], ["loop.budget"], tmp_path
    )
    written = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [line["loop.budget"] for line in written] == ["20", "60", "100"]
    assert [line["test_objective"] for line in written] == ["", "", ""]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")  # those of optuna are not ours
def test_optuna_chooses_whole_numbers_in_the_range() -> None:
    pytest.importorskip("optuna")
    arguments = ["sweep.loop.budget=20..60", "sweep.ascent.method=response,deficit"]
    plan = read_plan([*arguments, "sweep.search=optuna", "sweep.num_trials=3"])
    search = searcher(plan)
    assert search is not None
    search.set_search_properties("objective", "max", {n: domain(plan, v) for n, v in plan.space.items()})
    points = [search.suggest(f"trial {number}") for number in range(20)]
    budgets = [point["loop.budget"] for point in points]
    assert all(isinstance(budget, int) and 20 <= budget <= 60 for budget in budgets)
    assert len(set(budgets)) > 5
    assert {point["ascent.method"] for point in points} == {"response", "deficit"}


class Trial:
    """What ASHA sees of a trial."""

    def __init__(self, name: str, config: dict, status: str) -> None:
        self.trial_id, self.config, self.status = name, config, status


def test_asha_stops_a_poor_trial_and_remembers_those_that_ended_before_a_kill(reference, tmp_path) -> None:
    params = {"loop.budget": 60, "fixed": {"folder": str(tmp_path)}}
    ended = trial_dir(tmp_path, {"loop.budget": 60})
    ended.parent.mkdir()
    ended.symlink_to(reference)
    reports = published_reports(params)
    assert [report["rounds_done"] for report in reports] == [1, 2, 3]
    plan = read_plan(["loop.num_rounds=2", "sweep.loop.budget=20,60"])
    for status, decision in (("TERMINATED", "STOP"), ("PENDING", "CONTINUE")):
        asha = scheduler(plan)
        asha.set_search_properties("objective", "max")
        asha.on_trial_add(None, Trial("before", params, status))
        poor = Trial("poor", {**params, "loop.budget": 20}, "PENDING")
        asha.on_trial_add(None, poor)
        low = reports[1]["objective"] - 1e-6
        assert asha.on_trial_result(None, poor, {"rounds_done": 1, "objective": low}) == "CONTINUE"
        assert asha.on_trial_result(None, poor, {"rounds_done": 2, "objective": low}) == decision


@pytest.mark.slow  # the longest of all
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_stops_a_poor_trial_and_computes_nothing_twice(
    cluster, reference, tmp_path, monkeypatch
) -> None:
    """With a configuration file named by a relative path, as docs/sweeps.md has it."""
    folder = tmp_path / "sweep"
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("planner: {num_steps: 300}")
    shared = with_shared_pools(folder / "shared", reference)
    link_stages(reference, shared)  # embedded and clustered before; its planners had fewer steps
    arguments = ["run.yaml", *without_steps(SMALL), f"sweep.loop.budget={GOOD},{POOR}", "sweep.at_once=1"]
    kill_after_a_round([*arguments, "--out", str(folder)], folder)
    (first,) = (folder / "trials").iterdir()
    before = {path: path.read_bytes() for path in (first / "rounds").iterdir()}
    assert len(before) in (1, 2), "killed between its first and its last round"
    assert not (folder / "sweep.csv").exists()

    given = [*arguments, f"placement.run_dir={folder}"]
    job = subprocess.run([sys.executable, JOB, *given], capture_output=True, text=True, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-1] == f"finished: everything lies in {folder}"
    assert {path: path.read_bytes() for path in before} == before, "a published round is not made again"
    check_table(folder)
    check_shared(folder, shared)
    table, events = (folder / "sweep.csv").read_bytes(), num_events(folder)
    (folder / "sweep.csv").unlink()
    assert sweep(given, Console(quiet=True)) == folder
    assert (folder / "sweep.csv").read_bytes() == table
    assert num_events(folder) == events, "a finished sweep is restored, not run again"


def without_steps(overrides: Sequence[str]) -> list[str]:
    return [item for item in overrides if not item.startswith("planner.num_steps=")]


def kill_after_a_round(arguments: list[str], folder: Path) -> None:
    """Start a sweep and SIGKILL it once its first trial has published a round."""
    command = [sys.executable, "-m", "autoscale_ray.cli", "sweep", *arguments]
    with (folder / "killed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    give_up = time.monotonic() + KILL_TIMEOUT_S
    while not any(folder.glob("trials/*/rounds/00000.json")):
        assert process.poll() is None, (folder / "killed.log").read_text()
        assert time.monotonic() < give_up, (folder / "killed.log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(30)


def check_table(folder: Path) -> None:
    """One trial went to its end and was scored on test, the poor one stopped after the first mixed round."""
    poor, good = csv.DictReader((folder / "sweep.csv").read_text().splitlines())
    assert [int(line["loop.budget"]) for line in (poor, good)] == [POOR, GOOD]
    after_round_1 = [read_rounds(line["run_dir"])[1].payload["totals"] for line in (good, poor)]
    scores = [totals["objective"] for totals in after_round_1]
    assert scores[0] > scores[1], "choose other budgets: the second must be the poorer one"
    assert (good["ended"], good["rounds"]) == ("finished", "3")
    assert (poor["ended"], poor["rounds"]) == ("early", "2")
    summary = json.loads((Path(good["run_dir"]) / "summary.json").read_text())
    assert float(good["objective"]) == summary["rounds"][-1]["totals"]["objective"]
    assert float(good["test_objective"]) == summary["arms"][-1]["totals"]["objective"]
    assert poor["test_objective"] == ""
    last = read_events(good["run_dir"])[-1]
    assert (last["event"], last["state"]) == ("driver_ended", "finished")
    assert len(read_rounds(poor["run_dir"])) < 3, "its last round was never published"
    assert (folder / "sweep.png").is_file()


def check_shared(folder: Path, shared: Path) -> None:
    """No trial has embedded or clustered: all hold the records of the shared run, and its files as links."""
    for trial in (folder / "trials").iterdir():
        assert find_driver(str(trial)) is None, "a driver ends with its trial"
        built = {event["name"] for event in read_events(str(trial)) if event["event"] == "stage"}
        assert built.isdisjoint({"encoder", "embed", "cluster"})
        for name in ("encoder", "embed", "cluster"):
            (record,) = (trial / "stages").glob(f"{name}-*.json")
            assert record.read_bytes() == (shared / "stages" / record.name).read_bytes()
            for blob in json.loads(record.read_bytes())["body"]["blobs"].values():
                key = f"objects/{blob['sha256'][:2]}/{blob['sha256']}"
                assert (trial / key).samefile(shared / key)
    assert not any(event["event"] == "stage" for event in read_events(str(shared))), (
        "nor has the second start"
    )
    poor = trial_dir(folder, {"loop.budget": POOR})
    computed = [event["name"] for event in read_events(poor) if event["event"] == "stage"]
    assert computed.count("train") <= 2, "the real-only round comes from the trial that had finished"
    assert "reference_drives" not in computed


def num_events(folder: Path) -> int:
    return sum(len(read_events(str(trial))) for trial in (folder / "trials").iterdir())
