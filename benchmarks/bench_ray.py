"""What Ray costs: CPU of embedding, a round hand-over, the time to the first planner step, the object store.

python benchmarks/bench_ray.py --check --json result.json

Targets: embedding through Ray Data at most 1.25 times the CPU of the local loop (start-up apart) at 10^5 scenes; a
hand-over on live workers under 100 ms; under 60 s from the start to the first planner step with embeddings
published; at most 1 MB in the object store while embedding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.util.state import list_objects

from autoscale_ray import tasks
from autoscale_ray.config import RunConfig, load_config
from autoscale_ray.distributed.driver import end_driver, start_driver
from autoscale_ray.distributed.embed import row_ranges, run_ranges
from autoscale_ray.distributed.jobs import embed_pools
from autoscale_ray.distributed.resources import connect
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.inputs import open_inputs
from autoscale_ray.representation.training import embed, load

TARGETS = {"embed_cpu_ratio": 1.25, "hand_over_ms": 100.0, "first_step_s": 60.0, "object_store_mb": 1.0}
WAIT_S = 600


def tree_cpu_s() -> float:
    """Return the CPU seconds of this process and of everything below it, ended children included."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class ObjectStoreWatch:
    """Samples the bytes in the object store until it is stopped; keeps the largest sum."""

    def __init__(self) -> None:
        self.largest = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(1.0):
            sizes = [item.object_size for item in list_objects(detail=True, limit=10_000)]
            self.largest = max(self.largest, sum(size for size in sizes if size > 0))

    def stop(self) -> int:
        self._end.set()
        self._thread.join(30)
        return self.largest


def measure_embedding(config: RunConfig, folder: Path) -> dict[str, float]:
    """Embed the synthetic pool in this process and through Ray Data; compare CPU seconds."""
    inputs = open_inputs(config, Path(config.placement.run_dir) / "pools")
    pool, encoder = inputs.pools["synthetic"], folder / "encoder"
    encoder.mkdir()
    tasks.train_encoder(config, inputs, encoder)
    assert len(pool.cached) == len(pool), "the cache is built before anything is timed"
    torch.set_num_threads(1)
    started = time.process_time()
    embed(load(encoder), pool)
    local_s = time.process_time() - started
    parts = folder / "parts"
    parts.mkdir()
    watch, before = ObjectStoreWatch(), tree_cpu_s()
    start_s = run_ranges(encoder, list(row_ranges("synthetic", pool, parts)), config.placement.ray)
    ray_s = tree_cpu_s() - before
    return {
        "scenes": len(pool),
        "embed_local_cpu_s": local_s,
        "embed_ray_cpu_s": ray_s - start_s,
        "embed_start_cpu_s": start_s,
        "embed_cpu_ratio": (ray_s - start_s) / local_s,
        "object_store_mb": watch.stop() / 1e6,
    }


def measure_loop(config: RunConfig) -> dict[str, float]:
    """Start a run whose embeddings are published; time its first task and its later hand-overs."""
    started = time.perf_counter()
    driver = start_driver(config)
    first_s, give_up = 0.0, started + WAIT_S
    status: dict[str, Any] = {"state": "running"}
    while status["state"] == "running" and time.perf_counter() < give_up:
        status = ray.get(driver.status.remote())
        if status["hand_over_s"] and not first_s:
            first_s = time.perf_counter() - started
        time.sleep(0.05)
    end_driver(config.placement.run_dir)
    if status["error"]:
        raise status["error"]
    later = sorted(status["hand_over_s"][1:])
    return {"first_task_s": first_s, "hand_over_ms": 1e3 * later[len(later) // 2], "hand_overs": len(later)}


def main() -> int:
    parser = argparse.ArgumentParser(description="What Ray costs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4,000 scenes in place of 100,000")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        figures = measure(options.seed, 4_000 if options.quick else 100_000, Path(folder))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    missed = [(name, figures[name], target) for name, target in TARGETS.items() if figures[name] > target]
    for name, measured, target in missed:
        print(f"{name} {measured:.3f} {target}")
    return int(options.check and bool(missed))


def measure(seed: int, num_scenes: int, folder: Path) -> dict[str, float]:
    """Return every figure."""
    small = ["representation.num_steps=5", "planner.num_steps=50", "loop.num_rounds=2", "loop.baselines=[]"]
    dev = ["world.num_dev_per_family=4", "world.num_test_per_family=4", "loop.final_seeds=1"]
    arguments = [f"seed={seed}", f"placement.run_dir={folder / 'run'}", *small, *dev]
    large = with_absolute_paths(load_config(None, [*arguments, f"world.num_synthetic={num_scenes}"]))
    small_run = [*arguments, f"placement.run_dir={folder / 'small'}", "world.num_synthetic=1000"]
    started = time.perf_counter()
    connect(large.placement.ray)
    figures = {"ray_start_s": time.perf_counter() - started}
    figures |= measure_embedding(large, folder)
    if embed_pools(small_run):
        raise SystemExit("the small pools could not be embedded")
    figures |= measure_loop(with_absolute_paths(load_config(None, small_run)))
    figures["first_step_s"] = figures["ray_start_s"] + figures["first_task_s"]
    ray.shutdown()
    return figures


if __name__ == "__main__":
    sys.exit(main())
