"""Everything about a scene that does not depend on the planner's trajectory, computed once and picklable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from autoscale_ray.errors import InvalidSceneError
from autoscale_ray.evaluation.arena import Arena, build_arena
from autoscale_ray.evaluation.backends import choose_backend, drive_in_arena
from autoscale_ray.evaluation.combine import multiplier, sub_scores
from autoscale_ray.evaluation.metrics import Rules
from autoscale_ray.evaluation.pdm_closed import ReferenceDrive, choose_reference, touches_ego
from autoscale_ray.evaluation.scene import Flags, Floats, ScoringScene, validate_scene
from autoscale_ray.evaluation.simulate import interpolate
from autoscale_ray.evaluation.timing import NUM_STEPS, TimeGrid, waypoint_grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedScene:
    """A scene ready to score any number of trajectories with one version of the score.

    Fields:
        arena: Geometry, tracks and history.
        rules: Which version.
        grids: Time nodes for 8 and 40 waypoints.
        reference_poses: (41, 3) PDM-Closed in the arena's frame.
        reference: PDM-Closed's proposals and scores, None where the poses were given.
        reference_progress_m: Raw progress of the simulated reference.
        reference_multiplier: Its product of multiplicative sub-scores.
        human_fails: (8,) sub-scores at exactly 0 for the human, None where the filter does not apply.
    """

    arena: Arena
    rules: Rules
    grids: dict[int, TimeGrid]
    reference_poses: Floats
    reference: ReferenceDrive | None
    reference_progress_m: float
    reference_multiplier: float
    human_fails: Flags | None


def prepare(
    scene: ScoringScene, rules: Rules, reference_poses: Floats | None = None, backend: str = "auto"
) -> PreparedScene:
    """Prepare one scene: check it, replay tracks, run PDM-Closed, drive the human.

    Args:
        scene: Any scene.
        rules: RULES_V1 or RULES_V2.
        reference_poses: (41, 3) PDM-Closed poses every 0.1 s in the scene's frame; None runs PDM-Closed.
        backend: "auto", "torch" or "numba".

    Returns:
        The prepared scene.

    Raises:
        InvalidSceneError: If the scene or the reference breaks a rule, or there are too few frames for this version.
    """
    validate_scene(scene)
    if scene.num_frames < rules.num_frames:
        raise InvalidSceneError(
            f"{scene.scene_id}: agent_states",
            f"must have {rules.num_frames} frames for {rules.version}",
            scene.num_frames,
        )
    return prepare_arena(scene, build_arena(scene, rules.num_frames), rules, reference_poses, backend)


def prepare_arena(
    scene: ScoringScene,
    arena: Arena,
    rules: Rules,
    reference_poses: Floats | None = None,
    backend: str = "auto",
) -> PreparedScene:
    """Prepare a scene whose arena is known; see `prepare`.

    Args:
        scene: Gives times, the human's future and, without `reference_poses`, what PDM-Closed needs.
        arena: Tracks, rings and lights, whose origin is the ego's rear axle at t = 0.
        rules: RULES_V1 or RULES_V2.
        reference_poses: (41, 3) PDM-Closed poses every 0.1 s in the scene's frame; None runs PDM-Closed.
        backend: "auto", "torch" or "numba".
    """
    backend = choose_backend(backend)
    if reference_poses is not None:
        shape = np.shape(reference_poses)
        if shape != (NUM_STEPS, 3) or not np.isfinite(reference_poses).all():
            rule = f"must be ({NUM_STEPS}, 3) and finite"
            raise InvalidSceneError(f"{scene.scene_id}: reference_poses", rule, shape)
    if backend == "numba":
        from autoscale_ray.evaluation.compiled import with_grid

        arena = with_grid(arena)
    reference = choose_reference(scene, arena, rules, backend) if reference_poses is None else None
    arena = _without_overlaps(arena, rules)
    poses = reference.poses if reference is not None else np.asarray(reference_poses, dtype=np.float64)
    poses = poses - np.append(arena.origin, 0.0)
    start_us = int(scene.ego_history_times_us[-1])
    prepared = PreparedScene(
        arena=arena,
        rules=rules,
        grids={count: waypoint_grid(start_us, count) for count in (8, 40)},
        reference_poses=poses,
        reference=reference,
        reference_progress_m=0.0,
        reference_multiplier=0.0,
        human_fails=None,
    )
    return _with_companions(prepared, scene, backend)


def prepare_all(
    scenes: Sequence[ScoringScene],
    rules: Rules,
    reference_poses: Sequence[Floats] | Floats | None = None,
    backend: str = "auto",
) -> list[PreparedScene]:
    """Prepare several scenes; `reference_poses` holds (41, 3) for each of them or is None."""
    references = [None] * len(scenes) if reference_poses is None else list(reference_poses)
    return [
        prepare(scene, rules, reference, backend) for scene, reference in zip(scenes, references, strict=True)
    ]


def _without_overlaps(arena: Arena, rules: Rules) -> Arena:
    if rules.version == "v1":
        return arena
    kept_A = ~touches_ego(arena, arena.tracks)  # log replay removes what overlaps the ego at t = 0
    return replace(arena, tracks=replace(arena.tracks, present=arena.tracks.present & kept_A[:, None]))


def _with_companions(prepared: PreparedScene, scene: ScoringScene, backend: str) -> PreparedScene:
    """Drive the reference and, where the filter applies, the human, and keep what later scoring needs of them."""
    rules, arena = prepared.rules, prepared.arena
    poses = [prepared.reference_poses]
    filtered = rules.version == "v2" and not scene.is_synthetic and scene.human_poses is not None
    if filtered:
        poses.append(human_reference(prepared, scene))
    _, measures = drive_in_arena(arena, np.stack(poses), rules, backend)
    product = multiplier(measures, rules)
    columns = sub_scores(measures, torch.ones_like(product), rules)
    return replace(
        prepared,
        reference_progress_m=float(measures.progress_m[0]),
        reference_multiplier=float(product[0]),
        human_fails=np.array([float(column[1]) == 0.0 for column in columns.values()]) if filtered else None,
    )


def human_reference(prepared: PreparedScene, scene: ScoringScene) -> Floats:
    """Return the human's (41, 3) reference poses in the arena's frame."""
    grid = prepared.grids[8]
    waypoints = torch.as_tensor(scene.human_poses)[None]
    ego_pose = torch.as_tensor(prepared.arena.ego_pose)[None]
    poses = interpolate(
        waypoints, ego_pose, torch.as_tensor(grid.left)[None], torch.as_tensor(grid.share)[None]
    )
    return poses[0].numpy() - np.append(prepared.arena.origin, 0.0)
