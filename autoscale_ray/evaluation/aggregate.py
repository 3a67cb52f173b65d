"""From frame scores to benchmark scores: one stage (navtest) and two stages (navhard).

Shape legend: N frames, M mappings (groups), Q synthetic pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.combine import COLUMNS_V2, weighted_score
from autoscale_ray.evaluation.epdms import two_frame_extended_comfort
from autoscale_ray.evaluation.metrics import RULES_V2
from autoscale_ray.evaluation.scene import Floats, Integers

KERNEL_VARIANCE_M2 = 0.1
EXTENDED_COMFORT = "two_frame_extended_comfort"
ALL_COLUMNS = (*COLUMNS_V2, EXTENDED_COMFORT, "score")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageFrames:
    """Scored frames of both stages.

    Fields:
        columns: The 8 sub-scores of EPDMS by name, (N,) each, human filter applied where it applies.
        start_times_s: (N,) time of each frame.
        endpoints: (N, 2) last pose of the planner's own output in the map frame, not driven, m.
        start_points: (N, 2) ego position at the start of the frame, m.
        states: (N, 41, 11) driven states.
    """

    columns: Mapping[str, Floats]
    start_times_s: Floats
    endpoints: Floats
    start_points: Floats
    states: Floats | Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoStageScores:
    """Result of the two-stage aggregation.

    Fields:
        extended_comfort: (N,) EC; NaN for frames in no mapping.
        weights: (N,) 1 in stage one, the normalised kernel weight in stage two; NaN for frames in no mapping.
        scores: (N,) final frame scores; NaN for frames in no mapping.
        combined: Mean over mappings of stage one times weighted stage two, per column.
        stage_one: Mean over mappings of the stage-one frames, per column.
        stage_two: Mean over mappings of the weighted stage-two frames, per column.
    """

    extended_comfort: Floats
    weights: Floats
    scores: Floats
    combined: dict[str, float]
    stage_one: dict[str, float]
    stage_two: dict[str, float]


def aggregate_one_stage(columns: Mapping[str, Floats]) -> dict[str, float]:
    """Average frame scores: the mean of scores, not the score of means.

    Args:
        columns: Values (N,) by column name; NaN is missing and left out.

    Returns:
        Mean per column; NaN where a column has no value (docs/scoring.md, Aggregation).
    """
    means = {}
    for name, value in columns.items():
        known = np.asarray(value, dtype=np.float64).ravel()
        known = known[~np.isnan(known)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    return means


def aggregate_two_stage(frames: StageFrames, mapping_Q4: Integers) -> TwoStageScores:
    """Aggregate navhard's pseudo closed loop.

    Per mapping and for its now and previous frames: stage-one score times the average of stage two weighted with
    exp(-d^2 / (2 * 0.1)), d from the stage-one endpoint to the synthetic start, uniform where the weights vanish;
    then the mean of both, then over mappings, column by column (docs/scoring.md, Two stages).

    Args:
        frames: Scored frames of both stages.
        mapping_Q4: (Q, 4) indices of frames: stage-one now, stage-one previous, synthetic now, synthetic previous;
            rows with the same first two form one mapping.

    Returns:
        Scores per frame, and combined per column.

    Raises:
        InvalidInputError: If an index is out of range or two frames are 0.55 s or more apart.
    """
    mapping = np.asarray(mapping_Q4, dtype=np.int64)
    num_frames = len(frames.start_times_s)
    if (
        mapping.ndim != 2
        or mapping.shape[1] != 4
        or len(mapping) == 0
        or mapping.min() < 0
        or mapping.max() >= num_frames
    ):
        raise InvalidInputError("mapping", f"must be (Q >= 1, 4) indices below {num_frames}", mapping.shape)
    groups = _groups(mapping)
    comfort_N = _pair_comfort(frames, mapping)
    weight_N = _kernel_weights(frames, groups)
    score_N = _frame_scores(frames, comfort_N)
    table = {
        **{name: np.asarray(frames.columns[name]) for name in COLUMNS_V2},
        EXTENDED_COMFORT: comfort_N,
        "score": score_N,
    }
    parts = {name: _combine(table[name], weight_N, groups) for name in ALL_COLUMNS}
    return TwoStageScores(
        extended_comfort=comfort_N,
        weights=weight_N,
        scores=score_N,
        combined={name: part[0] for name, part in parts.items()},
        stage_one={name: part[1] for name, part in parts.items()},
        stage_two={name: part[2] for name, part in parts.items()},
    )


def _groups(mapping_Q4: Integers) -> list[Integers]:
    _, first, group_Q = np.unique(mapping_Q4[:, :2], axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return [mapping_Q4[group_Q.ravel() == group] for group in order]


def _pair_comfort(frames: StageFrames, mapping_Q4: Integers) -> Floats:
    pairs = np.unique(np.concatenate([mapping_Q4[:, :2], mapping_Q4[:, 2:]]), axis=0)
    now, previous = pairs.T
    states = torch.as_tensor(frames.states)
    times_s = np.asarray(frames.start_times_s)
    comfort = two_frame_extended_comfort(states[now], states[previous], times_s[now] - times_s[previous])
    comfort_N = np.full(len(times_s), np.nan)
    comfort_N[now] = comfort_N[previous] = comfort.value.cpu().numpy()
    return comfort_N


def _kernel_weights(frames: StageFrames, groups: list[Integers]) -> Floats:
    weight_N = np.full(len(frames.start_times_s), np.nan)
    endpoints, starts = np.asarray(frames.endpoints), np.asarray(frames.start_points)
    for group in groups:
        for first, second in ((0, 2), (1, 3)):
            weight_N[group[0, first]] = 1.0
            squared_m2 = ((endpoints[group[0, first]] - starts[group[:, second]]) ** 2).sum(axis=1)
            kernel = np.exp(-squared_m2 / (2.0 * KERNEL_VARIANCE_M2))
            total = kernel.sum()
            vanishes = bool(np.isclose(total, 0.0) or np.isnan(total))
            weight_N[group[:, second]] = 1.0 / len(group) if vanishes else kernel / total
    return weight_N


def _frame_scores(frames: StageFrames, comfort_N: Floats) -> Floats:
    columns = {
        name: torch.as_tensor(np.asarray(frames.columns[name], dtype=np.float64)) for name in COLUMNS_V2
    }
    return weighted_score(columns, RULES_V2, torch.as_tensor(comfort_N)).numpy()


def _combine(value_N: Floats, weight_N: Floats, groups: list[Integers]) -> tuple[float, float, float]:
    combined, stage_one, stage_two = [], [], []
    for group in groups:
        first = value_N[group[0, :2]]
        second = np.array([(weight_N[group[:, side]] * value_N[group[:, side]]).sum() for side in (2, 3)])
        combined.append((first * second).mean())
        stage_one.append(first.mean())
        stage_two.append(second.mean())
    return float(np.mean(combined)), float(np.mean(stage_one)), float(np.mean(stage_two))
