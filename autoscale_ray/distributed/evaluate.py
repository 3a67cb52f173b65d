"""Scoring on Ray: actors that stay alive between rounds, each with its share of the scenes prepared.

A scene needs the one half a second earlier, which lies in the same log, so whole logs are dealt out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.state import get_actor
from ray.util.state.exception import RayStateApiException

from autoscale_ray.config import PlannerConfig, RayConfig
from autoscale_ray.distributed.causes import own_error
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.distributed.devices import worker_device
from autoscale_ray.distributed.memory import release
from autoscale_ray.errors import AutoScaleError
from autoscale_ray.evaluation.from_pool import RULES, PreparedPool, prepare_pool, score_pool
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.scenes.pool import ScenePool, open_pool


class PoolRows:
    """Some rows of a pool, with the part of a pool's face that preparing scenes needs."""

    def __init__(self, pool: ScenePool, rows: np.ndarray, on_read: Callable[[], None]) -> None:
        self._pool, self._rows, self._on_read = pool, rows, on_read
        self.path = pool.path

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def scene_ids(self) -> np.ndarray:
        """Return the scene ids of the rows."""
        return self._pool.scene_ids[self._rows]

    def column(self, name: str) -> np.ndarray:
        """Return a scalar column of the rows."""
        return self._pool.column(name)[self._rows]

    def table(self, rows: np.ndarray) -> pa.Table:
        """Return some of the rows as an Arrow table."""
        self._on_read()
        return self._pool.table(self._rows[rows])


START_TIMEOUT_S = 120
"""How long scorers may at least take to get their place and to load their planner."""
LOOK_S = 5.0
"""How often scorers are looked at while they score."""
GRACE_S = 10
"""How long the first scorer waits for the others before it begins alone."""
ALIVE = 2
"""What Ray calls an actor that has a process, in `ActorTableData.ActorState`."""
MAX_RETRIES = 3
"""Times a share is scored again after its scorer was lost."""


class ScoringFailedError(AutoScaleError, RuntimeError):
    """Scorers died or stood still again and again."""


@dataclass(frozen=True, slots=True)
class Side:
    """A dev or test pool with what scoring needs beside it; paths that every node sees."""

    pool: Path
    features: Path
    references: Path


class Scorer:
    """Actor that scores shares of dev and test pools with planner after planner."""

    def __init__(self, planner: PlannerConfig, deadline: Deadline) -> None:
        torch.set_num_threads(1)
        self._planner, self._deadline = planner, deadline
        self._prepared: dict[tuple[Side, int], tuple[Any, PreparedPool]] = {}

    @cached_property
    def _spec(self) -> PlannerSpec:
        # Not in the constructor: of what fails there Ray tells the text alone, not the error.
        worker_device()
        return load_planner_spec(self._planner.factory, self._planner)

    def ready(self) -> None:
        """Load the planner, and so say that this scorer has got its CPU and GPU."""
        assert self._spec

    def score(self, side: Side, rows: np.ndarray, weights: Path) -> pa.Table:
        """Return scene_id, sub-scores, epdms, pdms and miou of this scorer's rows, as `tasks_scores.score_planner`."""
        with self._deadline:
            return self._score(side, rows, weights)

    def _score(self, side: Side, rows: np.ndarray, weights: Path) -> pa.Table:
        share = side, hash(rows.tobytes())
        if share not in self._prepared:
            self._prepared = {
                key: kept for key, kept in self._prepared.items() if key[0] != side
            }  # dealt anew
            prepared = prepare_rows(open_pool(side.pool), side.references, rows, self._deadline.renew)
            self._prepared[share] = self._spec.load_features(side.features), prepared
            release()
        features, prepared = self._prepared[share]
        planner = self._spec.load_weights(weights)
        poses = self._spec.predict(planner, features, rows).astype(np.float64)
        value_N, valid_N = self._spec.miou(planner, features, rows)
        miou = pa.array(np.where(valid_N, value_N, np.nan), from_pandas=True)
        return score_pool(prepared, poses).append_column("miou", miou)


class ScorerPool:
    """Scorers that are started with the first planner to score and kept for all others.

    Args:
        planner: The planner they load.
        config: How many share a pool at most, on which GPUs, and how long the first may take to find a place.
        deadline: What ends a scorer that stands still.
    """

    def __init__(self, planner: PlannerConfig, config: RayConfig, deadline: Deadline) -> None:
        self._planner, self._config, self._deadline = planner, config, deadline
        self._scorers: list[Any] = []
        self._coming: dict[Any, Any] = {}
        """Scorers that have not found a place yet, by the call that says so."""
        self._dealt: dict[Side, tuple[np.ndarray, Sequence[np.ndarray]]] = {}

    def score(self, side: Side, weights: Path) -> pa.Table:
        """Return the scores of every scene of a side, in pool order.

        Raises:
            ScoringFailedError: No scorer found a place, or some were lost again and again.
            AutoScaleError: What a scorer ran into: a damaged pool, a file that is not there.
        """
        self._gather()
        if side not in self._dealt:
            pool = open_pool(side.pool)
            self._dealt[side] = pool.scene_ids, shares(pool.log_ids, len(self._scorers))
        scene_ids, dealt = self._dealt[side]
        calls = {
            scorer.score.remote(side, rows, weights): (scorer, rows)
            for scorer, rows in zip(self._scorers, dealt, strict=False)  # a pool of few logs needs fewer
        }
        parts, lost_since_s = [], dict[Any, float]()
        problem = f"scoring was lost {MAX_RETRIES + 1} times or took over placement.ray.stall_timeout_s"
        while calls:
            done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=LOOK_S)
            parts += _answers(done, problem)
            for call in done:
                del calls[call]
            for call, (scorer, rows) in list(calls.items()):
                if not is_lost(scorer):
                    lost_since_s.pop(scorer, None)
                elif time.monotonic() - lost_since_s.setdefault(scorer, time.monotonic()) > self._timeout_s:
                    del calls[call]
                    other = self._without(scorer)
                    calls[other.score.remote(side, rows, weights)] = other, rows
        return in_order(pa.concat_tables(parts, promote_options="default"), scene_ids)

    @property
    def _timeout_s(self) -> float:
        return max(START_TIMEOUT_S, self._config.start_timeout_s)

    def _without(self, scorer: Any) -> Any:
        """Give up a scorer that finds no place any more, until another comes; return one that takes its share."""
        if scorer in self._scorers:  # it may have had two shares
            ray.kill(scorer)
            self._scorers.remove(scorer)
            self._dealt.clear()
            self._start(1)
        if not self._scorers:
            self._fail()
        return self._scorers[0]

    def _gather(self) -> None:
        """Take in the scorers that have found a place: all where there is room, else those that have come so far."""
        if not self._scorers and not self._coming:
            self._start(self._config.num_scorers)
        if not self._coming:
            return
        calls = list(self._coming)
        if not self._scorers:
            ray.wait(calls, num_returns=1, timeout=self._timeout_s)
        come, _ = ray.wait(calls, num_returns=len(calls), timeout=0 if self._scorers else GRACE_S)
        _answers(come, "a scorer could not be started")
        self._scorers += [self._coming.pop(call) for call in come]
        if come:
            self._dealt.clear()
        if not self._scorers:
            self._fail()

    def _fail(self) -> NoReturn:
        what = "CPU and GPU" if self._config.gpus_per_scorer else "CPU"
        free = ray.available_resources().get("CPU", 0)
        self.close()
        raise ScoringFailedError(f"no scorer got its {what} in {self._timeout_s:g} s; free are {free:g} CPUs")

    def _start(self, count: int) -> None:
        # Scoring is a function of its arguments, so a call that a dying actor lost can simply be made again.
        actor: Any = ray.remote(Scorer).options(
            num_cpus=1, num_gpus=self._config.gpus_per_scorer, max_restarts=-1, max_task_retries=MAX_RETRIES
        )
        scorers = [actor.remote(self._planner, self._deadline) for _ in range(count)]
        self._coming |= {scorer.ready.remote(): scorer for scorer in scorers}

    def close(self) -> None:
        """End the actors."""
        for scorer in (*self._scorers, *self._coming.values()):
            ray.kill(scorer)
        self._scorers, self._coming = [], {}


def is_lost(actor: Any) -> bool:
    """Tell whether an actor has no process at present: it waits for a place on the cluster, again or still."""
    address = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    try:
        found: Any = get_actor(actor._actor_id.hex(), address, timeout=math.ceil(LOOK_S))
    except (RayStateApiException, OSError, RuntimeError, ValueError):
        found = None
    if found is not None:
        return found.state != "ALIVE"
    # In a cluster without a dashboard; this process is told how its own actors are once it has called them.
    return actor._get_local_state() not in (None, ALIVE)


def _answers(calls: Sequence[Any], problem: str) -> list[Any]:
    try:
        return ray.get(list(calls))
    except RayActorError as error:
        raise ScoringFailedError(f"{problem}: {str(error).strip().splitlines()[-1]}") from error
    except RayTaskError as error:
        if own := own_error(error):
            raise own from error
        raise


def in_order(table: pa.Table, scene_ids: np.ndarray) -> pa.Table:
    """Return the scores of all shares in pool order, columns in the order of `tasks_scores.score_planner`."""
    row_of = {scene_id: row for row, scene_id in enumerate(table["scene_id"].to_pylist())}
    names = [name for name in sorted(table.column_names) if name not in ("scene_id", "miou")]
    rows = pa.array([row_of[scene_id] for scene_id in scene_ids.tolist()])
    return table.select(["scene_id", *names, "miou"]).take(rows)


def prepare_rows(
    pool: ScenePool, references: Path, rows: np.ndarray, on_read: Callable[[], None]
) -> PreparedPool:
    """Prepare some rows of a pool with reference drives that were made before; `on_read` is called chunk by chunk."""
    known = {version: np.load(references / f"{version}.npy", mmap_mode="r")[rows] for version in RULES}
    # `PoolRows` has of a pool what is asked for here, and no more.
    return prepare_pool(PoolRows(pool, rows, on_read), known)  # type: ignore[arg-type]


def shares(log_ids: np.ndarray, num_shares: int) -> Sequence[np.ndarray]:
    """Deal whole logs out to shares of about equal size, largest logs first; no share is empty.

    Args:
        log_ids: Log of each row.
        num_shares: Most shares wanted, >= 1.

    Returns:
        Sorted int64 rows of each share.
    """
    logs, index_N, counts = np.unique(log_ids, return_inverse=True, return_counts=True)
    loads = np.zeros(min(num_shares, len(logs)))
    share_of = np.zeros(len(logs), dtype=np.int64)
    for log in np.argsort(-counts, kind="stable"):
        share_of[log] = loads.argmin()
        loads[share_of[log]] += counts[log]
    return [np.flatnonzero(share_of[index_N] == share) for share in range(len(loads))]
