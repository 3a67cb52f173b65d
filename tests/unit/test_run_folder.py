"""A run takes no folder in which it would overwrite files that are not its own."""

from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoscale_ray.config_file import load_config
from autoscale_ray.distributed.driver import driver_name
from autoscale_ray.errors import ConfigError, PoolError, SplitLeakError
from autoscale_ray.inputs import open_inputs, scene_weights
from autoscale_ray.run_folder import check_free, local_folder
from tests.unit.test_session import TINY, fails


@pytest.mark.parametrize(
    "name", ["config.yaml", "summary.json", "report.html", "selection.csv", "manifest.json"]
)
def test_files_of_others_are_left_alone(name, tmp_path, capsys):
    own = tmp_path / name
    own.write_text("# mine")
    given = ["run", "--backend", "local", *TINY, f"placement.run_dir={tmp_path}"]
    fails(given, capsys, [f"{own}: is of no run and would be overwritten: take another run folder"])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert own.read_text() == "# mine"


@pytest.mark.parametrize("mark", ["run.json", "journal"])
def test_a_folder_of_a_run_goes_on(mark, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="is of no run"):
        check_free(str(tmp_path))
    (tmp_path / mark).mkdir()
    check_free(str(tmp_path))


def test_slashes_at_the_end_of_a_url_are_no_other_run():
    assert local_folder("s3://bucket/run/") == local_folder("s3://bucket/run")
    assert driver_name("s3://bucket/run//") == driver_name("s3://bucket/run") != driver_name("s3://bucket/ru")


def test_synthetic_scenes_may_be_of_the_logs_that_are_trained_on_and_of_no_other(tmp_path):
    made = open_inputs(load_config(None, TINY), tmp_path / "world").pools
    paths = {side: made[side].path for side in made}
    for synthetic, refused in (("real", None), ("dev", "synthetic and dev"), ("test", "synthetic and test")):
        named = [f"data.{side}={path}" for side, path in (paths | {"synthetic": paths[synthetic]}).items()]
        with nullcontext() if refused is None else pytest.raises(SplitLeakError, match=refused):
            open_inputs(load_config(None, [*TINY, *named]), tmp_path)


def test_weights_whose_sum_is_no_number_are_refused(tmp_path):
    pool = open_inputs(load_config(None, TINY), tmp_path / "world").pools["dev"]
    weights = np.full(len(pool), 1e308)
    pq.write_table(
        pa.table({"scene_id": pool.scene_ids.tolist(), "weight": weights}), pool.path / "weights.parquet"
    )
    with pytest.raises(PoolError, match="of a finite sum"):
        scene_weights(pool, True)


def test_a_report_of_a_folder_that_is_no_run_leaves_nothing_there(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"of": "another program"}')
    fails(["report", str(tmp_path)], capsys, [str(tmp_path / "summary.json"), "is damaged"])
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
