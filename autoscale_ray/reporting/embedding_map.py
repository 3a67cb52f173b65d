"""Pictures of the embedding of a run: the map of real and synthetic scenes, and a sheet of nearest scenes.

Both show the whitened embedding, which clusters and retrieval compare.

Shape legend: N scenes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from autoscale_ray.records import Clusters
from autoscale_ray.reporting.embedding_plots import (
    embedding_figure,
    medoid_rows,
    retrieval_figure,
    unit_rows,
)
from autoscale_ray.reporting.plots import save
from autoscale_ray.scenes.parquet import read_groups, read_parquet
from autoscale_ray.scenes.pool import ScenePool

MAX_POINTS = 4000
"""Points of one side; a picture with more shows nothing more."""
SIDES = ("synthetic", "real")
NUM_QUERIES = 8
NUM_NEAREST = 5
Whiten = Callable[[np.ndarray], np.ndarray]


def write_embedding_map(
    clusters: Clusters, whiten: Whiten, pools: Mapping[str, ScenePool], path: Path
) -> Path:
    """Draw real and synthetic scenes on two components, with each cluster's medoid.

    One map by cluster, one by domain and, for a generated world, one by its hidden family.

    Args:
        clusters: Clusters with their label and embedding files.
        whiten: Turns stored embeddings into those that are compared.
        pools: Pool by side.
        path: PNG file.
    """
    z_ND, cluster_N, side_N, row_N = _points(clusters, whiten)
    medoids = {
        name: pools[str(side_N[place])].batch(row_N[place : place + 1])
        for name, place in medoid_rows(z_ND, cluster_N).items()
    }
    labels = {"cluster": cluster_N, "domain": side_N} | _families(pools, side_N, row_N)
    return save(embedding_figure(z_ND, labels, medoids), path)


def write_retrieval_sheet(
    clusters: Clusters, whiten: Whiten, pools: Mapping[str, ScenePool], path: Path
) -> Path:
    """Draw real scenes beside their nearest synthetic scenes.

    The scenes are drawn at random, one from each of as many clusters, from the largest to the smallest at even steps: a
    medoid would be the easiest scene of its cluster.

    Args:
        clusters: Clusters with their label and embedding files.
        whiten: Turns stored embeddings into those that are compared.
        pools: Pool by side.
        path: PNG file.
    """
    z_ND, cluster_N, side_N, row_N = _points(clusters, whiten)
    synthetic = np.flatnonzero(side_N == "synthetic")
    queries = _queries(np.where(side_N == "real", cluster_N, ""))
    sheet, cosines, unit_ND = [], [], unit_rows(z_ND)
    for place in queries:
        cosine_S = unit_ND[synthetic] @ unit_ND[place]
        nearest = np.argsort(-cosine_S, kind="stable")[:NUM_NEAREST]
        cosines.append(cosine_S[nearest])
        sheet.append([pools["synthetic"].batch(row_N[other : other + 1]) for other in synthetic[nearest]])
    shown = [pools["real"].batch(row_N[place : place + 1]) for place in queries]
    return save(retrieval_figure(shown, sheet, cluster_N[queries].tolist(), np.array(cosines)), path)


def _queries(cluster_N: np.ndarray) -> np.ndarray:
    """Return a random scene of each of some clusters, from the largest to the smallest; "" belongs to none."""
    names, counts = np.unique(cluster_N[cluster_N != ""], return_counts=True)
    by_size = names[np.argsort(-counts, kind="stable")]
    chosen = by_size[np.linspace(0, len(by_size) - 1, min(NUM_QUERIES, len(by_size))).astype(int)]
    rng = np.random.default_rng(0)
    return np.array([rng.choice(np.flatnonzero(cluster_N == name)) for name in chosen])


def _families(pools: Mapping[str, ScenePool], side_N: np.ndarray, row_N: np.ndarray) -> dict[str, np.ndarray]:
    """Return the hidden family of every scene; nothing for pools that were not generated."""
    files = {side: pools[side].path / "truth.parquet" for side in SIDES}
    if not all(file.is_file() for file in files.values()):
        return {}
    family_N = np.empty(len(side_N), dtype=object)
    for side, file in files.items():
        truth = read_parquet(file, ["scene_id", "family"])
        names = dict(zip(truth["scene_id"].to_pylist(), truth["family"].to_pylist(), strict=True))
        mine = np.flatnonzero(side_N == side)
        family_N[mine] = [names.get(scene_id, "unknown") for scene_id in pools[side].scene_ids[row_N[mine]]]
    return {"family": family_N.astype(str)}


def _points(clusters: Clusters, whiten: Whiten) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return whitened embeddings, cluster, side and pool row of an even sample of both training pools."""
    parts = []
    for side in SIDES:
        tables = read_groups(clusters.files[f"embeddings_{side}"], ["embedding"])
        columns = (table["embedding"].combine_chunks() for table in tables)
        z_ND = np.concatenate([column.values.to_numpy().reshape(len(column), -1) for column in columns])
        labels_N = np.array(read_parquet(clusters.files[f"labels_{side}"])["cluster"].to_pylist())
        rows = np.linspace(0, len(z_ND) - 1, min(len(z_ND), MAX_POINTS)).astype(np.int64)
        parts.append((whiten(z_ND[rows].astype(np.float64)), labels_N[rows], np.full(len(rows), side), rows))
    z_ND, cluster_N, side_N, row_N = map(np.concatenate, zip(*parts, strict=True))
    return z_ND, cluster_N, side_N, row_N
