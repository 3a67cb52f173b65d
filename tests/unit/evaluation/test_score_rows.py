"""`autoscale score` of a pool gives the very numbers of the loop, scene by scene; what it cannot score it says why."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoscale_ray.cli import EXIT_NONE_SCORED, main
from autoscale_ray.config import WorldConfig
from autoscale_ray.evaluation import epdms, score_rows
from autoscale_ray.evaluation.combine import COLUMNS_V1, COLUMNS_V2
from autoscale_ray.evaluation.from_pool import prepare_pool, score_pool, scoring_scenes
from autoscale_ray.extras import has_numba
from autoscale_ray.scenes.pool import open_pool, write_pool
from autoscale_ray.scenes.schema import NUM_FRAMES
from autoscale_ray.world.pools import make_pool

HALF_SECOND_US = 500_000
WITHOUT_V1, BROKEN = 1, 2
"""Scenes of the pool without a fifth second, and with a speed limit below zero."""


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Scenes and, half a second later, each of them again; one lacks the fifth second, one breaks a rule."""
    folder = tmp_path_factory.mktemp("pool")
    make_pool(WorldConfig(num_dev_per_family=1), "dev", folder / "world")
    first = open_pool(folder / "world").table()
    valid, limits = first["ego_valid"].to_pylist(), first["route_speed_limit_mps"].to_pylist()
    valid[WITHOUT_V1] = [frame < NUM_FRAMES - 2 for frame in range(NUM_FRAMES)]
    limits[BROKEN] = -1.0
    first = replaced(replaced(first, "ego_valid", valid), "route_speed_limit_mps", limits)
    names, times_us = first["scene_id"].to_pylist(), first["timestamp_us"].to_numpy()
    again = replaced(first, "scene_id", [f"{name}/again" for name in names])
    again = replaced(again, "timestamp_us", (times_us + HALF_SECOND_US).tolist())
    again = replaced(again, "prev_scene_id", names)
    limits[BROKEN] = 13.0  # only the scene before it is broken
    again = replaced(again, "route_speed_limit_mps", limits)
    write_pool(folder / "pool", [first, again])
    return open_pool(folder / "pool")


@pytest.fixture(scope="module")
def poses(pool):
    """The logged drives; every other scene brakes hard the second time."""
    frames = np.stack([np.reshape(row, (NUM_FRAMES, 7)) for row in pool.list_column("ego_states")])
    plans = frames[:, 5:13, :3].astype(np.float64)
    plans[len(plans) // 2 :: 2, :, :2] *= np.linspace(1.0, 0.4, 8)[:, None]
    return plans


def scored(pool, names, trajectories, folder, *more: str) -> list[dict]:
    np.savez(folder / "plans.npz", scene_id=np.array(names), trajectories=trajectories)
    main(["score", str(folder / "plans.npz"), str(pool.path), "--out", str(folder / "out.parquet"), *more])
    return pq.read_table(folder / "out.parquet").to_pylist()


def test_a_pool_scored_by_the_command_has_the_numbers_of_the_loop(pool, poses, tmp_path):
    """Every score, sub-score and what is missing, extended comfort included.

    To the last bit where numba is installed; plain torch may round a batch of scenes otherwise than one scene.
    """
    loop = score_pool(prepare_pool(pool), poses).to_pylist()
    rows = scored(pool, pool.scene_ids, poses[:, None], tmp_path)
    assert len(rows) == 2 * len(pool)
    by_version = {(row["version"], row["scene_id"]): row for row in rows}
    tolerance = 0.0 if has_numba() else 1e-12
    names = {("v2", f"filtered_{name}"): name for name in COLUMNS_V2}
    names |= {("v2", "two_frame_extended_comfort"): "extended_comfort", ("v2", "score_with_comfort"): "epdms"}
    names |= {("v1", "score"): "pdms", ("v1", "filtered_comfort"): "pdms_comfort"}
    assert set(names.values()) | {"scene_id"} == set(loop[0])
    for (version, found), name in names.items():
        values = [by_version[version, row["scene_id"]][found] for row in loop]
        ours, theirs = (
            np.array(column, dtype=np.float64) for column in (values, [row[name] for row in loop])
        )
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=tolerance, err_msg=name)  # NaN where null
    comfort = [row["extended_comfort"] for row in loop]
    half = len(pool) // 2
    assert comfort[:half] == [None] * half
    assert {row for row in comfort[half:] if row is not None} == {0.0, 1.0}
    assert len({round(row["epdms"], 3) for row in loop if row["epdms"] is not None}) > 5, (
        "else equality says little"
    )
    assert [row["epdms"] is None for row in loop] == [row == BROKEN for row in range(len(loop))]
    assert comfort[half + BROKEN] is None, "the scene before was not scored"
    assert sum(row["pdms"] is None for row in loop) == 3


def test_columns_and_summary(pool, poses, tmp_path, capsys):
    rows = scored(pool, pool.scene_ids, poses[:, None], tmp_path)
    both = [f"{kind}_{name}" for name in {*COLUMNS_V1, *COLUMNS_V2} for kind in ("raw", "filtered")]
    about = ("version", "scene_id", "trajectory", "valid", "reason", "traffic", "raw_score", "score")
    more = ("two_frame_extended_comfort", "score_with_comfort")
    assert sorted(rows[0]) == sorted([*about, *both, *more])
    summary = json.loads((tmp_path / "out.json").read_text())
    good = [row for row in rows if row["valid"]]
    assert (summary["scored"], summary["invalid"]) == (len(good), len(rows) - len(good)) == (len(good), 4)
    for version, names in (("v1", COLUMNS_V1), ("v2", COLUMNS_V2)):
        own = [row for row in good if row["version"] == version]
        for name in names:
            mean = np.mean([row[f"filtered_{name}"] for row in own])
            assert summary[f"mean_{version}"][name] == pytest.approx(mean, abs=1e-12)
        mean = np.mean([row["score_with_comfort"] for row in own])
        assert summary[f"mean_{version}"]["score"] == pytest.approx(mean, abs=1e-12)
    comfort = [row["two_frame_extended_comfort"] for row in good]
    known = [value for value in comfort if value is not None]
    assert summary["mean_v2"]["two_frame_extended_comfort"] == pytest.approx(np.mean(known), abs=1e-12)
    assert "two_frame_extended_comfort" not in summary["mean_v1"]
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"{len(good)} rows scored (trajectory by version), 4 reported invalid with a reason" in told
    assert f"two_frame_extended_comfort: {np.mean(known)}" in told


def test_one_trajectory_a_scene_needs_no_axis_of_its_own(pool, poses, tmp_path):
    assert scored(pool, pool.scene_ids, poses, tmp_path) == scored(
        pool, pool.scene_ids, poses[:, None], tmp_path
    )


def test_the_table_does_not_depend_on_the_number_of_processes(pool, poses, tmp_path, monkeypatch):
    alone = scored(pool, pool.scene_ids, poses, tmp_path)
    monkeypatch.setattr(score_rows, "SCENES_A_PART", 12)
    assert scored(pool, pool.scene_ids, poses, tmp_path, "--num-processes", "2") == alone


def test_a_process_that_is_killed_while_it_scores_is_one_line(pool, poses, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score_rows, "SCENES_A_PART", 12)

    def kill_one() -> None:
        while not (
            found := [one for one in psutil.Process().children() if "spawn_main" in str(one.cmdline())]
        ):
            time.sleep(0.01)  # a process that starts tells nobody
        found[0].kill()

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_one)
        with pytest.raises(SystemExit) as stopped:
            scored(pool, pool.scene_ids, poses, tmp_path, "--num-processes", "2")
        killed.result(1)
    told = capsys.readouterr().err
    assert (stopped.value.code, told.count("\n")) == (1, 1)
    assert "a scoring process was ended from outside" in told
    assert not (tmp_path / "out.parquet").exists()


def test_a_file_of_which_nothing_can_be_scored_does_not_end_well(pool, poses, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        scored(pool, ["nowhere"], poses[:1], tmp_path)
    assert stopped.value.code == EXIT_NONE_SCORED
    assert [row["valid"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()] == [False, False]


def test_several_trajectories_of_a_scene_and_scenes_without_the_one_before(pool, poses, tmp_path):
    """Extended comfort needs one drive of each scene: which of several would have been driven before?"""
    half = len(pool) // 2
    names = pool.scene_ids[[0, half, half + 3]]
    plans = np.stack([poses[[0, half, half + 3]], poses[[0, half, half + 3]] * 0.5], axis=1)
    rows = scored(pool, names, plans, tmp_path)
    assert len(rows) == 2 * 3 * 2
    newer = [row for row in rows if row["version"] == "v2"]
    assert [row["trajectory"] for row in newer] == [0, 1] * 3
    assert all(row["two_frame_extended_comfort"] is None for row in newer)
    assert all(row["score_with_comfort"] == row["score"] for row in rows)
    scene = dict(scoring_scenes(pool))[names[0]]
    assert [row["score"] for row in newer[:2]] == epdms([scene], plans[:1]).score.value[0].tolist()


def test_what_cannot_be_scored_has_its_reason_and_the_rest_is_scored(pool, poses, tmp_path):
    names = [*pool.scene_ids[[0, WITHOUT_V1, BROKEN, 3, 4, 5]].tolist(), "nowhere"]
    plans = [poses[row][None].tolist() for row in (0, WITHOUT_V1, BROKEN, 3, 4, 5, 6)]
    plans[3] = np.full((1, 8, 3), np.nan).tolist()
    plans[4] = [plans[4][0], plans[4][0][:7]]
    plans[5] = []
    pq.write_table(pa.table({"scene_id": names, "trajectories": plans}), tmp_path / "plans.parquet")
    main(["score", str(tmp_path / "plans.parquet"), str(pool.path), "--out", str(tmp_path / "out.parquet")])
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    found = {(row["version"], row["scene_id"], row["trajectory"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (len(names) + 1)
    assert found["v1", names[0], 0]["valid"]
    assert found["v2", names[0], 0]["valid"]
    assert found["v2", names[WITHOUT_V1], 0]["valid"]
    reasons = {
        names[WITHOUT_V1]: "agent_states: must have 11 frames for v1 (found 9)",
        names[BROKEN]: "speed_limit_mps: must be",
        names[3]: "trajectory: must be finite",
        names[4]: "trajectory: must be an array P x 8 x 3 or P x 40 x 3 (found 'ragged lists",
        names[5]: "trajectory: must be an array P x 8 x 3 or P x 40 x 3",
        "nowhere": "trajectory: must have a scene",
    }
    for name, reason in reasons.items():
        for version in ("v1", "v2") if name != names[WITHOUT_V1] else ("v1",):
            row = found[version, name, 0]
            assert not row["valid"]
            assert row["score"] is row["score_with_comfort"] is row["raw_ego_progress"] is None
            assert row["reason"].startswith(f"{name}: {reason}")
    summary = json.loads((tmp_path / "out.json").read_text())
    assert set(summary["reasons"]) == set(reasons)
    assert (summary["scored"], summary["invalid"]) == (3, len(rows) - 3)


def test_refused_files_are_one_line_and_nothing_is_written(pool, poses, tmp_path, capsys):
    np.savez(tmp_path / "plans.npz", scene_id=pool.scene_ids[:1], trajectories=poses[:1, None])
    np.savez(tmp_path / "twice.npz", scene_id=["a", "a"], trajectories=poses[:2, None])
    table = pool.table()
    far = replaced(table, "timestamp_us", (3 * table["timestamp_us"].to_numpy()).tolist())
    write_pool(tmp_path / "far", [far])
    before = sorted(tmp_path.iterdir())
    for plans, scenes, rule in (
        ("plans.npz", tmp_path / "nowhere", "nowhere: "),
        ("twice.npz", pool.path, "twice.npz: must have one row of trajectories for each scene_id"),
        ("missing.npz", pool.path, "missing.npz: "),
        ("plans.npz", tmp_path / "far", "must name a scene less than 0.55 s earlier (found 1.5)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["score", str(tmp_path / plans), str(scenes), "--out", str(tmp_path / "out.parquet")])
        told = capsys.readouterr().err
        assert (stopped.value.code, told.count("\n")) == (2, 1)
        assert str(tmp_path) in told
        assert rule in told
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("out", "rule"),
    [
        ("pool/scenes-00000.parquet", "must not lie in the folder that is read"),
        ("pool/manifest.parquet", "must not lie in the folder that is read"),
        ("taken.parquet", "must leave room for the summary"),
        ("plans.parquet", "must not be the file of trajectories"),
        ("plain/out.parquet", "must be a file in an existing folder to write to"),
    ],
)
def test_a_place_that_scores_cannot_take_is_refused_before_scoring(out, rule, pool, tmp_path, capsys):
    shutil.copytree(pool.path, tmp_path / "pool")
    (tmp_path / "taken.json").mkdir()
    (tmp_path / "plain").write_text("a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        main(["score", str(tmp_path / "plans.parquet"), str(tmp_path / "pool"), "--out", str(tmp_path / out)])
    assert ended.value.code == 2
    assert rule in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_lets_nobody_write_is_refused_before_scoring(pool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("autoscale_ray.cli.is_writable", lambda folder: folder != tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["score", str(tmp_path / "plans.npz"), str(pool.path), "--out", str(tmp_path / "out.parquet")])
    assert ended.value.code == 2
    assert "must be a file in an existing folder to write to" in re.sub(r"\s+", " ", capsys.readouterr().err)
