"""The numba backend: arenas as kernel tables, trajectories driven and measured scene by scene on one thread.

Importing this module needs numba. Shape legend: N trajectories, n waypoints, T = 41.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from autoscale_ray.evaluation import kernels_score as kernels
from autoscale_ray.evaluation.arena import Arena
from autoscale_ray.evaluation.comfort import smoothing_matrix
from autoscale_ray.evaluation.idm import Obstacles, Paths, tree_ranks
from autoscale_ray.evaluation.kernels_geometry import chunk_path
from autoscale_ray.evaluation.kernels_grid import build_grid
from autoscale_ray.evaluation.kernels_idm import NUM_SPEEDS, unroll_proposals
from autoscale_ray.evaluation.kernels_score import ComfortFilters, Filter, SceneTables
from autoscale_ray.evaluation.kernels_track import simulate_one
from autoscale_ray.evaluation.metrics import Measures, Rules
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.simulate import speed_fit_matrix
from autoscale_ray.evaluation.timing import NUM_STEPS, TimeGrid
from autoscale_ray.evaluation.vehicle import VehicleParameters


def with_grid(arena: Arena) -> Arena:
    """Return the arena with the cell grid of its rings."""
    return replace(arena, grid=build_grid(arena.ring_offsets, arena.ring_xy, arena.ring_bounds))


def make_tables(arena: Arena) -> SceneTables:
    """Lay out an arena for the kernels; the tables share the arena's arrays, and its grid where it has one."""
    tracks = arena.tracks
    boxes, present = np.ascontiguousarray(tracks.boxes), np.ascontiguousarray(tracks.present)
    return SceneTables(
        boxes=boxes,
        present=present,
        half_sizes=np.ascontiguousarray(tracks.half_sizes),
        is_static=tracks.is_static,
        is_stopped=tracks.is_stopped,
        is_ignored=tracks.is_ignored,
        agent_bounds=kernels.agent_bounds(boxes, present),
        ring_offsets=arena.ring_offsets,
        ring_xy=np.ascontiguousarray(arena.ring_xy),
        ring_next=arena.ring_next,
        ring_kinds=arena.ring_kinds,
        ring_bounds=arena.ring_bounds,
        grid=arena.grid or build_grid(arena.ring_offsets, arena.ring_xy, arena.ring_bounds),
        red_rings=arena.red_rings,
        red_steps=np.ascontiguousarray(arena.red_steps),
        path_xy=np.ascontiguousarray(arena.path_xy),
        path_progress=arena.path_progress,
        path_circles=chunk_path(np.ascontiguousarray(arena.path_xy)),
        history=np.ascontiguousarray(arena.history),
        start=arena.ego_state,
        ego_pose=arena.ego_pose,
        vehicle=_sizes(arena.vehicle),
        speed_matrix=speed_fit_matrix(),
    )


def simulate_poses(poses_NT3: Floats, start_N11: Floats, vehicle: VehicleParameters) -> Floats:
    """Drive along reference poses (N, 41, 3) from states (N, 11); see `simulate`."""
    states = np.empty((len(poses_NT3), NUM_STEPS, 11))
    matrix = speed_fit_matrix()
    for poses, start, out in zip(
        np.ascontiguousarray(poses_NT3), np.ascontiguousarray(start_N11), states, strict=True
    ):
        simulate_one(poses, start, matrix, vehicle.wheel_base_m, out)
    return states


def measure_poses(tables: SceneTables, poses_NT3: Floats, rules: Rules) -> tuple[torch.Tensor, Measures]:
    """Drive along reference poses and measure, in the arena's frame; see `backends.drive_in_arena`.

    Args:
        tables: The scene.
        poses_NT3: (N, 41, 3) reference poses.
        rules: RULES_V1 or RULES_V2.

    Returns:
        States (N, 41, 11) and measures.
    """
    outputs, is_v2 = _empty_outputs(len(poses_NT3)), rules.version == "v2"
    without_past = tables._replace(history=tables.history[:0])
    arguments = (without_past, comfort_filters(rules.version, 0), is_v2, rules.num_ttc_steps, not is_v2)
    kernels.score_poses(np.ascontiguousarray(poses_NT3), *arguments, *outputs)
    return _to_measures(*outputs)


def measure_waypoints(
    scenes: Sequence[tuple[SceneTables, TimeGrid]], waypoints_SPn3: Floats, rules: Rules
) -> tuple[torch.Tensor, Measures]:
    """Drive and measure P trajectories in each of S scenes.

    Args:
        scenes: Tables and time nodes of S scenes.
        waypoints_SPn3: (S, P, n, 3) relative waypoints.
        rules: RULES_V1 or RULES_V2.

    Returns:
        States (S * P, 41, 11) and measures.
    """
    num_scenes, num_proposals = waypoints_SPn3.shape[:2]
    outputs = _empty_outputs(num_scenes * num_proposals)
    waypoints = np.ascontiguousarray(waypoints_SPn3)
    is_v2 = rules.version == "v2"
    for row, (tables, grid) in enumerate(scenes):
        table = tables if is_v2 else tables._replace(history=tables.history[:0])
        filters = comfort_filters(rules.version, len(tables.history))
        part = slice(row * num_proposals, (row + 1) * num_proposals)
        arguments = (grid.left, grid.share, table, filters, is_v2, rules.num_ttc_steps)
        kernels.score_waypoints(waypoints[row], *arguments, *(output[part] for output in outputs))
    return _to_measures(*outputs)


def unroll(arena: Arena, paths: Paths, obstacles: Obstacles, limit_mps: float) -> Floats:
    """Drive PDM-Closed's 15 proposals; see `idm.unroll`.

    Args:
        arena: Arena of the forecast.
        paths: The three paths.
        obstacles: Result of `idm.find_obstacles`.
        limit_mps: Speed limit.

    Returns:
        (15, 41, 3) poses.
    """
    counts = [ring.shape[1] for ring in obstacles.corners]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    num_forecasts = obstacles.progress.shape[2]
    vertices = np.concatenate([*obstacles.corners, np.zeros((num_forecasts, 0, 2))], axis=1)
    vehicle = _sizes(arena.vehicle)
    poses = np.empty((len(paths.start_m) * NUM_SPEEDS, NUM_STEPS, 3))
    fixed = (
        paths.vertices,
        paths.progress,
        paths.start_m,
        arena.ego_state[3],
        float(limit_mps),
        vehicle,
        offsets,
        vertices,
    )
    moving = (
        obstacles.yaw_rad,
        obstacles.speed_mps,
        obstacles.is_light,
        obstacles.progress,
        obstacles.in_corridor,
    )
    if not unroll_proposals(*fixed, *moving, np.zeros((0, 0), dtype=np.int64), poses):
        ranks = np.stack([tree_ranks(obstacles, forecast) for forecast in range(num_forecasts)])
        unroll_proposals(*fixed, *moving, ranks, poses)
    return poses


def _sizes(vehicle: VehicleParameters) -> Floats:
    """Return half length, half width, rear axle to centre, wheel base."""
    return np.array(
        [vehicle.half_length_m, vehicle.half_width_m, vehicle.rear_axle_to_centre_m, vehicle.wheel_base_m]
    )


@lru_cache(maxsize=64)
def comfort_filters(version: str, num_past: int) -> ComfortFilters:
    """Return the comfort filters of one version for a past of `num_past` samples (v2 only)."""
    size = NUM_STEPS if version == "v1" else NUM_STEPS + num_past
    accel_window, jerk_window = (size, size) if version == "v1" else (8, 15)
    shapes = ((accel_window, 2, 0), (8, 2, 0), (jerk_window, 2, 1), (5, 3, 2), (5, 2, 1))
    return ComfortFilters(*(_band(smoothing_matrix(size, *shape), min(shape[0], size)) for shape in shapes))


def _band(matrix: np.ndarray, window: int) -> Filter:
    """Keep the `window` columns of each row that hold its weights."""
    size = len(matrix)
    used = np.abs(matrix) > 0.0
    first = np.argmax(used, axis=1)
    starts = np.minimum(first, size - window)
    columns = starts[:, None] + np.arange(window)
    weights = np.take_along_axis(matrix, columns, axis=1)
    assert np.isclose(weights.sum(), matrix.sum()), "a filter is wider than its window"
    return Filter(starts.astype(np.int64), np.ascontiguousarray(weights))


def _empty_outputs(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    states, values = np.empty((size, NUM_STEPS, 11)), np.empty((size, kernels.NUM_VALUES))
    return states, values, np.empty((size, 6), dtype=np.bool_), np.empty((size, NUM_STEPS, 3), dtype=np.bool_)


def _to_measures(
    states: np.ndarray, values: np.ndarray, flags: np.ndarray, areas: np.ndarray
) -> tuple[torch.Tensor, Measures]:
    column = torch.as_tensor(values).unbind(1)
    measures = Measures(
        no_at_fault_collisions=column[kernels.NC],
        drivable_area=column[kernels.DAC],
        driving_direction=column[kernels.DDC],
        traffic_light=column[kernels.TLC],
        time_to_collision=column[kernels.TTC],
        lane_keeping=column[kernels.LK],
        comfort=column[kernels.COMFORT],
        progress_m=column[kernels.PROGRESS],
        collision_step=column[kernels.COLLISION_STEP],
        ttc_step=column[kernels.TTC_STEP],
        comfort_flags=torch.as_tensor(flags),
        ego_areas=torch.as_tensor(areas),
    )
    return torch.as_tensor(states), measures
