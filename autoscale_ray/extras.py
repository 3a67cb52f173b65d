"""Whether an extra of the package is installed."""

from __future__ import annotations

from importlib.util import find_spec


def has_numba() -> bool:
    """Tell whether numba, which compiles the kernels, is installed (extra `cpu` or `gpu`)."""
    return find_spec("numba") is not None
