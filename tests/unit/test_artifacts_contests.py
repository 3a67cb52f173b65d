"""Several drivers on one run: one writer for each round, the others stop with a named error (P4)."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import threading
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import obstore.store
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_shims import IDENTITY, HookedStore, MemoryDisk

from autoscale_ray.artifacts import Artifact, RunStore, StaleWriterError
from autoscale_ray.errors import ArtifactError
from autoscale_ray.journal import read_chain
from autoscale_ray.object_storage import ObjectStorage
from autoscale_ray.storage import Disk, FolderStorage, is_running, this_process

NUM_ROUNDS = 3


class Baton:
    """Lets one thread run at a time, from storage call to storage call, in an order given beforehand."""

    def __init__(self, order: list[int], num_threads: int) -> None:
        self.order, self.position = order, 0
        self.alive = set(range(num_threads))
        self.turn = threading.Condition()
        self.holder = self._next()

    def _next(self) -> int | None:
        if not self.alive:
            return None
        wanted = self.order[self.position % len(self.order)] if self.order else 0
        self.position += 1
        return sorted(self.alive)[wanted % len(self.alive)]

    def wait(self, thread: int) -> None:
        with self.turn:
            assert self.turn.wait_for(lambda: self.holder == thread, timeout=30)

    def pass_on(self, thread: int, leave: bool = False) -> None:
        with self.turn:
            if leave:
                self.alive.discard(thread)
            self.holder = self._next()
            self.turn.notify_all()


def contest(open_storage, order: list[int], num_drivers: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Run drivers that each publish rounds of their own; return what each was told, and who was stopped."""
    baton = Baton(order, num_drivers)
    acknowledged: list[tuple[int, int]] = []
    stopped: list[int] = []
    failures: list[BaseException] = []

    def hook(call, key, perform, tear=None):
        thread = int(threading.current_thread().name)
        baton.pass_on(thread)
        baton.wait(thread)
        return perform()

    def drive(driver: int) -> None:
        baton.wait(driver)
        try:
            store = RunStore.claim(open_storage(hook), IDENTITY, clock=lambda: 0.0)
            for index in range(len(store.rounds()), NUM_ROUNDS):
                store.commit_round(index, {"driver": driver})
                acknowledged.append((index, driver))
        except StaleWriterError:
            stopped.append(driver)
        except BaseException as error:
            failures.append(error)
        baton.pass_on(driver, leave=True)

    threads = [
        threading.Thread(target=drive, args=(number,), name=str(number)) for number in range(num_drivers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures, failures
    return acknowledged, stopped


def check_contest(make_open, order: list[int], num_drivers: int) -> None:
    open_storage = make_open()
    acknowledged, stopped = contest(open_storage, order, num_drivers)
    chain = read_chain(open_storage(None))
    writers = [record.payload["driver"] for record in chain]
    assert len(chain) == NUM_ROUNDS
    assert max(Counter(index for index, _ in acknowledged).values()) == 1
    assert all(writers[index] == driver for index, driver in acknowledged)
    assert len(stopped) < num_drivers


ORDERS = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(order=ORDERS, num_drivers=st.sampled_from([2, 2, 4]))
def test_contest_on_a_disk_never_forks(order: list[int], num_drivers: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("contest")

    def make_open():
        disk = MemoryDisk(folder)

        def open_storage(hook):
            disk.hook = hook
            return FolderStorage(disk)

        return open_storage

    check_contest(make_open, order, num_drivers)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(order=ORDERS, num_drivers=st.sampled_from([2, 2, 4]))
def test_contest_on_an_object_store_never_forks(order: list[int], num_drivers: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("contest")

    def make_open():
        store = obstore.store.MemoryStore()
        return lambda hook: ObjectStorage(HookedStore(store, hook), "mem://run", folder, lambda _: None)

    check_contest(make_open, order, num_drivers)


def test_a_paused_driver_wakes_up_superseded_and_changes_nothing(tmp_path: Path) -> None:
    paused = RunStore.open(str(tmp_path), IDENTITY)
    paused.commit_round(0, {"by": "first"})
    other = RunStore.open(str(tmp_path), IDENTITY)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(StaleWriterError, match="writer 1 was superseded by writer 2"):
        paused.commit_round(1, {"by": "first"})
    with pytest.raises(StaleWriterError):
        paused.stage("late", {}, lambda folder: {})
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    assert other.commit_round(1, {"by": "second"}).payload == {"by": "second"}


def test_a_stage_whose_files_were_swept_is_not_recorded(tmp_path: Path) -> None:
    """Its successor sweeps what a writer has just built: the record must not name fewer files."""
    first = RunStore.open(str(tmp_path), IDENTITY)

    def build(folder: Path) -> dict[str, int]:
        return {"size": (folder / "part.bin").write_bytes(b"content")}

    def build_and_sleep(folder: Path) -> dict[str, int]:
        told = build(folder)
        RunStore.open(str(tmp_path), IDENTITY)
        return told

    with pytest.raises(StaleWriterError):
        first.stage("pool", {}, build_and_sleep)
    found = RunStore.open(str(tmp_path), IDENTITY).stage("pool", {}, build)
    assert found.path("part.bin").read_bytes() == b"content"


def test_a_late_sweep_spares_the_writer_that_came_after(tmp_path: Path) -> None:
    """A writer may stand still between its claim and its sweep, and be superseded meanwhile."""

    class SleepyStorage(FolderStorage):
        def sweep(self, leftovers: tuple[str, ...]) -> None:
            def build(folder: Path) -> dict[str, int]:
                size = (folder / "part.bin").write_bytes(b"content")
                super(SleepyStorage, self).sweep(leftovers)
                return {"size": size}

            built.append(RunStore.open(str(tmp_path), IDENTITY).stage("pool", {}, build))

    built: list[Artifact] = []
    (tmp_path / "scratch" / "dead-1").mkdir(parents=True)
    RunStore.claim(SleepyStorage(Disk(tmp_path)), IDENTITY)
    assert built[0].path("part.bin").read_bytes() == b"content"
    assert not (tmp_path / "scratch" / "dead-1").exists()


def _hold(run_dir: str, ready, leave) -> None:
    RunStore.open(run_dir, IDENTITY)
    ready.set()
    leave.wait(60)


def test_a_second_process_on_the_same_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    """At once, and by name: a process of this machine is seen to run."""
    monkeypatch.setattr("autoscale_ray.storage.LEASE_WAIT_S", 0.1)
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, leave))
    holder.start()
    try:
        assert ready.wait(60)
        started_s = time.monotonic()
        with pytest.raises(
            ArtifactError, match=f"another process is running in this folder .*-{holder.pid}-"
        ):
            RunStore.open(str(tmp_path), IDENTITY)
        assert time.monotonic() - started_s < 10
    finally:
        leave.set()
        holder.join(30)
    assert RunStore.open(str(tmp_path), IDENTITY).epoch == 2


HOST, NUMBER, START = this_process().rsplit("-", 2)


@pytest.mark.parametrize(
    ("holder", "runs", "is_refused"),
    [
        (this_process(), True, True),
        (f"{HOST}-{NUMBER}-{int(START) - 1}", False, False),  # the number belongs to another process by now
        (f"elsewhere-{NUMBER}-{START}", None, False),
        ("", None, False),  # made by an earlier version, or locked and not yet written
        ("-\0/", None, False),
    ],
    ids=["running", "number taken over", "elsewhere", "empty", "damaged"],
)
def test_the_lock_of_a_node_that_died_is_waited_for(
    holder: str, runs: bool | None, is_refused: bool, tmp_path: Path, monkeypatch
) -> None:
    """An NFS server holds it for a while; only a holder that is seen to run is refused before."""
    waited = itertools.count()
    monkeypatch.setattr("autoscale_ray.storage._lock", lambda descriptor: next(waited) >= 10)
    monkeypatch.setattr("autoscale_ray.storage.LEASE_WAIT_S", 0.1)
    (tmp_path / "lease").write_text(holder)
    assert is_running(holder) is runs
    if is_refused:
        with pytest.raises(ArtifactError, match="another process is running in this folder"):
            RunStore.open(str(tmp_path), IDENTITY)
    else:
        assert RunStore.open(str(tmp_path), IDENTITY).epoch == 1
        assert (tmp_path / "lease").read_text() == this_process()


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_taken(name: str, tmp_path: Path, monkeypatch) -> None:
    """Lustre without `flock` answers the last, which used to be refused."""
    monkeypatch.setattr(
        "autoscale_ray.storage.fcntl.lockf", Mock(side_effect=OSError(getattr(errno, name), "no"))
    )
    assert RunStore.open(str(tmp_path), IDENTITY).epoch == 1


def test_other_errors_of_a_lock_are_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("autoscale_ray.storage.fcntl.lockf", Mock(side_effect=OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        RunStore.open(str(tmp_path), IDENTITY)


def test_a_lock_that_is_never_given_back_is_refused_in_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("autoscale_ray.storage._lock", lambda descriptor: False)
    monkeypatch.setattr("autoscale_ray.storage.LEASE_LOST_S", 0.2)
    (tmp_path / "lease").write_text("elsewhere-1-2")
    with pytest.raises(ArtifactError, match=r"another process is running in this folder .*elsewhere-1-2"):
        RunStore.open(str(tmp_path), IDENTITY)
