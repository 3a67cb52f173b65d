"""The loop of a run inside its driver, beside the one Train run whose workers take its training tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import ray.train
import torch
from ray.exceptions import RayActorError

from autoscale_ray.config import RunConfig
from autoscale_ray.distributed.board import TaskBoard
from autoscale_ray.distributed.devices import worker_device
from autoscale_ray.distributed.driver import RunFailedError, StoppedError
from autoscale_ray.distributed.memory import release
from autoscale_ray.distributed.observe import Observer
from autoscale_ray.distributed.resources import NAMESPACE
from autoscale_ray.distributed.stages import RayStages
from autoscale_ray.distributed.train import (
    MAX_FAILURES,
    drop_damaged,
    make_trainer,
    most_trainers,
    newest_checkpoint,
)
from autoscale_ray.mixture.greedy import load_search
from autoscale_ray.records import Clusters
from autoscale_ray.run_folder import work_dir
from autoscale_ray.session import open_run, play

TRAINERS_END_TIMEOUT_S = 60
REASON_LENGTH = 500
"""Characters of an error that the log of a run keeps."""


def play_here(
    config: RunConfig,
    driver: str,
    board: TaskBoard,
    watch: Callable[[str], AbstractContextManager[None]],
    show: Callable[[Mapping[str, Any], bool], None],
    *,
    embed_only: bool,
) -> dict[str, Any]:
    """Play a run to its end; return its ``summary``, or where it ends with them its ``clusters``, under that name.

    Args:
        config: The run, with absolute paths.
        driver: Name of the driver's actor, by which trainers find the board.
        board: Where training tasks are laid out.
        watch: Entered around every stage.
        show: Called with the summary after every round, and whether no later one has been published before; may
            raise `StoppedError`.
        embed_only: End with the clusters, before the first round.
    """
    torch.set_num_threads(config.placement.num_threads)
    worker_device()  # hides the GPUs of this node, which are not the driver's
    run_dir = work_dir(config)
    inputs, store = open_run(config)
    settings = {"seed": config.seed, "budget": config.loop.budget}
    name = config.placement.run_dir.rstrip("/").rpartition("/")[2]
    observer = Observer(name, run_dir, store.log, settings)
    trainers = _trainers(config, driver, board, observer.tell, embed_only=embed_only)

    @contextmanager
    def watched(stage: str) -> Iterator[None]:
        with watch(stage), observer.watch(stage, stages.is_searching):
            yield
        release()

    stages = RayStages(config, inputs, store, board, watch=watched)

    def shown(summary: Mapping[str, Any]) -> None:
        observer.show(summary)
        show(summary, len(summary["rounds"]) == len(store.rounds()))

    ended, reason = "failed", None
    try:
        if embed_only:
            made: dict[str, Any] = {"clusters": _embed(stages, board, trainers)}
        else:
            made = {"summary": play(stages, shown)}
        ended = "finished"
    except StoppedError:
        ended = "stopped"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:REASON_LENGTH]
        raise
    finally:
        board.close()  # workers go home, whatever trackers still have to do
        observer.close(ended, reason)
    return made


def _trainers(
    config: RunConfig, driver: str, board: TaskBoard, tell: Callable[..., None], *, embed_only: bool
) -> threading.Thread:
    """Return the thread of the Train run: started, or where embeddings may all be there, at the first task."""
    trainers = threading.Thread(target=_train, args=(config, driver, board, tell), name="train", daemon=True)
    if embed_only:
        board.begin = trainers.start
    else:
        trainers.start()
        # Here and not between the first two rounds, where it would be waited for.
        threading.Thread(target=load_search, name="search", daemon=True).start()
    return trainers


def _embed(stages: RayStages, board: TaskBoard, trainers: threading.Thread) -> Clusters:
    clusters = stages.cluster(stages.embed())
    stages.work.close()
    board.close()
    # Ended by themselves they give back their place, which trials of a sweep wait for.
    if trainers.is_alive():
        trainers.join(TRAINERS_END_TIMEOUT_S)
    return clusters


def _train(config: RunConfig, driver: str, board: TaskBoard, tell: Callable[..., None]) -> None:
    """Keep the Train run of a driver going: what it may lose counts between two signs of progress, not in a week."""
    storage, num_lost, placement = work_dir(config) / "train", 0, config.placement.ray
    board.newest = partial(newest_checkpoint, storage)
    before = board.progress()
    try:
        while True:
            if (why := drop_damaged(storage)) is not None:
                tell("checkpoints_dropped", reason=why)
            most = most_trainers(placement)
            try:
                make_trainer(placement, driver, NAMESPACE, storage).fit()
                break
            except (ray.train.TrainingFailedError, RayActorError) as error:
                now = board.progress()
                # Train itself has counted to the end; its controller is one process, lost with all it had counted.
                # Where nodes were lost, it may have counted attempts to start elastic trainers where scorers sit.
                is_new = isinstance(error, RayActorError) or most_trainers(placement) < most
                weight = 1 if is_new else MAX_FAILURES + 1
                num_lost = num_lost + weight if now == before else 1
                if board.is_over or num_lost > MAX_FAILURES:
                    raise
                before = now
        board.fail(RunFailedError("the training run ended before the loop"))
    except BaseException as error:  # the end of a thread: the loop raises it at its next task
        board.fail(RunFailedError(f"the training run failed: {error}"))
