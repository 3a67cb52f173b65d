"""Every term against a brute-force or hand-made reference."""

import itertools

import numpy as np
import pytest
import torch

from autoscale_ray.representation import objectives
from autoscale_ray.representation.decoder import SceneReconstruction
from autoscale_ray.representation.rasters import NUM_SECTOR_COUNTS, RASTER_SIZE_M, bev_rasters, sector_counts
from autoscale_ray.representation.scene_graph import graph_from_batch
from autoscale_ray.scenes.ragged import row_of
from tests.unit.representation.random_scenes import random_batch


def vectors(count, size, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, size)))


def test_metric_loss_equals_the_sum_over_all_triplets():
    z = vectors(7, 4, 0)
    delta = torch.from_numpy(np.random.default_rng(1).uniform(0.05, 1, (7, 7)))
    delta = (delta + delta.T) / 2
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2) / 2 + objectives.DISTANCE_FLOOR
    target = delta.numpy() + objectives.DISTANCE_FLOOR
    terms = []
    for a in range(7):
        others = [i for i in range(7) if i != a]
        for i, j in itertools.product(others, others):
            terms.append((np.log(distance[a, i] / distance[a, j]) - np.log(target[a, i] / target[a, j])) ** 2)
    assert float(objectives.metric_loss(z, delta)) == pytest.approx(np.mean(terms), rel=1e-6)


def test_metric_loss_is_zero_for_proportional_distances():
    z = vectors(6, 3, 2)
    distance = objectives.cosine_distance(z)
    delta = (distance + objectives.DISTANCE_FLOOR) * 1.7 - objectives.DISTANCE_FLOOR
    assert float(objectives.metric_loss(z, delta)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("logs", "others_of"),
    [
        ([0, 1, 2, 3, 4, 5], lambda a, logs: [i for i in range(6) if i != a]),
        ([0, 0, 1, 1, 1, 2], lambda a, logs: [i for i in range(6) if logs[i] != logs[a]]),
        ([7] * 6, lambda a, logs: [i for i in range(6) if i != a]),
    ],
    ids=["a log each", "of other logs", "no other log"],
)
def test_neighbour_loss_against_plain_sums(logs, others_of):
    z = vectors(6, 4, 13).requires_grad_()
    delta = np.random.default_rng(14).uniform(0.01, 0.3, (6, 6))
    unit = (z / z.norm(dim=1, keepdim=True)).detach().numpy()
    total = 0.0
    for a in range(6):
        others = others_of(a, logs)
        wanted = np.exp(-delta[a, others] / objectives.NEIGHBOUR_SCALE)
        found = np.exp(unit[others] @ unit[a] / objectives.NEIGHBOUR_TEMPERATURE)
        wanted, found = wanted / wanted.sum(), found / found.sum()
        total += (wanted * np.log(wanted / found)).sum() / 6
    value = objectives.neighbour_loss(z, torch.from_numpy(delta), torch.tensor(logs))
    assert float(value.detach()) == pytest.approx(total, rel=1e-6)
    value.backward()
    assert z.grad.isfinite().all()


def test_neighbour_loss_is_zero_where_the_neighbours_are_the_wanted_ones():
    z = vectors(5, 3, 15).requires_grad_()
    unit = torch.nn.functional.normalize(z.detach(), dim=1)
    scale = objectives.NEIGHBOUR_SCALE / objectives.NEIGHBOUR_TEMPERATURE
    value = objectives.neighbour_loss(z, (1 - unit @ unit.T) * scale, torch.arange(5))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-9)
    assert z.grad.isfinite().all()


def test_contrastive_loss_against_plain_sums():
    z, view = vectors(5, 3, 3), vectors(5, 3, 4)
    a, b = (t.numpy() / np.linalg.norm(t.numpy(), axis=1, keepdims=True) for t in (z, view))
    exponent = np.exp(a @ b.T / 0.1)
    forward = -np.log(np.diag(exponent) / exponent.sum(1)).mean()
    backward = -np.log(np.diag(exponent) / exponent.sum(0)).mean()
    assert float(objectives.contrastive_loss(z, view)) == pytest.approx((forward + backward) / 2, rel=1e-6)


def test_variance_loss_against_numpy():
    z = vectors(50, 6, 5) * torch.tensor([0.1, 0.5, 1.0, 2.0, 1.0, 1.0])
    covariance = np.cov(z.numpy().T)
    spread = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    off = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    assert float(objectives.variance_loss(z)) == pytest.approx(spread + 0.04 * off / 6, rel=1e-6)


def test_pair_loss_weighs_by_scenario_distance():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    found = objectives.pair_loss(z, torch.tensor([0, 0]), torch.tensor([1, 3]), torch.tensor([0.0, 0.25]))
    assert float(found) == pytest.approx((1 * 1 + np.exp(-1) * (1 - np.sqrt(0.5))) / 2, rel=1e-5)
    none = torch.zeros(0, dtype=torch.int64)
    assert float(objectives.pair_loss(z, none, none, torch.zeros(0))) == 0


def test_laplacian_loss_against_loops():
    z = vectors(5, 3, 6)
    delta = torch.from_numpy(np.random.default_rng(7).uniform(0, 1, (5, 5)))
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    top = bottom = 0.0
    for i, j in itertools.permutations(range(5), 2):
        weight = np.exp(-float(delta[i, j]) / objectives.PAIR_SCALE)
        top += weight * np.square(unit[i] - unit[j]).sum()
        bottom += weight
    assert float(objectives.laplacian_loss(z, delta)) == pytest.approx(top / bottom, rel=1e-5)


def test_relation_loss_is_the_cross_entropy_of_edges_and_non_edges():
    positive, negative = torch.tensor([2.0, -1.0]), torch.tensor([0.5])
    probability = 1 / (1 + np.exp([-2.0, 1.0, -0.5]))
    expected = -np.log(probability[:2]).mean() - np.log(1 - probability[2])
    assert float(objectives.relation_loss(positive, negative)) == pytest.approx(expected, rel=1e-6)


def test_masked_loss_of_an_exact_and_an_opposite_reconstruction():
    features = torch.tensor([[3.0, 4.0]])
    assert float(objectives.masked_loss(features, features)) == pytest.approx(0, abs=1e-6)
    # cos = -1: (1 + 1)^2 = 4; Huber with beta 0.5 of errors 6 and 8: mean(|e| - 0.25).
    assert float(objectives.masked_loss(-features, features)) == pytest.approx(4 + 6.75, rel=1e-6)
    assert float(objectives.masked_loss(features[:0], features[:0])) == 0


def test_response_loss_ignores_unknown_scores():
    found = torch.tensor([[0.5, 0.0], [1.0, 1.0]])
    known = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]])
    assert float(objectives.response_loss(found, known)) == pytest.approx((0.25 + 1) / 2)


def test_scene_loss_prefers_the_scene_itself():
    graph = graph_from_batch(random_batch(6, 0, num_agents=4))
    raster, counts = bev_rasters(graph, 32), sector_counts(graph)
    drive, valid = graph.targets["ego.drive"], graph.targets["ego.drive_valid"]
    logits = torch.cat([raster[:, :1] * 20 - 10, raster[:, 1:3], raster[:, 3:] * 20 - 10], dim=1)
    exact = SceneReconstruction(logits, drive / 20, counts)
    assert float(objectives.scene_loss(exact, raster, drive, valid, counts)) < 1e-2
    for wrong in (
        SceneReconstruction(logits.flip(0), drive / 20, counts),
        SceneReconstruction(logits, drive.flip(0) / 20, counts),
        SceneReconstruction(logits, drive / 20, counts.flip(0)),
    ):
        assert float(objectives.scene_loss(wrong, raster, drive, valid, counts)) > 1e-2


def test_raster_of_one_car_is_its_box():
    graph = graph_from_batch(random_batch(1, 1, num_agents=1))
    graph.targets["agent.box"] = torch.tensor([[10.0, 5.0, np.pi / 2, 0.0, 8.0, 6.0, 2.0]])
    graph.offsets["agent"] = torch.tensor([0, 1])
    found = bev_rasters(graph, 64)[0].reshape(4, 64, 64)
    cell_m = RASTER_SIZE_M / 64
    x, y = (np.argwhere(found[0].numpy() > 0) + 0.5).T * cell_m + np.array([[-24.0], [-32.0]])
    assert x.min() > 10 - 1 - cell_m
    assert x.max() < 10 + 1 + cell_m
    assert y.min() > 5 - 3 - cell_m
    assert y.max() < 5 + 3 + cell_m
    assert int(found[0].sum()) >= 12  # 2 m x 6 m at 1 m cells
    assert torch.equal(found[2] != 0, found[0] > 0)
    assert float(found[2].max()) == pytest.approx(0.8)


def test_sector_counts_count_every_agent_once():
    graph = graph_from_batch(random_batch(30, 2))
    counts = sector_counts(graph).exp() - 1
    assert counts.shape == (30, NUM_SECTOR_COUNTS)
    torch.testing.assert_close(counts.sum(1), graph.offsets["agent"].diff().float(), atol=1e-4, rtol=0)
    far = graph.targets["agent.box"][:, :2].norm(dim=1) > 25
    outer = counts.reshape(30, 8, 3, 2)[:, :, 2].sum((1, 2))
    expected = torch.zeros(30).index_add(0, row_of(graph.offsets["agent"]), far.float())
    torch.testing.assert_close(outer, expected, atol=1e-4, rtol=0)
