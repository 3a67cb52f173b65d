"""CPU time of the scorer on dense scenes, against the fixed cost of the official one.

    python -m benchmarks.bench_scoring [--golden DIR] [--seed N] [--json FILE] [--quick] [--check]

Scenes are seeded perturbations of the dense golden scenes with 40 agents and 163 polygons. All times are CPU time of
this process on one thread; only the 4,096-trajectory case also runs on two threads. Compilation is reported apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from autoscale_ray.evaluation import (
    RULES_V2,
    PreparedScene,
    ScoringScene,
    epdms,
    pdm_closed,
    prepare,
    validate_scene,
)
from benchmarks.golden_scenes import golden_scene, load_inputs
from benchmarks.surroundings import common_parser, processor, surroundings, verdict

OFFICIAL_PROCESSOR = "AMD EPYC Zen 4, one thread"
OFFICIAL_ONE_MS = 130.0
OFFICIAL_BATCH_MS = 11.0
OFFICIAL_REFERENCE_MS = 529.0
NUM_AGENTS, NUM_POLYGONS = 40, 163
LARGE = 4096
MEMORY_LIMIT_MIB = 2048.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure and its target; `at_least` says which side is good."""

    name: str
    measured: float
    target: float
    unit: str
    at_least: bool
    detail: str

    @property
    def reached(self) -> bool:
        """Return whether the target is met."""
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def dense_scenes(golden: Path, num_scenes: int, seed: int) -> list[ScoringScene]:
    """Perturb the dense golden scenes to 40 agents and 163 polygons each."""
    inputs = load_inputs(golden)
    sources = [golden_scene(inputs, int(row)) for row in np.flatnonzero(inputs["dense"])]
    generator = np.random.default_rng(seed)
    return [_perturb(sources[index % len(sources)], index, generator) for index in range(num_scenes)]


def _perturb(scene: ScoringScene, index: int, generator: np.random.Generator) -> ScoringScene:
    agents = generator.permutation(scene.num_agents)[:NUM_AGENTS]
    states = scene.agent_states[agents].copy()
    states[..., :2] += generator.normal(0.0, 0.3, (len(agents), 1, 2))
    rings = np.concatenate(
        [np.arange(scene.num_polygons), generator.integers(0, scene.num_polygons, NUM_POLYGONS)]
    )
    rings = rings[:NUM_POLYGONS]
    parts = [
        scene.polygon_xy[scene.polygon_offsets[ring] : scene.polygon_offsets[ring + 1]] for ring in rings
    ]
    shifts = generator.normal(0.0, 0.05, (NUM_POLYGONS, 2))
    return validate_scene(
        replace(
            scene,
            scene_id=f"dense-{index}",
            agent_types=scene.agent_types[agents],
            agent_dims=scene.agent_dims[agents],
            agent_states=states,
            agent_mask=scene.agent_mask[agents],
            polygon_layers=scene.polygon_layers[rings],
            polygon_on_route=scene.polygon_on_route[rings],
            polygon_red=scene.polygon_red[rings],
            polygon_offsets=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
            polygon_xy=np.concatenate([part + shift for part, shift in zip(parts, shifts, strict=True)]),
        )
    )


def trajectories_for(golden: Path, num_scenes: int, count: int, seed: int) -> np.ndarray:
    """Perturb golden 8-waypoint trajectories of the dense scenes."""
    inputs = load_inputs(golden)
    rows = np.flatnonzero(inputs["dense"])
    generator = np.random.default_rng(seed + 1)
    chosen = rows[np.arange(num_scenes) % len(rows)]
    source = inputs["human_poses"][chosen][:, None]
    stretch = generator.uniform(0.3, 1.3, (num_scenes, count, 1, 1))
    growth = np.linspace(0.0, 1.0, 8)[:, None] * generator.normal(0.0, 1.0, (num_scenes, count, 1, 3))
    return source * stretch + growth * np.array([1.0, 1.0, 0.05])


def cpu_ms(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return median and standard deviation of the CPU time of `work` in ms, after one warm call."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times), statistics.pstdev(times)


def measure_backend(backend: str, options: argparse.Namespace) -> list[Figure]:
    """Measure the four cases with one backend."""
    num_scenes = 8 if options.quick else 24
    repeats = 2 if options.quick else 5
    fast = backend == "numba"
    scenes = dense_scenes(options.golden, num_scenes, options.seed)
    start = time.process_time()
    prepared = [prepare(scene, RULES_V2, backend=backend) for scene in scenes[:1]]
    epdms(prepared, trajectories_for(options.golden, 1, 2, options.seed), backend=backend)
    print(f"{backend}: first call, compilation included: {time.process_time() - start:.1f} s CPU")
    prepared += [prepare(scene, RULES_V2, backend=backend) for scene in scenes[1:]]
    figures = [
        _many_scenes(scenes, prepared, backend, repeats, options),
        _one_scene(prepared[0], backend, repeats, options),
        _reference(scenes, backend, repeats),
        _large_batch(prepared[0], backend, options, LARGE),
    ]
    targets = (100.0, 60.0, 30.0) if fast else (10.0, 10.0, 10.0)
    figures = [
        replace(figure, target=target) for figure, target in zip(figures, targets, strict=False)
    ] + figures[3:]
    return figures + ([_two_threads(prepared[0], options), _memory()] if fast else [])


def _many_scenes(
    scenes: list[ScoringScene],
    prepared: list[PreparedScene],
    backend: str,
    repeats: int,
    options: argparse.Namespace,
) -> Figure:
    """Time one trajectory in each scene; the human is driven and scored again, as the official call does."""
    waypoints = trajectories_for(options.golden, len(scenes), 1, options.seed)
    humans = np.stack([np.asarray(scene.human_poses) for scene in scenes])[:, None]
    cost, spread = cpu_ms(
        lambda: epdms(prepared, np.concatenate([waypoints, humans], axis=1), backend=backend), repeats
    )
    alone, _ = cpu_ms(lambda: epdms(prepared, waypoints, backend=backend), repeats)
    each = cost / len(scenes)
    detail = f"{each:.3f} ms +- {spread / len(scenes):.3f} with the human filter, {alone / len(scenes):.3f} ms without"
    return Figure(f"{backend}: many scenes, one trajectory", OFFICIAL_ONE_MS / each, 0.0, "x", True, detail)


def _one_scene(scene: PreparedScene, backend: str, repeats: int, options: argparse.Namespace) -> Figure:
    waypoints = trajectories_for(options.golden, 1, 64, options.seed)
    cost, spread = cpu_ms(lambda: epdms([scene], waypoints, backend=backend), repeats)
    detail = f"{cost / 64:.4f} ms +- {spread / 64:.4f} per trajectory"
    return Figure(
        f"{backend}: 64 trajectories of one scene", OFFICIAL_BATCH_MS / (cost / 64), 0.0, "x", True, detail
    )


def _reference(scenes: list[ScoringScene], backend: str, repeats: int) -> Figure:
    """Time the 10 Hz observation and PDM-Closed; the whole of `prepare`, checks and human included, beside it."""
    observe_and_plan = cpu_ms(lambda: [pdm_closed(scene, RULES_V2, backend) for scene in scenes], repeats)
    whole, _ = cpu_ms(lambda: [prepare(scene, RULES_V2, backend=backend) for scene in scenes], 1)
    each, spread = (value / len(scenes) for value in observe_and_plan)
    detail = f"{each:.2f} ms +- {spread:.2f} per scene; all of prepare {whole / len(scenes):.2f} ms"
    return Figure(
        f"{backend}: PDM-Closed and observation", OFFICIAL_REFERENCE_MS / each, 0.0, "x", True, detail
    )


def _large_batch(scene: PreparedScene, backend: str, options: argparse.Namespace, count: int) -> Figure:
    waypoints = trajectories_for(options.golden, 1, count, options.seed)
    cost, _ = cpu_ms(lambda: epdms([scene], waypoints, backend=backend), 1)
    ratio = OFFICIAL_BATCH_MS * count / cost
    detail = f"{cost / 1e3:.2f} s CPU on one thread"
    return Figure(f"{backend}: {count} trajectories of one scene", ratio, 10.0, "x", True, detail)


def _two_threads(scene: PreparedScene, options: argparse.Namespace) -> Figure:
    """Time the large batch on two threads; kernels release the lock."""
    halves = np.array_split(trajectories_for(options.golden, 1, LARGE, options.seed), 2, axis=1)
    epdms([scene], halves[0][:, :2], backend="numba")
    wall, start = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda part: epdms([scene], part, backend="numba"), halves))
    cpu = time.process_time() - start
    detail = f"{time.perf_counter() - wall:.2f} s wall on a shared machine, {cpu:.2f} s CPU of both threads"
    return Figure(f"numba: {LARGE} trajectories on 2 threads", cpu / 2.0, 2.0, "s", False, detail)


def _memory() -> Figure:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    return Figure(
        "peak memory of this process", peak, MEMORY_LIMIT_MIB, "MiB", False, "all cases above, torch included"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common_parser(__doc__, quick="8 scenes, 2 turns")
    parser.add_argument("--golden", type=Path, default=Path("tests/golden"))
    parser.add_argument("--backends", nargs="+", default=["numba", "torch"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = [figure for backend in options.backends for figure in measure_backend(backend, options)]
    print(f"processor: {processor()}; official figures: {OFFICIAL_PROCESSOR}; seed {options.seed}")
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        print(
            f"{figure.name}: {figure.measured:.1f} {figure.unit} (target {sign} {figure.target:g}); {figure.detail}"
        )
    if options.json:
        rows = [{**asdict(figure), "reached": figure.reached} for figure in figures]
        options.json.write_text(
            json.dumps(surroundings("torch", "numpy") | {"seed": options.seed, "figures": rows}, indent=1)
            + "\n"
        )
    missed = [figure for figure in figures if not figure.reached]
    lines = [f"{figure.name} {figure.measured:.3g} {figure.target:g}" for figure in missed]
    return verdict(lines, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
