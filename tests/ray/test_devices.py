"""Which device a worker computes on; the GPUs of the tests' cluster are bookkeeping."""

from __future__ import annotations

import os

import pytest
import ray
import torch

from autoscale_ray.distributed.collective import collective_backend, interface_of
from autoscale_ray.distributed.devices import worker_device


def device_of_a_worker(num_gpus: int) -> tuple[str, str | None]:
    """Return the device of an actor that is no worker of Ray Train, and the GPUs that it sees."""

    @ray.remote(num_cpus=1, num_gpus=num_gpus)
    class Worker:  # here, so that it travels by value
        def device(self) -> tuple[str, str | None]:
            try:
                return worker_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
            except RuntimeError as error:
                return f"{type(error).__name__}: {error}", None

    worker = Worker.remote()
    told = ray.get(worker.device.remote())
    ray.kill(worker)
    return told


@pytest.mark.timeout(150)
def test_a_worker_without_a_reserved_gpu_sees_none(cluster) -> None:
    assert device_of_a_worker(num_gpus=0) == ("cpu", "")


@pytest.mark.timeout(150)
def test_a_worker_with_a_reserved_gpu_computes_there_or_says_why_not(cluster) -> None:
    told, _ = device_of_a_worker(num_gpus=1)
    if torch.cuda.is_available():
        assert told == "cuda:0"
    else:
        assert told == (
            f"GpuUnusableError: Ray reserved cuda:0 for a worker, but torch {torch.__version__} sees no GPU"
        )


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (0.5, "gloo"), (1, "cpu:gloo,cuda:nccl")])
def test_tensors_of_whole_gpus_go_through_nccl(gpus: float, backend: str) -> None:
    assert collective_backend(gpus) == backend


def test_the_network_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("192.0.2.1") is None, "an address for documentation, which no machine has"
