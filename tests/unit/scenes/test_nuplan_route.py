"""nuPlan maps and routes on them, against the made-up town's own tables."""

import itertools
import math

import networkx
import numpy as np
import pytest
import shapely

from autoscale_ray.scenes import geopackage, geopackage_child
from autoscale_ray.scenes.readers import nuplan_map
from autoscale_ray.scenes.readers.navsim_scenes import ego_footprint
from autoscale_ray.scenes.readers.nuplan_map import open_map
from autoscale_ray.scenes.readers.nuplan_route import RouteFinder
from scenes.navsim_town import LOCATION, make_town, write_maps


@pytest.fixture(scope="module")
def town():
    return make_town()


@pytest.fixture(scope="module")
def road(town, tmp_path_factory):
    return open_map(write_maps(town, tmp_path_factory.mktemp("maps")), LOCATION)


def _fids(road, town):
    """The fid of every lane and every roadblock of the map, from its tables."""
    lanes = [*town.lanes, *road.connector_number]
    blocks = {number: fid for fid, number in road.block_number.items()}
    # The reader numbers lanes in the order of fid, as GDAL reads them.
    return [*sorted(town.lanes), *lanes[len(town.lanes) :]], blocks


def _route(road, town, blocks, pose):
    numbers = tuple(road.block_number[fid] for fid in blocks)
    route = RouteFinder(road).route(numbers, pose, ego_footprint(pose))
    lanes, block_fids = _fids(road, town)
    found = [lanes[lane] for lane in route.lanes]
    all_blocks = {block_fids[int(road.lane_block_L[lane])] for lane in route.route_lanes}
    return found, all_blocks


def _pose(town, lane_fid, share, sideways=0.0, turn=0.0):
    """A pose on a lane at a share of its length."""
    line = shapely.LineString(town.lane(lane_fid).line)
    at = line.interpolate(share, normalized=True)
    ahead = line.interpolate(share + 0.01, normalized=True)
    yaw = math.atan2(ahead.y - at.y, ahead.x - at.x)
    return np.array([at.x - sideways * math.sin(yaw), at.y + sideways * math.cos(yaw), yaw + turn])


def _streets(town, *junctions):
    return [town.street[pair] for pair in itertools.pairwise(junctions)]


def _joined(town, blocks):
    """Streets with the roadblock connectors between them."""
    joined = [blocks[0]]
    for before, after in itertools.pairwise(blocks):
        ends = (before, after)
        joined += [fid for fid, t in town.block_connectors.items() if (t.start_block, t.end_block) == ends]
        joined.append(after)
    return joined


def test_the_graph_is_that_of_the_tables(road, town):
    lanes, blocks = _fids(road, town)
    found = {(lanes[a], lanes[b]) for a, ends in enumerate(road.next_lanes) for b in ends}
    expected = {(c.start_lane, c.fid) for c in town.connectors.values()}
    expected |= {(c.fid, c.end_lane) for c in town.connectors.values()}
    assert found == expected
    found = {(blocks[a], blocks[b]) for a, ends in enumerate(road.next_blocks) for b in ends}
    expected = {(t.start_block, t.fid) for t in town.block_connectors.values()}
    expected |= {(t.fid, t.end_block) for t in town.block_connectors.values()}
    assert found == expected
    for number, fid in blocks.items():
        group = town.blocks.get(fid) or town.block_connectors[fid]
        assert sorted(lanes[lane] for lane in road.lanes_of(number)) == sorted(group.lanes)
    length = [shapely.LineString(town.lane(fid).line).length for fid in lanes]
    np.testing.assert_allclose(road.length_L, length, atol=1e-4)


def test_numbers_stored_as_texts_are_numbers(town, road, tmp_path, monkeypatch):
    monkeypatch.setattr(geopackage, "_asked", lambda path, *rest: geopackage_child.answer(str(path), *rest))

    def as_texts(database):
        for column in ("speed_limit_mps", "lane_group_fid"):
            database.execute(f"ALTER TABLE lanes_polygons ADD COLUMN copy_{column} TEXT")
            database.execute(f"UPDATE lanes_polygons SET copy_{column} = {column}")
            database.execute(f"ALTER TABLE lanes_polygons DROP COLUMN {column}")
            database.execute(f"ALTER TABLE lanes_polygons RENAME COLUMN copy_{column} TO {column}")

    other = open_map(write_maps(town, tmp_path / "maps", change=as_texts), LOCATION)
    np.testing.assert_array_equal(other.speed_limit_L, road.speed_limit_L)
    np.testing.assert_array_equal(other.lane_block_L, road.lane_block_L)


def test_the_centerline_is_the_shortest_chain_of_lanes(road, town):
    blocks = _joined(town, _streets(town, (0, 0), (1, 0), (2, 0), (2, 1), (1, 1)))
    allowed = {
        fid for block in blocks for fid in (town.blocks.get(block) or town.block_connectors[block]).lanes
    }
    graph = networkx.DiGraph()
    for connector in town.connectors.values():
        for a, b in ((connector.start_lane, connector.fid), (connector.fid, connector.end_lane)):
            if a in allowed and b in allowed:
                graph.add_edge(a, b, weight=shapely.LineString(town.lane(b).line).length)
    goals = town.blocks[blocks[-1]].lanes
    for start in town.blocks[blocks[0]].lanes:
        lanes, found_blocks = _route(road, town, blocks, _pose(town, start, 0.5))
        assert found_blocks == set(blocks)
        ways = [networkx.shortest_path(graph, start, goal, "weight") for goal in goals
                if {start, goal} <= set(graph) and networkx.has_path(graph, start, goal)]  # fmt: skip
        if ways:
            assert lanes == min(ways, key=lambda way: networkx.path_weight(graph, way, "weight"))
        else:
            # The right lane does not lead to a left turn: the deepest chain, here straight on, is taken.
            assert lanes[0] == start
            assert set(lanes) <= allowed


def test_a_start_before_the_route_is_joined_to_it(road, town):
    whole = _joined(town, _streets(town, (0, 1), (1, 1), (2, 1), (2, 2)))
    start = town.blocks[whole[0]].lanes[0]
    lanes, blocks = _route(road, town, whole[2:], _pose(town, start, 0.4))
    assert lanes[0] == start
    assert blocks == set(whole)


def test_a_start_beside_the_route_is_led_on_to_it(road, town):
    # The ego is on the street (0, 0) -> (1, 0), the route begins with two streets that do not lead there.
    route = _joined(town, _streets(town, (1, 2), (1, 1), (2, 1)))
    here = town.street[(0, 1), (1, 1)]
    lanes, blocks = _route(road, town, route[2:], _pose(town, town.blocks[here].lanes[0], 0.3))
    assert town.lane(lanes[0]).block == here
    assert blocks == {here, *_joined(town, [here, route[-1]])}


def test_gaps_of_the_route_are_filled(road, town):
    whole = _joined(town, _streets(town, (0, 0), (1, 0), (2, 0)))
    lanes, blocks = _route(
        road, town, [whole[0], whole[-1]], _pose(town, town.blocks[whole[0]].lanes[1], 0.5)
    )
    assert blocks == set(whole)
    assert len(lanes) == 3


def test_a_route_that_crosses_itself_ends_before_the_crossing(road, town):
    whole = _joined(town, _streets(town, (2, 1), (1, 1), (0, 1), (0, 0), (1, 0), (1, 1), (1, 2)))
    _, blocks = _route(road, town, whole, _pose(town, town.blocks[whole[0]].lanes[0], 0.5))
    crossing = whole[-2]
    assert crossing in town.block_connectors
    assert blocks == set(whole[: whole.index(crossing)])


def test_the_starting_lane_has_the_least_heading_error(road, town):
    block = town.street[(0, 0), (1, 0)]
    turns = [t for t in town.block_connectors.values() if t.start_block == block]
    for turn in turns:
        fid = turn.lanes[-1]
        lanes, _ = _route(road, town, [block, turn.fid, turn.end_block], _pose(town, fid, 0.8))
        assert lanes[0] == fid


def test_off_the_lanes_the_nearest_one_starts(road, town):
    block = town.street[(0, 0), (1, 0)]
    right = town.blocks[block].lanes[-1]
    lanes, _ = _route(
        road, town, _joined(town, [block, town.street[(1, 0), (2, 0)]]), _pose(town, right, 0.5, -4.5)
    )
    assert lanes[0] == right


def test_maps_are_read_once(town, tmp_path, monkeypatch):
    calls = []
    answer = geopackage_child.answer
    monkeypatch.setattr(
        geopackage, "_asked", lambda path, *rest: (calls.append(path), answer(str(path), *rest))[1]
    )
    folder = write_maps(make_town(size=2), tmp_path / "maps")
    assert open_map(folder, "las_vegas") is open_map(folder, LOCATION)
    assert len(calls) == 1
    assert nuplan_map._cached_map.cache_info().maxsize == 4
