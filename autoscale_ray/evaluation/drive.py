"""Drive and measure batches of trajectories with a chosen backend.

Shape legend: S scenes, P trajectories per scene, N = S * P, n waypoints (8 or 40), T = 41.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from autoscale_ray.evaluation.arena import ArenaBatch, stack_arenas
from autoscale_ray.evaluation.backends import choose_backend
from autoscale_ray.evaluation.metrics import Measures, measure
from autoscale_ray.evaluation.prepare import PreparedScene
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.simulate import interpolate, simulate

CHUNK_TRAJECTORIES = 256
CHUNK_SCENES = 64


Drives = tuple[Tensor, Measures]
"""Driven states (N, 41, 11) in the arenas' frames and their measures, scene-major."""


def drive(prepared: Sequence[PreparedScene], trajectories: Floats, backend: str, device: str) -> Drives:
    """Interpolate, simulate and measure trajectories.

    Args:
        prepared: S scenes prepared with the same rules and vehicle.
        trajectories: (S, P, 8 or 40, 3) relative waypoints.
        backend: "auto" (numba on the CPU where it is installed, else torch), "torch" or "numba".
        device: Device of the torch backend.

    Returns:
        The drives of all S * P trajectories.

    Raises:
        MissingExtraError: If "numba" is asked for and not installed.
    """
    return BACKENDS[choose_backend(backend, device)](prepared, trajectories, device)


def _drive_with_numba(prepared: Sequence[PreparedScene], trajectories: Floats, device: str) -> Drives:
    from autoscale_ray.evaluation.compiled import make_tables, measure_waypoints

    num_waypoints = trajectories.shape[2]
    scenes = [(make_tables(scene.arena), scene.grids[num_waypoints]) for scene in prepared]
    return measure_waypoints(scenes, trajectories, prepared[0].rules)


def _drive_with_torch(prepared: Sequence[PreparedScene], trajectories: Floats, device: str) -> Drives:
    num_scenes, num_proposals = trajectories.shape[:2]
    scenes_per_chunk = max(1, min(CHUNK_SCENES, CHUNK_TRAJECTORIES // max(1, num_proposals)))
    parts = []
    for first in range(0, num_scenes, scenes_per_chunk):
        chosen = prepared[first : first + scenes_per_chunk]
        arenas = stack_arenas([scene.arena for scene in chosen], device)
        for start in range(0, num_proposals, CHUNK_TRAJECTORIES):
            rows = trajectories[first : first + scenes_per_chunk, start : start + CHUNK_TRAJECTORIES]
            parts.append(_drive_chunk(chosen, rows, arenas, device))
    return _join(parts)


def _drive_chunk(prepared: Sequence[PreparedScene], rows: Floats, arenas: ArenaBatch, device: str) -> Drives:
    num_proposals, num_waypoints = rows.shape[1:3]
    scene_N = torch.arange(len(prepared), device=device).repeat_interleave(num_proposals)
    grids = [scene.grids[num_waypoints] for scene in prepared]
    left_ST = torch.stack([torch.as_tensor(grid.left) for grid in grids]).to(device)
    share_ST = torch.stack([torch.as_tensor(grid.share) for grid in grids]).to(device)
    start_S11 = torch.stack([torch.as_tensor(scene.arena.ego_state) for scene in prepared]).to(device)
    pose_S3 = torch.stack([torch.as_tensor(scene.arena.ego_pose) for scene in prepared]).to(device)
    waypoints_Nn3 = torch.as_tensor(rows, device=device).flatten(0, 1)
    poses_NT3 = interpolate(waypoints_Nn3, pose_S3[scene_N], left_ST[scene_N], share_ST[scene_N])
    poses_NT3[..., :2] -= pose_S3[scene_N, None, :2]
    states_NT11 = simulate(poses_NT3, start_S11[scene_N], arenas.vehicle)
    return states_NT11, measure(states_NT11, scene_N, arenas, prepared[0].rules, with_history=True)


def _join(parts: list[Drives]) -> Drives:
    states, measures = zip(*parts, strict=True)
    columns = {
        item.name: torch.cat([getattr(one, item.name) for one in measures]) for item in fields(Measures)
    }
    return torch.cat(states), Measures(**columns)


BACKENDS: dict[str, Callable[[Sequence[PreparedScene], Floats, str], Drives]] = {
    "torch": _drive_with_torch,
    "numba": _drive_with_numba,
}
