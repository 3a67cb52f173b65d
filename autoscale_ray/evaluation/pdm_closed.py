"""The PDM-Closed reference drive that ego progress is normalised with.

Shape legend: P = 15 proposals, T = 41 steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from autoscale_ray.evaluation.arena import Arena, build_arena
from autoscale_ray.evaluation.backends import choose_backend, drive_in_arena
from autoscale_ray.evaluation.combine import group_scores
from autoscale_ray.evaluation.geometry import boxes_overlap
from autoscale_ray.evaluation.idm import FALLBACK_SPEED_LIMIT_MPS, find_obstacles, make_paths, unroll
from autoscale_ray.evaluation.metrics import RULES_V2, Rules
from autoscale_ray.evaluation.observation import Tracks, forecast_tracks
from autoscale_ray.evaluation.planar import box_corners, contains, edges_cross
from autoscale_ray.evaluation.scene import Flags, Floats, ScoringScene
from autoscale_ray.evaluation.simulate import resample_one
from autoscale_ray.evaluation.timing import step_grid

NUM_FORECAST_STEPS = 51


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceDrive:
    """PDM-Closed's choice for one scene.

    Fields:
        proposals: (15, 41, 3) poses of all proposals in the scene's frame; paths 0, -1, +1 m, 5 speeds each.
        scores: (15,) their scores.
        chosen: Index of the first best one.
        poses: (41, 3) the chosen one sampled at the scorer's time nodes, in the scene's frame.
    """

    proposals: Floats
    scores: Floats
    chosen: int
    poses: Floats


def pdm_closed(scene: ScoringScene, rules: Rules = RULES_V2, backend: str = "auto") -> ReferenceDrive:
    """Run PDM-Closed on one scene.

    Args:
        scene: A valid scene.
        rules: RULES_V1 or RULES_V2: each version scores the proposals with its own metrics.
        backend: "auto", "torch" or "numba".

    Returns:
        The reference drive.
    """
    return choose_reference(scene, build_arena(scene, rules.num_frames), rules, backend)


def choose_reference(scene: ScoringScene, arena: Arena, rules: Rules, backend: str) -> ReferenceDrive:
    """Run PDM-Closed on one scene whose arena is known; see `pdm_closed`."""
    forecast = forecast_arena(scene, arena)
    poses_PT3 = propose(scene, forecast, backend)
    _, measures = drive_in_arena(forecast, poses_PT3, rules, backend)
    scores_P = group_scores(measures, rules).numpy()
    chosen = int(np.argmax(scores_P))
    sampled_T3 = resample_one(poses_PT3[chosen], step_grid(int(scene.ego_history_times_us[-1])))
    shift = np.append(arena.origin, 0.0)
    return ReferenceDrive(
        proposals=poses_PT3 + shift, scores=scores_P, chosen=chosen, poses=sampled_T3 + shift
    )


def propose(scene: ScoringScene, arena: Arena, backend: str) -> Floats:
    """Unroll the 15 proposals.

    Args:
        scene: A valid scene.
        arena: Its forecast arena.
        backend: "auto", "torch" or "numba".

    Returns:
        (15, 41, 3) poses in the arena's frame.
    """
    limit_mps = FALLBACK_SPEED_LIMIT_MPS if scene.speed_limit_mps is None else scene.speed_limit_mps
    paths = make_paths(arena, scene.centreline[:, 2])
    obstacles = find_obstacles(arena, paths, lights_around_ego(arena), limit_mps)
    if choose_backend(backend) == "numba":
        from autoscale_ray.evaluation import compiled

        return compiled.unroll(arena, paths, obstacles, limit_mps)
    return unroll(arena, paths, obstacles, limit_mps)


def forecast_arena(scene: ScoringScene, arena: Arena) -> Arena:
    """Replace replayed tracks by PDM-Closed's forecast and freeze the lights of t = 0.

    Objects that touch the ego at t = 0 stay, but never count as collisions.

    Args:
        scene: A valid scene.
        arena: Its arena.

    Returns:
        The forecast arena over 51 steps.
    """
    tracks = forecast_tracks(scene, arena.origin, arena.ego_box[:2], NUM_FORECAST_STEPS)
    red_rings = np.flatnonzero(scene.polygon_red[:, 0] & scene.polygon_on_route)
    return replace(
        arena,
        tracks=replace(tracks, is_ignored=touches_ego(arena, tracks)),
        red_rings=red_rings,
        red_steps=np.ones((len(red_rings), arena.red_steps.shape[1]), dtype=bool),
    )


def touches_ego(arena: Arena, tracks: Tracks) -> Flags:
    """Tell which agents (A,) touch the ego at t = 0."""
    box = torch.as_tensor(arena.ego_box)
    half = box.new_tensor([arena.vehicle.half_length_m, arena.vehicle.half_width_m])
    boxes_A4 = torch.as_tensor(tracks.boxes[:, 0])
    overlap_A = boxes_overlap(
        boxes_A4[:, :2] - box[:2], box[2:], half, boxes_A4[:, 2:], torch.as_tensor(tracks.half_sizes)
    )
    return overlap_A.numpy() & tracks.present[:, 0]


def lights_around_ego(arena: Arena) -> Flags:
    """Tell which red rings (R,) hold the whole ego at t = 0."""
    half = np.array([arena.vehicle.half_length_m, arena.vehicle.half_width_m])
    corners_42 = box_corners(arena.ego_box, half)
    rings = [
        arena.ring_xy[arena.ring_offsets[ring] : arena.ring_offsets[ring + 1]] for ring in arena.red_rings
    ]
    holds = [
        contains(ring, corners_42).all() and not edges_cross(corners_42[None], ring)[0] for ring in rings
    ]
    return np.array(holds, dtype=bool)
