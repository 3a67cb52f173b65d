"""Clusters of scenes in two levels: many fine ones, made into few coarse ones that carry mixture weights.

Formulae: docs/clusters_and_retrieval.md. Legend: N scenes, D embedding size, F fine clusters, K coarse clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from autoscale_ray.config import ClusterConfig
from autoscale_ray.errors import ArtifactError, InvalidInputError
from autoscale_ray.mixture.similarity import (
    Float32,
    Float64,
    Int64,
    Whitening,
    checked_embeddings,
    fit_whitening,
    normalised,
    one_faiss_thread,
)
from autoscale_ray.scenes.sample import sampled_rows

NUM_ITERATIONS = 20
"""Lloyd iterations; faiss's default, at which the sampled objective equals that of a full epoch."""
SCENES_PER_FINE = 10
"""A fine cluster is only worth having with this many scenes: small pools get fewer fine clusters."""
SAMPLE_PER_FINE = 256
"""Sampled scenes for one centroid beyond which the objective stops improving (faiss's own default)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterModel:
    """Fitted two-level clusters: everything needed to label a scene, nothing about how many there are."""

    whitening: Whitening
    centroids_fine_FD: Float32
    """Unit centroids in whitened space."""
    coarse_of_fine_F: Int64
    """Coarse cluster of each fine one, in [0, K)."""

    @property
    def num_coarse(self) -> int:
        """Number K of coarse clusters."""
        return int(self.coarse_of_fine_F.max()) + 1

    @property
    def coarse_ids(self) -> tuple[str, ...]:
        """Stable names c00, c01, ... ordered by size at the fit, then by centroid."""
        return cluster_names(self.num_coarse)

    def assign(self, embeddings_ND: NDArray[Any]) -> tuple[Int64, Int64]:
        """Label scenes with their nearest fine centroid and its coarse cluster; ties go to the lower label.

        Args:
            embeddings_ND: Raw embeddings of any scenes (real, synthetic, dev, test).

        Returns:
            Fine labels N and coarse labels N.

        Raises:
            InvalidInputError: Wrong width or a value that is not finite.
        """
        fine_N = nearest_centroid(self.whitening.apply(embeddings_ND), self.centroids_fine_FD)
        return fine_N, self.coarse_of_fine_F[fine_N]

    def save(self, path: Path) -> None:
        """Write the model as one safetensors file.

        Args:
            path: File to write.
        """
        arrays = {
            "whitening_mean_D": self.whitening.mean_D,
            "whitening_matrix_DD": self.whitening.matrix_DD,
            "centroids_fine_FD": self.centroids_fine_FD,
            "coarse_of_fine_F": self.coarse_of_fine_F,
        }
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)

    @classmethod
    def load(cls, path: Path) -> ClusterModel:
        """Read a model written by `save`.

        Raises:
            ArtifactError: A table is missing or the shapes do not agree.
        """
        arrays = load_file(path)
        names = {"whitening_mean_D", "whitening_matrix_DD", "centroids_fine_FD", "coarse_of_fine_F"}
        if set(arrays) != names:
            raise ArtifactError(str(path), f"must hold exactly {sorted(names)}", sorted(arrays))
        num_fine, size = arrays["centroids_fine_FD"].shape
        if arrays["coarse_of_fine_F"].shape != (num_fine,) or arrays["whitening_matrix_DD"].shape != (
            size,
            size,
        ):
            raise ArtifactError(
                str(path), "tables must agree in shape", {k: v.shape for k, v in arrays.items()}
            )
        whitening = Whitening(mean_D=arrays["whitening_mean_D"], matrix_DD=arrays["whitening_matrix_DD"])
        return cls(
            whitening=whitening,
            centroids_fine_FD=arrays["centroids_fine_FD"],
            coarse_of_fine_F=arrays["coarse_of_fine_F"],
        )


def cluster_names(num_coarse: int) -> tuple[str, ...]:
    """Name coarse clusters so that names sort as the labels do: c00, c01, ..."""
    width = max(2, len(str(num_coarse - 1)))
    return tuple(f"c{label:0{width}d}" for label in range(num_coarse))


def fit_clusters(
    train_ND: NDArray[Any],
    dev_MD: NDArray[Any],
    config: ClusterConfig,
    seed: int,
    dev_weights_M: NDArray[Any] | None = None,
    num_real: int = 0,
) -> ClusterModel:
    """Fit fine and coarse clusters on training scenes; dev scenes are only assigned.

    Spherical k-means for the fine level on a seeded sample; Ward agglomeration of the fine centroids for the
    coarse one, each with weight (1 - s) share of training scenes + s share of dev weight, s = `dev_share`; then
    coarse clusters with too few dev scenes join their nearest (docs/clusters_and_retrieval.md, clusters in two
    levels). With s = 0 the large families are cut into many clusters and the rare ones, where the objective has its
    weight, share one.

    Args:
        train_ND: Raw embeddings of real and synthetic training scenes, N >= 1.
        dev_MD: Raw embeddings of dev scenes; they move no centroid, they only decide which clusters merge.
        config: Numbers of clusters, sample and dev floor.
        seed: Seed of the sample and of k-means, >= 0.
        dev_weights_M: Weight of each dev scene in the objective, >= 0; equal weights without it.
        num_real: How many of the training rows, the first, are real: these give all they have, or half of the sample,
            before synthetic ones take their place.

    Raises:
        InvalidInputError: No training scene, wrong width, or a value that is not finite.
        MissingExtraError: faiss is not installed.
    """
    if min(config.num_fine, config.num_coarse) < 1:
        raise InvalidInputError(
            "clusters", "num_fine and num_coarse must be >= 1", (config.num_fine, config.num_coarse)
        )
    train_ND = checked_embeddings("training embeddings", train_ND)
    real_R, others_R = sampled_rows((num_real, len(train_ND) - num_real), config.max_sample, seed)
    sample_ND = train_ND[np.concatenate([real_R, num_real + others_R])]
    whitening = fit_whitening(sample_ND)
    unit_ND = whitening.apply(sample_ND)
    num_fine = min(config.num_fine, max(1, len(unit_ND) // SCENES_PER_FINE))
    centroids_FD = fit_kmeans(unit_ND, num_fine, seed)
    sizes_F = np.bincount(nearest_centroid(unit_ND, centroids_FD), minlength=num_fine)
    dev_M = nearest_centroid(whitening.apply(dev_MD), centroids_FD) if len(dev_MD) else np.empty(0, np.int64)
    shares_F = _shares(sizes_F)
    if len(dev_M):
        dev_shares_F = _shares(np.bincount(dev_M, weights=dev_weights_M, minlength=num_fine))
        shares_F = (1 - config.dev_share) * shares_F + config.dev_share * dev_shares_F
    coarse_F = ward_labels(centroids_FD, shares_F * len(unit_ND), config.num_coarse)
    if len(dev_M):
        dev_F = np.bincount(dev_M, minlength=num_fine)
        coarse_F = merge_below_floor(coarse_F, centroids_FD, sizes_F, dev_F, config.min_dev_scenes)
    return ClusterModel(
        whitening=whitening,
        centroids_fine_FD=centroids_FD,
        coarse_of_fine_F=_ordered_labels(coarse_F, centroids_FD, sizes_F),
    )


def fit_kmeans(unit_ND: Float32, num_clusters: int, seed: int) -> Float32:
    """Fit spherical k-means on one thread, on a sample of at most `SAMPLE_PER_FINE` scenes a centroid.

    Args:
        unit_ND: Unit rows, N >= num_clusters.
        num_clusters: F >= 1.
        seed: Seed of the sample and of the first centroids.

    Returns:
        Unit centroids, F x D, sorted by coordinates so that equal fits compare equal.
    """
    with one_faiss_thread() as faiss:
        kmeans = faiss.Kmeans(
            unit_ND.shape[1],
            num_clusters,
            niter=NUM_ITERATIONS,
            spherical=True,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=SAMPLE_PER_FINE,
        )
        kmeans.train(unit_ND)
    centroids_FD = normalised(kmeans.centroids)
    return np.ascontiguousarray(centroids_FD[np.lexsort(centroids_FD.T[::-1])])


def nearest_centroid(unit_ND: Float32, centroids_FD: Float32, chunk: int = 65_536) -> Int64:
    """Return the centroid of largest cosine for every scene, the lower index at equal cosine.

    Args:
        unit_ND: Unit rows.
        centroids_FD: Unit rows.
        chunk: Scenes handled at once; bounds memory, changes nothing.
    """
    label_chunks = [
        np.argmax(unit_ND[start : start + chunk] @ centroids_FD.T, axis=1)
        for start in range(0, len(unit_ND), chunk)
    ]
    return np.concatenate([np.empty(0, np.int64), *label_chunks]).astype(np.int64)


def ward_labels(centroids_FD: NDArray[Any], sizes_F: NDArray[Any], num_clusters: int) -> Int64:
    """Agglomerate weighted points by Ward's criterion down to a number of groups.

    Each step joins the pair of least n_i n_j / (n_i + n_j) |m_i - m_j|^2 (Ward 1963), m the weighted means;
    the first such pair in label order at a tie, so the result has one value. scipy's Ward takes no weights.

    Args:
        centroids_FD: Points.
        sizes_F: Weights, >= 0; a weight of 0 counts as 1e-9 so that empty clusters join at once.
        num_clusters: Groups wanted, >= 1; more than F gives F.

    Returns:
        Group of each point, in [0, groups).
    """
    means_FD = np.array(centroids_FD, dtype=np.float64)
    weights_F = np.maximum(np.array(sizes_F, dtype=np.float64), 1e-9)
    labels_F = np.arange(len(means_FD))
    cost_FF = np.full((len(means_FD), len(means_FD)), np.inf)
    for row in range(len(means_FD)):
        cost_FF[row, row + 1 :] = _ward_cost(row, means_FD, weights_F)[row + 1 :]
    for _ in range(len(means_FD) - num_clusters):
        keep, gone = np.unravel_index(np.argmin(cost_FF), cost_FF.shape)
        total = weights_F[keep] + weights_F[gone]
        means_FD[keep] = (weights_F[keep] * means_FD[keep] + weights_F[gone] * means_FD[gone]) / total
        weights_F[keep] = total
        labels_F[labels_F == gone] = keep
        cost_FF[gone, :] = cost_FF[:, gone] = np.inf
        alive_F = np.isin(np.arange(len(means_FD)), labels_F)
        cost_F = np.where(alive_F, _ward_cost(int(keep), means_FD, weights_F), np.inf)
        cost_FF[keep, keep + 1 :], cost_FF[:keep, keep] = cost_F[keep + 1 :], cost_F[:keep]
    return np.unique(labels_F, return_inverse=True)[1]


def _ward_cost(row: int, means_FD: Float64, weights_F: Float64) -> Float64:
    harmonic_F = weights_F * weights_F[row] / (weights_F + weights_F[row])
    return harmonic_F * ((means_FD - means_FD[row]) ** 2).sum(axis=1)


def merge_below_floor(
    coarse_F: Int64, centroids_FD: Float32, sizes_F: NDArray[Any], dev_F: NDArray[Any], min_dev_scenes: int
) -> Int64:
    """Join coarse clusters that hold too few dev scenes to their nearest neighbour, the poorest first.

    A cluster score has a standard error of sd / sqrt(dev scenes): below the floor it steers nothing.

    Args:
        coarse_F: Coarse cluster of each fine one.
        centroids_FD: Unit fine centroids.
        sizes_F: Training scenes of each fine cluster.
        dev_F: Dev scenes of each fine cluster.
        min_dev_scenes: Floor; one cluster is left even where all are below it.

    Returns:
        Labels in [0, K') in the order of the old ones.
    """
    labels_F = np.array(coarse_F)
    while True:
        alive_K, inverse_F = np.unique(labels_F, return_inverse=True)
        dev_K = np.bincount(inverse_F, weights=dev_F)
        if len(alive_K) == 1 or dev_K.min() >= min_dev_scenes:
            return inverse_F
        poorest = int(np.argmin(dev_K))
        means_KD = _coarse_means(inverse_F, centroids_FD, sizes_F)
        cosine_K = means_KD @ means_KD[poorest]
        cosine_K[poorest] = -np.inf
        labels_F[labels_F == alive_K[poorest]] = alive_K[int(np.argmax(cosine_K))]


def random_labels(num_scenes: int, shares_K: NDArray[Any], seed: int) -> Int64:
    """Deal scenes to clusters at random in fixed shares: the control in which clusters mean nothing.

    Args:
        num_scenes: N >= 0.
        shares_K: Wanted shares, >= 0, for example ones(K) for equal clusters or the sizes of real ones.
        seed: Seed of the deal; use another one for each pool.

    Returns:
        Labels N; cluster sizes differ from N * share by less than 1.
    """
    edges_K = np.cumsum(np.asarray(shares_K, dtype=np.float64))
    quantiles_N = (np.arange(num_scenes) + 0.5) / max(num_scenes, 1) * edges_K[-1]
    labels_N = np.searchsorted(edges_K, quantiles_N, side="right")
    return np.random.default_rng(seed).permutation(labels_N).astype(np.int64)


def _shares(counts_F: NDArray[Any]) -> Float64:
    return np.asarray(counts_F, dtype=np.float64) / max(float(np.sum(counts_F)), 1e-12)


def _coarse_means(coarse_F: Int64, centroids_FD: Float32, sizes_F: NDArray[Any]) -> Float32:
    weights_F = np.maximum(np.asarray(sizes_F, dtype=np.float64), 1e-6)
    sums_KD = np.zeros((int(coarse_F.max()) + 1, centroids_FD.shape[1]))
    np.add.at(sums_KD, coarse_F, weights_F[:, None] * centroids_FD)
    return normalised(sums_KD)


def _ordered_labels(coarse_F: Int64, centroids_FD: Float32, sizes_F: NDArray[Any]) -> Int64:
    """Renumber coarse clusters from the largest to the smallest, equal sizes by centroid."""
    sizes_K = np.bincount(coarse_F, weights=sizes_F)
    means_KD = _coarse_means(coarse_F, centroids_FD, sizes_F)
    order_K = np.lexsort((*means_KD.T[::-1], -sizes_K))
    return np.argsort(order_K)[coarse_F]
