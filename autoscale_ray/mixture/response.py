"""How the dev score of a cluster responds to the scenes it gets: a Bayesian fit averaged over saturating laws.

Model of run t and cluster k (docs/cluster_ga.md, The response model), x in uniform shares:

    y_tk = u_k + a_k phi_l(x_tk) + sum_{j != k} b_kj x_tj + offset_t + e_tk
    a_k ~ N(mu_k, tau^2),  b_kj ~ N(0, spill^2),  u_k flat,
    var e_tk = scene_var_tk + noise^2 / S_t  (+ start^2 for the real-only run)

The law l of every cluster, and mu, tau, noise, spill and start are summed over small grids weighted by their
evidence, so no value is chosen by hand. Given those, everything is Gaussian: u_k and b_kj are integrated out
exactly, which leaves a T x T precision matrix per cluster, and a_k has a scalar posterior. Only the common offsets
are alternated. Every array has a leading axis of independent problems, so that a benchmark fits hundreds at once.

Shape legend: P problems, T (S) runs, K clusters (J the same clusters as senders), L laws, C noise settings
(noise, spill, start), M gain priors (mu, tau).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscale_ray.mixture.laws import LAW_PRIOR_L, law_values

PRIOR_MEANS = np.array([0.0, 0.03, 0.08])
"""mu: mean gain from no scenes to a uniform share (score units)."""
PRIOR_SDS = np.array([0.004, 0.015, 0.035, 0.07])
"""tau: how much gains differ between clusters."""
NOISE_SDS = np.array([0.004, 0.0065, 0.0105, 0.017, 0.028])
"""Run-to-run SD of one cluster's score. A coarser grid reads a noise between two values as differences."""
SPILL_SDS = np.array([0.0, 0.006])
"""SD of the gain from a uniform share of another cluster."""
START_SDS = np.array([0.0, 0.04])
"""Extra SD of the real-only run, whose steps are spent on other scenes."""
NULL_MEAN, NULL_SD = 0.03, 0.06
"""Prior of the one gain that all clusters share under the null."""
MATERIAL_SD = 0.035
"""The rival of the null: gains that differ by at least this SD, enough to be worth a move."""
NULL_SHARPNESS = 2.0
"""Power of the odds against the null: halfway blends lose on both sides, so the guard gives way abruptly."""
NUM_OFFSET_STEPS = 2

_MEAN_M = np.repeat(PRIOR_MEANS, len(PRIOR_SDS))
_SD_M = np.tile(PRIOR_SDS, len(PRIOR_MEANS))
_IS_MATERIAL_M = _SD_M >= MATERIAL_SD
_LOG_LAW_PRIOR_L = np.log(LAW_PRIOR_L)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Runs:
    """The runs of P problems."""

    shares_PTK: np.ndarray
    """Scenes of each cluster in each run over budget / K; >= 0."""
    scores_PTK: np.ndarray
    """Dev scores in [0, 1]; NaN = unknown."""
    scene_var_PTK: np.ndarray
    """Variance of the scores from the dev scenes; > 0 where the score is known."""
    num_seeds_T: np.ndarray
    """Training seeds averaged in each run, >= 1."""
    is_real_only_T: np.ndarray
    """True for the real-only run."""
    gain_shift_PK: np.ndarray | None = None
    """Prior mean of each gain relative to the common mu, for example from gradients; None = 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisePriors:
    """What is known of the offsets, and how much the null is believed before any run."""

    offset_sd: float
    """Prior SD of a run's common offset (score units)."""
    offset_real_only_sd: float
    """The same for the real-only run."""
    null_prior: float
    """Prior probability of the null, in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResponseFit:
    """Posterior of the response curves of P problems."""

    gains_PKL: np.ndarray
    """E[1(law l) a_k]: the posterior-mean curve of cluster k is sum_l gains_kl phi_l(x)."""
    gain_squares_PKL: np.ndarray
    """E[1(law l) a_k^2], for the posterior sd."""
    spills_PKJ: np.ndarray
    """E[b_kj]: what cluster k gains from a uniform share of cluster j's scenes; 0 on the diagonal."""
    null_gains_PL: np.ndarray
    """The same as gains under the null: one law and one gain for all clusters."""
    null_probability_P: np.ndarray
    """Weight of the null, 1 / (1 + odds^2): its posterior probability, sharpened."""
    noise_var_P: np.ndarray
    """Posterior mean of the run-to-run variance of a cluster score, one training seed."""


@dataclass(frozen=True, slots=True, eq=False)
class _Design:
    """What does not change while offsets are alternated."""

    precision_PKCTS: np.ndarray
    log_det_PKC: np.ndarray
    weighted_laws_PKCTL: np.ndarray
    square_PKCL: np.ndarray
    laws_PTKL: np.ndarray
    settings_C3: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Posterior:
    level_PKC: np.ndarray
    cross_PKCL: np.ndarray
    log_evidence_PKCML: np.ndarray
    mean_PKCML: np.ndarray
    weights_PKCML: np.ndarray
    squares_PKCML: np.ndarray
    setting_PCM: np.ndarray


def fit_responses(runs: Runs, priors: NoisePriors) -> ResponseFit:
    """Fit the response curves of all problems; docs/cluster_ga.md, The response model.

    Args:
        runs: Runs so far; a problem with unknown scores keeps them out of the fit, never reads them as 0.
        priors: Offset scales and the prior of the null.

    Returns:
        The posterior, averaged over laws and settings by their evidence.
    """
    design = _design(runs)
    offsets_PT = np.zeros(runs.scores_PTK.shape[:2])
    posterior = _posterior(runs, design, offsets_PT)
    for _ in range(NUM_OFFSET_STEPS):
        offsets_PT = _offsets(runs, design, posterior, priors)
        posterior = _posterior(runs, design, offsets_PT)
    null_probability_P, null_gains_PL = _null(design, posterior, priors.null_prior)
    return ResponseFit(
        gains_PKL=np.einsum("pkcml,pkcml->pkl", posterior.weights_PKCML, posterior.mean_PKCML),
        gain_squares_PKL=np.einsum("pkcml,pkcml->pkl", posterior.weights_PKCML, posterior.squares_PKCML),
        spills_PKJ=_spills(runs, design, posterior, offsets_PT),
        null_gains_PL=null_gains_PL,
        null_probability_P=null_probability_P,
        noise_var_P=posterior.setting_PCM.sum(2) @ design.settings_C3[:, 0] ** 2,
    )


def _design(runs: Runs) -> _Design:
    starts = START_SDS if np.any(runs.is_real_only_T) else START_SDS[:1]
    settings_C3 = np.array(
        [(noise, spill, start) for noise in NOISE_SDS for spill in SPILL_SDS for start in starts]
    )
    precision_PKCTS, log_det_PKC = _precisions(runs, settings_C3)
    laws_PTKL = law_values(runs.shares_PTK)
    weighted_PKCTL = precision_PKCTS @ np.moveaxis(laws_PTKL, 2, 1)[:, :, None]
    square_PKCL = np.einsum("pkctl,ptkl->pkcl", weighted_PKCTL, laws_PTKL)
    return _Design(precision_PKCTS, log_det_PKC, weighted_PKCTL, square_PKCL, laws_PTKL, settings_C3)


def _precisions(runs: Runs, settings_C3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision of the scores of each cluster over runs, with b_k and u_k integrated out.

    Covariance D + spill^2 X_k X_k^T over known runs (X_k = shares of the other clusters); a flat u_k then projects
    the precision W to W - W 1 1^T W / (1^T W 1).
    """
    known_PKT = ~np.isnan(np.moveaxis(runs.scores_PTK, 1, 2))
    variance_PKCT = np.moveaxis(_variances(runs, settings_C3), (1, 3), (3, 2))
    both_PKTS = known_PKT[..., :, None] & known_PKT[..., None, :]
    shares = runs.shares_PTK
    others_PKTS = (shares @ np.moveaxis(shares, 1, 2))[:, None] - np.einsum("ptk,psk->pkts", shares, shares)
    spread_PKCTS = np.where(both_PKTS, others_PKTS, 0.0)[:, :, None] * settings_C3[:, 1, None, None] ** 2
    diagonal_PKCT = np.where(known_PKT[:, :, None], variance_PKCT, 1.0)
    covariance_PKCTS = spread_PKCTS + np.eye(shares.shape[1]) * diagonal_PKCT[..., None]
    full_PKCTS = np.where(both_PKTS[:, :, None], np.linalg.inv(covariance_PKCTS), 0.0)
    log_det_PKC = -0.5 * np.linalg.slogdet(covariance_PKCTS)[1]
    column_PKCT = full_PKCTS.sum(-1)
    total_PKC = np.maximum(column_PKCT.sum(-1), 1e-300)
    outer_PKCTS = column_PKCT[..., :, None] * column_PKCT[..., None, :]
    any_known_PK1 = np.any(known_PKT, axis=-1, keepdims=True)
    return (
        full_PKCTS - outer_PKCTS / total_PKC[..., None, None],
        log_det_PKC - 0.5 * np.where(any_known_PK1, np.log(total_PKC), 0.0),
    )


def _variances(runs: Runs, settings_C3: np.ndarray) -> np.ndarray:
    """Variance of each score without spills, (P, T, K, C)."""
    noise_TC = settings_C3[:, 0] ** 2 / runs.num_seeds_T[:, None]
    start_TC = np.where(runs.is_real_only_T[:, None], settings_C3[:, 2] ** 2, 0.0)
    return runs.scene_var_PTK[..., None] + (noise_TC + start_TC)[:, None, :]


def _posterior(runs: Runs, design: _Design, offsets_PT: np.ndarray) -> _Posterior:
    """Conjugate posterior of every gain and the evidence of every law and setting."""
    scores_PKT = _centred_scores(runs, offsets_PT)
    cross_PKCL = np.einsum("pkctl,pkt->pkcl", design.weighted_laws_PKCTL, scores_PKT)
    energy_PKC = np.einsum(
        "pkt,pkcts,pks->pkc", scores_PKT, design.precision_PKCTS, scores_PKT, optimize=True
    )
    shift_PK = 0.0 if runs.gain_shift_PK is None else runs.gain_shift_PK[:, :, None, None, None]
    mean_M1, sd_M1 = _MEAN_M[:, None] + shift_PK, _SD_M[:, None]
    square, cross = design.square_PKCL[:, :, :, None], cross_PKCL[:, :, :, None]
    curvature = square + 1 / sd_M1**2
    mean_PKCML = (cross + mean_M1 / sd_M1**2) / curvature
    residual = cross - mean_M1 * square
    log_evidence = residual**2 / (2 * curvature) - 0.5 * np.log(sd_M1**2 * curvature)
    log_evidence += mean_M1 * cross - 0.5 * mean_M1**2 * square + _LOG_LAW_PRIOR_L
    level_PKC = design.log_det_PKC - 0.5 * energy_PKC
    log_evidence += level_PKC[..., None, None]
    top = log_evidence.max(-1, keepdims=True)
    law_weights = np.exp(log_evidence - top)
    law_total = law_weights.sum(-1, keepdims=True)
    setting_PCM = _softmax((top + np.log(law_total))[..., 0].sum(1))
    weights_PKCML = law_weights / law_total * setting_PCM[:, None, :, :, None]
    squares_PKCML = mean_PKCML**2 + 1 / curvature
    return _Posterior(
        level_PKC, cross_PKCL, log_evidence, mean_PKCML, weights_PKCML, squares_PKCML, setting_PCM
    )


def _offsets(runs: Runs, design: _Design, posterior: _Posterior, priors: NoisePriors) -> np.ndarray:
    """Posterior-mean common offset of each run given the current curves, (P, T); the mean over runs is 0."""
    gains_PKL = np.einsum("pkcml,pkcml->pkl", posterior.weights_PKCML, posterior.mean_PKCML)
    known_PTK = ~np.isnan(runs.scores_PTK)
    variance_PTK = np.einsum(
        "ptkc,pc->ptk", _variances(runs, design.settings_C3), posterior.setting_PCM.sum(2)
    )
    precision_PTK = np.where(known_PTK, 1 / np.where(known_PTK, variance_PTK, 1.0), 0.0)
    curve_PTK = np.einsum("pkl,ptkl->ptk", gains_PKL, design.laws_PTKL)
    residual_PTK = np.where(known_PTK, runs.scores_PTK - curve_PTK, 0.0)
    level_PK = (precision_PTK * residual_PTK).sum(1) / np.maximum(precision_PTK.sum(1), 1e-300)
    total_PT = precision_PTK.sum(2)
    mean_PT = (precision_PTK * (residual_PTK - level_PK[:, None])).sum(2) / np.maximum(total_PT, 1e-300)
    prior_T = (
        np.where(runs.is_real_only_T, priors.offset_real_only_sd, priors.offset_sd) ** 2 / runs.num_seeds_T
    )
    offsets_PT = mean_PT * prior_T * total_PT / (prior_T * total_PT + 1)
    return offsets_PT - offsets_PT.mean(1, keepdims=True)


def _null(design: _Design, posterior: _Posterior, null_prior: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight and shared curve of the null: one law and one gain for all clusters.

    Its rival is the free fit with gain priors at least `MATERIAL_SD` wide, averaged over settings like the null.
    Smaller differences are left out: ten runs cannot tell them from the null, and moving for them is what a null
    problem punishes.
    """
    square_PCL = design.square_PKCL.sum(1) + 1 / NULL_SD**2
    cross_PCL = posterior.cross_PKCL.sum(1) + NULL_MEAN / NULL_SD**2
    log_null_PCL = 0.5 * cross_PCL**2 / square_PCL - 0.5 * (NULL_MEAN / NULL_SD) ** 2
    log_null_PCL = (
        log_null_PCL - 0.5 * np.log(NULL_SD**2 * square_PCL) + posterior.level_PKC.sum(1)[..., None]
    )
    weights_PCL = _softmax(log_null_PCL + _LOG_LAW_PRIOR_L)
    gains_PL = (weights_PCL * cross_PCL / square_PCL).sum(1)
    if null_prior in (0.0, 1.0):
        return np.full(len(gains_PL), null_prior), gains_PL
    material_PKCML = posterior.log_evidence_PKCML[:, :, :, _IS_MATERIAL_M]
    top = material_PKCML.max(-1, keepdims=True)
    log_material_PCM = (top[..., 0] + np.log(np.exp(material_PKCML - top).sum(-1))).sum(1)
    num_laws = len(_LOG_LAW_PRIOR_L)
    log_odds_P = _log_mean(log_material_PCM) - _log_mean(log_null_PCL + _LOG_LAW_PRIOR_L) - np.log(num_laws)
    log_odds_P = log_odds_P + np.log(1 - null_prior) - np.log(null_prior)
    return 1 / (1 + np.exp(np.clip(NULL_SHARPNESS * log_odds_P, -700.0, 700.0))), gains_PL


def _spills(runs: Runs, design: _Design, posterior: _Posterior, offsets_PT: np.ndarray) -> np.ndarray:
    """E[b_kj] = spill^2 x_j^T W (y - E[a] phi), averaged over settings."""
    scores_PKT = _centred_scores(runs, offsets_PT)
    gains_PKCL = np.einsum("pkcml,pkcml->pkcl", posterior.weights_PKCML, posterior.mean_PKCML)
    weighted_PKCT = np.einsum("pkcts,pks->pkct", design.precision_PKCTS, scores_PKT)
    weighted_PKCT = weighted_PKCT * posterior.setting_PCM.sum(2)[:, None, :, None]
    weighted_PKCT = weighted_PKCT - np.einsum("pkcl,pkctl->pkct", gains_PKCL, design.weighted_laws_PKCTL)
    scaled_PKT = np.einsum("c,pkct->pkt", design.settings_C3[:, 1] ** 2, weighted_PKCT)
    return np.einsum("pkt,ptj->pkj", scaled_PKT, runs.shares_PTK) * (1 - np.eye(scores_PKT.shape[1]))


def _centred_scores(runs: Runs, offsets_PT: np.ndarray) -> np.ndarray:
    """Scores minus offsets, 0 where unknown (their precision is 0 as well), (P, K, T)."""
    return np.moveaxis(np.nan_to_num(runs.scores_PTK - offsets_PT[..., None], nan=0.0), 1, 2)


def _softmax(log_weights: np.ndarray) -> np.ndarray:
    """Normalise over all axes but the first."""
    axes = tuple(range(1, log_weights.ndim))
    weights = np.exp(log_weights - log_weights.max(axes, keepdims=True))
    return weights / weights.sum(axes, keepdims=True)


def _log_mean(log_values: np.ndarray) -> np.ndarray:
    """log of the mean of exp over all axes but the first."""
    axes = tuple(range(1, log_values.ndim))
    top = log_values.max(axes, keepdims=True)
    return np.log(np.exp(log_values - top).mean(axes)) + top.reshape(len(log_values))
