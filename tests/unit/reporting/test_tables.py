"""What the tables tell beside their numbers."""

from autoscale_ray.reporting.summary import TOTAL_NAMES as NAMES
from autoscale_ray.reporting.tables import budget_line, coverage_line, round_table


def test_dev_weight_that_the_pool_cannot_serve_is_told():
    assert coverage_line([(500, 0.95), (3, 0.05)]) == ""
    line = coverage_line([(7229, 0.15), (4, 0.25), (0, 0.6)])
    assert line.startswith("85 % of the dev weight lies in clusters with fewer than 10 synthetic scenes")


def test_a_budget_beyond_the_pool_is_told_with_the_first_round_alone():
    """Whoever follows a run sees its rounds, on every backend."""
    assert budget_line(50, 50) == ""
    values = {"totals": dict.fromkeys(NAMES, 0.5), "total_se": dict.fromkeys(NAMES, 0.1), "error_unit": "log"}
    clusters = [{"id": name, "pool": 20, "dev": 9, "dev_weight": 0.5} for name in ("c0", "c1")]
    by_cluster = {"cluster_scores": {"c0": 0.5, "c1": None}, "cluster_se": {"c0": 0.1, "c1": None}}
    done = {"num_scenes": 0, "weights": {}, "counts": {}, **by_cluster, **values}
    spent = {"seconds_by_round": [{}, {}]}
    summary = {"budget": 50, "clusters": clusters, "rounds": [done, done], "spent": spent, "unscored": {}}
    line = "loop.budget 50 is larger than the pool: every round asks for all 40 scenes"
    assert str(round_table(summary, 0).caption).splitlines()[-1] == line
    assert line not in str(round_table(summary, 1).caption)
