"""SimScale clips and rewards, fabricated in the documented layout; see test_openscene for the scenes themselves."""

import math

import numpy as np
import pytest

from autoscale_ray.errors import InputRejectedError, InvalidInputError, SplitLeakError
from autoscale_ray.inputs import TRAINED
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import check_disjoint, open_pool
from autoscale_ray.scenes.readers import simscale
from scenes import navsim_files as files
from scenes.navsim_town import make_town, write_maps

FOLDER = "synthetic_reaction_pdm_v1.0-1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A real log and two clips that were made from its scenes at frames 5 and 7, the second one in two rounds."""
    folder, town = tmp_path_factory.mktemp("simscale"), make_town()
    write_maps(town, folder / "maps")
    drive = files.make_drive(town, num_frames=20)
    files.write_log(folder / "logs", files.frames_of(drive))
    for start, simulation_round in ((2, 1), (4, 1), (4, 2)):
        files.write_clip(folder / "clips" / FOLDER, drive, start, simulation_round)
    return folder, drive


def _pool(world, out, **beside):
    files_beside = {"maps": world[0] / "maps", **beside}
    ingest("simscale", world[0] / "clips", out, "synthetic", files=files_beside)
    return open_pool(out)


def test_clips_name_the_real_scene_and_log_they_were_made_from(world, tmp_path):
    folder, drive = world
    pool = _pool(world, tmp_path / "synthetic")
    assert pool.manifest.num_quarantined == 0
    expected = [f"{drive.tokens[5]}-001", f"{drive.tokens[7]}-001", f"{drive.tokens[7]}-002"]
    assert sorted(pool.scene_ids.tolist()) == sorted(expected)
    assert set(pool.sources.tolist()) == {"simscale/reaction_pdm_v1.0-1"}
    assert set(pool.log_ids.tolist()) == {drive.name}
    ingest("navsim", folder / "logs", tmp_path / "real", "real", files={"maps": folder / "maps"})
    real = open_pool(tmp_path / "real")
    rows = real.rows_of(pool.origin_ids)
    shift = pool.column("origin_x_m") - real.column("origin_x_m")[rows]
    np.testing.assert_allclose(shift, 0.0, atol=1e-6)
    check_disjoint({"real": real, "synthetic": pool}, may_share=TRAINED)
    with pytest.raises(SplitLeakError):
        check_disjoint({"dev": real, "synthetic": pool}, may_share=TRAINED)


def test_a_clip_has_two_seconds_of_history_and_four_of_future(world, tmp_path):
    batch_valid = _pool(world, tmp_path / "pool").batch([0, 1, 2]).ego_valid_NT
    assert batch_valid.tolist() == [[False] + [True] * 12 + [False] * 2] * 3


def test_a_filter_chooses_clips_by_name(world, tmp_path):
    _, drive = world
    name = f"{drive.name}-{drive.tokens[7]}-002"
    chosen = files.write_filter(tmp_path / "filter.yaml", num_future_frames=8, log_names=[name])
    pool = _pool(world, tmp_path / "pool", filter=chosen)
    assert pool.scene_ids.tolist() == [f"{drive.tokens[7]}-002"]


def _vocabulary(path, drive, frame):
    """Three anchors: standing, the drive of the scene, and one to the left; their scores are 0, 0.75 and 1."""
    pose = drive.ego[frame, :3]
    times = np.arange(1, 41) * 0.1
    at = [
        np.interp(0.5 * frame + times, 0.5 * np.arange(drive.num_frames), drive.ego[:, k]) for k in range(2)
    ]
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    x, y = at[0] - pose[0], at[1] - pose[1]
    own = np.stack([cos * x + sin * y, cos * y - sin * x, 0 * x], axis=1)
    np.save(path, np.stack([np.zeros((40, 3)), own, own + np.array([0.0, 3.0, 0.0])]).astype(np.float32))
    return path


@pytest.mark.parametrize("layout", ["one file", "one file a token"])
def test_the_expert_quality_is_the_reward_of_the_nearest_anchor(layout, world, tmp_path):
    _, drive = world
    vocabulary = _vocabulary(tmp_path / "3.npy", drive, 7)
    tokens = [f"{drive.tokens[7]}-00{k}" for k in (1, 2)]
    scores = np.array([[0.0, 0.75, 1.0], [0.0, 0.5, 1.0]])
    if layout == "one file":
        rewards = files.write_rewards(tmp_path / "rewards.pkl", tokens, scores)
    else:
        rewards = tmp_path / "rewards"
        for token, row in zip(tokens, scores, strict=True):
            files.write_token_rewards(rewards / token / "tmp.pkl", row)
    pool = _pool(world, tmp_path / "pool", rewards=rewards, vocabulary=vocabulary)
    quality = dict(zip(pool.scene_ids.tolist(), pool.column("expert_quality").tolist(), strict=True))
    assert [quality[token] for token in tokens] == [0.75, 0.5]
    assert math.isnan(quality[f"{drive.tokens[5]}-001"])


@pytest.mark.parametrize("layout", ["one file", "one file a token"])
def test_a_bad_reward_costs_its_scene_the_quality_and_is_counted(layout, world, tmp_path):
    _, drive = world
    vocabulary = _vocabulary(tmp_path / "3.npy", drive, 7)
    bad, good = (f"{drive.tokens[7]}-00{k}" for k in (1, 2))
    scores = np.array([[0.0, 1.5, 1.0], [0.0, 0.5, 1.0]])
    if layout == "one file":
        rewards = files.write_rewards(tmp_path / "rewards.pkl", [bad, good], scores)
    else:
        rewards = tmp_path / "rewards"
        for token, row in zip((bad, good), scores, strict=True):
            files.write_token_rewards(rewards / token / "tmp.pkl", row)
    pool = _pool(world, tmp_path / "pool", rewards=rewards, vocabulary=vocabulary)
    quality = dict(zip(pool.scene_ids.tolist(), pool.column("expert_quality").tolist(), strict=True))
    assert len(pool) == 3
    assert math.isnan(quality[bad])
    assert quality[good] == 0.5
    (row,) = pool.side_table("quarantine").to_pylist()
    assert pool.manifest.num_quarantined == 1
    assert (row["file"].endswith(f"{bad}.pkl"), row["rule"]) == (True, "must lie in 0 to 1")
    assert bad in row["element"]


def test_a_whole_round_in_one_file_is_refused_by_its_size(world, tmp_path):
    vocabulary = _vocabulary(tmp_path / "3.npy", world[1], 7)
    with open(tmp_path / "rewards.pkl", "wb") as file:
        file.truncate(19 << 30)
    with pytest.raises(InputRejectedError, match=r"at most 1 GiB; give a folder of files <token>/tmp\.pkl"):
        simscale.open_rewards(tmp_path / "rewards.pkl", vocabulary)


def test_bad_clips_and_rewards_give_one_clear_line(world, tmp_path):
    folder, drive = world
    frames = files.frames_of(drive)[:12]
    files.write_log(tmp_path / "clips", frames, "no-token-in-this-name")
    files.write_log(tmp_path / "clips", frames[:11], f"{drive.name}-{drive.tokens[3]}-000")
    ingest("simscale", tmp_path / "clips", tmp_path / "pool", "synthetic", files={"maps": folder / "maps"})
    pool = open_pool(tmp_path / "pool", allow_empty=True)
    assert len(pool) == 0
    rows = pool.side_table("quarantine").to_pylist()
    assert sorted(row["rule"][:20] for row in rows) == ["must be named <log>-", "must hold at least 1"]
    vocabulary = _vocabulary(tmp_path / "3.npy", drive, 7)
    with pytest.raises(InvalidInputError, match="rewards: must come with the vocabulary"):
        _pool(world, tmp_path / "other", rewards=tmp_path)
    rewards = files.write_rewards(tmp_path / "rewards.pkl", ["t"], np.ones((1, 4)))
    with pytest.raises(InputRejectedError, match="must hold 3 numbers"):
        _pool(world, tmp_path / "other", rewards=rewards, vocabulary=vocabulary)
    files.write_rewards(tmp_path / "rewards.pkl", ["t"], np.full((1, 3), 1.5))
    with pytest.raises(InputRejectedError, match="must lie in 0 to 1"):
        simscale.open_rewards(rewards, vocabulary)
    np.save(tmp_path / "flat.npy", np.zeros((3, 120)))
    (tmp_path / "text.npy").write_text("no array")
    for name in ("flat.npy", "text.npy"):
        with pytest.raises(InputRejectedError, match=name):
            simscale.read_vocabulary(tmp_path / name)


def test_a_vocabulary_with_a_size_that_no_number_holds_is_refused(tmp_path):
    head = {"descr": "<f8", "fortran_order": False, "shape": (10**30, 40, 3)}
    with (tmp_path / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
    with pytest.raises(InputRejectedError, match=r"huge\.npy: must be an array of numbers"):
        simscale.read_vocabulary(tmp_path / "huge.npy")


def test_a_vocabulary_with_objects_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(InputRejectedError, match=r"objects\.npy"):
        simscale.read_vocabulary(tmp_path / "objects.npy")
