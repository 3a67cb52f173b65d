"""Random mixture problems whose best mixture can be computed; hundreds at once.

True score of cluster k when e_j scenes of true cluster j are trained on (u = budget / K):

    y_k = base_k + A_k phi(x_k / s_k) - sum_j H_kj psi(e_j / u),      x = G e,   e = Mix n
    phi(z) = 1 - (1 + z)^-alpha_k     (power law: concave, slow to saturate)
    psi    = phi with s = u, alpha = .7, or 1 - exp(-z / .1) (harm that saturates at a tenth of a share)

G holds the own effect (quality g_k) and the transfer rho * S_kj g_j; S is a row-normalised softmax over random
cluster embeddings, unknown to every method. Harmful clusters have g = 0 and H > 0, with the same transfer. Mix is
the identity unless clusters are wrong for a share of the scenes.

The constants below were set once so that simple rules score as measured for this family before (cluster_ga.md,
How it was tested); they are not what any method assumes.

Shape legend: P problems, K (J) clusters, T runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autoscale_ray.mixture.allocation import waterfill

SCENE_SD = 0.146
"""SD of one dev scene's score within a run, navtest."""
NUM_DEV_SCENES = 12_146
"""Scenes of navtest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyConfig:
    """Constants of a problem family; the defaults are the base family."""

    num_clusters: int = 16
    budget: int = 1600
    uniform_share: float = 100.0
    """Scale of the half-saturation counts s_k (scenes); budget / K in the base family."""
    num_harmful: int = 3
    transfer: float = 0.9
    """rho: exposures a cluster gets from all others together, as a share of its own."""
    gain_median: float = 0.075
    gain_spread: float = 0.6
    """A_k is log-normal with this median and log-sd (score units)."""
    scale_spread: float = 0.6
    """Log-sd of s_k around `uniform_share`."""
    exponent_range: tuple[float, float] = (0.4, 1.2)
    quality_range: tuple[float, float] = (0.4, 1.0)
    harm: float = 0.052
    """Mean asymptotic harm (score units); each harmful cluster draws U(.5, 1.5) of it."""
    harm_saturates_at_once: bool = False
    dev_concentration: float = 1.5
    """Dirichlet concentration of the dev shares v_k."""
    pool_factor: float = 8.0
    """Pool size over budget."""
    pool_concentration: float = 3.0
    base_range: tuple[float, float] = (0.4, 0.9)
    """Range of base_k, the score without synthetic scenes."""
    share_in_wrong_cluster: float = 0.0
    """Share of each cluster's scenes that really come from all clusters evenly."""
    seed_sd: float = 0.008
    """Training-seed noise per cluster and run (score units)."""
    offset_sd: float = 0.004
    """Training-seed noise common to a run."""
    scene_design_effect: float = 1.0
    """Variance of dev means over that of independent scenes (log clustering); not told to the methods."""
    num_shared_logs: int = 0
    """Latent log effects that load on several clusters at once; 0 = scene noise independent over clusters."""
    drift_sd: float = 0.0
    """Log-sd of the random walk of A_k per run."""
    drift_trend: float = 0.0
    """Rise of every base score per run."""
    steps_share: float = 0.0
    """Weight of the share-of-steps exposure against the count, in [0, 1]; real counts come from `real_factor`."""
    real_factor: float = 0.0
    """Real training scenes over budget, long-tailed over clusters."""
    equal: bool = False
    """Null: all clusters the same, equal dev shares."""
    jitter: float = 0.0
    """Near-null: log-sd of A_k and s_k around equal clusters, with unequal dev shares."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Family:
    """P problems of one family; see the module text for the symbols."""

    config: FamilyConfig
    dev_weights_PK: np.ndarray
    dev_counts_PK: np.ndarray
    caps_PK: np.ndarray
    real_PK: np.ndarray
    base_PK: np.ndarray
    gain_PK: np.ndarray
    scale_PK: np.ndarray
    exponent_PK: np.ndarray
    reach_PKJ: np.ndarray
    harm_PKJ: np.ndarray
    harmful_PK: np.ndarray
    similarity_PKJ: np.ndarray
    drift_PTK: np.ndarray
    """Cumulative log drift of A_k at each run."""

    @property
    def uniform_PK(self) -> np.ndarray:
        """Uniform mixture under the pool caps, in scenes."""
        return waterfill(np.ones_like(self.caps_PK), self.caps_PK, self.budget_P)

    @property
    def budget_P(self) -> np.ndarray:
        return np.full(len(self.caps_PK), float(self.config.budget))


def draw_family(config: FamilyConfig, seed: int, num_problems: int, num_runs: int = 16) -> Family:
    """Draw random problems; the same seed gives the same problems whatever is done with them."""
    rng = np.random.default_rng(seed)
    shape = (num_problems, config.num_clusters)
    dev_PK = rng.dirichlet(np.full(shape[1], config.dev_concentration), num_problems)
    pool_PK = rng.dirichlet(np.full(shape[1], config.pool_concentration), num_problems)
    gain_normal_PK, scale_normal_PK = rng.standard_normal((2, *shape))
    exponent_PK, quality_PK, harm_PK, base_PK, order_PK = rng.random((5, *shape))
    embedding_PKD = rng.standard_normal((*shape, 3))
    drift_PTK = np.cumsum(rng.standard_normal((num_problems, num_runs, shape[1])), axis=1) * config.drift_sd
    real_PK = rng.dirichlet(np.full(shape[1], 0.5), num_problems) * config.real_factor * config.budget
    harmful_PK = np.argsort(np.argsort(order_PK, 1), 1) < config.num_harmful
    if config.equal:
        dev_PK = np.full(shape, 1 / shape[1])
    gain_spread, scale_spread = config.gain_spread, config.scale_spread
    if config.equal or config.jitter:
        gain_spread = scale_spread = config.jitter
        exponent_PK, quality_PK = np.full(shape, 0.5), np.full(shape, 0.5)
        embedding_PKD, harmful_PK = np.zeros((*shape, 3)), np.zeros(shape, bool)
    similarity_PKJ = _similarity(embedding_PKD)
    spread_PKJ = np.eye(shape[1]) + config.transfer * similarity_PKJ
    mix_KJ = _mix(config)
    quality_PK = _within(config.quality_range, quality_PK)
    return Family(
        config=config,
        dev_weights_PK=dev_PK,
        dev_counts_PK=np.maximum(1.0, np.round(NUM_DEV_SCENES * dev_PK)),
        caps_PK=np.maximum(1.0, np.round(config.pool_factor * config.budget * pool_PK)),
        real_PK=np.round(real_PK),
        base_PK=_within(config.base_range, base_PK),
        gain_PK=config.gain_median * np.exp(gain_spread * gain_normal_PK),
        scale_PK=config.uniform_share * np.exp(scale_spread * scale_normal_PK),
        exponent_PK=_within(config.exponent_range, exponent_PK),
        reach_PKJ=(spread_PKJ * np.where(harmful_PK, 0.0, quality_PK)[:, None, :]) @ mix_KJ,
        harm_PKJ=spread_PKJ * np.where(harmful_PK, config.harm * (0.5 + harm_PK), 0.0)[:, None, :],
        harmful_PK=harmful_PK,
        similarity_PKJ=similarity_PKJ,
        drift_PTK=drift_PTK,
    )


def true_scores(family: Family, counts_PK: np.ndarray, run: int | None = None) -> np.ndarray:
    """Noise-free dev scores (P, K) of mixtures at a run index (None = without drift)."""
    exposure_PK = np.einsum("pkj,pj->pk", family.reach_PKJ, _exposures(family, counts_PK))
    gain_PK, base_PK = family.gain_PK, family.base_PK
    if run is not None:
        gain_PK = gain_PK * np.exp(family.drift_PTK[:, run])
        base_PK = base_PK + family.config.drift_trend * run
    law_PK = 1 - (1 + exposure_PK / family.scale_PK) ** -family.exponent_PK
    harm_PK = np.einsum("pkj,pj->pk", family.harm_PKJ, _harm_law(family, counts_PK)[0])
    return base_PK + gain_PK * law_PK - harm_PK


def objective(family: Family, counts_PK: np.ndarray, run: int | None = None) -> np.ndarray:
    """F = sum_k v_k y_k for each problem (P,)."""
    return (family.dev_weights_PK * true_scores(family, counts_PK, run)).sum(1)


def objective_gradient(family: Family, counts_PK: np.ndarray, run: int | None = None) -> np.ndarray:
    """dF/dn at full budget (P, K)."""
    exposure_PK = np.einsum("pkj,pj->pk", family.reach_PKJ, _exposures(family, counts_PK))
    gain_PK = family.gain_PK if run is None else family.gain_PK * np.exp(family.drift_PTK[:, run])
    slope_PK = gain_PK * family.exponent_PK / family.scale_PK
    slope_PK = slope_PK * (1 + exposure_PK / family.scale_PK) ** (-family.exponent_PK - 1)
    own_PK = np.einsum("pk,pkj->pj", family.dev_weights_PK * slope_PK, family.reach_PKJ)
    harm_PK = (
        np.einsum("pk,pkj->pj", family.dev_weights_PK, family.harm_PKJ) * _harm_law(family, counts_PK)[1]
    )
    return own_PK - np.einsum("pj,jk->pk", harm_PK, _mix(family.config))


def observed_scores(
    family: Family, counts_PK: np.ndarray, rng: np.random.Generator, run: int, num_seeds: int = 1
) -> np.ndarray:
    """Scores of one run with dev-scene noise, seed noise per cluster and a common offset (P, K).

    The scene noise is that of one dev set: averaging seeds does not shrink it.
    """
    config, shape = family.config, counts_PK.shape
    scene_PK = SCENE_SD / np.sqrt(family.dev_counts_PK) * _scene_normals(config, rng, shape)
    seed_sd = 1 / np.sqrt(num_seeds)
    seed_PK = config.seed_sd * seed_sd * rng.standard_normal(shape)
    offset_P1 = config.offset_sd * seed_sd * rng.standard_normal((shape[0], 1))
    return true_scores(family, counts_PK, run) + scene_PK + seed_PK + offset_P1


def _scene_normals(config: FamilyConfig, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Unit scene noise, inflated by the design effect and partly shared through logs."""
    own_PK = rng.standard_normal(shape)
    if config.num_shared_logs == 0:
        return np.sqrt(config.scene_design_effect) * own_PK
    loading_LK = rng.dirichlet(np.full(config.num_shared_logs, 0.3), shape[1]).T
    loading_LK /= np.sqrt((loading_LK**2).sum(0))
    shared_PK = rng.standard_normal((shape[0], config.num_shared_logs)) @ loading_LK
    return own_PK + np.sqrt(config.scene_design_effect - 1) * shared_PK


def _exposures(family: Family, counts_PK: np.ndarray) -> np.ndarray:
    """Scenes, or scenes scaled by how often a fixed number of steps visits them (share of steps)."""
    weight = family.config.steps_share
    if weight == 0:
        return counts_PK
    num_real_P1 = family.real_PK.sum(1, keepdims=True)
    full_P1 = num_real_P1 + family.config.budget
    visits_PK = (family.real_PK + counts_PK) * full_P1 / (num_real_P1 + counts_PK.sum(1, keepdims=True))
    return (1 - weight) * counts_PK + weight * visits_PK


def _harm_law(family: Family, counts_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """psi of the true counts per uniform share, and d psi / d count."""
    unit = family.config.uniform_share
    z_PK = counts_PK @ _mix(family.config).T / unit
    if family.config.harm_saturates_at_once:
        left_PK = np.exp(-z_PK / 0.1)
        return 1 - left_PK, left_PK / (0.1 * unit)
    return 1 - (1 + z_PK) ** -0.7, 0.7 / unit * (1 + z_PK) ** -1.7


def _mix(config: FamilyConfig) -> np.ndarray:
    wrong, num_clusters = config.share_in_wrong_cluster, config.num_clusters
    return (1 - wrong) * np.eye(num_clusters) + wrong / num_clusters


def _similarity(embedding_PKD: np.ndarray) -> np.ndarray:
    """Row-normalised exp(-|z_k - z_j|^2 / 2), zero on the diagonal."""
    distance_PKJ = ((embedding_PKD[:, :, None] - embedding_PKD[:, None]) ** 2).sum(-1)
    kernel_PKJ = np.exp(-distance_PKJ / 2) * (1 - np.eye(embedding_PKD.shape[1]))
    return kernel_PKJ / kernel_PKJ.sum(2, keepdims=True)


def _within(bounds: tuple[float, float], unit: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * unit


BASE = FamilyConfig()
FAMILIES: dict[str, FamilyConfig] = {
    "base": BASE,
    "separable": replace(BASE, transfer=0.0, num_harmful=0),
    "transfer": replace(BASE, num_harmful=0),
    "harmful": replace(BASE, transfer=0.0),
    "deficits": replace(BASE, base_range=(0.4, 1.0)),
    "all_saturated": replace(BASE, base_range=(0.95, 0.95)),
    "pool_exhaustion": replace(BASE, pool_factor=1.5, pool_concentration=0.7),
    "null": replace(BASE, equal=True, num_harmful=0),
    "near_null": replace(BASE, jitter=0.1, num_harmful=0),
    "drift": replace(BASE, drift_sd=0.1, drift_trend=0.003),
    "seed_noise_x2": replace(BASE, seed_sd=0.016, offset_sd=0.008),
    "seed_noise_x4": replace(BASE, seed_sd=0.032, offset_sd=0.016),
    "transfer_x3": replace(BASE, transfer=2.7),
    "wrong_clusters": replace(BASE, share_in_wrong_cluster=0.2),
    "saturating_harm": replace(BASE, harm_saturates_at_once=True),
    "k64": replace(BASE, num_clusters=64, num_harmful=12),
    "steps_share": replace(BASE, steps_share=1.0, real_factor=1.0),
    "steps_share_half": replace(BASE, steps_share=0.5, real_factor=1.0),
    "log_clustered": replace(BASE, scene_design_effect=3.0, num_shared_logs=40),
    "few_scenes": replace(BASE, budget=48, uniform_share=3.0),
}
