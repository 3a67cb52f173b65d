"""What a sweep is asked for is what its trials get; read without a cluster."""

from pathlib import Path

import pytest

from autoscale_ray.distributed.sweep_plan import Range, config_of, read_plan, read_values
from autoscale_ray.errors import ConfigError


def test_a_file_named_like_a_swept_field_is_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text("loop: {num_rounds: 3}")
    plan = read_plan(["sweep.yaml", "sweep.loop.budget=20,60"])
    assert (plan.arguments, plan.base.loop.num_rounds) == (("sweep.yaml",), 3)
    with pytest.raises(ConfigError, match=r"sweep\.loop\.budget: no such configuration file"):
        read_plan(["sweep.loop.budget", "sweep.seed=0,1"])


def test_trials_get_the_values_that_were_named():
    plan = read_plan(["sweep.world.preset=even,null"])
    presets = [
        config_of(plan.arguments, {"world.preset": value}).world.preset
        for value in plan.space["world.preset"]
    ]
    assert presets == ["even", "null"]
    folder = Path("/runs/a #1: \u00fc")
    assert config_of([], {"placement.run_dir": folder}).placement.run_dir == str(folder)


def test_a_range_lies_between_two_numbers_and_paths_are_values():
    assert read_plan(["sweep.data.real=../a,../b"]).space == {"data.real": ["../a", "../b"]}
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
