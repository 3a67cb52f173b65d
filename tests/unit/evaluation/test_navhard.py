"""navhard's synthetic scenes and logs, fabricated from drives whose truth is known: scores and pools.

All files are fabricated in the documented layout; no file of NAVSIM itself was read.
"""

import itertools
import json
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scenes import metric_cache_files, navsim_files
from scenes.navsim_town import LOCATION, make_town, write_maps

from autoscale_ray.cli import main
from autoscale_ray.errors import InputRejectedError, InvalidInputError
from autoscale_ray.evaluation import epdms
from autoscale_ray.evaluation.combine import COLUMNS_V2
from autoscale_ray.evaluation.from_pool import scoring_scenes
from autoscale_ray.evaluation.scene_score import SceneScore
from autoscale_ray.evaluation.score_navhard import may_hold, score_navhard
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.readers.metric_cache import open_reader
from autoscale_ray.scenes.readers.navhard import read_scene
from autoscale_ray.scenes.schema import DRIVING_COMMANDS

NOW, BEFORE = 8, 7
KINDS = ("vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object")


def synthetic_scene(
    drive, current: int, token: str, origin: str, num_recorded: int = 4, shift_m: float = 0.0
):
    """Return the content of a synthetic scene of a drive: recorded up to a frame, objects and lights of ten more."""
    frames = navsim_files.frames_of(drive)
    recorded = range(current - 3, current - 3 + num_recorded)
    later = range(recorded.stop, current + 11)
    return {
        "scene_metadata": {
            "log_name": drive.name,
            "scene_token": f"{token[:-1]}s",
            "map_name": LOCATION,
            "initial_token": token,
            "num_history_frames": 4,
            "num_future_frames": num_recorded - 4,
            "corresponding_original_scene": "scene",
            "corresponding_original_initial_token": origin,
        },
        "frames": [
            _frame(drive, frames[n], n, token if n == current else f"{n:017x}", shift_m) for n in recorded
        ],
        "extended_traffic_light_data": [_lights(drive, number) for number in later],
        "extended_detections_tracks": [_objects(drive, number) for number in later],
    }


def _frame(drive, frame: dict, number: int, token: str, shift_m: float) -> dict:
    """Return a frame; the ego stands some metres to its left, so boxes in its axes lie that much to the right."""
    x, y, yaw, vx, vy, ax, ay = drive.ego[number]
    boxes = frame["anns"]["gt_boxes"].copy()
    boxes[:, 1] -= shift_m
    anns = frame["anns"]
    return {
        "token": token,
        "timestamp": frame["timestamp"],
        "roadblock_ids": frame["roadblock_ids"],
        "traffic_lights": frame["traffic_lights"],
        "annotations": {
            "boxes": boxes,
            "names": anns["gt_names"],
            "velocity_3d": anns["gt_velocity_3d"],
            "instance_tokens": anns["instance_tokens"],
            "track_tokens": anns["track_tokens"],
        },
        "ego_status": {
            "ego_pose": np.array([x - shift_m * np.sin(yaw), y + shift_m * np.cos(yaw), yaw]),
            "ego_velocity": np.array([vx, vy], dtype=np.float32),
            "ego_acceleration": np.array([ax, ay], dtype=np.float32),
            "driving_command": frame["driving_command"],
            "in_global_frame": True,
        },
        "lidar_path": None,
        "camera_dict": {"cam_f0": {}},
    }


def _lights(drive, number: int):
    status = metric_cache_files.CLASSES["TrafficLightStatusType"]
    lights = [
        metric_cache_files.make("TrafficLightStatusData", status=status(2 if red else 0), lane_connector_id=fid,
                                timestamp=0)
        for fid, red in drive.red[number].items()
    ]  # fmt: skip
    return metric_cache_files.make("TrafficLightStatuses", traffic_lights=lights)


def _objects(drive, number: int):
    found = [
        metric_cache_files.tracked(
            KINDS.index(agent.kind),
            agent.token,
            tuple(agent.states[number, :3]),
            np.array(agent.size),
            agent.states[number, 3:],
        )
        for agent in drive.agents
        if agent.seen[number]
    ]
    return metric_cache_files.make(
        "DetectionsTracks", tracked_objects=metric_cache_files.make("TrackedObjects", tracked_objects=found)
    )


@dataclass
class World:
    folder: Path
    drive: navsim_files.Drive
    tokens: dict[str, int]
    """Frame at 0 s of every synthetic scene."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One log with its maps, and six synthetic scenes: three pairs half a second apart, shifted sideways."""
    folder, town = tmp_path_factory.mktemp("navhard"), make_town()
    write_maps(town, folder / "maps")
    drive = navsim_files.make_drive(town, num_agents=24)
    root = folder / "navhard_two_stage"
    frames = navsim_files.frames_of(drive)
    navsim_files.write_log(folder / "navsim_logs" / "test", frames)
    # Lists for the cameras, which hold wanted tokens too: whoever reads them as logs scores another place.
    elsewhere = [
        {**frame, "ego2global_translation": frame["ego2global_translation"] + 1.0} for frame in frames
    ]
    navsim_files.write_log(root / "openscene_meta_datas", elsewhere[NOW - 3 : NOW + 9], "list")
    (root / "synthetic_scene_pickles").mkdir(parents=True)
    tokens = {}
    for pair, current in itertools.product(range(3), (NOW, BEFORE)):
        token = f"{pair}{current}".ljust(17, "f")
        tokens[token] = current
        content = synthetic_scene(drive, current, token, drive.tokens[current], shift_m=0.3 * pair)
        (root / "synthetic_scene_pickles" / f"{token[:-1]}s.pkl").write_bytes(
            metric_cache_files.dumps(content)
        )
    return World(folder, drive, tokens)


@pytest.fixture(scope="module")
def plans(world):
    """A plan for every token: onwards at the speed of the moment, half of them slower."""
    tokens = {**world.tokens, world.drive.tokens[NOW]: NOW, world.drive.tokens[BEFORE]: BEFORE}
    ahead = np.linspace(0.5, 4.0, 8)
    return {
        token: np.stack(
            [ahead * world.drive.ego[frame, 3] * (1.0 - 0.5 * (number % 2)), 0 * ahead, 0 * ahead], 1
        )[None]
        for number, (token, frame) in enumerate(sorted(tokens.items()))
    }


@pytest.fixture(scope="module")
def scored(world, plans) -> dict[str, SceneScore]:
    found, unscored = score_navhard(plans, world.folder / "navhard_two_stage", world.folder / "maps")
    assert unscored == []
    return {frame.token: frame for frame in found}


def test_a_synthetic_scene_scores_as_the_same_scene_of_a_log_does(world, plans, scored, tmp_path):
    """Pair 0 stands where the log's ego stands: the log ingested as synthetic gives equal scores, within 1e-6."""
    ingest("navsim", world.folder / "navsim_logs" / "test", tmp_path / "pool", "synthetic",
           files={"maps": world.folder / "maps"})  # fmt: skip
    scenes = dict(scoring_scenes(open_pool(tmp_path / "pool")))
    values = set()
    for token, current in list(world.tokens.items())[:2]:
        expected = epdms([scenes[world.drive.tokens[current]]], plans[token][None])
        for name in COLUMNS_V2:
            found = scored[token].columns[f"filtered_{name}"][0]
            assert found == pytest.approx(float(expected.filtered[name].value[0, 0]), abs=1e-6)
            values.add(round(found, 3))
        assert scored[token].is_synthetic
    assert len(values) > 1


def test_originals_come_from_the_logs_and_keep_the_human_filter(world, scored):
    now = scored[world.drive.tokens[NOW]]
    assert (now.is_synthetic, now.log_name, now.start_us) == (
        False,
        world.drive.name,
        world.drive.times_us[NOW],
    )
    np.testing.assert_allclose(now.start_point, world.drive.ego[NOW, :2], rtol=0, atol=1e-6)


def test_scenes_are_read_as_navsim_reads_them_whatever_their_writer_chose(world, tmp_path):
    """Poses said to be no map poses, and ids of lights as digits, give equal values; no command is the unknown one."""
    content = synthetic_scene(world.drive, NOW, "t".ljust(17, "e"), "origin")
    (tmp_path / "plain.pkl").write_bytes(metric_cache_files.dumps(content))
    for frame in content["frames"]:
        frame["ego_status"].update(in_global_frame=False, driving_command=np.zeros(4, dtype=int))
        frame["traffic_lights"] = [(str(fid), red) for fid, red in frame["traffic_lights"]]
    for statuses in content["extended_traffic_light_data"]:
        for light in statuses.traffic_lights:
            light.lane_connector_id = str(light.lane_connector_id)
    (tmp_path / "other.pkl").write_bytes(metric_cache_files.dumps(content))
    with open_reader() as reader:
        plain, other = (read_scene(reader, tmp_path, f"{name}.pkl").log for name in ("plain", "other"))
    assert other.red == plain.red
    assert any(other.red)
    np.testing.assert_array_equal(other.poses_F3, plain.poses_F3)
    assert set(other.command_F.tolist()) == {DRIVING_COMMANDS.index("unknown")}


def test_objects_stand_where_the_drive_has_them(world):
    """Every box of every frame, recorded and extended, within 1 cm and 0.1 degree, also from a shifted ego."""
    folder = world.folder / "navhard_two_stage" / "synthetic_scene_pickles"
    token = "2" + str(NOW) + "f" * 14 + "s"
    with open_reader() as reader:
        scene = read_scene(reader, folder, f"{token[:-1]}s.pkl")
    assert (len(scene.log.tokens), scene.num_recorded, scene.origin_token) == (14, 4, world.drive.tokens[NOW])
    for number in range(14):
        frame = NOW - 3 + number
        boxes = scene.log.box_states_A5[scene.log.box_offsets[number] : scene.log.box_offsets[number + 1]]
        truth = np.array([agent.states[frame] for agent in world.drive.agents if agent.seen[frame]])
        assert len(boxes) == len(truth)
        order, wanted = (values[np.lexsort(np.round(values[:, :2], 3).T)] for values in (boxes, truth))
        np.testing.assert_allclose(order[:, :2], wanted[:, :2], rtol=0, atol=0.01)
        np.testing.assert_allclose(order[:, 3:], wanted[:, 3:], rtol=0, atol=0.01)
        assert np.abs(np.angle(np.exp(1j * (order[:, 2] - wanted[:, 2])))).max() < np.radians(0.1)
        assert set(scene.log.red[number]) == {fid for fid, red in world.drive.red[frame].items() if red}


def test_the_command_gives_the_two_stage_score(world, plans, scored, tmp_path):
    """Brute force: kernel weights from the planned endpoint to the synthetic starts, stage one times stage two."""
    now, before = world.drive.tokens[NOW], world.drive.tokens[BEFORE]
    pairs = [
        next(token for token in world.tokens if token.startswith(f"{pair}{frame}"))
        for pair in range(3)
        for frame in (NOW, BEFORE)
    ]
    groups = [[now, before, [pairs[0:2], pairs[2:4], pairs[4:6]]]]
    (tmp_path / "split.yaml").write_text(yaml.safe_dump({"reactive_all_mapping": groups}))
    np.savez(tmp_path / "plans.npz", scene_id=list(plans), trajectories=np.stack(list(plans.values())))
    main(["score", str(tmp_path / "plans.npz"), "--navhard", str(world.folder / "navhard_two_stage"), "--maps",
          str(world.folder / "maps"), "--logs", str(world.folder / "navsim_logs" / "test"), "--two-stage",
          str(tmp_path / "split.yaml"), "--out", str(tmp_path / "out.parquet")])  # fmt: skip
    summary = json.loads((tmp_path / "out.json").read_text())
    assert (summary["scored"], summary["invalid"], summary["two_stage"]["mappings"]) == (8, 0, 1)
    rows = {row["scene_id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    for name in COLUMNS_V2:
        parts = []
        for side, first in enumerate((now, before)):
            second = [pair[side] for pair in groups[0][2]]
            away = np.array([scored[first].endpoint - scored[token].start_point for token in second])
            weights = np.exp(-(away**2).sum(axis=1) / 0.2)
            weights = weights / weights.sum() if weights.sum() > 1e-8 else np.full(3, 1 / 3)
            values = np.array([rows[token][f"filtered_{name}"] for token in second])
            parts.append(rows[first][f"filtered_{name}"] * float(weights @ values))
        assert summary["two_stage"]["combined"][name] == pytest.approx(np.mean(parts), abs=1e-9)


def test_a_scene_whose_ego_has_a_future_stands_in_a_pool_and_another_is_refused(world, tmp_path):
    """The origin is the real scene's token; without a future the quarantine table says where to go instead."""
    for name, num_recorded in (("long", 12), ("short", 4)):
        content = synthetic_scene(world.drive, NOW, name.ljust(17, "e"), "origin", num_recorded)
        (tmp_path / f"{name}.pkl").write_bytes(metric_cache_files.dumps(content))
    ingest("navhard", tmp_path, tmp_path / "pool", "synthetic", files={"maps": world.folder / "maps"})
    pool = open_pool(tmp_path / "pool")
    assert pool.scene_ids.tolist() == ["long".ljust(17, "e")]
    assert pool.origin_ids.tolist() == ["origin"]
    assert pool.manifest.counts["domain"] == {"synthetic": len(pool)}
    (refused,) = pool.side_table("quarantine").to_pylist()
    assert refused["file"] == "short.pkl"
    assert "autoscale score --navhard" in refused["rule"]


WRONG = {
    "no frames": lambda scene: scene.update(frames=[]),
    "short history": lambda scene: scene["scene_metadata"].update(num_history_frames=2),
    "text for a pose": lambda scene: scene["frames"][1]["ego_status"].update(ego_pose="here"),
    "no annotations": lambda scene: scene["frames"][2].pop("annotations"),
    "boxes of six numbers": lambda scene: scene["frames"][2]["annotations"].update(boxes=np.zeros((1, 6))),
    "unknown type": lambda scene: scene["frames"][2]["annotations"].update(names=np.array(["tank"] * 3)),
    "another city": lambda scene: scene["scene_metadata"].update(map_name="atlantis"),
    "few steps": lambda scene: scene.update(extended_detections_tracks=[]),
    "no time": lambda scene: scene["frames"][3].update(timestamp="now"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scenes_are_refused_with_one_line_and_the_rest_is_scored(world, plans, name, tmp_path):
    tokens = list(world.tokens)[:2]
    (tmp_path / "synthetic_scene_pickles").mkdir()
    for token in tokens:
        content = synthetic_scene(world.drive, NOW, token, "origin")
        if token == tokens[0]:
            WRONG[name](content)
        (tmp_path / "synthetic_scene_pickles" / f"{token}.pkl").write_bytes(metric_cache_files.dumps(content))
    wanted = {token: plans[token] for token in tokens}
    scored, (unscored,) = score_navhard(wanted, tmp_path, world.folder / "maps")
    assert [frame.token for frame in scored] == tokens[1:]
    assert (unscored.token, unscored.version) == (tokens[0], "v2")
    assert tokens[0] in unscored.reason
    assert "\n" not in unscored.reason


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'was-run')!r}, 'w')",)

    content = pickle.dumps({"scene_metadata": {}, "frames": [Payload()]})
    (tmp_path / "bad.pkl").write_bytes(content)
    with open_reader() as reader, pytest.raises(InputRejectedError, match=r"bad\.pkl.*global builtins\.eval"):
        read_scene(reader, tmp_path, "bad.pkl")
    assert not (tmp_path / "was-run").exists()


def test_original_scenes_across_a_gap_of_the_log_are_scored(world, plans, scored, tmp_path):
    """NAVSIM takes the frames of a log by their place; a gap in the future changes no score."""
    token, frames = world.drive.tokens[NOW], navsim_files.frames_of(world.drive)
    for frame in frames[NOW + 2 :]:
        frame["timestamp"] += 3_000_000
    navsim_files.write_log(tmp_path, frames)
    root, maps = world.folder / "navhard_two_stage", world.folder / "maps"
    ((found,), unscored) = score_navhard({token: plans[token]}, root, maps, tmp_path)
    assert unscored == []
    names = [name for name in found.columns if name.startswith("filtered_")]
    assert [found.columns[name][0] for name in names] == [scored[token].columns[name][0] for name in names]


def test_only_logs_that_can_hold_a_wanted_token_are_opened(world, plans, tmp_path):
    """A damaged log that names no wanted token is not in the way; one that does is named for what is missing."""
    token, absent = world.drive.tokens[NOW], "0123456789abcdef"
    wanted = dict.fromkeys((token, absent), plans[token])
    for name, content in (("log", None), ("a", b"damaged"), ("b", b"damaged\x8c\x10" + absent.encode())):
        if content is None:
            navsim_files.write_log(tmp_path, navsim_files.frames_of(world.drive), name)
        else:
            (tmp_path / f"{name}.pkl").write_bytes(content)
    root, maps = world.folder / "navhard_two_stage", world.folder / "maps"
    (scored,), (unscored,) = score_navhard(wanted, root, maps, tmp_path)
    assert (scored.token, unscored.token) == (token, absent)
    assert "1 files were refused, first: b.pkl" in unscored.reason


def test_a_token_is_found_in_every_protocol_of_pickle():
    """Also where an opcode that is a hexadecimal digit (a: append) stands right behind it; its middle is no find."""
    for protocol in range(6):
        for content in (["0123456789abcdef"], [["0123456789abcdef", 1], {"token": "0123456789abcdef"}]):
            packed = pickletools.optimize(pickle.dumps(content, protocol))
            assert may_hold(packed, {"0123456789abcdef", "f" * 17})
            assert not may_hold(packed, {"123456789abcdef0", "23456789abcdef"})
    assert may_hold(b"", {"no hexadecimal token"})


def test_stage_one_without_logs_is_refused_at_once_with_their_place(world, plans, tmp_path):
    """Without the logs beside it, synthetic scenes alone are scored, and an original one is refused in one line."""
    (tmp_path / "navhard_two_stage").mkdir()
    scenes = tmp_path / "navhard_two_stage" / "synthetic_scene_pickles"
    scenes.symlink_to(world.folder / "navhard_two_stage" / "synthetic_scene_pickles")
    maps, synthetic = world.folder / "maps", next(iter(world.tokens))
    (scored,), _ = score_navhard({synthetic: plans[synthetic]}, scenes.parent, maps)
    assert scored.token == synthetic
    with pytest.raises(InvalidInputError, match=r"navsim_logs/test: .*--logs") as caught:
        score_navhard(plans, scenes.parent, maps)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError, match=r"nowhere: .*split test"):
        score_navhard({synthetic: plans[synthetic]}, scenes.parent, maps, tmp_path / "nowhere")


def test_a_folder_without_logs_and_scenes_is_refused(world, plans, tmp_path):
    with pytest.raises(InvalidInputError, match="navsim_logs/test"):
        score_navhard(plans, tmp_path / "navhard", world.folder / "maps")
