"""Several writers of one run as real processes: the run never forks (P4)."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from autoscale_ray.artifacts import RunStore, StaleWriterError
from autoscale_ray.errors import ArtifactError
from autoscale_ray.storage import Disk, FolderStorage
from tests.unit.storage_shims import IDENTITY, play

NUM_WRITERS = 4
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


class LocklessDisk(Disk):
    """A folder on a file system without locks: nothing but the fence keeps writers apart."""

    def lease(self, key: str) -> None:
        """Lock nothing."""


def write(run_dir: str, disk: type[Disk], together: Barrier, told: Connection) -> None:
    """Write six rounds when all are ready; say how it ended."""
    together.wait(60)
    try:
        play(RunStore.claim(FolderStorage(disk(Path(run_dir))), IDENTITY), 6)
        told.send("finished")
    except StaleWriterError:
        told.send("superseded")
    except ArtifactError as error:
        told.send("refused" if "another process" in str(error) else str(error))


def contest(run_dir: str, disk: type[Disk]) -> list[str]:
    """Let writers go at once, and return how each of them ended."""
    together, ends = (
        PROCESSES.Barrier(NUM_WRITERS),
        [PROCESSES.Pipe(duplex=False) for _ in range(NUM_WRITERS)],
    )
    writers = [PROCESSES.Process(target=write, args=(run_dir, disk, together, tells)) for _, tells in ends]
    for writer, (_, tells) in zip(writers, ends, strict=True):
        writer.start()
        tells.close()  # so that the end of a writer is heard
    ended = []
    for writer, (hears, _) in zip(writers, ends, strict=True):
        assert hears.poll(60), "a writer does not end"
        ended.append(hears.recv())
        writer.join(60)
        hears.close()
    return ended


@pytest.mark.timeout(300)
def test_fifty_contests_of_four_processes_never_fork(tmp_path: Path, monkeypatch) -> None:
    # For the process that is forked: without it every writer would import everything anew.
    folders = (Path(__file__).parent, Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, folders)))
    play(RunStore.open(str(tmp_path / "alone"), IDENTITY), 6)
    reference = chain(tmp_path / "alone")
    endings: dict[str, int] = {}
    for number in range(50):
        ended = contest(str(tmp_path / f"run{number}"), (Disk, LocklessDisk)[number % 2])
        assert set(ended) <= {"finished", "superseded", "refused"}, ended
        assert "finished" in ended
        assert chain(tmp_path / f"run{number}") == reference
        for word in ended:
            endings[word] = endings.get(word, 0) + 1
    assert endings["superseded"], "nobody was ever in another's way"
    print(f"50 contests of {NUM_WRITERS} processes: {endings}, 0 forks")


def chain(run_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((run_dir / "rounds").iterdir()))
