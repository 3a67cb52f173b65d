"""What happened in a run and when: one line an event, which nobody needs to go on, so that it never ends a run."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from autoscale_ray.canonical import JSON
from autoscale_ray.errors import AutoScaleError
from autoscale_ray.storage import Storage

MAX_WAITING = 10_000
"""Lines held for a storage that does not take them; the oldest go first."""


class EventLog:
    """The events of one writer. A line that cannot be written waits for the next one.

    Args:
        storage: Where the log lies.
        key: Its name there.
        clock: Wall clock, s.
    """

    def __init__(self, storage: Storage, key: str, clock: Callable[[], float]) -> None:
        self._storage, self._key, self._clock = storage, key, clock
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._num_failed = self._num_lost = 0
        self._reason = ""

    def write(self, event: str, **fields: JSON) -> None:
        """Append an event, after those that wait and, where some do, one that says why they had to."""
        self._num_lost += len(self._waiting) == MAX_WAITING
        self._waiting.append(self._line(event, fields))
        try:
            self._storage.append(self._key, b"".join([*self._gap(), *self._waiting]))
        except (AutoScaleError, OSError) as error:
            self._num_failed += 1
            self._reason = str(error)
        else:
            self._waiting.clear()
            self._num_failed = self._num_lost = 0

    def _gap(self) -> list[bytes]:
        if not self._num_failed:
            return []
        told: dict[str, JSON] = {
            "times": self._num_failed,
            "lines_lost": self._num_lost,
            "reason": self._reason,
        }
        return [self._line("log_failed", told)]

    def _line(self, event: str, fields: dict[str, JSON]) -> bytes:
        return json.dumps({"time_s": self._clock(), "event": event, **fields}).encode() + b"\n"


def read_log(storage: Storage) -> list[dict[str, Any]]:
    """Return the events of all writers, oldest writer first; a line that is half written or no event is left out."""
    events = []
    for name in storage.names("events"):
        for line in (storage.read(f"events/{name}") or b"").decode("utf-8", "replace").splitlines():
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if is_event(event):
                    events.append(event)
    return events


def is_event(value: Any) -> bool:
    """Tell whether a value has a name and a time, and nothing of another kind where they and the cluster are told."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    numbers = (value.get("time_s"), value.get("seconds") or 0)
    texts = (value.get("ray_address") or "", value.get("ray_auth_mode") or "")
    return all(isinstance(one, int | float) for one in numbers) and all(isinstance(one, str) for one in texts)
