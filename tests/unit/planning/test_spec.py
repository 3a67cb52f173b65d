from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import OnePool, make_batch

from autoscale_ray import tasks
from autoscale_ray.config import PlannerConfig
from autoscale_ray.errors import ConfigError
from autoscale_ray.planning.spec import load_planner_spec

OUTSIDE = Path(__file__).parents[2] / "fixtures" / "external_planner"


def drive(path: str, config: PlannerConfig, folder: Path) -> np.ndarray:
    spec = load_planner_spec(path, config)
    parts = [spec.features(OnePool(20)), spec.features(OnePool(10))]
    features = spec.concatenate(parts)
    weights = spec.train(features, np.arange(24), 0)
    spec.save_weights(weights, folder)
    spec.save_features(features, folder)
    weights, features = spec.load_weights(folder), spec.load_features(folder)
    value, valid = spec.miou(weights, features, np.arange(24, 30))
    assert value.shape == valid.shape == (6,)
    return spec.predict(weights, features, np.arange(24, 30))


def test_built_in_planner_goes_through_its_spec(config, tmp_path):
    poses = drive(PlannerConfig().factory, config, tmp_path)
    assert poses.shape == (6, 8, 3)
    assert poses[..., 0].max() > 3.0


@pytest.mark.parametrize("factory", [PlannerConfig().factory, "straight_planner:make_planner"])
def test_features_of_a_pool_are_stored_with_and_without_a_way_to_write_them_in_pieces(
    config, tmp_path, monkeypatch, factory
):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    spec = load_planner_spec(factory, config)
    assert (spec.write_features is None) == (factory != PlannerConfig().factory)
    (tmp_path / "stage").mkdir()
    (tmp_path / "saved").mkdir()
    tasks.pool_features(replace(config, factory=factory), OnePool(20), tmp_path / "stage")
    spec.save_features(spec.features(OnePool(20)), tmp_path / "saved")
    stored = {path.name: path.read_bytes() for path in (tmp_path / "stage").iterdir()}
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}


def test_a_planner_outside_the_tree_is_found_by_its_dotted_path(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    poses = drive("straight_planner:make_planner", config, tmp_path)
    speed_mps = float(make_batch(20).ego_states_NT7[:, 5:13, 3].mean())
    assert poses[0, 7, 0] == pytest.approx(4.0 * speed_mps, rel=0.2)
    assert not poses[..., 1:].any()


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("straight_planner", "package.module:function"),
        (":make_planner", "package.module:function"),
        ("no_such_package.planner:make", "cannot import module no_such_package.planner"),
        ("straight_planner:missing", "has no function missing"),
        ("straight_planner:TIMES_S", "has no function TIMES_S"),
        ("straight_planner:wrong_type", "must return a PlannerSpec"),
        ("os:getcwd", "failed: TypeError"),
        ("this_planner_is_broken:make", "cannot import module this_planner_is_broken: division by zero"),
    ],
)
def test_wrong_paths_give_one_clear_line(config, monkeypatch, tmp_path, path, rule):
    (tmp_path / "this_planner_is_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(OUTSIDE))
    with pytest.raises(ConfigError, match=rule) as caught:
        load_planner_spec(path, config)
    assert "\n" not in str(caught.value)
