"""Rows of the controlled benchmark: play a method on a family and summarise it against the oracle."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.controlled.family import Family, objective
from benchmarks.controlled.play import Answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method on one family after R runs."""

    family: str
    method: str
    num_runs: int
    num_problems: int
    evaluations: int
    """Training runs charged to one problem, seeds counted."""
    regret: float
    """Mean loss to the oracle over the mean loss of uniform: 0 oracle, 1 uniform. NaN where uniform is best."""
    regret_low: float
    regret_high: float
    """95 % bootstrap interval over problems."""
    worse_than_uniform: float
    kl_to_optimum: float
    kl_from_start: float
    kl_from_start_max: float
    harmful_mass: float
    cpu_s: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def summarise(
    family: Family,
    oracles: dict[int, np.ndarray],
    answers: Answers,
    *,
    names: tuple[str, str],
    num_seeds: int,
    started: float,
) -> tuple[list[Row], dict[int, np.ndarray]]:
    """Summarise the answers of a method, and return its loss to the oracle per problem as well (points, by R).

    The truth of a drifting family, and hence its oracle, is that of the run after the last one.
    """
    rows, losses = [], {}
    for num_runs, counts_PK in sorted(answers.items()):
        run, oracle_PK = num_runs if family.config.drift_sd else None, oracles[num_runs]
        best_P = objective(family, oracle_PK, run)
        loss_P = best_P - objective(family, counts_PK, run)
        start_P = best_P - objective(family, family.uniform_PK, run)
        low, high = bootstrap_ratio(loss_P, start_P)
        from_start_P = kl(counts_PK, family.uniform_PK)
        losses[num_runs] = 100 * loss_P
        rows.append(
            Row(
                family=names[0],
                method=names[1],
                num_runs=num_runs,
                num_problems=len(loss_P),
                evaluations=num_runs * num_seeds,
                regret=ratio(loss_P, start_P),
                regret_low=low,
                regret_high=high,
                worse_than_uniform=float((loss_P > start_P + 1e-5).mean()),
                kl_to_optimum=float(kl(oracle_PK, counts_PK).mean()),
                kl_from_start=float(from_start_P.mean()),
                kl_from_start_max=float(from_start_P.max()),
                harmful_mass=float(((counts_PK * family.harmful_PK).sum(1) / family.config.budget).mean()),
                cpu_s=time.process_time() - started,
            )
        )
    return rows, losses


def ratio(loss_P: np.ndarray, start_P: np.ndarray) -> float:
    """Ratio of means; NaN where uniform is optimal everywhere."""
    return float(loss_P.mean() / start_P.mean()) if start_P.mean() > 1e-9 else float("nan")


def bootstrap_ratio(loss_P: np.ndarray, start_P: np.ndarray, num_draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the ratio of means over problems."""
    if start_P.mean() <= 1e-9:
        return float("nan"), float("nan")
    draws_BP = np.random.default_rng(0).integers(0, len(loss_P), (num_draws, len(loss_P)))
    ratios_B = loss_P[draws_BP].mean(1) / start_P[draws_BP].mean(1)
    return float(np.quantile(ratios_B, 0.025)), float(np.quantile(ratios_B, 0.975))


def kl(counts_PK: np.ndarray, reference_PK: np.ndarray) -> np.ndarray:
    """KL(counts || reference) of the shares of each problem; a reference share of 0 counts as half a scene."""
    share_PK = counts_PK / counts_PK.sum(1, keepdims=True)
    other_PK = np.maximum(reference_PK, 0.5) / reference_PK.sum(1, keepdims=True)
    terms_PK = share_PK * np.log(np.where(share_PK > 0, share_PK, 1.0) / other_PK)
    return terms_PK.sum(1)


def paired_p_value(ours_P: np.ndarray, theirs_P: np.ndarray) -> float:
    """One-sided p-value that our mean loss is not below theirs: sign-flip test on paired differences."""
    difference_P = theirs_P - ours_P
    signs_BP = np.random.default_rng(0).choice([-1.0, 1.0], size=(9999, len(difference_P)))
    extreme = ((signs_BP * difference_P).mean(1) >= difference_P.mean()).sum()
    return float((extreme + 1) / 10_000)
