"""How fast the built-in world makes scenes, and how well its experts score, family by family and preset by preset.

    python benchmarks/bench_world.py --json out.json --check
    python benchmarks/bench_world.py --quick

Speed is CPU time of one process, pools written to disk included; the target allows 60 s on two cores.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from autoscale_ray.config import WorldConfig
from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.judging import score_experts
from autoscale_ray.world.pools import generate, make_pool
from autoscale_ray.world.presets import PRESETS
from benchmarks.surroundings import common_parser, surroundings

TARGET_CPU_S = 60.0
TARGET_EXPERT = 0.9
SPEED_SCENES = 20_000


def measure_speed(num_scenes: int, seed: int) -> dict[str, float]:
    """Write a synthetic pool and return CPU seconds, wall seconds, scenes a CPU second and peak memory."""
    config = WorldConfig(seed=seed, num_synthetic=num_scenes)
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall = time.process_time(), time.perf_counter()
        make_pool(config, "synthetic", Path(folder) / "pool")
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    per_second = num_scenes / cpu
    return {
        "scenes": num_scenes,
        "cpu_s": cpu,
        "wall_s": wall,
        "scenes_per_cpu_s": per_second,
        "peak_mib": peak_mib,
    }


def expert_scores(num_scenes: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean EPDMS and sub-scores of the experts by family and quality, for every quality a preset uses."""
    used = {(name, preset.quality[name]) for preset in PRESETS.values() for name in FAMILIES}
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in FAMILIES}
    for name, letter in sorted(used | {(name, "F") for name in FAMILIES}):
        scores = score_experts(generate(name, num_scenes, seed, letter, side="synthetic"))
        table[name][letter] = {key: float(values.mean()) for key, values in scores.items()}
        error = float(scores["epdms"].std(ddof=1) / np.sqrt(num_scenes))
        table[name][letter]["epdms_standard_error"] = error
    return table


def print_experts(table: dict[str, dict[str, dict[str, float]]]) -> None:
    print(
        f"{'family':13s} {'quality':7s} "
        + " ".join(f"{name[:9]:>9s}" for name in next(iter(table.values()))["F"])
    )
    for name, letters in table.items():
        for letter, scores in letters.items():
            print(f"{name:13s} {letter:7s} " + " ".join(f"{value:9.3f}" for value in scores.values()))


def missed_targets(speed: dict[str, float], experts: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    scaled = speed["cpu_s"] * SPEED_SCENES / speed["scenes"]
    missed = [] if scaled < TARGET_CPU_S else [f"world_20000_scenes_cpu_s {scaled:.1f} < {TARGET_CPU_S:.0f}"]
    for name, letters in experts.items():
        if letters["F"]["epdms"] < TARGET_EXPERT:
            missed.append(f"expert_epdms_{name} {letters['F']['epdms']:.3f} >= {TARGET_EXPERT}")
    return missed


def main() -> int:
    arguments = common_parser(__doc__, quick="2,000 scenes for speed, 4 for each expert").parse_args()
    speed = measure_speed(2_000 if arguments.quick else SPEED_SCENES, arguments.seed)
    print(" ".join(f"{key}={value:.1f}" for key, value in speed.items()))
    experts = expert_scores(4 if arguments.quick else 40, arguments.seed)
    print_experts(experts)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                surroundings("numpy") | {"seed": arguments.seed, "speed": speed, "experts": experts}, indent=1
            )
        )
    missed = missed_targets(speed, experts)
    for line in missed:
        print(line)
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
