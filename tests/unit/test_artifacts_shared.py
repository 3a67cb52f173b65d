"""Runs that share a folder: nothing twice, each its own files, whatever is refused, killed or damaged."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from autoscale_ray.artifacts import RunStore, share_with
from autoscale_ray.errors import ArtifactError

COMMON = {f"common{number}": b"the same for all %d" % number for number in range(4)}
NUM_OWN = 3


class Trial:
    """A run beside others in a sweep folder, which counts what it builds."""

    def __init__(self, sweep: Path, name: str) -> None:
        (sweep / "shared").mkdir(parents=True, exist_ok=True)
        self.name, self.run_dir, self.built = name, sweep / "trials" / name, Counter[str]()
        share_with(self.run_dir, sweep / "shared")
        self.store = RunStore.open(str(self.run_dir), {"trial": name})

    def stage(self, name: str, content: bytes) -> bytes:
        def build(folder: Path) -> dict[str, int]:
            self.built[name] += 1
            (folder / "a").write_bytes(content)
            (folder / "again").write_bytes(content)
            return {"size": len(content)}

        artifact = self.store.stage(name, {"content": content.decode()}, build)
        assert artifact.values == {"size": len(content)}
        assert artifact.path("again").is_relative_to(self.run_dir)
        return artifact.path("a").read_bytes()

    def play(self) -> None:
        own = {f"own{number}": f"{self.name} {number}".encode() for number in range(NUM_OWN)}
        for name, content in {**COMMON, **own}.items():
            assert self.stage(name, content) == content


def touched(monkeypatch, play) -> int:
    """Return how many files were linked and folder entries listed meanwhile."""
    count = 0
    real_link, real_listdir, real_scandir = os.link, os.listdir, os.scandir

    def link(*given, **more):
        nonlocal count
        count += 1
        return real_link(*given, **more)

    def listdir(*given):
        nonlocal count
        found = real_listdir(*given)
        count += len(found)
        return found

    def scandir(*given):
        nonlocal count
        count += len(real_listdir(*given))
        return real_scandir(*given)

    with monkeypatch.context() as patch:
        for name, function in (("link", link), ("listdir", listdir), ("scandir", scandir)):
            patch.setattr(os, name, function)
        play()
    return count


def test_the_twentieth_run_touches_no_more_files_than_the_second(tmp_path, monkeypatch) -> None:
    counts = [touched(monkeypatch, lambda name=name: Trial(tmp_path, f"{name}").play()) for name in range(20)]
    assert counts[19] <= counts[1]
    assert len(list((tmp_path / "trials" / "19" / "stages").iterdir())) == len(COMMON) + NUM_OWN


def test_what_one_run_has_built_no_other_builds_while_both_are_open(tmp_path) -> None:
    first, second = Trial(tmp_path, "first"), Trial(tmp_path, "second")
    first.play()
    second.play()
    assert set(second.built) == set(first.built) - set(COMMON)
    for name in COMMON:
        ours, theirs = (next((t.run_dir / "stages").glob(f"{name}-*")) for t in (first, second))
        assert ours.read_bytes() == theirs.read_bytes()
    for held in (path for path in (second.run_dir / "objects").rglob("*") if path.is_file()):
        assert held.samefile(tmp_path / "shared" / held.relative_to(second.run_dir)), "a link, not a copy"


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EXDEV, errno.EPERM])
def test_a_file_with_no_more_links_is_copied(number, tmp_path, monkeypatch) -> None:
    Trial(tmp_path, "first").play()
    link = os.link

    def refused(source, target, **more):
        if "objects" in Path(source).parts:
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        link(source, target, **more)

    monkeypatch.setattr(os, "link", refused)
    second = Trial(tmp_path, "second")
    second.play()
    assert set(second.built).isdisjoint(COMMON)
    held = [path for path in (second.run_dir / "objects").rglob("*") if path.is_file()]
    assert len(held) == len(COMMON) + NUM_OWN
    assert {path.stat().st_nlink for path in held} == {1}
    assert not list((tmp_path / "shared" / "scratch").iterdir())


@pytest.mark.parametrize("at", ["adopt", "create"])
def test_a_run_killed_while_it_gives_gives_at_its_next_start(at, tmp_path, monkeypatch) -> None:
    first = Trial(tmp_path, "first")

    class Killed(BaseException):
        pass

    def killed(*given, **more):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(first.store._shared, at, killed)
        with pytest.raises(Killed):
            first.play()
    assert not (tmp_path / "shared" / "stages").exists(), "no record before its files and itself are there"
    again = Trial(tmp_path, "first")
    again.play()
    assert again.built["common0"] == 0, "its own was finished"
    second = Trial(tmp_path, "second")
    second.play()
    assert set(second.built).isdisjoint(COMMON)


def test_runs_that_build_the_same_at_a_time_leave_one_whole_record(tmp_path) -> None:
    trials = [Trial(tmp_path, f"{number}") for number in range(4)]
    threads = [threading.Thread(target=trial.play) for trial in trials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    late = Trial(tmp_path, "late")
    late.play()
    assert set(late.built).isdisjoint(COMMON)
    for trial in trials:
        assert len(list((trial.run_dir / "stages").iterdir())) == len(COMMON) + NUM_OWN


@pytest.mark.parametrize("damage", [b"", b"the same for all 9", None])
def test_a_damaged_shared_file_is_named_and_never_recorded(damage, tmp_path) -> None:
    first = Trial(tmp_path, "first")
    first.play()
    (record,) = (tmp_path / "shared" / "stages").glob("common0-*")
    objects = tmp_path / "shared" / "objects"
    (held,) = (
        path for path in objects.rglob("*") if path.is_file() and path.read_bytes() == COMMON["common0"]
    )
    held.unlink()
    if damage is not None:
        held.write_bytes(damage)
    second = Trial(tmp_path, "second")
    with pytest.raises(ArtifactError, match=f"{held.name}: is (damaged|missing)"):
        second.play()
    assert not (second.run_dir / "stages" / record.name).exists()
    held.write_bytes(COMMON["common0"])
    second.play()
    assert set(second.built).isdisjoint(COMMON)


def test_a_run_whose_shared_folder_is_gone_goes_on_alone(tmp_path) -> None:
    Trial(tmp_path, "first")
    (tmp_path / "shared").rename(tmp_path / "elsewhere")
    store = RunStore.open(str(tmp_path / "trials" / "first"), {"trial": "first"})
    assert store.stage("own", {}, lambda folder: {"value": 1}).values == {"value": 1}
