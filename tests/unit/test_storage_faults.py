"""An object store that throttles, times out, loses answers and refuses its own retries (P5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import obstore.exceptions
import obstore.store
import pytest
from storage_shims import IDENTITY, HookedStore, play

from autoscale_ray.artifacts import RunStore, read_chain
from autoscale_ray.errors import ArtifactError
from autoscale_ray.object_storage import ObjectStorage, connect
from autoscale_ray.storage import StorageUnavailableError, publish

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


def test_an_outage_longer_than_the_budget_stops_and_changes_nothing(tmp_path: Path) -> None:
    store = obstore.store.MemoryStore()
    run = open_run(store, tmp_path, Faulty(lambda call: "throttled" if call > 40 else None))
    with pytest.raises(StorageUnavailableError, match="after 8 attempts"):
        play(run, num_rounds=20)
    published = contents(store)
    play(open_run(store, tmp_path / "again"), num_rounds=20)
    assert published.items() <= contents(store).items()
    assert contents(store) == undisturbed(tmp_path / "reference", num_rounds=20)[0]


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
