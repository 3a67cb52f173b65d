"""A writer killed at every storage call: no partial round, no lost round, the same chain (P1-P3)."""

from __future__ import annotations

import errno
import itertools
import shutil
from pathlib import Path

import obstore.store
import pytest
from storage_shims import IDENTITY, CrashAt, HookedStore, KilledError, MemoryDisk, play

from autoscale_ray.artifacts import RunStore
from autoscale_ray.journal import read_chain
from autoscale_ray.object_storage import ObjectStorage
from autoscale_ray.storage import FolderStorage, Storage

DISK_MODES = ("before", "after", "torn", "lost")
OBJECT_MODES = ("before", "after")


class World:
    """One storage that survives its writers; each opening is a new process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, hook=None) -> Storage:
        raise NotImplementedError

    def after_crash(self, mode: str) -> None:
        """Apply what the crash took with it."""

    def write(self, hook=None, acknowledged=None) -> None:
        play(RunStore.claim(self.open(hook), IDENTITY, clock=lambda: 0.0), acknowledged=acknowledged)

    def chain(self) -> tuple[str, ...]:
        storage = self.open()
        if storage.read("run.json") is None:
            return ()
        return tuple(record.sha256 for record in read_chain(storage))


class DiskWorld(World):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.disk = MemoryDisk(folder)

    def open(self, hook=None) -> Storage:
        self.disk.hook = hook
        return FolderStorage(self.disk)

    def after_crash(self, mode: str) -> None:
        if mode == "lost":
            self.disk.cut_power()


class ObjectWorld(World):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.store = obstore.store.MemoryStore()

    def open(self, hook=None) -> Storage:
        return ObjectStorage(HookedStore(self.store, hook), "mem://run", self.folder, lambda _: None)


WORLDS = {"disk": (DiskWorld, DISK_MODES), "objects": (ObjectWorld, OBJECT_MODES)}


def undisturbed(world: World) -> tuple[tuple[str, ...], int]:
    """Return the chain and the number of storage calls of a run that nobody disturbs."""
    count = CrashAt(0, "never")
    world.write(count)
    return world.chain(), count.calls


def crash(world: World, at: int, mode: str, reference: tuple[str, ...], acknowledged: list[str]) -> bool:
    """Run until the crash; return whether it happened. A reader sees whole rounds, and all acknowledged."""
    try:
        world.write(CrashAt(at, mode), acknowledged)
    except KilledError:
        world.after_crash(mode)
        seen = world.chain()
        assert seen == reference[: len(seen)]
        assert set(acknowledged) <= set(seen)
        return True
    return False


@pytest.mark.parametrize("kind", WORLDS)
def test_reader_at_every_call_sees_whole_rounds_only(kind: str, tmp_path: Path) -> None:
    make, _ = WORLDS[kind]
    reference, _ = undisturbed(make(tmp_path / "reference"))
    world = make(tmp_path / "polled")
    acknowledged: list[str] = []
    seen_lengths = set()

    def poll(call, key, perform, tear=None):
        hook = world.disk.hook if kind == "disk" else None
        seen = world.chain()
        assert seen == reference[: len(seen)]
        assert list(seen[: len(acknowledged)]) == acknowledged
        seen_lengths.add(len(seen))
        if kind == "disk":
            world.disk.hook = hook
        return perform()

    world.write(poll, acknowledged)
    assert seen_lengths == {0, 1, 2}
    assert world.chain() == reference


@pytest.mark.parametrize("kind", WORLDS)
def test_a_crash_at_every_call_changes_nothing(kind: str, tmp_path: Path) -> None:
    make, modes = WORLDS[kind]
    reference, num_calls = undisturbed(make(tmp_path / "reference"))
    assert len(reference) == 2
    for mode, at in itertools.product(modes, range(1, num_calls + 1)):
        world = make(tmp_path / f"{mode}-{at}")
        assert crash(world, at, mode, reference, []), (mode, at)
        world.write()
        assert world.chain() == reference, (mode, at)
        leftovers(world)
    print(f"{kind}: {num_calls} calls x {len(modes)} modes, 0 partial, 0 lost, 0 differing")


def test_a_disk_that_is_full_from_any_call_on_is_named_and_changes_nothing(tmp_path: Path) -> None:
    """P8: half of a file fits, then nothing any more; with room again the run goes on to the same chain."""
    reference, num_calls = undisturbed(DiskWorld(tmp_path / "reference"))
    refused = []
    for at in range(1, num_calls + 1):
        world, acknowledged, calls = DiskWorld(tmp_path / str(at)), [], itertools.count(1)

        def fill(call, key, perform, tear=None, at=at, calls=calls):
            if next(calls) < at or call not in ("write", "append", "make_folder", "link"):
                return perform()
            if tear is not None:
                tear()
            raise OSError(errno.ENOSPC, "No space left on device", key)

        try:
            world.write(fill, acknowledged)
        except OSError as error:
            refused.append(str(error))
        seen = world.chain()
        assert seen == reference[: len(seen)]
        assert set(acknowledged) <= set(seen)
        world.write()
        assert world.chain() == reference, at
        leftovers(world)
    assert len(refused) > num_calls // 2
    assert all("No space left on device" in line for line in refused)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [pytest.param("disk", marks=pytest.mark.slow), "objects"])
def test_a_second_crash_during_recovery_changes_nothing(kind: str, tmp_path: Path) -> None:
    make, modes = WORLDS[kind]
    reference, num_calls = undisturbed(make(tmp_path / "reference"))
    trials = 0
    for first, at in itertools.product(modes[1:], range(1, num_calls + 1)):
        for again in itertools.count(1):
            second = modes[(at + again) % len(modes)]
            world, acknowledged = make(tmp_path / f"{first}-{at}-{again}"), []
            crash(world, at, first, reference, acknowledged)
            if not crash(world, again, second, reference, acknowledged):
                break
            world.write()
            assert world.chain() == reference, (first, at, second, again)
            shutil.rmtree(world.folder)
            trials += 1
    print(f"{kind}: {trials} double crashes, 0 differing chains")


def leftovers(world: World) -> None:
    """Refuse temporary files after a run that ended well."""
    storage = world.open()
    assert storage.names("tmp") == ()
    assert not any(world.folder.glob("scratch/*"))  # on disk
    assert not any(world.folder.glob("runs/*/scratch/*/*"))  # of a bucket
