"""Scenes as others read them: geometry, traffic and truth of every family against shapely."""

import numpy as np
import pytest
import shapely

from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, POLYGON_LAYERS
from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.pictures import plot_families, scene_rows
from autoscale_ray.world.pools import generate

LAYER = {name: i for i, name in enumerate(POLYGON_LAYERS)}


@pytest.fixture(scope="module", params=list(FAMILIES))
def scenes(request):
    return scene_rows(generate(request.param, 16, seed=8, side="synthetic"))


def _polygons(scene, *layers):
    rings = np.split(scene["polygon_points"], scene["polygon_offsets"][1:-1])
    numbers = [LAYER[name] for name in layers]
    return [
        shapely.Polygon(ring)
        for ring, layer in zip(rings, scene["polygon_layer"], strict=True)
        if layer in numbers
    ]


def _corners(poses, length, width, ahead=0.0):
    box = 0.5 * np.array([[length, width], [-length, width], [-length, -width], [length, -width]]) + [
        ahead,
        0,
    ]
    cos, sin = np.cos(poses[:, 2])[:, None], np.sin(poses[:, 2])[:, None]
    x = poses[:, :1] + box[:, 0] * cos - box[:, 1] * sin
    y = poses[:, 1:2] + box[:, 0] * sin + box[:, 1] * cos
    return np.stack([x, y], axis=-1)


def _ego_corners(scene, frames):
    return _corners(scene["ego_states"][frames], scene["ego_length_m"], scene["ego_width_m"], 1.35)


def test_the_ego_starts_at_the_origin_and_stays_on_the_road(scenes):
    for scene in scenes:
        np.testing.assert_allclose(scene["ego_states"][CURRENT_FRAME, :3], 0.0, atol=1e-6)
        roads = _polygons(scene, "roadblock", "intersection")
        assert all(polygon.is_valid for polygon in roads)
        corners = _ego_corners(scene, slice(0, 13)).reshape(-1, 2)
        inside = np.any([shapely.contains_xy(polygon, corners) for polygon in roads], axis=0)
        assert inside.all()


def test_speed_is_the_derivative_of_position(scenes):
    for scene in scenes:
        states = scene["ego_states"]
        moved = np.linalg.norm(np.diff(states[:, :2], axis=0), axis=1)
        mean_speed = 0.5 * (states[1:, 3] + states[:-1, 3])
        np.testing.assert_allclose(moved, 0.5 * mean_speed, atol=0.35)


def test_nobody_overlaps_at_the_start(scenes):
    for scene in scenes:
        seen = scene["agent_valid"][:, CURRENT_FRAME].astype(bool)
        states = scene["agent_states"][seen, CURRENT_FRAME]
        boxes = [shapely.Polygon(_ego_corners(scene, slice(CURRENT_FRAME, CURRENT_FRAME + 1))[0])]
        boxes += [
            shapely.Polygon(_corners(state[None], *size)[0])
            for state, size in zip(states, scene["agent_size"][seen], strict=True)
        ]
        tree = shapely.STRtree(boxes)
        first, second = tree.query(boxes, predicate="intersects")
        assert np.all(first == second)


def test_moving_vehicles_keep_to_the_road(scenes):
    for scene in scenes:
        road = shapely.union_all(_polygons(scene, "roadblock", "intersection"))
        moving = (scene["agent_type"] == AGENT_TYPES.index("vehicle")) & (
            np.linalg.norm(scene["agent_states"][:, CURRENT_FRAME, 3:], axis=-1) > 0.5
        )
        points = scene["agent_states"][moving][scene["agent_valid"][moving].astype(bool)][:, :2]
        near = np.linalg.norm(points, axis=1) < 35.0
        assert shapely.contains_xy(road, points[near]).all()


def test_lanes_link_where_they_meet(scenes):
    scene = scenes[0]
    lanes = np.split(scene["lane_points"], scene["lane_offsets"][1:-1])
    links = scene["lane_links"].reshape(-1, 3)
    assert len(links) > 0
    for a, b, kind in links:
        if kind == 0:
            np.testing.assert_allclose(lanes[a][-1], lanes[b][0], atol=0.05)
        else:
            apart = shapely.LineString(lanes[a]).distance(shapely.LineString(lanes[b]))
            assert 2.0 < apart < 4.5


def test_the_route_runs_along_lanes_of_the_route(scenes):
    for scene in scenes:
        rings = np.split(scene["polygon_points"], scene["polygon_offsets"][1:-1])
        own = [
            shapely.Polygon(r).buffer(0) for r, on in zip(rings, scene["polygon_on_route"], strict=True) if on
        ]
        line = shapely.LineString(scene["centerline"][:, :2])
        assert line.length > 100
        near = line.intersection(shapely.Point(0, 0).buffer(38.0))
        assert near.difference(shapely.union_all(own).buffer(0.3)).length < 0.5
        assert line.distance(shapely.Point(0, 0)) < 1.3


def test_agents_not_seen_are_zero(scenes):
    for scene in scenes:
        hidden = ~scene["agent_valid"].astype(bool)
        assert np.all(scene["agent_states"][hidden] == 0)
        assert scene["agent_valid"].any(axis=1).all()


def test_the_expert_stays_clear_of_everybody(scenes):
    for scene in scenes:
        for frame in range(CURRENT_FRAME, CURRENT_FRAME + 9):
            ego = shapely.Polygon(_ego_corners(scene, slice(frame, frame + 1))[0])
            seen = scene["agent_valid"][:, frame].astype(bool)
            for state, size in zip(
                scene["agent_states"][seen, frame], scene["agent_size"][seen], strict=True
            ):
                behind = state[0] < scene["ego_states"][frame, 0] and frame > CURRENT_FRAME
                assert behind or not ego.intersects(shapely.Polygon(_corners(state[None], *size)[0]))


def test_lights_are_red_for_one_road_at_a_time():
    scenes = scene_rows(generate("red_light", 30, seed=3))
    red_now = []
    for scene in scenes:
        connectors = scene["polygon_layer"] == LAYER["lane_connector"]
        route = connectors & scene["polygon_on_route"].astype(bool)
        red = scene["polygon_red"].astype(bool)
        assert not red[~connectors].any()
        assert np.all(red[route].all(axis=0) | ~red[route].any(axis=0))
        assert np.all(red[connectors].mean(axis=0) == 0.5)
        red_now.append(red[route][0, CURRENT_FRAME])
    assert 10 < np.sum(red_now) < 28


def test_a_picture_holds_every_family(tmp_path):
    path = plot_families(tmp_path, scenes_per_family=1)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 100_000
