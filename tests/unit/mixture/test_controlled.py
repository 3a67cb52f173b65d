"""The controlled problems: their optimum is one, and Cluster-GA finds its way on a few of them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from autoscale_ray.config import AscentConfig
from autoscale_ray.mixture.estimators import METHODS
from benchmarks.controlled.family import BASE, FAMILIES, draw_family, objective, objective_gradient
from benchmarks.controlled.oracle import (
    optimality_gap,
    oracle_counts,
    project,
    separable_oracle,
    slsqp_oracle,
)
from benchmarks.controlled.play import play_method, play_response
from benchmarks.controlled.rows import kl, paired_p_value
from benchmarks.controlled.training import BUDGET, Regression

SMALL = replace(BASE, num_clusters=6, budget=600, num_harmful=1)


def test_the_separable_optimum_is_the_closed_form():
    family = draw_family(FAMILIES["separable"], 5, 6)
    closed = separable_oracle(family)
    assert closed.sum(1) == pytest.approx(family.budget_P)
    assert objective(family, oracle_counts(family, 600)) == pytest.approx(objective(family, closed), abs=1e-9)


def test_two_solvers_agree_with_transfer():
    family = draw_family(FAMILIES["transfer"], 5, 3)
    ours = oracle_counts(family, 800)
    theirs = np.array([slsqp_oracle(family, index) for index in range(3)])
    assert objective(family, ours) == pytest.approx(objective(family, theirs), abs=1e-6)
    assert np.abs(ours - theirs).max() / family.config.budget < 1e-4


@pytest.mark.parametrize("name", ["base", "wrong_clusters", "saturating_harm"])
def test_the_gradient_is_the_derivative(name):
    family = draw_family(FAMILIES[name], 7, 2)
    counts, step = family.uniform_PK + 3.0, 1e-4
    gradient = objective_gradient(family, counts)
    for k in range(0, 16, 5):
        bump = np.zeros_like(counts)
        bump[:, k] = step
        numeric = (objective(family, counts + bump) - objective(family, counts - bump)) / (2 * step)
        assert gradient[:, k] == pytest.approx(numeric, rel=1e-4, abs=1e-10)


def test_the_base_optimum_is_feasible_and_beats_random_mixtures():
    family = draw_family(BASE, 9, 4)
    best = oracle_counts(family, 600)
    assert best.sum(1) == pytest.approx(family.budget_P)
    assert (best * family.harmful_PK).sum() == pytest.approx(0.0, abs=1e-6)
    assert optimality_gap(family, best).max() < 2e-4
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = project(best + 100 * rng.standard_normal(best.shape), family.caps_PK, family.budget_P)
        assert (objective(family, other) <= objective(family, best) + 1e-9).all()


def test_neyman_counts_minimise_the_expected_risk():
    problem = Regression(3)
    counts = problem.neyman_counts()
    assert counts.sum() == pytest.approx(BUDGET, rel=1e-6)
    found = minimize(
        lambda x: 1e3 * problem.expected_risk(x * BUDGET),
        np.full(8, 1 / 8),
        bounds=[(0, 1)] * 8,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert problem.expected_risk(counts) <= problem.expected_risk(found.x * BUDGET) * (1 + 1e-6)


def test_training_risk_matches_its_expectation():
    problem, rng = Regression(4), np.random.default_rng(0)
    counts = np.full(8, BUDGET / 8)
    risks = np.mean([1 - problem.train(counts, rng) for _ in range(60)], axis=0)
    expected = problem.noise_K**2 * problem.dims_K / (40 + counts - problem.dims_K - 1)
    # 60 trainings x 16 outputs: a relative standard error of about 2 %.
    assert risks == pytest.approx(expected, rel=0.1)


def test_playing_all_problems_at_once_equals_the_interface():
    quiet = replace(SMALL, seed_sd=0.0, offset_sd=0.0, scene_design_effect=0.0)
    family = draw_family(quiet, 11, 2)
    at_once = play_response(family, 3, (5,), with_real_only=True)
    one_by_one = play_method(METHODS["response"], family, 3, (5,), with_real_only=True)
    assert (at_once[5] == one_by_one[5]).all()


def test_shifting_scores_changes_no_allocation():
    family = draw_family(SMALL, 12, 2)
    shifted = replace(family, base_PK=family.base_PK - np.linspace(0, 0.3, 6))
    first = play_response(family, 3, (4,), with_real_only=True)[4]
    assert np.abs(play_response(shifted, 3, (4,), with_real_only=True)[4] - first).max() <= 1


def test_cluster_ga_beats_uniform_on_average_and_leaves_the_harmful_clusters():
    family = draw_family(FAMILIES["harmful"], 21, 8)
    best = oracle_counts(family, 400)
    found = play_response(family, 21, (6,), with_real_only=True)[6]
    lost, start = (objective(family, best) - objective(family, n) for n in (found, family.uniform_PK))
    assert lost.mean() < 0.4 * start.mean()
    assert ((found * family.harmful_PK).sum(1) / family.config.budget).mean() < 0.02


def test_cluster_ga_stays_put_where_all_clusters_are_equal():
    family = draw_family(FAMILIES["null"], 22, 8)
    found = play_response(family, 22, (6,), with_real_only=True)[6]
    assert kl(found, family.uniform_PK).mean() < 0.02


def test_without_the_guard_a_null_problem_moves():
    family = draw_family(FAMILIES["null"], 22, 8)
    found = play_response(family, 22, (6,), with_real_only=True, config=AscentConfig(null_prior=0.0))[6]
    assert kl(found, family.uniform_PK).mean() > 0.02


def test_the_paired_test_sees_a_difference_and_no_difference():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(60)
    assert paired_p_value(noise, noise + 1 + 0.1 * rng.standard_normal(60)) < 0.001
    assert paired_p_value(noise, noise + 0.1 * np.tile([1.0, -1.0], 30)) > 0.1
