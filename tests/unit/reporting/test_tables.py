"""What the tables tell beside their numbers."""

from autoscale_ray.reporting.tables import coverage_line


def test_dev_weight_that_the_pool_cannot_serve_is_told():
    assert coverage_line([(500, 0.95), (3, 0.05)]) == ""
    line = coverage_line([(7229, 0.15), (4, 0.25), (0, 0.6)])
    assert line.startswith("85 % of the dev weight lies in clusters with fewer than 10 synthetic scenes")
