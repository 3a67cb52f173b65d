"""Mixtures that follow from counts alone: no run, no feedback.

Legend: K clusters.
"""

from __future__ import annotations

from autoscale_ray.mixture.baselines.signals import Float64, size_prior, uniform, without_runs
from autoscale_ray.mixture.problem import ClusterInfo


def dev_share(info: ClusterInfo) -> Float64:
    """Return the weights of the objective, w_k = v_k."""
    return info.dev_weights_K


POOL_PROPORTIONAL = without_runs(size_prior)
UNIFORM = without_runs(uniform)
DEV_PROPORTIONAL = without_runs(dev_share)
