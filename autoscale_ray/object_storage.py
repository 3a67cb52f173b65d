"""The storage of a run in an object store (s3, gs, az), through obstore, which the extra ``s3`` installs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from autoscale_ray.errors import ArtifactError, MissingExtraError, extra
from autoscale_ray.files import cache_folder
from autoscale_ray.storage import NUM_ATTEMPTS, Outcome, Storage, StorageUnavailableError, is_intact

SCHEMES = ("s3", "gs", "az")

CONNECT_TIMEOUT_S = 5
TIMEOUT_S = 60
"""Longest wait for the answer to one request; the default of some clients is shorter than a slow bucket."""

T = TypeVar("T")


class ObjectStorage(Storage):
    """Durable bytes in an object store with conditional puts.

    An object appears whole or not at all, so nothing is left half-written; uploads in parts that were cut
    off are invisible and belong to the bucket's own lifecycle rule.
    """

    def __init__(
        self, store: Any, url: str, cache: Path | None = None, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._store = store
        self._url = url.rstrip("/")
        self._pause = pause
        self._cache = cache or cache_folder()
        self._logs: dict[str, bytes] = {}
        self.views = self._cache / "views"

    def prepare(self) -> None:
        """Do nothing: a bucket needs no folder and knows no leases."""

    def where(self, key: str) -> str:
        """Return the URL of a key."""
        return f"{self._url}/{key}"

    def create(self, key: str, data: bytes, writer: str) -> Outcome:
        """Put with If-None-Match; whatever is neither a success nor a refusal leaves the outcome unknown."""
        try:
            self._store.put(key, data, mode="create")
        except _errors().AlreadyExistsError:
            return Outcome.TAKEN
        except _refusals() as error:
            raise ArtifactError(self.where(key), f"access refused: {_first_line(error)}") from error
        except _errors().BaseError:
            self._pause(0.1)
            return Outcome.UNKNOWN
        return Outcome.CREATED

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
        """Return a new folder on the local disk."""
        return Path(tempfile.mkdtemp(prefix=f"autoscale-{writer}-"))

    def adopt(self, file: Path, key: str) -> None:
        """Upload a file under its content-addressed name, then remove it here."""
        self._insist(key, lambda: self._store.put(key, file))
        file.unlink()

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
        path = self._cache / "objects" / sha256[:2] / sha256
        if not (path.is_file() and is_intact(path, sha256, size)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._insist(key, lambda: self._download(key, path, sha256, size))
            except FileNotFoundError as error:
                raise ArtifactError(self.where(key), "is missing") from error
        return path

    def append(self, key: str, line: bytes) -> None:
        """Put the whole log again: objects cannot grow, and a run logs little."""
        lines = self._logs.get(key, b"") + line
        self._insist(key, lambda: self._store.put(key, lines))
        self._logs[key] = lines

    def leftovers(self) -> tuple[str, ...]:
        """Return nothing: a bucket holds no temporary names."""
        return ()

    def sweep(self, leftovers: tuple[str, ...]) -> None:
        """Do nothing: there is never a leftover."""

    def _download(self, key: str, path: Path, sha256: str, size: int) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
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

    def _insist(self, key: str, call: Callable[[], T]) -> T:
        last: Exception | None = None
        for attempt in range(NUM_ATTEMPTS):
            try:
                return call()
            except _refusals() as error:
                raise ArtifactError(self.where(key), f"access refused: {_first_line(error)}") from error
            except _errors().BaseError as error:
                last = error
                self._pause(min(0.1 * 2**attempt, 5.0))
        raise StorageUnavailableError(self.where(key), f"no answer after {NUM_ATTEMPTS} attempts") from last


def connect(url: str) -> Any:
    """Return the obstore client of a URL; credentials and endpoint come from the environment.

    Raises:
        ArtifactError: The URL carries credentials, which would end up in logs, or is not understood.
        MissingExtraError: obstore is not installed.
    """
    if "@" in urlsplit(url).netloc:
        raise ArtifactError(urlsplit(url).scheme, "a storage URL must not carry credentials")
    _obstore()
    from obstore.store import from_url

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
        raise ArtifactError(url, f"cannot be opened: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise MissingExtraError("obstore", extra("s3")) from error
    return obstore


def _errors() -> Any:
    import obstore.exceptions

    return obstore.exceptions


def _refusals() -> tuple[type[Exception], ...]:
    return (_errors().PermissionDeniedError, _errors().UnauthenticatedError)
