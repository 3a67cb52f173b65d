"""Scenes of NAVSIM's metric caches as the scorer sees them: boxes, lights and PDM-Closed are the cache's own.

Shape legend: A tracks, T steps of 0.1 s (51 or 41), G map polygons, R red rings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoscale_ray.evaluation.arena import Arena, build_arena
from autoscale_ray.evaluation.metrics import RULES_V1, RULES_V2
from autoscale_ray.evaluation.observation import STOPPED_TRACK_SPEED_MPS, Tracks
from autoscale_ray.evaluation.prepare import PreparedScene, prepare_arena
from autoscale_ray.evaluation.scene import (
    LANE_CONNECTOR,
    NUM_HISTORY_FRAMES,
    NUM_MOVING_TYPES,
    ScoringScene,
)
from autoscale_ray.evaluation.simulate import resample_one
from autoscale_ray.evaluation.timing import node_grid
from autoscale_ray.evaluation.vehicle import VehicleParameters
from autoscale_ray.scenes.readers.metric_cache import MetricCache

RULES = {"v1": RULES_V1, "v2": RULES_V2}
_FRAME_US = 500_000


def prepared_from_cache(cache: MetricCache) -> PreparedScene:
    """Prepare a scene for the version of the score that its metric cache was made for.

    Args:
        cache: A checked metric cache.

    Returns:
        The prepared scene, in map coordinates, named by its token.
    """
    rules = RULES[cache.version]
    scene = _scene(cache)
    arena = build_arena(scene, rules.num_frames)
    num_map = len(cache.polygon_layer)
    is_map_G = np.arange(len(arena.ring_kinds)) < num_map
    arena = replace(
        arena,
        ego_state=np.concatenate([np.zeros(2), cache.ego_state[2:]]),
        tracks=_tracks(cache, arena),
        # Red polygons stand behind the map's own and belong to no area.
        ring_kinds=np.where(is_map_G, arena.ring_kinds, 0),
        red_rings=np.flatnonzero(~is_map_G),
        red_steps=cache.red_steps,
    )
    reference = resample_one(cache.reference_poses, node_grid(cache.start_us, cache.reference_times_us))
    return prepare_arena(scene, arena, rules, reference)


def _scene(cache: MetricCache) -> ScoringScene:
    """Return everything but tracks and lights; version 1 has no past, and no rule of it reads one."""
    num_red, num_frames = len(cache.red_offsets) - 1, RULES[cache.version].num_frames
    times_us, states = cache.past_times_us, cache.past_states
    if times_us is None or states is None:
        times_us = cache.start_us + _FRAME_US * np.arange(1 - NUM_HISTORY_FRAMES, 1, dtype=np.int64)
        states = np.tile(cache.ego_state[:7], (NUM_HISTORY_FRAMES, 1))
    width, front, rear, wheel_base = cache.vehicle
    layers = np.concatenate([cache.polygon_layer, np.full(num_red, LANE_CONNECTOR)])
    return ScoringScene(
        scene_id=cache.token,
        ego_history_times_us=times_us,
        ego_history_states=states,
        human_poses=cache.human_poses,
        agent_types=np.zeros(0, dtype=np.int64),
        agent_dims=np.zeros((0, 3)),
        agent_states=np.zeros((0, num_frames, 5)),
        agent_mask=np.zeros((0, num_frames), dtype=bool),
        polygon_layers=layers,
        polygon_on_route=np.concatenate([cache.polygon_on_route, np.zeros(num_red, dtype=bool)]),
        polygon_red=np.zeros((len(layers), num_frames), dtype=bool),
        polygon_offsets=np.concatenate([cache.polygon_offsets, cache.polygon_offsets[-1] + cache.red_offsets[1:]]),
        polygon_xy=np.concatenate([cache.polygon_xy, cache.red_xy]),
        centreline=cache.centreline,
        vehicle=VehicleParameters(
            width_m=width, front_length_m=front, rear_length_m=rear, wheel_base_m=wheel_base
        ),
        is_synthetic=cache.is_synthetic,
    )  # fmt: skip


def _tracks(cache: MetricCache, arena: Arena) -> Tracks:
    """Return the cache's boxes; speed and yaw are those of the first sighting, as in the official scorer."""
    yaw_AT = cache.track_poses[..., 2]
    position_AT2 = cache.track_poses[..., :2] - arena.origin
    boxes_AT4 = np.concatenate([position_AT2, np.cos(yaw_AT)[..., None], np.sin(yaw_AT)[..., None]], axis=-1)
    first_A = np.argmax(cache.track_present, axis=1)
    is_static_A = cache.track_type >= NUM_MOVING_TYPES
    speed_A = np.where(is_static_A, 0.0, np.hypot(*cache.track_velocity.T))
    return Tracks(
        boxes=np.where(cache.track_present[..., None], boxes_AT4, 0.0),
        present=cache.track_present,
        half_sizes=cache.track_size[:, :2] / 2.0,
        is_static=is_static_A,
        is_stopped=speed_A <= STOPPED_TRACK_SPEED_MPS,
        is_ignored=np.zeros(len(first_A), dtype=bool),
        velocities=np.stack([yaw_AT[np.arange(len(first_A)), first_A], speed_A], axis=-1),
        kinds=cache.track_type,
    )
