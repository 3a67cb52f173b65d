"""Mixtures that follow from counts alone: no run, no feedback.

Legend: K clusters, G tags.
"""

from __future__ import annotations

from autoscale_ray.mixture.baselines.signals import (
    Float64,
    needs,
    on_simplex,
    size_prior,
    uniform,
    without_runs,
)
from autoscale_ray.mixture.problem import ClusterInfo


def dev_share(info: ClusterInfo) -> Float64:
    """Return the weights of the objective, w_k = v_k."""
    return info.dev_weights_K


def tag_share(info: ClusterInfo) -> Float64:
    """Give every tag the same share of the budget, spread over clusters as its scenes are.

    w_k = (1/G) sum_g C_kg / sum_j C_jg over the tags that occur: class-balanced sampling (Kang et al. 2020,
    arXiv 1910.09217, equation 1 with q = 0), a scene's tags in place of its class.

    Args:
        info: Clusters with `tag_counts_KG`; tags of motion and map, never a hidden family.

    Raises:
        InvalidInputError: No tag counts.
    """
    counts_KG = needs(info.tag_counts_KG, "tag_balanced", "ClusterInfo.tag_counts_KG")
    occurring_KG = counts_KG[:, counts_KG.sum(axis=0) > 0]
    if occurring_KG.shape[1] == 0:
        return size_prior(info)
    return on_simplex((occurring_KG / occurring_KG.sum(axis=0)).mean(axis=1))


POOL_PROPORTIONAL = without_runs(size_prior)
UNIFORM = without_runs(uniform)
DEV_PROPORTIONAL = without_runs(dev_share)
TAG_BALANCED = without_runs(tag_share)
