"""Several writers of one run as real processes: the run never forks (P4)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from storage_shims import IDENTITY, play
from autoscale_ray.artifacts import RunStore, StaleWriterError
from autoscale_ray.errors import ArtifactError
print("ready", flush=True)
sys.stdin.readline()
try:
    play(RunStore.open(sys.argv[1], IDENTITY), 6)
    print("finished")
except StaleWriterError:
    print("superseded")
except ArtifactError as error:
    print("refused" if "another process" in str(error) else error)
"""
SHIMS = str(Path(__file__).parents[1] / "unit")
NUM_WRITERS = 4


def contest(run_dir: str) -> list[str]:
    """Start writers, let all of them go at once, and return how each of them ended."""
    command, pipe = [sys.executable, "-c", WRITER, run_dir, SHIMS], subprocess.PIPE
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(NUM_WRITERS)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    return [writer.communicate(timeout=60)[0].strip() for writer in writers]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_contests_of_four_processes_never_fork(tmp_path: Path) -> None:
    (reference,) = {chain(tmp_path / "alone") for _ in range(1) if contest(str(tmp_path / "alone"))}
    endings: dict[str, int] = {}
    for number in range(50):
        ended = contest(str(tmp_path / f"run{number}"))
        assert set(ended) <= {"finished", "superseded", "refused"}, ended
        assert "finished" in ended
        assert chain(tmp_path / f"run{number}") == reference
        for word in ended:
            endings[word] = endings.get(word, 0) + 1
    print(f"50 contests of {NUM_WRITERS} processes: {endings}, 0 forks")


def chain(run_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((run_dir / "rounds").iterdir()))
