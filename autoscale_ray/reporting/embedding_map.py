"""The embedding of all scenes in two dimensions, coloured by cluster and by domain.

Shape legend: N scenes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from autoscale_ray.records import Clusters
from autoscale_ray.reporting.plots import save
from autoscale_ray.scenes.parquet import read_parquet

MAX_POINTS = 4000
"""Points of one side; a picture with more shows nothing more."""


def write_embedding_map(clusters: Clusters, path: Path) -> Path:
    """Draw real and synthetic scenes on the first two principal components.

    Args:
        clusters: Clusters with their label and embedding files.
        path: PNG file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    points, names = {}, {}
    for side in ("synthetic", "real"):
        column = read_parquet(clusters.files[f"embeddings_{side}"])["embedding"].combine_chunks()
        z_ND = column.values.to_numpy().reshape(len(column), -1)
        kept = np.linspace(0, len(z_ND) - 1, min(len(z_ND), MAX_POINTS)).astype(int)
        labels = np.array(read_parquet(clusters.files[f"labels_{side}"])["cluster"].to_pylist())
        points[side], names[side] = z_ND[kept].astype(np.float64), labels[kept]
    return save(map_figure(points, names, clusters.cluster_ids), path)


def map_figure(
    points: dict[str, np.ndarray], names: dict[str, np.ndarray], cluster_ids: tuple[str, ...]
) -> Figure:
    """Return the map twice: by cluster and by domain.

    Args:
        points: Embeddings (N, D) by domain.
        names: Cluster of each scene by domain.
        cluster_ids: All clusters, in order.
    """
    plane = principal_plane(np.concatenate(list(points.values())))
    flat = {side: plane(z_ND) for side, z_ND in points.items()}
    figure = Figure(figsize=(12.5, 5.6))
    by_cluster, by_domain = figure.subplots(1, 2)
    colours = matplotlib.colormaps["tab20"](np.arange(len(cluster_ids)) % 20)
    xy = np.concatenate(list(flat.values()))
    labels = np.concatenate([names[side] for side in flat])
    for colour, name in zip(colours, cluster_ids, strict=True):
        chosen = labels == name
        by_cluster.scatter(xy[chosen, 0], xy[chosen, 1], s=4, color=colour, label=name, linewidths=0)
    for side, colour in (("synthetic", "tab:orange"), ("real", "tab:blue")):
        by_domain.scatter(flat[side][:, 0], flat[side][:, 1], s=4, color=colour, label=side, linewidths=0)
    for axes, title in ((by_cluster, "by cluster"), (by_domain, "by domain")):
        axes.set(title=f"Scene embeddings {title}", xlabel="component 1", ylabel="component 2")
        axes.legend(markerscale=3, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.subplots_adjust(wspace=0.35)
    return figure


def principal_plane(z_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map onto the first two principal components, each signed by its largest loading."""
    mean_D = z_ND.mean(axis=0)
    _, _, axes_DD = np.linalg.svd(z_ND - mean_D, full_matrices=False)
    axes_2D = axes_DD[:2]
    axes_2D = axes_2D * np.sign(axes_2D[np.arange(len(axes_2D)), np.abs(axes_2D).argmax(axis=1)])[:, None]
    return lambda rows_MD: (rows_MD - mean_D) @ axes_2D.T
