"""Pictures of the embedding of a run: the map of real and synthetic scenes, and a sheet of nearest scenes.

Shape legend: N scenes, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from autoscale_ray.records import Clusters
from autoscale_ray.reporting.embedding_plots import (
    embedding_figure,
    medoid_rows,
    nearest_rows,
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


def write_embedding_map(clusters: Clusters, pools: Mapping[str, ScenePool], path: Path) -> Path:
    """Draw real and synthetic scenes on two components, with each cluster's medoid.

    One map by cluster, one by domain and, for a generated world, one by its hidden family.

    Args:
        clusters: Clusters with their label and embedding files.
        pools: Pool by side.
        path: PNG file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    z_ND, cluster_N, side_N, row_N = _points(clusters)
    medoids = {
        name: pools[str(side_N[place])].batch(row_N[place : place + 1])
        for name, place in medoid_rows(z_ND, cluster_N).items()
    }
    labels = {"cluster": cluster_N, "domain": side_N} | _families(pools, side_N, row_N)
    return save(embedding_figure(z_ND, labels, medoids), path)


def write_retrieval_sheet(clusters: Clusters, pools: Mapping[str, ScenePool], path: Path) -> Path:
    """Draw real scenes, one of each of the largest clusters, beside their nearest synthetic scenes.

    Args:
        clusters: Clusters with their label and embedding files.
        pools: Pool by side.
        path: PNG file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    z_ND, cluster_N, side_N, row_N = _points(clusters)
    synthetic = np.flatnonzero(side_N == "synthetic")
    medoids = medoid_rows(z_ND[side_N == "real"], cluster_N[side_N == "real"])
    queries = np.flatnonzero(side_N == "real")[list(medoids.values())[:NUM_QUERIES]]
    sheet, cosines, unit_ND = [], [], unit_rows(z_ND)
    for place in queries:
        candidates = np.concatenate([[place], synthetic])
        found = candidates[nearest_rows(z_ND[candidates], np.array([0]), NUM_NEAREST)[0]]
        cosines.append(unit_ND[found] @ unit_ND[place])
        sheet.append([pools["synthetic"].batch(row_N[other : other + 1]) for other in found])
    shown = [pools["real"].batch(row_N[place : place + 1]) for place in queries]
    return save(retrieval_figure(shown, sheet, cluster_N[queries].tolist(), np.array(cosines)), path)


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


def _points(clusters: Clusters) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return embeddings, cluster, side and pool row of an even sample of both training pools."""
    parts = []
    for side in SIDES:
        tables = read_groups(clusters.files[f"embeddings_{side}"], ["embedding"])
        columns = (table["embedding"].combine_chunks() for table in tables)
        z_ND = np.concatenate([column.values.to_numpy().reshape(len(column), -1) for column in columns])
        labels_N = np.array(read_parquet(clusters.files[f"labels_{side}"])["cluster"].to_pylist())
        rows = np.linspace(0, len(z_ND) - 1, min(len(z_ND), MAX_POINTS)).astype(np.int64)
        parts.append((z_ND[rows].astype(np.float64), labels_N[rows], np.full(len(rows), side), rows))
    z_ND, cluster_N, side_N, row_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return z_ND, cluster_N, side_N, row_N
