"""What a sweep is asked for is what its trials get; read without a cluster."""

from pathlib import Path

import pytest

from autoscale_ray.distributed.sweep_plan import Range, read_plan, read_values, with_swept
from autoscale_ray.errors import ConfigError


def test_a_file_named_like_a_swept_field_is_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text("loop: {num_rounds: 3}")
    plan = read_plan(["sweep.yaml", "sweep.loop.budget=20,60"])
    assert (list(plan.space), plan.base.loop.num_rounds) == (["loop.budget"], 3)
    with pytest.raises(ConfigError, match=r"sweep\.loop\.budget: no such configuration file"):
        read_plan(["sweep.loop.budget", "sweep.seed=0,1"])


def test_trials_get_the_values_that_were_named():
    plan = read_plan(["sweep.world.preset=even,null"])
    presets = [
        with_swept(plan.sections, {"world.preset": value}).world.preset
        for value in plan.space["world.preset"]
    ]
    assert presets == ["even", "null"]
    folder = Path("/runs/a #1: \u00fc")
    assert with_swept(plan.sections, {"placement.run_dir": folder}).placement.run_dir == str(folder)


def test_trials_that_run_elsewhere_find_what_was_named_here(tmp_path, monkeypatch):
    """Tune gives every trial a working directory of its own: the file and relative pools were not found there."""
    here, elsewhere = tmp_path / "here", tmp_path / "trial"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    Path("run.yaml").write_text("{data: {synthetic: pools/a}, loop: {num_rounds: 3}, seed: 7}")
    plan = read_plan(["run.yaml", "data.dev=dev", "sweep.data.real=../x,../y"])
    monkeypatch.chdir(elsewhere)
    real = plan.space["data.real"]
    assert real == [str(tmp_path / "x"), str(tmp_path / "y")]
    config = with_swept(plan.sections, {"data.real": real[1], "placement.run_dir": tmp_path / "t"})
    assert (config.data.synthetic, config.data.dev, config.data.real) == (
        f"{here}/pools/a", f"{here}/dev", str(tmp_path / "y"))  # fmt: skip
    assert (config.loop.num_rounds, config.seed) == (3, 7)


def test_a_sweep_is_another_one_where_anything_that_bears_on_its_trials_is():
    def name(*arguments: str) -> str:
        return read_plan(["sweep.loop.budget=20,60", *arguments]).name

    others = ["loop.num_rounds=3", "sweep.early_stop=false", "data.real=pools/real", "sweep.at_once=3"]
    others += [
        "placement.ray.num_trainers=2",
        "placement.run_dir=elsewhere",
    ]  # Tune would restore the old ones
    assert name() == name()
    assert len({name(), *map(name, others)}) == 7


def test_one_folder_named_in_two_ways_is_named_twice():
    with pytest.raises(ConfigError, match=r"sweep\.data\.real: must name a value at most once"):
        read_plan(["sweep.data.real=pools/a,./pools/a"])


def test_a_range_of_fractions_is_refused_for_whole_numbers():
    with pytest.raises(ConfigError, match=r"loop\.budget"):
        read_plan(["sweep.loop.budget=1e2..1e3", "sweep.search=optuna", "sweep.num_trials=2"])
    plan = read_plan(["sweep.ascent.floor_final=1e-3..1e-1", "sweep.search=optuna", "sweep.num_trials=2"])
    assert plan.space == {"ascent.floor_final": Range(1e-3, 1e-1)}


def test_numbers_are_numbers_also_where_yaml_wants_a_point():
    assert read_values("planner.learning_rate", "1e-4,3e-4") == [1e-4, 3e-4]
    assert read_values("planner.learning_rate", "1e-4..1e-2") == Range(1e-4, 1e-2)
    assert read_values("data.real", "1e-4x,e-4") == ["1e-4x", "e-4"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["sweep.loop.budget=20", "sweep.loop.budget=60"],
            r"sweep\.loop\.budget: must be given at most once",
        ),
        (["sweep.placement.run_dir=a,b"], r"sweep\.placement\.run_dir: every trial has a folder of its own"),
    ],
)
def test_what_would_be_lost_is_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        read_plan(arguments)


def test_a_range_lies_between_two_numbers_and_paths_are_values():
    above = Path.cwd().parent
    assert read_plan(["sweep.data.real=../a,../b"]).space == {"data.real": [f"{above}/a", f"{above}/b"]}
    assert read_values("data.real", '"../a","../b"') == ["../a", "../b"]
    assert read_values("ascent.floor_explore", "0.1...5") == Range(0.1, 0.5)
    with pytest.raises(ConfigError, match=r"loop\.budget: .*integer.*20\.\.many"):
        read_plan(["sweep.loop.budget=20..many"])


def test_a_value_is_named_once():
    with pytest.raises(
        ConfigError, match=r"sweep\.loop\.budget: must name a value at most once \(found 20\)"
    ):
        read_plan(["sweep.loop.budget=20,60,20"])


def test_a_value_that_no_run_takes_is_refused_before_any_trial():
    """It used to end in a KeyError inside a trial."""
    with pytest.raises(ConfigError, match=r"ascent\.method: must be one of .*response.*\(found 'nonsense'\)"):
        read_plan(["sweep.ascent.method=response,nonsense"])
