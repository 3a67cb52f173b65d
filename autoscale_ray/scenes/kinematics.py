"""Poses, velocities and accelerations of tracks at the rear axle, from what the source gives.

Shape legend: K tracks, R rows (one a track and frame).
"""

from __future__ import annotations

import numpy as np

from autoscale_ray.scenes.recording import Tracks

DIFFERENCE_HALF_WIDTH_S = 0.3


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """Return the angle in [-pi, pi)."""
    turned = np.asarray(angle + np.pi)
    # The remainder is dear, and most angles do not need it.
    outside = (turned < 0.0) | (turned >= 2.0 * np.pi)
    if outside.any():
        turned[outside] %= 2.0 * np.pi
    return turned - np.pi


def _neighbours(tracks: Tracks, frame_interval_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows before and after each row, and the seconds between them.

    They are the frames in `DIFFERENCE_HALF_WIDTH_S` away, nearer where the track begins or ends or has a gap.
    """
    half = max(1, round(DIFFERENCE_HALF_WIDTH_S / frame_interval_s))
    rows = np.arange(len(tracks.valid_R))
    first, last = _run_ends(tracks)
    low, high = np.maximum(rows - half, first), np.minimum(rows + half, last)
    return low, high, np.maximum(high - low, 1) * frame_interval_s


def _difference(values_R: np.ndarray, low: np.ndarray, high: np.ndarray, elapsed: np.ndarray) -> np.ndarray:
    """Differentiate a row value in time, (R,) or (R, n); see `_neighbours`. Angles must be unwrapped by the caller."""
    return (values_R[high] - values_R[low]) / elapsed.reshape(-1, *[1] * (values_R.ndim - 1))


def _run_ends(tracks: Tracks) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last row of the gapless run that each row belongs to."""
    rows = np.arange(len(tracks.valid_R))
    starts = np.zeros(len(rows), dtype=bool)
    starts[tracks.offsets[:-1]] = True
    starts[1:] |= tracks.valid_R[1:] != tracks.valid_R[:-1]
    run_R = np.cumsum(starts) - 1
    firsts = np.flatnonzero(starts)
    lasts = np.append(firsts[1:], len(rows)) - 1
    return firsts[run_R], lasts[run_R]


def gapless_runs(tracks: Tracks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return track, first row and last row of every gapless run of valid rows."""
    first, last = _run_ends(tracks)
    starts = np.flatnonzero((first == np.arange(len(first))) & tracks.valid_R)
    owner = np.searchsorted(tracks.offsets, starts, side="right") - 1
    return owner, starts, last[starts]


def center_velocities(tracks: Tracks, frame_interval_s: float) -> np.ndarray:
    """Return the velocity of every box centre in map axes (R, 2): the source's, else central differences."""
    found = np.isfinite(tracks.velocities_R2).all(axis=1, keepdims=True)
    if found.all():
        return tracks.velocities_R2
    differences_R2 = _difference(tracks.poses_R3[:, :2], *_neighbours(tracks, frame_interval_s))
    return np.where(found, tracks.velocities_R2, differences_R2)


def rear_axle_states(
    tracks: Tracks, frame_interval_s: float, center_R2: np.ndarray | None = None
) -> np.ndarray:
    """Return pose, velocity and acceleration of every row at the rear axle (R, 7).

    x, y, yaw in map coordinates; vx, vy, ax, ay in the body frame. With d the distance from rear axle to
    centre and w the yaw rate: position = centre - d * heading, vy = vy_centre - d * w. Accelerations along
    the heading are the source's where given, else ax and ay are central differences of the rear axle's
    velocity in map axes, turned into the body frame. With the source's ax, ay = w * vx.

    Args:
        tracks: Rows to convert.
        frame_interval_s: Native step, > 0.
        center_R2: What `center_velocities` returns, where it is at hand.
    """
    lengths = np.diff(tracks.offsets)
    to_center_R = np.repeat(tracks.size_K4[:, 3], lengths)
    # Single columns: NumPy adds along an axis of two many times as slowly.
    x_R, y_R, yaw_R = tracks.poses_R3.T
    cos_R, sin_R = np.cos(yaw_R), np.sin(yaw_R)
    around = _neighbours(tracks, frame_interval_s)
    yaw_rate_R = _difference(_unwrapped(tracks), *around)
    center_R2 = center_velocities(tracks, frame_interval_s) if center_R2 is None else center_R2
    sideways_R = to_center_R * yaw_rate_R
    east_R, north_R = center_R2[:, 0] + sideways_R * sin_R, center_R2[:, 1] - sideways_R * cos_R
    vx_R, vy_R = _in_body(east_R, north_R, cos_R, sin_R)
    change_R = _difference(east_R, *around), _difference(north_R, *around)
    along_R, across_R = _in_body(change_R[0], change_R[1], cos_R, sin_R)
    given = np.isfinite(tracks.accelerations_R)
    ax_R = np.where(given, tracks.accelerations_R, along_R)
    ay_R = np.where(given, yaw_rate_R * vx_R, across_R)
    position_2R = x_R - to_center_R * cos_R, y_R - to_center_R * sin_R
    return np.stack([*position_2R, yaw_R, vx_R, vy_R, ax_R, ay_R], axis=1)


def _in_body(
    x_R: np.ndarray, y_R: np.ndarray, cos_R: np.ndarray, sin_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of vectors along the heading and to its left, none of them -0."""
    return x_R * cos_R + y_R * sin_R + 0.0, y_R * cos_R - x_R * sin_R + 0.0


def _unwrapped(tracks: Tracks) -> np.ndarray:
    """Return the yaw of every row without jumps inside a track."""
    yaw_R = tracks.poses_R3[:, 2]
    steps = wrap_angle(np.diff(yaw_R, prepend=yaw_R[:1]))
    return np.cumsum(steps)
