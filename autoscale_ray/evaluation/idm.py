"""PDM-Closed's proposals: intelligent-driver speeds along the centreline and its two parallels, in numpy.

Shape legend: L = 3 paths, P = 15 proposals (path-major, 5 speeds each), O obstacles, B = 21 forecasts (every 0.2 s),
C path vertices, T = 41 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autoscale_ray.evaluation.arena import Arena, path_progress
from autoscale_ray.evaluation.observation import FORECAST_STEP
from autoscale_ray.evaluation.planar import box_corners, polygon_distances, project, ring_centroid
from autoscale_ray.evaluation.scene import Flags, Floats, Integers
from autoscale_ray.evaluation.timing import NUM_STEPS, STEP_S

if TYPE_CHECKING:
    import shapely

LATERAL_OFFSETS_M = (0.0, -1.0, 1.0)
SPEED_FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
FALLBACK_SPEED_LIMIT_MPS = 15.0
UNROLLED_S = 5.0
MIN_GAP_M = 1.0
HEADWAY_S = 1.5
MAX_ACCELERATION = 1.5
MAX_DECELERATION = 3.0
SPEED_EXPONENT = 10
MIN_PROGRESS_M = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """The three paths: vertices (L, C, 3) with unwrapped yaw, arc lengths (L, C), ego progress (L,) at t = 0."""

    vertices: Floats
    progress: Floats
    start_m: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Obstacles:
    """What PDM-Closed may follow, in the order in which ties are resolved.

    Fields:
        corners: Per obstacle and forecast, (O,) list of (B, n, 2) vertices.
        yaw_rad: (O,), speed_mps: (O,) of moving agents, 0 otherwise.
        is_light: (O,) a red light, which leaves the leader's speed as it was.
        progress: (L, O, B) centroid's arc length on each path, m.
        in_corridor: (L, O, B) touches the path's corridor and did not touch the ego at t = 0.
    """

    corners: list[Floats]
    yaw_rad: Floats
    speed_mps: Floats
    is_light: Flags
    progress: Floats
    in_corridor: Flags


def make_paths(arena: Arena, centreline_yaw_C: Floats) -> Paths:
    """Shift the centreline by 0, -1 and +1 m to its left and project the ego's rear axle on each.

    Args:
        arena: The scene's arena.
        centreline_yaw_C: (C,) yaw at the centreline's vertices.

    Returns:
        The three paths.
    """
    left_C2 = np.stack([np.cos(centreline_yaw_C + np.pi / 2), np.sin(centreline_yaw_C + np.pi / 2)], axis=-1)
    yaw_C1 = np.unwrap(centreline_yaw_C)[:, None]
    vertices = np.stack(
        [np.hstack([arena.path_xy + left_C2 * offset, yaw_C1]) for offset in LATERAL_OFFSETS_M]
    )
    progress = np.stack([path_progress(path[:, :2]) for path in vertices])
    pairs = zip(vertices, progress, strict=True)
    start = np.array([project(arena.ego_state[None, :2], path[:, :2], along)[0] for path, along in pairs])
    return Paths(vertices, progress, start)


def find_obstacles(arena: Arena, paths: Paths, ignored_lights_R: Flags, limit_mps: float) -> Obstacles:
    """List the forecast objects and red lights with their place along each path.

    Args:
        arena: Arena of the forecast, red lights as at t = 0.
        paths: The three paths.
        ignored_lights_R: (R,) red lights the ego already stands in.
        limit_mps: Speed limit of the starting lane, or its fallback.

    Returns:
        The obstacles.
    """
    tracks = arena.tracks
    step_B = np.arange(0, NUM_STEPS, FORECAST_STEP)
    order_O = _tie_order(arena)
    corners = list(box_corners(tracks.boxes[order_O][:, step_B], tracks.half_sizes[order_O][:, None]))
    centroids = list(tracks.boxes[order_O][:, step_B, :2])
    for ring in arena.red_rings:
        vertices = arena.ring_xy[arena.ring_offsets[ring] : arena.ring_offsets[ring + 1]]
        corners.append(np.broadcast_to(vertices, (len(step_B), *vertices.shape)))
        centroids.append(np.broadcast_to(ring_centroid(vertices), (len(step_B), 2)))
    num_agents, num_lights = len(order_O), len(arena.red_rings)
    ignored_O = np.concatenate([tracks.is_ignored[order_O], ignored_lights_R])
    corridors = [
        _corridor(
            vertices[:, :2], along, start_m, start_m + limit_mps * UNROLLED_S, arena.vehicle.half_width_m
        )
        for vertices, along, start_m in zip(paths.vertices, paths.progress, paths.start_m, strict=True)
    ]
    progress, touches = _along_paths(
        paths, corridors, np.array(centroids), corners, arena.vehicle.half_width_m
    )
    return Obstacles(
        corners=corners,
        yaw_rad=np.concatenate([tracks.velocities[order_O, 0], np.zeros(num_lights)]),
        speed_mps=np.concatenate([tracks.velocities[order_O, 1], np.zeros(num_lights)]),
        is_light=np.arange(num_agents + num_lights) >= num_agents,
        progress=progress,
        in_corridor=touches & ~ignored_O[:, None],
    )


def unroll(arena: Arena, paths: Paths, obstacles: Obstacles, limit_mps: float) -> Floats:
    """Drive the 15 proposals with the intelligent driver model.

    a = 1.5 (1 - (v / v0)^10 - (s* / s)^2) in [-3, 1.5], s* = 1 + 1.5 v + v (v - v_lead) / (2 sqrt(1.5 * 3)), Euler
    with 0.1 s, the leader refreshed every second step (docs/scoring.md, PDM-Closed).

    Args:
        arena: Arena of the forecast.
        paths: The three paths.
        obstacles: Result of `find_obstacles`.
        limit_mps: Speed limit of the starting lane, or its fallback.

    Returns:
        (15, 41, 3) poses in the arena's frame.
    """
    num_speeds = len(SPEED_FRACTIONS)
    path_P = np.repeat(np.arange(len(paths.start_m)), num_speeds)
    target_P = np.tile(np.array(SPEED_FRACTIONS) * limit_mps, len(paths.start_m))
    progress_P, speed_P = paths.start_m[path_P], np.full(len(path_P), arena.ego_state[3])
    poses_TP3 = [interpolate_paths(paths, path_P, progress_P)]
    leader_P3 = np.zeros((len(path_P), 3))
    for step in range(1, NUM_STEPS):
        if step % FORECAST_STEP == 0:
            leader_P3 = _leaders(
                arena, paths, obstacles, path_P, progress_P, poses_TP3[-1], step // FORECAST_STEP
            )
        progress_P, speed_P = _advance(progress_P, speed_P, target_P, leader_P3)
        poses_TP3.append(interpolate_paths(paths, path_P, progress_P))
    return np.stack(poses_TP3, axis=1)


def interpolate_paths(paths: Paths, path_P: Integers, progress_P: Floats) -> Floats:
    """Return the poses (P, 3) at arc lengths on the chosen paths, yaw in (-pi, pi]."""
    poses_P3 = np.empty((len(path_P), 3))
    for index in range(len(paths.start_m)):
        chosen = path_P == index
        along, vertices = paths.progress[index], paths.vertices[index]
        at = np.clip(progress_P[chosen], MIN_PROGRESS_M, along[-1])
        right = np.clip(np.searchsorted(along, at), 1, len(along) - 1)
        slope = (vertices[right] - vertices[right - 1]) / (along[right] - along[right - 1])[:, None]
        poses_P3[chosen] = slope * (at - along[right - 1])[:, None] + vertices[right - 1]
    poses_P3[:, 2] = np.arctan2(np.sin(poses_P3[:, 2]), np.cos(poses_P3[:, 2]))
    return poses_P3


def _tie_order(arena: Arena) -> Integers:
    """Order agents as the forecast lists them: static first, then by type, each by distance to the ego centre."""
    tracks = arena.tracks
    chosen = np.flatnonzero(tracks.present[:, 0])
    distance = np.hypot(*(tracks.boxes[chosen, 0, :2] - arena.ego_box[:2]).T)
    group = np.where(tracks.is_static[chosen], -1, tracks.kinds[chosen])
    return chosen[np.lexsort((distance, group))]


def _along_paths(
    paths: Paths,
    corridors: list[shapely.Polygon],
    centroids_OB2: Floats,
    corners: list[Floats],
    half_width_m: float,
) -> tuple[Floats, Flags]:
    """Return arc length (L, O, B), where it matters, and contact with the corridor (L, O, B)."""
    shape = (len(corridors), len(corners), len(range(0, NUM_STEPS, FORECAST_STEP)))
    progress, touches = np.zeros(shape), np.zeros(shape, dtype=bool)
    if not corners:
        return progress, touches
    stands_O = (centroids_OB2 == centroids_OB2[:, :1]).all(axis=(1, 2))
    asked_OB = ~stands_O[:, None] | (np.arange(shape[2]) == 0)
    obstacle_K, forecast_K = asked_OB.nonzero()
    point_K2 = centroids_OB2[obstacle_K, forecast_K]
    pairs = zip(corners, centroids_OB2, strict=True)
    reach_O = np.array([np.hypot(*(ring[0] - centre[0]).T).max() for ring, centre in pairs])
    for index, (vertices, along) in enumerate(zip(paths.vertices, paths.progress, strict=True)):
        reach_K = reach_O[obstacle_K] + 1.5 * half_width_m
        near_K = _may_touch(point_K2, reach_K, vertices[:, :2], along, paths.start_m[index])
        chosen = obstacle_K[near_K], forecast_K[near_K]
        touches[index][chosen] = _meet(
            corridors[index], [corners[o][b] for o, b in zip(*chosen, strict=True)]
        )
        progress[index][chosen] = project(point_K2[near_K], vertices[:, :2], along)
    progress[:, stands_O], touches[:, stands_O] = progress[:, stands_O, :1], touches[:, stands_O, :1]
    return progress, touches


def _meet(corridor: shapely.Polygon, rings: list[Floats]) -> Flags:
    """Tell which rings share a point with the corridor."""
    if not rings:
        return np.zeros(0, dtype=bool)
    import shapely

    vertex_of = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    polygons = shapely.polygons(shapely.linearrings(np.concatenate(rings), indices=vertex_of))
    return np.asarray(shapely.intersects(corridor, polygons))


def _may_touch(
    point_K2: Floats, reach_K: Floats, vertices_C2: Floats, along_C: Floats, start_m: float
) -> Flags:
    """Tell which points may be within reach of the path ahead; half an edge is added to the distance to vertices."""
    edge_m = np.diff(along_C).max()
    ahead_C2 = vertices_C2[along_C >= min(start_m, along_C[-1]) - 1.01 * edge_m - 1e-6]
    squared_KC = (point_K2[:, :1] - ahead_C2[:, 0]) ** 2 + (point_K2[:, 1:] - ahead_C2[:, 1]) ** 2
    return np.sqrt(squared_KC.min(axis=1)) <= reach_K + edge_m / 2.0 + 1e-6


def _corridor(vertices_C2: Floats, along_C: Floats, start_m: float, end_m: float, half_width_m: float):
    import shapely
    import shapely.ops

    start, end = np.clip([start_m, end_m], 0.0, along_C[-1])
    inside = (start <= along_C) & (along_C <= end)
    if inside.sum() > 1:
        line = shapely.LineString(vertices_C2[inside])
    else:
        line = shapely.ops.substring(shapely.LineString(vertices_C2), start, end)
    corridor = shapely.buffer(line, half_width_m, cap_style="square")
    shapely.prepare(corridor)
    return corridor


def _leaders(
    arena: Arena,
    paths: Paths,
    obstacles: Obstacles,
    path_P: Integers,
    progress_P: Floats,
    poses_P3: Floats,
    forecast: int,
) -> Floats:
    """Return (P, 3) leader progress, speed and rear length."""
    ahead_PO = obstacles.in_corridor[path_P, :, forecast] & (
        obstacles.progress[path_P, :, forecast] > progress_P[:, None]
    )
    distance_PO = _gaps(arena, obstacles, poses_P3, ahead_PO, forecast)
    leaders_P3 = np.zeros((len(path_P), 3))
    leader = np.zeros(3)
    for proposal, path in enumerate(path_P):
        if proposal == 0 or path != path_P[proposal - 1]:
            # The official code reuses one row per path: stale entries are part of the rule.
            leader = np.zeros(3)
        if ahead_PO[proposal].any():
            nearest = _nearest(obstacles, distance_PO[proposal], forecast)
            leader[0] = progress_P[proposal] + distance_PO[proposal, nearest]
            if not obstacles.is_light[nearest]:
                leader[1] = obstacles.speed_mps[nearest] * np.cos(
                    obstacles.yaw_rad[nearest] - poses_P3[proposal, 2]
                )
        else:
            leader[0], leader[2] = paths.progress[path, -1], arena.vehicle.half_length_m
        leaders_P3[proposal] = leader
    return leaders_P3


def _nearest(obstacles: Obstacles, distance_O: Floats, forecast: int) -> int:
    nearest = np.flatnonzero(distance_O == distance_O.min())
    if len(nearest) == 1:
        return int(nearest[0])
    rank_O = tree_ranks(obstacles, forecast)
    return int(nearest[np.argmin(rank_O[nearest])])


def tree_ranks(obstacles: Obstacles, forecast: int) -> Integers:
    """Return the rank (O,) in which the official code's search tree lists obstacles; it decides between equals."""
    import shapely

    tree = shapely.STRtree([shapely.Polygon(vertices[forecast]) for vertices in obstacles.corners])
    listed = tree.query(shapely.box(-1e9, -1e9, 1e9, 1e9))
    rank_O = np.empty(len(obstacles.corners), dtype=np.int64)
    rank_O[listed] = np.arange(len(listed))
    return rank_O


def _gaps(arena: Arena, obstacles: Obstacles, poses_P3: Floats, ahead_PO: Flags, forecast: int) -> Floats:
    cos_P, sin_P = np.cos(poses_P3[:, 2]), np.sin(poses_P3[:, 2])
    axis_P2 = np.stack([cos_P, sin_P], axis=-1)
    centre_P2 = poses_P3[:, :2] + arena.vehicle.rear_axle_to_centre_m * axis_P2
    half = np.array([arena.vehicle.half_length_m, arena.vehicle.half_width_m])
    ego_P42 = box_corners(np.concatenate([centre_P2, axis_P2], axis=-1), half)
    gaps_PO = np.full(ahead_PO.shape, np.inf)
    for index in np.flatnonzero(ahead_PO.any(axis=0)):
        chosen = ahead_PO[:, index]
        gaps_PO[chosen, index] = polygon_distances(ego_P42[chosen], obstacles.corners[index][forecast])
    return gaps_PO


def _advance(
    progress_P: Floats, speed_P: Floats, target_P: Floats, leader_P3: Floats
) -> tuple[Floats, Floats]:
    comfort = 2.0 * np.sqrt(MAX_ACCELERATION * MAX_DECELERATION)
    wanted_P = MIN_GAP_M + speed_P * HEADWAY_S + speed_P * (speed_P - leader_P3[:, 1]) / comfort
    gap_P = np.maximum(leader_P3[:, 0] - progress_P - leader_P3[:, 2], MIN_GAP_M)
    free_P = 1.0 - (speed_P / target_P) ** SPEED_EXPONENT
    accel_P = np.clip(
        MAX_ACCELERATION * (free_P - (wanted_P / gap_P) ** 2), -MAX_DECELERATION, MAX_ACCELERATION
    )
    return progress_P + STEP_S * speed_P, speed_P + STEP_S * accel_P
