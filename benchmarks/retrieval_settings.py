"""What guided retrieval is worth inside the loop under several settings, at one mixture: which setting is the default.

Every replicate trains one planner for each setting, with the counts of equal weights or those that Cluster-GA found,
and scores it on test scenes; differences from a random choice are taken inside a replicate. Finished replicates are
kept as lines of ``DIR/PRESET.jsonl``, so a stopped run continues.

    python -m benchmarks.retrieval_settings --out DIR --preset harm_low_deficit --mixture found --seed 500 --seeds 10
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray.artifacts import RunStore
from autoscale_ray.inputs import Inputs
from autoscale_ray.loop import cluster_info, play
from autoscale_ray.mixture.allocation import allocate
from autoscale_ray.world.presets import PRESETS
from benchmarks.bench_loop import Quiet, base_config, open_store, score_arm, search

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "similarity_weight 1, random_share .2": {"similarity_weight": 1.0, "random_share": 0.2},
    "similarity_weight 0, random_share .2": {"similarity_weight": 0.0, "random_share": 0.2},
    "similarity_weight 1, random_share .5": {"similarity_weight": 1.0, "random_share": 0.5},
    "similarity_weight 0, random_share .5": {"similarity_weight": 0.0, "random_share": 0.5},
    "random": {"method": "random"},
}
METRICS = ("W", "miou")


def replicate(seed: int, store: RunStore, inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Return W and mIoU x 100 of every setting at the counts of one replicate."""
    config = base_config(options.preset, seed, options)
    stages = Quiet(config, inputs, store)
    clusters = stages.cluster(stages.embed())
    start = play(config, stages, clusters, {}, ())
    if options.mixture == "found":
        counts = search(config, stages, clusters, "response", start)(config.loop.budget)
    else:
        even = dict.fromkeys(clusters.cluster_ids, 1.0)
        counts = allocate(even, cluster_info(clusters, config.loop.budget))
    result: dict[str, Any] = {"mixture": options.mixture, "seed": seed}
    for name, fields in SETTINGS.items():
        changed = dataclasses.replace(config, retrieval=dataclasses.replace(config.retrieval, **fields))
        arm = score_arm(
            Quiet(changed, inputs, store), clusters, counts, None, guide=start.scores, config=changed
        )
        result[name] = {metric: arm[metric] for metric in METRICS}
    return result


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean difference of every setting from a random choice, with its standard error."""
    lines = ["| setting | W | BEV mIoU |", "|---|---|---|"]
    for name in list(SETTINGS)[:-1]:
        cells = []
        for metric in METRICS:
            gaps = np.array([result[name][metric] - result["random"][metric] for result in results])
            cells.append(f"{gaps.mean():+.2f} ± {gaps.std(ddof=1) / np.sqrt(len(gaps)):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the replicates that are not finished yet and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of finished replicates")
    parser.add_argument("--preset", default="harm_low_deficit", choices=PRESETS)
    parser.add_argument("--mixture", default="uniform", choices=("uniform", "found"))
    parser.add_argument("--seed", type=int, default=500, help="first replicate")
    parser.add_argument("--seeds", type=int, default=10, help="replicates, >= 2")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--test-seed", type=int, default=20_261_127)
    parser.add_argument("--override", nargs="*", default=[])
    options = parser.parse_args()
    store, inputs = open_store(
        base_config(options.preset, 0, options), options.out, f"settings-{options.preset}-{options.seed}"
    )
    kept = options.out / f"{options.preset}.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {(found["mixture"], found["seed"]): found for found in map(json.loads, lines)}
    wanted = [(options.mixture, options.seed + index) for index in range(options.seeds)]
    for key in wanted:
        if key not in done:
            done[key] = replicate(key[1], store, inputs, options)
            with kept.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
    print(f"command: python -m benchmarks.retrieval_settings {' '.join(sys.argv[1:])}\n")
    print(f"{options.preset}, {options.mixture} weights, {options.seeds} replicates\n")
    print(table([done[key] for key in wanted]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
