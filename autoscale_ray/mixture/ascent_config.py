"""Settings of the mixture optimiser; they live with every other default."""

from autoscale_ray.config import AscentConfig

__all__ = ["AscentConfig"]
