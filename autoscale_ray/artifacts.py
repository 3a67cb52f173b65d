"""The durable state of a run: finished stages, published rounds, and the fence that keeps writers apart.

Layout below the run directory (docs/reliability.md)::

    run.json                        identity of the run, made once
    journal/000007.json             one slot for each event, made once: a writer's claim, or a published round
    rounds/00003.json               manifest of a round, made once; a journal slot names its content
    stages/<name>-<fp16>.json       record of a finished stage, made once
    objects/<2>/<sha256>            files of stages, and manifests, by content
    events/<epoch>.jsonl            what happened when; `status` and `stop` look there for the cluster
    tmp/ scratch/ views/            nothing anyone relies on
    shared                          in a trial of a sweep: link to the run folder that all trials share

A writer opens the run by taking the next free journal slot for its claim, and publishes a round by taking
the next free slot for it. Whoever finds the slot that it wanted held by a later claim has been superseded
and stops, so two drivers cannot both advance a run, whatever they believe about each other. Tokens, epochs
and clocks stay in journal and events; stage records and manifests depend on the run alone, so a run that
was killed and resumed publishes the same chain of manifests, byte for byte.

Runs that share a folder look there for a stage that they lack, by the name that its identity gives it, and leave
there what they have built. So a run touches the files of its own stages, however many runs share with it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoscale_ray.canonical import (
    JSON,
    canonical_json,
    fingerprint,
    first_difference,
    plain,
    seal,
    unseal,
)
from autoscale_ray.errors import ArtifactError, AutoScaleError, InvalidInputError
from autoscale_ray.event_log import EventLog, read_log
from autoscale_ray.files import link_or_copy
from autoscale_ray.journal import (
    RoundRecord,
    chain_of,
    open_storage,
    read_journal,
    read_manifests,
    round_key,
    slot_key,
)
from autoscale_ray.storage import Disk, FolderStorage, Storage, object_key, publish, sha256_of

SHARED = "shared"
MAX_CONTESTS = 100
"""Claims lost in a row before an opener gives up."""


class StaleWriterError(ArtifactError):
    """Another writer has claimed the run since; this one may not publish any more."""


@dataclass(frozen=True)
class Blob:
    """One file of an artifact."""

    name: str
    """Path below the artifact, separated by ``/``."""
    sha256: str
    size: int
    """Bytes."""

    @property
    def key(self) -> str:
        """Return where the content lies in the storage."""
        return object_key(self.sha256)


@dataclass(frozen=True)
class Artifact:
    """A finished stage: small values, and files by name."""

    stage: str
    fingerprint: str
    """sha256 of the identity of the stage."""
    values: Mapping[str, Any]
    blobs: Mapping[str, Blob]
    _storage: Storage = field(repr=False, compare=False)

    def path(self, name: str) -> Path:
        """Return a local file with the verified content of a blob; read it, never write to it.

        Raises:
            ArtifactError: No such blob, or its content is missing or damaged.
        """
        if name not in self.blobs:
            raise ArtifactError(f"stage {self.stage}", f"has no file {name}", sorted(self.blobs))
        blob = self.blobs[name]
        return self._storage.fetch(blob.key, blob.sha256, blob.size)

    def folder(self) -> Path:
        """Return a local folder in which the verified blobs have their own names; read only.

        Raises:
            ArtifactError: No blob, or content is missing or damaged.
        """
        if not self.blobs:
            raise ArtifactError(f"stage {self.stage}", "has no files")
        content = {name: blob.sha256 for name, blob in self.blobs.items()}
        view = self._storage.views / f"{self.stage}-{fingerprint(content)[:16]}"
        return _view(view, {name: self.path(name) for name in self.blobs})


class RunStore:
    """The durable state of one run, opened for writing."""

    def __init__(
        self,
        storage: Storage,
        identity: Mapping[str, Any],
        clock: Callable[[], float],
        shared: FolderStorage | None = None,
    ) -> None:
        self._storage = storage
        self._shared = shared
        self._clock = clock
        self._token = secrets.token_hex(8)
        self._root = fingerprint(identity)
        self._slot = 0
        self._epoch = 0
        self._rounds: tuple[RoundRecord, ...] = ()

    @classmethod
    def open(cls, run_dir: str, identity: Mapping[str, Any]) -> RunStore:
        """Open a run for writing, made when it is new; earlier writers are superseded.

        Args:
            run_dir: Local path, or URL with scheme s3, gs or az; a local one may share stages, see `share_with`.
            identity: Everything that bears on the run's result.

        Raises:
            ArtifactError: The folder holds another run (names the first field that differs), is damaged, or
                another process of this machine is running in it.
        """
        storage, link = open_storage(run_dir), Path(run_dir) / SHARED
        shared = FolderStorage(Disk(link.resolve())) if link.is_symlink() and link.is_dir() else None
        return cls.claim(storage, identity, shared=shared)

    @classmethod
    def claim(
        cls,
        storage: Storage,
        identity: Mapping[str, Any],
        clock: Callable[[], float] = time.time,
        shared: FolderStorage | None = None,
    ) -> RunStore:
        """Open a run in a storage, where given with another one to share stages with; see `open`."""
        store = cls(storage, identity, clock, shared)
        storage.prepare()
        _check_identity(storage, identity, store._token)
        store._take_epoch()
        return store

    @property
    def epoch(self) -> int:
        """Return the number of this writer; higher than all before it."""
        return self._epoch

    def stage(
        self, name: str, identity: Mapping[str, Any], build: Callable[[Path], Mapping[str, JSON]]
    ) -> Artifact:
        """Return a finished stage; where none is recorded for this identity, here or in the shared folder, build it.

        Args:
            name: Lower-case letters, digits, ``_`` and ``-``.
            identity: Everything that bears on the stage's result.
            build: Writes files into the folder it is given and returns small values.

        Raises:
            ArtifactError: The recorded stage is missing files or is damaged; it is never rebuilt silently.
            StaleWriterError: Another writer has claimed the run.
        """
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise InvalidInputError("stage name", "must be lower-case letters, digits, _ and -", name)
        mark = fingerprint(identity)
        key = f"stages/{name}-{mark[:16]}.json"
        found = self._storage.read(key)
        if found is None:
            self._check_fence()
            record = self._take(key, name, mark) or seal(self._build(name, mark, build))
            found = publish(self._storage, key, record, self._token)
        artifact = self._artifact(self._storage.where(key), found, name, mark)
        for blob in artifact.blobs.values():
            self._storage.check(blob.key, blob.sha256, blob.size)
        self._give(key, found, artifact)
        return artifact

    def commit_round(self, index: int, payload: Mapping[str, JSON]) -> RoundRecord:
        """Publish a round: durable and visible to every later reader once this has returned.

        Args:
            index: The next round, or one that was published before with the same payload.
            payload: What the round is.

        Raises:
            ArtifactError: The index is not the next one, or this round was published with another content.
            StaleWriterError: Another writer has claimed the run; nothing was changed.
            StorageUnavailableError: The storage did not answer; calling again is safe.
        """
        if not 0 <= index <= len(self._rounds):
            raise ArtifactError(f"round {index}", f"the next round is {len(self._rounds)}")
        record, manifest = self._manifest(index, payload)
        if index < len(self._rounds):
            return self._confirm(self._rounds[index], record)
        self._check_fence()
        self._publish_same(object_key(record.sha256), manifest)
        self._append({"kind": "round", "index": index, "sha256": record.sha256})
        self._publish_same(round_key(index), manifest)
        self._rounds = (*self._rounds, record)
        return record

    def rounds(self) -> tuple[RoundRecord, ...]:
        """Return the published rounds, chain verified when they were read."""
        return self._rounds

    def log(self, event: str, **fields: JSON) -> None:
        """Append an event with the wall clock to the events of this writer; never part of any identity.

        A storage that does not take it ends nothing: the line waits for the next one.
        """
        self._events.write(event, **fields)

    def seconds_of_stages(self) -> dict[str, float]:
        """Return the wall seconds that finished stages took to be made, by fingerprint, as far as the log tells."""
        try:
            made = [event for event in read_log(self._storage) if event["event"] == "stage"]
        except (AutoScaleError, OSError):  # nobody needs the log to go on
            return {}
        return {str(event.get("fingerprint")): float(event.get("seconds") or 0.0) for event in made}

    def _take_epoch(self) -> None:
        for _ in range(MAX_CONTESTS):
            # Listed before the claim: what is there belongs to writers it supersedes, never to one after it.
            leftovers = self._storage.leftovers()
            slots = read_journal(self._storage)
            manifests = read_manifests(self._storage, slots)
            self._rounds = chain_of(self._storage, manifests, self._root)
            self._slot = len(slots)
            self._epoch = 1 + max((slot["epoch"] for slot in slots), default=0)
            try:
                self._append({"kind": "claim"})
            except StaleWriterError:
                continue
            self._events = EventLog(self._storage, f"events/{self._epoch:06d}.jsonl", self._clock)
            for index, manifest in enumerate(manifests):  # one may be committed and not yet visible by name
                self._publish_same(round_key(index), manifest)
            self._storage.sweep(leftovers)
            return
        raise ArtifactError(self._storage.where("journal"), f"lost {MAX_CONTESTS} claims in a row")

    def _append(self, event: Mapping[str, JSON]) -> None:
        body = {**event, "slot": self._slot, "epoch": self._epoch, "token": self._token}
        key = slot_key(self._slot)
        data = seal(body)
        found = publish(self._storage, key, data, self._token)
        if found != data:
            raise self._stale(key, found)
        self._slot += 1

    def _publish_same(self, key: str, manifest: bytes) -> None:
        if publish(self._storage, key, manifest, self._token) != manifest:
            raise ArtifactError(self._storage.where(key), "is damaged: it holds another content")

    def _check_fence(self) -> None:
        key = slot_key(self._slot)
        found = self._storage.read(key)
        # Our own entry may stand there already, from a call whose outcome stayed unknown.
        if found is not None and unseal(self._storage.where(key), found)["token"] != self._token:
            raise self._stale(key, found)

    def _stale(self, key: str, found: bytes) -> StaleWriterError:
        other = unseal(self._storage.where(key), found)["epoch"]
        rule = f"writer {self._epoch} was superseded by writer {other}; it changes nothing more"
        return StaleWriterError(self._storage.where(key), rule)

    def _build(self, name: str, mark: str, build: Callable[[Path], Mapping[str, JSON]]) -> dict[str, Any]:
        scratch = self._storage.scratch(self._token)
        started_s = self._clock()
        try:
            values = plain(build(scratch), f"values of stage {name}")
            blobs = self._adopt(scratch)
        except OSError:
            self._check_fence()  # a later writer sweeps our scratch: say that, not "no such file"
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._check_fence()  # one that swept it before all was moved would leave us a record with files missing
        self.log("stage", name=name, fingerprint=mark, seconds=self._clock() - started_s)
        return {"stage": name, "fingerprint": mark, "values": values, "blobs": blobs}

    def _take(self, key: str, name: str, mark: str) -> bytes | None:
        """Take over the files of a stage from the shared folder; return its record, or None where it has none."""
        record = self._shared.read(key) if self._shared else None
        if self._shared is None or record is None:
            return None
        blobs = self._artifact(self._shared.where(key), record, name, mark).blobs.values()
        files = {blob.key: Path(self._shared.where(blob.key)) for blob in blobs}
        for file in files.values():
            if not file.is_file():
                raise ArtifactError(str(file), "is missing")
        try:
            self._adopt_links(self._storage, files)
        except OSError:
            self._check_fence()  # as in `_build`
            raise
        for blob in blobs:
            self._storage.check(blob.key, blob.sha256, blob.size)
        return record

    def _give(self, key: str, record: bytes, artifact: Artifact) -> None:
        """Leave a finished stage in the shared folder unless it is there, also one whose writer died before."""
        if self._shared is None or self._shared.read(key) is not None:
            return
        files = {blob.key: artifact.path(name) for name, blob in artifact.blobs.items()}
        self._adopt_links(self._shared, files)
        publish(self._shared, key, record, self._token)  # last: a record that is there promises its files

    def _adopt_links(self, storage: Storage, files: Mapping[str, Path]) -> None:
        """Put files from elsewhere into a storage under their keys, as links where it may be, and leave them."""
        scratch = storage.scratch(self._token)
        try:
            for key, path in files.items():
                link = scratch / path.name
                link_or_copy(path, link)
                storage.adopt(link, key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _adopt(self, scratch: Path) -> dict[str, Any]:
        blobs = {}
        for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
            blob = Blob(file.relative_to(scratch).as_posix(), sha256_of(file), file.stat().st_size)
            self._storage.adopt(file, blob.key)
            blobs[blob.name] = {"sha256": blob.sha256, "size": blob.size}
        return blobs

    def _artifact(self, where: str, found: bytes, name: str, mark: str) -> Artifact:
        body = unseal(where, found)
        if (body.get("stage"), body.get("fingerprint")) != (name, mark):
            raise ArtifactError(where, f"is damaged: must be the record of stage {name}")
        blobs = {name: Blob(name, **item) for name, item in body["blobs"].items()}
        return Artifact(name, mark, body["values"], blobs, self._storage)

    def _manifest(self, index: int, payload: Mapping[str, JSON]) -> tuple[RoundRecord, bytes]:
        previous = self._rounds[index - 1].sha256 if index else self._root
        body = {"index": index, "previous": previous, "payload": plain(payload, f"round {index}")}
        manifest = canonical_json(body) + b"\n"
        return RoundRecord(index, previous, body["payload"], hashlib.sha256(manifest).hexdigest()), manifest

    def _confirm(self, published: RoundRecord, record: RoundRecord) -> RoundRecord:
        if published.sha256 == record.sha256:
            return published
        difference = first_difference(published.payload, record.payload)
        path, before, now = difference or ("the manifest", published.sha256, record.sha256)
        where = self._storage.where(round_key(record.index))
        told = f"was published with another content: {path} was {before!r}, is {now!r}"
        raise ArtifactError(
            where, f"{told} (was the run begun by another release? then take a new run folder)"
        )


def share_with(run_dir: Path, shared: Path) -> None:
    """Let a run in a local folder take finished stages from another run folder, and leave there those it builds.

    Args:
        run_dir: Run folder, made when missing.
        shared: Run folder on the same storage; any number of runs may share it at a time.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (run_dir / SHARED).symlink_to(shared.absolute())


def check_same_run(run_dir: str, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run, without claiming it; a folder without a run is no error.

    Args:
        run_dir: As in `RunStore.open`.
        identity: A part of what `RunStore.open` is given.

    Raises:
        ArtifactError: The folder holds another run; names the first field that differs.
    """
    storage = open_storage(run_dir)
    found = storage.read("run.json")
    if found is not None:
        held = unseal(storage.where("run.json"), found)
        _compare(storage, {name: held.get(name) for name in identity}, identity)


def _check_identity(storage: Storage, identity: Mapping[str, Any], token: str) -> None:
    found = publish(storage, "run.json", seal(identity), token)
    _compare(storage, unseal(storage.where("run.json"), found), identity)


def _compare(storage: Storage, held: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    difference = first_difference(held, plain(identity))
    if difference:
        path, before, now = difference
        rule = f"belongs to another run: {path} is {before!r} there and {now!r} here"
        raise ArtifactError(storage.where("run.json"), rule)


def _view(view: Path, files: Mapping[str, Path]) -> Path:
    """Make a folder of links to files in one step; a whole view is used again."""
    if all(_same(view / name, path) for name, path in files.items()):
        return view
    draft = view.with_name(f".{view.name}-{secrets.token_hex(4)}")
    for name, path in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, draft / name)
    shutil.rmtree(view, ignore_errors=True)
    try:
        draft.rename(view)
    except OSError:  # another process of this run made it first
        shutil.rmtree(draft)
    return view


def _same(view: Path, path: Path) -> bool:
    return view.exists() and (view.samefile(path) or sha256_of(view) == sha256_of(path))
