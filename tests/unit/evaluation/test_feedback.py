import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.evaluation.feedback import cluster_feedback, cluster_weights, weighted_mean


def test_mean_and_error_by_hand():
    values = np.array([1.0, 0.0, 0.5])
    weights = np.array([1.0, 1.0, 2.0])
    mean, error = weighted_mean(values, weights, np.array([7, 8, 9]))
    # mean = (1 + 0 + 1) / 4; residual sums .5, -.5, 0; se^2 = 3/2 * .5 / 16
    assert mean == 0.5
    np.testing.assert_allclose(error, np.sqrt(1.5 * 0.5 / 16), rtol=1e-12)


def test_error_equals_the_textbook_one_for_equal_weights():
    values = np.random.default_rng(0).random(50)
    _, error = weighted_mean(values, np.ones(50), np.arange(50))
    np.testing.assert_allclose(error, values.std(ddof=1) / np.sqrt(50), rtol=1e-12)


def test_scenes_of_one_log_count_as_one():
    values = np.random.default_rng(1).random(6)
    _, single = weighted_mean(values, np.ones(6), np.arange(6))
    _, tripled = weighted_mean(np.repeat(values, 3), np.ones(18), np.repeat(np.arange(6), 3))
    np.testing.assert_allclose(tripled, single, rtol=1e-12)


def test_missing_is_not_zero():
    mean, error = weighted_mean(np.array([np.nan, 0.8]), np.ones(2), np.arange(2))
    assert mean == 0.8
    assert np.isnan(error)
    assert np.isnan(weighted_mean(np.array([np.nan]), np.ones(1), np.zeros(1, int))[0])
    assert np.isnan(weighted_mean(np.array([0.3]), np.zeros(1), np.zeros(1, int))[0])


def test_cluster_without_scene_is_unknown():
    means, errors = cluster_feedback(
        np.array([[0.2, 0.4]]), np.ones(2), np.arange(2), np.array([0, 0]), num_clusters=2
    )
    np.testing.assert_allclose(means[0], 0.3)
    assert np.isnan(means[1])
    assert np.isnan(errors[1])


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 10_000))
def test_cluster_means_weigh_up_to_the_total(num_clusters, num_scenes, seed):
    rng = np.random.default_rng(seed)
    scores = rng.random((3, num_scenes))
    weights, logs = rng.random(num_scenes) + 0.1, np.arange(num_scenes)
    clusters = rng.integers(0, num_clusters, num_scenes)
    means, _ = cluster_feedback(scores, weights, logs, clusters, num_clusters)
    shares = cluster_weights(weights, clusters, num_clusters)
    total, _ = weighted_mean(scores.mean(axis=0), weights, logs)
    np.testing.assert_allclose(np.nansum(means * shares), total, rtol=1e-10)
