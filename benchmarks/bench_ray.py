"""What Ray costs: CPU of embedding, round hand-over, work between rounds, the first planner step, the object store.

python -m benchmarks.bench_ray --check --json result.json

Targets: embedding through Ray Data at most 1.25 times the CPU of the local loop (start-up apart) at 10^5 scenes; a
hand-over on live workers under 100 ms; under 60 s from `autoscale run` to the first planner step with embeddings
published; between rounds under 5 % of the round on the demo and under 10 s at 10^5 pool scenes; at most 1 MB in the
object store while embedding. `--parts` measures some of them; `--quick` uses 8,192 scenes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.util.state import list_objects

from autoscale_ray import tasks
from autoscale_ray.config import RunConfig
from autoscale_ray.config_file import load_config
from autoscale_ray.distributed.driver import end_driver, follow, start_driver
from autoscale_ray.distributed.embed import row_ranges, run_ranges
from autoscale_ray.distributed.resources import connect
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.distributed.status import read_events
from autoscale_ray.inputs import open_inputs
from autoscale_ray.representation.model import GRAPH_CHUNK, embed, load
from benchmarks.process_meter import SAMPLE_S, CpuMeter
from benchmarks.surroundings import common_parser, surroundings

TARGETS = {
    "embed_cpu_ratio": 1.25,
    "hand_over_ms": 100.0,
    "first_step_s": 60.0,
    "between_share_demo": 0.05,
    "between_s_large": 10.0,
    "object_store_mb": 1.0,
}
WAIT_S = 900
REST_S = 20
"""How long a cluster is watched that has nothing to do: its own processes cost CPU all the same."""
OUTER_STAGES = ("train", "evaluate dev")
SMALL = ["representation.num_steps=5", "loop.final_seeds=1", "loop.baselines=[]"]
LARGE = [
    "planner.num_steps=50",
    "loop.num_rounds=3",
    "world.num_real=500",
    "world.num_dev_per_family=4",
    "world.num_test_per_family=4",
    *SMALL,
]
"""Little of everything but synthetic scenes."""
DEMO = ["loop.num_rounds=2", "world.num_dev_per_family=60", "world.num_test_per_family=60", *SMALL]
"""The rounds of `make demo`: what is left out comes before the first round or after the last."""


class ObjectStoreWatch:
    """Samples the bytes in the object store until it is stopped; keeps the largest sum."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._largest = self._thread.submit(self._watch)

    def _watch(self) -> int:
        largest = 0
        while not self._end.wait(SAMPLE_S):
            # An object may go while it is listed; that is no reason to give up the others.
            listed: list[Any] = list_objects(detail=True, limit=10_000, raise_on_missing_output=False)
            largest = max(largest, sum(max(item.object_size or 0, 0) for item in listed))
        return largest

    def stop(self) -> int:
        """Return the largest sum; raise what ended the watch early."""
        self._end.set()
        return self._largest.result(30)


def measure_embedding(seed: int, num_scenes: int, folder: Path) -> dict[str, float]:
    """Embed a pool in this process and through Ray Data; compare CPU seconds, what starts up apart.

    Every pass is measured until its embedder is gone, so that each pays for one start and one end of it. The first of a
    cluster also starts actors of Ray Data that stay; it is reported and taken off nothing.
    """
    config = config_in(folder / "large", seed, f"world.num_synthetic={num_scenes}", *LARGE)
    pool, encoder = open_inputs(config, folder / "large" / "pools").pools["synthetic"], folder / "encoder"
    encoder.mkdir()
    tasks.train_encoder(config, open_inputs(config, folder / "large" / "pools"), encoder)
    assert len(pool.cached) == len(pool), "the cache is built before anything is timed"
    torch.set_num_threads(1)
    model = load(encoder)
    first_rows = np.arange(min(GRAPH_CHUNK, len(pool)))
    embed(model, pool, first_rows)  # compiles the kernels
    one_local_s = timed(lambda: embed(model, pool, first_rows))
    local_s = timed(lambda: embed(model, pool))
    started = time.perf_counter()
    connect(config.placement.ray)
    figures = {"ray_start_s": time.perf_counter() - started}
    walls_s: dict[str, float] = {}

    def embed_on_ray(name: str, num_ranges: int | None = None) -> None:
        parts = folder / name  # parts that are there already are not embedded again
        parts.mkdir()
        started = time.perf_counter()
        ranges = list(row_ranges("synthetic", pool, parts))[:num_ranges]
        run_ranges(encoder, ranges, folder / "stacks", config.placement.ray)
        walls_s[name] = time.perf_counter() - started
        wait_for_no_embedder()

    figures["embed_first_start_cpu_s"] = metered(lambda: embed_on_ray("first", 1)) - one_local_s
    start_s = metered(lambda: embed_on_ray("one", 1)) - one_local_s
    ray_s = metered(lambda: embed_on_ray("all"))
    # Nothing is waited for: what is measured is the cluster's own CPU while that time goes by.
    figures["ray_at_rest_cpu_s_per_s"] = metered(lambda: time.sleep(REST_S)) / REST_S
    watch = ObjectStoreWatch()
    try:
        embed_on_ray("watched", 16)
    finally:  # its thread would keep a process alive that has failed
        largest = watch.stop()
    return figures | {
        "scenes": len(pool),
        "embed_ray_wall_s": walls_s["all"],
        "embed_local_cpu_s": local_s,
        "embed_ray_cpu_s": ray_s - start_s,
        "embed_start_cpu_s": start_s,
        "embed_cpu_ratio": (ray_s - start_s) / local_s,
        "object_store_mb": largest / 1e6,
    }


def wait_for_no_embedder() -> None:
    """Return when the embedders below this process have ended; their last seconds count too."""
    give_up = time.monotonic() + WAIT_S
    while any("RangeEmbedder" in title for title in titles_below()):
        assert time.monotonic() < give_up, "an embedder does not end"
        time.sleep(0.1)  # polling other processes; their CPU is counted, not this time


def titles_below() -> Iterator[str]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield " ".join(process.cmdline())


def measure_large(seed: int, num_scenes: int, folder: Path) -> dict[str, float]:
    """Run short rounds over a large pool; time what lies between training and evaluation, and hand-overs."""
    config = config_in(
        folder / "large", seed, f"world.num_synthetic={num_scenes}", "loop.budget=5000", *LARGE
    )
    hand_overs_s = run_driver(config)
    between = between_rounds(read_events(folder / "large"))
    later = sorted(hand_overs_s[1:])  # the first waits for the workers to start
    return {
        "hand_over_ms": 1e3 * later[len(later) // 2],
        "hand_over_max_ms": 1e3 * later[-1],
        "hand_overs": len(later),
        "between_s_large": max(seconds for seconds, _ in between),
    }


def measure_demo(seed: int, num_scenes: int, folder: Path) -> dict[str, float]:
    """Run rounds of the size of the demo; return the largest and median share of neither training nor evaluation."""
    config = config_in(folder / "demo", seed, *DEMO)
    run_driver(config)
    between = between_rounds(read_events(folder / "demo"))
    return {
        "between_share_demo": max(share for _, share in between),
        "between_share_demo_median": float(np.median([share for _, share in between])),
        "between_s_demo": max(seconds for seconds, _ in between),
    }


def measure_start(seed: int, num_scenes: int, folder: Path) -> dict[str, float]:
    """Start `autoscale run` where embeddings are published; time the first planner step from outside.

    A checkpoint after every step shows the first one; writing it is part of the time.
    """
    run_dir = folder / "start"
    arguments = [f"seed={seed}", *LARGE, "world.num_synthetic=1000", "placement.ray.checkpoint_steps=1"]
    program = [sys.executable, "-m", "autoscale_ray.cli"]
    subprocess.run([*program, "embed", *arguments, "--out", str(run_dir)], check=True, capture_output=True)
    command = [*program, "run", "--backend", "ray", "--out", str(run_dir)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    meter, started = CpuMeter(), time.perf_counter()
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        while not any((run_dir / "train").glob("*/*-0000001")):
            told = (folder / "start.log").read_text()
            assert process.poll() is None, told
            assert time.perf_counter() - started < WAIT_S, told
            time.sleep(0.02)
        return {"first_step_s": time.perf_counter() - started, "first_step_cpu_s": meter.stop()}
    finally:
        end_tree(process.pid)


def between_rounds(events: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return, for every round after the first, the seconds that are neither training nor evaluation, and their share.

    Args:
        events: Log of a run that was neither stopped nor resumed.
    """
    published_s: dict[int, float] = {}
    work_s: dict[int, float] = defaultdict(float)
    for event in events:
        if event["event"] == "round_published":
            published_s[event["round"]] = event["time_s"]
        elif event["event"] == "stage_ended" and event["stage"] in OUTER_STAGES:
            work_s[event["round"]] += event["seconds"]
    walls_s = {index: published_s[index] - published_s[index - 1] for index in published_s if index}
    return [(wall - work_s[index], (wall - work_s[index]) / wall) for index, wall in walls_s.items()]


def run_driver(config: RunConfig) -> list[float]:
    """Run a driver to its end; return its hand-overs, s."""
    connect(config.placement.ray)
    status = list(follow(start_driver(config)))[-1]
    end_driver(config.placement.run_dir)
    if status["error"]:
        raise status["error"]
    return status["hand_over_s"]


def config_in(run_dir: Path, seed: int, *more: str) -> RunConfig:
    return with_absolute_paths(load_config(None, [f"seed={seed}", f"placement.run_dir={run_dir}", *more]))


def timed(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def metered(work: Callable[[], Any]) -> float:
    meter = CpuMeter()
    work()
    return meter.stop()


def end_tree(pid: int) -> None:
    """End a process we started and everything below it."""
    if not psutil.pid_exists(pid):
        return
    members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for member in members:
        if member.is_running():
            member.send_signal(signal.SIGKILL)
    psutil.wait_procs(members, timeout=15)


PARTS = {
    "start": measure_start,
    "embed": measure_embedding,
    "large": measure_large,
    "demo": measure_demo,
}


def main() -> int:
    parser = common_parser(__doc__, quick="8,192 scenes in place of 100,000")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    figures = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    figures |= surroundings("ray", "torch")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        for name in options.parts:
            figures |= PARTS[name](options.seed, 8_192 if options.quick else 100_000, Path(folder))
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))
        ray.shutdown()
    print(json.dumps(figures, indent=1))
    missed = [
        (name, figures[name], target) for name, target in TARGETS.items() if figures.get(name, 0) > target
    ]
    for name, measured, target in missed:
        print(f"{name} {measured:.3f} {target}")
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
