"""autoscale_ray."""
