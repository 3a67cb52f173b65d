"""How good an embedding is: retrieval, clustering, probes, and whether clusters respond alike.

Plain functions of arrays, no learning framework. A figure that is not defined (one class only, no query with a
relevant scene) is NaN, never 0.

Shape legend: N scenes, Q queries, B base scenes, D embedding size, K clusters, C classes.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import rankdata, spearmanr

Array = NDArray[Any]

KMEANS_RESTARTS = 3
PROBE_L2 = 1e-3


def unit_rows(vectors_ND: Array) -> Array:
    """Return rows scaled to length one, float64; a zero row stays zero."""
    vectors_ND = np.asarray(vectors_ND, dtype=np.float64)
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(length_N1 > 0, length_N1, 1.0)


def cosine_ranking(query_QD: Array, base_BD: Array, *, groups_N: Array | None = None) -> NDArray[np.int64]:
    """Order the base scenes by falling cosine similarity to each query; ties by row number.

    Args:
        query_QD: Queries.
        base_BD: Scenes to find.
        groups_N: Where the queries are the base scenes themselves: the group of each, such as its log. Its own group,
            itself included, comes last in the order of a query.

    Returns:
        Int64 (Q, B).
    """
    similarity_QB = unit_rows(query_QD) @ unit_rows(base_BD).T
    if groups_N is not None:
        similarity_QB[groups_N[:, None] == groups_N] = -np.inf
    return np.argsort(-similarity_QB, axis=1, kind="stable")


def recall_at(relevant_QR: Array, k: int) -> float:
    """Return the share of queries with a relevant scene among the first k.

    Queries without any relevant scene are left out.

    Args:
        relevant_QR: Bool, relevance in ranking order.
        k: >= 1.
    """
    answerable_Q = relevant_QR.any(axis=1)
    if not answerable_Q.any():
        return float("nan")
    return float(relevant_QR[answerable_Q, :k].any(axis=1).mean())


def mean_average_precision(relevant_QR: Array) -> float:
    """Return the mean over queries of the mean precision at the places of relevant scenes.

    AP = sum_r rel(r) precision(r) / sum_r rel(r). Queries without any relevant scene are left out.

    Args:
        relevant_QR: Bool, relevance in ranking order.
    """
    relevant_QR = np.asarray(relevant_QR, dtype=bool)
    total_Q = relevant_QR.sum(axis=1)
    if not (total_Q > 0).any():
        return float("nan")
    precision_QR = relevant_QR.cumsum(axis=1) / np.arange(1, relevant_QR.shape[1] + 1)
    found_Q = (precision_QR * relevant_QR).sum(axis=1)[total_Q > 0] / total_Q[total_Q > 0]
    return float(found_Q.mean())


def contingency(first_N: Array, second_N: Array) -> NDArray[np.int64]:
    """Count scenes by pair of labels (labels of any type; rows and columns in sorted label order)."""
    _, first = np.unique(first_N, return_inverse=True)
    _, second = np.unique(second_N, return_inverse=True)
    shape = (first.max(initial=-1) + 1, second.max(initial=-1) + 1)
    return np.bincount(first * shape[1] + second, minlength=shape[0] * shape[1]).reshape(shape)


def normalised_mutual_information(first_N: Array, second_N: Array) -> float:
    """Return I(A; B) / mean(H(A), H(B)), in [0, 1]; NaN when both labels are constant."""
    joint = contingency(first_N, second_N) / max(len(first_N), 1)
    entropy = _entropy(joint.sum(1)) + _entropy(joint.sum(0))
    if entropy <= 0:
        return float("nan")
    return float(2 * (entropy - _entropy(joint.ravel())) / entropy)


def _entropy(share: Array) -> float:
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def adjusted_rand_index(first_N: Array, second_N: Array) -> float:
    """Return the Rand index corrected for chance (Hubert and Arabie 1985, eq. 5); NaN when not defined."""
    table = contingency(first_N, second_N)
    together, rows, columns, total = (
        (count * (count - 1) / 2).sum() for count in (table, table.sum(1), table.sum(0), table.sum())
    )
    expected = rows * columns / max(total, 1)
    largest = (rows + columns) / 2
    return float("nan") if largest == expected else float((together - expected) / (largest - expected))


def purity(cluster_N: Array, label_N: Array) -> float:
    """Return the share of scenes that carry the most common label of their cluster."""
    return float(contingency(cluster_N, label_N).max(axis=1).sum() / len(cluster_N))


def kmeans_labels(vectors_ND: Array, num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Cluster unit rows by k-means, the best of three k-means++ starts.

    Args:
        vectors_ND: Embeddings.
        num_clusters: K, at most N.
        seed: Seed of the starts.
    """
    unit_ND = unit_rows(vectors_ND)
    best, best_cost = np.zeros(len(unit_ND), np.int64), np.inf
    for restart in range(KMEANS_RESTARTS):
        generator = np.random.default_rng([seed, restart])
        # The decorator by which scipy renames this argument hides it.
        centre, label = kmeans2(unit_ND, num_clusters, minit="++", seed=generator)  # pyright: ignore[reportCallIssue]
        cost = np.square(unit_ND - centre[label]).sum()
        if cost < best_cost:
            best, best_cost = label.astype(np.int64), cost
    return best


def silhouette(vectors_ND: Array, label_N: Array) -> float:
    """Return the mean silhouette (b - a) / max(a, b) with cosine distance 1 - cos.

    a: mean distance to the own cluster, b: smallest mean distance to another one (Rousseeuw 1987). Scenes alone in
    their cluster count 0, as defined there; NaN with fewer than two clusters.

    Args:
        vectors_ND: Embeddings.
        label_N: Clusters or classes.
    """
    _, label = np.unique(label_N, return_inverse=True)
    if label.max(initial=0) == 0:
        return float("nan")
    unit_ND = unit_rows(vectors_ND)
    count_K = np.bincount(label)
    sum_KD = np.stack([unit_ND[label == number].sum(0) for number in range(len(count_K))])
    # The mean of 1 - u.v over a cluster needs only the cluster's sum, so no N x N table.
    mean_NK = 1 - unit_ND @ sum_KD.T / count_K
    rows = np.arange(len(label))
    own_count = count_K[label]
    inside = (mean_NK[rows, label] * own_count - (1 - np.square(unit_ND).sum(1))) / np.maximum(
        own_count - 1, 1
    )
    mean_NK[rows, label] = np.inf
    outside = mean_NK.min(axis=1)
    score = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-12)
    return float(np.where(own_count > 1, score, 0.0).mean())


def fit_linear_probe(vectors_ND: Array, label_N: Array, num_classes: int) -> tuple[Array, Array]:
    """Fit multinomial logistic regression with balanced classes by L-BFGS.

    Args:
        vectors_ND: Standardised embeddings.
        label_N: Class numbers in [0, C).
        num_classes: C.

    Returns:
        Weights (D, C) and offsets (C).
    """
    size = vectors_ND.shape[1]
    weight_N = 1.0 / np.maximum(np.bincount(label_N, minlength=num_classes), 1)[label_N]
    weight_N = weight_N / weight_N.sum()
    target_NC = np.eye(num_classes)[label_N]

    def cost(parameters: Array) -> tuple[float, Array]:
        table = parameters.reshape(size + 1, num_classes)
        logit_NC = vectors_ND @ table[:-1] + table[-1]
        log_share_NC = logit_NC - logsumexp(logit_NC, axis=1, keepdims=True)
        value = -(weight_N * (target_NC * log_share_NC).sum(1)).sum() + PROBE_L2 * np.square(table[:-1]).sum()
        slope_NC = (np.exp(log_share_NC) - target_NC) * weight_N[:, None]
        slope = np.concatenate([vectors_ND.T @ slope_NC + 2 * PROBE_L2 * table[:-1], slope_NC.sum(0)[None]])
        return value, slope.ravel()

    start = np.zeros((size + 1) * num_classes)
    found = minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    table = found.reshape(size + 1, num_classes)
    return table[:-1], table[-1]


def _standardised(train_ND: Array, test_ND: Array) -> tuple[Array, Array]:
    train_ND, test_ND = np.asarray(train_ND, np.float64), np.asarray(test_ND, np.float64)
    mean_D, scale_D = train_ND.mean(0), train_ND.std(0)
    scale_D = np.where(scale_D > 1e-9, scale_D, 1.0)
    return (train_ND - mean_D) / scale_D, (test_ND - mean_D) / scale_D


def linear_probe_macro_f1(
    train_ND: Array, train_label_N: Array, test_ND: Array, test_label_N: Array
) -> float:
    """Return the macro F1 of a linear probe; classes of the test scenes only.

    Args:
        train_ND: Embeddings the probe is fitted on.
        train_label_N: Their classes, any type.
        test_ND: Embeddings it is judged on.
        test_label_N: Their classes.
    """
    classes, train_label = np.unique(train_label_N, return_inverse=True)
    train_x, test_x = _standardised(train_ND, test_ND)
    weight_DC, offset_C = fit_linear_probe(train_x, train_label, len(classes))
    return macro_f1(classes[(test_x @ weight_DC + offset_C).argmax(axis=1)], test_label_N)


def macro_f1(found_N: Array, label_N: Array) -> float:
    """Return the mean over the classes of `label_N` of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for name in np.unique(label_N):
        hit = ((found_N == name) & (label_N == name)).sum()
        scores.append(2 * hit / ((found_N == name).sum() + (label_N == name).sum()))
    return float(np.mean(scores))


def area_under_curve(score_N: Array, positive_N: Array) -> float:
    """Return the probability that a positive scores above a negative, ties counted half; NaN with one class."""
    positive_N = np.asarray(positive_N, dtype=bool)
    num_positive, num_negative = positive_N.sum(), (~positive_N).sum()
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    rank_sum = rankdata(score_N)[positive_N].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def domain_probe_auc(vectors_ND: Array, synthetic_N: Array, seed: int) -> float:
    """Return how well a linear probe tells synthetic from real scenes, judged on the half it was not fitted on.

    0.5: not at all, 1: always. Neither end is a target: aligned yet discernible domains train best (2604.13645).

    Args:
        vectors_ND: Embeddings of scenes of both domains.
        synthetic_N: Bool.
        seed: Seed of the halves.
    """
    order = np.random.default_rng(seed).permutation(len(vectors_ND))
    halves, scores = (order[::2], order[1::2]), np.empty(len(order))
    label_N = np.asarray(synthetic_N).astype(np.int64)
    for fitted, judged in (halves, halves[::-1]):
        train_x, test_x = _standardised(vectors_ND[fitted], vectors_ND[judged])
        weight_DC, offset_C = fit_linear_probe(train_x, label_N[fitted], 2)
        logit = test_x @ weight_DC + offset_C
        scores[judged] = logit[:, 1] - logit[:, 0]
    return float(np.mean([area_under_curve(scores[half], label_N[half]) for half in halves]))


def distance_correlation(vectors_ND: Array, delta_NN: Array) -> float:
    """Return Spearman's correlation of cosine distance and scenario distance over all pairs i < j."""
    unit_ND = unit_rows(vectors_ND)
    pair = np.triu_indices(len(unit_ND), 1)
    found = spearmanr((1 - unit_ND @ unit_ND.T)[pair], np.asarray(delta_NN)[pair])
    return float(cast(Any, found).statistic)


def effective_rank(vectors_ND: Array) -> float:
    """Return exp(entropy of the normalised singular values) of the centred embeddings (Roy and Vetterli 2007)."""
    values = np.asarray(vectors_ND, np.float64)
    singular = np.linalg.svd(values - values.mean(0), compute_uv=False)
    return float(np.exp(_entropy(singular / singular.sum()))) if singular.sum() > 0 else 1.0


def response_homogeneity(value_N: Array, cluster_N: Array) -> float:
    """Return the share of variance that lies between clusters, corrected for their number.

    epsilon^2 = (SS_between - (K - 1) MS_within) / SS_total (Kelley 1935), which is 0 on average for random clusters,
    where plain eta^2 would be (K - 1) / (N - 1). Scenes without a value are left out.

    Args:
        value_N: Per-scene score, or score difference of two planners; NaN where missing.
        cluster_N: Cluster of each scene.
    """
    known_N = np.isfinite(value_N)
    value = np.asarray(value_N)[known_N]
    _, label = np.unique(np.asarray(cluster_N)[known_N], return_inverse=True)
    num_clusters = label.max(initial=-1) + 1
    total = np.square(value - value.mean()).sum() if len(value) else 0.0
    if total == 0 or len(value) <= num_clusters:
        return float("nan")
    count_K = np.bincount(label)
    mean_K = np.bincount(label, weights=value) / count_K
    within = np.square(value - mean_K[label]).sum()
    return float(1 - within / (len(value) - num_clusters) * (len(value) - 1) / total)
