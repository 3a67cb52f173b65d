"""The scored trajectories of one scene, whatever file the scene came from, and extended comfort between two of them.

Shape legend: P trajectories per scene, n waypoints (8 or 40).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from autoscale_ray.evaluation.aggregate import EXTENDED_COMFORT
from autoscale_ray.evaluation.combine import COLUMNS_V2, weighted_score
from autoscale_ray.evaluation.epdms import MAX_INTERVAL_S, epdms, two_frame_extended_comfort
from autoscale_ray.evaluation.metrics import RULES_V2
from autoscale_ray.evaluation.pdms import pdms
from autoscale_ray.evaluation.prepare import PreparedScene
from autoscale_ray.evaluation.scene import Floats, ScoringScene
from autoscale_ray.evaluation.scoring import ScoreResult

SCORERS = {"v1": pdms, "v2": epdms}
SCORE_WITH_COMFORT = "score_with_comfort"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneScore:
    """The trajectories of one scene, scored by one version; small, for a file may hold very many."""

    version: str
    token: str
    """Name of the scene: the scene_id of a pool, NAVSIM's token."""
    log_name: str
    is_synthetic: bool
    start_us: int
    start_point: Floats
    """(2,) rear axle at 0 s, map."""
    endpoint: Floats
    """(2,) last pose of the first trajectory as the planner gave it, map."""
    columns: Mapping[str, Floats]
    """(P,) by the names of the table's columns; NaN where extended comfort is not known."""
    states: Floats | None
    """(41, 11) drive of the first trajectory, which extended comfort needs; None for v1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscored:
    """The trajectories of one scene that could not be scored."""

    token: str
    reason: str
    version: str | None = None
    """None where nobody knows for which version the scene was made."""


def score_scene(
    scene: ScoringScene | PreparedScene,
    waypoints: Floats,
    version: str,
    *,
    log_name: str,
    is_synthetic: bool,
    start_us: int,
    pose: Floats,
) -> SceneScore:
    """Score the trajectories of one scene.

    Args:
        scene: Any scene, or one prepared for this version.
        waypoints: (P, n, 3) relative trajectories.
        version: "v1" or "v2".
        log_name: Recording that the scene was cut from.
        is_synthetic: Whether it was made, not recorded.
        start_us: Time of 0 s in the recording.
        pose: Map pose of the rear axle at 0 s: x, y, yaw.

    Raises:
        InvalidSceneError: The scene or the trajectories break a rule.
    """
    result = SCORERS[version]([scene], np.asarray(waypoints)[None], keep_states=version == "v2")
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    return SceneScore(
        version=version,
        token=result.scene_ids[0],
        log_name=log_name,
        is_synthetic=is_synthetic,
        start_us=start_us,
        start_point=pose[:2],
        endpoint=pose[:2] + np.array([[cos, -sin], [sin, cos]]) @ np.asarray(waypoints)[0, -1, :2],
        columns=_columns(result),
        states=None if result.states is None else result.states[0, 0].numpy().copy(),
    )


def pairs_in_time(scored: Sequence[SceneScore]) -> list[tuple[SceneScore, SceneScore]]:
    """Return v2 scenes with the one before, as NAVSIM's one-stage score pairs them.

    Original scenes only: the scene before in time of the same log, less than 0.55 s earlier.
    """
    order = sorted(
        (frame for frame in scored if frame.version == "v2" and not frame.is_synthetic),
        key=lambda frame: (frame.log_name, frame.start_us),
    )
    return [
        (before, now)
        for before, now in itertools.pairwise(order)
        if before.log_name == now.log_name and 0 < now.start_us - before.start_us < MAX_INTERVAL_S * 1e6
    ]


def with_comfort(
    scored: Sequence[SceneScore], pairs: Sequence[tuple[SceneScore, SceneScore]]
) -> list[SceneScore]:
    """Add extended comfort where a scene and the one before have one trajectory each.

    Args:
        scored: Scenes of any version.
        pairs: v2 scenes of `scored`, the one before first, less than 0.55 s apart.

    Returns:
        `scored`, in order.
    """
    single = [pair for pair in pairs if all(len(frame.columns["score"]) == 1 for frame in pair)]
    if not single:
        return list(scored)
    before, now = ([pair[side] for pair in single] for side in (0, 1))
    interval_s = np.array([frame.start_us - first.start_us for first, frame in single]) / 1e6
    comfort = two_frame_extended_comfort(stacked_states(now), stacked_states(before), interval_s).value
    columns = {
        name: np.concatenate([frame.columns[f"filtered_{name}"] for frame in now]) for name in COLUMNS_V2
    }
    score = weighted_score(
        {name: torch.as_tensor(value) for name, value in columns.items()}, RULES_V2, comfort
    )
    added = zip(now, comfort.numpy()[:, None], score.numpy()[:, None], strict=True)
    found = {
        id(frame): {**frame.columns, EXTENDED_COMFORT: one, SCORE_WITH_COMFORT: other}
        for frame, one, other in added
    }
    return [replace(frame, columns=found.get(id(frame), frame.columns)) for frame in scored]


def stacked_states(scored: Sequence[SceneScore]) -> torch.Tensor:
    """Return the drives (N, 41, 11) of the first trajectories of v2 scenes."""
    return torch.from_numpy(np.stack([frame.states for frame in scored if frame.states is not None]))


def _columns(result: ScoreResult) -> dict[str, Floats]:
    """Return the scores (P,) of one scene."""
    metrics = {f"raw_{name}": metric for name, metric in result.raw.items()}
    metrics |= {f"filtered_{name}": metric for name, metric in result.filtered.items()}
    metrics |= {"raw_score": result.raw_score, "score": result.score}
    metrics |= {EXTENDED_COMFORT: result.extended_comfort, SCORE_WITH_COMFORT: result.score_with_comfort}
    return {name: metric.value[0].numpy().copy() for name, metric in metrics.items()}
