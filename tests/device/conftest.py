"""Every test here runs on a simulated device and, where there is one, on CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.device import simulated  # before the first backward pass: torch counts its devices once

# The real device; the simulated one stands for it where there is none.
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is there")


@pytest.fixture(params=[simulated.NAME, pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request: pytest.FixtureRequest) -> str:
    """Return a device other than the CPU."""
    return request.param
