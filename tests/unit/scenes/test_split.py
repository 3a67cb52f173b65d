import numpy as np
import pytest

from autoscale_ray.config import WorldConfig
from autoscale_ray.errors import PoolError
from autoscale_ray.scenes.pool import check_disjoint, open_pool
from autoscale_ray.scenes.split import split_by_log
from autoscale_ray.world.pools import make_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "real"
    make_pool(WorldConfig(num_real=24), "real", path)
    return open_pool(path)


def test_sides_hold_each_named_log_once(pool, tmp_path):
    logs = sorted(set(pool.log_ids.tolist()))
    sides = {log: ("a", "b")[number % 2] for number, log in enumerate(logs[:-1])}
    split_by_log(pool, sides, tmp_path)
    parts = {side: open_pool(tmp_path / side) for side in ("a", "b")}
    check_disjoint(parts)
    for side, part in parts.items():
        wanted = [s for s, log in zip(pool.scene_ids, pool.log_ids, strict=True) if sides.get(log) == side]
        assert part.scene_ids.tolist() == wanted
        rows = pool.rows_of(part.scene_ids[:3])
        assert repr(part.table(np.arange(3)).to_pylist()) == repr(
            pool.table(rows).to_pylist()
        )  # NaN is not equal


def test_unknown_log_is_named(pool, tmp_path):
    with pytest.raises(PoolError, match=r"no such log.*nowhere"):
        split_by_log(pool, {"nowhere": "a"}, tmp_path)
