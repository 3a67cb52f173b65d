"""Comfort: Savitzky-Golay features of driven states against fixed bounds, in plain torch.

Shape legend: N trajectories, L samples every 0.1 s.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.evaluation.simulate import AX, AY, YAW, YAW_ACCELERATION, YAW_RATE
from autoscale_ray.evaluation.timing import STEP_S

NUM_DECIMALS = 8
BOUNDS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))
"""Strict bounds of lon. and lat. acceleration, jerk of the magnitude, lon. jerk, yaw acceleration, yaw rate."""
EXTENDED_LIMITS = (0.7, 0.5, 0.1, 0.1)
"""Largest RMS differences of acceleration magnitude, its jerk, yaw rate, yaw acceleration between two frames."""


@lru_cache(maxsize=256)
def smoothing_matrix(num_samples: int, window: int, order: int, derivative: int) -> np.ndarray:
    """Return the (L, L) matrix of a Savitzky-Golay filter with polynomial edges.

    Args:
        num_samples: L.
        window: Window length, cut to L; may be even.
        order: Degree of the polynomial.
        derivative: Order of the derivative, per 0.1 s.

    Returns:
        (L, L) matrix; row t holds the weights of output t.
    """
    from scipy.signal import savgol_filter

    size = min(window, num_samples)
    smoothed = savgol_filter(
        np.eye(num_samples), size, order, deriv=derivative, delta=STEP_S, axis=0, mode="interp"
    )
    return np.asarray(smoothed)


def comfort_flags(states_NL11: Tensor, version: str, centre_offset_m: float) -> Tensor:
    """Test the six comfort bounds.

    v1 smooths rear-axle accelerations over the whole 41 samples; v2 shifts them to the vehicle centre,
    a_c = a + d (w^2 + alpha), and uses windows 8 and 15 (docs/scoring.md, Comfort).

    Args:
        states_NL11: (N, L, 11) states every 0.1 s, the past first in v2.
        version: "v1" or "v2".
        centre_offset_m: Distance d from the rear axle to the centre.

    Returns:
        (N, 6) flags: lon. acceleration, lat. acceleration, jerk, lon. jerk, yaw acceleration, yaw rate in bounds.
    """
    whole = states_NL11.shape[1]
    accel_window, jerk_window = (whole, whole) if version == "v1" else (8, 15)
    lon_NL, lat_NL = states_NL11[..., AX], states_NL11[..., AY]
    magnitude_NL = torch.hypot(lon_NL, lat_NL)
    centre_lon_NL = lon_NL
    if version == "v2":
        spin_NL = states_NL11[..., YAW_RATE] ** 2 + states_NL11[..., YAW_ACCELERATION]
        centre_lon_NL = lon_NL + centre_offset_m * spin_NL
    yaw_NL = unwrap(states_NL11[..., YAW])
    features = (
        _filter(centre_lon_NL, accel_window, 2, 0),
        _filter(lat_NL, accel_window, 2, 0),
        _filter(_filter(magnitude_NL, 8, 2, 0), jerk_window, 2, 1),
        _filter(_filter(centre_lon_NL, 8, 2, 0), jerk_window, 2, 1),
        _filter(yaw_NL, 5, 3, 2),
        _filter(yaw_NL, 5, 2, 1),
    )
    inside = [
        ((value > low) & (value < high)).all(dim=1)
        for value, (low, high) in zip(features, BOUNDS, strict=True)
    ]
    return torch.stack(inside, dim=1)


def extended_comfort(now_NL11: Tensor, previous_NL11: Tensor) -> Tensor:
    """Tell whether two overlapping drives differ little enough.

    RMS over time of the differences of acceleration magnitude, its jerk, yaw rate and yaw acceleration at most
    0.7, 0.5, 0.1, 0.1 (docs/scoring.md, Extended comfort).

    Args:
        now_NL11: (N, L, 11) the current drive cut to the overlap.
        previous_NL11: (N, L, 11) the previous drive cut to the overlap.

    Returns:
        (N,) flags.
    """
    pairs = zip(_extended_features(now_NL11), _extended_features(previous_NL11), EXTENDED_LIMITS, strict=True)
    calm = [((now - before) ** 2).mean(dim=1).sqrt() <= limit for now, before, limit in pairs]
    return torch.stack(calm, dim=1).all(dim=1)


def unwrap(yaw_NL: Tensor) -> Tensor:
    """Remove jumps of whole turns from yaws, as the official scorer does."""
    turns = torch.cumsum(torch.round(torch.diff(yaw_NL, dim=1) / (2.0 * torch.pi)), dim=1)
    return torch.cat([yaw_NL[:, :1], yaw_NL[:, 1:] - 2.0 * torch.pi * turns], dim=1)


def _extended_features(states_NL11: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acceleration_NL = _filter(torch.hypot(states_NL11[..., AX], states_NL11[..., AY]), 8, 2, 0)
    yaw_NL = unwrap(states_NL11[..., YAW])
    return (
        acceleration_NL,
        _filter(acceleration_NL, 15, 2, 1),
        _filter(yaw_NL, 5, 2, 1),
        _filter(yaw_NL, 5, 2, 2),
    )


def _filter(value_NL: Tensor, window: int, order: int, derivative: int) -> Tensor:
    matrix = smoothing_matrix(value_NL.shape[1], window, order, derivative)
    weights = torch.as_tensor(matrix, dtype=value_NL.dtype, device=value_NL.device)
    return torch.round(value_NL @ weights.T, decimals=NUM_DECIMALS)
