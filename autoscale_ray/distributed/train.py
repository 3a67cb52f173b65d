"""Planner training on Ray: ONE Train run whose workers live through all rounds and share every step.

The workers ask the driver for the next task over and over, because a new run costs half a minute and a hand-over on
live workers a few milliseconds. Rank 0 asks and tells the others, so all see the same tasks in the same order.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from autoscale_ray import tasks
from autoscale_ray.config import PlannerConfig, RayConfig
from autoscale_ray.distributed.board import Task
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.distributed.steps import Place, train_shared
from autoscale_ray.planning.checkpoint import load_state, save_state
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.planning.training import TrainState

POLL_S = 5.0
"""Longest time a worker waits for a task before it looks around again."""
COLLECTIVE_TIMEOUT_S = 120
"""A rank that does not enter a collective ends the attempt after this long; Train's own health check takes 600 s."""
MAX_FAILURES = 8
RESIZE_INTERVAL_S = 20.0
"""How often a group with fewer trainers than wanted looks for room for more."""
STATE_FILE, TASK_FILE = "state.safetensors", "task"
BUILT_IN = PlannerConfig().factory


def make_trainer(config: RayConfig, driver: str, namespace: str, storage: Path) -> TorchTrainer:
    """Return the Train run of a driver; the same name and storage resume from its last checkpoint."""
    gpu, most = config.gpus_per_worker > 0, config.num_trainers
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "driver": driver,
            "namespace": namespace,
            "checkpoint_steps": config.checkpoint_steps,
            "stall_timeout_s": config.stall_timeout_s,
            "stacks": str(storage.absolute().parent / "stacks"),
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=(config.min_trainers, most) if 0 < config.min_trainers < most else most,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": config.gpus_per_worker} if gpu else {})},
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=ray.train.RunConfig(
            name="trainers",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def train_loop(settings: dict[str, Any]) -> None:
    """Fetch tasks and train them until there are no more; runs on every worker."""
    torch.set_num_threads(1)
    driver = ray.get_actor(settings["driver"], namespace=settings["namespace"])
    deadline = Deadline(settings["stall_timeout_s"], Path(settings["stacks"]))
    last = None
    while (task := next_task(driver, last)) is not None:
        try:
            with deadline:
                weights = train_task(task, settings["checkpoint_steps"], deadline)
        except Exception:  # passed on to Train as it is; told to the driver, who knows whether it came before
            ray.get(driver.report_failure.remote(task.task_id, traceback.format_exc()))
            raise
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(driver.deliver_task.remote(task.task_id, weights_as_files(task, weights)))
        last = task.task_id


def next_task(driver: Any, last: str | None) -> Task | None:
    """Return the task after the last one, the same on every worker; None at the end."""
    found: Task | str = "wait"
    while found == "wait":
        found = ray.get(driver.fetch_task.remote(last, POLL_S))
    return found if isinstance(found, Task) else None


def train_task(task: Task, checkpoint_steps: int, deadline: Deadline) -> Any:
    """Train one planner; go on from the last checkpoint when it is of this task.

    A planner of one's own cannot be cut into shards: rank 0 trains it, the others wait for the next task.
    """
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), str(get_device()))
    spec = spec_of(task.planner)
    if task.planner.factory != BUILT_IN:
        deadline.lift()  # its steps cannot be seen
        return spec.train(features_of(spec, task.features), task.rows, task.seed) if place.rank == 0 else None

    def keep(state: TrainState) -> None:
        deadline.renew()
        if state.step % checkpoint_steps == 0 and state.step < task.planner.num_steps:
            report_state(task, state)

    features, start = features_of(spec, task.features), restored_state(task) or first_state(spec, task)
    return train_shared(features, task.rows, task.planner, task.seed, place, start=start, on_step=keep)


def report_state(task: Task, state: TrainState) -> None:
    """Report a checkpoint of a task; every worker must call it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            save_state(state, Path(folder) / STATE_FILE)
            (Path(folder) / TASK_FILE).write_text(task.task_id)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        name = f"{task.task_id}-{state.step:07d}"
        ray.train.report({"step": state.step}, checkpoint=checkpoint, checkpoint_dir_name=name)


def first_state(spec: PlannerSpec, task: Task) -> TrainState | None:
    """Return the state that a task begins with; None begins anew."""
    return None if task.start is None else tasks.warm_state(spec.load_weights(Path(task.start)))


def restored_state(task: Task) -> TrainState | None:
    """Return the state of the last checkpoint when it belongs to this task."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        if (Path(folder) / TASK_FILE).read_text() != task.task_id:
            return None
        return load_state(Path(folder) / STATE_FILE)


def weights_as_files(task: Task, weights: Any) -> dict[str, bytes]:
    """Return the files a planner saves itself as, by name; they are small and travel by value."""
    with tempfile.TemporaryDirectory() as folder:
        spec_of(task.planner).save_weights(weights, Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@lru_cache(maxsize=1)
def spec_of(planner: PlannerConfig) -> PlannerSpec:
    """Return the planner of a configuration."""
    return load_planner_spec(planner.factory, planner)


_FEATURES: dict[tuple[str, ...], Any] = {}


def features_of(spec: PlannerSpec, folders: Sequence[str]) -> Any:
    """Return the features in some folders, mapped into memory once in the life of a worker."""
    key = tuple(folders)
    if key not in _FEATURES:
        _FEATURES.clear()
        _FEATURES[key] = spec.concatenate([spec.load_features(Path(folder)) for folder in folders])
    return _FEATURES[key]
