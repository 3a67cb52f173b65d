"""An object store that throttles, times out, loses answers and refuses its own retries (P5)."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import obstore.exceptions
import obstore.store
import pytest
from storage_shims import IDENTITY, HookedStore, play

from autoscale_ray.artifacts import RunStore, StaleWriterError
from autoscale_ray.cli import main
from autoscale_ray.errors import EXIT_FAILED, ArtifactError, StorageUnavailableError
from autoscale_ray.files import ABANDONED_S
from autoscale_ray.journal import read_chain
from autoscale_ray.object_storage import ObjectStorage, connect
from autoscale_ray.storage import publish, this_process

ERRORS = obstore.exceptions
FAULTS = ("throttled", "reset", "answer lost", "conflict", "own retry refused")


class Faulty:
    """Hook that answers chosen calls with a fault.

    Args:
        choose: Returns a fault of `FAULTS`, or None, for the number of a call, counted from 1.
    """

    def __init__(self, choose) -> None:
        self.choose, self.calls, self.num_faults = choose, 0, 0

    def __call__(self, call: str, key: str, perform) -> Any:
        self.calls += 1
        fault = self.choose(self.calls)
        if fault is None:
            return perform()
        self.num_faults += 1
        if fault in ("throttled", "reset", "conflict"):
            raise ERRORS.GenericError(f"{fault}: {call} {key}")
        perform()
        if fault == "own retry refused" and call == "create":
            raise ERRORS.AlreadyExistsError(f"{key} exists")
        raise ERRORS.GenericError(f"{fault}: {call} {key}")


def open_run(store, folder: Path, hook=None) -> RunStore:
    storage = ObjectStorage(HookedStore(store, hook), "mem://run", folder, lambda _: None)
    return RunStore.claim(storage, IDENTITY, clock=lambda: 0.0)


def contents(store) -> dict[str, bytes]:
    """Return every object that is not a matter of who wrote when."""
    keys = [item["path"] for page in store.list() for item in page]
    return {
        key: bytes(store.get(key).bytes()) for key in keys if key.split("/")[0] not in ("journal", "events")
    }


def undisturbed(folder: Path, num_rounds: int = 2) -> tuple[dict[str, bytes], int]:
    store, count = obstore.store.MemoryStore(), Faulty(lambda _: None)
    play(open_run(store, folder, count), num_rounds)
    return contents(store), count.calls


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_once_at_each_call_changes_nothing(fault: str, tmp_path: Path) -> None:
    reference, num_calls = undisturbed(tmp_path / "reference")
    for at in range(1, num_calls + 1):
        store, hook = obstore.store.MemoryStore(), Faulty(lambda call, at=at: fault if call == at else None)
        play(open_run(store, tmp_path / str(at), hook))
        assert hook.num_faults == 1
        assert contents(store) == reference, (fault, at)


def test_many_rounds_with_a_sixth_of_the_calls_faulty(tmp_path: Path) -> None:
    reference, _ = undisturbed(tmp_path / "reference", num_rounds=500)
    generator = np.random.default_rng(5)
    hook = Faulty(lambda _: str(generator.choice(FAULTS)) if generator.random() < 0.16 else None)
    store = obstore.store.MemoryStore()
    play(open_run(store, tmp_path / "faulty", hook), num_rounds=500)
    assert hook.num_faults > 1000
    assert contents(store) == reference
    storage = ObjectStorage(store, "mem://run", tmp_path / "reader")
    assert [record.index for record in read_chain(storage)] == list(range(500))


class Clock:
    """Time that passes only where somebody waits; whoever listens hears of every pause."""

    def __init__(self) -> None:
        self.now_s, self.pauses_s = 0.0, []
        self.listener = lambda: None

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        self.pauses_s.append(seconds)
        self.listener()

    def __call__(self) -> float:
        return self.now_s


def open_in_time(store, folder: Path, clock: Clock, hook) -> RunStore:
    storage = ObjectStorage(HookedStore(store, hook), "mem://run", folder, clock.pause, clock)
    return RunStore.claim(storage, IDENTITY, clock=lambda: 0.0)


def outage(clock: Clock, at: int, seconds: float, calls: tuple[str, ...] = ()) -> Any:
    """Return a hook under which the store is away for so long from a call on, counted from 1; () is for all calls."""
    numbers, ends_s = itertools.count(1), []

    def hook(call: str, key: str, perform) -> Any:
        if next(numbers) >= at and (not calls or call in calls):
            ends_s.append(ends_s[0] if ends_s else clock.now_s + seconds)
            if clock.now_s < ends_s[0]:
                raise ERRORS.GenericError(f"503: {call} {key}")
        return perform()

    return hook


def test_an_outage_of_minutes_at_any_call_changes_nothing(tmp_path: Path) -> None:
    reference, num_calls = undisturbed(tmp_path / "reference")
    for at in range(2, num_calls + 1):
        store, clock = obstore.store.MemoryStore(), Clock()
        play(open_in_time(store, tmp_path / str(at), clock, outage(clock, at, 300)))
        assert contents(store) == reference, at
        assert 300 <= clock.now_s < 320 or at == num_calls  # the last one is a line of the log
        assert len(clock.pauses_s) < 40


def test_names_that_cannot_be_taken_for_minutes_are_taken_later(tmp_path: Path) -> None:
    """Reads are answered, only conditional puts are not: the commit has the patience of every other call."""
    reference, _ = undisturbed(tmp_path / "reference")
    store, clock = obstore.store.MemoryStore(), Clock()
    play(open_in_time(store, tmp_path / "cache", clock, outage(clock, 4, 300, ("create",))))
    assert contents(store) == reference
    assert 300 <= clock.now_s < 320


def test_a_writer_superseded_during_an_outage_publishes_nothing(tmp_path: Path) -> None:
    store, clock = obstore.store.MemoryStore(), Clock()
    storage = HookedStore(store)
    first = RunStore.claim(
        ObjectStorage(storage, "mem://run", tmp_path, clock.pause, clock), IDENTITY, clock=lambda: 0.0
    )
    storage.hook = outage(clock, 1, 300, ("create",))
    second: list[RunStore] = []

    def supersede() -> None:
        if clock.now_s > 100 and not second:
            second.append(open_run(store, tmp_path / "second"))

    clock.listener = supersede
    with pytest.raises(StaleWriterError, match="writer 1 was superseded by writer 2"):
        first.commit_round(0, {"by": 1})
    assert clock.now_s > 100
    second[0].commit_round(0, {"by": 2})
    chain = read_chain(ObjectStorage(store, "mem://run", tmp_path / "reader"))
    assert [record.payload for record in chain] == [{"by": 2}]


def test_an_outage_longer_than_the_patience_stops_and_changes_nothing(tmp_path: Path) -> None:
    store, clock = obstore.store.MemoryStore(), Clock()
    run = open_in_time(store, tmp_path, clock, outage(clock, 40, 10_000))
    with pytest.raises(StorageUnavailableError, match=r"no answer after \d+ tries: 503: get"):
        play(run, num_rounds=20)
    assert 600 <= clock.now_s < 650
    assert max(clock.pauses_s) > 7
    published = contents(store)
    play(open_run(store, tmp_path / "again"), num_rounds=20)
    assert published.items() <= contents(store).items()
    assert contents(store) == undisturbed(tmp_path / "reference", num_rounds=20)[0]


def test_a_bucket_that_has_never_answered_is_given_up_after_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    with pytest.raises(StorageUnavailableError):
        open_in_time(obstore.store.MemoryStore(), tmp_path, clock, outage(clock, 1, 10_000))
    assert 60 <= clock.now_s < 90


@pytest.mark.parametrize("command", [["status"], ["run", "--backend", "local", "--out"]])
def test_a_bucket_that_does_not_answer_is_no_bad_input(command, tmp_path: Path, monkeypatch, capsys) -> None:
    clock = Clock()
    store = HookedStore(None, outage(clock, 1, 10_000))
    monkeypatch.setattr("autoscale_ray.journal.connect", lambda url: store)
    monkeypatch.setattr("autoscale_ray.object_storage.FIRST_PATIENCE_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main([*command, "s3://bucket/run"])
    assert ended.value.code == EXIT_FAILED
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("404 Not Found: <Code>NoSuchBucket</Code>", "s3://bucket/run: no such bucket"),
        ("404 Not Found:\n<Code>ContainerNotFound</Code>", "s3://bucket/run: no such bucket"),
        (
            "400 Bad Request:\n<Code>ExpiredToken</Code>\n\nDebug source: ...",
            "access refused: 400 Bad Request: <",
        ),
        ("Received redirect, this normally indicates an incorrectly configured region", "access refused"),
    ],
)
@pytest.mark.parametrize("error", [ERRORS.GenericError, FileNotFoundError])
def test_what_no_repetition_mends_is_one_line_at_once(error, answer: str, told: str, tmp_path: Path) -> None:
    def refuse(call, key, perform):
        raise error(answer)

    clock = Clock()
    storage = ObjectStorage(HookedStore(None, refuse), "s3://bucket/run", tmp_path, clock.pause, clock)
    (tmp_path / "file").write_bytes(b"content")
    for call in (
        lambda: storage.read("run.json"),
        lambda: storage.names("journal"),
        lambda: storage.create("run.json", b"", "token"),
        lambda: storage.adopt(tmp_path / "file", "objects/ab/abc"),
        lambda: storage.append("events/000001.jsonl", b""),
    ):
        with pytest.raises(ArtifactError) as caught:
            call()
        assert told in str(caught.value) or str(caught.value) == "s3://bucket/run: no such bucket"
        assert "\n" not in str(caught.value)
    assert clock.now_s == 0


def events(store) -> list[dict[str, Any]]:
    keys = sorted(item["path"] for page in store.list("events") for item in page)
    lines = b"".join(bytes(store.get(key).bytes()) for key in keys).decode().splitlines()
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("error", [ERRORS.GenericError("503 SlowDown"), ERRORS.PermissionDeniedError("403")])
def test_a_log_that_cannot_be_written_ends_no_run_and_says_so_later(error, tmp_path: Path) -> None:
    store, away = obstore.store.MemoryStore(), [True]

    def hook(call: str, key: str, perform) -> Any:
        if away and key.startswith("events/"):
            raise error
        return perform()

    run = open_run(store, tmp_path / "cache", hook)
    play(run)
    assert contents(store) == undisturbed(tmp_path / "reference")[0]
    assert events(store) == []
    away.clear()
    run.log("note")
    gap, *lines = events(store)
    assert (gap["event"], gap["times"], gap["lines_lost"]) == ("log_failed", 3, 0)
    assert str(error) in gap["reason"]
    assert [line["event"] for line in lines] == ["stage", "stage", "stage", "note"]
    run.log("note")
    assert len(events(store)) == 6


def test_lines_that_wait_for_ever_do_not_fill_the_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("autoscale_ray.event_log.MAX_WAITING", 3)
    store, away = obstore.store.MemoryStore(), [True]

    def hook(call: str, key: str, perform) -> Any:
        if away and key.startswith("events/"):
            raise ERRORS.GenericError("503")
        return perform()

    run = open_run(store, tmp_path, hook)
    for number in range(5):
        run.log("note", number=number)
    away.clear()
    run.log("note", number=5)
    gap, *lines = events(store)
    assert (gap["times"], gap["lines_lost"]) == (5, 3)
    assert [line["number"] for line in lines] == [3, 4, 5]


def test_a_long_log_is_not_uploaded_again_for_every_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("autoscale_ray.object_storage.LOG_PART_BYTES", 500)
    store, sizes = obstore.store.MemoryStore(), []

    class Measured(HookedStore):
        def put(self, key: str, data: Any, **options: Any) -> Any:
            sizes.append(len(data))
            return super().put(key, data, **options)

    run = RunStore.claim(ObjectStorage(Measured(store), "mem://run", tmp_path), IDENTITY)
    for number in range(200):
        run.log("note", number=number)
    assert [line["number"] for line in events(store)] == list(range(200))
    assert max(sizes) < 700
    assert sorted(item["path"] for page in store.list("events") for item in page)[:2] == [
        "events/000001.jsonl",
        "events/000001_0001.jsonl",
    ]


def test_what_a_killed_process_left_in_the_cache_goes_with_the_next_claim(tmp_path: Path) -> None:
    """Scratch of a living process stays, of whatever run; so does what another machine made today."""
    store = obstore.store.MemoryStore()
    open_run(store, tmp_path)
    scratch = ObjectStorage(store, "mem://run", tmp_path).scratch("token")
    (scratch / "weights.bin").write_bytes(b"half")
    folder = scratch.parents[1]
    assert (folder.name, folder.is_relative_to(tmp_path / "runs")) == ("scratch", True)
    host, number, start = this_process().rsplit("-", 2)
    dead = folder / f"{host}-{number}-{int(start) - 1}"
    elsewhere, long_ago = folder / "elsewhere-1-1", folder / "elsewhere-2-2"
    draft = tmp_path / "views" / ".train-0123-abcd"
    for left in (dead, elsewhere, long_ago, draft):
        (left / "token-1").mkdir(parents=True)
        (left / "token-1" / "weights.bin").write_bytes(b"half")
    for path in (long_ago, draft):
        for part in (*path.rglob("*"), path):
            os.utime(part, (time.time() - 2 * ABANDONED_S,) * 2)
    open_run(store, tmp_path)
    assert sorted(folder.iterdir()) == sorted([scratch.parent, elsewhere])
    assert (scratch / "weights.bin").is_file()
    assert not draft.exists()


def test_what_was_uploaded_is_not_downloaded_again_and_still_verified(tmp_path: Path) -> None:
    store, gets = obstore.store.MemoryStore(), []

    def hook(call: str, key: str, perform) -> Any:
        gets.append(key) if call == "get" and key.startswith("objects/") else None
        return perform()

    run = open_run(store, tmp_path, hook)
    artifact = run.stage("pool", {}, lambda folder: {"n": (folder / "a").write_bytes(b"abcdef")})
    path = artifact.path("a")
    assert (path.read_bytes(), gets) == (b"abcdef", [])
    path.write_bytes(b"abcdeg")
    assert artifact.path("a").read_bytes() == b"abcdef"
    assert gets == [artifact.blobs["a"].key]


def test_an_own_success_reported_as_a_refusal_is_a_win(tmp_path: Path) -> None:
    store = HookedStore(obstore.store.MemoryStore(), Faulty(lambda _: None))
    storage = ObjectStorage(store, "mem://run", tmp_path, lambda _: None)
    store.hook = Faulty(lambda call: "own retry refused" if call == 1 else None)
    assert publish(storage, "journal/000000.json", b"mine", "token") == b"mine"
    assert publish(storage, "journal/000000.json", b"theirs", "token") == b"mine"


def test_a_refused_access_is_one_clear_line(tmp_path: Path) -> None:
    def refuse(call, key, perform):
        raise ERRORS.PermissionDeniedError("403 Forbidden\nDebug source: ...")

    storage = ObjectStorage(HookedStore(None, refuse), "s3://bucket/run", tmp_path)
    with pytest.raises(ArtifactError) as caught:
        RunStore.claim(storage, IDENTITY)
    assert str(caught.value) == "s3://bucket/run/run.json: access refused: 403 Forbidden"


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ArtifactError, match="must not carry credentials") as caught:
        connect("s3://AKIAEXAMPLE:secretvalue@bucket/run")
    assert "secretvalue" not in str(caught.value)


def test_a_damaged_download_is_named_and_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    store = obstore.store.MemoryStore()
    run = open_run(store, tmp_path / "cache")
    artifact = run.stage("pool", {}, lambda folder: {"n": (folder / "a").write_bytes(b"abcdef")})
    path = artifact.path("a")
    path.write_bytes(b"broken")
    assert artifact.path("a").read_bytes() == b"abcdef"
    store.put(artifact.blobs["a"].key, b"abcdeg")
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{artifact.blobs['a'].sha256}.* is damaged"):
        artifact.path("a")
