import errno
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from autoscale_ray.cli import main
from autoscale_ray.cli_data import EXIT_READER_FAULT
from autoscale_ray.errors import InputRejectedError, InvalidInputError, PoolError, SourceReadError
from autoscale_ray.scenes import ingest as ingest_module
from autoscale_ray.scenes import trust
from autoscale_ray.scenes.ingest import READER_FAULT, ingest, plan_parts, run_part
from autoscale_ray.scenes.motion_fingerprint import shared_groups
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.pool_info import pool_info
from autoscale_ray.scenes.readers import READERS, commonroad
from autoscale_ray.scenes.windows import WindowOptions
from scenes.scenario_files import straight_drive


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three good files, two of which share motion, and two bad ones."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "USA_One-1_1_T-1.xml").write_bytes(straight_drive())
    (folder / "USA_One-1_2_T-1.xml").write_bytes(straight_drive(num_frames=90))
    other = straight_drive(num_frames=80).replace(b"<exact>8.0", b"<exact>8.1")
    (folder / "USA_Two-1_1_T-1.xml").write_bytes(other)
    (folder / "USA_Two-1_2_T-1.xml").write_bytes(straight_drive().replace(b"<x>8.0000</x>", b"<x>eight</x>"))
    (folder / "USA_Two-1_3_T-1.xml").write_bytes(b'<!DOCTYPE a [<!ENTITY b "c">]><commonRoad/>')
    return folder


def test_files_and_scenes_are_all_accounted_for(source, tmp_path):
    manifest = ingest("commonroad", source, tmp_path / "pool", "real")
    pool = open_pool(tmp_path / "pool")
    assert manifest.num_scenes == len(pool) == 2 + 2 + 1
    rows = pool.side_table("quarantine").to_pylist()
    assert [(row["file"], row["element"]) for row in rows] == [
        ("USA_Two-1_2_T-1.xml", "obstacle 5"),
        ("USA_Two-1_3_T-1.xml", ""),
    ]
    assert "must be a number" in rows[0]["rule"]
    assert "DTD" in rows[1]["rule"]
    assert manifest.counts["domain"] == {"real": 5}
    info = pool_info(tmp_path / "pool")
    assert info.scenes_by_source == {"commonroad/USA_One": 4, "commonroad/USA_Two": 1}
    assert sum(info.quarantined_by_rule.values()) == info.num_quarantined == 2
    assert not [path for path in tmp_path.iterdir() if path.name != "pool"]


def test_a_source_with_too_much_in_quarantine_stops_and_goes_on_when_allowed(
    source, tmp_path, monkeypatch, capsys
):
    command = ["ingest", "commonroad", str(source), "--out", str(tmp_path / "pool"), "--domain", "real"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "at most 2 % may be quarantined" in said
    assert "2 of 7" in said
    assert not (tmp_path / "pool").exists()
    with pytest.raises(InputRejectedError):
        ingest("commonroad", source, tmp_path / "pool", "real", max_quarantined_share=1.99 / 7)
    monkeypatch.setattr(ingest_module, "run_part", None)  # nothing is left to read
    manifest = ingest("commonroad", source, tmp_path / "pool", "real", max_quarantined_share=2.0 / 7)
    assert manifest.num_scenes == 5
    assert not [path for path in tmp_path.iterdir() if path.name != "pool"]


def test_a_recording_that_stands_in_two_files_counts_once(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "source" / folder).mkdir(parents=True)
        (tmp_path / "source" / folder / "USA_One-1_1_T-1.xml").write_bytes(straight_drive())
    manifest = ingest("commonroad", tmp_path / "source", tmp_path / "pool", "real")
    pool = open_pool(tmp_path / "pool")
    rows = pool.side_table("quarantine").to_pylist()
    assert manifest.num_scenes == len(set(pool.scene_ids)) == 2
    assert {row["file"] for row in rows} == {"b/USA_One-1_1_T-1.xml"}
    assert [row["element"] for row in rows] == list(pool.scene_ids)
    assert {row["rule"] for row in rows} == {"scene_id must be unique in a pool"}


def test_shared_motion_gives_one_log(source, tmp_path):
    ingest("commonroad", source, tmp_path / "pool", "real")
    logs = dict(open_pool(tmp_path / "pool").manifest.counts["log"])
    assert logs == {"commonroad/USA_One-1_1_T-1": 4, "commonroad/USA_Two-1_1_T-1": 1}
    ingest("commonroad", source, tmp_path / "known", "real",
           known_groups={"USA_One-1_2_T-1.xml": "g", "USA_Two-1_1_T-1.xml": "g"})  # fmt: skip
    assert dict(open_pool(tmp_path / "known").manifest.counts["log"]) == {"commonroad/USA_One-1_1_T-1": 5}


def test_the_content_hash_depends_neither_on_processes_nor_on_the_container(source, tmp_path, monkeypatch):
    archive = tmp_path / "source.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(source.iterdir()):
            file.write(path, path.name)
    one = ingest("commonroad", source, tmp_path / "one", "real")
    monkeypatch.setattr(ingest_module, "UNITS_PER_PART", 2)
    two = ingest("commonroad", archive, tmp_path / "two", "real", num_processes=2)
    assert one.content_hash == two.content_hash


def test_an_interrupted_ingest_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest_module, "UNITS_PER_PART", 1)
    whole = ingest("commonroad", source, tmp_path / "whole", "real")
    jobs = plan_parts("commonroad", source, tmp_path / "pool", "real")
    (tmp_path / ".pool.ingest").mkdir()
    for job in jobs[:3]:
        run_part(job)
    done = []
    resumed = ingest(
        "commonroad", source, tmp_path / "pool", "real", progress=lambda *count: done.append(count)
    )
    assert done == [(4, 5), (5, 5)]
    assert resumed.content_hash == whole.content_hash


@pytest.mark.parametrize("changed", ["town.net.xml", "log/map.json", "maps/city/map.gpkg"])
def test_parts_are_read_again_when_something_beside_their_units_changed(changed, tmp_path, monkeypatch):
    for name in ("town.fcd.xml", "town.net.xml", "log/annotations", "log/map.json", "maps/city/map.gpkg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    reader = replace(
        READERS["sumo"], units=lambda path: ["log", "town.fcd.xml"], with_files=lambda files: READERS["sumo"]
    )
    monkeypatch.setitem(READERS, "sumo", reader)

    def stems():
        files = {"maps": tmp_path / "in" / "maps"}
        jobs = plan_parts("sumo", tmp_path / "in", tmp_path / "in" / "pool", "real", files=files)
        return [job.stem for job in jobs]

    before = stems()
    (tmp_path / "in" / ".pool.ingest").mkdir()
    (tmp_path / "in" / ".pool.ingest" / "part.scenes").write_text("half")
    assert stems() == before
    (tmp_path / "in" / changed).write_text("another network")
    assert stems() != before


def test_parts_of_another_release_are_read_again(source, tmp_path, monkeypatch):
    def stems():
        return [job.stem for job in plan_parts("commonroad", source, tmp_path / "pool", "real")]

    before = stems()
    monkeypatch.setattr(ingest_module, "__version__", "99.0.0")
    assert not set(stems()) & set(before)


def test_links_between_windows_of_a_pair_point_into_the_pool(source, tmp_path):
    ingest("commonroad", source, tmp_path / "pool", "real", options=WindowOptions(pairs=True))
    pool = open_pool(tmp_path / "pool")
    links = pool.column("prev_scene_id")
    assert (links != "").sum() == 5
    before = pool.rows_of(links[links != ""])
    now = np.flatnonzero(links != "")
    times = pool.column("timestamp_us")
    assert (times[now] - times[before] == 500_000).all()
    assert set(pool.scene_ids[now]).isdisjoint(pool.scene_ids[before])


def test_unusable_requests_give_one_clear_line(source, tmp_path):
    with pytest.raises(InvalidInputError, match="format: must be one of"):
        ingest("nothing", source, tmp_path / "pool", "real")
    with pytest.raises(InvalidInputError, match="real or synthetic"):
        ingest("commonroad", source, tmp_path / "pool", "dream")
    with pytest.raises(InvalidInputError, match="no such path"):
        ingest("commonroad", tmp_path / "missing", tmp_path / "pool", "real")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InvalidInputError, match="holds nothing"):
        ingest("commonroad", tmp_path / "bare", tmp_path / "pool", "real")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(PoolError, match="already exists"):
        ingest("commonroad", source, tmp_path / "used", "real")
    for share in (-1, 1.5, float("nan")):
        with pytest.raises(InvalidInputError, match=r"max_quarantined_share: must be in \[0, 1\]"):
            ingest("commonroad", source, tmp_path / "pool", "real", max_quarantined_share=share)
    assert not (tmp_path / "pool").exists()


def test_groups_are_connected_components():
    prints = {"a": [1, 2], "b": [2, 3], "c": [9], "d": [3], "e": []}
    groups = shared_groups({name: np.array(values, dtype=np.uint64) for name, values in prints.items()})
    assert groups == {"a": "a", "b": "a", "c": "c", "d": "a", "e": "e"}


def _faulty(error: BaseException):
    """A reader of one unit that fails after its first recording."""

    def read(path, name):
        yield next(commonroad.read(path, name))
        raise error

    return replace(commonroad.READER, read=read)


def test_a_fault_of_a_reader_loses_one_file_and_says_so(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(READERS, "faulty", _faulty(ZeroDivisionError("by\nzero")))
    ingest("faulty", source, tmp_path / "pool", "real")
    rows = [row for row in open_pool(tmp_path / "pool").side_table("quarantine").to_pylist()
            if row["rule"] == READER_FAULT]  # fmt: skip
    assert [row["file"] for row in rows] == [
        f"USA_{name}_T-1.xml" for name in ("One-1_1", "One-1_2", "Two-1_1")
    ]
    assert rows[0]["element"] == "reader faulty"
    assert rows[0]["value"].startswith("ZeroDivisionError at ingest.py:")
    assert rows[0]["value"].endswith(": by zero")
    with pytest.raises(SystemExit) as ended:
        main(["ingest", "faulty", str(source), "--out", str(tmp_path / "again"), "--domain", "real",
              "--max-quarantined-share", "1"])  # fmt: skip
    assert ended.value.code == EXIT_READER_FAULT
    assert "3 files were lost to a fault of the reader" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_what_is_no_fault_of_one_file_stops_the_run(source, tmp_path, monkeypatch, error):
    monkeypatch.setitem(READERS, "faulty", _faulty(error))
    with pytest.raises(type(error)):
        ingest("faulty", source, tmp_path / "pool", "real")
    assert not (tmp_path / "pool").exists()


def test_a_failing_storage_refuses_nothing_and_the_next_call_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest_module, "UNITS_PER_PART", 1)
    whole = ingest("commonroad", source, tmp_path / "whole", "real")
    failing = [OSError(errno.EIO, "Input/output error")]
    read_bytes = trust.bounded_read

    def flaky(stream, where, *limit):
        if "One-1_2" in where and failing:
            raise failing.pop()
        return read_bytes(stream, where, *limit)

    monkeypatch.setattr(trust, "bounded_read", flaky)
    with pytest.raises(SourceReadError, match=r"One-1_2.*Input/output error.*goes on there"):
        ingest("commonroad", source, tmp_path / "pool", "real")
    assert ingest("commonroad", source, tmp_path / "pool", "real").content_hash == whole.content_hash
    assert open_pool(tmp_path / "pool").manifest.num_quarantined == 2
