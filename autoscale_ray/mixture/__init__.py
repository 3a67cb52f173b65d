"""The mixture: clusters, Cluster-GA, allocation, retrieval, and the published rules it is compared with."""

from __future__ import annotations

from autoscale_ray.mixture.baselines import BASELINES
from autoscale_ray.mixture.estimators import METHODS as OWN_METHODS
from autoscale_ray.mixture.problem import Method

METHODS: dict[str, Method] = {**BASELINES, **OWN_METHODS}
"""Every mixture method by name; `response` is Cluster-GA, the default."""

__all__ = ["METHODS"]
