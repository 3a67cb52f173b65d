"""A run whose dev or test side has no scene with a score is refused before anything is trained."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoscale_ray import tasks_scores
from autoscale_ray.config_file import load_config
from autoscale_ray.inputs import open_inputs
from autoscale_ray.scenes.pool_writer import write_pool
from tests.unit.evaluation.polygons import without_polygons
from tests.unit.test_session import SIDES, TINY, fails


@pytest.mark.parametrize("side", ["dev", "test"])
def test_weights_of_scenes_without_a_score_alone_are_refused_before_training(
    side, tmp_path, capsys, monkeypatch
):
    inputs = open_inputs(load_config(None, TINY), tmp_path / "world")
    pool, drive = inputs.pools[side], tasks_scores.reference_drives
    weights = np.zeros(len(pool))
    weights[3] = 2.0
    table = pa.table({"scene_id": pool.scene_ids.tolist(), "weight": weights})
    pq.write_table(table, pool.path / "weights.parquet")

    def without_one(given, folder):
        unscored = drive(given, folder)["unscored"]
        lost = {pool.scene_ids[3].item(): "no drive"} if given.path == pool.path else {}
        return {"unscored": {**unscored, "epdms": lost}}

    monkeypatch.setattr(tasks_scores, "reference_drives", without_one)
    given = [*TINY, *(f"data.{side}={inputs.pools[side].path}" for side in SIDES)]
    told = [f"{pool.path}: must hold a scene that has a weight and that epdms can score"]
    fails(["run", "--backend", "local", *given, f"placement.run_dir={tmp_path / 'run'}"], capsys, told)
    assert not list((tmp_path / "run" / "stages").glob("train-*"))


@pytest.mark.parametrize(("side", "objective"), [("dev", "epdms"), ("test", "pdms")])
def test_a_side_without_a_road_is_refused_before_training(side, objective, tmp_path, capsys):
    inputs = open_inputs(load_config(None, TINY), tmp_path / "world")
    pools = {name: inputs.pools[name] for name in SIDES}
    table = without_polygons(pools[side].table(np.arange(len(pools[side]))))
    write_pool(tmp_path / "no_map", [table])
    paths = {name: pool.path for name, pool in pools.items()} | {side: tmp_path / "no_map"}
    given = [
        *TINY,
        *(f"data.{name}={path}" for name, path in paths.items()),
        f"evaluation.objective={objective}",
    ]
    told = [
        f"{tmp_path / 'no_map'}: must hold a scene that {objective} can score",
        "polygon_layers: must hold a drivable area",
    ]
    fails(["run", "--backend", "local", *given, f"placement.run_dir={tmp_path / 'run'}"], capsys, told)
    assert not list((tmp_path / "run" / "stages").glob("train-*"))
