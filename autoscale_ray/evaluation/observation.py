"""What surrounds the ego at 10 Hz: replayed tracks, constant-velocity forecasts, red lights.

Shape legend: A agents, F 2 Hz frames, T 10 Hz steps, G polygons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoscale_ray.evaluation.scene import NUM_MOVING_TYPES, Flags, Floats, ScoringScene

STEPS_PER_FRAME = 5
STOPPED_TRACK_SPEED_MPS = 0.05
FORECAST_RADIUS_M = 100.0
FORECAST_STEP = 2
NEAREST_BY_TYPE = {0: 50, 1: 25, 2: 10}
NEAREST_STATIC = 50


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tracks:
    """Boxes of the agents over 10 Hz steps, in the same frame as the scene.

    Fields:
        boxes: (A, T, 4) centre x, y and cos, sin of the yaw; unread where not present.
        present: (A, T) whether the agent exists at that step.
        half_sizes: (A, 2) half length, half width in m.
        is_static: (A,) a static object, by type.
        is_stopped: (A,) a static object, or at most 0.05 m/s at its first sighting.
        is_ignored: (A,) never counted as a collision.
        velocities: (A, 2) first sighting's yaw in rad and speed in m/s.
        kinds: (A,) type codes.
    """

    boxes: Floats
    present: Flags
    half_sizes: Floats
    is_static: Flags
    is_stopped: Flags
    is_ignored: Flags
    velocities: Floats
    kinds: npt.NDArray[np.int64]


def replay_tracks(scene: ScoringScene, origin: Floats, num_frames: int) -> Tracks:
    """Interpolate the logged 2 Hz tracks to 10 Hz as NAVSIM's metric cache does.

    Linear in x, y and unwrapped yaw between the neighbouring sightings, also across gaps; absent before the first
    and after the last sighting; a track seen in one frame only stands still at all steps. Speed and stillness are
    those of the first sighting (docs/scoring.md, Observation).

    Args:
        scene: The scene.
        origin: (2,) subtracted from all positions, m.
        num_frames: Frames used: 9 for v2 (41 steps), 11 for v1 (51 steps).

    Returns:
        Tracks over 5 * (num_frames - 1) + 1 steps.
    """
    mask_AF, states_AF5 = scene.agent_mask[:, :num_frames], scene.agent_states[:, :num_frames]
    num_steps = STEPS_PER_FRAME * (num_frames - 1) + 1
    before_AT, after_AT, present_AT = _neighbour_frames(mask_AF, num_steps)
    row_A1 = np.arange(len(mask_AF))[:, None]
    left_AT5, right_AT5 = states_AF5[row_A1, before_AT], states_AF5[row_A1, after_AT]
    gap_AT = np.maximum(after_AT - before_AT, 1)
    share_AT = (np.arange(num_steps) / STEPS_PER_FRAME - before_AT) / gap_AT
    share_AT = np.where(after_AT > before_AT, share_AT, 0.0)
    turn_AT = _shortest_turn(right_AT5[..., 2] - left_AT5[..., 2])
    yaw_AT = left_AT5[..., 2] + share_AT * turn_AT
    position_AT2 = left_AT5[..., :2] - origin + share_AT[..., None] * (right_AT5[..., :2] - left_AT5[..., :2])
    boxes_AT4 = np.concatenate([position_AT2, np.cos(yaw_AT)[..., None], np.sin(yaw_AT)[..., None]], axis=-1)
    first_A = np.argmax(mask_AF, axis=1)
    return _tracks(scene, boxes_AT4, present_AT, states_AF5[row_A1[:, 0], first_A])


def forecast_tracks(scene: ScoringScene, origin: Floats, ego_centre: Floats, num_steps: int) -> Tracks:
    """Forecast the objects seen at t = 0 with constant velocity, as PDM-Closed's observation does.

    Objects within 100 m of the ego centre, of those the nearest 50 vehicles, 25 pedestrians, 10 bicycles and 50
    static objects; moving ones keep speed along their yaw (reversed where they drive backwards); positions are
    refreshed every second step (docs/scoring.md, PDM-Closed).

    Args:
        scene: The scene.
        origin: (2,) subtracted from all positions, m.
        ego_centre: (2,) centre of the ego's box at t = 0 after that subtraction, m.
        num_steps: Number of 10 Hz steps.

    Returns:
        Tracks over num_steps steps; objects left out are present at none.
    """
    state_A5 = scene.agent_states[:, 0]
    position_A2 = np.where(scene.agent_mask[:, :1], state_A5[:, :2], origin) - origin
    distance_A = np.hypot(*(position_A2 - ego_centre).T)
    chosen_A = _nearest_objects(scene, distance_A)
    yaw_A = np.where(chosen_A, state_A5[:, 2], 0.0)
    velocity_A2 = np.where(chosen_A[:, None], state_A5[:, 3:5], 0.0)
    speed_A = np.hypot(*velocity_A2.T)
    drift_A = yaw_A - np.arctan2(velocity_A2[:, 1], velocity_A2[:, 0])
    # same operations as the official code: tracks that move exactly sideways are decided by the last bit
    backwards_A = np.abs(np.arctan2(np.sin(drift_A), np.cos(drift_A))) >= np.pi / 2
    signed_A = np.where(scene.agent_types < NUM_MOVING_TYPES, np.where(backwards_A, -speed_A, speed_A), 0.0)
    direction_A2 = np.stack([np.cos(yaw_A), np.sin(yaw_A)], axis=-1)
    time_T = 0.1 * FORECAST_STEP * (np.arange(num_steps) // FORECAST_STEP)
    moved_AT2 = position_A2[:, None] + (signed_A[:, None] * time_T)[..., None] * direction_A2[:, None]
    boxes_AT4 = np.concatenate([moved_AT2, np.broadcast_to(direction_A2[:, None], moved_AT2.shape)], axis=-1)
    return _tracks(scene, boxes_AT4, np.repeat(chosen_A[:, None], num_steps, axis=1), state_A5)


def red_light_steps(scene: ScoringScene, num_steps: int) -> tuple[npt.NDArray[np.int64], Flags]:
    """Return the on-route connectors that are red at some step, and when.

    Args:
        scene: The scene.
        num_steps: Number of 10 Hz steps; a 2 Hz status is held for 5 steps.

    Returns:
        Indices (R,) into the polygons and (R, num_steps) flags.
    """
    frame_T = np.arange(num_steps) // STEPS_PER_FRAME
    red_GT = scene.polygon_red[:, frame_T] & scene.polygon_on_route[:, None]
    index_R = np.flatnonzero(red_GT.any(axis=1))
    return index_R, red_GT[index_R]


def _tracks(scene: ScoringScene, boxes_AT4: Floats, present_AT: Flags, first_A5: Floats) -> Tracks:
    seen_A = np.any(present_AT, axis=1)
    speed_A = np.where(seen_A, np.hypot(first_A5[:, 3], first_A5[:, 4]), 0.0)
    is_static_A = scene.agent_types >= NUM_MOVING_TYPES
    yaw_A = np.where(seen_A, first_A5[:, 2], 0.0)
    speed_A = np.where(is_static_A, 0.0, speed_A)
    return Tracks(
        boxes=np.where(present_AT[..., None], boxes_AT4, 0.0),
        present=present_AT,
        half_sizes=scene.agent_dims[:, :2] / 2.0,
        is_static=is_static_A,
        is_stopped=speed_A <= STOPPED_TRACK_SPEED_MPS,
        is_ignored=np.zeros(len(seen_A), dtype=bool),
        velocities=np.stack([yaw_A, speed_A], axis=-1),
        kinds=scene.agent_types,
    )


def _neighbour_frames(
    mask_AF: Flags, num_steps: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Flags]:
    num_frames = mask_AF.shape[1]
    frame_F = np.arange(num_frames)
    last_seen_AF = np.maximum.accumulate(np.where(mask_AF, frame_F, -1), axis=1)
    next_seen_AF = np.minimum.accumulate(np.where(mask_AF, frame_F, num_frames)[:, ::-1], axis=1)[:, ::-1]
    step_T = np.arange(num_steps)
    before_AT = last_seen_AF[:, step_T // STEPS_PER_FRAME]
    after_AT = next_seen_AF[:, -(-step_T // STEPS_PER_FRAME)]
    present_AT = (before_AT >= 0) & (after_AT < num_frames)
    once_A = mask_AF.sum(axis=1) == 1
    frozen_A1 = np.argmax(mask_AF, axis=1)[:, None]
    before_AT = np.where(once_A[:, None] | ~present_AT, frozen_A1, before_AT)
    after_AT = np.where(once_A[:, None] | ~present_AT, frozen_A1, after_AT)
    return before_AT, after_AT, present_AT | once_A[:, None]


def _nearest_objects(scene: ScoringScene, distance_A: Floats) -> Flags:
    eligible_A = scene.agent_mask[:, 0] & (distance_A <= FORECAST_RADIUS_M)
    chosen_A = np.zeros(len(distance_A), dtype=bool)
    groups = [(scene.agent_types == code, limit) for code, limit in NEAREST_BY_TYPE.items()]
    groups.append((scene.agent_types >= NUM_MOVING_TYPES, NEAREST_STATIC))
    for member_A, limit in groups:
        index = np.flatnonzero(member_A & eligible_A)
        chosen_A[index[np.argsort(distance_A[index], kind="stable")[:limit]]] = True
    return chosen_A


def _shortest_turn(difference: Floats) -> Floats:
    turn = (difference + np.pi) % (2.0 * np.pi) - np.pi
    # Half a turn keeps its side, as in np.unwrap, which the official code uses.
    return np.where((turn == -np.pi) & (difference > 0.0), np.pi, turn)
