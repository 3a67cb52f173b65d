"""What `pdms` and `epdms` share: preparing, driving, normalising, and the result record.

Shape legend: S scenes, P trajectories per scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.errors import InvalidSceneError
from autoscale_ray.evaluation.backends import choose_backend
from autoscale_ray.evaluation.combine import multiplier, normalised_progress, sub_scores, weighted_score
from autoscale_ray.evaluation.drive import drive
from autoscale_ray.evaluation.metrics import Measures, Rules
from autoscale_ray.evaluation.prepare import PreparedScene, prepare
from autoscale_ray.evaluation.scene import Floats, ScoringScene, check_trajectories

TRAFFIC = "non-reactive log replay"


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """Values (S, P) and which of them hold; a value where `valid` is False is NaN."""

    value: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreResult:
    """Scores of S x P trajectories.

    Fields:
        version: "v1" (PDMS) or "v2" (EPDMS).
        scene_ids: Names of the S scenes.
        raw: Sub-scores by NAVSIM's column names, before the human penalty filter.
        filtered: Sub-scores after it; the same as `raw` in v1 and where it does not apply.
        raw_score: Final score from `raw`, without extended comfort.
        score: Final score from `filtered`, without extended comfort (v2: weights 5, 5, 2, 2 over 14).
        extended_comfort: EC where a previous frame is known, v2 only; see `with_extended_comfort`.
        score_with_comfort: Final score with EC over 16 where EC is valid, else `score`.
        measures: Raw measures of the S * P trajectories, scene-major (progress in m, steps of infractions, flags).
        states: (S, P, 41, 11) driven states in the scenes' frames, or None.
        traffic: How other agents moved.
    """

    version: str
    scene_ids: tuple[str, ...]
    raw: dict[str, Metric]
    filtered: dict[str, Metric]
    raw_score: Metric
    score: Metric
    extended_comfort: Metric
    score_with_comfort: Metric
    measures: Measures
    states: Tensor | None
    traffic: str = TRAFFIC


def score_trajectories(
    scenes: Sequence[ScoringScene | PreparedScene],
    trajectories: Floats,
    rules: Rules,
    backend: str = "auto",
    device: str = "cpu",
    keep_states: bool = False,
) -> ScoreResult:
    """Score trajectories with one version of the rules; see `pdms` and `epdms`."""
    ids = tuple(
        scene.arena.scene_id if isinstance(scene, PreparedScene) else scene.scene_id for scene in scenes
    )
    trajectories = check_trajectories(ids, trajectories)
    prepared = _prepare_missing(scenes, rules, choose_backend(backend, device))
    states, measures = drive(prepared, trajectories, backend, device)
    shape = trajectories.shape[:2]
    raw = _columns(prepared, measures, shape, rules)
    filtered = _forgive(prepared, raw)
    score = _valid(weighted_score(filtered, rules))
    return ScoreResult(
        version=rules.version,
        scene_ids=ids,
        raw={name: _valid(value) for name, value in raw.items()},
        filtered={name: _valid(value) for name, value in filtered.items()},
        raw_score=_valid(weighted_score(raw, rules)),
        score=score,
        extended_comfort=Metric(torch.full_like(score.value, torch.nan), torch.zeros_like(score.valid)),
        score_with_comfort=score,
        measures=measures,
        states=_to_scene_frames(prepared, states, shape) if keep_states else None,
    )


def _prepare_missing(
    scenes: Sequence[ScoringScene | PreparedScene], rules: Rules, backend: str
) -> list[PreparedScene]:
    prepared = [
        scene if isinstance(scene, PreparedScene) else prepare(scene, rules, backend=backend)
        for scene in scenes
    ]
    if not prepared:
        raise InvalidSceneError("scenes", "must not be empty")
    for scene in prepared:
        if scene.rules != rules:
            raise InvalidSceneError(
                scene.arena.scene_id, f"must be prepared for {rules.version}", scene.rules.version
            )
        if scene.arena.vehicle != prepared[0].arena.vehicle:
            raise InvalidSceneError(
                scene.arena.scene_id, "must have the same vehicle as the other scenes of a call"
            )
    return prepared


def _columns(
    prepared: Sequence[PreparedScene], measures: Measures, shape: tuple[int, ...], rules: Rules
) -> dict[str, Tensor]:
    product = multiplier(measures, rules)
    reference = np.array([scene.reference_progress_m * scene.reference_multiplier for scene in prepared])
    reference_N = torch.as_tensor(reference, device=product.device).repeat_interleave(shape[1])
    longest_m = torch.maximum(reference_N, measures.progress_m * product)
    progress = normalised_progress(measures.progress_m, product, longest_m, rules)
    return {name: column.view(shape) for name, column in sub_scores(measures, progress, rules).items()}


def _forgive(prepared: Sequence[PreparedScene], raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set a sub-score to 1 where the human's own is exactly 0."""
    fails = np.array(
        [np.zeros(len(raw), bool) if scene.human_fails is None else scene.human_fails for scene in prepared]
    )
    columns = {}
    for index, (name, value) in enumerate(raw.items()):
        forgiven = torch.as_tensor(fails[:, index], device=value.device)[:, None]
        columns[name] = torch.where(forgiven, 1.0, value)
    return columns


def _to_scene_frames(prepared: Sequence[PreparedScene], states: Tensor, shape: tuple[int, ...]) -> Tensor:
    states = states.view(*shape, *states.shape[1:]).clone()
    origin = np.stack([scene.arena.origin for scene in prepared])
    states[..., :2] += torch.as_tensor(origin, device=states.device)[:, None, None]
    return states


def _valid(value: Tensor) -> Metric:
    return Metric(value, torch.ones_like(value, dtype=torch.bool))
