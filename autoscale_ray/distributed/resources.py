"""What a run needs of a Ray cluster, and how a cluster is reached; decided apart from acted on."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group

from autoscale_ray.config import RayConfig
from autoscale_ray.distributed.status import answers
from autoscale_ray.errors import AutoScaleError

NAMESPACE = "autoscale"
GROUP_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Every report and the end of a Train run wait for up to two health checks.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    GROUP_TIMEOUT: "30",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "180",
}
"""Set where the user has not: defaults of Ray that wait for minutes without a word, or slow every round."""
LOCAL_ENVIRONMENT = {
    # Nobody takes away nodes of one machine, and the actor that watches for it holds 190 MB.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # glibc keeps freed memory in an arena for every thread; two hold 250 MB less in the driver at no cost in time.
    "MALLOC_ARENA_MAX": "2",
}
"""Set beside them for a cluster on this machine."""
GPU_CHECK_TIMEOUT_S = 60
"""A new worker process that imports torch and makes its CUDA context."""
WITHOUT_RAY = "without Ray: autoscale run --backend local"
UNSAFE_SWITCHES = ("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA")


class ResourcesError(AutoScaleError, RuntimeError):
    """The cluster cannot hold the run; says what is needed and what there is."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Logical resources a run holds at once."""

    cpus: float
    gpus: float


def needs_of(config: RayConfig, *, embeds: bool = True) -> Needs:
    """Return what a run holds at once: trainers throughout, beside them embedders or scorers.

    One CPU more is for Ray Data, whose reads would otherwise wait for ever behind the trainers. Elastic trainers count
    with the fewest that will do.

    Args:
        config: How many do what.
        embeds: False where the embeddings are there before the run begins.
    """
    num_trainers = config.min_trainers or config.num_trainers
    num_embedders = config.num_embedders if embeds else 0
    return Needs(
        cpus=num_trainers + max(num_embedders + embeds, config.num_scorers),
        gpus=gpus_of(num_trainers, config.gpus_per_worker)
        + max(
            gpus_of(num_embedders, config.gpus_per_worker),
            gpus_of(config.num_scorers, config.gpus_per_scorer),
        ),
    )


def gpus_of(num_workers: int, each: float) -> float:
    """Return the GPUs that workers take; of one whose parts do not fill it, such as 0.4, the rest is lost."""
    return num_workers * each if each == 0 or each >= 1 else num_workers / math.floor(1 / each)


def is_elastic(config: RayConfig) -> bool:
    """Tell whether a run goes on with fewer trainers where there is no room for all."""
    return 0 < config.min_trainers < config.num_trainers


def with_all_trainers(config: RayConfig) -> RayConfig:
    """Return the same run with all the trainers that elastic ones may become."""
    return dataclasses.replace(config, min_trainers=0)


def elastic_limit(config: RayConfig, total: Mapping[str, float]) -> int:
    """Return the most trainers that leave room for embedders and scorers on a cluster of this size.

    Ray starts as many elastic workers as a cluster has room for in all, whatever else is to run there.
    """
    if not is_elastic(config):
        return config.num_trainers
    for num_trainers in range(config.num_trainers, config.min_trainers, -1):
        whole = dataclasses.replace(config, num_trainers=num_trainers, min_trainers=num_trainers)
        if shortage(needs_of(whole), total) is None:
            return num_trainers
    return config.min_trainers


def train_environment(config: RayConfig) -> dict[str, str]:
    """Return the switches of a driver, whose trainers may wait as long for a new node as the run does at its start.

    Not elastic ones: every attempt with a group too large for the nodes that are left would wait as long, where a
    smaller group could go on.
    """
    shortest_s = int(ENVIRONMENT[GROUP_TIMEOUT])
    wait_s = shortest_s if is_elastic(config) else max(shortest_s, config.start_timeout_s)
    return {**ENVIRONMENT, GROUP_TIMEOUT: str(wait_s)}


def shortage(needs: Needs, total: Mapping[str, float]) -> str | None:
    """Return one line that says what is missing, or None when a cluster of this size can hold the run."""
    have = Needs(total.get("CPU", 0.0), total.get("GPU", 0.0))
    if have.cpus >= needs.cpus and have.gpus >= needs.gpus:
        return None
    return (
        f"the run needs {needs.cpus:g} CPUs and {needs.gpus:g} GPUs at once (placement.ray.num_*), the cluster has "
        f"{have.cpus:g} CPUs and {have.gpus:g} GPUs"
    )


def bundle(gpus: float) -> dict[str, float]:
    """Return what one worker holds."""
    return {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}


def bundles_of(config: RayConfig) -> list[dict[str, float]]:
    """Return one bundle for every worker of a run, as a cluster that grows by itself is asked for them."""
    trainers = [bundle(config.gpus_per_worker)] * (config.min_trainers or config.num_trainers)
    embedders = [bundle(config.gpus_per_worker)] * config.num_embedders
    scorers = [bundle(config.gpus_per_scorer)] * config.num_scorers
    beside = max(embedders, scorers, key=lambda group: sum(item.get("GPU", 0.0) for item in group))
    num_others = int(needs_of(config).cpus) - len(trainers) - len(beside)
    return trainers + beside + [bundle(0.0)] * num_others


def connect(config: RayConfig) -> None:
    """Reach the cluster that RAY_ADDRESS or the job names; start one on this machine where there is none.

    A cluster that is started here declares as many CPUs as the run needs, at least those of the machine: they are
    bookkeeping, and trainers and scorers take turns.

    Raises:
        ResourcesError: A switch that lets Parquet files run code is set, or Ray cannot be started or reached.
    """
    for name in UNSAFE_SWITCHES:
        if os.environ.get(name, "0") not in ("", "0", "false"):
            raise ResourcesError(f"{name} must not be set: it lets a Parquet file run code")
    if ray.is_initialized():
        return
    set_environment()
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    address = os.environ.get("RAY_ADDRESS")
    if address and not answers(address):
        raise ResourcesError(f"no Ray cluster answers at {address} (RAY_ADDRESS); {WITHOUT_RAY}")
    try:
        ray.init(**options, **({} if address else local_cluster(config)))
    except (OSError, RuntimeError, ValueError) as error:
        what = f"the Ray cluster at {address} cannot be reached" if address else "Ray cannot be started here"
        reason = " ".join(str(error).split())[:300]
        raise ResourcesError(f"{what} ({reason}); {WITHOUT_RAY}") from error


def set_environment(environment: Mapping[str, str] = ENVIRONMENT) -> None:
    """Set switches for this process and what it starts, where the user has not."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def local_cluster(config: RayConfig) -> dict[str, Any]:
    """Return what a cluster on this machine is started with, on loopback alone."""
    # Ray asks for a token by itself, which is what we want; it need not warn of that.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    set_environment(LOCAL_ENVIRONMENT)
    num_cpus = max(os.cpu_count() or 1, int(needs_of(config).cpus))
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "resources": {"trial_slot": num_cpus},
        "include_dashboard": True,  # Train and Tune free the workers of a dead run through it
        "dashboard_host": "127.0.0.1",
    }


def wait_for_room(config: RayConfig) -> None:
    """Wait until the cluster can hold the run; stop with one line where it does not come to that.

    A cluster that grows by itself gets `start_timeout_s` to deliver what is missing. Where it has no room for all of
    `num_trainers` by then, it gets as long again for the fewest that elastic trainers go on with.

    Raises:
        ResourcesError: Too few CPUs or GPUs in all, or too few that are free, or GPUs that torch cannot use.
    """
    all_trainers = with_all_trainers(config)
    if not _comes(all_trainers) and not (is_elastic(config) and _comes(config)):
        raise ResourcesError(_why_not(needs_of(config)))
    for name in ("gpus_per_worker", "gpus_per_scorer"):
        if (gpus := getattr(config, name)) > 0:
            check_gpu(f"placement.ray.{name}", gpus)


def _comes(config: RayConfig) -> bool:
    """Return whether a run gets its place within `start_timeout_s`; it is given back at once.

    It is asked for as a placement group. What `request_resources` asks for is one wish for the whole cluster, which
    other runs overwrite, Ray's own libraries among them, and which counts nodes that are in use as free.
    """
    group = placement_group(bundles_of(config), strategy="PACK")
    give_up = time.monotonic() + config.start_timeout_s
    try:
        while not (has_come := group.wait(1)) and time.monotonic() < give_up:
            pass  # not waited for in one piece: Ctrl-C would come after it
        return has_come
    finally:
        remove_placement_group(group)


def _why_not(needs: Needs) -> str:
    if (total := shortage(needs, ray.cluster_resources())) is not None:
        return total
    if (free := shortage(needs, ray.available_resources())) is not None:
        return f"{free} free: other runs hold the rest"
    return (
        f"the run needs {needs.cpus:g} CPUs and {needs.gpus:g} GPUs at once (placement.ray.num_*), which are free, but "
        "found no place in time: each worker needs its CPU and its GPUs on one node"
    )


def check_gpu(name: str, gpus: float) -> None:
    """Let one worker with a GPU say whether torch can use it.

    Args:
        name: Setting that asks for the GPU.
        gpus: What it says.

    Raises:
        ResourcesError: It cannot, or the worker did not answer in time.
    """
    call = _gpu_problem.options(num_gpus=gpus).remote()
    try:
        problem = ray.get(call, timeout=GPU_CHECK_TIMEOUT_S)
    except GetTimeoutError:
        ray.cancel(call, force=True)
        problem = f"did not answer in {GPU_CHECK_TIMEOUT_S} s"
    except RayError as error:
        problem = f"was lost: {str(error).strip().splitlines()[0]}"
    if problem:
        raise ResourcesError(f"{name}={gpus:g}: a worker with a GPU {problem}")


@ray.remote(num_cpus=0, max_calls=1, max_retries=1)  # its process ends, and its CUDA context with it
def _gpu_problem() -> str | None:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"sees no CUDA device (torch {torch.__version__}, {built})"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        return f"cannot compute on it: {str(error).splitlines()[0]}"
    return None
