"""The terms of the Graph-RAE objective, each a plain function of tensors (docs/graph_rae.md, objective).

Shape legend: N scenes, D embedding size, M nodes, E edges, C raster cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    cross_entropy,
    normalize,
    smooth_l1_loss,
)

from autoscale_ray.representation.decoder import SceneReconstruction
from autoscale_ray.representation.kinematics import POSITION_SCALE_M

OCCUPIED_WEIGHT = 5.0
"""Positive weight of occupied and lane cells, which are few."""
TEMPERATURE = 0.1
SCE_EXPONENT = 2.0
DISTANCE_FLOOR = 0.02
"""Added to both distances before the logarithm, so that near-copies do not dominate the ratios."""
PAIR_SCALE = 0.25
"""Scenario distance at which the pull between a perturbed scene and its source has fallen to 1/e."""
NEIGHBOUR_SCALE = 0.05
"""Scenario distance at which a scene's share as a neighbour has fallen to 1/e: a handful of scenes of a batch."""
NEIGHBOUR_TEMPERATURE = 0.05


def scene_loss(found: SceneReconstruction, raster_N4C: Tensor, drive_NT2: Tensor, valid_NT: Tensor,
               sectors_NS: Tensor) -> Tensor:  # fmt: skip
    """Compare a reconstruction with its scene.

    BCE(occupancy) + BCE(lane) + L1(flow where occupied) + 2 Huber(drive / 20 m) + Huber(log(1 + sector count)).

    Args:
        found: Read out of z.
        raster_N4C: From `rasters.bev_rasters`.
        drive_NT2: Ego positions, m.
        valid_NT: Frame recorded.
        sectors_NS: From `rasters.sector_counts`.

    Returns:
        Scalar.
    """
    weight = raster_N4C.new_tensor(OCCUPIED_WEIGHT)
    occupancy, lane = raster_N4C[:, 0], raster_N4C[:, 3]
    image = binary_cross_entropy_with_logits(found.raster_N4C[:, 0], occupancy, pos_weight=weight)
    image = image + binary_cross_entropy_with_logits(found.raster_N4C[:, 3], lane, pos_weight=weight)
    flow = (found.raster_N4C[:, 1:3] - raster_N4C[:, 1:3]).abs().sum(1) * occupancy
    error = smooth_l1_loss(found.drive_NT2, drive_NT2 / POSITION_SCALE_M, beta=0.1, reduction="none").sum(2)
    drive = (error * valid_NT).sum() / valid_NT.sum().clamp(min=1)
    counts = smooth_l1_loss(found.sectors_NS, sectors_NS, beta=0.5)
    return image + flow.sum() / occupancy.sum().clamp(min=1) + 2 * drive + counts


def masked_loss(found_MF: Tensor, features_MF: Tensor) -> Tensor:
    """Compare reconstructed node features: mean (1 - cos)^2 + Huber (GraphMAE, arXiv 2205.10803, gamma = 2).

    Args:
        found_MF: Reconstruction of masked nodes.
        features_MF: Their features.

    Returns:
        Scalar, 0 without masked nodes.
    """
    if len(found_MF) == 0:
        return found_MF.sum()
    angle = (1 - cosine_similarity(found_MF, features_MF, dim=1)).pow(SCE_EXPONENT).mean()
    return angle + smooth_l1_loss(found_MF, features_MF, beta=0.5)


def relation_loss(positive_E: Tensor, negative_E: Tensor) -> Tensor:
    """Tell edges from pairs of the same scene that are none: binary cross-entropy, 0 for a side that is empty.

    Args:
        positive_E: Logits of edges.
        negative_E: Logits of pairs drawn in the same scenes.
    """
    softplus = torch.nn.functional.softplus
    return softplus(-positive_E).sum() / max(len(positive_E), 1) + softplus(negative_E).sum() / max(
        len(negative_E), 1
    )


def contrastive_loss(z_ND: Tensor, view_ND: Tensor) -> Tensor:
    """Pull two views of a scene together against the other scenes of the batch.

    NT-Xent: -log softmax_j(cos(z_i, v_j) / 0.1) at j = i, both ways (SimCLR, arXiv 2002.05709, eq. 1, without
    negatives inside one side).

    Args:
        z_ND: Embeddings.
        view_ND: Embeddings of a second view, same order.
    """
    logits = normalize(z_ND, dim=1) @ normalize(view_ND, dim=1).T / TEMPERATURE
    label = torch.arange(len(z_ND), device=z_ND.device)
    return (cross_entropy(logits, label) + cross_entropy(logits.T, label)) / 2


def cosine_distance(z_ND: Tensor) -> Tensor:
    """Return |u_i - u_j| / 2 of the unit vectors u = z / |z|, in [0, 1] (N, N)."""
    unit = normalize(z_ND, dim=1)
    return ((2 - 2 * unit @ unit.T).clamp(min=1e-6)).sqrt() / 2


def metric_loss(z_ND: Tensor, delta_NN: Tensor) -> Tensor:
    """Make ratios of embedding distances follow ratios of scenario distances, over all triplets of the batch.

    Log-ratio loss (arXiv 1904.09626, eq. 3): mean over a, i, j of (log d_ai/d_aj - log delta_ai/delta_aj)^2. With
    r_ai = log d_ai - log delta_ai this equals 2 mean_a var_i(r_ai), so all N^3 triplets cost N^2.

    Args:
        z_ND: Embeddings.
        delta_NN: Scenario distances in [0, 1].
    """
    ratio = torch.log(cosine_distance(z_ND) + DISTANCE_FLOOR) - torch.log(delta_NN + DISTANCE_FLOOR)
    other = ~torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    ratio = ratio[other].reshape(len(z_ND), -1)
    return 2 * ratio.var(dim=1, correction=0).mean()


def neighbour_loss(z_ND: Tensor, delta_NN: Tensor, log_N: Tensor) -> Tensor:
    """Make the scenes of a batch that look nearest be those that are nearest: mean_a KL(P_a || Q_a).

    P_ai ~ exp(-delta_ai / 0.05), Q_ai ~ exp(cos(z_a, z_i) / 0.05): stochastic neighbour embedding (Hinton and Roweis
    2002, eqs. 1-3) with the scenario distance as the given one. Where the log-ratio loss weighs all distances alike,
    this one sees the near ones, which are what retrieval and clusters use. The scenes i are those of other logs:
    windows of one recording overlap, are nearest for that alone, and would teach places, not situations. A scene
    without any in the batch is compared with all others.

    Args:
        z_ND: Embeddings, at least two.
        delta_NN: Scenario distances in [0, 1].
        log_N: Number of the log of each scene, int64.
    """
    own = torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    same_log = log_N[:, None] == log_N
    left_out = torch.where(same_log.all(dim=1, keepdim=True), own, same_log)
    unit = normalize(z_ND, dim=1)
    wanted = (-delta_NN / NEIGHBOUR_SCALE).masked_fill(left_out, -torch.inf).log_softmax(1)
    found = (unit @ unit.T / NEIGHBOUR_TEMPERATURE).masked_fill(left_out, -torch.inf).log_softmax(1)
    share = wanted.exp()
    return (share * (wanted - found).masked_fill(left_out, 0.0)).sum(dim=1).mean()


def pair_loss(z_ND: Tensor, source_P: Tensor, copy_P: Tensor, delta_P: Tensor) -> Tensor:
    """Pull perturbed scenes to their sources: mean exp(-delta / 0.25) (1 - cos).

    Args:
        z_ND: Embeddings.
        source_P: Rows of the sources.
        copy_P: Rows of the perturbed scenes.
        delta_P: Their scenario distance.

    Returns:
        Scalar, 0 without pairs.
    """
    if len(source_P) == 0:
        return z_ND.sum() * 0
    weight = torch.exp(-delta_P / PAIR_SCALE)
    return (weight * (1 - cosine_similarity(z_ND[source_P], z_ND[copy_P], dim=1))).mean()


def variance_loss(z_ND: Tensor) -> Tensor:
    """Keep every dimension alive and uncorrelated: mean_d relu(1 - std_d) + 0.04 sum_{d != e} C_de^2 / D.

    VICReg (arXiv 2105.04906, eqs. 1-4), variance weight 1, covariance weight 0.04.

    Args:
        z_ND: Embeddings.
    """
    centred = z_ND - z_ND.mean(dim=0)
    deviation = (centred.square().sum(0) / max(len(z_ND) - 1, 1) + 1e-4).sqrt()
    covariance = centred.T @ centred / max(len(z_ND) - 1, 1)
    off = covariance.square().sum() - covariance.diagonal().square().sum()
    return torch.relu(1 - deviation).mean() + 0.04 * off / z_ND.shape[1]


def laplacian_loss(z_ND: Tensor, delta_NN: Tensor) -> Tensor:
    """Keep similar scenes together: sum_ij W_ij |u_i - u_j|^2 / sum_ij W_ij, W = exp(-delta / 0.25), i != j.

    Args:
        z_ND: Embeddings.
        delta_NN: Scenario distances.
    """
    weight = torch.exp(-delta_NN / PAIR_SCALE) * (1 - torch.eye(len(z_ND), device=z_ND.device))
    return (weight * (2 * cosine_distance(z_ND)).square()).sum() / weight.sum().clamp(min=1e-9)


def response_loss(found_NR: Tensor, responses_NR: Tensor) -> Tensor:
    """Compare predicted sub-scores of a frozen planner: mean squared error over known ones.

    Args:
        found_NR: Predictions.
        responses_NR: Sub-scores, NaN where unknown.
    """
    known = responses_NR.isfinite()
    error = (found_NR - torch.where(known, responses_NR, found_NR)).square()
    return error.sum() / known.sum().clamp(min=1)
