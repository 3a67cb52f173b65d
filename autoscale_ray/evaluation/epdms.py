"""EPDMS, NAVSIM's second score (v2.2), and its two-frame extended comfort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.combine import weighted_score
from autoscale_ray.evaluation.comfort import extended_comfort
from autoscale_ray.evaluation.metrics import RULES_V2
from autoscale_ray.evaluation.prepare import PreparedScene
from autoscale_ray.evaluation.scene import Floats, ScoringScene
from autoscale_ray.evaluation.scoring import Metric, ScoreResult, score_trajectories
from autoscale_ray.evaluation.timing import STEP_S

MAX_INTERVAL_S = 0.55


def epdms(
    scenes: Sequence[ScoringScene | PreparedScene],
    trajectories: Floats,
    *,
    backend: str = "auto",
    device: str = "cpu",
    keep_states: bool = False,
) -> ScoreResult:
    """Score trajectories by EPDMS = NC DAC DDC TLC (5 EP + 5 TTC + 2 LK + 2 HC) / 14, human filter included.

    With extended comfort, see `with_extended_comfort`. Rules: docs/scoring.md, column v2.

    Args:
        scenes: S scenes with 9 or 11 frames, or results of `prepare` with RULES_V2.
        trajectories: (S, P, 8, 3) every 0.5 s or (S, P, 40, 3) every 0.1 s: x, y in m, yaw in rad relative to the
            rear axle at t = 0.
        backend: "auto", "torch" or "numba".
        device: Device of the torch backend.
        keep_states: Also return the driven states, which extended comfort needs.

    Returns:
        Sub-scores and scores (S, P) in [0, 1] with valid masks.

    Raises:
        InvalidSceneError: Naming the scene, field and rule.
        MissingExtraError: If backend "numba" is not installed.
    """
    return score_trajectories(scenes, trajectories, RULES_V2, backend, device, keep_states)


def two_frame_extended_comfort(
    states_now: Tensor, states_previous: Tensor, interval_s: Tensor | Floats
) -> Metric:
    """Compare two drives that start `interval_s` apart over their overlap.

    Shift s = round(interval / 0.1); now[:-s] against previous[s:] (docs/scoring.md, Extended comfort).

    Args:
        states_now: (N, 41, 11) driven states of the current frames.
        states_previous: (N, 41, 11) driven states of the frames before.
        interval_s: (N,) time between the frames in s; NaN where there is no previous frame.

    Returns:
        EC (N,) in {0, 1}, valid where the interval is known.

    Raises:
        InvalidInputError: If an interval is not in (0, 0.55) s.
    """
    now, previous = torch.as_tensor(states_now), torch.as_tensor(states_previous)
    interval = np.asarray(torch.as_tensor(interval_s).cpu(), dtype=np.float64)
    known = np.isfinite(interval)
    outside = known & ~((interval > 0.0) & (interval < MAX_INTERVAL_S))
    if outside.any():
        raise InvalidInputError(
            "interval_s", f"must be in (0, {MAX_INTERVAL_S})", float(interval[outside][0])
        )
    shift = np.rint(np.where(known, interval, 0.0) / STEP_S).astype(int)
    value = torch.full((len(interval),), torch.nan, dtype=now.dtype, device=now.device)
    for size in np.unique(shift[known]):
        rows = torch.as_tensor(np.flatnonzero(known & (shift == size)), device=now.device)
        length = now.shape[1] - int(size)
        value[rows] = extended_comfort(now[rows, :length], previous[rows, int(size) :]).to(now.dtype)
    return Metric(value, torch.as_tensor(known, device=now.device))


def with_extended_comfort(result: ScoreResult, comfort: Metric) -> ScoreResult:
    """Add extended comfort to a result: over 16 where it is valid, over 14 elsewhere.

    Args:
        result: Result of `epdms`.
        comfort: EC of shape (S, P).

    Returns:
        The result with `extended_comfort` and `score_with_comfort` filled.
    """
    columns = {name: metric.value for name, metric in result.filtered.items()}
    full = weighted_score(columns, RULES_V2, torch.nan_to_num(comfort.value))
    score = torch.where(comfort.valid, full, result.score.value)
    return replace(result, extended_comfort=comfort, score_with_comfort=Metric(score, result.score.valid))
