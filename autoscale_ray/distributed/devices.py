"""Where a worker computes: on the GPU that Ray reserved for it, else on the CPU."""

from __future__ import annotations

import os

import ray
import torch

from autoscale_ray.errors import AutoScaleError


class GpuUnusableError(AutoScaleError, RuntimeError):
    """A worker cannot use the GPU that was reserved for it."""


def worker_device() -> str:
    """Return the device of this worker and make a reserved GPU the one that `cuda` means here.

    Where none is reserved, none is seen from here on: Ray leaves all GPUs of the node in sight, and they belong to
    others. On a reserved one torch is asked for algorithms whose sums do not depend on the order of threads, where it
    has them.

    Raises:
        GpuUnusableError: Ray reserved a GPU that torch cannot use.
    """
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    # The public one works in workers of Ray Train alone. Imported here: it brings Ray Train along, without which
    # scorers on CPUs start a fifth sooner.
    from ray.train.torch.train_loop_utils import get_device

    device = get_device()
    if not torch.cuda.is_available():
        raise GpuUnusableError(
            f"Ray reserved {device} for a worker, but torch {torch.__version__} sees no GPU"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every new tensor costs a kernel that fills it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return str(device)
