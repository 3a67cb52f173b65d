"""The board on which the loop posts training tasks and the workers of the Train run fetch them; no Ray in it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.config import PlannerConfig, RepresentationConfig
from autoscale_ray.errors import AutoScaleError

MAX_SAME_FAILURES = 2
"""Times a task may fail with the same error; a lost worker gives another error or none."""


class TrainingFailedError(AutoScaleError, RuntimeError):
    """Training a planner failed in the same way again."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One planner to train: ids and paths, never scenes."""

    task_id: str
    """Says what is trained, so that a checkpoint of this task is known after any restart."""
    planner: PlannerConfig
    features: tuple[str, ...]
    """Folders of planner features; their rows follow one another."""
    rows: np.ndarray
    """int64 rows to train on."""
    seed: int
    start: str | None = None
    """Folder of the weights to begin with; None begins anew."""


@dataclass(frozen=True, slots=True)
class EncoderTask:
    """The encoder to train."""

    task_id: str
    settings: RepresentationConfig
    pools: tuple[Path, ...]
    """Real and synthetic pool."""
    seed: int


AnyTask = Task | EncoderTask


class TaskBoard:
    """One task at a time, from the loop's thread to whichever worker asks; safe to call again after a loss."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._task: AnyTask | None = None
        self._files: Mapping[str, bytes] | None = None
        self._last: tuple[str, Mapping[str, bytes]] | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._failures: Counter[tuple[Any, ...]] = Counter()
        self.num_delivered = 0
        self.newest: Callable[[], str | None] = lambda: None
        """Names the last checkpoint of the Train run."""
        self._posted_s = 0.0
        self.begin: Callable[[], None] = lambda: None
        """Called with the first task, to bring workers who will ask for it."""
        self.hand_over_s: list[float] = []
        """Seconds from posting a task to a worker having asked for it, task by task."""

    def post(self, task: AnyTask) -> Mapping[str, bytes]:
        """Post a task and wait until it is delivered; return its files.

        A task that is the last one again, such as that of two arms that chose the same scenes, is not trained twice.

        Raises:
            Exception: Whatever ended the training run.
        """
        if self._last is not None and self._last[0] == task.task_id:
            return self._last[1]
        begin, self.begin = self.begin, lambda: None
        begin()
        with self._changed:
            self._task, self._files, self._posted_s = task, None, time.perf_counter()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._files is not None or self._error is not None)
            if self._files is None:
                assert self._error is not None
                raise self._error
            self._task, self._last = None, (task.task_id, self._files)
            return self._files

    def fetch(self, last: str | None, wait_s: float) -> AnyTask | str:
        """Return the open task that is not the worker's last, ``wait`` while there is none, ``end`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open(last) or self._closed, wait_s)
            if self._is_open(last):
                assert self._task is not None
                if self._posted_s:
                    self.hand_over_s.append(time.perf_counter() - self._posted_s)
                    self._posted_s = 0.0
                return self._task
            return "end" if self._closed else "wait"

    def _is_open(self, last: str | None) -> bool:
        return (
            not self._closed and self._task is not None and self._files is None and self._task.task_id != last
        )

    def deliver(self, task_id: str, files: Mapping[str, bytes]) -> None:
        """Take the files of a task; those of any other task come from a worker that was late."""
        with self._changed:
            if self._task is not None and self._task.task_id == task_id and self._files is None:
                self._files = files
                self.num_delivered += 1
                self._changed.notify_all()

    def progress(self) -> tuple[int, str | None]:
        """Return what changes with every sign that training gets on: a delivered task, a checkpoint."""
        return self.num_delivered, self.newest()

    def report_failure(self, task_id: str, rank: int, text: str, own: AutoScaleError | None = None) -> None:
        """Take a worker's error: one that comes back to the same rank word for word is no accident and ends the run.

        When a worker dies, all others lose their connection to it in the same words; that is one accident. Where there
        was progress between the two, they are two accidents.

        Args:
            task_id: The task in hand.
            rank: The worker.
            text: The error with its traceback.
            own: The same where a user can mend it.
        """
        what = (*self.progress(), task_id, rank, text)
        self._failures[what] += 1
        if self._failures[what] >= MAX_SAME_FAILURES:
            self.fail(own or TrainingFailedError(text))

    def fail(self, error: BaseException) -> None:
        """Wake the loop with what ended the training run."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Tell whether no task will be asked of workers again."""
        return self._closed or self._error is not None

    def close(self) -> None:
        """Send the workers home."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
