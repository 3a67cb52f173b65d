"""Real SIGKILLs at random moments: the run goes on to the same chain, byte for byte (P1, P3)."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from storage_shims import IDENTITY, play

from autoscale_ray.artifacts import RunStore, read_rounds

NUM_ROUNDS = 24


def chain_digest(run_dir: Path) -> str:
    files = sorted((run_dir / "rounds").iterdir())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def start(run_dir: Path) -> subprocess.Popen:
    """Start a writer; it says so when it begins, and names every round once it is acknowledged."""
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
    command = [sys.executable, str(Path(__file__)), str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_after(process: subprocess.Popen, num_rounds: int, delay_s: float) -> tuple[int, bool]:
    """Kill a writer some time after it acknowledged some rounds.

    Returns:
        Rounds acknowledged, and whether the run had ended by then.
    """
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(1 + num_rounds)]
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.stdout.close()
    finished = process.wait(30) == 0
    whole = [line for line in lines if line.startswith("round ") and line.endswith(".\n")]
    return (int(whole[-1][6:-2]) + 1 if whole else 0), finished


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
            acknowledged, finished = kill_after(start(run_dir), *moment)
            hits += not finished
            if (run_dir / "run.json").exists():
                found.append(len(read_rounds(str(run_dir))))
                assert found[-1] >= acknowledged, f"seed {seed}: an acknowledged round is gone"
        play(RunStore.open(str(run_dir), IDENTITY), NUM_ROUNDS)
        assert chain_digest(run_dir) == chain_digest(reference), f"seed {seed}, run {number}"
        assert not list((run_dir / "tmp").iterdir())
        assert not list((run_dir / "scratch").iterdir())
    return hits, found


@pytest.mark.timeout(120)
def test_random_kills_change_nothing(tmp_path: Path) -> None:
    hits, found = campaign(tmp_path, num_runs=4, kills_per_run=6, seed=3)
    assert hits >= 12
    assert len(set(found)) >= 4, "the kills fell too close together to say anything"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_random_kills_change_nothing(tmp_path: Path) -> None:
    hits, found = campaign(tmp_path, num_runs=20, kills_per_run=14, seed=4)
    print(f"{hits} SIGKILLs, 20 runs, rounds found after a kill: {sorted(set(found))}, 0 differing chains")
    assert hits >= 200


if __name__ == "__main__":
    print("begin", flush=True)
    run = RunStore.open(sys.argv[1], IDENTITY)
    for count in range(len(run.rounds()), NUM_ROUNDS):
        play(run, count + 1)
        print(f"round {count}.", flush=True)
