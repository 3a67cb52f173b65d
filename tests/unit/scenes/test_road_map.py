import dataclasses
import itertools
import math

import numpy as np
import pytest
import shapely
import shapely.ops

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.kinematics import rear_axle_states, wrap_angle
from autoscale_ray.scenes.lane_matching import LaneMatcher
from autoscale_ray.scenes.recording import Track, gather_tracks
from autoscale_ray.scenes.road_map import Lane, make_road_map, offset_borders, pair_borders
from autoscale_ray.scenes.routes import RoutePlanner, cut_lines
from scenes.small_world import lane


def _ring(road, lane: int) -> np.ndarray:
    run = slice(road.offsets[lane], road.offsets[lane + 1])
    return np.concatenate([road.left_V2[run], road.right_V2[run][::-1]])


def test_crossing_lanes_and_their_fork_become_connectors():
    road = make_road_map(
        [
            lane("in", [(-30, 0), (0, 0)], successors=("over", "right")),
            lane("over", [(0, 0), (20, 0)], successors=("out",)),
            lane("right", [(0, 0), (3, -1), (5, -8)]),
            lane("out", [(20, 0), (60, 0)]),
            lane("cross", [(12, -20), (12, 20)]),
            lane("beside", [(20, 4), (60, 4)]),
        ]
    )
    assert dict(zip(road.keys, road.is_connector_L.tolist(), strict=True)) == {
        "in": False, "over": True, "right": True, "out": False, "cross": True, "beside": False,
    }  # fmt: skip


def test_a_merge_at_a_small_angle_is_no_intersection():
    road = make_road_map([lane("main", [(0, 0), (100, 0)]), lane("ramp", [(20, -12), (80, 0)])])
    assert not road.is_connector_L.any()


@pytest.mark.parametrize("seed", range(12))
def test_crossing_lanes_are_those_of_every_intersection_formed(seed):
    rng = np.random.default_rng(seed)
    lanes = []
    for key in range(24):
        turns = np.cumsum(rng.normal(0.0, 0.25, 8)) + rng.uniform(-np.pi, np.pi)
        steps = 6.0 * np.column_stack([np.cos(turns), np.sin(turns)])
        center = rng.uniform(-40.0, 40.0, 2) + np.cumsum(steps, axis=0)
        left, right = offset_borders(center, 1.5, 1.5)
        lanes.append(Lane(key=key, left=left, right=right))
    shapes = [shapely.make_valid(shapely.Polygon([*lane.left, *lane.right[::-1]])) for lane in lanes]
    expected = np.zeros(len(lanes), dtype=bool)
    for one, two in itertools.combinations(range(len(lanes)), 2):
        shared = shapes[one].intersection(shapes[two])
        if shared.area >= 1.0:
            ways = [_heading_at(lanes[number], shared.centroid) for number in (one, two)]
            expected[[one, two]] |= bool(np.cos(ways[0] - ways[1]) <= np.cos(np.radians(30.0)))
    assert expected.any()
    assert not expected.all()
    assert make_road_map(lanes).is_connector_L.tolist() == expected.tolist()


def _heading_at(lane: Lane, place: shapely.Point) -> float:
    center = (lane.left + lane.right) / 2.0
    middles = (center[1:] + center[:-1]) / 2.0
    nearest = int(np.hypot(*(middles - [place.x, place.y]).T).argmin())
    return math.atan2(*(center[nearest + 1] - center[nearest])[::-1])


def test_borders_are_paired_by_arc_length():
    left = np.array([[0.0, 2.0], [50.0, 2.0]])
    right = np.array([[0.0, 0.0], [10.0, 0.0], [50.0, 0.0]])
    one, two = pair_borders(left, right)
    assert len(one) == len(two) == 18
    np.testing.assert_allclose(one[:, 0], two[:, 0], atol=1e-9)
    up, down = offset_borders(np.array([[0.0, 0.0], [10.0, 0.0]]), 1.5, 1.5)
    np.testing.assert_allclose(up[:, 1], 1.5)
    np.testing.assert_allclose(down[:, 1], -1.5)


def _two_lanes():
    return make_road_map(
        [
            lane("a", [(0, 0), (60, 0)], right_neighbour="b", successors=("a2",)),
            lane("b", [(0, -4), (60, -4)]),
            lane("a2", [(60, 0), (120, 0)]),
        ]
    )


def _poses(points, yaw=0.7):
    from scenes.small_world import place

    return np.column_stack([place(np.array(points)), np.full(len(points), yaw)])


def test_matching_keeps_the_lane_through_noise_and_sees_a_lane_change():
    matcher = LaneMatcher(_two_lanes())
    noisy = [(float(x), 1.4 * (-1) ** n) for n, x in enumerate(range(0, 60, 5))]
    assert matcher.match([_poses(noisy)])[0].tolist() == [0] * 12
    change = [(float(x), -4.0 * (x >= 30)) for x in range(0, 60, 5)]
    assert matcher.match([_poses(change)])[0].tolist() == [0] * 6 + [1] * 6
    assert matcher.match([_poses(change, yaw=0.7 + math.pi)])[0].tolist() == [-1] * 12
    assert matcher.match([_poses([(10.0, 40.0)])])[0].tolist() == [-1]


def test_a_vertex_without_end_is_refused_and_not_filled_in():
    left, right = offset_borders(np.array([[0.0, 0.0], [10.0, 0.0], [1e18, 0.0]]), 1.5, 1.5)
    with pytest.raises(InputRejectedError, match="lane a: must be at most 200000 m long"):
        make_road_map([Lane(key="a", left=left, right=right)])


def test_keys_are_unique_and_a_limit_that_is_no_speed_is_unknown():
    lanes = [
        lane(key, [(0, 0), (9, 0)], speed_limit_mps=limit)
        for key, limit in zip("abcd", (9.0, -1.0, math.inf, 0.0), strict=True)
    ]
    np.testing.assert_array_equal(make_road_map(lanes).speed_limit_L, [9.0, np.nan, np.nan, np.nan])
    with pytest.raises(InputRejectedError, match=r"lanes: ids must be unique \(found 'a'\)"):
        make_road_map([*lanes, lane("a", [(0, 0), (9, 0)])])


def test_matched_chains_are_the_cheapest_of_all_and_tracks_do_not_mix():
    """Every chain of lanes is tried and priced by the rule of `LaneMatcher`, written out."""
    road, generator = _two_lanes(), np.random.default_rng(3)
    follows, beside = set(), set()
    for start, end, kind in road.links_E3.tolist():
        (follows if kind == 0 else beside).add((start, end))
    lines = [shapely.LineString(road.center_of(lane)) for lane in range(road.num_lanes)]
    rings = [shapely.Polygon(_ring(road, lane)) for lane in range(road.num_lanes)]

    def pose_cost(lane, pose):
        if lane < 0:
            return 12.0
        point = shapely.Point(*pose[:2])
        if rings[lane].distance(point) > 0.75:
            return math.inf
        return (lines[lane].distance(point) / 1.5) ** 2 + ((pose[2] - 0.7) / 0.35) ** 2

    def step_cost(one, two):
        if one < 0 or two < 0 or one == two or (one, two) in follows:
            return 0.0
        skips = any((one, k) in follows and (k, two) in follows for k in range(road.num_lanes))
        return 3.0 if (one, two) in beside else 0.5 if skips else 8.0

    tracks = [
        _poses(np.column_stack([np.sort(generator.uniform(0, 120, n)), generator.uniform(-6, 3, n)]))
        for n in (4, 1, 5)
    ]
    for track, found in zip(tracks, LaneMatcher(road).match(tracks), strict=True):

        def price(chain, track=track):
            steps = sum(step_cost(*pair) for pair in itertools.pairwise(chain))
            return steps + sum(pose_cost(lane, pose) for lane, pose in zip(chain, track, strict=True))

        best = min(price(chain) for chain in itertools.product(range(-1, road.num_lanes), repeat=len(track)))
        assert price(found.tolist()) == pytest.approx(best, abs=1e-6)


def _whole_number_roads(generator: np.random.Generator) -> list[Lane]:
    """Winding lanes whose vertices are whole numbers, some crossing themselves and one another."""
    lanes = []
    for key in range(12):
        steps = generator.integers(-3, 9, size=(int(generator.integers(2, 12)), 2))
        center = np.cumsum(np.concatenate([generator.integers(0, 40, size=(1, 2)), steps]), axis=0)
        left, right = (center + generator.integers(1, 3) * np.array(side) for side in ((-1, 1), (1, -1)))
        lanes.append(Lane(key=key, left=left.astype(float), right=right.astype(float), is_connector=False))
    return lanes


@pytest.mark.parametrize("seed", range(3))
def test_single_poses_are_matched_as_geometry_objects_match_them(seed):
    """Points that share heights with vertices are among them, where a careless ray counts an edge twice."""
    generator = np.random.default_rng(seed)
    road = make_road_map(_whole_number_roads(generator))
    points = np.concatenate(
        [generator.integers(-5, 60, size=(200, 2)), generator.uniform(-5, 60, size=(200, 2))]
    )
    poses = np.column_stack([points, generator.uniform(-np.pi, np.pi, len(points))])
    costs = np.full((len(poses), road.num_lanes), np.inf)
    for lane_number in range(road.num_lanes):
        line = shapely.LineString(road.center_of(lane_number))
        edge = shapely.LinearRing(_ring(road, lane_number))
        ends = np.cumsum(np.linalg.norm(np.diff(road.center_of(lane_number), axis=0), axis=1))
        steps = np.diff(road.center_of(lane_number), axis=0)
        for number, (x, y, yaw) in enumerate(poses):
            point = shapely.Point(x, y)
            if edge.distance(point) > 0.75 and not _inside_even_odd(_ring(road, lane_number), x, y):
                continue
            segment = min(int(np.searchsorted(ends, line.project(point))), len(ends) - 1)
            angle = math.remainder(math.atan2(steps[segment, 1], steps[segment, 0]) - yaw, math.tau)
            if abs(angle) <= math.radians(75.0):
                costs[number, lane_number] = (line.distance(point) / 1.5) ** 2 + (angle / 0.35) ** 2
    found = np.concatenate(LaneMatcher(road).match(list(poses[:, None])))
    best = costs.min(axis=1)
    chosen = np.where(found >= 0, costs[np.arange(len(poses)), found], 12.0)
    np.testing.assert_allclose(chosen, np.minimum(best, 12.0), rtol=1e-9)
    assert 25 < (found >= 0).sum() < len(poses)


def _inside_even_odd(ring: np.ndarray, x: float, y: float) -> bool:
    """Count crossings with a slanted ray that meets no vertex, by solving each edge for it."""
    inside = False
    for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        side_a, side_b = (ay - y) - math.pi * (ax - x), (by - y) - math.pi * (bx - x)
        if (side_a > 0) != (side_b > 0):
            share = side_a / (side_a - side_b)
            inside ^= ax + share * (bx - ax) > x
    return inside


def test_long_steps_are_filled_in_as_interpolation_does():
    left = np.array([[0.0, 2.0], [3.0, 2.5], [47.0, 9.0], [48.0, 9.0], [70.5, 2.0]])
    right = left - [[0.0, 4.0]]
    short = Lane(key="short", left=left[:2], right=right[:2], is_connector=False)
    long = Lane(key="long", left=left, right=right, center=left - [[0.0, 1.0]], is_connector=False)
    road = make_road_map([short, long, dataclasses.replace(short, key="again")])
    # Steps of 3, 44.5, 1 and 23.6 m: 1, 5, 1 and 3 parts.
    at = np.concatenate([[0.0, 1.0], 1 + np.arange(1, 6) / 5, [3.0], 3 + np.arange(1, 4) / 3])
    assert road.offsets.tolist() == [0, 2, 2 + len(at), 4 + len(at)]
    run = slice(2, 2 + len(at))
    for found, line in ((road.left_V2, left), (road.right_V2, right), (road.center_V2, left - [[0.0, 1.0]])):
        expected = np.stack([np.interp(at, np.arange(5), line[:, axis]) for axis in range(2)], axis=1)
        np.testing.assert_array_equal(found[run], expected)
    np.testing.assert_array_equal(road.center_V2[:2], (left[:2] + right[:2]) / 2.0)


def test_wrapped_angles_are_those_of_the_remainder():
    edges = np.array(
        [-np.pi, np.pi, np.nextafter(np.pi, 0.0), -3.0 * np.pi, 3.0 * np.pi, 0.0, -0.0, 1e9, np.nan]
    )
    angles = np.concatenate([edges, np.random.default_rng(0).uniform(-20.0, 20.0, 1000)])
    expected = (angles + np.pi) % (2.0 * np.pi) - np.pi
    np.testing.assert_array_equal(wrap_angle(angles), expected)
    assert float(wrap_angle(angles[-1])) == expected[-1]


def test_route_changes_lanes_only_where_successors_do_not_lead_on():
    from scenes.small_world import place

    planner = RoutePlanner(_two_lanes())
    here = place(np.array([[5.0, 0.0]]))[0]
    stay = planner.route(np.array([0, 0, 1]), here)
    assert stay.lanes == (0, 2), (
        "lane b belongs to the roadblock of lane a, so the centre line stays in lane a"
    )
    start = place(np.array([[5.0, -4.0]]))[0]
    over = planner.route(np.array([1, 1, 0, 2]), start)
    assert over.lanes == (1, 0, 2)
    local, _ = cut_lines([over.line_C2], np.array([0]), start[None], 0.0, np.array([80.0]))
    assert np.linalg.norm(local[0, :2] - start) < 0.01
    end = place(np.array([[85.0, 0.0]]))[0]
    assert np.linalg.norm(local[-1, :2] - end) < 1.0
    assert planner.route(np.array([-1, 0]), here) is None


def test_a_lane_of_no_length_gives_no_route():
    planner = RoutePlanner(make_road_map([lane("dot", [(0, 0), (0.0004, 0)])]))
    assert planner.route(np.array([0, 0]), np.zeros(2)) is None


def test_cut_line_extends_straight_and_keeps_what_lies_behind():
    line = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    cut, counts = cut_lines([line], np.array([0]), np.array([[4.0, 1.0]]), 2.0, np.array([30.0]))
    assert counts.tolist() == [len(cut)]
    np.testing.assert_allclose(cut[0], [2.0, 0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(cut[-1], [10.0, 24.0, math.pi / 2], atol=1e-9)


def test_cut_lines_are_those_of_shapely():
    generator = np.random.default_rng(0)
    lines = [
        np.cumsum(generator.uniform([0.5, -1.0], [6.0, 1.0], (num, 2)), axis=0) for num in (2, 3, 40, 7, 90)
    ]
    line_M = generator.integers(len(lines), size=60)
    positions = np.array([lines[k][generator.integers(len(lines[k]))] for k in line_M]) + generator.normal(
        size=(60, 2)
    )
    ahead_m = generator.uniform(1.0, 60.0, 60)
    cut, counts = cut_lines(lines, line_M, positions, 12.0, ahead_m)
    for found, line, position, ahead in zip(
        np.split(cut, np.cumsum(counts)[:-1]), (lines[k] for k in line_M), positions, ahead_m, strict=True
    ):
        unit = (line[-1] - line[-2]) / np.linalg.norm(line[-1] - line[-2])
        longer = shapely.LineString([*line, line[-1] + 100.0 * unit])
        foot = shapely.LineString(line).project(shapely.Point(position))
        expected = shapely.ops.substring(longer, max(0.0, foot - 12.0), foot + ahead)
        assert shapely.hausdorff_distance(shapely.LineString(found[:, :2]), expected) < 1e-6
        steps = np.diff(found[:, :2], axis=0)
        np.testing.assert_allclose(found[:-1, 2], np.arctan2(steps[:, 1], steps[:, 0]), atol=1e-12)
        assert found[-1, 2] == found[-2, 2]


@pytest.mark.parametrize("given", [False, True])
def test_rear_axle_states_on_a_circle(given):
    # Rear axle on a circle of radius 20 m at 8 m/s: w = 0.4 rad/s, ay = 3.2 m/s2, no slip at the rear axle.
    radius, speed, rear = 20.0, 8.0, 1.4
    time = np.arange(60) * 0.1
    angle = speed / radius * time
    axle = radius * np.column_stack([np.sin(angle), 1.0 - np.cos(angle)])
    heading = np.column_stack([np.cos(angle), np.sin(angle)])
    normal = np.column_stack([-heading[:, 1], heading[:, 0]])
    velocities = speed * heading + rear * speed / radius * normal
    track = Track(
        key=0, kind="vehicle", length_m=5.0, width_m=2.0, frames=np.arange(60), rear_axle_to_center_m=rear,
        poses=np.column_stack([axle + rear * heading, angle]), velocities=velocities if given else None,
    )  # fmt: skip
    states = rear_axle_states(gather_tracks([track]), 0.1)[10:50]
    np.testing.assert_allclose(states[:, :2], axle[10:50], atol=1e-9)
    # Central differences over 0.6 s shrink circular motion by sin(0.12)/0.12, 0.24 %, twice for accelerations.
    np.testing.assert_allclose(states[:, 3], speed, rtol=0.004)
    np.testing.assert_allclose(states[:, 4:6], 0.0, atol=0.02)
    np.testing.assert_allclose(states[:, 6], speed**2 / radius, rtol=0.01)
