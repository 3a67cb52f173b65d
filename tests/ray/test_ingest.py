"""Ingest through Ray Data tasks: the same pool as one process makes, also after a task was lost."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from autoscale_ray.errors import AutoScaleError, PoolError, SourceReadError
from autoscale_ray.scenes import ingest as ingest_module
from autoscale_ray.scenes.ingest import ingest, plan_parts, run_part
from autoscale_ray.scenes.pool import open_pool

pytestmark = [
    pytest.mark.timeout(400),
    # Ray Data warns of attributes of its own the first time that a process asks for its context.
    pytest.mark.filterwarnings("ignore:`use_.* is deprecated:DeprecationWarning"),
]
DATA = Path(__file__).parents[3] / "shared" / "data"
# Recordings keep their own licences and are never copied here; without them these tests have nothing to read.
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the recordings of ../shared/data are not here")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with some recorded scenarios and two files that are refused."""
    folder = tmp_path_factory.mktemp("source")
    with zipfile.ZipFile(DATA / "real" / "commonroad_ngsim" / "scenarios.zip") as archive:
        for name in sorted(archive.namelist())[::28]:
            archive.extract(name, folder)
    (folder / "broken.xml").write_text("<commonRoad>")
    (folder / "hostile.xml").write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><commonRoad/>")
    return folder


@needs_data
def test_tasks_make_the_pool_that_one_process_makes(cluster, source, tmp_path, monkeypatch) -> None:
    from autoscale_ray.distributed.ingest import ingest_on_ray

    monkeypatch.setattr(ingest_module, "UNITS_PER_PART", 1)
    local = ingest("commonroad", source, tmp_path / "local", "real")
    # One part is there from an attempt that ended early.
    staging = tmp_path / ".remote.ingest"
    staging.mkdir()
    run_part(plan_parts("commonroad", source, tmp_path / "remote", "real")[1])
    seen: list[tuple[int, int]] = []
    remote = ingest_on_ray(
        "commonroad", source, tmp_path / "remote", "real", progress=lambda *count: seen.append(count)
    )
    assert remote.content_hash == local.content_hash
    assert remote.num_scenes == local.num_scenes > 20
    rows = [open_pool(tmp_path / name).side_table("quarantine").to_pylist() for name in ("local", "remote")]
    assert rows[0] == rows[1]
    assert {row["file"] for row in rows[0]} >= {"broken.xml", "hostile.xml"}
    assert seen == [(number, 5) for number in range(2, 6)]
    with pytest.raises(PoolError, match="already exists"):
        ingest_on_ray("commonroad", source, tmp_path / "remote", "real")


@needs_data
def test_an_error_of_a_task_comes_back_as_one_line_of_ours(cluster, source, tmp_path) -> None:
    from autoscale_ray.distributed.ingest import run_tasks

    (job,) = plan_parts("commonroad", source, tmp_path / "pool", "real")
    with pytest.raises(AutoScaleError) as caught:  # the folder for the parts was never made
        list(run_tasks([job]))
    assert "\n" not in str(caught.value)


@needs_data
def test_a_part_that_takes_too_long_is_one_line(cluster, source, tmp_path, monkeypatch) -> None:
    from autoscale_ray.distributed import ingest as on_ray

    monkeypatch.setattr(on_ray, "PART_TIMEOUT_S", 0.2)
    (job,) = plan_parts("commonroad", source, tmp_path / "pool", "real")
    Path(job.staging).mkdir()
    with pytest.raises(SourceReadError, match=r"no part was finished in 0\.2 s; what is finished is kept"):
        list(on_ray.run_tasks([job]))
