import itertools
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import torch

from autoscale_ray.errors import InputRejectedError, PoolError, SplitLeakError
from autoscale_ray.scenes import pool as pools
from autoscale_ray.scenes.batch import batch_from_table, tensors_of
from autoscale_ray.scenes.graph import with_neighbours
from autoscale_ray.scenes.parquet import open_parquet
from autoscale_ray.scenes.pool import check_disjoint, open_pool, write_pool
from scenes.random_scenes import random_table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tables = [random_table(7, seed=1, log="a"), random_table(5, seed=2, log="b")]
    path = tmp_path_factory.mktemp("pools") / "pool"
    write_pool(path, tables, rows_per_file=5)
    return pa.concat_tables(tables), open_pool(path)


def test_rows_come_back_in_any_order(written):
    table, pool = written
    rows = np.array([11, 0, 4, 4, 5, 9])
    # Through text, because NaN differs from itself.
    assert repr(pool.table(rows).to_pydict()) == repr(table.take(rows).to_pydict())
    assert repr(pool.table().to_pydict()) == repr(table.to_pydict())


def test_cached_batch_equals_the_batch_of_the_table(written):
    table, pool = written
    for rows in (np.array([3, 11, 0, 7]), np.arange(2, 10)):
        from_cache, from_table = pool.batch(rows), with_neighbours(batch_from_table(table.take(rows)))
        assert from_cache.scene_ids == from_table.scene_ids
        for name, tensor in tensors_of(from_table).items():
            found = tensors_of(from_cache)[name]
            assert found.dtype == tensor.dtype, name
            assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(tensor)), name


def test_ids_of_a_range_are_read_from_its_files_alone(written, monkeypatch):
    table, _ = written
    pool, read, original = open_pool(written[1].path), [], pools.read_parquet

    def counted(path, columns):
        read.append(path.name)
        return original(path, columns)

    monkeypatch.setattr(pools, "read_parquet", counted)
    names = [file.name for file in pool.manifest.files]
    file_of = np.repeat(names, [file.num_scenes for file in pool.manifest.files])
    for start, stop in itertools.combinations(range(13), 2):
        read.clear()
        ids = pool.ids_between(start, stop)
        assert ids.tolist() == table["scene_id"].to_pylist()[start:stop]
        assert read == sorted(set(file_of[start:stop]))
    rows = np.arange(3, 7)
    assert pool.batch(rows, pool.ids_between(3, 7)).scene_ids == written[1].batch(rows).scene_ids
    assert "scene_ids" not in vars(pool), "the ids of the whole pool stay unread"


def test_scalar_columns_and_ids(written):
    table, pool = written
    assert pool.scene_ids.tolist() == table["scene_id"].to_pylist()
    assert pool.origin_ids.tolist() == [value or "" for value in table["origin_id"].to_pylist()]
    assert [list(row) for row in pool.tags] == table["tags"].to_pylist()
    assert pool.rows_of(pool.scene_ids[[8, 2]]).tolist() == [8, 2]
    with pytest.raises(PoolError, match="no such scene"):
        pool.rows_of(["nowhere"])
    with pytest.raises(PoolError, match="no scalar column"):
        pool.column("agent_states")


def test_manifest_counts(written):
    _, pool = written
    assert len(pool) == pool.manifest.num_scenes == 12
    assert pool.manifest.counts["log"] == {"a": 7, "b": 5}
    assert sum(pool.manifest.counts["source"].values()) == 12
    assert [file.num_scenes for file in pool.manifest.files] == [5, 5, 2]


def test_content_hash_depends_on_values_alone(tmp_path):
    table = random_table(9, seed=4)
    one = write_pool(tmp_path / "one", [table])
    cut = write_pool(tmp_path / "cut", [table.slice(0, 2), table.slice(2)], rows_per_file=4)
    moved = write_pool(tmp_path / "moved", [table.slice(2), table.slice(0, 2)])
    assert one.content_hash == cut.content_hash
    assert one.content_hash != moved.content_hash


def test_a_failing_stream_leaves_nothing_behind(tmp_path):
    def stream():
        yield random_table(3)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_pool(tmp_path / "pool", stream(), rows_per_file=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end_leaves_nothing_behind(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_pool(tmp_path / "pool", [random_table(7, seed=1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_repeated_scene_ids_and_used_folders_are_refused(tmp_path):
    with pytest.raises(PoolError, match="unique"):
        write_pool(tmp_path / "pool", [random_table(3), random_table(3)])
    write_pool(tmp_path / "pool", [random_table(3)])
    with pytest.raises(PoolError, match="already exists"):
        write_pool(tmp_path / "pool", [random_table(3)])


def with_scenes(made: dict) -> dict:
    """Return a manifest that claims two scenes of a file with three, everywhere."""
    counts = {kind: dict.fromkeys(list(names)[:1], 2) for kind, names in made["counts"].items()}
    return {**made, "num_scenes": 2, "counts": counts, "files": [{**made["files"][0], "num_scenes": 2}]}


def test_unusable_pools_each_give_one_clear_line(tmp_path):
    with pytest.raises(PoolError, match="no such folder"):
        open_pool(tmp_path / "missing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(PoolError, match=r"manifest\.json"):
        open_pool(tmp_path / "bare")
    write_pool(tmp_path / "empty", [])
    with pytest.raises(PoolError, match="holds no scenes"):
        open_pool(tmp_path / "empty")
    assert len(open_pool(tmp_path / "empty", allow_empty=True)) == 0
    assert open_pool(tmp_path / "empty", allow_empty=True).table().num_rows == 0


def test_another_schema_version_is_refused(tmp_path):
    write_pool(tmp_path / "pool", [random_table(3)])
    manifest = tmp_path / "pool" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    with pytest.raises(PoolError, match=r"version must be 1 \(found 99\)"):
        open_pool(tmp_path / "pool")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda made: [], "is damaged"),
        (lambda made: {**made, "counts": {}}, "must each hold its 3 scenes"),
        (lambda made: {**made, "counts": [1]}, "is damaged: counts"),
        (lambda made: {**made, "files": []}, "must each hold its 3 scenes"),
        (lambda made: {**made, "num_scenes": -3}, "is damaged: num_scenes"),
        (lambda made: {**made, "num_scenes": 4}, "must each hold its 4 scenes"),
        (lambda made: {**made, "content_hash": 3}, "is damaged: content_hash"),
        (lambda made: {**made, "files": [{**made["files"][0], "name": "/etc/passwd"}]}, "files.0.name"),
        (lambda made: {**made, "files": [{**made["files"][0], "name": 3}]}, "files.0.name"),
        (with_scenes, "must hold 2 scenes as recorded"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(tmp_path, change, rule):
    write_pool(tmp_path / "pool", [random_table(3)])
    manifest = tmp_path / "pool" / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(PoolError, match=rule) as caught:
        open_pool(tmp_path / "pool")
    assert "\n" not in str(caught.value)


def test_weights_that_a_pool_lost_are_not_taken_for_none(tmp_path):
    table = random_table(3, seed=1)
    weights = pa.table({"scene_id": table["scene_id"], "weight": [3.0, 1.0, 1.0]})
    manifest = write_pool(tmp_path / "pool", [table], side_tables={"weights": weights})
    assert manifest.side_tables == ("weights",)
    assert open_pool(tmp_path / "pool").side_table("weights").equals(weights)
    (tmp_path / "pool" / "weights.parquet").unlink()
    with pytest.raises(PoolError, match=r"weights\.parquet: must be there as recorded in the manifest"):
        open_pool(tmp_path / "pool").side_table("weights")
    assert open_pool(tmp_path / "pool").side_table("truth") is None


def test_a_manifest_nested_too_deep_is_refused(tmp_path):
    write_pool(tmp_path / "pool", [random_table(3)])
    (tmp_path / "pool" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(PoolError, match="is damaged"):
        open_pool(tmp_path / "pool")


def test_truncated_and_exchanged_files_are_refused(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        write_pool(tmp_path / name, [random_table(6, seed=seed)])
    scenes = tmp_path / "one" / "scenes-00000.parquet"
    good = scenes.read_bytes()
    scenes.write_bytes(good[:-10])
    with pytest.raises(PoolError, match="bytes as recorded"):
        open_pool(tmp_path / "one")
    scenes.write_bytes(good)
    manifest = tmp_path / "one" / "manifest.json"
    other = json.loads((tmp_path / "two" / "manifest.json").read_text())
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text()), "content_hash": other["content_hash"]})
    )
    with pytest.raises(PoolError, match="must hold what the manifest records"):
        open_pool(tmp_path / "one").batch(np.arange(2))
    assert not list((tmp_path / "one" / "cache").iterdir())


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_a_file_never_reaches_a_batch(tmp_path, seed):
    write_pool(tmp_path / "pool", [random_table(6)])
    scenes = tmp_path / "pool" / "scenes-00000.parquet"
    damaged = bytearray(scenes.read_bytes())
    damaged[np.random.default_rng(seed).integers(len(damaged))] ^= 1 << seed % 8
    scenes.write_bytes(damaged)
    try:
        batch = open_pool(tmp_path / "pool").batch(np.arange(6))
    except (PoolError, InputRejectedError):
        return
    expected = with_neighbours(batch_from_table(random_table(6)))
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(torch.nan_to_num(tensors_of(batch)[name]), torch.nan_to_num(tensor)), name


@contextmanager
def without_privileges():
    """Give up the rights of root, where the tests have them: root may write to what is read-only."""
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        yield
    finally:
        os.seteuid(before)


def test_the_cache_of_a_read_only_pool_is_built_elsewhere(written, monkeypatch):
    with TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        pool, mine, closed = Path(place, "pool"), Path(place, "mine"), Path(place, "closed")
        shutil.copytree(written[1].path, pool, ignore=shutil.ignore_patterns("cache"))
        for folder, mode in ((mine, 0o777), (pool, 0o555), (closed, 0o555), (Path(place), 0o755)):
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
        with (
            without_privileges(),
            pytest.raises(PoolError, match=r"pool: needs a folder.*written to.*closed/autoscale_ray"),
        ):
            open_pool(pool).batch(np.array([3]))
        monkeypatch.setenv("XDG_CACHE_HOME", str(mine))
        with without_privileges():
            found = open_pool(pool).batch(np.array([3, 11]))
        assert found.scene_ids == written[1].batch(np.array([3, 11])).scene_ids
        assert not (pool / "cache").exists()
        assert len(list(mine.glob("autoscale_ray/pools/v*/sizes.json"))) == 1
        pool.chmod(0o755)
        shutil.copytree(mine / "autoscale_ray" / "pools", pool / "cache")  # a copy in the pool comes first
        pool.chmod(0o555)
        shutil.rmtree(mine)
        with without_privileges():
            assert len(open_pool(pool).cached) == 12


def test_a_damaged_cache_is_built_again(tmp_path):
    write_pool(tmp_path / "pool", [random_table(6)])
    rows = np.array([1, 0, 5])
    before = open_pool(tmp_path / "pool").batch(rows)
    damaged = next((tmp_path / "pool" / "cache").glob("*/agent_states_AT5.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-4])
    after = open_pool(tmp_path / "pool").batch(rows)
    assert torch.equal(before.agent_states_AT5, after.agent_states_AT5)
    for text in ("[]", '{"agent', "\0"):
        next((tmp_path / "pool" / "cache").glob("v*/sizes.json")).write_text(text)
        again = open_pool(tmp_path / "pool").batch(rows)
        assert torch.equal(before.agent_states_AT5, again.agent_states_AT5)


def test_sharing_a_log_is_a_leak(tmp_path):
    for name, log in (("train", "a"), ("dev", "b"), ("test", "a")):
        write_pool(tmp_path / name, [random_table(2, log=log)])
    pools = {name: open_pool(tmp_path / name) for name in ("train", "dev", "test")}
    check_disjoint({"train": pools["train"], "dev": pools["dev"]})
    with pytest.raises(SplitLeakError, match=r"train and test: .*'a'"):
        check_disjoint(pools)


def test_files_that_are_not_parquet_are_refused(tmp_path):
    (tmp_path / "f.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(InputRejectedError, match="readable Parquet"):
        open_parquet(tmp_path / "f.parquet")
