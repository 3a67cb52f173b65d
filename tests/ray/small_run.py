"""A run small enough for every test: two rounds, 50 steps, on embeddings that are made once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoscale_ray.config import RunConfig
from autoscale_ray.config_file import load_config
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.journal import read_rounds

SMALL = [
    "world.num_real=120",
    "world.num_synthetic=300",
    "world.num_dev_per_family=4",
    "world.num_test_per_family=4",
    "representation.num_steps=5",
    "representation.num_shards=4",
    "representation.hidden_size=16",
    "representation.embedding_size=16",
    "clusters.num_fine=16",
    "clusters.num_coarse=4",
    "clusters.min_dev_scenes=4",
    "planner.num_steps=50",
    "planner.hidden_size=32",
    "planner.batch_size=64",
    "loop.num_rounds=2",
    "loop.warm_start=true",
    "loop.budget=60",
    "loop.final_seeds=1",
    "loop.baselines=[real_only]",
    "placement.ray.checkpoint_steps=10",
]
TWO_OF_EACH = [f"placement.ray.num_{who}=2" for who in ("trainers", "scorers", "embedders")]
CHANGING = ("train", "retrieve", "evaluate")
"""Stages that a round makes; all others are made before the first."""


def config_of(run_dir: Path, *more: str) -> RunConfig:
    return with_absolute_paths(load_config(None, [*SMALL, f"placement.run_dir={run_dir}", *more]))


def with_shared_pools(run_dir: Path, reference: Path) -> Path:
    """Give a run the pools of the reference, so that it does not draw them again."""
    run_dir.mkdir(parents=True)
    (run_dir / "pools").symlink_to(reference / "pools")
    return run_dir


def link_stages(source: Path, target: Path) -> None:
    """Give a run the finished stages of another, as hard links."""
    for path in [path for folder in ("objects", "stages") for path in (source / folder).rglob("*")]:
        linked = target / path.relative_to(source)
        if path.is_file() and not linked.exists():
            linked.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, linked)


def with_cached_stages(run_dir: Path, reference: Path) -> Path:
    """Give a run the pools of the reference and its stages up to the first round."""
    link_stages(reference, with_shared_pools(run_dir, reference))
    for record in (run_dir / "stages").iterdir():
        if record.name.startswith(CHANGING):
            record.unlink()
    return run_dir


def wait_for(holds: Callable[[], Any], timeout_s: float = 300) -> Any:
    """Ask again and again; what a fault waits for lasts some milliseconds, so there is hardly a pause."""
    give_up = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < give_up, "the moment never came"
        time.sleep(0.001)
    return found


def stage_records(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "stages").iterdir()}


def check_same_run(run_dir: Path, reference: Path) -> None:
    """Every stage with the bytes of its files, and the chain of rounds, must be those of the undisturbed run."""
    ours, theirs = stage_records(run_dir), stage_records(reference)
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert read_rounds(str(run_dir)) == read_rounds(str(reference))


SUMMARY = {
    "steps": 50,
    "batch_size": 64,
    "clusters": [{"dev": 30}, {"dev": 10}],
    "rounds": [
        {
            "index": 3,
            "num_scenes": 60,
            "totals": {"objective": 0.5},
            "weights": {"c0": 0.25, "c1": 0.75},
            "cluster_scores": {"c0": 0.4, "c1": None},
        }
    ],
    "spent": {"search_runs": 4, "seconds": {"train": 8.0, "evaluate_dev": 2.0}},
}
"""What a summary must hold to be shown."""
