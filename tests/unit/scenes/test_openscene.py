"""NAVSIM logs against the truth they were made from: every quantity within 1 cm and 0.1 degree, and equal scores.

All files are fabricated in the documented layout (navsim_town, navsim_files); no file of NAVSIM itself was read.
"""

import dataclasses
import itertools
import math

import numpy as np
import pyarrow.compute as pc
import pytest
import shapely

from autoscale_ray.evaluation import epdms, make_scene, pdms, two_frame_extended_comfort
from autoscale_ray.evaluation.from_pool import prepare_pool, score_pool
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.parquet import read_parquet
from autoscale_ray.scenes.pool import check_disjoint, open_pool
from autoscale_ray.scenes.schema import AGENT_TYPES, POLYGON_LAYERS
from autoscale_ray.scenes.split import split_by_log
from scenes import navsim_files as files
from scenes.navsim_town import make_town, write_maps

CM, TENTH_DEGREE = 0.01, math.radians(0.1)
LAYERS = ("roadblock", "lane", "lane_connector", "intersection", "carpark_area", "crosswalk")


@dataclasses.dataclass
class World:
    folder: object
    drives: dict
    pool: object


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two logs in one town: a drive with a turn under lights, and a straight one with NaN velocities."""
    folder, town = tmp_path_factory.mktemp("navsim"), make_town()
    write_maps(town, folder / "maps")
    turning = files.make_drive(town, num_agents=24)
    straight = files.make_drive(
        town,
        junctions=((2, 2), (1, 2), (0, 2)),
        num_frames=18,
        seed=3,
        name="2021.06.09.11.54.15_veh-12_00010_00100",
    )
    frames = {drive.name: files.frames_of(drive) for drive in (turning, straight)}
    for frame in frames[straight.name]:
        frame["anns"]["gt_velocity_3d"][:] = np.nan
    for log in frames.values():
        files.write_log(folder / "logs", log)
    ingest("navsim", folder / "logs", folder / "pool", "real", files={"maps": folder / "maps"})
    return World(folder, {drive.name: drive for drive in (turning, straight)}, open_pool(folder / "pool"))


def _rows(world):
    """Every scene: its row as numbers by column, its drive and its frame at 0 s."""
    table = world.pool.table(np.arange(len(world.pool)))
    for index in range(len(table)):
        row = {name: table[name][index].as_py() for name in table.column_names}
        drive = world.drives[row["log_id"]]
        yield row, drive, drive.tokens.index(row["scene_id"])


def _local(points, pose):
    """Map points in the frame of a pose, by complex numbers."""
    points = np.asarray(points, dtype=float)
    turned = ((points[..., 0] - pose[0]) + 1j * (points[..., 1] - pose[1])) * np.exp(-1j * pose[2])
    return np.stack([turned.real, turned.imag], axis=-1)


def _window(drive, frame):
    """Frames of the scene and which of them the default filter (4 history, 10 future) holds."""
    frames = np.arange(frame - 4, frame + 11)
    return np.clip(frames, 0, drive.num_frames - 1), np.arange(15) >= 1


def test_every_window_of_the_filter_is_there(world):
    # 24 frames give 11 windows of 14, 18 give 5; tokens are those of the fourth frame of each.
    expected = [token for drive in world.drives.values() for token in drive.tokens[3 : drive.num_frames - 10]]
    assert sorted(world.pool.scene_ids.tolist()) == sorted(expected)
    assert world.pool.manifest.num_quarantined == 0
    assert len(expected) == 16


def test_scalars_equal_the_truth(world):
    for row, drive, frame in _rows(world):
        pose = drive.ego[frame, :3]
        assert math.dist((row["origin_x_m"], row["origin_y_m"]), pose[:2]) < CM
        assert abs(wrap_angle(np.array(row["origin_yaw_rad"] - pose[2]))) < TENTH_DEGREE
        sizes = [row[f"ego_{name}_m"] for name in ("length", "width", "wheelbase", "rear_axle_to_center")]
        assert sizes == [5.176, 2.297, 3.089, 1.461], "NAVSIM's Pacifica"
        assert row["timestamp_us"] == drive.times_us[frame]
        assert row["driving_command"] == (1 if frame < drive.num_frames // 2 else 0)
        earlier = drive.tokens[frame - 1] if frame > 3 else None
        assert row["prev_scene_id"] == earlier
        assert (row["domain"], row["source"], row["origin_id"]) == ("real", "navsim", None)
        assert row["tags"] == ["us-nv-las-vegas-strip"]
        assert math.isnan(row["expert_quality"])


def test_a_frame_exactly_0_55_s_earlier_is_no_previous_scene(world, tmp_path):
    """As the official extended comfort has it; a link would stop the scoring of the pool."""
    drive = next(iter(world.drives.values()))
    times_us = drive.times_us[0] + 500_000 * np.arange(drive.num_frames)
    times_us[6:] += 50_000
    files.write_log(tmp_path / "logs", files.frames_of(dataclasses.replace(drive, times_us=times_us)))
    ingest("navsim", tmp_path / "logs", tmp_path / "pool", "real", files={"maps": world.folder / "maps"})
    pool = open_pool(tmp_path / "pool")
    before = dict(zip(pool.scene_ids.tolist(), pool.column("prev_scene_id").tolist(), strict=True))
    assert [before[token] for token in drive.tokens[4:8]] == [
        drive.tokens[3],
        drive.tokens[4],
        "",
        drive.tokens[6],
    ]


def test_ego_states_equal_the_truth(world):
    for row, drive, frame in _rows(world):
        frames, valid = _window(drive, frame)
        states = np.array(row["ego_states"]).reshape(15, 7)
        truth, pose = drive.ego[frames], drive.ego[frame, :3]
        assert row["ego_valid"] == valid.tolist()
        np.testing.assert_allclose(states[valid, :2], _local(truth[valid, :2], pose), atol=CM)
        assert (np.abs(wrap_angle(states[valid, 2] - (truth[valid, 2] - pose[2]))) < TENTH_DEGREE).all()
        np.testing.assert_allclose(states[valid, 3:], truth[valid, 3:], atol=1e-5)
        times = np.array(row["ego_times_us"])
        assert (times[valid] == drive.times_us[frames[valid]] - drive.times_us[frame]).all()
        assert not states[0].any()


def test_agents_equal_the_truth(world):
    for row, drive, frame in _rows(world):
        frames, inside = _window(drive, frame)
        by_number = dict(
            enumerate(sorted((agent for agent in drive.agents if agent.seen.any()), key=lambda a: a.token))
        )
        expected = {k: agent for k, agent in by_number.items() if agent.seen[frames[inside]].any()}
        assert row["agent_track"] == sorted(expected)
        states = np.array(row["agent_states"]).reshape(-1, 15, 5)
        sizes = np.array(row["agent_size"]).reshape(-1, 2)
        for slot, (number, agent) in enumerate(sorted(expected.items())):
            seen = inside & agent.seen[frames]
            assert row["agent_valid"][15 * slot : 15 * slot + 15] == seen.tolist(), number
            truth, pose = agent.states[frames[seen]], drive.ego[frame, :3]
            np.testing.assert_allclose(states[slot, seen, :2], _local(truth[:, :2], pose), atol=CM)
            assert (np.abs(wrap_angle(states[slot, seen, 2] - (truth[:, 2] - pose[2]))) < TENTH_DEGREE).all()
            velocity = _local(truth[:, 3:], (0.0, 0.0, pose[2]))
            # Missing velocities are differenced over times that jitter by up to 1 ms each.
            np.testing.assert_allclose(states[slot, seen, 3:], velocity, atol=0.03)
            assert AGENT_TYPES[row["agent_type"][slot]] == agent.kind
            np.testing.assert_allclose(sizes[slot], agent.size[:2], atol=1e-6)


def _map_truth(drive, frame):
    """Expected rings by layer, with the fid of a lane: all that touches the square around the ego's centre."""
    town, (x, y, yaw) = drive.town, drive.ego[frame, :3]
    x, y = x + 1.461 * math.cos(yaw), y + 1.461 * math.sin(yaw)
    square = shapely.box(x - 100, y - 100, x + 100, y + 100)

    def near(ring):
        return shapely.Polygon(ring).intersects(square)

    blocks = [block for block in town.blocks.values() if near(block.ring)]
    turns = [turn for turn in town.block_connectors.values() if near(turn.ring)]
    rings = {
        "roadblock": [(block.ring, None) for block in blocks],
        "lane": [(town.lanes[fid].ring, fid) for block in blocks for fid in block.lanes],
        "lane_connector": [(town.connectors[fid].ring, fid) for turn in turns for fid in turn.lanes],
    }
    for layer, areas in (
        ("intersection", town.intersections), ("carpark_area", town.carparks), ("crosswalk", town.crosswalks)
    ):  # fmt: skip
        rings[layer] = [(ring, None) for ring in areas.values() if near(ring)]
    return rings


def _lane_fids(row, drive, frame):
    """The fid of each lane of a row, found by the places of its ends."""
    points, offsets = np.array(row["lane_points"]).reshape(-1, 2), row["lane_offsets"]
    pose, fids = drive.ego[frame, :3], []
    wanted = [fid for layer in ("lane", "lane_connector") for _, fid in _map_truth(drive, frame)[layer]]
    ends = np.array([_local(drive.town.lane(fid).line[[0, -1]], pose) for fid in wanted])
    for low, high in itertools.pairwise(offsets):
        error = np.linalg.norm(ends - points[[low, high - 1]], axis=2).max(axis=1)
        assert error.min() < CM
        fids.append(wanted[int(error.argmin())])
        line = shapely.LineString(_local(drive.town.lane(fids[-1]).line, pose))
        assert shapely.hausdorff_distance(line, shapely.LineString(points[low:high])) < 2 * CM
    assert sorted(fids) == sorted(wanted)
    return fids


def test_polygons_and_lights_equal_the_truth(world):
    for row, drive, frame in list(_rows(world))[::3]:
        pose, expected = drive.ego[frame, :3], _map_truth(drive, frame)
        frames, inside = _window(drive, frame)
        points, offsets = np.array(row["polygon_points"]).reshape(-1, 2), row["polygon_offsets"]
        fids = _lane_fids(row, drive, frame)
        route_lanes = {fid for block in drive.route for fid in _block(drive.town, block).lanes}
        red_QT = np.array(row["polygon_red"]).reshape(-1, 15)
        for code, layer in enumerate(LAYERS):
            own = [q for q, found in enumerate(row["polygon_layer"]) if found == code]
            assert len(own) == len(expected[layer]), layer
            truth = [(_local(ring, pose), fid) for ring, fid in expected[layer]]
            for q in own:
                ring = points[offsets[q] : offsets[q + 1]]
                error = [
                    np.abs(ring - other).max() if len(ring) == len(other) else math.inf for other, _ in truth
                ]
                assert min(error) < CM, layer
                fid = truth[int(np.argmin(error))][1]
                assert row["polygon_lane"][q] == (fids.index(fid) if fid is not None else -1)
                assert row["polygon_on_route"][q] == (fid in route_lanes)
                lights = [bool(inside[t] and drive.red[k].get(fid, False)) for t, k in enumerate(frames)]
                assert red_QT[q].tolist() == lights
    assert LAYERS == POLYGON_LAYERS


def _block(town, fid):
    return town.blocks.get(fid) or town.block_connectors[fid]


def test_lanes_links_limits_and_widths_equal_the_truth(world):
    for row, drive, frame in list(_rows(world))[::5]:
        town, fids = drive.town, _lane_fids(row, drive, frame)
        lanes = [town.lane(fid) for fid in fids]
        limits = [math.nan if lane.limit is None else lane.limit for lane in lanes]
        np.testing.assert_allclose(row["lane_speed_limit_mps"], limits, rtol=1e-6)
        widths = [shapely.Polygon(lane.ring).area / shapely.LineString(lane.line).length for lane in lanes]
        np.testing.assert_allclose(row["lane_width_m"], widths, atol=CM)
        route_lanes = {fid for block in drive.route for fid in _block(town, block).lanes}
        assert row["lane_on_route"] == [fid in route_lanes for fid in fids]
        links = {(fids[a], fids[b], kind) for a, b, kind in np.array(row["lane_links"]).reshape(-1, 3)}
        expected = set()
        for fid, lane in zip(fids, lanes, strict=True):
            if fid in town.connectors:
                expected |= {(lane.start_lane, fid, 0), (fid, lane.end_lane, 0)}
            else:
                group = town.blocks[lane.block].lanes
                expected |= {(fid, group[lane.index + 1], 2)} if lane.index + 1 < len(group) else set()
                expected |= {(fid, group[lane.index - 1], 1)} if lane.index else set()
        assert links == {link for link in expected if link[0] in fids and link[1] in fids}


def test_the_centerline_is_that_of_the_route(world):
    for row, drive, frame in _rows(world):
        pose = drive.ego[frame, :3]
        parts = [drive.town.lane(fid).line for fid in drive.route_lanes]
        yaw = []
        for part in parts:
            step = np.diff(part, axis=0)
            yaw.append(np.append(np.arctan2(step[:, 1], step[:, 0]), np.arctan2(*step[-1][::-1])))
        truth = np.column_stack([_local(np.concatenate(parts), pose), np.concatenate(yaw) - pose[2]])
        line = np.array(row["centerline"]).reshape(-1, 3)
        begin = int(np.argmin(np.linalg.norm(truth[:, :2] - line[0, :2], axis=1)))
        begin = next(k for k in (begin, begin - 1) if len(truth[k:]) >= len(line) and k >= 0)
        cut = truth[begin : begin + len(line)]
        np.testing.assert_allclose(line[:, :2], cut[:, :2], atol=CM)
        assert (np.abs(wrap_angle(line[:, 2] - cut[:, 2])) < TENTH_DEGREE).all()
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(truth[:, :2], axis=0), axis=1))])
        foot = along[np.argmin(np.linalg.norm(truth[:, :2], axis=1))]
        covered = (along[begin], along[begin + len(line) - 1])
        assert covered[0] <= max(0.0, foot - 60.0) + 2.5
        assert covered[1] >= min(along[-1], foot + 300.0) - 2.5
        start = drive.town.lane(_lane_under(drive, frame)).limit
        found = row["route_speed_limit_mps"]
        assert math.isnan(found) if start is None else found == pytest.approx(start)


def _lane_under(drive, frame):
    point = shapely.Point(drive.ego[frame, :2])
    under = [fid for fid in drive.route_lanes if shapely.Polygon(drive.town.lane(fid).ring).intersects(point)]
    heading = drive.ego[frame, 2]

    def error(fid):
        line = drive.town.lane(fid).line
        near = int(np.argmin(np.linalg.norm(line - drive.ego[frame, :2], axis=1)))
        step = line[min(near + 1, len(line) - 1)] - line[min(near, len(line) - 2)]
        return abs(float(wrap_angle(np.arctan2(step[1], step[0]) - heading)))

    return min(under, key=error)


def direct_scene(drive, frame):
    """The same scene filled as a ScoringScene from the truth: map coordinates, float64, whole centre line."""
    expected, town = _map_truth(drive, frame), drive.town
    route_lanes = {fid for block in drive.route for fid in _block(town, block).lanes}
    rings = [(code, ring, fid) for code, layer in enumerate(LAYERS[:5]) for ring, fid in expected[layer]]
    frames = np.arange(frame, frame + 11)
    agents = [agent for agent in drive.agents if agent.seen[frames].any()]
    parts = [town.lane(fid).line for fid in drive.route_lanes]
    step = [np.diff(part, axis=0) for part in parts]
    yaw = [np.append(np.arctan2(s[:, 1], s[:, 0]), np.arctan2(*s[-1][::-1])) for s in step]
    pose, future = drive.ego[frame, :3], drive.ego[frame + 1 : frame + 9, :3]
    limit = town.lane(_lane_under(drive, frame)).limit
    return make_scene(
        drive.tokens[frame],
        ego_history_times_us=drive.times_us[frame - 3 : frame + 1],
        ego_history_states=drive.ego[frame - 3 : frame + 1],
        human_poses=np.column_stack([_local(future[:, :2], pose), wrap_angle(future[:, 2] - pose[2])]),
        agent_types=[AGENT_TYPES.index(agent.kind) for agent in agents],
        agent_dims=np.array([agent.size for agent in agents]).reshape(-1, 3),
        agent_states=np.array([agent.states[frames] for agent in agents]).reshape(-1, 11, 5),
        agent_mask=np.array([agent.seen[frames] for agent in agents], dtype=bool).reshape(-1, 11),
        polygon_layers=[code for code, _, _ in rings],
        polygon_on_route=[fid in route_lanes for _, _, fid in rings],
        polygon_red=[[drive.red[k].get(fid, False) for k in frames] for _, _, fid in rings],
        polygon_offsets=np.cumsum([0, *(len(ring) for _, ring, _ in rings)]),
        polygon_xy=np.concatenate([ring for _, ring, _ in rings]),
        centreline=np.column_stack([np.concatenate(parts), np.concatenate(yaw)]),
        speed_limit_mps=limit,
    )


def test_scores_of_the_human_equal_those_of_scenes_filled_directly(world):
    name = next(iter(world.drives))
    drive = world.drives[name]
    split_by_log(world.pool, {name: "dev"}, world.folder / "sides")
    pool = open_pool(world.folder / "sides" / "dev")
    frames = [drive.tokens.index(token) for token in pool.scene_ids.tolist()]
    assert (np.diff(frames) == 1).all(), "so that every scene but the first has a previous one"
    scenes = [direct_scene(drive, frame) for frame in frames]
    human = np.stack([scene.human_poses for scene in scenes])
    prepared = prepare_pool(pool)
    seconds = np.diff(drive.times_us[frames]) / 1e6
    for planned in (human, human * [0.7, 0.7, 1.0] + [0.0, 0.4, 0.0]):
        table = score_pool(prepared, planned)
        first = pdms(scenes, planned[:, None])
        second = epdms(scenes, planned[:, None], keep_states=True)
        assert first.score.valid.all()
        assert second.score.valid.all()
        comfort = two_frame_extended_comfort(second.states[1:, 0], second.states[:-1, 0], seconds)
        expected = {key: metric.value[:, 0] for key, metric in second.filtered.items()}
        expected |= {"pdms": first.score.value[:, 0], "pdms_comfort": first.filtered["comfort"].value[:, 0]}
        for key, values in expected.items():
            np.testing.assert_allclose(table[key].to_numpy(), values.numpy(), atol=1e-4, err_msg=key)
        np.testing.assert_array_equal(table["extended_comfort"].to_numpy()[1:], comfort.value.numpy())
        total = _with_comfort(second, comfort)
        np.testing.assert_allclose(table["epdms"].to_numpy(), total, atol=1e-4)
        assert (table["epdms"].to_numpy() > 0.5).all(), "lawful driving near the centre of the lane"


def _with_comfort(result, comfort):
    """EPDMS: with extended comfort the weights sum to 16, without (the first scene) to 14."""
    parts = {key: metric.value[:, 0].numpy() for key, metric in result.filtered.items()}
    factors = (
        "no_at_fault_collisions",
        "drivable_area_compliance",
        "driving_direction_compliance",
        "traffic_light_compliance",
    )
    product = np.prod([parts[key] for key in factors], axis=0)
    weighted = (
        5 * parts["ego_progress"] + 5 * parts["time_to_collision_within_bound"] + 2 * parts["lane_keeping"]
    )
    weighted = weighted + 2 * parts["history_comfort"]
    extra = np.concatenate([[0.0], comfort.value.numpy()])
    return product * (weighted + 2 * extra) / np.where(np.arange(len(extra)) == 0, 14.0, 16.0)


def test_two_processes_and_a_resumed_run_give_the_same_pool(world, tmp_path, monkeypatch):
    from autoscale_ray.scenes import ingest as module

    monkeypatch.setattr(module, "UNITS_PER_PART", 1)
    beside = {"maps": world.folder / "maps"}
    manifest = ingest(
        "navsim", world.folder / "logs", tmp_path / "two", "real", files=beside, num_processes=2
    )
    assert manifest.content_hash == world.pool.manifest.content_hash
    jobs = module.plan_parts("navsim", world.folder / "logs", tmp_path / "again", "real", files=beside)
    (tmp_path / ".again.ingest").mkdir()
    module.run_part(jobs[0])
    done = []
    resumed = ingest("navsim", world.folder / "logs", tmp_path / "again", "real", files=beside,
                     progress=lambda *count: done.append(count))  # fmt: skip
    assert done == [(2, 2)]
    assert resumed.content_hash == manifest.content_hash


def test_splits_by_log_share_nothing(world, tmp_path):
    first, second = world.drives
    split_by_log(world.pool, {first: "train", second: "dev"}, tmp_path)
    sides = {side: open_pool(tmp_path / side) for side in ("train", "dev")}
    check_disjoint(sides)
    assert set(sides["dev"].scene_ids.tolist()).isdisjoint(sides["train"].scene_ids.tolist())


def test_the_commands_ingest_and_score_do_the_same(world, tmp_path, monkeypatch):
    from autoscale_ray.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    name = next(iter(world.drives))
    drive = world.drives[name]
    tokens = drive.tokens[3:6]
    chosen = files.write_filter(tmp_path / "filter.yaml", log_names=[name], tokens=tokens)
    main(["ingest", "navsim", str(world.folder / "logs"), "--maps", str(world.folder / "maps"), "--filter", str(chosen),
          "--out", str(tmp_path / "pool"), "--domain", "real"])  # fmt: skip
    assert open_pool(tmp_path / "pool").scene_ids.tolist() == tokens
    scenes = [direct_scene(drive, 3 + number) for number in range(3)]
    human = np.stack([scene.human_poses for scene in scenes])[:, None]
    np.savez(tmp_path / "plans.npz", scene_id=np.array(tokens), trajectories=human)
    main(
        [
            "score",
            str(tmp_path / "plans.npz"),
            str(tmp_path / "pool"),
            "--out",
            str(tmp_path / "out.parquet"),
        ]
    )
    table = read_parquet(tmp_path / "out.parquet")
    assert table["valid"].to_pylist() == [True] * 6
    for version, score in (("v1", pdms), ("v2", epdms)):
        rows = table.filter(pc.equal(table["version"], version))
        assert rows["scene_id"].to_pylist() == tokens
        np.testing.assert_allclose(
            rows["score"].to_numpy(), score(scenes, human).score.value[:, 0], atol=1e-4
        )
