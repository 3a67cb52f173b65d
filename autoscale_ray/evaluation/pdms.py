"""PDMS, NAVSIM's first score (branch v1.1)."""

from __future__ import annotations

from collections.abc import Sequence

from autoscale_ray.evaluation.metrics import RULES_V1
from autoscale_ray.evaluation.prepare import PreparedScene
from autoscale_ray.evaluation.scene import Floats, ScoringScene
from autoscale_ray.evaluation.scoring import ScoreResult, score_trajectories


def pdms(
    scenes: Sequence[ScoringScene | PreparedScene],
    trajectories: Floats,
    *,
    backend: str = "auto",
    device: str = "cpu",
    keep_states: bool = False,
) -> ScoreResult:
    """Score trajectories by PDMS = NC DAC (5 EP + 5 TTC + 2 C) / 12.

    Rules: docs/scoring.md, column v1.

    Args:
        scenes: S scenes with 11 frames, or results of `prepare` with RULES_V1.
        trajectories: (S, P, 8, 3) every 0.5 s or (S, P, 40, 3) every 0.1 s: x, y in m, yaw in rad relative to the
            rear axle at t = 0.
        backend: "auto", "torch" or "numba".
        device: Device of the torch backend.
        keep_states: Also return the driven states.

    Returns:
        Sub-scores and scores (S, P) in [0, 1] with valid masks.

    Raises:
        InvalidSceneError: Naming the scene, field and rule.
        MissingExtraError: If backend "numba" is not installed.
    """
    return score_trajectories(scenes, trajectories, RULES_V1, backend, device, keep_states)
