"""How long the planner trains and how well it drives: real-only, vanilla and family-uniform on the built-in
world.

    python benchmarks/bench_planner.py --seeds 3 --json out.json --check
    python benchmarks/bench_planner.py --quick

Times are CPU seconds of one thread. W is the weighted mean EPDMS x 100 on dev (non-reactive
pseudo-simulation), mIoU that of the planner's occupancy head. The rate of a 64 x 64 linear layer tells how
busy the machine was.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from autoscale_ray.config import PlannerConfig, WorldConfig
from autoscale_ray.evaluation.from_pool import prepare_pool, score_pool
from autoscale_ray.planning.features import PlannerFeatures, concatenate, features_of_pool
from autoscale_ray.planning.inference import occupancy_miou, predict
from autoscale_ray.planning.training import new_state, train
from autoscale_ray.scenes.pool import ScenePool, open_pool
from autoscale_ray.world.pools import make_pool
from benchmarks.surroundings import common_parser, surroundings, verdict

TARGET_TRAINING_CPU_S = 8.0
BUDGET = 700


@dataclass(frozen=True)
class World:
    """Pools and features of one preset."""

    pools: dict[str, ScenePool]
    features: dict[str, PlannerFeatures]
    feature_cpu_s: float


def build_world(folder: Path, config: WorldConfig, planner: PlannerConfig) -> World:
    pools = {}
    for side in ("real", "synthetic", "dev"):
        make_pool(config, side, folder / side)
        pools[side] = open_pool(folder / side)
    start = time.process_time()
    features = {side: features_of_pool(pool, planner) for side, pool in pools.items()}
    return World(pools, features, time.process_time() - start)


def side_column(pool: ScenePool, file: str, column: str) -> np.ndarray:
    table = pq.read_table(pool.path / file)
    order = np.empty(len(pool), dtype=np.int64)
    order[pool.rows_of(table["scene_id"].to_pylist())] = np.arange(len(pool))
    return np.array(table[column].to_pylist())[order]


def selections(family_N: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Draw B synthetic scenes in proportion to the pool, and as evenly over the families as their sizes allow."""
    rng = np.random.default_rng(seed)
    names = np.unique(family_N)
    quota = {name: BUDGET // len(names) + (place < BUDGET % len(names)) for place, name in enumerate(names)}
    even = []
    for name in names:
        rows = np.flatnonzero(family_N == name)
        even.append(rng.choice(rows, min(quota[name], len(rows)), replace=False))
    vanilla = rng.choice(len(family_N), min(BUDGET, len(family_N)), replace=False)
    return {"real_only": np.empty(0, np.int64), "vanilla": vanilla, "uniform": np.concatenate(even)}


def linear_gflops() -> float:
    """Measure the machine as it is now: a linear layer on 100,000 rows (55 on a quiet core of the reference)."""
    rows, weight = torch.ones(100_000, 64), torch.ones(64, 64)
    start = time.process_time()
    for _ in range(5):
        torch.mm(rows, weight)
    return 5 * 2 * 100_000 * 64 * 64 / (time.process_time() - start) / 1e9


def run_arms(world: World, planner: PlannerConfig, seeds: range) -> list[dict[str, float | str]]:
    data = concatenate([world.features["real"], world.features["synthetic"]])
    num_real, dev = len(world.pools["real"]), world.features["dev"]
    family_N = side_column(world.pools["synthetic"], "truth.parquet", "family")
    weight_N = side_column(world.pools["dev"], "weights.parquet", "weight")
    prepared = prepare_pool(world.pools["dev"])
    results = []
    for seed in seeds:
        for arm, chosen in selections(family_N, seed).items():
            rows = np.concatenate([np.arange(num_real), num_real + chosen])
            gflops, start = linear_gflops(), time.process_time()
            weights = train(data, rows, planner, seed)
            train_cpu_s = time.process_time() - start
            scores = score_pool(prepared, predict(weights, dev, np.arange(len(dev))))
            score_N = scores["epdms"].to_numpy().astype(float)
            miou_N, valid_N = occupancy_miou(weights, dev, np.arange(len(dev)))
            scored_N = np.isfinite(score_N)
            results.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "epochs": planner.num_steps * planner.batch_size / len(rows),
                    "train_cpu_s": train_cpu_s,
                    "gflops": gflops,
                    "W": 100 * float(np.average(score_N[scored_N], weights=weight_N[scored_N])),
                    "miou": 100 * float(miou_N[valid_N].mean()),
                }
            )
            print(" ".join(f"{key}={value:.2f}" if isinstance(value, float) else f"{key}={value}"
                           for key, value in results[-1].items()), flush=True)  # fmt: skip
    return results


def summary(results: list[dict[str, float | str]]) -> dict[str, dict[str, float]]:
    """Return mean and spread over seeds, arm by arm."""
    table = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        mine = [result for result in results if result["arm"] == arm]
        table[str(arm)] = {
            name: float(function([float(result[key]) for result in mine]))
            for key in ("W", "miou", "train_cpu_s")
            for name, function in ((f"{key}_mean", np.mean), (f"{key}_sd", _spread))
        }
    return table


def _spread(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def main() -> int:
    quick = "1 seed, 5 dev scenes a family, 1,500 in the pool"
    parser = common_parser(__doc__, quick=quick, seed_help="first training seed")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every arm")
    parser.add_argument("--dev", type=int, default=40, help="dev scenes of each family")
    parser.add_argument("--preset", default="harm_low_deficit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    planner = PlannerConfig()
    config = WorldConfig(preset=arguments.preset, num_dev_per_family=arguments.dev)
    num_seeds = 1 if arguments.quick else arguments.seeds
    if arguments.quick:
        config = replace(config, num_dev_per_family=5, num_synthetic=1500)
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder), config, planner)
        results = run_arms(world, planner, range(arguments.seed, arguments.seed + num_seeds))
    num_scenes = sum(len(features) for features in world.features.values())
    report = {
        "preset": arguments.preset,
        "num_weights": len(new_state(planner, 0).weights_W),
        "features_scenes_per_cpu_s": num_scenes / world.feature_cpu_s,
        "arms": summary(results),
        "runs": results,
    }
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(surroundings("torch") | report, indent=1))
    median_cpu_s = float(np.median([float(result["train_cpu_s"]) for result in results]))
    missed = [f"planner_training_cpu_s {median_cpu_s:.1f} <= {TARGET_TRAINING_CPU_S:.0f}"]
    return verdict(missed if median_cpu_s > TARGET_TRAINING_CPU_S else [], check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
