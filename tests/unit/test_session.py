"""Whole runs on a tiny world: same seed same numbers, killed and resumed same numbers, bad input one line."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from autoscale_ray import inputs, tasks, tasks_scores
from autoscale_ray.artifacts import share_with
from autoscale_ray.cli import main
from autoscale_ray.config import RunConfig
from autoscale_ray.config_file import load_config
from autoscale_ray.errors import PoolError
from autoscale_ray.inputs import open_inputs
from autoscale_ray.journal import read_rounds
from autoscale_ray.mixture import METHODS
from autoscale_ray.records import SIDES
from autoscale_ray.reporting.embedding_plots import retrieval_figure
from autoscale_ray.reporting.tables import round_table
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.session import embed_local, run_local
from autoscale_ray.world.pools import make_pool

TINY = (
    "world.num_real=40",
    "world.num_synthetic=160",
    "world.num_dev_per_family=2",
    "world.num_test_per_family=1",
    "representation.num_steps=4",
    "representation.batch_size=32",
    "planner.num_steps=6",
    "planner.batch_size=16",
    "clusters.num_coarse=3",
    "clusters.min_dev_scenes=1",
    "loop.budget=40",
    "loop.num_rounds=2",
    "loop.final_seeds=1",
)


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> Path:
    """Four tiny pools, made once."""
    folder = tmp_path_factory.mktemp("world")
    inputs = open_inputs(load_config(None, TINY), folder)
    for side in SIDES:
        inputs.pools[side].path.rename(folder / side)
    return folder


def arguments(pools: Path, run_dir: Path, *more: str) -> list[str]:
    paths = [f"data.{side}={pools / side}" for side in SIDES]
    return [*TINY, *paths, f"placement.run_dir={run_dir}", *more]


def numbers(run_dir: Path) -> dict:
    """Everything a run reports but wall time."""
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["spent"]["seconds"], summary["spent"]["seconds_by_round"]
    return summary


@pytest.fixture(scope="module")
def finished(pools, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    run_local(load_config(None, arguments(pools, run_dir)), Console(quiet=True))
    return run_dir


def test_a_run_reports_every_arm_and_round(finished):
    summary = numbers(finished)
    assert [done["index"] for done in summary["rounds"]] == [0, 1, 2]
    names = [arm["name"] for arm in summary["arms"]]
    assert names == ["real_only", "vanilla", "union", "uniform", "autoscale"]
    assert {arm["name"]: arm["num_scenes"] for arm in summary["arms"]}["union"] == 160
    for arm in summary["arms"]:
        assert all(0 <= arm["totals"][name] <= 1 for name in ("objective", "epdms", "pdms", "miou"))
        assert all(error > 0 for error in arm["total_se"].values())
    totals = {arm["name"]: arm["totals"]["objective"] for arm in summary["arms"]}
    gains = {name: totals["autoscale"] - totals[name] for name in totals if name != "autoscale"}
    assert {name: gain["mean"] for name, gain in summary["gains"].items()} == pytest.approx(gains)
    assert all(gain["se"] > 0 for gain in summary["gains"].values())
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots == {"weights_per_round.png", "score_per_round.png", "arms.png", "embedding_map.png"}
    report = (finished / "report.html").read_text()
    assert "autoscale" in report
    assert "selection.csv" in report
    assert "<td>-0.0" not in report
    assert report.count('<svg role="img" aria-label=') == report.count("<svg") == 3
    assert re.findall(r"""(?:src|href)\s*=\s*["']?https?:|url\(\s*["']?https?:|@import""", report) == []


def test_the_embedding_of_a_run_is_drawn_as_a_map_and_a_sheet(finished, pools, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    drawn = []

    def seen(queries, neighbours, names, cosine_QM):
        drawn.append((queries, neighbours, names, cosine_QM))
        return retrieval_figure(queries, neighbours, names, cosine_QM)

    monkeypatch.setattr("autoscale_ray.reporting.embedding_map.retrieval_figure", seen)
    embed_local(load_config(None, arguments(pools, run_dir)), Console(quiet=True), plot=True)
    for name in ("embedding_map.png", "retrieval_sheet.png"):
        assert matplotlib.image.imread(run_dir / "plots" / name).std() > 0.05
    ((queries, neighbours, names, cosine_QM),) = drawn
    assert len(queries) == len(neighbours) == len(set(names)) > 1, "one query of each of several clusters"
    assert all(scene.domain_N.tolist() == [0] for scene in queries), "queries are real"
    assert all(scene.domain_N.tolist() == [1] for row in neighbours for scene in row)
    assert (np.diff(cosine_QM, axis=1) <= 0).all(), "nearest first"
    assert cosine_QM.max() <= 1


def test_every_round_says_how_long_its_stages_took(finished):
    summary = json.loads((finished / "summary.json").read_text())
    spent, by_round = summary["spent"]["seconds"], summary["spent"]["seconds_by_round"]
    assert len(by_round) == len(summary["rounds"]) == 3
    assert by_round[0]["encoder"] == spent["encoder"] > 0
    assert all(took["train"] > 0 and took["evaluate_dev"] > 0 for took in by_round)
    assert sum(took["train"] for took in by_round) < spent["train"], "the comparison trains too"
    by_round[0] = {"encoder": 61.4, "embed": 0.4, "train": 3.0}
    assert "took: encoder 61 s, train 3 s" in str(round_table(summary, 0).caption)


def test_the_chosen_scenes_are_named_in_a_file_of_their_own(finished, pools):
    counts = {arm["name"]: arm["counts"] for arm in numbers(finished)["arms"]}["autoscale"]
    synthetic = open_pool(pools / "synthetic")
    with (finished / "selection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["cluster"] for row in rows) == Counter({k: n for k, n in counts.items() if n})
    assert len({row["scene_id"] for row in rows}) == sum(counts.values()) == 40
    known = {name: synthetic.column(name) for name in ("log_id", "origin_id", "source")}
    for row, place in zip(rows, synthetic.rows_of(row["scene_id"] for row in rows), strict=True):
        assert {name: row[name] for name in known} == {name: str(known[name][place]) for name in known}


def test_two_runs_with_one_seed_are_identical_and_see_no_hidden_truth(finished, pools, tmp_path):
    """The second run has pools without the world's truth (family, quality): no selection or score changes."""
    blind = tmp_path / "pools"
    shutil.copytree(pools, blind)
    for side in SIDES:
        (blind / side / "truth.parquet").unlink()
    run_local(load_config(None, arguments(blind, tmp_path / "again")), Console(quiet=True))
    assert numbers(tmp_path / "again") == numbers(finished)
    assert read_rounds(str(tmp_path / "again")) == read_rounds(str(finished))


def test_two_rounds_and_a_third_equal_three(finished, pools, tmp_path):
    run_dir, spent = tmp_path / "grown", []
    for more in (["loop.num_rounds=1"], []):
        run_local(load_config(None, arguments(pools, run_dir, *more)), Console(quiet=True))
        spent.append(json.loads((run_dir / "summary.json").read_text())["spent"]["seconds"])
    assert all(spent[1][stage] > 0.5 * took for stage, took in spent[0].items() if took > 0.1)
    assert numbers(run_dir) == numbers(finished)
    assert read_rounds(str(run_dir)) == read_rounds(str(finished))


def test_a_run_of_another_budget_shares_all_that_no_budget_changes(finished, pools, tmp_path):
    """Two trials of a sweep: the second has the numbers of a run of its own and computes only what is its own."""
    shared, first, second = tmp_path / "shared", tmp_path / "first", tmp_path / "second"
    shared.mkdir()
    for run_dir, budget in ((first, 40), (second, 60)):
        share_with(run_dir, shared)
        run_local(load_config(None, arguments(pools, run_dir, f"loop.budget={budget}")), Console(quiet=True))
    alone = tmp_path / "alone"
    run_local(load_config(None, arguments(pools, alone, "loop.budget=60")), Console(quiet=True))
    assert (numbers(first), numbers(second)) == (numbers(finished), numbers(alone))
    assert read_rounds(str(second)) == read_rounds(str(alone))
    # Two mixed rounds and three arms with a mixture of this budget; without their planners nothing else.
    assert built(second) == {"retrieve": 5, "train": 5, "evaluate_dev": 2, "evaluate_test": 3}
    assert built(first) == built(finished)
    assert set(built(alone)) == set(built(finished)) > set(built(second))


def built(run_dir: Path) -> Counter[str]:
    """Return how many stages of each name a run has computed itself."""
    logs = [path.read_text().splitlines() for path in (run_dir / "events").iterdir()]
    events = [json.loads(line) for lines in logs for line in lines]
    return Counter(event["name"] for event in events if event["event"] == "stage")


def test_the_pool_is_read_once_for_all_rounds(pools, tmp_path, monkeypatch):
    sizes, original = [], tasks.read_embeddings

    def counted(path: Path):
        found = original(path)
        sizes.append(len(found[0]))
        return found

    monkeypatch.setattr(tasks, "read_embeddings", counted)
    run_local(load_config(None, arguments(pools, tmp_path / "run")), Console(quiet=True))
    # For the clusters, the rounds, the arms that draw at random, and the last one.
    assert sizes.count(160) == 4, sizes


def test_a_finished_run_that_is_started_again_and_stopped_still_tells_its_end(
    finished, pools, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = numbers(run_dir)
    assert before["arms"]

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoscale_ray.session.round_table", stop)
    with pytest.raises(KeyboardInterrupt):
        run_local(load_config(None, arguments(pools, run_dir)), Console(quiet=True))
    assert numbers(run_dir) == before


@pytest.mark.timeout(300)
def test_a_killed_run_ends_with_the_same_numbers(finished, pools, tmp_path):
    """Kill after the encoder stage and again after the first published round, then let it end."""
    run_dir = tmp_path / "killed"
    for wanted in ("stages/encoder-*.json", "rounds/00001.json"):
        process = start(arguments(pools, run_dir))
        wait_for(process, run_dir, wanted)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    last = start(arguments(pools, run_dir))
    output, _ = last.communicate(timeout=100)
    assert last.returncode == 0, output
    assert numbers(run_dir) == numbers(finished)
    assert read_rounds(str(run_dir)) == read_rounds(str(finished))


def test_published_rounds_stand_where_their_mixtures_would_now_come_out_otherwise(
    finished, pools, tmp_path, monkeypatch
):
    """A run goes on on a processor whose last digits differ, and fits no mixture that was published."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    method, asked = METHODS["response"], []

    def otherwise(history, info, config):
        asked.append(len(history))
        return {name: weight * (1 - 1e-12) for name, weight in method.propose(history, info, config).items()}

    monkeypatch.setitem(METHODS, "response", dataclasses.replace(method, propose=otherwise))
    longer = load_config(None, arguments(pools, run_dir, "loop.num_rounds=3"))
    told = run_local(longer, Console(quiet=True))
    assert asked == [3]
    assert read_rounds(str(run_dir))[:3] == read_rounds(str(finished))
    assert numbers(run_dir)["rounds"][:3] == numbers(finished)["rounds"]
    assert [list(done["weights"]) for done in told["rounds"][1:]] == [list(told["rounds"][3]["weights"])] * 3


def start(given: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "autoscale_ray.cli", "run", "--backend", "local", *given]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen, run_dir: Path, pattern: str) -> None:
    deadline = time.monotonic() + 100
    while not list(run_dir.glob(pattern)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)  # polling another process, nothing is asserted on time


def test_another_configuration_in_the_same_folder_is_refused(finished, pools, capsys):
    assert fails(["run", "--backend", "local", *arguments(pools, finished, "loop.budget=50")], capsys) == [
        "loop.budget",
        "40",
        "50",
    ]


def test_another_world_in_the_same_folder_is_refused_before_it_is_drawn(finished, capsys):
    given = [*TINY, "world.seed=5", f"placement.run_dir={finished}"]
    fails(["run", "--backend", "local", *given], capsys, ["config.world.seed", "0", "5"])
    assert not (finished / "pools").exists()


@pytest.mark.parametrize("part", ["encoder", "features", "scorer"])
def test_a_run_begun_by_other_numerics_is_refused_at_once(part, finished, pools, monkeypatch, capsys):
    """Its published rounds would not fit what is computed from here on."""
    monkeypatch.setattr(f"autoscale_ray.session.{part.upper()}_VERSION", 99)
    before = sorted(finished.rglob("*"))
    given = ["run", "--backend", "local", *arguments(pools, finished)]
    fails(given, capsys, ["run.json: belongs to another run", f"versions.{part} is", "99 here"])
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda pools: shutil.rmtree(pools / "dev"), ["dev"]),
        (lambda pools: (pools / "dev" / "manifest.json").unlink(), ["dev"]),
        (lambda pools: truncate(next((pools / "real").glob("*.parquet"))), ["real"]),
        (
            lambda pools: replace_text(
                pools / "real" / "manifest.json", '"schema_version": 1', '"schema_version": 9'
            ),
            ["9"],
        ),
        (lambda pools: same_logs(pools), ["share"]),
        (lambda pools: weigh(pools, {"scene": ["a"]}), ["weights.parquet", "scene_id, weight"]),
        (lambda pools: weigh(pools, {"scene_id": ["a"], "weight": ["b"]}), ["weights.parquet", "numbers"]),
        (lambda pools: weigh(pools, {"scene_id": ["a", "a"], "weight": [1, 2]}), ["one weight for a scene"]),
    ],
    ids=[
        "missing folder",
        "no manifest",
        "corrupted parquet",
        "other schema version",
        "leak",
        "weights without columns",
        "weights in words",
        "weights given twice",
    ],
)
def test_bad_pools_give_one_line_and_write_nothing(damage, parts, pools, tmp_path, capsys):
    broken = tmp_path / "pools"
    shutil.copytree(pools, broken)
    damage(broken)
    run_dir = tmp_path / "run"
    for part in fails(["run", "--backend", "local", *arguments(broken, run_dir)], capsys, parts):
        assert part
    assert not run_dir.exists() or not any(run_dir.rglob("*.json"))


def test_a_world_that_another_process_draws_meanwhile_is_taken(tmp_path, monkeypatch):
    """Trials of a sweep share a folder of pools: who came second used to fail after minutes of drawing."""
    drawn = []

    def too_late(world, side, folder):
        drawn.append(make_pool(dataclasses.replace(world, num_real=4), "real", folder))
        raise PoolError(str(folder), "was written by another process meanwhile")

    monkeypatch.setattr(inputs, "make_pool", too_late)
    config = RunConfig()
    path = inputs._world_pool(config, "real", tmp_path)
    assert len(open_pool(path)) == 4
    assert inputs._world_pool(config, "real", tmp_path) == path
    assert len(drawn) == 1
    monkeypatch.setattr(inputs, "make_pool", Mock(side_effect=PoolError("folder", "is not empty")))
    with pytest.raises(PoolError, match="is not empty"):
        inputs._world_pool(config, "dev", tmp_path)


def test_some_pools_named_and_some_not(pools, tmp_path, capsys):
    given = [*TINY, f"data.real={pools / 'real'}", f"placement.run_dir={tmp_path / 'run'}"]
    fails(["run", "--backend", "local", *given], capsys, ["data", "synthetic"])


@pytest.mark.parametrize(
    "override",
    [
        "loop.budget=0",
        "loop.budget=-1",
        "loop.bugdet=3",
        "ascent.method=best",
        "representation.loss.response=0.1",
    ],
)
def test_bad_configuration(override, pools, tmp_path, capsys):
    fails(
        ["run", "--backend", "local", *arguments(pools, tmp_path / "run", override)],
        capsys,
        [override.split("=")[0].split(".")[1]],
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["fused", "doge"])
def test_methods_that_read_gradients_get_them(method, pools, tmp_path, capsys, monkeypatch):
    """Two rounds of a run that probes gradients; a planner that offers none is refused before any work."""
    given = arguments(pools, tmp_path / "run", f"ascent.method={method}", "loop.baselines=[]")
    run_local(load_config(None, given), Console(quiet=True))
    (probe, *_) = sorted((tmp_path / "run").glob("stages/gradients-*.json"))
    values = json.loads(probe.read_text())["body"]["values"]
    assert len(values["gradient_alignment_K"]) == len(values["gradient_gram_KK"]) >= 2
    assert all(row[k] > 0 for k, row in enumerate(values["gradient_gram_KK"]))
    refused = [f"placement.run_dir={tmp_path / 'no'}", "planner.factory=straight_planner:make_planner"]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fixtures" / "external_planner"))
    fails(
        ["run", "--backend", "local", *given, *refused], capsys, ["ascent.method", method, "straight_planner"]
    )
    assert not (tmp_path / "no").exists()


def test_without_faiss(pools, tmp_path):
    code = "import sys; sys.modules['faiss'] = None; from autoscale_ray.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "run", "--backend", "local", *arguments(pools, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "faiss" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_budget_beyond_the_pool_is_allowed_and_said(pools, tmp_path, capsys):
    """What is said holds where near-duplicates are left out too: a round asks for all and may get fewer."""
    given = arguments(pools, tmp_path / "run", "loop.budget=5000", "loop.num_rounds=0", "loop.baselines=[]")
    main(["run", "--backend", "local", *given])
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("larger than the pool: every round asks for all 160 scenes") == 1


def test_scenes_that_cannot_be_scored_are_counted_where_scores_are_read(
    finished, pools, tmp_path, monkeypatch, capsys
):
    """Missing is not zero, and not hidden either."""
    assert numbers(finished)["unscored"] == {"dev": 0, "test": 0}
    assert "without a score" not in (finished / "report.html").read_text()
    drive = tasks_scores.reference_drives

    def without_one(pool, folder: Path) -> dict:
        told, path = drive(pool, folder), folder / "epdms.npy"
        poses_NP3 = np.load(path)
        poses_NP3[0] = np.nan
        np.save(path, poses_NP3)
        return {"unscored": {**told["unscored"], "epdms": {pool.scene_ids[0].item(): "no drive"}}}

    monkeypatch.setattr(tasks_scores, "reference_drives", without_one)
    given = arguments(pools, tmp_path / "run", "loop.num_rounds=0", "loop.baselines=[]")
    main(["run", "--backend", "local", *given])
    told = " ".join(capsys.readouterr().out.split())
    for side in ("dev", "test"):
        assert told.count(f"scenes without a score, in no mean: 1 of {side}") == 1
    found = numbers(tmp_path / "run")
    assert found["unscored"] == {"dev": 1, "test": 1}
    clusters, first = found["clusters"], found["rounds"][0]
    assert sum(one["dev"] for one in clusters) == len(open_pool(pools / "dev")) - 1
    by_cluster = sum(one["dev_weight"] * (first["cluster_scores"][one["id"]] or 0.0) for one in clusters)
    assert by_cluster == pytest.approx(first["totals"]["objective"]), "what is optimised is what is told"
    report = (tmp_path / "run" / "report.html").read_text()
    assert "scenes without a score, in no mean: 1 of dev, 1 of test" in report


@pytest.mark.parametrize("name", ["spent", "gains", "rounds", "clusters"])
def test_a_damaged_summary_gives_no_report_and_one_line(name, finished, tmp_path, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, name: [3]}))
    fails(["report", str(tmp_path)], capsys, [str(tmp_path / "summary.json"), "is damaged"])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "more", [["--out", "x.docx"], ["--out", "."], ["--out", "x.png", "--num-scenes", "0"]]
)
def test_a_sheet_that_cannot_be_drawn_is_one_line(more, pools, capsys):
    fails(["pool", "plot", str(pools / "dev"), *more], capsys, [more[-2]])


def fails(command: list[str], capsys, parts: list[str] | None = None) -> list[str]:
    """Run a command that must fail with one line; return the parts that its line must hold."""
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("autoscale: ")
    assert error.count("\n") == 1
    wanted = parts if parts is not None else ["loop.budget", "40", "50"]
    for part in wanted:
        assert part in error, error
    return wanted


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def weigh(pools: Path, columns: dict) -> None:
    pq.write_table(pa.table(columns), pools / "dev" / "weights.parquet")


def same_logs(pools: Path) -> None:
    shutil.rmtree(pools / "test")
    shutil.copytree(pools / "dev", pools / "test")
    assert pq.read_metadata(next((pools / "test").glob("scenes*.parquet"))).num_rows > 0
