"""Published updates against examples worked by hand; the arithmetic stands beside each."""

from __future__ import annotations

import numpy as np
import pytest

from autoscale_ray.mixture.baselines import laws, online, regression, selection, signals, skills
from autoscale_ray.mixture.problem import ClusterInfo, Observation

LN2, LN3 = 0.6931471805599453, 1.0986122886681098


def _info(pool_sizes=(6, 3, 1), **extra) -> ClusterInfo:
    count = len(pool_sizes)
    defaults = {
        "cluster_ids": tuple(f"c{k:02d}" for k in range(count)),
        "budget": 10,
        "pool_sizes_K": np.array(pool_sizes, float),
        "dev_counts_K": np.full(count, 50.0),
        "dev_weights_K": np.full(count, 1 / count),
        "real_counts_K": np.full(count, 20.0),
    }
    return ClusterInfo(**{**defaults, **extra})


def test_group_dro():
    # q = (1/2, 1/2), losses (1, 0), step ln 2: factors 2 and 1 -> (2/3, 1/3)
    assert online.group_dro_step(
        np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.ones(2), LN2
    ) == pytest.approx([2 / 3, 1 / 3], abs=1e-12)
    # margin 2 over n = (4, 16): adds 1 and 1/2 -> losses 1 and 1/2 + 1/2: no change
    moved = online.group_dro_step(
        np.array([0.3, 0.7]), np.array([0.0, 0.5]), np.array([4.0, 16]), LN2, margin=2.0
    )
    assert moved == pytest.approx([0.3, 0.7], abs=1e-12)


def test_doremi():
    # excess (1, -1) is cut to (1, 0); step ln 3 from (1/2, 1/2): (3, 1) -> (.75, .25)
    # smoothing .1 toward (1/2, 1/2): .9 * .75 + .05 = .725
    half = np.array([0.5, 0.5])
    assert online.excess_loss_step(half, np.array([1.0, -1.0]), half, LN3, 0.1) == pytest.approx(
        [0.725, 0.275], abs=1e-12
    )


def test_remix_smooths_toward_the_sizes():
    # log 2 / .2 = 3.4657: excess that doubles the first weight at step .2; (.2 * 2, .8) -> (1/3, 2/3)
    # .95 * 1/3 + .05 * .1 = .3216667
    moved = online.excess_loss_step(
        np.array([0.2, 0.8]), np.array([5 * LN2, 0.0]), np.array([0.1, 0.9]), online.REMIX_STEP, 0.05
    )
    assert moved == pytest.approx([0.95 / 3 + 0.005, 0.95 * 2 / 3 + 0.045], abs=1e-12)


def test_doge():
    # gradients (1, 0), (0, 2), (2, 1) over 10: Gram rows sum to 3, 6, 9; minus squares 1, 4, 5 -> 2, 2, 4; all over 100
    # mean norm (1 + 2 + sqrt 5) / 30 = .17453560; lr 1 -> .1145898, .1145898, .2291796
    gradients = np.array([[1.0, 0], [0, 2], [2, 1]]) / 10
    scores = online.doge_scores(gradients @ gradients.T, learning_rate=1.0)
    assert scores == pytest.approx([0.1145898, 0.1145898, 0.2291796], abs=1e-7)
    # mu .1145898 / ln 2: the last doubles once more than the others: (1, 1, 2) / 4
    moved = online.doge_step(np.full(3, 1 / 3), scores, mu=0.11458980 / LN2)
    assert moved == pytest.approx([0.25, 0.25, 0.5], abs=1e-6)


def test_doge_cuts_conflicts_and_large_scores():
    # gradients 1 and -3: -3 each -> cut to 0
    assert online.doge_scores(np.array([[1.0, -3], [-3, 9]]), 0.1).tolist() == [0.0, 0.0]
    # nine gradients of norm 1 alike: 8 / 1 > 5 -> 5 lr
    assert online.doge_scores(np.ones((9, 9)), 0.1) == pytest.approx(np.full(9, 0.5), abs=1e-12)


def test_doge_clips_gradients_before_they_meet():
    small = np.array([[1.0, 0], [0.6, 0.8], [0, 0.5]])
    large = small * np.array([[1.0], [30], [1]])
    wanted = online.doge_scores(small @ small.T, 0.1)
    assert online.doge_scores(large @ large.T, 0.1) == pytest.approx(wanted, abs=1e-12)


def test_odm_mixture():
    # K = 2. t = 1: e_1 = min(.5, sqrt(.6931/2) = .589) = .5: all exploration
    assert online.exp3_policy(np.array([4.0, 0.0]), 1).tolist() == [0.5, 0.5]
    # t = 8: e_8 = sqrt(.6931472 / 16) = .2081386, e_7 = sqrt(.6931472 / 14) = .2225096
    # exp(.2225096 * 4) = 2.4351; share 2.4351 / 3.4351 = .70889; (1 - .4162772) * .70889 + .2081386 = .62193
    assert online.exp3_policy(np.array([4.0, 0.0]), 8) == pytest.approx([0.62193, 0.37807], abs=2e-5)


def test_skill_it():
    # A = [[1, .5], [0, 1]], losses of the last three rounds sum to (1, 2) (the first round is forgotten)
    # A l = (2, 2): equal; with A = identity: exp(ln2 * (1, 2)) = (2, 4) -> (1/3, 2/3)
    losses = np.array([[9.0, 9.0], [0.5, 1.0], [0.25, 0.5], [0.25, 0.5]])
    graph = np.array([[1.0, 0.5], [0.0, 1.0]])
    assert skills.skill_it_weights(graph, losses, LN2) == pytest.approx([0.5, 0.5], abs=1e-12)
    assert skills.skill_it_weights(np.eye(2), losses, LN2) == pytest.approx([1 / 3, 2 / 3], abs=1e-12)


def test_skill_graph_from_transfers():
    # T[i, j]: score i per weight j. Harm (-1) is no edge; the full edge 1 -> 0 is halved, the diagonal is not
    transfer = np.array([[4.0, 4.0], [-1.0, 2.0]])
    assert skills.skill_graph(transfer).tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_aioli_undoes_the_smoothing_of_the_probes():
    # A = [[2, 0], [1, 4]]; probes (3/4, 1/4) and (1/4, 3/4): falls of loss (1.5, 1.75) and (.5, 3.25)
    probes = np.array([[0.75, 0.25], [0.25, 0.75]])
    falls = np.array([[1.5, 1.75], [0.5, 3.25]])
    assert skills.aioli_matrix(probes, falls) == pytest.approx(np.array([[2.0, 0.0], [1.0, 4.0]]), abs=1e-9)


def test_aioli():
    # A = [[3, -1], [0, 2]]: minus its minimum -> [[4, 0], [1, 3]], / 8; columns 5/8 and 3/8; step 4 ln 2: 2 : 1
    half = np.array([0.5, 0.5])
    assert skills.aioli_step(half, np.array([[3.0, -1], [0, 2]]), step=4 * LN2) == pytest.approx(
        [2 / 3, 1 / 3], abs=1e-12
    )
    # A = [[1, 0], [2, 1]] / 4: columns 3/4 and 1/4; step 2 ln 2: 2^1.5 and 2^.5 -> 2 : 1
    assert skills.aioli_step(half, np.array([[1.0, 0], [2, 1]]), step=2 * LN2) == pytest.approx(
        [2 / 3, 1 / 3], abs=1e-12
    )
    # all weight on the second row: columns 2/4 and 1/4, doubled rows (0, 2): 1 and 1/2 -> 4 : 2
    assert skills.aioli_step(
        half, np.array([[1.0, 0], [2, 1]]), target_K=np.array([0.0, 2.0]), step=2 * LN2
    ) == pytest.approx([2 / 3, 1 / 3], abs=1e-12)


def test_ado_recovers_a_power_law():
    # L = .2 + 3 n^-.5
    counts = np.array([4.0, 16, 64, 256, 1024])
    floor, exponent = laws.power_law(counts, 0.2 + 3 * counts**-0.5)
    assert exponent == pytest.approx(0.5, abs=0.03)  # grid of 1/40, floor in steps of 5 % of the least loss
    assert floor == pytest.approx(0.2, abs=0.02)


def test_ado_preference_and_step():
    # prior (1/2, 1/2), slopes (3, 1), credit (1/2, 1/5): 3 * .5 = 1.5 and 1 * .4 = .4 -> 1.5/1.9
    wanted = laws.ado_preference(np.array([0.5, 0.5]), np.array([3.0, 1.0]), np.array([0.5, 0.2]))
    assert wanted == pytest.approx([1.5 / 1.9, 0.4 / 1.9], abs=1e-12)
    # slopes (1, 0): the second gets the least share .01, scaled: (1, .01) / 1.01
    assert laws.ado_preference(
        np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.array([0.5, 0.5])
    ) == pytest.approx([1 / 1.01, 0.01 / 1.01], abs=1e-12)
    # p = .9 (.5, .5) + .1 (.8, .2) = (.53, .47); t = 1: p_avg = (.65, .35)
    mixture, average = laws.ado_step(np.array([0.5, 0.5]), np.array([0.8, 0.2]), 1)
    assert mixture == pytest.approx([0.53, 0.47], abs=1e-12)
    assert average == pytest.approx([0.65, 0.35], abs=1e-12)


def test_mosaic_recovers_a_saturating_gain():
    # y = .5 + .2 (1 - exp(-n / 100)); tau lies between two grid points 10 % apart
    counts = np.array([0.0, 25, 100, 400])
    gain, tau = laws.saturating_gain(counts, 0.5 + 0.2 * (1 - np.exp(-counts / 100)), unit=100.0)
    assert gain == pytest.approx(0.2, abs=0.01)
    assert tau == pytest.approx(100, rel=0.06)
    assert laws.saturating_gain(counts, 0.5 - counts / 1000, unit=100.0)[0] == 0.0  # never below zero


def test_mosaic_spends_scene_by_scene_on_the_largest_gain():
    # e^-(1/tau) = 1/2 for both: gains of the first 4, 2, 1, .5, ...; of the second 1.5, .75, .375, ...
    # sorted: 4, 2, 1.5, 1, .75, .5: six scenes are four and two
    tau = 1 / LN2
    counts = laws.greedy_counts(np.array([8.0, 3.0]), np.array([tau, tau]), np.array([99.0, 99.0]), 6)
    assert counts.tolist() == [4, 2]
    # a cap of two on the first sends the rest to the second
    counts = laws.greedy_counts(np.array([8.0, 3.0]), np.array([tau, tau]), np.array([2.0, 99.0]), 6)
    assert counts.tolist() == [2, 4]


def test_farthest_first_takes_equal_points_once_each():
    rows, radii = selection.farthest_first(np.array([[0.0, 0], [1, 0], [1, 0]]), 0, 3)
    assert rows.tolist() == [0, 1, 2]
    assert radii.tolist() == [np.inf, 1.0, 0.0]


def test_farthest_first():
    # points 0, 1, 4, 10 from 0: 10 (at 10), then 4 (4 from 0), then 1 (1 from 0)
    rows, radii = selection.farthest_first(np.array([[0.0], [1], [4], [10]]), 0, 4)
    assert rows.tolist() == [0, 3, 2, 1]
    assert radii.tolist() == [np.inf, 10, 4, 1]


def test_coreset_share():
    # as above, the largest pool at 0; its own radius counts as 10: (10, 1, 4, 10) / 25
    info = _info((9, 1, 1, 1), descriptors_KD=np.array([[0.0], [1], [4], [10]]))
    assert selection.coreset_share(info) == pytest.approx([0.4, 0.04, 0.16, 0.4], abs=1e-12)


def test_leverage_scores():
    # Centred (-1, -1, 2), squares 6, ridge 2, K = 3: x^2 / (6 + 6) = 1/12, 1/12, 4/12, over their sum 1/2
    for shift in (0.0, 100.0):
        scores = selection.leverage_scores(np.array([[0.0], [0], [3]]) + shift, ridge=2.0)
        assert scores == pytest.approx([1 / 6, 1 / 6, 2 / 3], abs=1e-12)


def test_two_groups_of_domains_that_are_alike_share_the_weight():
    points = np.eye(2)[[0] * 8 + [1] * 8]
    info = _info((1,) * 16, descriptors_KD=points)
    assert selection.chameleon_share(info) == pytest.approx(np.full(16, 1 / 16), abs=1e-9)


def test_chameleon():
    # Scores 1/6, 1/6, 2/3 whatever the ridge; logits 6/5, 6/5, 1.5/5: the common ones e^.9 = 2.4596031 times as much
    info = _info((1, 1, 1), descriptors_KD=np.array([[0.0], [0], [3]]))
    total = 2 * 2.4596031 + 1
    assert selection.chameleon_share(info) == pytest.approx(
        [2.4596031 / total, 2.4596031 / total, 1 / total], abs=1e-7
    )


def test_ridge_by_hand():
    # centred mixtures (+-1/2, -+1/2), scores +-1: X'X + 1/2 I acts as 1 + 1/2 on (1, -1)/sqrt 2
    # slope along it: sqrt 2 / 1.5 -> b = (2/3, -2/3); intercept 2 - b.(1/2, 1/2) = 2
    slope, intercept = regression.ridge(np.array([[1.0, 0], [0, 1]]), np.array([3.0, 1.0]), 0.5)
    assert slope == pytest.approx([2 / 3, -2 / 3], abs=1e-12)
    assert intercept == pytest.approx(2.0, abs=1e-12)


def test_left_out_error_equals_fitting_without_each_run():
    rng = np.random.default_rng(0)
    mixtures, scores = rng.dirichlet(np.ones(5), 7), rng.standard_normal(7)
    total = 0.0
    for left_out in range(7):
        rest = np.arange(7) != left_out
        slope, intercept = regression.ridge(mixtures[rest], scores[rest], 0.3)
        total += (scores[left_out] - intercept - slope @ mixtures[left_out]) ** 2
    assert regression.left_out_error(mixtures, scores, 0.3) == pytest.approx(total, rel=1e-9)


def test_chosen_penalty_trusts_exact_data_and_not_noise():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(4), 30)
    exact = mixtures @ np.array([1.0, 2, 3, 4])
    assert regression.chosen_penalty(mixtures, exact) == regression.PENALTIES[0]
    assert regression.chosen_penalty(mixtures, rng.standard_normal(30)) > 0.1


def test_dirichlet_design_keeps_its_rules():
    prior = np.array([0.02, 0.08, 0.3, 0.6])
    drawn = regression.dirichlet_mixtures(prior, 4000, np.random.default_rng(0))
    assert drawn.shape == (4000, 4)
    assert drawn.sum(axis=1) == pytest.approx(np.ones(4000), abs=1e-12)
    assert (drawn <= 15 * prior + 1e-9).all()
    assert ((drawn == 0) | (drawn >= 2e-4)).all()
    softened = np.sqrt(prior) / np.sqrt(prior).sum()  # Dirichlet mean, but for the rule on the first
    assert drawn.mean(axis=0)[1:] == pytest.approx(softened[1:], abs=0.05)


def test_a_loss_is_what_is_missing_from_the_score_and_an_unknown_one_repeats_the_last():
    base = {"cluster_ids": ("a", "b"), "counts_K": np.ones(2), "score_se_K": np.full(2, 0.1)}
    first = Observation(**base, scores_K=np.array([0.75, np.nan]))
    second = Observation(**base, scores_K=np.array([0.5, np.nan]))
    third = Observation(**base, scores_K=np.array([np.nan, 0.0]))
    # unknown: at first the mean of its row, later the last known
    ends = [[0.25, 0.25], [0.5, 0.25], [0.5, 1.0]]
    assert signals.end_losses((first, second, third)).tolist() == ends
    steps = signals.loss_steps((first, second, third)).reshape(3, signals.STEPS_PER_ROUND, 2)
    assert (steps == np.array(ends)[:, None]).all()
