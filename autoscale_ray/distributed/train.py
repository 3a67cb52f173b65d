"""Planner training on Ray: ONE Train run whose workers live through all rounds and share every step.

The workers ask the driver for the next task over and over, because a new run costs half a minute and a hand-over on
live workers a few milliseconds. The driver hands every task to every worker, so all see the same in the same order.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors import SafetensorError
from safetensors.torch import load_file

from autoscale_ray import tasks
from autoscale_ray.config import PlannerConfig, RayConfig
from autoscale_ray.distributed.board import AnyTask, EncoderTask, Task
from autoscale_ray.distributed.causes import own_error
from autoscale_ray.distributed.collective import CollectiveConfig, collective_backend
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.distributed.devices import worker_device
from autoscale_ray.distributed.memory import release
from autoscale_ray.distributed.resources import bundle, elastic_limit, is_elastic
from autoscale_ray.distributed.steps import Place, gather_shards, shards_of, train_shared
from autoscale_ray.errors import ArtifactError
from autoscale_ray.planning.checkpoint import load_state, save_state
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.planning.training import TrainState, one_thread
from autoscale_ray.scenes.pool import open_pool

POLL_S = 5.0
"""Longest time a worker waits for a task before it looks around again."""
COLLECTIVE_TIMEOUT_S = 120
"""A rank that does not enter a collective ends the attempt after this long, or after `stall_timeout_s` where a step
may take longer; Train's own health check takes 600 s."""
MAX_FAILURES = 8
RESIZE_INTERVAL_S = 20.0
"""How often a group with fewer trainers than wanted looks for room for more."""
RUN_NAME = "trainers"
STATE_FILE, TASK_FILE = "state.safetensors", "task"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Where Train keeps which checkpoints there are."""
BUILT_IN = PlannerConfig().factory
T = TypeVar("T")


def make_trainer(config: RayConfig, driver: str, namespace: str, storage: Path) -> TorchTrainer:
    """Return the Train run of a driver; the same name and storage resume from its last checkpoint."""
    gpus, most = config.gpus_per_worker, most_trainers(config)
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "driver": driver,
            "namespace": namespace,
            "checkpoint_steps": config.checkpoint_steps,
            "stall_timeout_s": config.stall_timeout_s,
            "stacks": str(storage.absolute().parent / "stacks"),
        },
        torch_config=CollectiveConfig(
            backend=collective_backend(gpus), timeout_s=max(COLLECTIVE_TIMEOUT_S, config.stall_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=(config.min_trainers, most) if 0 < config.min_trainers < most else most,
            use_gpu=gpus > 0,
            resources_per_worker=bundle(gpus),
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=ray.train.RunConfig(
            name=RUN_NAME,
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def most_trainers(config: RayConfig) -> int:
    """Return how many trainers a Train run that is made now may have, on the nodes that there are."""
    return elastic_limit(config, ray.cluster_resources()) if is_elastic(config) else config.num_trainers


def newest_checkpoint(storage: Path) -> str | None:
    """Return what tells the last checkpoint of a driver's Train run from any other; None where there is none."""
    found = []
    for path in (storage / RUN_NAME).glob("*-*"):
        with suppress(FileNotFoundError):  # Train removes old ones meanwhile
            found += [(path.stat().st_mtime_ns, path.name)] if path.is_dir() else []
    return max(found)[1] if found else None


def drop_damaged(storage: Path) -> str | None:
    """Remove what Train has kept where it could not go on from that; return why, or None where nothing is wrong.

    Train writes its snapshot in place: a kill meanwhile leaves half of it, and every later controller would fail. Only
    progress within a task is lost.
    """
    folder = storage / RUN_NAME
    if not (folder / SNAPSHOT_FILE).exists():
        return None
    try:
        snapshot = json.loads((folder / SNAPSHOT_FILE).read_bytes())
        for result in snapshot["checkpoint_results"]:
            for name in (STATE_FILE, TASK_FILE):
                (folder / result["checkpoint_dir_name"] / name).stat()
    except (ValueError, KeyError, TypeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        return f"{type(error).__name__}: {error}"
    return None


def train_loop(settings: dict[str, Any]) -> None:
    """Fetch tasks and train them until there are no more; runs on every worker."""
    torch.set_num_threads(1)
    driver = ray.get_actor(settings["driver"], namespace=settings["namespace"])
    deadline = Deadline(settings["stall_timeout_s"], Path(settings["stacks"]))
    place = Place(*_rank_and_size(), worker_device())
    last = None
    while (task := next_task(driver, last)) is not None:
        keeper = Keeper(task.task_id, settings["checkpoint_steps"], deadline)
        try:
            with deadline:
                files = train_task(task, place, keeper)
        except Exception as error:
            # Everything is told to the driver and raised again: Train would start the group anew after a user's bug
            # as after a lost worker, and only the driver sees that the same error came back.
            told = traceback.format_exc(), own_error(error)
            ray.get(driver.report_failure.remote(task.task_id, place.rank, *told))
            raise
        if place.rank == 0:
            ray.get(driver.deliver_task.remote(task.task_id, files))
        release()
        last = task.task_id


def _rank_and_size() -> tuple[int, int]:
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def next_task(driver: Any, last: str | None) -> AnyTask | None:
    """Return the task after the last one, the same on every worker; None at the end."""
    found: AnyTask | str = "wait"
    while found == "wait":
        found = ray.get(driver.fetch_task.remote(last, POLL_S))
    return None if isinstance(found, str) else found


def train_task(task: AnyTask, place: Place, keeper: Keeper) -> dict[str, bytes]:
    """Train what a task asks for and return its files; only those of rank 0 count.

    What cannot be shared is trained by rank 0, while the others wait for the next task.
    """
    if isinstance(task, EncoderTask):
        return train_encoder(task, place, keeper)
    spec = spec_of(task.planner)
    if task.planner.factory != BUILT_IN:
        keeper.deadline.lift()  # its steps cannot be seen
        if place.rank != 0:
            return {}
        weights = spec.train(features_of(spec, task.features), task.rows, task.seed)
    else:
        found = keeper.found(load_state)
        weights = train_shared(
            features_of(spec, task.features),
            task.rows,
            task.planner,
            task.seed,
            place,
            start=found or first_state(spec, task),
            on_step=lambda state: keeper.keep(state.step, task.planner.num_steps, partial(save_state, state)),
        )
    return as_files(partial(spec.save_weights, weights))


def train_encoder(task: EncoderTask, place: Place, keeper: Keeper) -> dict[str, bytes]:
    """Train the encoder, by all workers when it has a shard for each."""
    # Imported here: torch_geometric takes seconds that a run with embeddings does not need.
    from autoscale_ray.representation import sharded, training
    from autoscale_ray.representation.model import save

    # Of a read-only pool every node builds a cache, which takes minutes.
    pools = [open_pool(path, on_file=keeper.deadline.renew) for path in task.pools]
    settings = task.settings
    if settings.num_shards == 1:
        if place.rank != 0:
            keeper.deadline.lift()
            return {}
        model = training.train(pools, settings, task.seed, lambda *_: keeper.deadline.renew(), place.device)
    else:
        mine, gather = (
            shards_of(place.rank, place.num_workers),
            partial(gather_shards, num_workers=place.num_workers),
        )
        with one_thread():
            model = sharded.fit_shared(
                training.pools_training_set(pools, settings, task.seed),
                settings,
                task.seed,
                sharded.Group(mine, gather),
                start=keeper.found(load_file),
                on_step=lambda state: keeper.keep(
                    state.step, settings.num_steps, partial(sharded.save_state, state)
                ),
                device=place.device,
            )
    return as_files(partial(save, model))


@dataclass(frozen=True, slots=True)
class Keeper:
    """Reports checkpoints of one task and finds the last of them again."""

    task_id: str
    every: int
    """Steps between two checkpoints."""
    deadline: Deadline

    def keep(self, step: int, num_steps: int, save: Callable[[Path], None]) -> None:
        """Say that the task goes on, and report a checkpoint when one is due; every worker must call it."""
        self.deadline.renew()
        if step % self.every or step >= num_steps:
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if ray.train.get_context().get_world_rank() == 0:
                save(Path(folder) / STATE_FILE)
                (Path(folder) / TASK_FILE).write_text(self.task_id)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            name = f"{self.task_id}-{step:07d}"
            ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=name)

    def found(self, load: Callable[[Path], T]) -> T | None:
        """Load the last checkpoint when it is of this task and whole."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            if (Path(folder) / TASK_FILE).read_bytes() != self.task_id.encode():
                return None
            try:
                return load(Path(folder) / STATE_FILE)
            except (ArtifactError, SafetensorError) as error:
                # Damage is the same for all workers; one that alone cannot read must not begin where no other does.
                if isinstance(error.__cause__, OSError):
                    raise
                return None


def first_state(spec: PlannerSpec, task: Task) -> TrainState | None:
    """Return the state that a task begins with; None begins anew."""
    return None if task.start is None else tasks.warm_state(spec.load_weights(Path(task.start)))


def as_files(save: Callable[[Path], None]) -> dict[str, bytes]:
    """Return by name what is saved into a folder; it is small and travels by value."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
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
