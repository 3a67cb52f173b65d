import itertools
import math

import numpy as np
import pytest
import shapely
import torch

from autoscale_ray.scenes import graph
from autoscale_ray.scenes.batch import batch_from_table
from scenes.random_scenes import random_table


@pytest.fixture(scope="module")
def batch():
    return batch_from_table(random_table(25, seed=8, most=14))


def _agents(batch, scene):
    return range(int(batch.agent_offsets[scene]), int(batch.agent_offsets[scene + 1]))


def test_neighbours_equal_brute_force(batch, monkeypatch):
    monkeypatch.setattr(graph, "_MAX_CELLS", 500)
    table = graph.agent_neighbours(batch)
    for scene in range(len(batch)):
        agents = [a for a in _agents(batch, scene) if batch.agent_valid_AT[a, 4]]
        for agent in _agents(batch, scene):
            by_distance = []
            if agent in agents:
                here = batch.agent_states_AT5[agent, 4, :2].double().numpy()
                far = {
                    a: math.dist(here, batch.agent_states_AT5[a, 4, :2].double().numpy())
                    for a in agents
                    if a != agent
                }
                by_distance = [a - _agents(batch, scene).start for a in sorted(far, key=far.__getitem__)][:8]
            assert table[agent].tolist() == by_distance + [-1] * (8 - len(by_distance))


def _compatible_distance(batch, lane, pose):
    low, high = batch.lane_point_offsets[lane : lane + 2].tolist()
    points = batch.lane_points_V2[low:high].double().numpy()
    best = math.inf
    for begin, end in itertools.pairwise(points):
        angle = math.atan2(*(end - begin)[::-1]) - pose[2]
        if math.cos(angle) >= math.cos(graph.MAX_LANE_ANGLE_RAD):
            best = min(best, shapely.LineString([begin, end]).distance(shapely.Point(pose[:2])))
    return best


def test_lanes_equal_brute_force(batch, monkeypatch):
    monkeypatch.setattr(graph, "_MAX_CELLS", 40)
    table = graph.agent_lanes(batch)
    found = 0
    for scene in range(len(batch)):
        first, last = batch.lane_offsets[scene : scene + 2].tolist()
        for agent in _agents(batch, scene):
            distances = {}
            if batch.agent_valid_AT[agent, 4]:
                pose = batch.agent_states_AT5[agent, 4, :3].double().numpy()
                distances = {
                    lane - first: _compatible_distance(batch, lane, pose) for lane in range(first, last)
                }
            near = [lane for lane in sorted(distances, key=distances.__getitem__) if distances[lane] <= 5.0][
                :3
            ]
            found += len(near)
            assert table[agent].tolist() == near + [-1] * (3 - len(near))
    assert found > 50


def test_tables_do_not_depend_on_batch_composition(batch):
    rows = np.array([20, 3, 11])
    for name in ("agent_neighbours_A8", "agent_lanes_A3"):
        alone = getattr(graph.with_neighbours(batch.select(rows)), name)
        assert torch.equal(alone, getattr(graph.with_neighbours(batch).select(rows), name))
