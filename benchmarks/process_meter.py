"""What this process and everything below it use: CPU seconds, and memory at its peak."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

SAMPLE_S = 0.5
MEMORY_SAMPLE_S = 2.0


Found = TypeVar("Found")


def cpu_seconds(work: Callable[[], Found]) -> tuple[float, Found]:
    """Return the CPU seconds of a call in this process, and its result."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


class CpuMeter:
    """Adds up the CPU of this process and of all below it, those that end meanwhile included; not its own."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], float] = {}
        self._first: dict[tuple[int, float], float] = {}
        self._own_s = 0.0
        self._end = threading.Event()
        self._sample(first=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self._sample()
            self._own_s = time.thread_time()

    def _sample(self, first: bool = False) -> None:
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                times, key = process.cpu_times(), (process.pid, process.create_time())
            except psutil.NoSuchProcess:
                continue
            self._seconds[key] = times.user + times.system
            if first:
                self._first[key] = self._seconds[key]

    def stop(self) -> float:
        """Return the CPU seconds since the meter was made."""
        self._end.set()
        self._thread.join(30)
        self._sample()
        return sum(value - self._first.get(key, 0.0) for key, value in self._seconds.items()) - self._own_s


class MemoryMeter:
    """Keeps the largest memory of all processes below this one, summed: resident, and with shared pages split.

    The resident sum counts a page once for every process that maps it; the proportional one (PSS, Linux) counts every
    page once and is what the machine must have.
    """

    def __init__(self) -> None:
        self.peak_rss_gib = 0.0
        self.peak_pss_gib = 0.0
        self.peak_processes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(MEMORY_SAMPLE_S):
            rss, pss, num_processes = 0, 0, 0
            for process in psutil.Process().children(recursive=True):
                try:
                    memory = process.memory_full_info()
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                rss, pss, num_processes = rss + memory.rss, pss + memory.pss, num_processes + 1
            self.peak_rss_gib = max(self.peak_rss_gib, rss / 2**30)
            self.peak_pss_gib = max(self.peak_pss_gib, pss / 2**30)
            self.peak_processes = max(self.peak_processes, num_processes)

    def stop(self) -> dict[str, float]:
        """Return the peaks, GiB, and the largest number of processes."""
        self._end.set()
        self._thread.join(30)
        return {
            "peak_rss_gib": self.peak_rss_gib,
            "peak_pss_gib": self.peak_pss_gib,
            "peak_processes": self.peak_processes,
        }
