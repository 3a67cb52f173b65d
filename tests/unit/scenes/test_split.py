import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.cli import main
from autoscale_ray.config import WorldConfig
from autoscale_ray.errors import AutoScaleError, PoolError
from autoscale_ray.inputs import TRAINED
from autoscale_ray.records import SIDES
from autoscale_ray.scenes.pool import check_disjoint, open_pool, write_pool
from autoscale_ray.scenes.split import deal_logs, split_by_log, split_pools
from autoscale_ray.world.pools import make_pool

SHARES = {"real": 0.7, "dev": 0.15, "test": 0.15}


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
        # Their texts: NaN is not equal to itself.
        assert repr(part.table(np.arange(3)).to_pylist()) == repr(pool.table(rows).to_pylist())


def test_unknown_log_is_named(pool, tmp_path):
    with pytest.raises(PoolError, match=r"no such log.*nowhere"):
        split_by_log(pool, {"nowhere": "a"}, tmp_path)


def test_a_side_in_use_is_refused_before_anything_is_written(pool, tmp_path):
    logs = sorted(set(pool.log_ids.tolist()))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("kept")
    with pytest.raises(PoolError, match="already exists"):
        split_by_log(pool, {logs[0]: "a", logs[1]: "b"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 40), min_size=3, max_size=40),
    shares=st.lists(st.floats(0.05, 5.0), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_sides_come_near_their_shares_and_none_is_empty(counts, shares, seed):
    log_ids = np.repeat([f"log{number}" for number in range(len(counts))], counts)
    pool = SimpleNamespace(log_ids=log_ids, path="pool")
    wanted = dict(zip("abc", shares, strict=True))
    side_of_log = deal_logs(pool, wanted, seed)
    assert side_of_log == deal_logs(pool, wanted, seed)
    assert set(side_of_log) == set(log_ids.tolist())
    assert set(side_of_log.values()) == set("abc")
    sizes = Counter(side_of_log[log] for log in log_ids.tolist())
    for side, share in wanted.items():
        assert sizes[side] <= share / sum(shares) * len(log_ids) + max(counts)


def test_logs_go_where_the_seed_says_and_ratios_are_met():
    pool = SimpleNamespace(log_ids=np.repeat([f"log{number:03d}" for number in range(100)], 5), path="pool")
    first, second = (deal_logs(pool, {"real": 70, "dev": 15, "test": 15}, seed) for seed in (0, 1))
    for dealt in (first, second):
        assert Counter(dealt.values()) == {"real": 70, "dev": 15, "test": 15}
    assert first != second


def test_too_few_logs_are_named():
    pool = SimpleNamespace(log_ids=np.array(["one", "two"]), path="pool")
    with pytest.raises(PoolError, match=r"pool: needs a log for each of the 3 sides.*found 2"):
        deal_logs(pool, {"a": 1, "b": 1, "c": 1}, 0)


def test_the_command_splits_a_pool(pool, tmp_path, capsys):
    main(["pool", "split", str(pool.path), "--out", str(tmp_path / "sides"), "--real", "0.5"])
    parts = {side: open_pool(tmp_path / "sides" / side) for side in ("real", "dev", "test")}
    check_disjoint(parts)
    assert sum(map(len, parts.values())) == len(pool)
    assert "scenes of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ("--dev nan", "--dev: must be a share from 0 to 1e+06"),
        ("--real 1e308", "--real: must be a share from 0 to 1e+06"),
        ("--test -0.1", "--test: must be a share from 0 to 1e+06"),
        ("--real 0", "needs a share above 0 for real, and for dev or test"),
        ("--dev 0 --test 0", "needs a share above 0 for real, and for dev or test"),
    ],
)
def test_shares_that_are_none_are_refused(shares, told, pool, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pool", "split", str(pool.path), "--out", str(tmp_path / "sides"), *shares.split()])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "sides").exists()


def test_a_share_of_0_makes_no_such_side(pool, tmp_path):
    main(["pool", "split", str(pool.path), "--out", str(tmp_path / "sides"), "--test", "0"])
    assert {path.name for path in (tmp_path / "sides").iterdir()} == {"real", "dev"}
    assert sum(len(open_pool(tmp_path / "sides" / side)) for side in ("real", "dev")) == len(pool)


@pytest.fixture(scope="module")
def simulated(pool, tmp_path_factory):
    """Synthetic scenes: two clips of every recorded log, and two of a log of their own."""
    path = tmp_path_factory.mktemp("simulated") / "pool"
    table = pool.table(np.arange(len(pool)))
    clips = []
    for number in range(2):
        column = pa.array([f"{scene_id}-{number}" for scene_id in pool.scene_ids.tolist()])
        clips.append(table.set_column(table.schema.get_field_index("scene_id"), "scene_id", column))
    own = clips[0].slice(0, 2)
    for name, value in (("scene_id", ["own-0", "own-1"]), ("log_id", ["own", "own"])):
        own = own.set_column(own.schema.get_field_index(name), name, pa.array(value))
    write_pool(path, (each.cast(table.schema) for each in (*clips, own)))
    return open_pool(path)


def test_synthetic_scenes_of_logs_that_judge_are_left_out(pool, simulated, tmp_path, capsys):
    out = tmp_path / "sides"
    main(["pool", "split", str(pool.path), "--out", str(out), "--synthetic", str(simulated.path)])
    parts = {side: open_pool(out / side) for side in SIDES}
    check_disjoint(parts, may_share=TRAINED)
    real = set(parts["real"].log_ids.tolist())
    wanted = [
        scene_id
        for scene_id, log in zip(simulated.scene_ids.tolist(), simulated.log_ids.tolist(), strict=True)
        if log in real | {"own"}
    ]
    assert parts["synthetic"].scene_ids.tolist() == wanted
    assert 2 < len(wanted) < len(simulated)
    assert f"{len(simulated) - len(wanted)} left out" in capsys.readouterr().out


def test_a_synthetic_pool_with_nothing_to_keep_or_no_place_leaves_nothing(pool, simulated, tmp_path):
    judged = [log for log, side in deal_logs(pool, SHARES, 0).items() if side == "test"]
    split_by_log(simulated, dict.fromkeys(judged, "clips"), tmp_path)
    with pytest.raises(PoolError, match="every scene is of a log of dev or test"):
        split_pools(pool, SHARES, 0, tmp_path / "out", open_pool(tmp_path / "clips"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "synthetic").mkdir(parents=True)
    (tmp_path / "out" / "synthetic" / "mine.txt").write_text("kept")
    with pytest.raises(PoolError, match="already exists"):
        split_pools(pool, SHARES, 0, tmp_path / "out", simulated)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["synthetic"]


def test_no_side_is_left_when_the_synthetic_pool_cannot_be_copied(pool, simulated, tmp_path):
    copy = shutil.copytree(simulated.path, tmp_path / "copy")
    broken = open_pool(copy)
    assert len(broken.log_ids) == len(broken)  # read before the damage
    shutil.rmtree(copy / "cache", ignore_errors=True)
    for part in copy.glob("scenes-*.parquet"):
        part.write_bytes(part.read_bytes()[:200])
    with pytest.raises((OSError, AutoScaleError)):
        split_pools(pool, SHARES, 0, tmp_path / "out", broken)
    assert not any((tmp_path / "out").iterdir())
