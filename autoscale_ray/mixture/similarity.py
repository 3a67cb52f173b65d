"""Compare embeddings: whitening, cosine neighbours at any pool size, and the domain probe.

Legend: N scenes, D embedding size, Q queries, M neighbours of a query.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscale_ray.errors import InvalidInputError, MissingExtraError, extra

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

EXACT_LIMIT = 200_000
"""Largest pool searched exactly; above it an inverted file is cheaper (benchmarks/bench_retrieval.py)."""


def require_faiss() -> Any:
    """Import faiss, or say how to get it.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", extra("cpu")) from error
    return faiss


@contextlib.contextmanager
def one_faiss_thread() -> Iterator[Any]:
    """Run faiss on one thread, so that sums and tie-breaks do not depend on the machine, then restore it."""
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def checked_embeddings(where: str, embeddings_ND: NDArray[Any], size: int | None = None) -> Float32:
    """Return embeddings as contiguous float32, or refuse them.

    Raises:
        InvalidInputError: Not a finite N x D table, or D is not `size`.
    """
    if embeddings_ND.ndim != 2 or (size is not None and embeddings_ND.shape[1] != size):
        raise InvalidInputError(where, f"must be N x {size or 'D'} embeddings", embeddings_ND.shape)
    finite_N = np.isfinite(embeddings_ND).all(axis=1)
    if not finite_N.all():
        raise InvalidInputError(where, "embeddings must be finite; first bad row", int(np.argmin(finite_N)))
    return np.ascontiguousarray(embeddings_ND, dtype=np.float32)


def normalised(embeddings_ND: NDArray[Any]) -> Float32:
    """Scale rows to unit length in float32; a zero row stays zero (it is like nothing).

    Args:
        embeddings_ND: Vectors.
    """
    values_ND = np.asarray(embeddings_ND, dtype=np.float32)
    lengths_N1 = np.linalg.norm(values_ND, axis=1, keepdims=True)
    return np.ascontiguousarray(values_ND / np.where(lengths_N1 > 0, lengths_N1, 1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Whitening:
    """An affine map after which the training embeddings have unit covariance."""

    mean_D: Float32
    matrix_DD: Float32

    def apply(self, embeddings_ND: NDArray[Any]) -> Float32:
        """Whiten and normalise: z = (x - mean) W, z / |z|.

        Args:
            embeddings_ND: Raw embeddings.

        Returns:
            Unit rows, float32.

        Raises:
            InvalidInputError: Wrong width or a value that is not finite.
        """
        checked_ND = checked_embeddings("embeddings", embeddings_ND, len(self.mean_D))
        return normalised((checked_ND - self.mean_D) @ self.matrix_DD)


def fit_whitening(embeddings_ND: NDArray[Any], shrinkage: float = 0.3) -> Whitening:
    """Fit ZCA whitening on training embeddings.

    C' = (1 - s) C + s tr(C)/D I;  W = U diag(lambda)^-1/2 U^T of C' (docs/clusters_and_retrieval.md,
    whitening; whitening before cosine as in TAROT, arXiv 2412.00420). The shrinkage keeps directions without
    variance from becoming pure noise.

    Args:
        embeddings_ND: Real and synthetic training scenes, N >= 1; never dev or test.
        shrinkage: s in (0, 1]; 0.3 found more scenes of a kind than 0.01 (docs/graph_rae.md, results).
    """
    values_ND = checked_embeddings("training embeddings", embeddings_ND).astype(np.float64)
    if len(values_ND) == 0:
        raise InvalidInputError("training embeddings", "must hold at least one scene", 0)
    mean_D = values_ND.mean(axis=0)
    centred_ND = values_ND - mean_D
    covariance_DD = centred_ND.T @ centred_ND / len(values_ND)
    size = covariance_DD.shape[0]
    scale = np.trace(covariance_DD) / size
    if scale <= 0:  # one scene, or all equal: nothing to whiten, and centring would leave zeros only
        return Whitening(mean_D=np.zeros(size, np.float32), matrix_DD=np.eye(size, dtype=np.float32))
    eigenvalues_D, vectors_DD = np.linalg.eigh(
        (1 - shrinkage) * covariance_DD + shrinkage * scale * np.eye(size)
    )
    matrix_DD = (vectors_DD / np.sqrt(eigenvalues_D)) @ vectors_DD.T
    return Whitening(mean_D=mean_D.astype(np.float32), matrix_DD=matrix_DD.astype(np.float32))


def build_index(embeddings_ND: Float32, *, num_lists: int = 1024, num_probes: int = 8, seed: int = 0) -> Any:
    """Build an inner-product index: exact up to `EXACT_LIMIT` scenes, an inverted file above.

    Args:
        embeddings_ND: Unit rows, float32.
        num_lists: Lists of the inverted file.
        num_probes: Lists read for a query; 8 of 1024 gave recall@10 of 0.995 at 10^6 x 64.
        seed: Seed of the list centroids.
    """
    size = embeddings_ND.shape[1]
    with one_faiss_thread() as faiss:
        if len(embeddings_ND) <= EXACT_LIMIT:
            index = faiss.IndexFlatIP(size)
        else:
            quantiser = faiss.IndexFlatIP(size)
            index = faiss.IndexIVFFlat(quantiser, size, num_lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed, index.cp.niter, index.cp.spherical = seed, 10, True
            sample = np.random.default_rng(seed).permutation(len(embeddings_ND))[: 64 * num_lists]
            index.train(embeddings_ND[np.sort(sample)])
            index.nprobe = num_probes
        index.add(embeddings_ND)
    return index


def nearest(index: Any, queries_QD: Float32, num_neighbours: int) -> tuple[Float32, Int64]:
    """Return the most similar rows of an index.

    Args:
        index: From `build_index`.
        queries_QD: Unit rows.
        num_neighbours: M >= 1.

    Returns:
        Cosine similarities and rows, each Q x M, best first; row -1 where fewer than M were found.
    """
    with one_faiss_thread():
        return index.search(np.ascontiguousarray(queries_QD, dtype=np.float32), num_neighbours)


def nearest_in_stream(
    batches: Iterable[Float32], queries_QD: Float32, num_neighbours: int
) -> tuple[Float32, Int64]:
    """Return the most similar rows of a pool that is read in batches; memory is Q x M plus one batch.

    Args:
        batches: Unit rows in pool order.
        queries_QD: Unit rows.
        num_neighbours: M >= 1.

    Returns:
        Cosine similarities and pool rows, Q x M, best first, equal similarities in row order; -inf and -1
        where the pool holds fewer than M scenes.
    """
    best_QM = np.full((len(queries_QD), num_neighbours), -np.inf, dtype=np.float32)
    rows_QM = np.full((len(queries_QD), num_neighbours), -1, dtype=np.int64)
    queries_QD, start = np.ascontiguousarray(queries_QD, dtype=np.float32), 0
    with one_faiss_thread() as faiss:
        for batch_BD in batches:
            found_QX, places_QX = faiss.knn(
                queries_QD,
                np.ascontiguousarray(batch_BD, dtype=np.float32),
                min(num_neighbours, len(batch_BD)),
                metric=faiss.METRIC_INNER_PRODUCT,
            )
            merged_QX = np.concatenate([best_QM, found_QX], axis=1)
            places_QX = np.concatenate([rows_QM, start + places_QX], axis=1)
            order_QM = np.lexsort((places_QX, -merged_QX), axis=1)[:, :num_neighbours]
            best_QM = np.take_along_axis(merged_QX, order_QM, axis=1)
            rows_QM = np.take_along_axis(places_QX, order_QM, axis=1)
            start += len(batch_BD)
    return best_QM, rows_QM


ODDS_ROWS = 1 << 18
"""Rows that the probe holds in float64 at once: 128 MiB of embeddings of size 64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainProbe:
    """How unlike real scenes a scene is, on a calibrated scale."""

    weights_D: Float64
    bias: float
    free_to: float
    """Log-odds up to which a scene costs nothing: the 95 % quantile of real scenes, or see `fit_domain_probe`."""
    kept_to: float
    """Log-odds up to which a scene is no outlier: the 99.5 % quantile of the same scenes."""

    def log_odds(self, embeddings_ND: NDArray[Any]) -> Float64:
        """Return the log-odds of being synthetic, free of the two pools' sizes.

        Args:
            embeddings_ND: Unit rows; a memory map is read in pieces.
        """
        odds_N = np.empty(len(embeddings_ND))
        for start in range(0, len(odds_N), ODDS_ROWS):
            piece_ND = np.asarray(embeddings_ND[start : start + ODDS_ROWS], dtype=np.float64)
            odds_N[start : start + ODDS_ROWS] = piece_ND @ self.weights_D + self.bias
        return odds_N


def fit_domain_probe(real_ND: NDArray[Any], synthetic_MD: NDArray[Any], penalty: float = 1.0) -> DomainProbe:
    """Fit a logistic regression real against synthetic and calibrate it on rows it was not fitted on.

    log-odds = b (w.x) + c; w from even rows (ridge `penalty`), scale b and offset c from odd rows (Platt's
    method); both domains get total weight one half, so the pool sizes cancel (docs/clusters_and_retrieval.md,
    choosing inside a cluster). Where half of the synthetic scenes would be outliers, the quantiles are those of the
    synthetic scenes: what nearly all of them have is the mark of their source, and no fault.

    Args:
        real_ND: Unit rows of real training scenes, at least 2.
        synthetic_MD: Unit rows of synthetic scenes, at least 2.
        penalty: Ridge on w, in units of one scene.

    Raises:
        InvalidInputError: A domain has fewer than two scenes.
    """
    if min(len(real_ND), len(synthetic_MD)) < 2:
        raise InvalidInputError(
            "domain probe", "needs two scenes of each domain", (len(real_ND), len(synthetic_MD))
        )
    scenes_ND = np.concatenate([real_ND, synthetic_MD]).astype(np.float64)
    labels_N = np.repeat([0.0, 1.0], [len(real_ND), len(synthetic_MD)])
    even_N = np.concatenate([np.arange(len(real_ND)) % 2 == 0, np.arange(len(synthetic_MD)) % 2 == 0])
    direction_D, _ = _logistic(scenes_ND[even_N], labels_N[even_N], penalty)
    scores_N1 = (scenes_ND @ direction_D)[:, None]
    scale_1, offset = _logistic(scores_N1[~even_N], labels_N[~even_N], 1e-3)
    # A reversed probe on held-out rows means it found nothing.
    weights_D = direction_D * max(float(scale_1[0]), 0.0)
    held_odds_N, held_labels_N = scenes_ND[~even_N] @ weights_D + offset, labels_N[~even_N]
    real_odds_N, synthetic_odds_N = held_odds_N[held_labels_N == 0], held_odds_N[held_labels_N == 1]
    is_marked = np.median(synthetic_odds_N) > np.quantile(real_odds_N, 0.995)
    q95, q995 = np.quantile(synthetic_odds_N if is_marked else real_odds_N, [0.95, 0.995])
    return DomainProbe(weights_D=weights_D, bias=offset, free_to=float(q95), kept_to=float(q995))


def _logistic(features_ND: Float64, labels_N: Float64, penalty: float) -> tuple[Float64, float]:
    """Minimise the domain-balanced logistic loss by damped Newton steps; the bias is not penalised."""
    count = len(labels_N)
    domain_weight_N = np.where(labels_N > 0, 0.5 / labels_N.sum(), 0.5 / (count - labels_N.sum())) * count
    design_NP = np.concatenate([features_ND, np.ones((count, 1))], axis=1)
    ridge_P = np.append(np.full(features_ND.shape[1], penalty), 1e-9)
    parameters_P = np.zeros(design_NP.shape[1])
    for _ in range(50):
        probability_N = 1 / (1 + np.exp(-np.clip(design_NP @ parameters_P, -30, 30)))
        gradient_P = design_NP.T @ (domain_weight_N * (probability_N - labels_N)) + ridge_P * parameters_P
        curvature_N = domain_weight_N * np.maximum(probability_N * (1 - probability_N), 1e-6)
        step_P = np.linalg.solve((design_NP.T * curvature_N) @ design_NP + np.diag(ridge_P), gradient_P)
        step_P *= min(1.0, 5.0 / max(np.abs(step_P).max(), 1e-12))
        parameters_P = parameters_P - step_P
        if np.abs(step_P).max() < 1e-9:
            break
    return parameters_P[:-1], float(parameters_P[-1])
