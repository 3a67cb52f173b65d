"""Where a worker computes: on the GPU that Ray reserved for it, else on the CPU."""

from __future__ import annotations

import os

import ray
import torch
from ray.train.torch import get_device


def worker_device() -> str:
    """Return the device of this worker and make a reserved GPU the one that `cuda` means here.

    A GPU that torch could see but Ray did not reserve belongs to others. On a reserved one torch is asked for
    algorithms whose sums do not depend on the order of threads, where it has them.
    """
    if not ray.get_gpu_ids():
        return "cpu"
    device = get_device()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return str(device)


def collective_backend(gpus_per_worker: float) -> str:
    """Return what workers exchange tensors through: NCCL takes GPU tensors alone and refuses two workers on one GPU."""
    return "cpu:gloo,cuda:nccl" if gpus_per_worker >= 1 else "gloo"
