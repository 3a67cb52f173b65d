"""A run small enough for every test: two rounds, 50 steps, on embeddings that are made once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from autoscale_ray import tasks
from autoscale_ray.artifacts import read_rounds, share_stages
from autoscale_ray.config import RunConfig, load_config
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.records import SIDES

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
CHANGING = ("train", "retrieve", "evaluate")
"""Stages that a round makes; all others are made before the first."""


def config_of(run_dir: Path, *more: str) -> RunConfig:
    return with_absolute_paths(load_config(None, [*SMALL, f"placement.run_dir={run_dir}", *more]))


def with_shared_pools(run_dir: Path, reference: Path) -> Path:
    """Give a run the pools of the reference, so that it does not draw them again."""
    run_dir.mkdir(parents=True)
    (run_dir / "pools").symlink_to(reference / "pools")
    return run_dir


def with_cached_stages(run_dir: Path, reference: Path) -> Path:
    """Give a run the pools of the reference and its stages up to the first round."""
    share_stages(reference, with_shared_pools(run_dir, reference))
    for record in (run_dir / "stages").iterdir():
        if record.name.startswith(CHANGING):
            record.unlink()
    return run_dir


def stage_records(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "stages").iterdir()}


def check_same_run(run_dir: Path, reference: Path, but: tuple[str, ...] = ()) -> None:
    """Every stage with the bytes of its files, and the chain of rounds, must be those of the reference.

    Args:
        run_dir: The run.
        reference: The undisturbed run in one process.
        but: Stages of which only the identity must be the same.
    """
    ours, theirs = stage_records(run_dir), stage_records(reference)
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name] and not name.startswith(but or ("-",))] == []
    assert read_rounds(str(run_dir)) == read_rounds(str(reference))


def embeddings_of(run_dir: Path) -> np.ndarray:
    """Return the embeddings of all sides of a run, in order of their content's name in the record."""
    (record,) = (
        json.loads(body)["body"] for name, body in stage_records(run_dir).items() if "embed-" in name
    )
    hashes = [record["blobs"][f"{side}.parquet"]["sha256"] for side in SIDES]
    files = [run_dir / "objects" / sha256[:2] / sha256 for sha256 in hashes]
    return np.concatenate([tasks.read_embeddings(path)[1] for path in files])


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
