"""What the command line itself answers, whatever the command: help, version, refused paths, Ctrl-C."""

import errno
import inspect
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import autoscale_ray
from autoscale_ray import session
from autoscale_ray.cli import COMMANDS, ON_RUNS, _config, main
from autoscale_ray.config import WorldConfig
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.readers import READERS
from autoscale_ray.world.pools import make_pool


def ended(arguments: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, capsys.readouterr().err


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"autoscale {autoscale_ray.__version__}\n"


def test_help_of_ingest_names_every_reader(capsys):
    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert set(READERS) <= set(words)


@pytest.mark.parametrize("command", [["world", "--out"], ["run", "--backend", "local", "--out"]])
def test_a_folder_that_cannot_be_made_is_one_line(command, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    code, told = ended([*command, str(tmp_path / "file" / "out")], capsys)
    assert (code, told.count("\n")) == (2, 1)
    assert str(tmp_path / "file") in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["7", "null", "a: b", "a #1", "[x]", "\u00fc 'x' \"y\""])
def test_out_is_a_folder_whatever_yaml_reads_in_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _config(["loop.budget=7"], name).placement.run_dir == name


@pytest.mark.parametrize(
    "command",
    [
        "world --out s3://bucket/pools",
        "world --plot=s3://bucket/plots",
        "ingest commonroad scenarios --domain real --out s3://bucket/pool",
        "simulate sumo --out gs://bucket/pool",
        "pool info s3://bucket/pool",
        "pool split pool --out s3://bucket/pools",
        "pool plot pool --out s3://bucket/sheet.png",
        "score plans.npz pool --out s3://bucket/scores.parquet",
    ],
)
def test_a_url_where_only_a_local_path_is_known_is_one_line(command, tmp_path, monkeypatch, capsys):
    """As a path it used to be a folder named `s3:`."""
    monkeypatch.chdir(tmp_path)
    code, told = ended(command.split(), capsys)
    assert (code, told.count("\n")) == (2, 1)
    assert "://bucket/" in told
    assert "must be a local path: only a run folder may lie in a bucket" in told
    assert list(tmp_path.iterdir()) == []


def test_every_command_on_a_run_takes_the_url_of_one():
    """A run folder is text where it may be a URL: a path would turn s3:// into s3:/."""
    on_runs = {
        name
        for name, command in COMMANDS.items()
        if {"run_dir", "arguments"} & inspect.signature(command).parameters.keys()
    }
    assert on_runs == set(ON_RUNS)


@pytest.mark.parametrize(
    "words",
    [
        "run.yaml loop.budget=7 planner.num_steps=5 --out a=b --backend local",
        "run.yaml --out a=b loop.budget=7 --backend local planner.num_steps=5",
        "--out a=b --backend local run.yaml loop.budget=7 planner.num_steps=5",
        "--backend=local run.yaml loop.budget=9 --out=a=b loop.budget=7 planner.num_steps=5",
    ],
)
def test_overrides_may_stand_behind_options_and_the_last_one_counts(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    runs = []
    monkeypatch.setattr(session, "run_local", lambda config, console: runs.append(config))
    main(["run", *words.split()])
    [config] = runs
    assert (config.seed, config.loop.budget, config.planner.num_steps) == (3, 7, 5)
    assert config.placement.run_dir == "a=b"


@pytest.mark.parametrize("command", ["run --backend local", "embed"])
def test_out_of_a_run_may_be_a_url(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, told = ended([*command.split(), "--out", "ftp://bucket/run"], capsys)
    assert (code, told) == (2, "autoscale: ftp: a run directory is a local path or one of s3, gs, az://\n")
    assert _config([], "s3://bucket/run").placement.run_dir == "s3://bucket/run"
    assert list(tmp_path.iterdir()) == []


def test_info_lists_twenty_logs_and_counts_the_rest(tmp_path, capsys):
    make_pool(WorldConfig(num_real=40), "real", tmp_path / "pool")
    num_logs = len(set(open_pool(tmp_path / "pool").log_ids.tolist()))
    assert num_logs > 21
    main(["pool", "info", str(tmp_path / "pool")])
    told = capsys.readouterr().out
    assert f"scenes_by_log: {num_logs}" in told
    assert f"and {num_logs - 20} more" in told


def test_words_that_the_terminal_does_not_know_end_nothing(tmp_path):
    """A row of a table with `±` used to end a run after its first round where output is ASCII."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    folder = tmp_path / "\u00fc"
    make_pool(WorldConfig(num_real=4), "real", folder)
    command = [sys.executable, "-m", "autoscale_ray.cli", "pool", "info", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"num_scenes: 4" in done.stdout


def test_an_argument_that_is_no_text_is_one_line(capsys):
    code, told = ended(["pool", "info", "pools/\udcff"], capsys)
    assert (code, told) == (2, "autoscale: 'pools/\\udcff': arguments must be UTF-8 text\n")


@pytest.mark.parametrize(
    ("out", "rule"),
    [
        ("scores.json", "ends in .parquet"),
        ("nowhere/scores.parquet", "existing folder"),
        ("plans.parquet", "must not be the file of trajectories"),
    ],
)
def test_scores_go_to_a_parquet_file_of_their_own(out, rule, tmp_path, capsys):
    plans = tmp_path / "plans.parquet"
    plans.write_bytes(b"plans")
    code, told = ended(["score", str(plans), "pool", "--out", str(tmp_path / out)], capsys)
    assert (code, told.count("\n")) == (2, 1)
    assert rule in told
    assert plans.read_bytes() == b"plans"


def test_world_draws_its_families_and_says_what_it_needs(tmp_path, capsys):
    code, told = ended(["world"], capsys)
    assert (code, told.count("\n")) == (2, 1)
    assert "--plot FOLDER" in told
    main(["world", "--plot", str(tmp_path / "out")])
    assert (tmp_path / "out" / "families.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["families.png"]


def test_a_world_that_was_interrupted_leaves_no_side(tmp_path, monkeypatch):
    def interrupted(config, side, path):
        if side == "test":
            raise KeyboardInterrupt
        path.mkdir(parents=True)
        return SimpleNamespace(num_scenes=0)

    monkeypatch.setattr("autoscale_ray.world.pools.make_pool", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["world", "--out", str(tmp_path / "pools")])
    assert list((tmp_path / "pools").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_quota_that_is_full_is_one_line(number, monkeypatch, capsys):
    def full() -> None:
        raise OSError(number, os.strerror(number))  # as from a write, which knows no path

    monkeypatch.setitem(COMMANDS, "report", full)
    assert ended(["report"], capsys) == (2, f"autoscale: storage: {os.strerror(number)}\n")


def test_a_side_that_is_there_is_told_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "file").touch()
    code, told = ended(["world", "--out", str(tmp_path), "--plot", str(tmp_path / "plots")], capsys)
    assert (code, told.count("\n")) == (2, 1)
    assert f"{tmp_path / 'test'}: already exists" in told
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_ctrl_c_is_one_line(tmp_path):
    out = tmp_path / "pools"
    # A shell in the background has its children ignore SIGINT; the program asks for it as a terminal would.
    told_to = "signal.signal(signal.SIGINT, signal.default_int_handler); main(sys.argv[1:])"
    code = f"import signal, sys; from autoscale_ray.cli import main; {told_to}"
    program = [sys.executable, "-c", code, "world", "--out", str(out)]
    with subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out.exists() and any(out.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.01)  # polling another process until it draws a pool; imports may swallow the signal
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "autoscale: interrupted\n")
    assert list(out.iterdir()) == []
