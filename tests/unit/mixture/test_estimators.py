"""Every gradient estimator against a value worked out by hand or by differences."""

from dataclasses import replace

import numpy as np
import pytest

from autoscale_ray.config import AscentConfig
from autoscale_ray.mixture.ascent import fit_history
from autoscale_ray.mixture.estimators import (
    alignment,
    deficit,
    excess,
    fit_fused,
    progress,
    response,
    spsa,
    vector_spsa,
)
from autoscale_ray.mixture.optimum import predicted_objective
from autoscale_ray.mixture.problem import ClusterInfo, Feedback, Observation

CONFIG = AscentConfig()
INFO = ClusterInfo(
    cluster_ids=("a", "b", "c"),
    budget=300,
    pool_sizes_K=np.full(3, 1000.0),
    dev_counts_K=np.array([100.0, 200, 100]),
    dev_weights_K=np.array([0.25, 0.5, 0.25]),
    real_counts_K=np.zeros(3),
)


def run(counts, scores, **changes):
    values = {
        "cluster_ids": INFO.cluster_ids,
        "counts_K": np.array(counts, float),
        "scores_K": np.array(scores, float),
        "score_se_K": np.full(3, 0.012),
    }
    return Observation(**{**values, **changes})


def test_deficit_by_hand():
    gradient = deficit((run([100] * 3, [0.9, 0.6, np.nan]),), INFO, CONFIG)
    assert gradient.mean_K[:2] == pytest.approx([0.25 * 0.1, 0.5 * 0.4])
    assert np.isnan(gradient.mean_K[2])
    assert gradient.sd_K[0] == pytest.approx(0.25 * np.hypot(0.012, 0.008))


def test_excess_by_hand():
    first, last = run([100] * 3, [0.9, 0.6, 0.5]), run([50, 100, 150], [0.8, 0.7, 0.5])
    assert excess((first, last), INFO, CONFIG).mean_K == pytest.approx([0.25 * 0.1, 0.0, 0.0])


def test_progress_recovers_a_power_law():
    shares = np.array([0.5, 1.0, 2.0, 3.0])
    runs = tuple(run([100 * x, 100, 100], [1 - (0.1 + 0.2 * x**-0.5), 0.5, 0.5]) for x in shares)
    # Slope in log x at x = 3: alpha beta x^-alpha = .5 .2 / sqrt(3); a constant score has none.
    assert progress(runs, INFO, CONFIG).mean_K == pytest.approx([0.25 * 0.1 / np.sqrt(3), 0, 0], abs=1e-9)


def pair(slopes, step=1.0, signs=(1, -1, 0)):
    logs = step * np.array(signs)
    return tuple(run(100 * np.exp(s * logs), 0.5 + s * np.array(slopes) * logs) for s in (1, -1))


def test_spsa_reads_one_number_per_pair():
    gradient = spsa(pair([0.04, 0.01, 0.3]), INFO, CONFIG).mean_K
    # F+ - F- = 2 (.25 * .04 - .5 * .01) = .01, spread over d = (2, -2, 0): .01 d / 8.
    assert gradient == pytest.approx([0.0025, -0.0025, 0.0])


def test_vector_spsa_reads_every_cluster():
    history = pair([0.4, 0.1, 0.0]) + pair([0.4, 0.1, 0.2], signs=(1, 0, -1))
    gradient = vector_spsa(history, INFO, CONFIG)
    # Slopes of .4, .1, .2 a hundred standard errors apart: shrinkage takes less than 1 %.
    assert gradient.mean_K == pytest.approx([0.25 * 0.4, 0.5 * 0.1, 0.25 * 0.2], rel=0.02)


def test_vector_spsa_shrinks_equal_slopes_to_their_median():
    history = pair([0.011, 0.010, 0.0]) + pair([0.011, 0.010, 0.009], signs=(1, 0, -1))
    slopes = vector_spsa(history, INFO, CONFIG).mean_K / INFO.dev_weights_K
    assert slopes == pytest.approx([0.010] * 3, abs=2e-4)


def test_response_is_the_slope_of_the_predicted_objective():
    history = (*pair([0.04, 0.01, 0.0]), *pair([0.04, 0.01, 0.02], signs=(1, 0, -1)))
    gradient = response(history, INFO, CONFIG)
    fit, shares = fit_history(history, INFO, CONFIG), history[-1].counts_K / 100
    for k in range(3):
        up, down = shares.copy(), shares.copy()
        up[k], down[k] = shares[k] * np.exp(1e-5), shares[k] * np.exp(-1e-5)
        values = predicted_objective(fit, INFO.dev_weights_K[None], np.stack([up, down])[None])[0]
        assert gradient.mean_K[k] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert (gradient.sd_K > 0).all()


def test_alignment_is_whitened():
    history = (
        run([100] * 3, [0.5] * 3, feedback=Feedback(gradient_alignment_K=np.array([1.0, 5.0, np.nan]))),
    )
    gradient = alignment(history, INFO, CONFIG)
    assert gradient.mean_K[:2] == pytest.approx([-1.0, 1.0])
    assert np.isnan(gradient.mean_K[2])


@pytest.mark.parametrize(("hint", "moves"), [([1.0, -1.0, 0.0], True), ([-1.0, 1.0, 0.0], False)])
def test_fused_listens_to_an_alignment_that_agrees_and_only_then(hint, moves):
    history = (*pair([0.2, 0.005, 0.0]), *pair([0.2, 0.005, 0.01], signs=(1, 0, -1)))
    told = tuple(replace(obs, feedback=Feedback(gradient_alignment_K=np.array(hint))) for obs in history)
    alone, fused = fit_history(history, INFO, CONFIG), fit_fused(told, INFO, CONFIG)
    difference = np.abs(fused.gains_PKL - alone.gains_PKL).max()
    assert difference > 1e-4 if moves else difference < 1e-9


@pytest.mark.parametrize("estimator", [deficit, excess, progress, spsa, vector_spsa, response, alignment])
def test_estimators_survive_a_single_run(estimator):
    history = (run([100] * 3, [0.5, 0.6, 0.7], feedback=Feedback(gradient_alignment_K=np.arange(3.0))),)
    gradient = estimator(history, INFO, CONFIG)
    assert gradient.mean_K.shape == gradient.sd_K.shape == (3,)
    assert not np.isinf(gradient.mean_K).any()
