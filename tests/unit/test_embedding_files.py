"""Files of embeddings: a run reads what it wrote, however many scenes there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from autoscale_ray import tasks
from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes import parquet

IDS = np.array([f"scene {row}" for row in range(1000)])
VECTORS = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)


def assert_found(path: Path) -> None:
    ids_N, z_ND = tasks.read_embeddings(path)
    np.testing.assert_array_equal(ids_N, IDS, strict=True)
    np.testing.assert_array_equal(z_ND, VECTORS, strict=True)


@pytest.mark.parametrize("rows", [1, 300, 999, 1000, 65_536])
def test_embeddings_come_back_whatever_the_row_groups(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(parquet, "ROW_GROUP_SIZE", rows)
    tasks.write_embeddings(IDS, VECTORS, tmp_path / "real.parquet")
    assert pq.ParquetFile(tmp_path / "real.parquet").num_row_groups == -(-1000 // rows)
    assert_found(tmp_path / "real.parquet")


@pytest.mark.parametrize("limit", ["MAX_GROUP_BYTES", "MAX_TABLE_BYTES"])
def test_a_run_reads_its_own_embeddings_beyond_the_limits_of_foreign_files(tmp_path, monkeypatch, limit):
    """Also those of a run that wrote one group of a million rows before groups were made smaller."""
    tasks.write_embeddings(IDS, VECTORS, tmp_path / "real.parquet")
    monkeypatch.setattr(parquet, limit, 20_000)
    with pytest.raises(InputRejectedError, match="at most 20000 bytes"):
        parquet.read_parquet(tmp_path / "real.parquet")
    assert_found(tmp_path / "real.parquet")


@pytest.mark.parametrize("cut", [0, 7, 3000])
def test_a_damaged_file_of_embeddings_is_refused(tmp_path, cut):
    path = tmp_path / "real.parquet"
    tasks.write_embeddings(IDS, VECTORS, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputRejectedError, match="readable Parquet"):
        tasks.read_embeddings(path)
    path.unlink()
    with pytest.raises(InputRejectedError, match="must be a file"):
        tasks.read_embeddings(path)
