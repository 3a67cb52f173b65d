"""Look at an embedding: a map with the medoid scene of every cluster, and a sheet of nearest scenes.

Shape legend: N scenes, D embedding size, Q queries, M neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autoscale_ray.reporting.scene_plot import draw_scene
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.schema import CURRENT_FRAME

THUMBNAIL_X_M = (-15.0, 45.0)
THUMBNAIL_Y_M = (-22.0, 22.0)
"""What a thumbnail shows: more of what lies ahead, and near enough to see the others."""
THUMBNAILS_PER_ROW = 6
MAX_NAMES = 20


def unit_rows(embeddings_ND: np.ndarray) -> np.ndarray:
    """Return rows of length one; scenes are compared by their directions."""
    length_N1 = np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    return embeddings_ND / np.where(length_N1 > 0, length_N1, 1)


def principal_plane(z_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map onto the first two principal components, each signed by its largest loading."""
    mean_D = z_ND.mean(axis=0)
    _, _, axes_DD = np.linalg.svd(z_ND - mean_D, full_matrices=False)
    axes_2D = axes_DD[:2]
    axes_2D = axes_2D * np.sign(axes_2D[np.arange(len(axes_2D)), np.abs(axes_2D).argmax(axis=1)])[:, None]
    return lambda rows_MD: (rows_MD - mean_D) @ axes_2D.T


def medoid_rows(embeddings_ND: np.ndarray, label_N: np.ndarray) -> dict[str, int]:
    """Find the scene of each cluster whose embedding points most like the mean of the cluster.

    Args:
        embeddings_ND: Embeddings.
        label_N: Cluster of each scene.

    Returns:
        Row by cluster, in label order; ties go to the lower row.
    """
    unit_ND = unit_rows(embeddings_ND)
    found = {}
    for name in np.unique(label_N):
        rows = np.flatnonzero(label_N == name)
        found[str(name)] = int(rows[np.argmax(unit_ND[rows] @ unit_ND[rows].mean(axis=0))])
    return found


def embedding_figure(
    embeddings_ND: np.ndarray, labels: Mapping[str, np.ndarray], medoids: Mapping[str, SceneBatch]
) -> Figure:
    """Draw the map once for each labelling and a thumbnail of each medoid below.

    The map is the plane of the first two principal components of the directions; with up to 20 labels each one's name
    stands at the median of its scenes.

    Args:
        embeddings_ND: Embeddings.
        labels: Label of every scene by title, for example family, domain, cluster.
        medoids: One scene by cluster name, in the order of the thumbnails.
    """
    unit_ND = unit_rows(embeddings_ND.astype(np.float64))
    xy_N2 = principal_plane(unit_ND)(unit_ND)
    num_rows = -(-len(medoids) // THUMBNAILS_PER_ROW)
    height = 1.9 * num_rows * len(labels) / 2
    figure = Figure(figsize=(6.6 * len(labels), 5.5 + height), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(5.5, max(height, 0.1)))[:, 0]
    for axes, (title, label_N) in zip(
        upper.subplots(1, len(labels), squeeze=False)[0], labels.items(), strict=True
    ):
        _draw_map(axes, xy_N2, np.asarray(label_N), title)
    if medoids:
        cells = lower.subplots(num_rows, THUMBNAILS_PER_ROW, squeeze=False).ravel()
        _draw_thumbnails(cells, list(medoids.values()), [f"medoid of {name}" for name in medoids])
    return figure


def _draw_map(axes: Axes, xy_N2: np.ndarray, label_N: np.ndarray, title: str) -> None:
    names = np.unique(label_N)
    # The strong colours first, then their pale twins: neighbours in the palette are hard to tell apart.
    numbers = np.arange(len(names)) % 20
    colours = mpl.colormaps["tab20"](2 * numbers % 20 + numbers // 10)
    # Rare labels last, so that they lie on top.
    for number in sorted(range(len(names)), key=lambda number: -int((label_N == names[number]).sum())):
        mine = xy_N2[label_N == names[number]]
        axes.scatter(*mine.T, s=6, color=colours[number], label=str(names[number]), linewidths=0, alpha=0.7)
        if 2 < len(names) <= MAX_NAMES:
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
            x, y = np.median(mine, axis=0)
            axes.annotate(str(names[number]), (x, y), fontsize=6, ha="center", bbox=box)
    axes.set(title=f"by {title}", xlabel="component 1", ylabel="component 2")
    axes.legend(markerscale=3, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_thumbnails(cells: Sequence[Axes], scenes: Sequence[SceneBatch], titles: Sequence[str]) -> None:
    for axes in cells:
        axes.set_axis_off()
    for axes, scene, title in zip(cells, scenes, titles, strict=False):
        draw_scene(axes, scene)
        axes.set(xlim=THUMBNAIL_X_M, ylim=THUMBNAIL_Y_M)
        speed_mps = float(scene.ego_states_NT7[0, CURRENT_FRAME, 3])
        axes.set_title(f"{title}, {speed_mps:.0f} m/s", fontsize=8)


def retrieval_figure(
    queries: Sequence[SceneBatch],
    neighbours: Sequence[Sequence[SceneBatch]],
    names: Sequence[str],
    cosine_QM: np.ndarray,
) -> Figure:
    """Draw each query at the left of its nearest scenes.

    Args:
        queries: Q batches of one scene.
        neighbours: For each query its nearest scenes, nearest first, equally many.
        names: What to call each query, for example its cluster.
        cosine_QM: Cosine similarity of each neighbour.
    """
    width = 1 + len(neighbours[0])
    figure = Figure(figsize=(3.0 * width, 2.5 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), width, squeeze=False)
    for row, query, found, name, cosine_M in zip(grid, queries, neighbours, names, cosine_QM, strict=True):
        titles = [
            f"query {name}",
            *(f"nearest {rank + 1} ({cosine_M[rank]:.2f})" for rank in range(width - 1)),
        ]
        _draw_thumbnails(row, [query, *found], titles)
        row[0].set_axis_on()
        row[0].set(xticks=[], yticks=[])
    return figure
