"""Views keep what they promise to keep."""

import numpy as np
import torch

from autoscale_ray.representation.scene_graph import graph_from_batch
from autoscale_ray.representation.views import half_a_second_later, semantic_view
from autoscale_ray.scenes.schema import CURRENT_FRAME
from tests.unit.representation.random_scenes import random_batch


def _on_the_map(batch, points, owner, moved):
    """Bring points of the later scenes back into the frame of now, by the ego's pose of then, in float64."""
    pose = moved.ego_states_NT7[:, CURRENT_FRAME + 1, :3].double()[owner]
    cos, sin, points = pose[:, 2].cos(), pose[:, 2].sin(), points.double()
    turned = [cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]]
    return torch.stack(turned, dim=1) + pose[:, :2]


def test_later_scene_is_the_same_place_one_frame_on():
    batch = random_batch(12, 0)
    yaw = torch.from_numpy(np.random.default_rng(1).uniform(-3, 3, 12)).float()
    batch.ego_states_NT7[:, CURRENT_FRAME + 1, 2] = yaw  # egos that turn, so that frames differ in direction
    later = half_a_second_later(batch)
    assert float(later.ego_states_NT7[:, CURRENT_FRAME, :3].abs().max()) < 1e-6
    assert torch.equal(later.ego_states_NT7[:, 2, 3:], batch.ego_states_NT7[:, 3, 3:])
    assert torch.equal(later.agent_valid_AT[:, :-1], batch.agent_valid_AT[:, 1:])
    assert not later.agent_valid_AT[:, -1].any()
    for frame in (0, CURRENT_FRAME, 9):
        found = _on_the_map(batch, later.agent_states_AT5[:, frame, :2], batch.agent_row_A, batch)
        expected = batch.agent_states_AT5[:, frame + 1, :2].double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    owner_V = batch.lane_row_L[torch.repeat_interleave(batch.lane_point_offsets.diff())]
    found = _on_the_map(batch, later.lane_points_V2, owner_V, batch)
    torch.testing.assert_close(found, batch.lane_points_V2.double(), atol=1e-4, rtol=0)
    speed = later.agent_states_AT5[:, 3, 3:].norm(dim=1)
    torch.testing.assert_close(speed, batch.agent_states_AT5[:, 4, 3:].norm(dim=1), atol=1e-4, rtol=0)


def test_later_scene_makes_a_graph():
    graph = graph_from_batch(half_a_second_later(random_batch(30, 2)))
    assert all(bool(table.isfinite().all()) for table in graph.features.values())


def test_semantic_view_keeps_near_agents_and_every_scene():
    graph = graph_from_batch(random_batch(50, 3))
    view = semantic_view(graph, torch.Generator().manual_seed(0))
    near = graph.targets["agent.box"][:, :2].norm(dim=1) <= 30.0
    assert len(view) == len(graph)
    assert int(near.sum()) <= len(view.features["agent"]) < len(graph.features["agent"])
