"""Windows, routes and lights of logs as NAVSIM's own code takes them, on fabricated logs whose truth is known."""

import numpy as np
import pytest

from autoscale_ray.evaluation import epdms
from autoscale_ray.evaluation.from_pool import scoring_scenes
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.schema import CURRENT_FRAME, NUM_FRAMES
from scenes import navsim_files as files
from scenes.navsim_town import make_town, write_maps


@pytest.fixture(scope="module")
def town():
    return make_town()


@pytest.fixture(scope="module")
def maps(town, tmp_path_factory):
    return write_maps(town, tmp_path_factory.mktemp("town"))


@pytest.fixture(scope="module")
def drive(town):
    return files.make_drive(town, num_frames=16, start_m=60.0)


def _ingested(folder, maps, frames, **beside):
    """Ingest one log: the pool and its quarantine rows."""
    files.write_log(folder / "logs", frames)
    ingest("navsim", folder / "logs", folder / "pool", "real", files={"maps": maps, **beside})
    pool = open_pool(folder / "pool", allow_empty=True)
    return pool, pool.side_table("quarantine").to_pylist()


@pytest.mark.parametrize("late_from", [2, 8])
def test_scenes_named_by_token_take_frames_by_their_place_across_a_gap(late_from, tmp_path, maps, drive):
    """As in NAVSIM. Times are the log's, so the past that comfort reads is longer; the future is scored by place."""
    frames = files.frames_of(drive)[:14]
    for frame in frames[late_from:]:
        frame["timestamp"] += 4_000_000
    _, (row,) = _ingested(tmp_path / "even", maps, frames)
    assert "0.5 s apart" in row["rule"]
    chosen = files.write_filter(tmp_path / "filter.yaml", tokens=[drive.tokens[3]])
    pool, rows = _ingested(tmp_path / "named", maps, frames, filter=chosen)
    assert rows == []
    times_us = drive.times_us[:14] + 4_000_000 * (np.arange(14) >= late_from)
    (found,) = pool.table([0])["ego_times_us"].to_pylist()
    assert found[1:] == (times_us - times_us[3]).tolist()
    plain, _ = _ingested(tmp_path / "plain", maps, files.frames_of(drive)[:14])
    along = np.linspace(0.5, 4.0, 8)
    plan = np.stack([7.0 * along, 0 * along, 0 * along], axis=1)[None, None]
    scores = [epdms([dict(scoring_scenes(one))[drive.tokens[3]]], plan) for one in (pool, plain)]
    assert all(bool(result.score.valid.all()) for result in scores)
    for name in scores[0].raw:
        if late_from > 3 or name != "history_comfort":
            assert scores[0].raw[name].value.tolist() == scores[1].raw[name].value.tolist()


def _red_of_lane(pool, connector_line):
    """Lights (T,) and route flag of the lane connector whose lane begins where a line does."""
    row = pool.table([0]).to_pylist()[0]
    cos, sin = np.cos(row["origin_yaw_rad"]), np.sin(row["origin_yaw_rad"])
    start = (connector_line[0] - [row["origin_x_m"], row["origin_y_m"]]) @ np.array([[cos, -sin], [sin, cos]])
    points = np.array(row["lane_points"]).reshape(-1, 2)[row["lane_offsets"][:-1]]
    red = np.array(row["polygon_red"]).reshape(-1, NUM_FRAMES)
    near = {lane for lane, point in enumerate(points) if np.hypot(*(point - start)) < 0.1}
    found = [
        (red[polygon], row["polygon_on_route"][polygon])
        for polygon, (lane, layer) in enumerate(zip(row["polygon_lane"], row["polygon_layer"], strict=True))
        if lane in near and layer == 2
    ]
    return np.array([lights for lights, _ in found]), np.array([flag for _, flag in found])


@pytest.mark.parametrize("num_missing", [0, 2])
def test_a_lane_that_only_the_corrected_route_has_is_not_red_after_0_s(
    num_missing, tmp_path, town, maps, drive
):
    """NAVSIM loads lights for the roadblocks that the frame names, and PDM-Closed, who reads 0 s, for all of the route.

    The ego stands before a red light. Where its frames leave out the roadblock under it and the turn ahead, the
    correction puts both back, and driving on is no offence; a turn off the route stays red for planners.
    """
    turn = town.block_connectors[drive.route[1]]
    aside = next(
        t for t in town.block_connectors.values() if t.start_block == turn.start_block and t is not turn
    )
    frames = files.frames_of(drive)[:14]
    for frame in frames:
        frame["roadblock_ids"] = frame["roadblock_ids"][num_missing:]
        frame["traffic_lights"] = [(fid, True) for fid in (*turn.lanes, *aside.lanes)]
    pool, rows = _ingested(tmp_path, maps, frames)
    assert rows == []
    red, on_route = _red_of_lane(pool, town.connectors[turn.lanes[0]].line)
    expected = np.ones(NUM_FRAMES, dtype=bool)
    expected[0] = False  # -2.0 s is not recorded
    others = expected.copy()
    expected[CURRENT_FRAME + 1 :] = num_missing == 0
    assert (red[on_route] == expected).all()
    assert 0 < on_route.sum() < len(on_route)
    assert (red[~on_route] == others).all()
    ((_, scene),) = scoring_scenes(pool)
    along = np.linspace(0.5, 4.0, 8)
    ahead = np.stack([12.0 * along, 0 * along, 0 * along], axis=1)
    result = epdms([scene], ahead[None, None])
    assert float(result.raw["traffic_light_compliance"].value[0, 0]) == float(num_missing > 0)
