"""Planner training on Ray: ONE Train run whose workers live through all rounds and share every step.

The workers ask the driver for the next task over and over, because a new run costs half a minute and a hand-over on
live workers a few milliseconds. Rank 0 asks and tells the others, so all see the same tasks in the same order.

The four logical shards of a step (planning/training.py) are dealt out to the workers; each computes the gradients
of its own, all gather all, and every worker makes the same optimiser step on the same sum: 1, 2 and 4 workers end
with the same bits.

Shape legend: V logical shards (4), W weights of the model, B places of a shard.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from autoscale_ray import tasks
from autoscale_ray.config import PlannerConfig, RayConfig
from autoscale_ray.distributed.board import Task
from autoscale_ray.planning.checkpoint import load_state, save_state
from autoscale_ray.planning.features import PlannerFeatures
from autoscale_ray.planning.objectives import make_examples
from autoscale_ray.planning.order import NUM_SHARDS, shard_places
from autoscale_ray.planning.planner import empty_planner, set_weights
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.planning.training import (
    PlannerWeights,
    TrainState,
    apply_gradients,
    check_trainable,
    finished,
    new_state,
    one_thread,
    shard_gradients,
)

POLL_S = 5.0
"""Longest time a worker waits for a task before it looks around again."""
COLLECTIVE_TIMEOUT_S = 120
"""A rank that does not enter a collective ends the attempt after this long; Train's own health check takes 600 s."""
MAX_FAILURES = 8
STATE_FILE, TASK_FILE = "state.safetensors", "task"
BUILT_IN = PlannerConfig().factory


def make_trainer(config: RayConfig, driver: str, namespace: str, storage: Path) -> TorchTrainer:
    """Return the Train run of a driver; the same name and storage resume from its last checkpoint."""
    gpu = config.gpus_per_worker > 0
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "driver": driver,
            "namespace": namespace,
            "checkpoint_steps": config.checkpoint_steps,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.num_trainers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": config.gpus_per_worker} if gpu else {})},
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
    while (task := next_task(driver)) is not None:
        try:
            weights = train_task(task, settings["checkpoint_steps"])
        except Exception:  # passed on to Train as it is; told to the driver, who knows whether it came before
            ray.get(driver.report_failure.remote(task.task_id, traceback.format_exc()))
            raise
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(driver.deliver_task.remote(task.task_id, weights_as_files(task, weights)))


def next_task(driver: Any) -> Task | None:
    """Let rank 0 fetch a task and tell the others; None at the end."""
    found: list[Task | str] = ["wait"]
    while found[0] == "wait":
        if ray.train.get_context().get_world_rank() == 0:
            found = [ray.get(driver.fetch_task.remote(POLL_S))]
        if ray.train.get_context().get_world_size() > 1:
            torch.distributed.broadcast_object_list(found, src=0)
    return found[0] if isinstance(found[0], Task) else None


def train_task(task: Task, checkpoint_steps: int) -> Any:
    """Train one planner; go on from the last checkpoint when it is of this task.

    A planner of one's own cannot be cut into shards: rank 0 trains it, the others wait for the next task.
    """
    context = ray.train.get_context()
    spec = spec_of(task.planner)
    if task.planner.factory != BUILT_IN:
        if context.get_world_rank() != 0:
            return None
        return spec.train(features_of(spec, task.features), task.rows, task.seed)

    def keep(state: TrainState) -> None:
        if state.step % checkpoint_steps == 0 and state.step < task.planner.num_steps:
            report_state(task, state)

    return train_shared(
        features_of(spec, task.features),
        task.rows,
        task.planner,
        task.seed,
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        start=restored_state(task) or first_state(spec, task),
        on_step=keep,
    )


def train_shared(
    features: PlannerFeatures,
    rows: np.ndarray,
    config: PlannerConfig,
    seed: int,
    *,
    rank: int,
    num_workers: int,
    start: TrainState | None = None,
    on_step: Callable[[TrainState], None] = lambda state: None,
) -> PlannerWeights:
    """Do the same as `planning.training.train` together with other workers, to the same bits.

    Args:
        features: Scenes to choose from, the same on every worker.
        rows: int64 rows to train on.
        config: The planner and its training.
        seed: Training seed.
        rank: This worker, in [0, num_workers).
        num_workers: Workers of the process group, 1 to 4.
        start: A state of the same run to go on from.
        on_step: Called after every step, on every worker.
    """
    check_trainable(config, len(rows))
    mine = shards_of(rank, num_workers)
    examples = make_examples(features, torch.as_tensor(rows), config)
    planner = empty_planner(config, len(mine))
    state = new_state(config, seed) if start is None else start
    set_weights(planner, state.weights_W)
    with one_thread():
        for step in range(state.step, config.num_steps):
            places_VB = torch.from_numpy(shard_places(seed, step, config.batch_size, len(rows))[mine])
            gradients_VW, _ = shard_gradients(planner, examples.shards(places_VB), step)
            apply_gradients(state, gather_shards(gradients_VW, num_workers), config)
            on_step(state)
    return finished(config, state)


def shards_of(rank: int, num_workers: int) -> list[int]:
    """Return the logical shards of a worker: consecutive, as even as they go."""
    return list(range(rank * NUM_SHARDS // num_workers, (rank + 1) * NUM_SHARDS // num_workers))


def gather_shards(gradients_VW: Tensor, num_workers: int) -> Tensor:
    """Return the gradients of all logical shards in shard order, on every worker."""
    if num_workers == 1:
        return gradients_VW
    longest = max(len(shards_of(rank, num_workers)) for rank in range(num_workers))
    sent = gradients_VW.new_zeros(longest, gradients_VW.shape[1])
    sent[: len(gradients_VW)] = gradients_VW
    received = [torch.empty_like(sent) for _ in range(num_workers)]
    torch.distributed.all_gather(received, sent)
    return torch.cat([part[: len(shards_of(rank, num_workers))] for rank, part in enumerate(received)])


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
