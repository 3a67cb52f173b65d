"""Proposals and recommendations: pure in the history, keyed by name, always on the simplex."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.config import AscentConfig
from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture.allocation import allocate
from autoscale_ray.mixture.ascent import (
    Gradient,
    ascend,
    divergence,
    extra_visits,
    fit_history,
    mirror_step,
    nothing_to_gain,
    runs_of,
    shrink,
    start_weights,
)
from autoscale_ray.mixture.design import step_size
from autoscale_ray.mixture.estimators import METHODS
from autoscale_ray.mixture.laws import LAW_PRIOR_L
from autoscale_ray.mixture.optimum import GRID_G, best_shares, posterior_optimum
from autoscale_ray.mixture.problem import ClusterInfo, Feedback, Observation, align_history, as_array
from autoscale_ray.mixture.response import ResponseFit

FAST = settings(derandomize=True, max_examples=60, deadline=None)
CONFIG = AscentConfig(seed=4)
GAINS = {"a": 0.08, "b": 0.01, "c": -0.03, "d": 0.05, "e": 0.02}


def make_info(names=tuple(GAINS), budget=500, pools=None, dev=None):
    num_clusters = len(names)
    dev = np.full(num_clusters, 300.0) if dev is None else np.array(dev, float)
    return ClusterInfo(
        cluster_ids=names,
        budget=budget,
        pool_sizes_K=np.full(num_clusters, 400.0) if pools is None else pools,
        dev_counts_K=dev,
        dev_weights_K=np.full(num_clusters, 1 / num_clusters) if dev.sum() == 0 else dev / dev.sum(),
        real_counts_K=np.full(num_clusters, 20.0),
    )


def observe(info, counts, seed, is_real_only=False):
    """A run whose noise hangs on the cluster's name, so that it does not see the order of clusters."""
    noise = [np.random.default_rng([seed, *name.encode()]).standard_normal() for name in info.cluster_ids]
    gains = np.array([GAINS.get(name, 0.03) for name in info.cluster_ids])
    counts_K = np.array([float(counts[name]) for name in info.cluster_ids])
    scores = 0.5 + gains * np.log1p(counts_K / 50) + 0.005 * np.array(noise)
    known = info.dev_counts_K > 0
    return Observation(
        cluster_ids=info.cluster_ids,
        counts_K=counts_K,
        scores_K=np.where(known, scores, np.nan),
        score_se_K=np.full(len(gains), 0.005),
        is_real_only=is_real_only,
        feedback=Feedback(gradient_alignment_K=gains),
    )


def play(method, info, num_runs, history=(), config=CONFIG):
    if not history:
        history = (observe(info, dict.fromkeys(info.cluster_ids, 0), 99, is_real_only=True),)
    while len(history) <= num_runs:
        counts = allocate(method.propose(history, info, config), info)
        history = (*history, observe(info, counts, len(history)))
    return history


@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_stay_on_the_simplex_and_resume_equals_replay(name):
    info, method = make_info(), METHODS[name]
    whole = play(method, info, 5)
    resumed = play(method, info, 5, history=play(method, info, 2))
    for first, second in zip(whole, resumed, strict=True):
        assert (first.counts_K == second.counts_K).all()
    final = method.final(whole, info, CONFIG)
    assert min(final.values()) >= 0
    assert sum(final.values()) == pytest.approx(1.0)
    assert final == method.final(resumed, info, CONFIG)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_clusters_are_known_by_name_not_by_position(name):
    info, method = make_info(), METHODS[name]
    order = ("d", "a", "e", "c", "b")
    first = play(method, info, 4)
    second = play(method, make_info(order), 4)
    for one, other in zip(first, align_history(second, info), strict=True):
        assert one.counts_K == pytest.approx(other.counts_K)
    reordered = method.final(first, make_info(order), CONFIG)
    straight = method.final(first, info, CONFIG)
    assert reordered == {key: pytest.approx(straight[key], abs=1e-9) for key in order}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_run_yet_one_cluster_and_small_pools(name):
    info, method = make_info(), METHODS[name]
    assert method.final((), info, CONFIG) == {key: pytest.approx(0.2) for key in GAINS}
    one = make_info(("a",))
    history = play(method, one, 3)
    assert method.final(history, one, CONFIG) == {"a": pytest.approx(1.0)}
    tight = make_info(budget=10_000, pools=np.array([3.0, 50, 0, 7, 9]))
    counts = allocate(method.final(play(method, tight, 3), tight, CONFIG), tight)
    assert counts == {"a": 3, "b": 50, "c": 0, "d": 7, "e": 9}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_unknown_scores_are_not_zeros(name):
    info, method = make_info(dev=[300, 300, 0, 300, 300]), METHODS[name]
    history = play(method, info, 5)
    final = as_array(method.final(history, info, CONFIG), info)
    assert np.isfinite(final).all()
    # A score of 0 would read as a huge deficit or a huge gain; unknown must not draw the budget.
    assert final[2] < 0.3


def test_a_run_of_unknown_scores_says_nothing():
    info = make_info()
    history = play(METHODS["response"], info, 4)
    silent = replace(history[-1], scores_K=np.full(5, np.nan))
    with_it = METHODS["response"].final((*history, silent), info, CONFIG)
    assert with_it == {
        k: pytest.approx(v, abs=1e-6) for k, v in METHODS["response"].final(history, info, CONFIG).items()
    }


def test_a_pair_is_antithetic_around_one_centre():
    info = make_info(pools=np.full(5, 1e6))
    history = play(METHODS["response"], info, 2)
    first, second = (np.log(obs.counts_K) for obs in history[1:3])
    steps = first - second
    # Half up, half down, one still; whole scenes and the common normalisation leave a few percent.
    assert sorted(np.round((steps - np.median(steps)) / CONFIG.perturbation)) == [-2, -2, 0, 2, 2]


def test_the_recommendation_follows_the_gains_and_not_the_luckiest_run():
    info = make_info()
    history = play(METHODS["response"], info, 8)
    lucky = replace(history[1], scores_K=history[1].scores_K + 0.03, counts_K=np.array([0.0, 0, 400, 100, 0]))
    final = METHODS["response"].final((*history, lucky), info, CONFIG)
    assert final["a"] > final["b"] > final["c"]
    assert final["c"] < 0.05


@FAST
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=8),
    st.integers(0, 2**31),
    st.floats(0.001, 0.3),
)
def test_mirror_step_moves_by_the_radius_and_uphill(raw, seed, radius):
    weights = np.array(raw) / sum(raw)
    gradient = np.random.default_rng(seed).standard_normal(len(raw)) * 1e-4
    moved = mirror_step(weights, gradient, radius)
    assert moved.sum() == pytest.approx(1.0)
    assert (moved >= 0).all()
    limit = -np.log(weights[np.argmax(gradient)])
    assert divergence(moved, weights) == pytest.approx(min(radius, limit), rel=1e-6, abs=1e-9)
    assert moved @ gradient >= weights @ gradient


def test_mirror_step_stands_still_without_gradient_or_radius():
    weights = np.array([0.2, 0.8])
    assert mirror_step(weights, np.array([3.0, 3.0]), 0.1) == pytest.approx(weights)
    assert mirror_step(weights, np.array([1.0, 0.0]), 0.0) == pytest.approx(weights)


def test_shrinkage_by_hand():
    gradient = Gradient(np.array([2.0, -2.0, 0.5, np.nan, 0.0]), np.array([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert shrink(gradient, 1.0) == pytest.approx([1.5, -1.5, 0.0, 0.0, 0.0])


def test_the_gate_takes_back_a_harmful_step():
    info = make_info()

    def toward_a(history, info, config):
        return Gradient(np.array([1.0, 0, 0, 0, 0]), np.zeros(5))

    good = observe(info, dict.fromkeys(GAINS, 100), 1)
    worse = replace(good, scores_K=good.scores_K - 0.05)
    start = start_weights(info)
    assert ascend((good,), info, CONFIG, toward_a, 1)[0][0] > start[0]
    weights, radius = ascend((good, worse), info, CONFIG, toward_a, 1)
    assert weights == pytest.approx(start)
    assert radius == pytest.approx(CONFIG.trust_radius / 2)


@pytest.mark.parametrize("num_clusters", [16, 20, 64, 256])
def test_the_whole_budget_may_go_to_one_cluster(num_clusters):
    """All others harm: whatever the number of clusters, none of them gets a share beyond the floor."""
    gains_PKL = np.zeros((1, num_clusters, len(LAW_PRIOR_L)))
    gains_PKL[..., -1] = -0.03  # the line
    gains_PKL[0, 3] *= -1.0
    fit = ResponseFit(
        gains_PKL=gains_PKL,
        gain_squares_PKL=gains_PKL**2,
        spills_PKJ=np.zeros((1, num_clusters, num_clusters)),
        null_gains_PL=np.zeros((1, len(LAW_PRIOR_L))),
        null_probability_P=np.zeros(1),
        noise_var_P=np.zeros(1),
    )
    weights, caps = (
        np.full((1, num_clusters), 1 / num_clusters),
        np.full((1, num_clusters), float(num_clusters)),
    )
    shares = posterior_optimum(fit, weights, caps, float(num_clusters), 0.0, guard=True)
    assert shares[0, 3] == pytest.approx(num_clusters)
    assert np.delete(shares[0], 3).sum() == pytest.approx(0.0)


def test_scores_that_are_all_equal_are_not_known_without_error():
    """A cluster on which every dev scene passes has an error of 0 by the formula, in one run and not in another."""
    info = make_info(names=("a", "b"), dev=[30, 30])
    runs = [
        replace(observe(info, {"a": 50, "b": 450}, seed), score_se_K=np.array(errors))
        for seed, errors in enumerate([[0.03, 0.0], [0.0, 0.0], [np.nan, 0.0]])
    ]
    variance_TK = runs_of(tuple(runs), info, CONFIG).scene_var_PTK[0]
    assert (variance_TK == variance_TK[0]).all()
    assert variance_TK[0, 0] == pytest.approx((0.03**2 + CONFIG.scene_sd**2 / 30) / 3)
    assert variance_TK[0, 1] == pytest.approx(0.5 / (31 * 32))


@pytest.mark.parametrize("total", [6.0, 4.2, 1.8])
@pytest.mark.parametrize("weights_seed", range(3))
def test_best_shares_beats_every_random_mixture(weights_seed, total):
    rng = np.random.default_rng(weights_seed)
    gains, caps = rng.normal(0.02, 0.03, 6), np.full((1, 6), 3.0)
    grid = np.minimum(GRID_G, caps[..., None])
    values = gains[None, :, None] * np.log1p(grid / 0.5)
    found = best_shares(values, grid, caps, np.array([total]), 0.0)
    assert found.sum() == pytest.approx(total)
    worth = (gains * np.log1p(found[0] / 0.5)).sum()
    for _ in range(2000):
        other = rng.dirichlet(np.full(6, 0.7)) * total
        if other.max() <= 3:
            # The grid is 8 % wide, so the answer may be short of the continuous optimum by about 1e-4.
            assert (gains * np.log1p(other / 0.5)).sum() <= worth + 2e-4


def test_a_smaller_budget_is_given_out_by_the_responses_of_the_search():
    """Saturated clusters lose more than those that still rise, and the fit itself knows nothing of the new budget."""
    info = make_info()
    history = play(METHODS["response"], info, 8)
    few = replace(info, budget=info.budget // 2, search_budget=info.budget)
    np.testing.assert_array_equal(
        fit_history(history, few, CONFIG).gains_PKL, fit_history(history, info, CONFIG).gains_PKL
    )
    whole, half = (
        as_array(METHODS["response"].final(history, at, CONFIG), info) * at.budget for at in (info, few)
    )
    assert half.sum() == pytest.approx(few.budget)
    assert (half <= whole + 1e-6 * info.budget).all(), "no cluster gets more of a smaller budget"
    assert np.ptp(half[whole > 1] / whole[whole > 1]) > 0.05, "and not all lose the same share"


def test_extra_visits_by_hand():
    real, counts = np.array([30.0, 70.0]), np.array([60.0, 40.0])
    assert extra_visits(counts, real, 100.0) == pytest.approx(counts)
    # 200 steps' worth of visits on 100 real scenes: every real scene is seen twice as often.
    assert extra_visits(np.zeros(2), real, 100.0) == pytest.approx([30.0, 70.0])


def test_the_search_stops_where_nothing_is_left_to_gain_and_never_inside_a_pair():
    info = make_info()
    history = play(METHODS["response"], info, 8)
    flat = tuple(replace(obs, scores_K=np.full(5, 0.5)) for obs in history)
    done = {num_runs: nothing_to_gain(flat[: num_runs + 1], info, CONFIG) for num_runs in range(2, 9)}
    assert done == {2: False, 3: False, 4: True, 5: False, 6: True, 7: False, 8: True}


def test_the_exploration_schedule_shrinks_the_step_of_later_pairs():
    info = make_info()
    spread = {}
    for decay in (0.0, 3.0):
        scheduled = replace(CONFIG, perturbation_decay=decay)
        pairs = play(METHODS["vector_spsa"], info, 4, config=scheduled)
        spread[decay] = [np.ptp(np.log(pairs[i].counts_K)) for i in (1, 3)]
    assert step_size(1.6, 3.0, 1) == pytest.approx(0.8)
    assert spread[0.0][0] == spread[3.0][0]
    assert spread[3.0][1] < 0.7 * spread[0.0][1]


def test_bad_runs_and_clusters_are_refused():
    info = make_info()
    run = observe(info, dict.fromkeys(GAINS, 1), 0)
    with pytest.raises(InvalidInputError, match="counts_K"):
        replace(run, counts_K=np.array([1.0, 2.0]))
    with pytest.raises(InvalidInputError, match="scores_K"):
        replace(run, scores_K=np.array([1.0, np.inf, 0, 0, 0]))
    with pytest.raises(InvalidInputError, match="unique"):
        make_info(("a", "a"))
    with pytest.raises(InvalidInputError, match="not in ClusterInfo"):
        align_history((run,), make_info(("a", "b")))
