"""Pools as scoring scenes: planned poses through the pool path equal the scorer called directly."""

import numpy as np
import pyarrow as pa
import pytest

from autoscale_ray.config import WorldConfig
from autoscale_ray.errors import PoolError
from autoscale_ray.evaluation import epdms, pdms
from autoscale_ray.evaluation.from_pool import (
    SCORE_COLUMNS,
    drive_references,
    prepare_pool,
    score_pool,
    scoring_scenes,
)
from autoscale_ray.evaluation.score_rows import score_rows
from autoscale_ray.scenes.pool import open_pool, write_pool
from autoscale_ray.scenes.schema import POLYGON_LAYERS
from autoscale_ray.world.pools import make_pool
from tests.unit.evaluation.polygons import with_polygon, without_polygons


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "dev"
    make_pool(WorldConfig(num_dev_per_family=1), "dev", path)
    return open_pool(path)


@pytest.fixture(scope="module")
def poses(pool):
    """The logged drives, half of them braking hard, so that scores differ."""
    scenes = [scene for _, scene in scoring_scenes(pool)]
    plans = np.stack([scene.human_poses for scene in scenes])
    plans[::2, :, :2] *= np.linspace(1.0, 0.4, 8)[:, None]
    return plans


def test_scores_equal_the_scorer_called_scene_by_scene(pool, poses):
    prepared = prepare_pool(pool)
    table = score_pool(prepared, poses)
    assert set(table.column_names) == {"scene_id", *SCORE_COLUMNS}
    assert table["scene_id"].to_pylist() == pool.scene_ids.tolist()
    for row, (_, scene) in enumerate(scoring_scenes(pool)):
        direct = epdms([scene], poses[row][None, None])
        np.testing.assert_allclose(table["epdms"][row].as_py(), float(direct.score.value), atol=1e-12)
        older = pdms([scene], poses[row][None, None])
        np.testing.assert_allclose(table["pdms"][row].as_py(), float(older.score.value), atol=1e-12)
    scores = table["epdms"].to_numpy()
    assert scores[1::2].mean() > scores[::2].mean()


def test_stored_references_give_the_same_scores(pool, poses):
    references, reasons = drive_references(pool)
    first, again = prepare_pool(pool), prepare_pool(pool, references)
    assert reasons == first.reasons
    before, after = score_pool(first, poses), score_pool(again, poses)
    for name in ("epdms", "pdms", "ego_progress"):
        np.testing.assert_allclose(after[name].to_numpy(), before[name].to_numpy(), atol=1e-9)


def test_a_previous_scene_too_far_away_is_refused_before_anything_is_scored(pool, tmp_path):
    table = pool.table(np.arange(2))
    ids = table["scene_id"].to_pylist()
    for name, values in (("prev_scene_id", [None, ids[0]]), ("timestamp_us", [0, 550_000])):
        place = table.schema.get_field_index(name)
        table = table.set_column(
            place, table.schema.field(name), pa.array(values, table.schema.field(name).type)
        )
    write_pool(tmp_path / "far", [table])
    line = f"{tmp_path / 'far'}: {ids[1]}: prev_scene_id: must name a scene less than 0.55 s earlier (found 0.55)"
    with pytest.raises(PoolError) as refused:
        prepare_pool(open_pool(tmp_path / "far"))
    with pytest.raises(PoolError, match="prev_scene_id"):
        drive_references(open_pool(tmp_path / "far"))
    assert str(refused.value) == line


def test_without_a_drivable_area_there_is_no_score_that_could_only_be_zero(pool, tmp_path):
    write_pool(tmp_path / "no_map", [without_polygons(pool.table(np.arange(2)))])
    opened = open_pool(tmp_path / "no_map")
    rule = "polygon_layers: must hold a drivable area, else every trajectory is off the road"
    reasons = {str(name): f"{name}: {rule}" for name in opened.scene_ids}
    prepared = prepare_pool(opened)
    assert prepared.reasons == {"epdms": reasons, "pdms": reasons}
    scores = score_pool(prepared, np.zeros((2, 8, 3)))
    assert scores["pdms"].to_pylist() == scores["epdms"].to_pylist() == [None, None]
    assert set(scores.column_names) == {"scene_id", *SCORE_COLUMNS}
    plans = {name: np.zeros((1, 8, 3)) for name in reasons}
    scored, refused = score_rows(plans, tmp_path / "no_map")
    assert scored == []
    assert [(item.version, item.reason) for item in refused] == [
        (version, reason) for reason in reasons.values() for version in ("v1", "v2")
    ]


@pytest.mark.parametrize("layer", ["roadblock", "intersection", "carpark_area"])
def test_any_layer_of_the_drivable_area_is_enough(layer, pool, tmp_path):
    table = with_polygon(pool.table(np.arange(2)), POLYGON_LAYERS.index(layer))
    write_pool(tmp_path / "square", [table])
    opened = open_pool(tmp_path / "square")
    scenes = [scene for _, scene in scoring_scenes(opened)]
    scores = score_pool(prepare_pool(opened), np.stack([scene.human_poses for scene in scenes]))
    assert scores["drivable_area_compliance"].to_pylist() == [1.0, 1.0]
