"""Every figure against a value worked out by hand or by loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.representation import quality

A = np.array([0, 0, 1, 1, 2, 2])
B = np.array(["x", "x", "x", "y", "y", "y"])


def test_ranking_puts_the_querys_group_last_and_breaks_ties_by_row():
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    assert quality.cosine_ranking(vectors, vectors, groups_N=np.arange(4)).tolist() == [
        [1, 3, 2, 0],
        [0, 3, 2, 1],
        [0, 1, 3, 2],
        [0, 1, 2, 3],
    ]
    assert quality.cosine_ranking(vectors, vectors, groups_N=np.array(["a", "a", "b", "b"])).tolist() == [
        [3, 2, 0, 1],
        [3, 2, 0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert quality.cosine_ranking(vectors[2:3], vectors).tolist() == [[2, 0, 1, 3]]


def test_recall_and_precision_of_three_queries():
    relevant = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert quality.recall_at(relevant, 1) == pytest.approx(1 / 2)
    assert quality.recall_at(relevant, 2) == 1.0
    assert quality.mean_average_precision(relevant) == pytest.approx(((1 / 2 + 2 / 4) / 2 + 1) / 2)
    assert np.isnan(quality.recall_at(relevant[2:], 1))
    assert np.isnan(quality.mean_average_precision(relevant[2:]))


def test_mutual_information_of_a_small_table():
    # Joint counts [[2, 0], [1, 1], [0, 2]] of 6.
    joint = np.array([[2, 0], [1, 1], [0, 2]]) / 6
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * np.log(joint[i, j] / rows[i] / columns[j])
        for i in range(3)
        for j in range(2)
        if joint[i, j]
    )
    entropies = -(rows * np.log(rows)).sum() - (columns * np.log(columns)).sum()
    assert quality.normalised_mutual_information(A, B) == pytest.approx(2 * information / entropies)
    assert quality.purity(A, B) == pytest.approx(5 / 6)


def test_adjusted_rand_index_counts_pairs():
    pairs = list(itertools.combinations(range(6), 2))
    together = sum(A[i] == A[j] and B[i] == B[j] for i, j in pairs)
    first, second = sum(A[i] == A[j] for i, j in pairs), sum(B[i] == B[j] for i, j in pairs)
    expected = first * second / len(pairs)
    found = (together - expected) / ((first + second) / 2 - expected)
    assert quality.adjusted_rand_index(A, B) == pytest.approx(found)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.permutations(range(5)))
def test_agreement_ignores_the_names_of_the_labels(labels, names):
    labels = np.array(labels)
    renamed = np.array(names)[labels]
    for figure in (quality.normalised_mutual_information, quality.adjusted_rand_index):
        value = figure(labels, renamed)
        # Undefined where there is one class only (or, for pairs, every scene its own).
        assert np.isnan(value) or value == pytest.approx(1.0)
    assert quality.purity(labels, renamed) == 1.0


def test_figures_without_meaning_are_nan():
    constant = np.zeros(4, dtype=int)
    assert np.isnan(quality.normalised_mutual_information(constant, constant))
    assert np.isnan(quality.adjusted_rand_index(constant, constant))
    assert np.isnan(quality.silhouette(np.eye(4), constant))
    assert np.isnan(quality.area_under_curve(np.arange(4), constant))
    assert np.isnan(quality.response_homogeneity(np.full(4, np.nan), constant))


def test_silhouette_against_loops():
    rng = np.random.default_rng(0)
    vectors, label = rng.normal(size=(30, 5)), rng.integers(0, 4, 30)
    label[0] = 9  # alone in its cluster
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    scores = []
    for i in range(30):
        own = [j for j in range(30) if label[j] == label[i] and j != i]
        if not own:
            scores.append(0.0)
            continue
        inside = distance[i, own].mean()
        outside = min(distance[i, label == other].mean() for other in set(label) - {label[i]})
        scores.append((outside - inside) / max(inside, outside))
    assert quality.silhouette(vectors, label) == pytest.approx(np.mean(scores), abs=1e-9)


def test_kmeans_finds_separate_groups_and_repeats_itself():
    rng = np.random.default_rng(1)
    centres = np.eye(4)[rng.integers(0, 4, 200)]
    label = centres.argmax(1)
    found = quality.kmeans_labels(centres + 0.05 * rng.normal(size=centres.shape), 4, 0)
    assert quality.adjusted_rand_index(found, label) == pytest.approx(1.0)
    again = quality.kmeans_labels(centres, 4, 3)
    assert np.array_equal(again, quality.kmeans_labels(centres, 4, 3))


def test_macro_f1_by_hand():
    # a: TP 1, FP 1, FN 0; b: TP 1, FP 1, FN 1; c: TP 0.
    found, label = np.array(list("aabb")), np.array(list("abbc"))
    assert quality.macro_f1(found, label) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_linear_probe_separates_what_a_line_separates():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(400, 3))
    label = np.where(vectors[:, 0] + vectors[:, 1] > 0, "up", "down")
    score = quality.linear_probe_macro_f1(vectors[:200], label[:200], vectors[200:], label[200:])
    noise = quality.linear_probe_macro_f1(
        vectors[:200], rng.permutation(label[:200]), vectors[200:], label[200:]
    )
    assert score > 0.95
    assert noise < 0.75


def test_probe_is_at_the_minimum_of_its_cost():
    rng = np.random.default_rng(3)
    vectors, label = rng.normal(size=(60, 2)), rng.integers(0, 3, 60)
    weight, offset = quality.fit_linear_probe(vectors, label, 3)

    def cost(weight, offset):
        logit = vectors @ weight + offset
        share = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
        balance = 1 / np.bincount(label)[label]
        fit = -(balance / balance.sum() * np.log(share[np.arange(60), label])).sum()
        return fit + quality.PROBE_L2 * np.square(weight).sum()

    best = cost(weight, offset)
    for _ in range(20):
        assert cost(weight + 0.02 * rng.normal(size=weight.shape), offset + 0.02 * rng.normal(size=3)) > best


def test_area_under_curve_counts_ordered_pairs():
    score, positive = np.array([0.1, 0.4, 0.4, 0.8, 0.2]), np.array([0, 1, 0, 1, 0], dtype=bool)
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert quality.area_under_curve(score, positive) == pytest.approx(np.mean(pairs))


def test_domain_probe_on_equal_and_on_shifted_domains():
    rng = np.random.default_rng(4)
    vectors, synthetic = rng.normal(size=(600, 8)), rng.random(600) < 0.4
    assert quality.domain_probe_auc(vectors, synthetic, 0) == pytest.approx(0.5, abs=0.1)
    assert quality.domain_probe_auc(vectors + 3 * synthetic[:, None], synthetic, 0) > 0.99


def test_distance_correlation_follows_a_monotone_distance():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(20, 4))
    unit = quality.unit_rows(vectors)
    assert quality.distance_correlation(vectors, np.exp(3 * (1 - unit @ unit.T))) == pytest.approx(1.0)
    assert abs(quality.distance_correlation(vectors, rng.random((20, 20)))) < 0.3


def test_effective_rank_counts_equal_directions():
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    assert quality.effective_rank(corners) == pytest.approx(3.0)
    assert quality.effective_rank(corners * [1, 0, 0]) == pytest.approx(1.0)


def test_response_homogeneity_by_hand_and_by_chance():
    value, cluster = np.array([1.0, 3.0, 7.0, 9.0]), np.array([0, 0, 1, 1])
    # SS total 40, within 4: 1 - (4 / 2) / (40 / 3).
    assert quality.response_homogeneity(value, cluster) == pytest.approx(1 - 2 / (40 / 3))
    with_missing = quality.response_homogeneity(np.append(value, np.nan), np.append(cluster, 1))
    assert with_missing == pytest.approx(1 - 2 / (40 / 3))
    rng = np.random.default_rng(6)
    chance = [
        quality.response_homogeneity(rng.normal(size=100), rng.integers(0, 16, 100)) for _ in range(200)
    ]
    assert np.mean(chance) == pytest.approx(0, abs=0.02)  # standard error about 0.004
