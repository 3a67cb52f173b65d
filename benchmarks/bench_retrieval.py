"""Measure clusters, neighbour search and retrieval on embeddings of 64 dimensions.

CPU seconds of this process on one thread; ratios within one process. Run with ``OMP_NUM_THREADS=1``.

    python benchmarks/bench_retrieval.py --check --json out.json
"""

from __future__ import annotations

import json
import resource
import sys

import numpy as np

from autoscale_ray.config import RetrievalConfig
from autoscale_ray.mixture import clusters, retrieval, similarity
from benchmarks.process_meter import cpu_seconds
from benchmarks.surroundings import common_parser, surroundings

SIZE = 64
TARGETS = {
    "facility_location_1e5_cpu_s": ("<=", 10.0),
    "mmr_1e5_cpu_s": ("<=", 10.0),
    "ivf_over_flat_1e6": (">=", 60.0),
    "ivf_recall_at_10": (">=", 0.99),
    "kmeans_fit_1e6_cpu_s": ("<=", 3.0),
}
"""What must hold at full size."""


def scenes(num: int, seed: int, num_groups: int = 3000, noise: float = 0.5) -> np.ndarray:
    """Return unit vectors around random directions; `noise` 0.5 puts in-group cosines near .8."""
    rng = np.random.default_rng([seed, 1])
    centres = rng.standard_normal((num_groups, SIZE)).astype(np.float32)
    drawn = np.random.default_rng([seed, 2, num])
    spread = noise * drawn.standard_normal((num, SIZE), dtype=np.float32)
    return similarity.normalised(centres[drawn.integers(0, num_groups, num)] + spread)


def measure_selection(num: int, seed: int) -> dict[str, float]:
    """Retrieve a tenth of one cluster that holds the whole pool, against 512 queries."""
    pool = retrieval.make_candidates(np.array([f"s{i:08d}" for i in range(num)]), scenes(num, seed))
    queries = retrieval.Queries(embeddings_ED=scenes(512, seed), weights_E=np.ones(512))
    labels, count = np.full(num, "c00"), num // 10
    found = {}
    for method in ("facility_location", "mmr", "random"):
        config = RetrievalConfig(method=method)
        seconds, result = cpu_seconds(
            lambda config=config: retrieval.Search(
                pool, labels, {"c00": queries}, ["c00"], config, seed
            ).choose({"c00": count})
        )
        assert len(result["c00"]) == count
        found[f"{method}_{_power(num)}_cpu_s"] = seconds
    return found


def measure_shortlist(num: int, seed: int) -> dict[str, float]:
    """Cut one large cluster to 10^5 candidates by reading it in chunks."""
    pool = retrieval.make_candidates(np.array([f"s{i:08d}" for i in range(num)]), scenes(num, seed))
    queries = retrieval.Queries(embeddings_ED=scenes(512, seed), weights_E=np.ones(512))
    config = RetrievalConfig()
    rows = np.arange(num)
    seconds, kept = cpu_seconds(lambda: retrieval.shortlist(pool, rows, queries, config, seed, 1000))
    return {f"shortlist_{_power(num)}_cpu_s": seconds, "shortlist_kept": float(len(kept))}


def measure_index(num: int, seed: int, num_flat: int, num_ivf: int) -> dict[str, float]:
    """Compare the index that a pool of this size gets with flat search, ten neighbours a query."""
    pool, queries = scenes(num, seed), scenes(num_ivf, seed)  # same groups, other draws
    faiss = similarity.require_faiss()
    flat = faiss.IndexFlatIP(SIZE)
    flat.add(pool)
    build_s, index = cpu_seconds(lambda: similarity.build_index(pool, seed=seed))
    flat_s, (_, truth) = cpu_seconds(lambda: similarity.nearest(flat, queries[:num_flat], 10))
    index_s, (_, rows) = cpu_seconds(lambda: similarity.nearest(index, queries, 10))
    hits = [len(set(a) & set(b)) for a, b in zip(truth.tolist(), rows[:num_flat].tolist(), strict=True)]
    return {
        "ivf_build_cpu_s": build_s,
        "flat_queries_per_cpu_s": num_flat / flat_s,
        "ivf_queries_per_cpu_s": num_ivf / index_s,
        f"ivf_over_flat_{_power(num)}": (num_ivf / index_s) / (num_flat / flat_s),
        "ivf_recall_at_10": float(np.mean(hits)) / 10,
    }


def measure_structureless(num: int, seed: int, num_queries: int) -> dict[str, float]:
    """Recall of the same index where the pool has no groups at all: the worst case, no target."""
    pool, queries = scenes(num, seed, noise=50.0), scenes(num_queries, seed + 1000, noise=50.0)
    flat = similarity.require_faiss().IndexFlatIP(SIZE)
    flat.add(pool)
    truth = similarity.nearest(flat, queries, 10)[1]
    rows = similarity.nearest(similarity.build_index(pool, seed=seed), queries, 10)[1]
    hits = [len(set(a) & set(b)) for a, b in zip(truth.tolist(), rows.tolist(), strict=True)]
    return {"ivf_recall_at_10_structureless": float(np.mean(hits)) / 10}


def measure_clusters(num: int, seed: int) -> dict[str, float]:
    """Fit 256 centroids on a sample, label every scene once, agglomerate to 16."""
    pool = scenes(num, seed)
    fit_s, centroids = cpu_seconds(lambda: clusters.fit_kmeans(pool, 256, seed))
    assign_s, labels = cpu_seconds(lambda: clusters.nearest_centroid(pool, centroids))
    sizes = np.bincount(labels, minlength=256)
    ward_s, _ = cpu_seconds(lambda: clusters.ward_labels(centroids, sizes, 16))
    objective = float((pool * centroids[labels]).sum(axis=1).mean())
    return {
        f"kmeans_fit_{_power(num)}_cpu_s": fit_s,
        f"assign_{_power(num)}_cpu_s": assign_s,
        "ward_256_to_16_cpu_s": ward_s,
        "mean_cosine_to_centroid": objective,
    }


def _power(num: int) -> str:
    return f"{num:.0e}".replace("+0", "")


def measure(seed: int, quick: bool) -> dict[str, float]:
    pool, large = (10_000, 300_000) if quick else (100_000, 1_000_000)
    return {
        **measure_clusters(large, seed),
        **measure_index(large, seed, 200, 2000 if quick else 5000),
        **measure_structureless(large, seed, 100),
        **measure_selection(pool, seed),
        **measure_shortlist(large, seed),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def misses(mean: dict[str, float]) -> list[str]:
    """Return one line `name measured target` for every missed target among the figures measured."""
    return [
        f"{name} {mean[name]:.3f} {sign} {limit}"
        for name, (sign, limit) in TARGETS.items()
        if name in mean and not (mean[name] <= limit if sign == "<=" else mean[name] >= limit)
    ]


def main() -> int:
    options = common_parser(
        __doc__,
        quick="small sizes: a smoke test, targets by size do not apply",
        seed_help="first seed; three are run (one with --quick)",
    ).parse_args()
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    runs = [measure(seed, options.quick) for seed in seeds]
    mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    for name, value in mean.items():
        values = [run[name] for run in runs]
        print(f"{name:38s} {value:10.3f}   [{min(values):.3f}, {max(values):.3f}]")
    if options.json:
        options.json.write_text(
            json.dumps(surroundings("numpy", "faiss-cpu") | {"seeds": list(seeds), "runs": runs}, indent=1)
        )
    missed = misses(mean)
    print("\n".join(missed))
    return int(bool(options.check and missed))


if __name__ == "__main__":
    sys.exit(main())
