"""`Arena`: one scene made ready for scoring, and `ArenaBatch`, several of them padded into tensors.

Shape legend: S scenes, A agents, T 10 Hz steps, G rings, V ring vertices, R red rings, C centreline vertices,
H history samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from autoscale_ray.evaluation.kernels_grid import RingGrid

from autoscale_ray.evaluation.observation import Tracks, red_light_steps, replay_tracks
from autoscale_ray.evaluation.scene import (
    DRIVABLE_LAYERS,
    INTERSECTION,
    LANE,
    LANE_CONNECTOR,
    NUM_HISTORY_FRAMES,
    Flags,
    Floats,
    Integers,
    ScoringScene,
)
from autoscale_ray.evaluation.timing import NUM_STEPS, history_samples
from autoscale_ray.evaluation.vehicle import VehicleParameters

IS_LANE, IS_DRIVABLE, IS_ROUTE_LANE, IS_INTERSECTION = 1, 2, 4, 8
PADDING = {
    "boxes": 0.0,
    "present": False,
    "half_sizes": 0.0,
    "is_static": False,
    "is_stopped": False,
    "is_ignored": True,
}
JOINED = ("ring_xy", "ring_bounds", "ring_kinds", "red_steps")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arena:
    """What the metrics read; positions in m relative to `origin`, axes as in the scene.

    Fields:
        scene_id: The scene's name.
        origin: (2,) the ego's rear axle at t = 0 in the scene's frame.
        ego_state: (11,) state at t = 0 (see `simulate`).
        tracks: Agents over 10 Hz steps.
        ring_offsets: (G + 1,) start of each ring.
        ring_xy: (V, 2) vertices.
        ring_next: (V,) index of the next vertex of the same ring.
        ring_bounds: (G, 4) x min, y min, x max, y max.
        ring_kinds: (G,) bits IS_LANE, IS_DRIVABLE, IS_ROUTE_LANE, IS_INTERSECTION.
        red_rings: (R,) rings that are red at some step.
        red_steps: (R, T) when.
        path_xy: (C, 2) centreline.
        path_progress: (C,) arc length at the vertices.
        history: (H, 7) past states at 10 Hz, possibly empty.
        vehicle: The ego vehicle.
        grid: Cell grid of the rings for the compiled backend, None for torch.
    """

    scene_id: str
    origin: Floats
    ego_state: Floats
    tracks: Tracks
    ring_offsets: Integers
    ring_xy: Floats
    ring_next: Integers
    ring_bounds: Floats
    ring_kinds: Integers
    red_rings: Integers
    red_steps: Flags
    path_xy: Floats
    path_progress: Floats
    history: Floats
    vehicle: VehicleParameters
    grid: RingGrid | None = None

    @property
    def ego_pose(self) -> Floats:
        """Return the rear axle (3,) at t = 0 in the scene's frame."""
        return np.append(self.origin, self.ego_state[2])

    @property
    def ego_box(self) -> Floats:
        """Return the ego's box at t = 0: centre x, y and cos, sin of the yaw."""
        axis = np.array([np.cos(self.ego_state[2]), np.sin(self.ego_state[2])])
        return np.concatenate([self.ego_state[:2] + self.vehicle.rear_axle_to_centre_m * axis, axis])


def build_arena(scene: ScoringScene, num_frames: int) -> Arena:
    """Turn a valid scene into its arena of logged tracks.

    Args:
        scene: A valid scene.
        num_frames: 2 Hz frames used: 9 (v2) or 11 (v1).

    Returns:
        The arena, with positions relative to the ego's rear axle at t = 0.
    """
    times_us = scene.ego_history_times_us[-NUM_HISTORY_FRAMES:]
    history_H7 = scene.ego_history_states[-NUM_HISTORY_FRAMES:].copy()
    origin = history_H7[-1, :2].copy()
    history_H7[:, :2] -= origin
    ring_xy = scene.polygon_xy - origin
    red_rings, red_steps = red_light_steps(scene, NUM_STEPS)
    path_xy = scene.centreline[:, :2] - origin
    return Arena(
        scene_id=scene.scene_id,
        origin=origin,
        ego_state=np.concatenate([history_H7[-1], np.zeros(4)]),
        tracks=replay_tracks(scene, origin, num_frames),
        ring_offsets=scene.polygon_offsets,
        ring_xy=ring_xy,
        ring_next=_next_vertices(scene.polygon_offsets),
        ring_bounds=_ring_bounds(scene.polygon_offsets, ring_xy),
        ring_kinds=_ring_kinds(scene),
        red_rings=red_rings,
        red_steps=red_steps,
        path_xy=path_xy,
        path_progress=path_progress(path_xy),
        history=history_samples(times_us, history_H7),
        vehicle=scene.vehicle,
    )


def path_progress(path_xy: Floats) -> Floats:
    """Return the arc length at each vertex of a (C, 2) polyline, m."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path_xy, axis=0).T))])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArenaBatch:
    """Arenas of S scenes on one device: agents and paths padded, rings concatenated.

    Fields follow `Arena` with a leading S; ring indices count over the whole batch, and `rings_of_scene` (S, Gmax)
    lists them with -1 as padding.
    """

    boxes: Tensor
    present: Tensor
    half_sizes: Tensor
    is_static: Tensor
    is_stopped: Tensor
    is_ignored: Tensor
    ring_offsets: Tensor
    ring_xy: Tensor
    ring_next: Tensor
    ring_bounds: Tensor
    ring_kinds: Tensor
    rings_of_scene: Tensor
    red_scene: Tensor
    red_ring: Tensor
    red_steps: Tensor
    path_xy: Tensor
    path_progress: Tensor
    history: tuple[Tensor, ...]
    vehicle: VehicleParameters


def stack_arenas(arenas: Sequence[Arena], device: torch.device | str = "cpu") -> ArenaBatch:
    """Pad and concatenate arenas into tensors on a device; padding is never present and never inside anything."""
    ring_starts = np.cumsum([0] + [len(arena.ring_kinds) for arena in arenas])
    vertex_starts = np.cumsum([0] + [len(arena.ring_xy) for arena in arenas])
    pairs = list(zip(arenas, ring_starts, vertex_starts, strict=False))
    ring_lists = [start + np.arange(len(arena.ring_kinds)) for arena, start, _ in pairs]
    offsets = np.concatenate([[0], *[arena.ring_offsets[1:] + start for arena, _, start in pairs]])
    columns = {
        **{name: _pad([getattr(one.tracks, name) for one in arenas], fill) for name, fill in PADDING.items()},
        **{name: np.concatenate([getattr(one, name) for one in arenas]) for name in JOINED},
        **{name: _pad_last([getattr(one, name) for one in arenas]) for name in ("path_xy", "path_progress")},
        "ring_offsets": offsets.astype(np.int64),
        "ring_next": np.concatenate([arena.ring_next + start for arena, _, start in pairs]),
        "rings_of_scene": _pad(ring_lists, -1),
        "red_scene": np.repeat(np.arange(len(arenas)), [len(arena.red_rings) for arena in arenas]),
        "red_ring": np.concatenate([arena.red_rings + start for arena, start, _ in pairs]),
    }
    tensors = {name: torch.as_tensor(column, device=device) for name, column in columns.items()}
    history = tuple(torch.as_tensor(arena.history, device=device) for arena in arenas)
    return ArenaBatch(**tensors, history=history, vehicle=arenas[0].vehicle)


def _next_vertices(offsets: Integers) -> Integers:
    following = np.arange(1, offsets[-1] + 1)
    following[offsets[1:] - 1] = offsets[:-1]
    return following


def _ring_bounds(offsets: Integers, xy: Floats) -> Floats:
    if len(offsets) < 2:
        return np.zeros((0, 4))
    lower = np.minimum.reduceat(xy, offsets[:-1])
    return np.concatenate([lower, np.maximum.reduceat(xy, offsets[:-1])], axis=1)


def _ring_kinds(scene: ScoringScene) -> Integers:
    layers = scene.polygon_layers
    is_lane = (layers == LANE) | (layers == LANE_CONNECTOR)
    is_drivable = np.isin(layers, DRIVABLE_LAYERS)
    kinds = is_lane * IS_LANE + is_drivable * IS_DRIVABLE + (is_lane & scene.polygon_on_route) * IS_ROUTE_LANE
    return (kinds + (layers == INTERSECTION) * IS_INTERSECTION).astype(np.int64)


def _pad(arrays: Sequence[npt.NDArray], fill: object) -> npt.NDArray:
    size = max(1, *(len(array) for array in arrays))
    padded = np.full((len(arrays), size, *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return padded


def _pad_last(arrays: Sequence[npt.NDArray]) -> npt.NDArray:
    size = max(len(array) for array in arrays)
    return np.stack(
        [np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)]) for array in arrays]
    )
