"""Scores through metric caches, fabricated from golden scenes in NAVSIM's layout, equal the official ones."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from autoscale_ray.cli import main
from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.combine import COLUMNS_V1, COLUMNS_V2
from autoscale_ray.evaluation.score_cache import score_caches
from autoscale_ray.evaluation.score_file import score_file
from autoscale_ray.evaluation.two_stages import read_mapping
from benchmarks.golden_scenes import load_arrays, load_inputs
from tests.unit.scenes import metric_cache_files as files

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 1e-6


def score_cache_file(trajectories, caches, out, two_stage=None, num_processes=1):
    return score_file(
        trajectories, partial(score_caches, path=caches, num_processes=num_processes), out, two_stage
    )


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(GOLDEN)


def _cache(inputs, outputs, version, place, token, **changes):
    scene = {**files.golden_arrays(inputs, int(outputs["scene_index"][place])), **changes}
    reference = files.golden_reference(outputs, place, int(scene["hist_t_us"][-1]))
    return files.metric_cache(version, scene, reference, token)


@pytest.fixture(scope="module")
def scored(inputs, tmp_path_factory):
    """Rows by version, golden row and trajectory; one file of trajectories for each number of waypoints."""
    rows = {}
    for version in ("v1", "v2"):
        outputs = load_arrays(GOLDEN, f"outputs_{version}")
        folder = tmp_path_factory.mktemp(version)
        for place in range(len(outputs["scene_index"])):
            content = files.packed(_cache(inputs, outputs, version, place, f"{place:016x}"))
            files.write_cache(folder / "caches", f"{place:016x}", content)
        for count in (8, 40):
            names = np.array([f"{place:016x}" for place in range(len(outputs["scene_index"]))])
            poses = inputs["traj_poses"][outputs["scene_index"]][:, :, :count]
            np.savez(folder / "plans.npz", scene_id=names, trajectories=poses)
            summary = score_cache_file(
                folder / "plans.npz", folder / "caches", folder / "scores.parquet", num_processes=count // 20
            )
            assert summary["invalid"] == 0
            rows |= {
                (version, int(row["scene_id"], 16), row["trajectory"], count): row
                for row in pq.read_table(folder / "scores.parquet").to_pylist()
            }
    return rows


@pytest.mark.parametrize(("version", "columns"), [("v1", COLUMNS_V1), ("v2", COLUMNS_V2)])
def test_caches_give_the_official_sub_scores(inputs, scored, version, columns):
    """Every raw and filtered sub-score and the final score of every golden case, within 1e-6."""
    outputs = load_arrays(GOLDEN, f"outputs_{version}")
    worst = {}
    for place, row in enumerate(outputs["scene_index"]):
        for plan in range(6):
            found = scored[version, place, plan, int(inputs["traj_n"][row, plan])]
            assert (found["version"], found["valid"]) == (version, True)
            pairs = {f"raw_{name}": found[f"raw_{name}"] for name in columns}
            if version == "v2":
                pairs |= {f"filtered_{name}": found[f"filtered_{name}"] for name in columns}
            golden = {name: outputs[name][place, plan] for name in pairs}
            pairs["score"] = found["score"]
            golden["score"] = outputs["raw_score" if version == "v1" else "epdms_no_ec"][place, plan]
            for name, value in pairs.items():
                worst[name] = max(worst.get(name, 0.0), abs(value - golden[name]))
    assert len(worst) == (len(columns) + 1 if version == "v1" else 2 * len(columns) + 1)
    assert max(worst.values()) < TOLERANCE, worst


def test_the_golden_cases_tell_scores_apart(scored):
    """Equality above means little unless every sub-score takes several values."""
    names = {f"raw_{name}" for name in (*COLUMNS_V1, *COLUMNS_V2)}
    values = {
        name: {round(row[name], 6) for row in scored.values() if row.get(name) is not None} for name in names
    }
    assert min(map(len, values.values())) >= 2, {name: len(found) for name, found in values.items()}


def test_one_bad_cache_is_reported_and_the_rest_is_scored(inputs, tmp_path, capsys):
    outputs = load_arrays(GOLDEN, "outputs_v2")
    for place in range(3):
        content = files.packed(_cache(inputs, outputs, "v2", place, f"token{place}"))
        content = content[: len(content) // 2] if place == 1 else content
        files.write_cache(tmp_path / "caches", f"token{place}", content)
    plans = inputs["traj_poses"][:4, :1, :8]
    np.savez(tmp_path / "plans.npz", scene_id=[f"token{place}" for place in range(4)], trajectories=plans)
    main(["score", str(tmp_path / "plans.npz"), "--metric-cache", str(tmp_path / "caches"), "--out",
          str(tmp_path / "out.parquet")])  # fmt: skip
    assert "2 rows scored (trajectory by version), 2 reported invalid" in re.sub(
        r"\s+", " ", capsys.readouterr().out
    )
    rows = {row["scene_id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    assert [rows[f"token{place}"]["valid"] for place in range(4)] == [True, False, True, False]
    assert rows["token1"]["score"] is None
    assert "truncated" in rows["token1"]["reason"]
    assert "must have a metric cache" in rows["token3"]["reason"]


@pytest.mark.parametrize(
    "stages", [("predictions",), ("first_stage_predictions", "second_stage_predictions")]
)
def test_a_submission_gives_the_same_scores_as_its_poses(inputs, tmp_path, stages):
    outputs = load_arrays(GOLDEN, "outputs_v2")
    files.write_cache(tmp_path / "caches", "a" * 16, files.packed(_cache(inputs, outputs, "v2", 0, "a" * 16)))
    plan = inputs["traj_poses"][outputs["scene_index"][0], 0, :8]
    sampling = files.make("TrajectorySampling", num_poses=8, time_horizon=4.0, interval_length=0.5)
    predicted = {
        "a" * 16: files.make("Trajectory", poses=plan.astype(np.float32), trajectory_sampling=sampling)
    }
    (tmp_path / "plans.pkl").write_bytes(
        files.dumps({"team_name": "x", **{name: [{}] for name in stages}, stages[-1]: [predicted]})
    )
    np.savez(tmp_path / "plans.npz", scene_id=["a" * 16], trajectories=plan.astype(np.float32)[None, None])
    tables = []
    for name in ("plans.pkl", "plans.npz"):
        score_cache_file(tmp_path / name, tmp_path / "caches", tmp_path / "out.parquet")
        tables.append(pq.read_table(tmp_path / "out.parquet"))
    assert tables[0].equals(tables[1])
    assert tables[0]["valid"].to_pylist() == [True]


HALF_SECOND_US = 500_000


@pytest.fixture(scope="module")
def navhard(inputs, tmp_path_factory):
    """Two mappings of three synthetic pairs: golden scenes at shifted times, with 16 and 17 letters in a token."""
    folder = tmp_path_factory.mktemp("navhard")
    outputs = load_arrays(GOLDEN, "outputs_v2")
    groups, names, plans = [], [], []
    spread = np.random.default_rng(3)
    for group in range(2):
        tokens = [f"{group}{side}".ljust(16, "a") for side in ("now", "old")]
        pairs = [[f"{group}{pair}{side}".ljust(17, "b") for side in ("now", "old")] for pair in range(3)]
        groups.append([*tokens, pairs])
        for number, (now, old) in enumerate([tokens, *pairs]):
            place = 4 * group + number
            row = int(outputs["scene_index"][place])
            times_us = inputs["hist_t_us"][row]
            reference = files.golden_reference(outputs, place, int(times_us[-1]))
            for token, shift_us in ((now, HALF_SECOND_US), (old, 0)):
                scene = {**files.golden_arrays(inputs, row), "hist_t_us": times_us + shift_us}
                cache = files.metric_cache("v2", scene, (reference[0] + shift_us, reference[1]), token)
                if len(token) == 17:
                    cache.scene_type, cache.human_trajectory = files.CLASSES["SceneFrameType"](1), None
                files.write_cache(folder / "caches", token, files.packed(cache))
                names.append(token)
                plans.append(inputs["traj_poses"][row, spread.integers(6), :8])
    (folder / "split.yaml").write_text(yaml.safe_dump({"data_split": "test", "reactive_all_mapping": groups}))
    np.savez(folder / "plans.npz", scene_id=names, trajectories=np.array(plans)[:, None])
    return folder, groups


def test_two_stages_follow_from_the_scores_of_single_scenes(navhard, tmp_path):
    """Brute force over the table: stage one times weighted stage two, mean of now and before, mean of mappings."""
    folder, groups = navhard
    arguments = ["score", str(folder / "plans.npz"), "--metric-cache", str(folder / "caches")]
    main([*arguments, "--two-stage", str(folder / "split.yaml"), "--out", str(tmp_path / "out.parquet")])
    rows = {row["scene_id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    summary = json.loads((tmp_path / "out.json").read_text())["two_stage"]
    assert (summary["mappings"], summary["mappings_left_out"]) == (2, 0)
    for name in COLUMNS_V2:
        combined = []
        for now, old, pairs in groups:
            for side, first in enumerate((now, old)):
                # Far starts leave no kernel weight, so the official code falls back to equal weights.
                second = np.mean([rows[pair[side]][f"filtered_{name}"] for pair in pairs])
                combined.append(rows[first][f"filtered_{name}"] * second)
        assert summary["combined"][name] == pytest.approx(np.mean(combined), abs=1e-9)
    assert 0.0 < summary["combined"]["score"] < 1.0


def test_mappings_without_all_scenes_are_left_out_and_counted(navhard, tmp_path):
    folder, groups = navhard
    with np.load(folder / "plans.npz") as archive:
        keep = archive["scene_id"] != groups[0][2][1][0]
        np.savez(
            tmp_path / "plans.npz",
            scene_id=archive["scene_id"][keep],
            trajectories=archive["trajectories"][keep],
        )
    arguments = (tmp_path / "plans.npz", folder / "caches", tmp_path / "out.parquet", folder / "split.yaml")
    assert score_cache_file(*arguments)["two_stage"]["mappings_left_out"] == 1


def test_scores_are_kept_where_no_mapping_is_complete(navhard, tmp_path):
    folder, groups = navhard
    now, old, _ = groups[0]
    with np.load(folder / "plans.npz") as archive:
        plans = [archive["trajectories"][0].tolist(), []]
    pq.write_table(
        pa.table({"scene_id": [now, old], "trajectories": plans}), path := tmp_path / "plans.parquet"
    )
    out = tmp_path / "out.parquet"
    with pytest.raises(InvalidInputError, match="must have a mapping whose scenes are all scored"):
        score_cache_file(path, folder / "caches", out, folder / "split.yaml")
    rows = {row["scene_id"]: row for row in pq.read_table(out).to_pylist()}
    assert [rows[token]["valid"] for token in (now, old)] == [True, False]
    assert rows[old]["reason"].startswith(f"{old}: trajectory: must be an array")


def test_frames_of_one_log_get_extended_comfort(navhard, tmp_path):
    """Only original scenes half a second after another one of the log: here one for each mapping's pair."""
    folder, groups = navhard
    score_cache_file(folder / "plans.npz", folder / "caches", tmp_path / "out.parquet")
    rows = {row["scene_id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    with_comfort = {token for token, row in rows.items() if row["two_frame_extended_comfort"] is not None}
    assert with_comfort == {group[0] for group in groups}
    for token in with_comfort:
        row = rows[token]
        factor = np.prod([row[f"filtered_{name}"] for name in COLUMNS_V2[:4]])
        weights = (5, 5, 2, 2)
        parts = [
            row[f"filtered_{name}"] * weight for name, weight in zip(COLUMNS_V2[4:], weights, strict=True)
        ]
        expected = factor * (sum(parts) + 2 * row["two_frame_extended_comfort"]) / 16
        assert row["score_with_comfort"] == pytest.approx(expected, abs=1e-12)


OTHER_MAPPINGS = (
    "{",
    "a: 1",
    "reactive_all_mapping: [[a, b, []]]",
    "reactive_all_mapping: [[a]]",
    "reactive_all_mapping: [[a, b, [[c]]]]",
    "? !!python/object/apply:os.getcwd []",
)


@pytest.mark.parametrize("content", OTHER_MAPPINGS)
def test_other_mappings_are_refused(tmp_path, content):
    (tmp_path / "split.yaml").write_text(content)
    with pytest.raises(InvalidInputError, match=r"split\.yaml"):
        read_mapping(tmp_path / "split.yaml")


def test_the_mapping_of_an_earlier_two_stage_score_is_named(tmp_path):
    """navsafe_two_stage.yaml and navtest_two_stage.yaml of NAVSIM carry it."""
    (tmp_path / "split.yaml").write_text(yaml.safe_dump({"two_stage_mapping": {"a": ["b", "c"]}}))
    with pytest.raises(
        InvalidInputError, match="two_stage_mapping is of a two-stage score with other weights"
    ):
        read_mapping(tmp_path / "split.yaml")


def test_the_command_needs_one_source_of_scenes_and_a_place_for_its_file(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out.parquet")]
    for extra in (
        out,
        [str(tmp_path), "--metric-cache", str(tmp_path), *out],
        [str(tmp_path), "--two-stage", "x.yaml", *out],
        [str(tmp_path), "--logs", str(tmp_path), *out],
        [str(tmp_path), "--out", str(tmp_path)],
        [str(tmp_path), "--out", str(tmp_path / "nowhere" / "out.parquet")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["score", "plans.npz", *extra])
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
