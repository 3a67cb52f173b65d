"""Graph features against hand values, shapely and the batch they came from."""

import dataclasses

import numpy as np
import pytest
import shapely
import torch

from autoscale_ray.representation import kinematics
from autoscale_ray.representation.features import RADIUS_M
from autoscale_ray.representation.scene_graph import (
    RELATIONS,
    drop_nodes,
    global_edges,
    graph_from_batch,
    join_graphs,
    select_scenes,
)
from autoscale_ray.representation.segments import KINDS, cut_lanes, segment_links
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import CURRENT_FRAME
from tests.unit.representation.random_scenes import random_batch


def tables_of(graph):
    groups = (graph.features, graph.offsets, graph.sources, graph.degrees, graph.edge_offsets, graph.targets)
    return {f"{number}/{name}": table for number, group in enumerate(groups) for name, table in group.items()}


def assert_same_graph(first, second):
    first, second = tables_of(first), tables_of(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def test_relative_motion_of_a_car_ahead_that_brakes():
    observer = torch.tensor([[1.0, 2.0, np.pi / 2, 0.0, 10.0]])  # drives north at 10 m/s
    other = torch.tensor([[1.0, 22.0, np.pi / 2, 0.0, 6.0]])  # 20 m ahead, 4 m/s slower
    found = dict(
        zip(kinematics.RELATIVE_MOTION, kinematics.relative_motion(observer, other)[0].tolist(), strict=True)
    )
    expected = {"ahead": 1.0, "left": 0.0, "closing_x": -0.4, "closing_y": 0.0, "nearness": np.exp(-1),
                "inverse_ttc": 4 / 20, "headway": 2.0 / 8.0}  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)


def test_inverse_ttc_of_a_parting_object_is_zero():
    observer = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0]])
    other = torch.tensor([[20.0, 0.0, 0.0, 9.0, 0.0]])
    assert (
        kinematics.relative_motion(observer, other)[0, kinematics.RELATIVE_MOTION.index("inverse_ttc")] == 0
    )


def test_route_coordinates_agree_with_shapely():
    batch = random_batch(20, 3)
    points = torch.from_numpy(np.random.default_rng(0).uniform(-10, 60, (200, 2))).float()
    owner = torch.arange(200) % 20
    found = kinematics.route_coordinates(points, owner, kinematics.route_of(batch))
    offsets = batch.centerline_offsets
    for number in range(200):
        scene = int(owner[number])
        line = shapely.LineString(
            batch.centerline_C3[offsets[scene] : offsets[scene + 1], :2].double().numpy()
        )
        point = shapely.Point(points[number].tolist())
        along = line.project(point)
        if not 2 < along < line.length - 2:
            continue  # beyond an end the tangent frame goes on straight, shapely stops
        tangent = np.subtract(
            line.interpolate(along + 0.5).coords[0], line.interpolate(along - 0.5).coords[0]
        )
        offset = np.subtract(point.coords[0], line.interpolate(along).coords[0])
        side = np.sign(tangent[0] * offset[1] - tangent[1] * offset[0])
        # The nearest vertex stands for the nearest point: off by the bend between two vertices (2 m, 1/50 m).
        scale = 0.05 + 0.06 * line.distance(point)
        assert float(found[number, 0]) == pytest.approx(along - line.project(shapely.Point(0, 0)), abs=scale)
        assert float(found[number, 1]) == pytest.approx(side * line.distance(point), abs=scale)


def test_route_ahead_of_a_straight_route():
    batch = random_batch(1, 0)
    line = torch.stack([torch.arange(-10.0, 60.0), torch.zeros(70), torch.zeros(70)], dim=1)
    batch = dataclasses.replace(batch, centerline_C3=line, centerline_offsets=torch.tensor([0, 70]))
    found = kinematics.route_ahead(kinematics.route_of(batch), (5.0, 40.0, 500.0))
    # Routes are thinned to 64 vertices, so the vertex at or beyond the distance is up to 70 / 63 m farther.
    assert found[0, :, 0].tolist() == pytest.approx([5.0, 40.0, 59.0], abs=1.2)


def test_scene_without_route_has_places_in_its_own_frame():
    batch = random_batch(2, 0)
    batch = dataclasses.replace(
        batch, centerline_C3=torch.zeros(0, 3), centerline_offsets=torch.zeros(3, dtype=torch.int64)
    )
    found = kinematics.route_coordinates(
        torch.tensor([[3.0, -2.0]]), torch.tensor([1]), kinematics.route_of(batch)
    )
    assert found[0].tolist() == [3.0, -2.0, 0.0]
    assert graph_from_batch(batch).features["ego"].isfinite().all()


def test_lanes_are_cut_into_equal_pieces():
    batch = random_batch(1, 0, num_lanes=2)
    bent = torch.tensor([[0.0, 0.0], [30.0, 0.0], [30.0, 15.0], [100.0, 100.0], [100.0, 110.0]])
    batch = dataclasses.replace(batch, lane_points_V2=bent, lane_point_offsets=torch.tensor([0, 3, 5]))
    segments = cut_lanes(batch)
    assert segments.lane_G.tolist() == [0, 0, 0, 1]
    expected = [[[0, 0], [7.5, 0], [15, 0]], [[15, 0], [22.5, 0], [30, 0]], [[30, 0], [30, 7.5], [30, 15]],
                [[100, 100], [100, 105], [100, 110]]]  # fmt: skip
    torch.testing.assert_close(
        segments.points_G32, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0
    )
    assert segments.length_G.tolist() == pytest.approx([15, 15, 15, 10])


def test_segments_are_linked_along_and_across():
    batch = random_batch(1, 0, num_lanes=3)
    lanes = [torch.tensor([[0.0, y], [40.0, y]]) for y in (0.0, 3.5)] + [
        torch.tensor([[40.0, 0.0], [50.0, 0.0]])
    ]
    batch = dataclasses.replace(
        batch,
        lane_points_V2=torch.cat(lanes),
        lane_point_offsets=torch.tensor([0, 2, 4, 6]),
        links_E3=torch.tensor([[0, 1, 1], [0, 2, 0]]),  # lane 1 is left of lane 0, lane 2 follows lane 0
        link_offsets=torch.tensor([0, 2]),
    )
    found = {
        (source, target, KINDS[kind])
        for source, target, kind in segment_links(batch, cut_lanes(batch)).tolist()
    }
    along, across = {(0, 1), (2, 3), (1, 4)}, {(0, 2), (1, 3)}
    expected = {(first, second, "previous") for first, second in along}
    expected |= {(second, first, "next") for first, second in along}
    expected |= {(right, left, "right") for right, left in across}
    expected |= {(left, right, "left") for right, left in across}
    assert found == expected


def test_lanes_know_how_many_segments_they_are_linked_to_and_which_way_they_go_on():
    """A lane of two pieces with one beside it, which parts into one straight on and one to the left."""
    batch = random_batch(1, 0, num_lanes=4)
    lanes = [[[0.0, 0.0], [40.0, 0.0]], [[0.0, 3.5], [20.0, 3.5]], [[40.0, 0.0], [50.0, 0.0]],
             [[40.0, 0.0], [40.0, 10.0]]]  # fmt: skip
    batch = dataclasses.replace(
        batch,
        lane_points_V2=torch.tensor(lanes).flatten(0, 1),
        lane_point_offsets=torch.arange(5) * 2,
        links_E3=torch.tensor([[0, 1, 1], [0, 2, 0], [0, 3, 0]]),
        link_offsets=torch.tensor([0, 3]),
    )
    found = graph_from_batch(batch).features["lane"][:, -6:]
    one, two = np.log(2), np.log(3)
    expected = [  # next, previous, left, right; cos and sin of the turn
        [one, 0, one, 0, 1, 0],
        [two, one, one, 0, 0.5, 0.5],
        [0, 0, 0, two, 0, 0],
        [0, one, 0, 0, 0, 0],
        [0, one, 0, 0, 0, 0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_a_pair_that_is_linked_in_two_ways_is_one_edge():
    """Two lanes in a ring follow each other."""
    batch = random_batch(1, 0, num_lanes=2)
    lanes = [[[0.0, 0.0], [10.0, 0.0]], [[10.0, 0.0], [0.0, 0.0]]]
    batch = dataclasses.replace(
        batch,
        lane_points_V2=torch.tensor(lanes).flatten(0, 1),
        lane_point_offsets=torch.arange(3) * 2,
        links_E3=torch.tensor([[0, 1, 0], [1, 0, 0]]),
        link_offsets=torch.tensor([0, 2]),
    )
    assert global_edges(graph_from_batch(batch), "lane_lane").tolist() == [[1, 0], [0, 1]]


def test_nodes_are_the_objects_near_the_ego():
    batch = random_batch(50, 1)
    graph = graph_from_batch(batch)
    place = batch.agent_states_AT5[:, CURRENT_FRAME, :2].double().numpy()
    near = (np.hypot(*place.T) < RADIUS_M) & batch.agent_valid_AT[:, CURRENT_FRAME].numpy()
    count = np.bincount(batch.agent_row_A.numpy()[near], minlength=50)
    assert graph.offsets["agent"].diff().tolist() == count.tolist()


def test_features_are_finite_and_bounded():
    graph = graph_from_batch(random_batch(200, 2))
    for table in graph.features.values():
        assert table.isfinite().all()
        assert float(table.abs().max()) <= 5.0


def test_edges_stay_inside_their_scene_and_are_ordered():
    graph = graph_from_batch(random_batch(100, 4))
    for relation, (source, target) in RELATIONS.items():
        edges = global_edges(graph, relation)
        assert len(edges) > 0
        owner = row_of(graph.edge_offsets[relation])
        assert torch.equal(row_of(graph.offsets[source])[edges[:, 0]], owner)
        assert torch.equal(row_of(graph.offsets[target])[edges[:, 1]], owner)
        assert bool((edges[:, 1].diff() >= 0).all())


def test_the_future_can_be_kept_from_the_encoder():
    batch = random_batch(30, 5)
    changed = dataclasses.replace(
        batch, ego_states_NT7=batch.ego_states_NT7.clone(), agent_states_AT5=batch.agent_states_AT5.clone()
    )
    changed.ego_states_NT7[:, CURRENT_FRAME + 1 :] += 3.0
    changed.agent_states_AT5[:, CURRENT_FRAME + 1 :] -= 2.0
    past, past_changed = (graph_from_batch(item, use_future=False) for item in (batch, changed))
    future, future_changed = graph_from_batch(batch), graph_from_batch(changed)
    for name in past.features:
        assert torch.equal(past.features[name], past_changed.features[name])
    assert not torch.equal(future.features["ego"], future_changed.features["ego"])
    assert not torch.equal(future.features["agent"], future_changed.features["agent"])


def test_select_and_join_equal_building_from_the_same_scenes():
    batch = random_batch(40, 6)
    rows = torch.tensor([7, 3, 3, 30, 12])
    graph = graph_from_batch(batch)
    assert_same_graph(select_scenes(graph, rows), graph_from_batch(batch.select(rows)))
    parts = [graph_from_batch(batch.select(np.arange(low, low + 10))) for low in range(0, 40, 10)]
    assert_same_graph(join_graphs(parts), graph)


def test_dropped_agents_leave_no_edge():
    batch = random_batch(30, 8)
    graph = graph_from_batch(batch)
    keep = torch.from_numpy(np.random.default_rng(0).random(len(graph.features["agent"])) < 0.5)
    dropped = drop_nodes(graph, {"agent": keep})
    assert torch.equal(dropped.features["agent"], graph.features["agent"][keep])
    before = global_edges(graph, "agent_agent")
    number = keep.long().cumsum(0) - 1
    expected = number[before[keep[before].all(dim=1)]]
    assert torch.equal(global_edges(dropped, "agent_agent"), expected)
    assert torch.equal(global_edges(dropped, "lane_lane"), global_edges(graph, "lane_lane"))
