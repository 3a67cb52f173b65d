"""Real SIGKILLs at random moments: the run goes on to the same chain, byte for byte (P1, P3)."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from storage_shims import IDENTITY, play

from autoscale_ray.artifacts import RunStore
from autoscale_ray.journal import read_rounds

NUM_ROUNDS = 24
PROCESSES = multiprocessing.get_context("forkserver")
"""Writers are processes of their own, forked from one that has imported everything: so 200 take seconds."""
PROCESSES.set_forkserver_preload([Path(__file__).stem])


def chain_digest(run_dir: Path) -> str:
    files = sorted((run_dir / "rounds").iterdir())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    """Let the process that is forked find this module; without it every writer would import everything anew."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[2]}")


def write_rounds(run_dir: str, told: Connection) -> None:
    """Write a run from where it stands; say so at the beginning, and name every round once it is acknowledged."""
    told.send(-1)
    run = RunStore.open(run_dir, IDENTITY)
    for count in range(len(run.rounds()), NUM_ROUNDS):
        play(run, count + 1)
        told.send(count)


def kill_a_writer(run_dir: Path, num_rounds: int, delay_s: float) -> tuple[int, bool]:
    """Start a writer and kill it some time after it acknowledged some rounds.

    Returns:
        Rounds acknowledged, and whether the run had ended by then.
    """
    hears, tells = PROCESSES.Pipe(duplex=False)
    writer = PROCESSES.Process(target=write_rounds, args=(str(run_dir), tells))
    writer.start()
    tells.close()
    last = -1
    with contextlib.suppress(EOFError):
        for _ in range(1 + num_rounds):
            last = hears.recv()
        time.sleep(delay_s)  # the moment of the kill is drawn; nothing waits for it
        writer.kill()
        while True:
            last = hears.recv()
    writer.join(30)
    hears.close()
    return last + 1, writer.exitcode == 0


def campaign(folder: Path, num_runs: int, kills_per_run: int, seed: int) -> tuple[int, list[int]]:
    """Kill writers of several runs; return the kills that hit and the rounds found after each."""
    generator = np.random.default_rng(seed)
    reference = folder / "reference"
    play(RunStore.open(str(reference), IDENTITY), NUM_ROUNDS)
    hits, found = 0, []
    for number in range(num_runs):
        run_dir = folder / f"run{number}"
        for _ in range(kills_per_run):
            moment = int(generator.integers(3)), float(generator.uniform(0.0, 0.01))
            acknowledged, finished = kill_a_writer(run_dir, *moment)
            hits += not finished
            if (run_dir / "run.json").exists():
                found.append(len(read_rounds(str(run_dir))))
                assert found[-1] >= acknowledged, f"seed {seed}: an acknowledged round is gone"
        play(RunStore.open(str(run_dir), IDENTITY), NUM_ROUNDS)
        assert chain_digest(run_dir) == chain_digest(reference), f"seed {seed}, run {number}"
        assert not list((run_dir / "tmp").iterdir())
        assert not list((run_dir / "scratch").iterdir())
    return hits, found


@pytest.mark.timeout(300)
def test_two_hundred_random_kills_change_nothing(tmp_path: Path) -> None:
    hits, found = campaign(tmp_path, num_runs=20, kills_per_run=14, seed=3)
    print(f"{hits} SIGKILLs, 20 runs, rounds found after a kill: {sorted(set(found))}, 0 differing chains")
    assert hits >= 200
    assert len(set(found)) >= 4, "the kills fell too close together to say anything"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_random_kills_change_nothing(tmp_path: Path) -> None:
    hits, _ = campaign(tmp_path, num_runs=200, kills_per_run=14, seed=4)
    print(f"{hits} SIGKILLs, 200 runs, 0 differing chains")
    assert hits >= 2000
