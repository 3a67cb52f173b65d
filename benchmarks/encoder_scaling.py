"""What embedding, clustering and retrieval cost as pools grow, and what 10^8 scenes would cost.

Every size has a process of its own, so that its peak memory is its own. Scenes are read at random from a pool's cache
and embedded, each as often as it is drawn; a little noise makes the vectors of one scene differ afterwards.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import nnls

from autoscale_ray.config import ClusterConfig, RepresentationConfig
from autoscale_ray.mixture.clusters import fit_clusters
from autoscale_ray.mixture.similarity import EXACT_LIMIT, build_index, nearest
from autoscale_ray.representation.model import embed, feature_sizes_of, new_model
from autoscale_ray.representation.scene_graph import graph_from_batch
from autoscale_ray.scenes.pool import ScenePool, open_pool
from benchmarks.process_meter import cpu_seconds

STAGES = ("embed", "cluster", "assign", "index", "search")
NUM_QUERIES = 1000
NUM_NEIGHBOURS = 10
NUM_COMPARED = 100
"""Queries whose neighbours are compared with those of flat search."""
CHUNK = 100_000
TARGET_SCENES = 10**8
CORES_PER_MACHINE = 16
NOISE = 0.1
"""Standard deviation of the noise on repeated embeddings, in units of their own."""


def measure(pool: ScenePool, sizes: Sequence[int], seed: int) -> list[dict[str, float]]:
    """Time every stage at every size.

    Args:
        pool: Scenes to draw from; their cache is built.
        sizes: Numbers of scenes.
        seed: Seed of the untrained encoder and of everything drawn.

    Returns:
        One row for each size: CPU seconds by stage, `recall` at 10 of the index against flat search, `peak_gib`.
    """
    rows = []
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
            rows.append(own.submit(_measure_one, pool.path, size, seed).result())
    return rows


def _measure_one(path: Path, size: int, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    pool, rng = open_pool(path), np.random.default_rng(seed)
    sizes = feature_sizes_of(graph_from_batch(pool.batch(np.arange(2))))
    model = new_model(RepresentationConfig(), sizes, seed)
    embed(model, pool, np.arange(min(64, len(pool))))  # compiles
    seconds, vectors_ND = cpu_seconds(lambda: embed(model, pool, rng.integers(0, len(pool), size)))
    spread = np.float32(NOISE * vectors_ND.std())
    for part_MD in np.array_split(vectors_ND, max(1, size // CHUNK)):
        part_MD += spread * rng.standard_normal(part_MD.shape, dtype=np.float32)
    return {"scenes": size, "embed": seconds} | _after_embedding(vectors_ND, seed)


def _after_embedding(vectors_ND: NDArray[np.float32], seed: int) -> dict[str, float]:
    config = ClusterConfig(num_fine=256)
    fit_s, clusters = cpu_seconds(lambda: fit_clusters(vectors_ND, vectors_ND[:1000], config, seed))
    assign_s, _ = cpu_seconds(lambda: clusters.assign(vectors_ND))
    unit_ND = clusters.whitening.apply(vectors_ND)
    index_s, index = cpu_seconds(lambda: build_index(unit_ND, seed=seed))
    search_s, (_, found_QM) = cpu_seconds(lambda: nearest(index, unit_ND[:NUM_QUERIES], NUM_NEIGHBOURS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    flat_QN = unit_ND[:NUM_COMPARED] @ unit_ND.T
    best_QM = np.argpartition(-flat_QN, NUM_NEIGHBOURS, axis=1)[:, :NUM_NEIGHBOURS]
    recall = np.mean([len(np.intersect1d(*pair)) for pair in zip(found_QM, best_QM, strict=False)])
    return {"cluster": fit_s, "assign": assign_s, "index": index_s, "search": search_s,
            "recall": float(recall / NUM_NEIGHBOURS), "peak_gib": peak}  # fmt: skip


def cost_lines(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Fit CPU seconds = a + b scenes to every stage, a, b >= 0, by least squares of the relative error.

    Index and search change their method above `EXACT_LIMIT` scenes, so only larger sizes tell what 10^8 would cost; a
    single such size gives a = 0, which is too dear rather than too cheap.
    """
    large = [row for row in rows if row["scenes"] > EXACT_LIMIT] or list(rows)[-1:]
    return {stage: _line(large if stage in ("index", "search") else rows, stage) for stage in STAGES}


def _line(rows: Sequence[dict[str, float]], stage: str) -> tuple[float, float]:
    size_M = np.array([row["scenes"] for row in rows], dtype=np.float64)
    cost_M = np.array([row[stage] for row in rows])
    if len(rows) == 1:
        return 0.0, float(cost_M[0] / size_M[0])
    design_M2 = np.stack([np.ones_like(size_M), size_M / size_M.max()], axis=1) / cost_M[:, None]
    (fixed, slope), _ = nnls(design_M2, np.ones_like(cost_M))
    return float(fixed), float(slope / size_M.max())


def projection(lines: dict[str, tuple[float, float]], num_scenes: int = TARGET_SCENES) -> dict[str, float]:
    """Return CPU hours by stage, and how many machines of 16 cores finish all of it in one hour."""
    hours = {stage: (fixed + slope * num_scenes) / 3600 for stage, (fixed, slope) in lines.items()}
    return hours | {"machines_for_one_hour": float(np.ceil(sum(hours.values()) / CORES_PER_MACHINE))}


def draw(rows: Sequence[dict[str, float]], lines: dict[str, tuple[float, float]], path: Path) -> None:
    """Draw the measured costs and their lines up to 10^8 scenes, and the peak memory beside them."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    size_M = [row["scenes"] for row in rows]
    far = np.geomspace(min(size_M), TARGET_SCENES, 50)
    for number, (stage, (fixed, slope)) in enumerate(lines.items()):
        left.plot(size_M, [row[stage] for row in rows], "o", color=f"C{number}")
        left.plot(far, fixed + slope * far, color=f"C{number}", linewidth=1, label=stage)
    left.set(xscale="log", yscale="log", xlabel="scenes", ylabel="CPU seconds, one thread",
             title="measured (dots) and a + b N")  # fmt: skip
    left.grid(alpha=0.3)
    left.legend()
    right.plot(size_M, [row["peak_gib"] for row in rows], "o-")
    right.set(
        xscale="log",
        xlabel="scenes",
        ylabel="GiB",
        ylim=(0, None),
        title="peak memory of a process of its own",
    )
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
