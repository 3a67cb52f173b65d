"""What the embedding must not depend on, and equality of the fast path with the PyG layers."""

import copy
import dataclasses
import importlib.util

import numpy as np
import pyarrow as pa
import pytest
import torch
from scenes import small_world

from autoscale_ray.config import RepresentationConfig, WorldConfig
from autoscale_ray.representation import fused
from autoscale_ray.representation.encoder import BLOCK
from autoscale_ray.representation.model import embed_batch, feature_sizes_of, new_model
from autoscale_ray.representation.scene_graph import graph_from_batch
from autoscale_ray.scenes.batch import batch_from_table
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.ragged import offsets_of, row_of
from autoscale_ray.scenes.schema import CURRENT_FRAME
from autoscale_ray.scenes.windows import WindowOptions, cut_windows
from autoscale_ray.world.pools import make_pool
from tests.unit.representation.random_scenes import random_batch

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    return new_model(RepresentationConfig(), feature_sizes_of(graph_from_batch(random_batch(4, 0))), 0)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("gradients", [False, True], ids=["kernels", "segment sums"])
@pytest.mark.parametrize("num_agents", [None, 1, 40], ids=["some agents", "few agents", "many agents"])
def test_fast_path_equals_pyg_layers(model, gradients, num_agents):
    """Few and many agents beside the same lanes take both orders of a relation's mean and product."""
    graph = graph_from_batch(random_batch(60, 1, num_agents=num_agents))
    with torch.set_grad_enabled(gradients):
        fast, slow = model.encoder(graph, "fast"), model.encoder(graph, "pyg")
    assert_close(fast.z_ND, slow.z_ND)
    for name, states in fast.nodes.items():
        assert_close(states, slow.nodes[name])


def test_fast_path_has_the_gradients_of_pyg_layers(model):
    graph = graph_from_batch(random_batch(20, 1))
    gradients = {}
    for path in ("fast", "pyg"):
        model.zero_grad()
        model.encoder(graph, path).z_ND.square().sum().backward()
        gradients[path] = {
            name: value.grad.clone()
            for name, value in model.encoder.named_parameters()
            if value.grad is not None
        }
    model.zero_grad()
    assert gradients["fast"].keys() == gradients["pyg"].keys()
    for name, expected in gradients["pyg"].items():
        torch.testing.assert_close(gradients["fast"][name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_fast_path_does_not_need_numba(model, monkeypatch):
    graph = graph_from_batch(random_batch(20, 1))
    with torch.no_grad():
        compiled = model.encoder(graph, "fast").z_ND
        monkeypatch.setattr(fused, "has_numba", lambda: False)
        assert_close(model.encoder(graph, "fast").z_ND, compiled)


@pytest.mark.parametrize("numba", [True, False], ids=["kernels", "segment sums"])
def test_blocks_of_scenes_embed_as_all_scenes_together_do(model, monkeypatch, numba):
    """Several blocks, the last one short, in tables that the larger blocks before it left full."""
    monkeypatch.setattr(fused, "has_numba", lambda: numba and importlib.util.find_spec("numba") is not None)
    graph = graph_from_batch(random_batch(2 * BLOCK + 3, 14))
    with torch.no_grad():
        assert_close(model.encoder.embed(graph), model.encoder(graph, "pyg").z_ND)


@pytest.mark.parametrize("path", ["fast", "pyg"])
def test_no_scenes_have_no_embeddings(model, path):
    with torch.no_grad():
        graph = graph_from_batch(random_batch(2, 0).select([]))
        assert model.encoder.embed(graph, path).shape == (0, 64)
        nodes = model.encoder(graph, path).nodes
    assert {name: len(states) for name, states in nodes.items()} == dict.fromkeys(graph.features, 0)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_points_the_same_way(model, way):
    graph = graph_from_batch(random_batch(200, 2))
    with torch.no_grad():
        full = model.encoder(graph, "pyg").z_ND
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                half = model.encoder(graph).z_ND
        else:
            half = copy.deepcopy(model.encoder).bfloat16()(graph).z_ND
    assert float(torch.cosine_similarity(full, half.float()).min()) >= 0.999


def _shuffled_inside(offsets, seed):
    """Return a permutation of the elements that keeps every scene's elements in its scene."""
    owner = row_of(offsets)
    noise = torch.from_numpy(np.random.default_rng(seed).random(len(owner)))
    return torch.argsort(owner.double() + 0.5 * noise)


def _agents_reordered(batch, seed):
    order = _shuffled_inside(batch.agent_offsets, seed)
    assert not torch.equal(order, torch.arange(len(order)))
    names = ("agent_type_A", "agent_size_A2", "agent_states_AT5", "agent_valid_AT")
    return _without_tables(batch, **{name: getattr(batch, name)[order] for name in names})


def _without_tables(batch, **changed):
    return dataclasses.replace(batch, agent_neighbours_A8=None, agent_lanes_A3=None, **changed)


def _lanes_reordered(batch, seed):
    order = _shuffled_inside(batch.lane_offsets, seed)
    assert not torch.equal(order, torch.arange(len(order)))
    new_number = torch.empty_like(order)
    new_number[order] = torch.arange(len(order))
    first = batch.lane_point_offsets
    points = [batch.lane_points_V2[first[lane] : first[lane + 1]] for lane in order]
    lengths = torch.tensor([len(line) for line in points])
    start_E = batch.lane_offsets[row_of(batch.link_offsets)]
    links = batch.links_E3.clone()
    links[:, 0] = new_number[batch.links_E3[:, 0] + start_E] - start_E
    links[:, 1] = new_number[batch.links_E3[:, 1] + start_E] - start_E
    start_Q = batch.lane_offsets[row_of(batch.polygon_offsets)]
    lane_Q = batch.polygon_lane_Q
    moved_Q = torch.where(lane_Q >= 0, new_number[lane_Q.clamp(min=0) + start_Q] - start_Q, -1)
    return _without_tables(
        batch,
        lane_points_V2=torch.cat(points),
        lane_point_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        lane_width_L=batch.lane_width_L[order],
        lane_speed_limit_L=batch.lane_speed_limit_L[order],
        lane_on_route_L=batch.lane_on_route_L[order],
        links_E3=links.flip(0)[torch.argsort(row_of(batch.link_offsets).flip(0), stable=True)],
        polygon_lane_Q=moved_Q,
    )


def test_order_of_agents_does_not_matter(model):
    batch = random_batch(60, 3)
    assert_close(embed_batch(model, _agents_reordered(batch, 0)), embed_batch(model, batch))


def test_order_of_lanes_does_not_matter(model):
    batch = random_batch(40, 4)
    assert_close(embed_batch(model, _lanes_reordered(batch, 1)), embed_batch(model, batch))


def test_order_does_not_matter_where_lanes_part_and_queues_stand(model, tmp_path):
    """Lanes of a junction share their geometry up to where they part; many are equally far from an agent there."""
    make_pool(WorldConfig(seed=3, num_synthetic=300), "synthetic", tmp_path / "pool")
    batch = open_pool(tmp_path / "pool").batch(np.arange(300))
    world_model = new_model(RepresentationConfig(), feature_sizes_of(graph_from_batch(batch)), 0)
    reordered = _lanes_reordered(_agents_reordered(batch, 2), 3)
    assert_close(embed_batch(world_model, reordered), embed_batch(world_model, batch))


def test_order_of_equally_far_agents_does_not_matter(model):
    batch = random_batch(3, 14, num_agents=49)
    places = torch.cartesian_prod(torch.arange(-3.0, 4), torch.arange(-3.0, 4)) * 6
    batch.agent_states_AT5[..., :2] = places.repeat(3, 1)[:, None]
    assert_close(embed_batch(model, _agents_reordered(batch, 4)), embed_batch(model, batch))


def test_agents_beyond_the_graph_do_not_matter(model):
    batch = random_batch(20, 15, num_agents=12)
    states = batch.agent_states_AT5.clone()
    states[::2, :, 0] += 70.0 * states[::2, :, 0].sign()
    far = (states[:, CURRENT_FRAME, :2].norm(dim=1) > 60) & batch.agent_valid_AT[:, CURRENT_FRAME]
    assert far.sum() > 50
    there = _without_tables(batch, agent_states_AT5=states)
    gone = dataclasses.replace(there, agent_valid_AT=batch.agent_valid_AT & ~far[:, None])
    assert_close(embed_batch(model, gone), embed_batch(model, there))


def test_order_of_edges_does_not_matter(model):
    """Edges of one target may come in any order; targets stay in theirs, as in every graph."""
    graph = graph_from_batch(random_batch(40, 12, num_agents=12))
    sources = {}
    for relation, table in graph.sources.items():
        target = row_of(offsets_of(graph.degrees[relation]))
        sources[relation] = table[torch.argsort(target * 1000 - table)]
    assert not torch.equal(sources["agent_agent"], graph.sources["agent_agent"])
    with torch.no_grad():
        turned = model.encoder(dataclasses.replace(graph, sources=sources)).z_ND
        assert_close(turned, model.encoder(graph).z_ND)


def test_order_of_polygons_does_not_matter(model):
    batch = random_batch(30, 13)
    order = _shuffled_inside(batch.polygon_offsets, 2)
    first = batch.polygon_point_offsets
    rings = [batch.polygon_points_W2[first[ring] : first[ring + 1]] for ring in order]
    lengths = torch.tensor([len(ring) for ring in rings])
    names = ("polygon_layer_Q", "polygon_lane_Q", "polygon_on_route_Q", "polygon_red_QT")
    shuffled = dataclasses.replace(
        batch,
        polygon_points_W2=torch.cat(rings),
        polygon_point_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        **{name: getattr(batch, name)[order] for name in names},
    )
    assert not torch.equal(order, torch.arange(len(order)))
    assert_close(embed_batch(model, shuffled), embed_batch(model, batch))


def test_other_scenes_of_the_batch_do_not_matter(model):
    batch = random_batch(64, 5)
    together = embed_batch(model, batch)
    alone = torch.cat([embed_batch(model, batch.select([row])) for row in range(64)])
    assert_close(alone, together)
    backwards = embed_batch(model, batch.select(np.arange(63, -1, -1)))
    assert_close(backwards.flip(0), together)


def test_domain_and_identity_do_not_matter(model):
    batch = random_batch(20, 6)
    renamed = dataclasses.replace(
        batch, domain_N=1 - batch.domain_N, scene_ids=tuple(f"other{row}" for row in range(20))
    )
    assert torch.equal(embed_batch(model, renamed), embed_batch(model, batch))


def test_unseen_agents_do_not_matter(model):
    """Padding: agents that are absent at t = 0 change nothing, whatever their numbers are."""
    batch = random_batch(20, 7, num_agents=4)
    absent = dataclasses.replace(batch, agent_valid_AT=batch.agent_valid_AT.clone())
    absent.agent_valid_AT[::2, CURRENT_FRAME] = False
    filled = dataclasses.replace(absent, agent_states_AT5=absent.agent_states_AT5.clone())
    filled.agent_states_AT5[::2] = 7.0
    assert_close(embed_batch(model, filled), embed_batch(model, absent))


def test_rigid_motion_of_the_map_does_not_matter(model, monkeypatch):
    """A recording moved and turned on its map, then cut into scenes by the code of every reader."""
    found = []
    for angle, shift in ((0.0, (0.0, 0.0)), (2.5, (1.0e6, -2.0e6)), (-0.7, (-3.0e5, 4.0e6))):
        monkeypatch.setattr(small_world, "ROTATION_RAD", angle)
        monkeypatch.setattr(small_world, "SHIFT", np.array(shift))
        table = pa.concat_tables(cut_windows(small_world.two_cars(), "real", WindowOptions()))
        found.append(embed_batch(model, batch_from_table(table)))
    assert len(found[0]) >= 5
    for moved in found[1:]:
        assert_close(moved, found[0])


def _ego_alone(num_scenes):
    batch = random_batch(num_scenes, 9, num_agents=0)
    zeros = torch.zeros(num_scenes + 1, dtype=torch.int64)
    empty = {
        "lane_offsets": zeros, "lane_point_offsets": zeros[:1], "lane_points_V2": torch.zeros(0, 2),
        "lane_width_L": torch.zeros(0), "lane_speed_limit_L": torch.zeros(0),
        "lane_on_route_L": torch.zeros(0, dtype=torch.bool), "link_offsets": zeros,
        "links_E3": torch.zeros(0, 3, dtype=torch.int64), "polygon_offsets": zeros, "polygon_point_offsets": zeros[:1],
        "polygon_points_W2": torch.zeros(0, 2), "polygon_layer_Q": zeros[:0], "polygon_lane_Q": zeros[:0],
        "polygon_on_route_Q": torch.zeros(0, dtype=torch.bool), "polygon_red_QT": torch.zeros(0, 15, dtype=torch.bool),
        "centerline_offsets": zeros, "centerline_C3": torch.zeros(0, 3),
    }  # fmt: skip
    return dataclasses.replace(batch, **empty)


@pytest.mark.parametrize("path", ["fast", "pyg"])
def test_ego_alone_has_an_embedding(model, path):
    z = embed_batch(model, _ego_alone(3), path)
    assert z.shape == (3, 64)
    assert z.isfinite().all()
    assert float((z[0] - z[1]).abs().max()) > 1e-4  # other speeds, other embeddings


def test_three_hundred_agents_have_an_embedding(model):
    crowd = random_batch(2, 10, num_agents=300)
    z = embed_batch(model, crowd)
    assert z.isfinite().all()
    assert_close(embed_batch(model, crowd, "pyg"), z)


def test_embedding_sees_agents_lanes_and_controls(model):
    batch = random_batch(40, 11, num_agents=5)
    moved = dataclasses.replace(batch, agent_states_AT5=batch.agent_states_AT5 + 1.0)
    wider = dataclasses.replace(batch, lane_points_V2=batch.lane_points_V2 * 1.1)
    lit = dataclasses.replace(batch, polygon_red_QT=~batch.polygon_red_QT)
    z = embed_batch(model, batch)
    for changed in (moved, wider, lit):
        assert float((embed_batch(model, changed) - z).abs().amax(dim=1).min()) > 1e-5
