"""Allocation: exact sums, caps, rounding, and names instead of positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture.allocation import allocate, largest_remainder, spill, waterfill
from autoscale_ray.mixture.problem import ClusterInfo

FAST = settings(derandomize=True, max_examples=80, deadline=None)
weights_and_pools = st.integers(1, 9).flatmap(
    lambda k: st.tuples(
        st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=k, max_size=k),
        st.lists(st.integers(0, 60), min_size=k, max_size=k).filter(lambda pools: sum(pools) > 0),
    )
)


def info_of(pools, budget, names=None):
    num_clusters = len(pools)
    return ClusterInfo(
        cluster_ids=names or tuple(f"k{index}" for index in range(num_clusters)),
        budget=budget,
        pool_sizes_K=pools,
        dev_counts_K=np.full(num_clusters, 50.0),
        dev_weights_K=np.full(num_clusters, 1 / num_clusters),
        real_counts_K=np.zeros(num_clusters),
    )


@FAST
@given(weights_and_pools, st.floats(0, 500))
def test_waterfill_spends_the_budget_inside_the_caps(case, budget):
    weights, pools = np.array(case[0]), np.array(case[1], float)
    counts = waterfill(weights, pools, budget)
    assert counts.sum() == pytest.approx(min(budget, pools.sum()), abs=1e-8)
    assert (counts >= 0).all()
    assert (counts <= pools + 1e-9).all()
    if weights.sum() > 0 and pools[weights > 0].sum() >= budget:
        assert (counts[weights == 0] == 0).all()


@FAST
@given(weights_and_pools, st.floats(1, 300))
def test_waterfill_agrees_with_bisection(case, budget):
    weights, pools = np.array(case[0]) + 1e-3, np.array(case[1], float)
    low, high = 0.0, 1e9
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(pools, middle * weights).sum() < budget else (low, middle)
    assert waterfill(weights, pools, budget) == pytest.approx(np.minimum(pools, high * weights), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("small", [0.0, 5e-324, 1e-308, 1e-200])
def test_waterfill_keeps_to_the_budget_at_any_scale(small, scale):
    counts = waterfill(np.array([1.0, small]) * scale, np.array([10.0, 10.0]), 15)
    assert counts == pytest.approx([10.0, 5.0])


def test_waterfill_spills_in_proportion_to_weights():
    # Pool 0 holds 10 of its 40; the missing 30 split 2 : 1 over the others.
    assert waterfill(np.array([4.0, 4.0, 2.0]), np.array([10.0, 99, 99]), 100) == pytest.approx([10, 60, 30])


@FAST
@given(weights_and_pools, st.integers(1, 300))
def test_counts_are_whole_capped_and_complete(case, budget):
    info = info_of(case[1], budget)
    counts = allocate(dict(zip(info.cluster_ids, case[0], strict=True)), info)
    assert sum(counts.values()) == min(budget, sum(case[1]))
    assert all(0 <= counts[name] <= pool for name, pool in zip(info.cluster_ids, case[1], strict=True))


@FAST
@given(weights_and_pools, st.integers(1, 300))
def test_largest_remainder_stays_within_one_scene(case, budget):
    pools = np.array(case[1], float)
    real = waterfill(np.array(case[0]), pools, budget)
    whole = largest_remainder(real, pools.astype(int), tuple(f"k{i}" for i in range(len(pools))))
    assert np.abs(whole - real).max() < 1


@FAST
@given(weights_and_pools, st.integers(1, 200), st.randoms())
def test_order_of_clusters_does_not_matter(case, budget, random):
    info = info_of(case[1], budget)
    weights = dict(zip(info.cluster_ids, case[0], strict=True))
    order = list(range(len(case[1])))
    random.shuffle(order)
    shuffled = info_of([case[1][i] for i in order], budget, tuple(info.cluster_ids[i] for i in order))
    assert allocate(weights, shuffled) == allocate(weights, info)


def test_a_budget_above_the_pool_takes_the_whole_pool():
    assert allocate({"k0": 1.0, "k1": 0.0}, info_of([3, 4], 1000)) == {"k0": 3, "k1": 4}


@pytest.mark.parametrize(
    "weights", [{"k0": 1.0}, {"k0": 1.0, "x": 1.0}, {"k0": np.nan, "k1": 1.0}, {"k0": -1.0, "k1": 2}]
)
def test_bad_weights_are_refused(weights):
    with pytest.raises(InvalidInputError, match="weights"):
        allocate(weights, info_of([3, 4], 5))


def test_what_is_missing_spills_in_proportion_to_counts():
    assert spill({"a": 10, "b": 20, "d": 0}, 7) == {"a": 12, "b": 25}
    assert spill({"a": 10, "b": 20}, 0) == {}
    assert spill({"d": 0}, 3) == {}
    assert spill({}, 3) == {}
