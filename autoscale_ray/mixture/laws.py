"""The bank of saturating laws that response curves are averaged over.

phi_l(x) with x in uniform shares (scenes over budget / K), scaled so that phi_l(0) = 0 and phi_l(1) = 1; a gain is
then always the score difference between no scenes and a uniform share, whatever the law.

| family | form | scales |
| exponential | 1 - e^(-x / tau) | tau .1 .3 1 3 |
| power | 1 - (1 + x / s)^-alpha | s .3 1 3, alpha .5 1 |
| logarithm | log(1 + x / s) | s .1 .5 2 |
| line | x | |

Each family has prior 1/4, split equally inside (docs/cluster_ga.md, The bank of laws).
"""

from __future__ import annotations

import numpy as np

_EXPONENTIAL_SCALES = np.array([0.1, 0.3, 1.0, 3.0])
_POWER_SCALES = np.array([0.3, 0.3, 1.0, 1.0, 3.0, 3.0])
_POWER_EXPONENTS = np.array([0.5, 1.0, 0.5, 1.0, 0.5, 1.0])
_LOG_SCALES = np.array([0.1, 0.5, 2.0])
_FAMILY_SIZES = (4, 6, 3, 1)

LAW_PRIOR_L = np.concatenate([np.full(size, 1 / (len(_FAMILY_SIZES) * size)) for size in _FAMILY_SIZES])
"""Prior probability of each law."""


def law_values(shares: np.ndarray) -> np.ndarray:
    """Evaluate every law, phi_l(x).

    Args:
        shares: (...) scenes in uniform shares, >= 0.

    Returns:
        (..., L) values; 0 at x = 0 and 1 at x = 1.
    """
    x = np.asarray(shares, float)[..., None]
    curves = [
        (1 - np.exp(-x / _EXPONENTIAL_SCALES)) / _exponential_unit(),
        (1 - (1 + x / _POWER_SCALES) ** -_POWER_EXPONENTS) / _power_unit(),
        np.log1p(x / _LOG_SCALES) / np.log1p(1 / _LOG_SCALES),
        x,
    ]
    return np.concatenate(curves, axis=-1)


def law_slopes(shares: np.ndarray) -> np.ndarray:
    """Evaluate d phi_l / d x, shapes as in `law_values`."""
    x = np.asarray(shares, float)[..., None]
    slopes = [
        np.exp(-x / _EXPONENTIAL_SCALES) / (_EXPONENTIAL_SCALES * _exponential_unit()),
        _POWER_EXPONENTS / _POWER_SCALES * (1 + x / _POWER_SCALES) ** (-_POWER_EXPONENTS - 1) / _power_unit(),
        1 / ((_LOG_SCALES + x) * np.log1p(1 / _LOG_SCALES)),
        np.ones_like(x),
    ]
    return np.concatenate(slopes, axis=-1)


def _exponential_unit() -> np.ndarray:
    return 1 - np.exp(-1 / _EXPONENTIAL_SCALES)


def _power_unit() -> np.ndarray:
    return 1 - (1 + 1 / _POWER_SCALES) ** -_POWER_EXPONENTS
