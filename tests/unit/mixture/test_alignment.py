"""Gradient alignment on models whose gradients are known."""

import numpy as np
import pytest

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture.alignment import measure_alignment

GRADIENTS = {"a": [3.0, 4.0, 0.0], "b": [-3.0, 0.0, 0.0], "c": None, None: [1.0, 2.0, 5.0]}


def given(name):
    return None if GRADIENTS[name] is None else np.array(GRADIENTS[name])


def test_alignment_by_hand():
    found = measure_alignment(given, ("a", "b", "c"))
    # c = (9, 8, 0): whitened dev (1 / 3, 2 / sqrt 8, 0); the last weight moves with no cluster and says nothing
    expected = [1 + 8 / np.sqrt(8), -1.0, np.nan]
    np.testing.assert_allclose(found.gradient_alignment_K, expected, atol=1e-12)
    gram = [[25.0, -9.0, np.nan], [-9.0, 9.0, np.nan], [np.nan] * 3]
    np.testing.assert_allclose(found.gradient_gram_KK, gram, atol=1e-12)


def test_a_rescaled_weight_changes_nothing_but_the_unit():
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal(50) for name in ("a", "b", "c", None)}
    units_W = np.exp(rng.standard_normal(50))
    plain = measure_alignment(lambda name: vectors[name], ("a", "b", "c")).gradient_alignment_K
    # A weight counted in other units has its gradient scaled; dev is measured in the step, clusters in the gradient.
    scaled = {name: vector * units_W if name else vector for name, vector in vectors.items()}
    np.testing.assert_allclose(measure_alignment(scaled.get, ("a", "b", "c")).gradient_alignment_K, plain)


def test_a_step_on_the_aligned_cluster_lowers_the_dev_loss():
    """Least squares: dev wants what cluster a teaches and cluster b contradicts."""
    rng = np.random.default_rng(1)
    truth_W = rng.standard_normal(6)
    inputs = {name: rng.standard_normal((200, 6)) for name in ("a", "b", None)}
    targets = {name: x @ (-truth_W if name == "b" else truth_W) for name, x in inputs.items()}

    def gradient(name, weights_W):
        return inputs[name].T @ (inputs[name] @ weights_W - targets[name]) / 200

    def dev_loss(weights_W):
        return float(((inputs[None] @ weights_W - targets[None]) ** 2).mean())

    zero_W = np.zeros(6)
    h_a, h_b = measure_alignment(lambda name: gradient(name, zero_W), ("a", "b")).gradient_alignment_K
    assert h_a > 0 > h_b
    assert dev_loss(-0.1 * gradient("a", zero_W)) < dev_loss(zero_W) < dev_loss(-0.1 * gradient("b", zero_W))


@pytest.mark.parametrize("bad", [None, np.array([np.nan, 0.0])])
def test_without_a_finite_dev_gradient_there_is_no_alignment(bad):
    with pytest.raises(InvalidInputError):
        measure_alignment(lambda name: bad if name is None else np.ones(2), ("a",))
