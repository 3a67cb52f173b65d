"""The storage of a run in an object store (s3, gs, az), through obstore, which the extra ``s3`` installs."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from autoscale_ray.canonical import fingerprint
from autoscale_ray.errors import ArtifactError, MissingExtraError, StorageUnavailableError, extra
from autoscale_ray.files import cache_folder, remove_abandoned
from autoscale_ray.storage import Storage, is_intact, is_running, object_key, this_process

SCHEMES = ("s3", "gs", "az")

CONNECT_TIMEOUT_S = 5
TIMEOUT_S = 60
"""Longest wait for the answer to one request; the default of some clients is shorter than a slow bucket."""
PATIENCE_S = 600.0
"""How long one call is tried again while the bucket does not answer: an outage of minutes ends no run of days."""
FIRST_PATIENCE_S = 60.0
"""The same before the bucket has answered at all: till then a mistyped endpoint is likelier than an outage."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 15.0
"""Pauses between tries double from one to the other; each is drawn between half of that and all of it."""
LOG_PART_BYTES = 1 << 16
"""A log of objects goes on in a new one after so many bytes: an object is put whole for every line."""
MISTAKES = (
    "401 Unauthorized",
    "403 Forbidden",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "incorrectly configured region",
)
"""Words of answers to a call that no repetition mends, and that the client has no error class for."""
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")

T = TypeVar("T")


class ObjectStorage(Storage):
    """Durable bytes in an object store with conditional puts.

    An object appears whole or not at all, so nothing is left half-written; uploads in parts that were cut
    off are invisible and belong to the bucket's own lifecycle rule.

    Args:
        store: The obstore client.
        url: Where the run lies, for messages and for its folder on this machine.
        cache: Folder of this machine for copies and scratch; None takes `cache_folder`.
        pause: Waits for some seconds.
        clock: Seconds from any beginning.
    """

    def __init__(
        self,
        store: Any,
        url: str,
        cache: Path | None = None,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._url = url.rstrip("/")
        self._pause, self._clock = pause, clock
        self._random = random.Random()
        self._has_answered = False
        self._cache = cache or cache_folder()
        self._scratch = self._cache / "runs" / fingerprint(self._url)[:16] / "scratch"
        self._logs: dict[str, tuple[int, bytes]] = {}
        self.views = self._cache / "views"

    def prepare(self) -> None:
        """Do nothing: a bucket needs no folder and knows no leases."""

    def where(self, key: str) -> str:
        """Return the URL of a key."""
        return f"{self._url}/{key}"

    def tries(self) -> Iterator[int]:
        """Yield 1, 2, ... with growing pauses between, until the patience with this bucket is spent."""
        give_up_s = self._clock() + (PATIENCE_S if self._has_answered else FIRST_PATIENCE_S)
        pause_s = FIRST_PAUSE_S
        for number in itertools.count(1):
            yield number
            if self._clock() > give_up_s:
                return
            self._pause(self._random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def create(self, key: str, data: bytes, writer: str) -> bool:
        """Put with If-None-Match; whatever is no success is either a taken name or unknown."""
        try:
            self._ask(key, lambda: self._put(key, data, mode="create"))
        except _errors().BaseError:
            return False
        return True

    def read(self, key: str) -> bytes | None:
        """Return the content of an object, or None."""
        try:
            return self._insist(key, lambda: bytes(self._store.get(key).bytes()))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        """Return the sorted names directly below a prefix."""
        listing = self._insist(folder, lambda: self._store.list_with_delimiter(folder))
        keys = [item["path"] for item in listing["objects"]] + list(listing["common_prefixes"])
        return tuple(sorted(PurePosixPath(key).name for key in keys))

    def scratch(self, writer: str) -> Path:
        """Return a new folder in the cache, below one that bears the name of this process."""
        return Path(tempfile.mkdtemp(prefix=f"{writer}-", dir=self._own_scratch()))

    def adopt(self, file: Path, key: str) -> None:
        """Upload a file under its content-addressed name; here it becomes the copy that `fetch` verifies."""
        self._insist(key, lambda: self._put(key, file))
        copy = self._copy(PurePosixPath(key).name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, copy)

    def check(self, key: str, sha256: str, size: int) -> None:
        """Compare the size; the content is compared when it is fetched."""
        try:
            found = self._insist(key, lambda: self._store.head(key))["size"]
        except FileNotFoundError as error:
            raise ArtifactError(self.where(key), "is missing") from error
        if found != size:
            raise ArtifactError(self.where(key), f"is damaged: must have {size} bytes", found)

    def fetch(self, key: str, sha256: str, size: int) -> Path:
        """Return the copy in the local cache, downloaded when missing or damaged."""
        path = self._copy(sha256)
        if not (path.is_file() and is_intact(path, sha256, size)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._insist(key, lambda: self._download(key, path, sha256, size))
            except FileNotFoundError as error:
                raise ArtifactError(self.where(key), "is missing") from error
        return path

    def append(self, key: str, line: bytes) -> None:
        """Put the last part of the log again, as objects cannot grow; a long log goes on in ``<name>_0001``."""
        part, lines = self._logs.get(key, (0, b""))
        if len(lines) > LOG_PART_BYTES:
            part, lines = part + 1, b""
        path = PurePosixPath(key)
        name = str(path.with_stem(f"{path.stem}_{part:04d}")) if part else key
        try:
            self._ask(name, lambda: self._put(name, lines + line))
        except _errors().BaseError as error:
            raise StorageUnavailableError(self.where(name), _one_line(error)) from error
        self._logs[key] = part, lines + line

    def leftovers(self) -> tuple[str, ...]:
        """Return what processes hold or have left on this machine: scratch of this run, unfinished views."""
        return tuple(map(str, (*self._scratch.glob("*"), *self.views.glob(".*"))))

    def sweep(self, leftovers: tuple[str, ...]) -> None:
        """Remove what belongs to a process that has ended or, where that cannot be told, is a day old."""
        for path in map(Path, leftovers):
            runs = is_running(path.name)
            if runs is None:
                remove_abandoned(path)
            elif not runs:
                shutil.rmtree(path, ignore_errors=True)

    def _own_scratch(self) -> Path:
        folder = self._scratch / this_process()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _copy(self, sha256: str) -> Path:
        return self._cache / object_key(sha256)

    def _download(self, key: str, path: Path, sha256: str, size: int) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._own_scratch())
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in self._store.get(key).stream():
                    file.write(chunk)
            if not is_intact(Path(temporary), sha256, size):
                raise ArtifactError(
                    self.where(key), f"is damaged: must have {size} bytes with sha256 {sha256}"
                )
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _put(self, key: str, data: bytes | Path, **options: str) -> None:
        try:
            self._store.put(key, data, **options)
        except FileNotFoundError as error:  # what else could a put look for
            raise ArtifactError(self._url, "no such bucket") from error

    def _insist(self, key: str, call: Callable[[], T]) -> T:
        problem, cause = "", None
        for number in self.tries():
            try:
                return self._ask(key, call)
            except _errors().BaseError as error:
                problem, cause = f"no answer after {number} tries: {_one_line(error)}", error
        raise StorageUnavailableError(self.where(key), problem) from cause

    def _ask(self, key: str, call: Callable[[], T]) -> T:
        """Make one call; an answer that no repetition mends is one line for the user."""
        try:
            answer = call()
        except (FileNotFoundError, _errors().BaseError) as error:
            line = _one_line(error)
            if any(word in line for word in NO_BUCKET):
                raise ArtifactError(self._url, "no such bucket") from error
            if isinstance(error, _refusals()) or any(word in line for word in MISTAKES):
                raise ArtifactError(self.where(key), f"access refused: {line}") from error
            self._has_answered |= isinstance(error, FileNotFoundError | _errors().AlreadyExistsError)
            raise
        self._has_answered = True
        return answer


def connect(url: str) -> Any:
    """Return the obstore client of a URL; credentials and endpoint come from the environment.

    Raises:
        ArtifactError: The URL carries credentials, which would end up in logs, or is not understood.
        MissingExtraError: obstore is not installed.
    """
    if "@" in urlsplit(url).netloc:
        raise ArtifactError(urlsplit(url).scheme, "a storage URL must not carry credentials")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise MissingExtraError("obstore", extra("s3")) from error
    try:
        return from_url(
            url,
            client_options={
                "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
                "timeout": f"{TIMEOUT_S}s",
                "allow_http": True,
            },
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=60)},
        )
    except _errors().BaseError as error:
        raise ArtifactError(url, f"cannot be opened: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).partition("\nDebug source")[0].split())


def _errors() -> Any:
    import obstore.exceptions

    return obstore.exceptions


def _refusals() -> tuple[type[Exception], ...]:
    return (_errors().PermissionDeniedError, _errors().UnauthenticatedError)
