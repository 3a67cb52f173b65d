"""Sampling of poses at NAVSIM's time nodes, microsecond truncation included.

Shape legend: n waypoints, T = 41 samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_STEPS = 41
STEP_S = 0.1
STEP_US = 100_000


@dataclass(frozen=True, slots=True, eq=False)
class TimeGrid:
    """Where each of the 41 samples lies between waypoints: left index (41,) and share (41,) in [0, 1]."""

    left: npt.NDArray[np.int64]
    share: npt.NDArray[np.float64]


def waypoint_grid(start_us: int, num_waypoints: int) -> TimeGrid:
    """Place the 41 samples between the ego's pose at t = 0 and the planner's waypoints.

    The official code adds seconds as floats and cuts to whole microseconds, on both sides; this moves samples by up
    to 1 us (docs/scoring.md, Interpolation).

    Args:
        start_us: Timestamp of t = 0 in microseconds.
        num_waypoints: 8 or 40 waypoints over 4 s.

    Returns:
        Grid over 1 + num_waypoints nodes.
    """
    interval_s = 4.0 / num_waypoints
    node_s = np.arange(0.0, 4.0, interval_s) + interval_s + start_us * 1e-6
    return node_grid(start_us, np.concatenate([[start_us], (node_s * 1e6).astype(np.int64)]))


def step_grid(start_us: int) -> TimeGrid:
    """Place the 41 samples between the nodes of a reference that was unrolled every 0.1 s.

    Args:
        start_us: Timestamp of t = 0 in microseconds.

    Returns:
        Grid over 41 nodes at exact multiples of 0.1 s.
    """
    return node_grid(start_us, start_us + STEP_US * np.arange(NUM_STEPS, dtype=np.int64))


def history_samples(
    times_us: npt.NDArray[np.int64], states_H7: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Resample the ego's past at 10 Hz for history comfort.

    Samples at arange(start, end, 0.1 s) without the last one, linear in all states, yaw unwrapped (docs/scoring.md,
    History comfort).

    Args:
        times_us: (4,) increasing timestamps.
        states_H7: (4, 7) x, y, yaw, vx, vy, ax, ay.

    Returns:
        (14 or 15 for a history of about 1.5 s, 7) states with wrapped yaw.
    """
    sample_us = np.arange(times_us[0], times_us[-1], STEP_US, dtype=np.int64)[:-1]
    unwrapped = states_H7.copy()
    unwrapped[:, 2] = np.unwrap(unwrapped[:, 2])
    left, share = _locate(times_us, sample_us)
    sampled = unwrapped[left] + share[:, None] * (unwrapped[left + 1] - unwrapped[left])
    sampled[:, 2] = (sampled[:, 2] + np.pi) % (2.0 * np.pi) - np.pi
    return sampled


def node_grid(start_us: int, node_us: npt.NDArray[np.int64]) -> TimeGrid:
    """Place the 41 samples between nodes at given times, clipped to the last one.

    Args:
        start_us: Timestamp of t = 0 in microseconds, the first node.
        node_us: (k,) increasing times, k >= 2.
    """
    sample_s = np.arange(0.0, 4.0 + STEP_S, STEP_S)[:NUM_STEPS] + start_us * 1e-6
    sample_us = np.clip((sample_s * 1e6).astype(np.int64), start_us, node_us[-1])
    return TimeGrid(*_locate(node_us, sample_us))


def _locate(
    node_us: npt.NDArray[np.int64], sample_us: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    left = np.clip(np.searchsorted(node_us, sample_us) - 1, 0, len(node_us) - 2)
    share = (sample_us - node_us[left]) / (node_us[left + 1] - node_us[left])
    return left, share
