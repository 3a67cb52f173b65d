from __future__ import annotations

import errno
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import shapely
import torch
from conftest import OnePool, make_batch

from autoscale_ray.errors import ArtifactError
from autoscale_ray.planning import features as planner_features
from autoscale_ray.planning.agent_tokens import NUM_AGENT_FEATURES, nearest_elements, relevant_agents
from autoscale_ray.planning.features import (
    PlannerFeatures,
    concatenate,
    features_of_batch,
    features_of_pool,
    load_features,
    save_features,
    write_features,
)
from autoscale_ray.planning.frenet import make_routes, unproject_poses
from autoscale_ray.planning.map_tokens import lane_tokens, red_lanes, stop_line_distance
from autoscale_ray.scenes.schema import CURRENT_FRAME

INPUTS = ("ego_NF", "agents_NKF", "lanes_NKF", "state_N4", "route_NR3")


def assert_close(first: PlannerFeatures, second: PlannerFeatures, names: tuple[str, ...]) -> None:
    for name in names:
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=2e-4, err_msg=name)


def test_targets_come_back_as_the_recorded_poses(features):
    batch = make_batch(64)
    recorded = batch.ego_states_NT7[:, CURRENT_FRAME + 1 : CURRENT_FRAME + 9, :3]
    poses = unproject_poses(features.route_NR3, features.target_NP3)
    np.testing.assert_allclose(poses, recorded, atol=1e-4)


def test_inputs_never_see_the_future(config, features):
    batch = make_batch(64)
    rng = torch.Generator().manual_seed(0)
    ego, agents = batch.ego_states_NT7.clone(), batch.agent_states_AT5.clone()
    agents_valid, ego_valid = batch.agent_valid_AT.clone(), batch.ego_valid_NT.clone()
    red = batch.polygon_red_QT.clone()
    for frames in (slice(0, 1), slice(CURRENT_FRAME + 1, None)):  # -2.0 s is optional and never read either
        ego[:, frames] += torch.randn(ego[:, frames].shape, generator=rng)
        agents[:, frames] += torch.randn(agents[:, frames].shape, generator=rng)
        agents_valid[:, frames] ^= True
        ego_valid[:, frames] ^= True
        red[:, frames] ^= True
    changed = replace(
        batch,
        ego_states_NT7=ego,
        agent_states_AT5=agents,
        agent_valid_AT=agents_valid,
        ego_valid_NT=ego_valid,
        polygon_red_QT=red,
    )
    other = features_of_batch(changed, config)
    for name in INPUTS:
        torch.testing.assert_close(getattr(other, name), getattr(features, name), rtol=0, atol=0)
    assert not torch.equal(other.target_NP3, features.target_NP3)


def test_a_scene_keeps_its_features_wherever_it_stands(config, features):
    rows = torch.tensor([40, 3, 3, 17])
    alone = features_of_batch(make_batch(64).select(rows), config)
    assert_close(alone, features.take(rows), tuple(field.name for field in fields(PlannerFeatures)))


def test_inputs_do_not_depend_on_the_order_of_agents(config):
    batch = make_batch(1, seed=4)
    turned = torch.arange(len(batch.agent_type_A)).flip(0)
    agent_fields = ("agent_type_A", "agent_size_A2", "agent_states_AT5", "agent_valid_AT")
    flipped = replace(batch, **{name: getattr(batch, name)[turned] for name in agent_fields})
    assert_close(features_of_batch(batch, config), features_of_batch(flipped, config), INPUTS)


def test_no_input_is_infinite_or_missing_without_speed_limits_agents_or_lanes(config):
    batch = make_batch(8)
    none = torch.zeros(9, dtype=torch.int64)
    empty = replace(
        batch,
        agent_offsets=none,
        lane_offsets=none,
        lane_point_offsets=none[:1],
        route_speed_limit_N=torch.full((8,), torch.nan),
        polygon_lane_Q=torch.full((16,), -1),
        **{name: getattr(batch, name)[:0] for name in
           ("agent_type_A", "agent_size_A2", "agent_states_AT5", "agent_valid_AT", "lane_points_V2",
            "lane_width_L", "lane_speed_limit_L", "lane_on_route_L")},
    )  # fmt: skip
    found = features_of_batch(empty, config)
    for name in INPUTS:
        assert getattr(found, name).isfinite().all(), name
    assert not found.agents_NKF.any()
    assert not found.lanes_NKF.any()


def test_nearest_elements_agrees_with_a_loop():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, 20)
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(counts)]))
    distance = torch.tensor(rng.integers(0, 5, int(counts.sum()))).float()
    distance[::6] = torch.inf
    found = nearest_elements(distance, offsets, 3)
    for row in range(20):
        elements = range(int(offsets[row]), int(offsets[row + 1]))
        wanted = sorted((element for element in elements if distance[element] < torch.inf),
                        key=lambda element: (float(distance[element]), element))[:3]  # fmt: skip
        assert found[row].tolist() == wanted + [-1] * (3 - len(wanted))


def test_the_agent_on_the_ego_path_comes_before_one_that_is_closer_but_leaving():
    batch = make_batch(1, seed=2)
    states = torch.zeros(2, 15, 5)
    # Beside the ego, driving away to the left.
    states[0, :, 0], states[0, :, 1], states[0, :, 4] = 3.0, 7.0, 8.0
    states[1, :, 0] = 25.0  # standing on a straight route
    line = torch.tensor([[-30.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
    ego = torch.zeros(1, 15, 7)
    ego[..., 3] = 10.0
    batch = replace(
        batch,
        ego_states_NT7=ego,
        agent_offsets=torch.tensor([0, 2]),
        agent_states_AT5=states,
        agent_valid_AT=torch.ones(2, 15, dtype=torch.bool),
        agent_type_A=torch.zeros(2, dtype=torch.int64),
        agent_size_A2=torch.tensor([[4.0, 2.0]] * 2),
        centerline_C3=line,
        centerline_offsets=torch.tensor([0, 2]),
    )
    index = relevant_agents(batch, make_routes(line, batch.centerline_offsets), 2)
    assert index.tolist() == [[1, 0]]


def test_relational_features_of_a_hand_made_follower(config):
    batch = make_batch(1, seed=2)
    states = torch.zeros(1, 15, 5)
    states[0, :, 0], states[0, :, 3] = 20.0, 5.0
    line = torch.tensor([[-30.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
    ego = torch.zeros(1, 15, 7)
    ego[..., 3] = 10.0
    batch = replace(
        batch,
        ego_states_NT7=ego,
        agent_offsets=torch.tensor([0, 1]),
        agent_states_AT5=states,
        agent_valid_AT=torch.ones(1, 15, dtype=torch.bool),
        agent_type_A=torch.zeros(1, dtype=torch.int64),
        agent_size_A2=torch.tensor([[4.0, 2.0]]),
        centerline_C3=line,
        centerline_offsets=torch.tensor([0, 2]),
    )
    token = features_of_batch(batch, config).agents_NKF[0, 0]
    assert token.shape == (NUM_AGENT_FEATURES,)
    gap_m = 20.0 - 2.0 - (4.8 / 2 + 1.4)
    # Slot, place and velocity, 10 features of motion, then: gap / 20 m, exp(-gap / 10 m), 1 / TTC, braking / 3 m/s^2.
    np.testing.assert_allclose(token[5:7], [1.0, 1 / 3], atol=1e-5)
    np.testing.assert_allclose(token[12:15], [0.5, 0.0, 0.5], atol=1e-5)
    expected = [gap_m / 20, np.exp(-gap_m / 10), 5.0 / gap_m, 25.0 / (2 * gap_m) / 3]
    np.testing.assert_allclose(token[15:19], expected, atol=1e-5)


def test_red_connector_gives_a_stop_line_and_a_red_lane():
    batch = make_batch(9)
    routes = make_routes(batch.centerline_C3, batch.centerline_offsets)
    distance = stop_line_distance(batch, routes)
    red = torch.arange(9) % 3 == 0
    assert distance[~red].isinf().all()
    corners = torch.tensor([[40.0, -1.75], [60.0, -1.75], [60.0, 1.75], [40.0, 1.75]])
    for row in red.nonzero().flatten().tolist():
        line = shapely.LineString(routes[row, :, :2].double().numpy())
        reference = min(line.project(shapely.Point(corner)) - 20.0 for corner in corners.double().numpy())
        np.testing.assert_allclose(float(distance[row]), reference, atol=0.2)
    assert red_lanes(batch).view(9, 2).tolist() == [[bool(flag), False] for flag in red]
    assert not lane_tokens(batch, routes, 3)[:, 2].any()


def test_saved_features_come_back_and_damage_is_refused(tmp_path, features):
    save_features(features, tmp_path / "cache")
    loaded = load_features(tmp_path / "cache")
    for field in fields(PlannerFeatures):
        assert torch.equal(getattr(loaded, field.name), getattr(features, field.name))
    (tmp_path / "cache" / "features.json").unlink()
    with pytest.raises(ArtifactError, match="planner features"):
        load_features(tmp_path / "cache")


def test_concatenated_features_keep_their_order(features):
    first, second = features.take(torch.tensor([5, 1])), features.take(torch.tensor([9]))
    joined = concatenate([first, second])
    assert len(joined) == 3
    for rows in ([0, 1, 2], [2, 0, 2, 1], [1], []):
        wanted = torch.tensor(rows, dtype=torch.int64)
        assert_same(joined.take(wanted), features.take(torch.tensor([5, 1, 9])[wanted]))
        if rows:
            assert joined.most_filled(wanted) == features.most_filled(torch.tensor([5, 1, 9])[wanted])
    with pytest.raises(AssertionError, match="out of range"):
        joined.take(torch.tensor([3]))


def assert_same(first: PlannerFeatures, second: PlannerFeatures) -> None:
    for field in fields(PlannerFeatures):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name


def test_features_of_a_pool_are_written_a_chunk_at_a_time_and_to_the_same_bytes(
    config, tmp_path, monkeypatch
):
    """Never more than two chunks are there at once: the one being written, and the next."""
    monkeypatch.setattr(planner_features, "CHUNK_SCENES", 8)
    whole = features_of_pool(OnePool(44), config)
    made, sizes, alive = [], [], []
    original = features_of_batch

    def counted(batch, config):
        chunk = original(batch, config)
        made.append(weakref.ref(chunk.occupancy_NOGG))
        sizes.append(len(chunk))
        alive.append(sum(chunk() is not None for chunk in made))
        return chunk

    monkeypatch.setattr(planner_features, "features_of_batch", counted)
    write_features(OnePool(44), tmp_path / "written", config)
    assert sizes == [8, 8, 8, 8, 8, 4]
    assert max(alive) <= 2
    save_features(whole, tmp_path / "saved")
    for field in fields(PlannerFeatures):
        np.save(tmp_path / "numpy.npy", getattr(whole, field.name).numpy())
        expected = (tmp_path / "numpy.npy").read_bytes()
        for folder in ("written", "saved"):
            assert (tmp_path / folder / f"{field.name}.npy").read_bytes() == expected, (folder, field.name)


def test_a_full_disk_is_told_and_leaves_no_description(config, tmp_path):
    (tmp_path / "route_NR3.npy").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as told:
        write_features(OnePool(44), tmp_path, config)
    assert told.value.errno == errno.ENOSPC
    assert not (tmp_path / "features.json").exists()
