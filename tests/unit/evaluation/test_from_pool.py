"""Pools as scoring scenes: planned poses through the pool path equal the scorer called directly."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from autoscale_ray.config import WorldConfig
from autoscale_ray.evaluation import epdms, pdms
from autoscale_ray.evaluation.from_pool import prepare_pool, score_pool, scoring_scenes
from autoscale_ray.evaluation.score_pool import score_trajectory_file
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.world.pools import make_pool


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
    assert table["scene_id"].to_pylist() == pool.scene_ids.tolist()
    for row, (_, scene) in enumerate(scoring_scenes(pool)):
        direct = epdms([scene], poses[row][None, None])
        np.testing.assert_allclose(table["epdms"][row].as_py(), float(direct.score.value), atol=1e-12)
        older = pdms([scene], poses[row][None, None])
        np.testing.assert_allclose(table["pdms"][row].as_py(), float(older.score.value), atol=1e-12)
    scores = table["epdms"].to_numpy()
    assert scores[1::2].mean() > scores[::2].mean()


def test_stored_references_give_the_same_scores(pool, poses):
    first = prepare_pool(pool)
    again = prepare_pool(pool, {version: first.references(version) for version in ("epdms", "pdms")})
    before, after = score_pool(first, poses), score_pool(again, poses)
    for name in ("epdms", "pdms", "ego_progress"):
        np.testing.assert_allclose(after[name].to_numpy(), before[name].to_numpy(), atol=1e-9)


def test_command_reports_unknown_scenes_and_scores_the_rest(pool, poses, tmp_path):
    names = [*pool.scene_ids.tolist()[:3], "nowhere"]
    np.savez(tmp_path / "plans.npz", scene_id=np.array(names), trajectories=poses[:4, None])
    counts = score_trajectory_file(tmp_path / "plans.npz", pool.path, tmp_path / "out.parquet")
    assert counts == {"scored": 6, "invalid": 2}
    table = pq.read_table(tmp_path / "out.parquet")
    bad = table.filter(~np.array(table["valid"].to_pylist()))
    assert set(bad["scene_id"].to_pylist()) == {"nowhere"}
    assert bad["score"].null_count == 2
    expected = score_pool(prepare_pool(pool), poses)["epdms"].to_numpy()[:3]
    newer = table.filter(np.array(table["version"].to_pylist()) == "v2")["score"].to_numpy(
        zero_copy_only=False
    )
    np.testing.assert_allclose(newer[:3], expected, atol=1e-9)
