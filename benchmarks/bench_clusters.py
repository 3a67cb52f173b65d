"""How finely can a mixture of clusters say what the planner should train on?

On the built-in world the kinds of scene are known. The wanted mixture holds the families in proportion to their weight
in the objective, faithful or gapped scenes only. Measured: the distance in total variation from it to the nearest
mixture that the clusters can express with random scenes of each cluster, and the harmful scenes in that one.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_clusters --json FILE --check
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linprog

from autoscale_ray import tasks
from autoscale_ray.config import ClusterConfig, RunConfig, derive_seed
from autoscale_ray.config_file import load_config
from autoscale_ray.inputs import Inputs, open_inputs
from autoscale_ray.mixture.clusters import fit_clusters
from autoscale_ray.records import SIDES
from benchmarks.surroundings import common_parser, surroundings, verdict

HARMFUL, IRREDUCIBLE = "H", "irreducible"
SETTINGS: dict[str, dict[str, Any]] = {
    "scene counts, K = 16": {"dev_share": 0.0},
    "scene counts, K = 24": {"dev_share": 0.0, "num_coarse": 24},
    "scene counts, K = 32": {"dev_share": 0.0, "num_coarse": 32},
    "dev share .5, K = 16": {"dev_share": 0.5},
    "dev share .9, K = 16": {"dev_share": 0.9},
    "dev share 1, K = 16": {"dev_share": 1.0},
    "dev share .9, K = 20": {"dev_share": 0.9, "num_coarse": 20},
    "dev share .9, K = 24": {"dev_share": 0.9, "num_coarse": 24},
}
QUICK = (
    "world.num_real=150",
    "world.num_synthetic=1500",
    "world.num_dev_per_family=15",
    "representation.num_steps=30",
)


def kinds(inputs: Inputs, side: str) -> np.ndarray:
    """Return family and quality of every scene of a pool, as one word."""
    truth = inputs.pools[side].side_table("truth")
    assert truth is not None, "the built-in world writes its truth"
    columns = (truth[name].to_pylist() for name in ("scene_id", "family", "quality"))
    by_id = {scene: f"{family}/{quality}" for scene, family, quality in zip(*columns, strict=True)}
    return np.array([by_id[scene] for scene in inputs.pools[side].scene_ids.tolist()])


def wanted_shares(inputs: Inputs, kinds_N: np.ndarray) -> dict[str, float]:
    """Return the wanted share of every kind of synthetic scene; sums to 1."""
    families = np.array([kind.split("/")[0] for kind in kinds(inputs, "dev")])
    weights = inputs.weights["dev"]
    names, counts = np.unique(kinds_N, return_counts=True)
    usable = {
        name: int(count)
        for name, count in zip(names.tolist(), counts, strict=True)
        if name.split("/")[1] not in (HARMFUL, IRREDUCIBLE)
    }
    shares = dict.fromkeys(names.tolist(), 0.0)
    for family in np.unique(families).tolist():
        own = {name: count for name, count in usable.items() if name.split("/")[0] == family}
        for name, count in own.items():
            shares[name] = float(weights[families == family].sum()) * count / sum(own.values())
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def nearest_mixture(
    labels_N: np.ndarray, kinds_N: np.ndarray, wanted: Mapping[str, float], budget: int
) -> dict[str, float]:
    """Find cluster shares under the pool's caps that come nearest to the wanted kinds, by linear programming."""
    names, place_N = np.unique(kinds_N, return_inverse=True)
    num_clusters = int(labels_N.max()) + 1
    counts_KM = np.zeros((num_clusters, len(names)))
    np.add.at(counts_KM, (labels_N, place_N), 1)
    sizes_K = counts_KM.sum(1)
    shares_KM = counts_KM / np.maximum(sizes_K, 1)[:, None]
    wanted_M = np.array([wanted[name] for name in names.tolist()])
    slack_MM = np.eye(len(names))
    solved = linprog(
        np.r_[np.zeros(num_clusters), np.ones(len(names))],
        A_ub=np.block([[shares_KM.T, -slack_MM], [-shares_KM.T, -slack_MM]]),
        b_ub=np.r_[wanted_M, -wanted_M],
        A_eq=np.r_[np.ones(num_clusters), np.zeros(len(names))][None],
        b_eq=[1.0],
        bounds=[(0, size / budget) for size in sizes_K] + [(0, None)] * len(names),
    )
    got_M = shares_KM.T @ solved.x[:num_clusters]
    harmful = np.array([name.split("/")[1] == HARMFUL for name in names.tolist()])
    return {
        "distance": float(solved.fun) / 2,
        "harmful": float(got_M[harmful].sum()),
        "clusters": num_clusters,
    }


def embeddings(config: RunConfig, inputs: Inputs) -> dict[str, np.ndarray]:
    """Train the encoder of a run and embed its pools."""
    with tempfile.TemporaryDirectory() as folder:
        encoder, embedded = Path(folder) / "encoder", Path(folder) / "embedded"
        encoder.mkdir()
        embedded.mkdir()
        tasks.train_encoder(config, inputs, encoder)
        tasks.embed_pools(encoder, inputs, embedded)
        return {side: tasks.read_embeddings(embedded / tasks.table_file(side))[1] for side in SIDES}


def measure(config: RunConfig, inputs: Inputs, num_repeats: int) -> dict[str, list[dict[str, float]]]:
    """Return every setting's figures for one encoder, one entry for each seed of k-means."""
    by_side = embeddings(config, inputs)
    train_ND = np.concatenate([by_side["real"], by_side["synthetic"]])
    kinds_N = kinds(inputs, "synthetic")
    wanted = wanted_shares(inputs, kinds_N)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for name, change in SETTINGS.items():
        rule: ClusterConfig = dataclasses.replace(config.clusters, **change)
        for repeat in range(num_repeats):
            seed = derive_seed(config.seed, "clusters", str(repeat))
            model = fit_clusters(train_ND, by_side["dev"], rule, seed, inputs.weights["dev"])
            labels_N = model.assign(by_side["synthetic"])[1]
            found[name].append(nearest_mixture(labels_N, kinds_N, wanted, config.loop.budget))
    return found


def main() -> int:
    """Print the table; with --check exit 1 unless the dev weights bring the clusters nearer at equal K."""
    parser = common_parser(__doc__, quick="one encoder, small pools", seed_help="first encoder seed")
    parser.add_argument("--seeds", type=int, default=3, help="encoders")
    parser.add_argument("--repeats", type=int, default=4, help="k-means seeds for each encoder")
    options = parser.parse_args()
    num_seeds, overrides = (1, QUICK) if options.quick else (options.seeds, ())
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + num_seeds):
            config = load_config(None, [f"seed={seed}", *overrides])
            for name, found in measure(config, open_inputs(config, Path(folder)), options.repeats).items():
                rows[name] += found
    means = {
        name: {key: np.mean([row[key] for row in found]) for key in found[0]} for name, found in rows.items()
    }
    spread = {name: np.std([row["distance"] for row in found], ddof=1) for name, found in rows.items()}
    print("| joined by | distance | SD | harmful scenes | clusters |\n|---|---|---|---|---|")
    for name, mean in means.items():
        cells = (
            f"{mean['distance']:.3f} | {spread[name]:.3f} | {mean['harmful']:.3f} | {mean['clusters']:.1f}"
        )
        print(f"| {name} | {cells} |")
    if options.json is not None:
        told = surroundings("torch", "faiss-cpu") | {"seed": options.seed, "rows": rows}
        options.json.write_text(json.dumps(told, indent=1))
    before, now = (means[f"{name}, K = 16"]["distance"] for name in ("scene counts", "dev share .9"))
    missed = [f"distance-with-dev-share {now:.3f} {before:.3f}"] if now >= before else []
    return verdict(missed, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
