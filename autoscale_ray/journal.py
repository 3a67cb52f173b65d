"""The journal of a run and the chain of its published rounds: all that a reader needs.

A slot of the journal says who claimed the run, or names the content of a round's manifest; a manifest names the one
before it. Readers claim nothing and write nothing (docs/reliability.md, reading).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autoscale_ray.canonical import JSON, fingerprint, unseal
from autoscale_ray.errors import ArtifactError
from autoscale_ray.object_storage import SCHEMES, ObjectStorage, connect
from autoscale_ray.storage import Disk, FolderStorage, Storage, object_key


@dataclass(frozen=True)
class RoundRecord:
    """One published round."""

    index: int
    previous: str
    """sha256 of the manifest before; of the run's identity for round 0."""
    payload: Mapping[str, JSON]
    sha256: str
    """sha256 of this manifest."""


def open_storage(run_dir: str) -> Storage:
    """Return the storage of a run; nothing is made or claimed there.

    Args:
        run_dir: Local path, or URL with scheme s3, gs or az.

    Raises:
        ArtifactError: Another scheme, a URL that is not understood, or a path that is no folder.
    """
    scheme = urlsplit(run_dir).scheme
    if scheme in SCHEMES:
        return ObjectStorage(connect(run_dir), run_dir)
    if "://" in run_dir:
        raise ArtifactError(scheme, f"a run directory is a local path or one of {', '.join(SCHEMES)}://")
    return FolderStorage(Disk(Path(run_dir)))


def read_rounds(run_dir: str) -> tuple[RoundRecord, ...]:
    """Return the published rounds of a run, without claiming it; writers are not disturbed.

    Raises:
        ArtifactError: No run there, or a manifest or journal slot is missing or damaged.
    """
    return read_chain(open_storage(run_dir))


def read_chain(storage: Storage) -> tuple[RoundRecord, ...]:
    """Return the published rounds in a storage; see `read_rounds`."""
    manifests = read_manifests(storage, read_journal(storage))
    return chain_of(storage, manifests, fingerprint(_read_identity(storage)))


def read_journal(storage: Storage) -> list[dict[str, Any]]:
    """Return the journal's slots, by forward probe because a listing may lag, checked against the listing."""
    slots: list[dict[str, Any]] = []
    # Listed first: what is there now must be found below, what others add meanwhile need not.
    listed, rounds = storage.names("journal"), storage.names("rounds")
    while (found := storage.read(slot_key(len(slots)))) is not None:
        where = storage.where(slot_key(len(slots)))
        slots.append(unseal(where, found))
        if slots[-1].get("slot") != len(slots) - 1:
            raise ArtifactError(where, "is damaged: it holds another slot")
    if len(listed) > len(slots) or len(rounds) > len(_round_hashes(slots)):
        raise ArtifactError(
            storage.where(slot_key(len(slots))), "is missing: there are later slots or rounds"
        )
    return slots


def read_manifests(storage: Storage, slots: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Return the manifests that the slots name, in order, each checked against its sha256."""
    return [_read_manifest(storage, index, sha256) for index, sha256 in enumerate(_round_hashes(slots))]


def chain_of(storage: Storage, manifests: Sequence[bytes], root: str) -> tuple[RoundRecord, ...]:
    """Return the rounds of manifests, each checked to follow the one before, the first one the run's identity."""
    records: list[RoundRecord] = []
    for index, manifest in enumerate(manifests):
        body = json.loads(manifest)
        previous = records[-1].sha256 if records else root
        if (body["index"], body["previous"]) != (index, previous):
            raise ArtifactError(storage.where(round_key(index)), "does not follow the round before it")
        records.append(RoundRecord(index, previous, body["payload"], hashlib.sha256(manifest).hexdigest()))
    return tuple(records)


def slot_key(slot: int) -> str:
    """Return the name of a slot of the journal."""
    return f"journal/{slot:06d}.json"


def round_key(index: int) -> str:
    """Return the name of the manifest of a round."""
    return f"rounds/{index:05d}.json"


def _read_identity(storage: Storage) -> dict[str, Any]:
    found = storage.read("run.json")
    if found is None:
        raise ArtifactError(storage.where("run.json"), "no such run")
    return unseal(storage.where("run.json"), found)


def _round_hashes(slots: Sequence[Mapping[str, Any]]) -> list[str]:
    return [slot["sha256"] for slot in slots if slot["kind"] == "round"]


def _read_manifest(storage: Storage, index: int, sha256: str) -> bytes:
    for key in (round_key(index), object_key(sha256)):
        found = storage.read(key)
        if found is not None:
            if hashlib.sha256(found).hexdigest() != sha256:
                raise ArtifactError(storage.where(key), f"is damaged: must have sha256 {sha256}")
            return found
    raise ArtifactError(storage.where(round_key(index)), "is missing")
