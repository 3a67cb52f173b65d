"""The response fit against a dense Gaussian reference, and what it must not depend on."""

from dataclasses import replace

import numpy as np
import pytest

from autoscale_ray.mixture import response
from autoscale_ray.mixture.laws import LAW_PRIOR_L, law_slopes, law_values
from autoscale_ray.mixture.response import NoisePriors, Runs, fit_responses

NO_OFFSET = NoisePriors(offset_sd=1e-9, offset_real_only_sd=1e-9, null_prior=0.3)


def make_runs(seed=0, num_problems=1, num_runs=4, num_clusters=3, **changes):
    rng = np.random.default_rng(seed)
    shape = (num_problems, num_runs, num_clusters)
    shares = rng.uniform(0.1, 3.0, shape)
    values = {
        "shares_PTK": shares,
        "scores_PTK": 0.5 + 0.04 * np.log1p(shares) + 0.01 * rng.standard_normal(shape),
        "scene_var_PTK": np.full(shape, 0.006**2),
        "num_seeds_T": np.ones(num_runs),
        "is_real_only_T": np.zeros(num_runs, bool),
    }
    return Runs(**{**values, **changes})


def test_laws_start_at_zero_and_pass_one():
    assert law_values(np.array(0.0)) == pytest.approx(0.0, abs=1e-15)
    assert law_values(np.array(1.0)) == pytest.approx(1.0)
    assert LAW_PRIOR_L.sum() == pytest.approx(1.0)
    assert (np.diff(law_values(np.linspace(0, 3, 40)), axis=0) > 0).all()


def test_law_slopes_are_the_derivative():
    for x in (0.05, 0.7, 4.0):
        numeric = (law_values(np.array(x + 1e-6)) - law_values(np.array(x - 1e-6))) / 2e-6
        assert law_slopes(np.array(x)) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def log_normal(y, centre, covariance):
    residual = y - centre
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (log_det + residual @ np.linalg.solve(covariance, residual))


def dense_log_evidence(runs, k, law_T, setting, mean, sd):
    """Log N(y_k) with the level, the spills and the gain as explicit covariance terms."""
    noise, spill, start = setting
    others = np.delete(runs.shares_PTK[0], k, axis=1)
    extra = np.where(runs.is_real_only_T, start**2, 0.0)
    diagonal = runs.scene_var_PTK[0, :, k] + noise**2 / runs.num_seeds_T + extra
    covariance = np.diag(diagonal) + spill**2 * others @ others.T + 1e4 + sd**2 * np.outer(law_T, law_T)
    centre = mean * law_T
    y = runs.scores_PTK[0, :, k]
    gain = mean + sd**2 * law_T @ np.linalg.solve(covariance, y - centre)
    return log_normal(y, centre, covariance), gain


def dense_fit(runs):
    """Posterior-mean gains by enumerating every law, setting and prior."""
    num_clusters = runs.shares_PTK.shape[2]
    starts = response.START_SDS if runs.is_real_only_T.any() else [0.0]
    settings = [(n, s, e) for n in response.NOISE_SDS for s in response.SPILL_SDS for e in starts]
    priors = [(m, s) for m in response.PRIOR_MEANS for s in response.PRIOR_SDS]
    laws = law_values(runs.shares_PTK[0])
    evidence = np.zeros((len(settings), len(priors)))
    gains = np.zeros((len(settings), len(priors), num_clusters, laws.shape[-1]))
    for c, setting in enumerate(settings):
        for m, (mean, sd) in enumerate(priors):
            for k in range(num_clusters):
                pairs = [
                    dense_log_evidence(runs, k, laws[:, k, i], setting, mean, sd)
                    for i in range(laws.shape[-1])
                ]
                log_ml = np.array([pair[0] for pair in pairs]) + np.log(LAW_PRIOR_L)
                total = np.logaddexp.reduce(log_ml)
                evidence[c, m] += total
                gains[c, m, k] = np.exp(log_ml - total) * [pair[1] for pair in pairs]
    weights = np.exp(evidence - evidence.max())
    return np.einsum("cm,cmkl->kl", weights / weights.sum(), gains)


@pytest.mark.parametrize("real_only", [False, True])
def test_gains_agree_with_the_dense_posterior(real_only):
    runs = make_runs(num_clusters=2, is_real_only_T=np.array([real_only, False, False, False]))
    if real_only:
        runs.shares_PTK[0, 0] = 0.0
    # The dense level has variance 1e4 instead of infinity; 1e-6 relative is its share.
    assert fit_responses(runs, NO_OFFSET).gains_PKL[0] == pytest.approx(dense_fit(runs), rel=1e-3, abs=1e-6)


def test_the_null_agrees_with_the_dense_evidence():
    runs = make_runs(seed=3)
    fit = fit_responses(runs, NO_OFFSET)
    settings = [(n, s, 0.0) for n in response.NOISE_SDS for s in response.SPILL_SDS]
    laws = law_values(runs.shares_PTK[0])
    material = response.PRIOR_SDS[response.PRIOR_SDS >= response.MATERIAL_SD]
    null = [
        np.log(LAW_PRIOR_L[i]) + dense_shared(runs, laws[..., i], setting)
        for setting in settings
        for i in range(laws.shape[-1])
    ]
    free = [
        sum(dense_free(runs, k, laws, setting, mean, sd) for k in range(3))
        for setting in settings
        for mean in response.PRIOR_MEANS
        for sd in material
    ]
    log_null = np.logaddexp.reduce(null) - np.log(len(settings))
    log_free = np.logaddexp.reduce(free) - np.log(len(free))
    odds = np.exp(log_free - log_null) * (1 - NO_OFFSET.null_prior) / NO_OFFSET.null_prior
    assert fit.null_probability_P[0] == pytest.approx(1 / (1 + odds**response.NULL_SHARPNESS), rel=1e-2)


def dense_free(runs, k, laws, setting, mean, sd):
    terms = [dense_log_evidence(runs, k, laws[:, k, i], setting, mean, sd)[0] for i in range(laws.shape[-1])]
    return np.logaddexp.reduce(np.array(terms) + np.log(LAW_PRIOR_L))


def dense_shared(runs, law_TK, setting):
    """One gain for all clusters: the clusters' scores stacked into one Gaussian."""
    num_runs, num_clusters = law_TK.shape
    covariance = np.zeros((num_runs * num_clusters,) * 2)
    for k in range(num_clusters):
        others = np.delete(runs.shares_PTK[0], k, axis=1)
        block = (
            np.diag(runs.scene_var_PTK[0, :, k] + setting[0] ** 2) + setting[1] ** 2 * others @ others.T + 1e4
        )
        rows = slice(k * num_runs, (k + 1) * num_runs)
        covariance[rows, rows] = block
    stacked = law_TK.T.ravel()
    covariance += response.NULL_SD**2 * np.outer(stacked, stacked)
    return log_normal(runs.scores_PTK[0].T.ravel(), response.NULL_MEAN * stacked, covariance)


def test_levels_do_not_matter():
    runs = make_runs(num_problems=2)
    shifted = replace(runs, scores_PTK=runs.scores_PTK - np.array([0.3, 0.0, 0.2]))
    priors = NoisePriors(offset_sd=0.004, offset_real_only_sd=0.03, null_prior=0.05)
    first, second = fit_responses(runs, priors), fit_responses(shifted, priors)
    assert second.gains_PKL == pytest.approx(first.gains_PKL, abs=1e-9)
    assert second.null_probability_P == pytest.approx(first.null_probability_P, rel=1e-6)


def test_an_unknown_run_is_a_missing_run_and_not_a_zero():
    runs = make_runs(num_runs=5)
    runs.scores_PTK[0, 2] = np.nan
    kept = [0, 1, 3, 4]
    short = Runs(
        shares_PTK=runs.shares_PTK[:, kept],
        scores_PTK=runs.scores_PTK[:, kept],
        scene_var_PTK=runs.scene_var_PTK[:, kept],
        num_seeds_T=np.ones(4),
        is_real_only_T=np.zeros(4, bool),
    )
    assert fit_responses(runs, NO_OFFSET).gains_PKL == pytest.approx(
        fit_responses(short, NO_OFFSET).gains_PKL
    )


def test_a_cluster_that_was_never_scored_keeps_its_prior():
    runs = make_runs()
    runs.scores_PTK[0, :, 1] = np.nan
    fit = fit_responses(runs, NO_OFFSET)
    assert np.isfinite(fit.gains_PKL).all()
    # With no score the law weights stay at their prior.
    assert fit.gains_PKL[0, 1] / fit.gains_PKL[0, 1].sum() == pytest.approx(LAW_PRIOR_L)


def test_problems_do_not_leak_into_each_other():
    runs = make_runs(num_problems=3)
    alone = Runs(
        shares_PTK=runs.shares_PTK[1:2],
        scores_PTK=runs.scores_PTK[1:2],
        scene_var_PTK=runs.scene_var_PTK[1:2],
        num_seeds_T=runs.num_seeds_T,
        is_real_only_T=runs.is_real_only_T,
    )
    assert fit_responses(runs, NO_OFFSET).gains_PKL[1] == pytest.approx(
        fit_responses(alone, NO_OFFSET).gains_PKL[0]
    )


def test_a_strong_response_is_recovered():
    shares = np.array([0.2, 5.0, 0.2, 5.0, 1.0])[None, :, None] * np.array([1.0, 1.0])
    scores = 0.4 + np.array([0.1, -0.05]) * np.log1p(shares / 0.5) / np.log(3)
    runs = Runs(
        shares_PTK=shares,
        scores_PTK=scores,
        scene_var_PTK=np.full(shares.shape, 0.002**2),
        num_seeds_T=np.ones(5),
        is_real_only_T=np.zeros(5, bool),
    )
    fit = fit_responses(runs, NO_OFFSET)
    predicted = fit.gains_PKL[0] @ (law_values(np.array(5.0)) - law_values(np.array(0.2)))
    truth = np.array([0.1, -0.05]) * (np.log1p(10) - np.log1p(0.4)) / np.log(3)
    assert predicted == pytest.approx(truth, rel=0.1)
    assert fit.null_probability_P[0] < 0.01
