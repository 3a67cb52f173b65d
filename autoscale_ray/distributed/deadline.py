"""Work that stands still: its process writes where it stands and ends, and Ray starts another."""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from types import TracebackType

RENEWAL_S = 1.0
"""Renewing starts a thread, so it happens this often at most."""


class Deadline:
    """Ends this process when the work inside does not go on; its stacks are left in a file.

    The process is ended from outside the interpreter: what hangs in a lock, a socket or a collective cannot be
    interrupted from within.

    Args:
        seconds: Longest time between two renewals.
        folder: Receives ``<process>.txt`` with the stack of every thread.
    """

    def __init__(self, seconds: float, folder: Path) -> None:
        self._seconds, self._folder = seconds, folder
        self._renewed_s = 0.0

    def __enter__(self) -> Deadline:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{os.uname().nodename}-{os.getpid()}.txt"
        self._file = self._path.open("w", encoding="utf-8")
        self._arm()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lift()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def renew(self) -> None:
        """Say that the work goes on."""
        if time.monotonic() - self._renewed_s > min(RENEWAL_S, self._seconds / 4):
            self._arm()

    def lift(self) -> None:
        """Wait for ever from now on."""
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        self._renewed_s = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)
