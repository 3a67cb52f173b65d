"""Steps that workers share: the same bits, the same order, whatever the number of workers and the stops between."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from autoscale_ray import tasks
from autoscale_ray.config import PlannerConfig
from autoscale_ray.config_file import load_config
from autoscale_ray.distributed.steps import Place, train_shared, worker_places
from autoscale_ray.inputs import open_inputs
from autoscale_ray.planning.order import batch_places
from autoscale_ray.planning.spec import planner_spec
from autoscale_ray.planning.training import TrainState, train
from tests.ray.conftest import free_port
from tests.ray.small_run import SMALL

pytestmark = pytest.mark.timeout(300)
CONFIG = PlannerConfig(num_steps=12, hidden_size=32, batch_size=32)
ROWS, SEED = np.arange(5, 60), 3


@pytest.fixture(scope="module")
def features(reference, tmp_path_factory) -> Path:
    """Return the folder of the planner features of the small real pool."""
    spec, folder = planner_spec(CONFIG), tmp_path_factory.mktemp("features")
    inputs = open_inputs(load_config(None, SMALL), reference / "pools")
    spec.save_features(spec.features(inputs.pools["real"]), folder)
    return folder


GROUPS = [("shared", 2), ("shared", 3), ("shared", 4), ("plain", 2), ("plain", 3)]


def _work(rank: int, features: Path, out: Path) -> None:
    spec = planner_spec(CONFIG)
    for kind, num_workers in GROUPS:
        if rank >= num_workers:
            continue
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{out}/meet-{kind}-{num_workers}", rank=rank, world_size=num_workers
        )
        config = PlannerConfig(num_steps=12, hidden_size=32, batch_size=32, deterministic=kind == "shared")
        made = train_shared(spec.load_features(features), ROWS, config, SEED, Place(rank, num_workers))
        spec.save_weights(made, out / f"{kind}-{num_workers}-{rank}")
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory) -> Path:
    """Return the folder with what every worker of every group ended with."""
    out = tmp_path_factory.mktemp("trained")
    torch.multiprocessing.spawn(_work, (features, out), 4)
    return out


def weights_of(folder: Path) -> torch.Tensor:
    found = planner_spec(CONFIG).load_weights(folder)
    return torch.cat([tensor.flatten() for tensor in (*found.model.values(), *found.average.values())])


@pytest.fixture(scope="module")
def alone(features, tmp_path_factory) -> torch.Tensor:
    spec, folder = planner_spec(CONFIG), tmp_path_factory.mktemp("alone")
    spec.save_weights(train(spec.load_features(features), ROWS, CONFIG, SEED), folder)
    return weights_of(folder)


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_workers_together_end_with_the_bits_of_one_process(num_workers: int, trained, alone) -> None:
    for rank in range(num_workers):
        assert torch.equal(weights_of(trained / f"shared-{num_workers}-{rank}"), alone)


def test_one_worker_ends_with_the_bits_of_one_process(features, alone, tmp_path) -> None:
    spec = planner_spec(CONFIG)
    spec.save_weights(train_shared(spec.load_features(features), ROWS, CONFIG, SEED, Place()), tmp_path)
    assert torch.equal(weights_of(tmp_path), alone)


def test_a_warm_start_begins_with_the_averaged_weights_and_fresh_moments(features, tmp_path) -> None:
    spec = planner_spec(CONFIG)
    loaded = spec.load_features(features)
    spec.save_weights(train(loaded, ROWS, CONFIG, SEED), tmp_path / "before")
    before = spec.load_weights(tmp_path / "before")
    still = planner_spec(dataclasses.replace(CONFIG, num_steps=0))
    (tmp_path / "still").mkdir()
    tasks.train_planner(still, loaded, ROWS, 9, tmp_path / "before", tmp_path / "still")
    found = still.load_weights(tmp_path / "still")
    for name, tensor in before.average.items():
        assert torch.equal(found.average[name], tensor)
    assert not any(tensor.any() for tensor in moments(tasks.warm_state(before)))


def moments(state: TrainState) -> tuple[torch.Tensor, torch.Tensor]:
    assert state.step == 0
    return state.first_moment_W, state.second_moment_W


@pytest.mark.parametrize("num_workers", [2, 3])
def test_plain_ddp_makes_the_same_steps_up_to_rounding(num_workers: int, trained, alone) -> None:
    """float32, 12 steps: gradients differ in the last bits, and AdamW divides them by their own size."""
    first = weights_of(trained / f"plain-{num_workers}-0")
    for rank in range(num_workers):
        assert torch.equal(weights_of(trained / f"plain-{num_workers}-{rank}"), first)
    moved = (alone - first).abs().max()
    assert moved < 2e-3
    assert (alone - first).norm() < 1e-2 * alone.norm()


def test_the_order_of_samples_is_the_same_over_400_schedules() -> None:
    """P7: every pair of worker counts, changed at every batch, twice, with workers done in any order."""
    batch, num_scenes, num_steps = 28, 100, 16
    expected = [batch_places(SEED, step, batch, num_scenes).tolist() for step in range(num_steps)]
    generator = np.random.default_rng(7)
    seen, num_schedules = set(), 0
    for first, second in itertools.product((1, 2, 3, 4, 7), repeat=2):
        for stop in range(num_steps):
            again = int(generator.integers(stop, num_steps))
            counts = [first] * stop + [second] * (again - stop) + [first] * (num_steps - again)
            order = [_played(step, count, batch, num_scenes, generator) for step, count in enumerate(counts)]
            seen.add(str(order))
            num_schedules += 1
    assert num_schedules == 400
    assert seen == {str(expected)}


def _played(
    step: int, num_workers: int, batch: int, num_scenes: int, generator: np.random.Generator
) -> list[int]:
    """Let workers finish in a random order and put what they hold in the order of their ranks."""
    held = {
        int(rank): worker_places(SEED, step, batch, num_scenes, Place(int(rank), num_workers)).ravel()
        for rank in generator.permutation(num_workers)
    }
    return np.concatenate([held[rank] for rank in range(num_workers)]).tolist()


STALL = """
import os, socket, sys, threading, time
import torch.distributed as d
from pathlib import Path
from autoscale_ray.distributed.deadline import Deadline

with Deadline(1, Path(sys.argv[1])) as deadline:
    for _ in range(3):
        deadline.renew()
    {hang}
"""
HANGS = {
    "a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "a socket": "a, b = socket.socketpair(); a.recv(1)",
    "a pipe": "r, w = os.pipe(); os.read(r, 1)",
    "a thread": "threading.Thread(target=threading.Event().wait).start(); threading.Event().wait()",
    "a collective": (
        "d.init_process_group('gloo', init_method='tcp://127.0.0.1:{port}', rank=0, world_size=2)"
    ),
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_stall_ends_its_process_and_leaves_its_stacks(hang: str, tmp_path: Path) -> None:
    """P8: whatever it hangs in, the process is gone within its deadline and says where it stood."""
    code = STALL.format(hang=HANGS[hang].format(port=free_port()))
    done = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=30, check=False)
    assert done.returncode == 1
    (stacks,) = tmp_path.glob("*.txt")
    assert "most recent call first" in stacks.read_text()


def test_work_that_goes_on_is_left_alone_and_leaves_nothing(tmp_path: Path) -> None:
    # Work of two seconds, twice the deadline, that is renewed every fifth of one.
    code = STALL.format(hang="for _ in range(10): time.sleep(0.2); deadline.renew()")
    subprocess.run([sys.executable, "-c", code, tmp_path], timeout=30, check=True)
    assert not list(tmp_path.glob("*.txt"))
