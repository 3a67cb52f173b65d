"""C3, real training: one linear regression per cluster, whose best mixture is Neyman's.

Cluster k draws x ~ N(0, I_d) and 16 outputs y = x beta_k + sigma_k e. A mixture trains ordinary least squares on
m_k = real_k + n_k rows; the score of the cluster is 1 - its excess risk |beta_hat - beta|^2, mean over outputs.
Expected risk:

    E risk_k = sigma_k^2 d_k / (m_k - d_k - 1),   best m_k - d_k - 1 proportional to sigma_k sqrt(v_k d_k)

(Neyman allocation, exact for Gaussian rows.) Nothing of the family in `family.py` holds here.
"""

from __future__ import annotations

import numpy as np

from autoscale_ray.config import AscentConfig
from autoscale_ray.mixture.allocation import allocate
from autoscale_ray.mixture.estimators import METHODS
from autoscale_ray.mixture.problem import ClusterInfo, Observation

NUM_CLUSTERS, BUDGET, REAL_ROWS, NUM_OUTPUTS = 8, 1600, 40, 16


class Regression:
    """One problem: dimensions, noise and true coefficients of every cluster."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.dims_K = rng.integers(4, 13, NUM_CLUSTERS)
        self.noise_K = 0.7 * np.exp(0.5 * rng.standard_normal(NUM_CLUSTERS))
        self.weights_K = rng.dirichlet(np.full(NUM_CLUSTERS, 1.5))
        self.coefficients = [rng.standard_normal((dim, NUM_OUTPUTS)) for dim in self.dims_K]

    def expected_risk(self, counts_K: np.ndarray) -> float:
        """Weighted expected excess risk of a mixture."""
        spare_K = REAL_ROWS + counts_K - self.dims_K - 1
        return float((self.weights_K * self.noise_K**2 * self.dims_K / spare_K).sum())

    def neyman_counts(self) -> np.ndarray:
        """Best real-valued counts: Neyman's rule, clipped at 0 and refilled."""
        pull_K = self.noise_K * np.sqrt(self.weights_K * self.dims_K)
        low, high = 0.0, 1e9
        for _ in range(200):
            level = (low + high) / 2
            total = np.maximum(level * pull_K + self.dims_K + 1 - REAL_ROWS, 0).sum()
            low, high = (level, high) if total < BUDGET else (low, level)
        return np.maximum(low * pull_K + self.dims_K + 1 - REAL_ROWS, 0)

    def train(self, counts_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Fit every cluster by least squares on fresh rows and score it."""
        return np.array([self._score(k, REAL_ROWS + int(counts_K[k]), rng) for k in range(NUM_CLUSTERS)])

    def _score(self, k: int, num_rows: int, rng: np.random.Generator) -> float:
        rows = rng.standard_normal((num_rows, self.dims_K[k]))
        targets = rows @ self.coefficients[k] + self.noise_K[k] * rng.standard_normal((num_rows, NUM_OUTPUTS))
        fitted = np.linalg.lstsq(rows, targets, rcond=None)[0]
        return 1.0 - float(((fitted - self.coefficients[k]) ** 2).sum(0).mean())


def neyman_ratios(seeds: range, num_runs: int) -> np.ndarray:
    """Expected risk of the recommended mixture over Neyman's, and uniform's over Neyman's, (problems, 2)."""
    return np.array([_ratios(Regression(seed), seed, num_runs) for seed in seeds])


def _ratios(problem: Regression, seed: int, num_runs: int) -> tuple[float, float]:
    info = _info(problem)
    config, method = AscentConfig(seed=seed), METHODS["response"]
    rng = np.random.default_rng([seed, 1])
    history: tuple[Observation, ...] = ()
    for run in range(num_runs):
        counts_K = np.zeros(NUM_CLUSTERS)
        if run:
            counts_K = np.array(list(allocate(method.propose(history, info, config), info).values()), float)
        scores_K = problem.train(counts_K, rng)
        history = (*history, _observation(info, counts_K, scores_K))
    final_K = np.array(list(allocate(method.final(history, info, config), info).values()), float)
    best = problem.expected_risk(problem.neyman_counts())
    uniform = problem.expected_risk(np.full(NUM_CLUSTERS, BUDGET / NUM_CLUSTERS))
    return problem.expected_risk(final_K) / best, uniform / best


def _info(problem: Regression) -> ClusterInfo:
    return ClusterInfo(
        cluster_ids=tuple(f"c{k}" for k in range(NUM_CLUSTERS)),
        budget=BUDGET,
        pool_sizes_K=np.full(NUM_CLUSTERS, 4.0 * BUDGET),
        dev_counts_K=np.full(NUM_CLUSTERS, 1000.0),
        dev_weights_K=problem.weights_K,
        real_counts_K=np.full(NUM_CLUSTERS, float(REAL_ROWS)),
    )


def _observation(info: ClusterInfo, counts_K: np.ndarray, scores_K: np.ndarray) -> Observation:
    return Observation(
        cluster_ids=info.cluster_ids,
        counts_K=counts_K,
        scores_K=scores_K,
        score_se_K=np.full(NUM_CLUSTERS, 1e-4),
        is_real_only=not counts_K.any(),
    )
