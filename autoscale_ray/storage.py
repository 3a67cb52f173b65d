"""Where a run's durable bytes lie: a local folder or an object store, behind one small interface.

Keys are relative, separated by ``/``. Three kinds of names are kept apart:

* contested names (journal slots, stage records) are made with `Storage.create`, which never overwrites;
* content-addressed names are made with `Storage.adopt`; writing one twice writes the same bytes;
* everything else (temporary files, scratch folders, event logs, views) holds nothing a reader relies on.

A folder is reached through `Disk`, whose few calls are those a power cut can fall between, so that a test can
stop at each of them. `object_storage.ObjectStorage` is the other implementation.
"""

from __future__ import annotations

import abc
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from autoscale_ray.errors import ArtifactError, StorageUnavailableError
from autoscale_ray.files import sync

NUM_ATTEMPTS = 8
"""Tries to take a name in a folder before the outcome is given up as unknown."""
LEASE_WAIT_S = 5.0
"""How long an opener waits for a process of this machine to let go of the folder: it may be dying."""
LEASE_LOST_S = 120.0
"""How long it waits for one that cannot be seen from here: an NFS server holds the lock of a dead node for 90 s."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer; the last is said by Lustre that is mounted without `flock`."""
LEFTOVERS = ("tmp", "scratch", "views")
"""Folders in which a run on disk holds what is not yet finished."""

_LEASES: dict[tuple[int, Path], int] = {}
"""Descriptors of the leases of this process: closing one, by whomever, would let go of the lock."""


class Storage(abc.ABC):
    """Durable bytes under relative keys."""

    views: Path
    """Local folder for views that give adopted files their own names."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make the storage ready for writing.

        Raises:
            ArtifactError: Another process on this machine is writing there.
        """

    @abc.abstractmethod
    def where(self, key: str) -> str:
        """Return the full name of a key, for messages."""

    @abc.abstractmethod
    def tries(self) -> Iterable[int]:
        """Return a number for every try of one call: as many as this storage is worth, with its pauses between."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes, writer: str) -> bool:
        """Create a durable object unless the name is taken; never overwrite.

        Args:
            key: Name of the object.
            data: Its whole content.
            writer: Token of the writer; names its temporary files.

        Returns:
            True where this attempt made it; False where the name is taken, or the outcome is unknown.
        """

    @abc.abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return the content of an object, or None where there is none."""

    @abc.abstractmethod
    def names(self, folder: str) -> tuple[str, ...]:
        """Return the sorted names directly below a folder."""

    @abc.abstractmethod
    def scratch(self, writer: str) -> Path:
        """Return a new, empty local folder for files that are to be adopted."""

    @abc.abstractmethod
    def adopt(self, file: Path, key: str) -> None:
        """Make a local file durable under a content-addressed key; the file is gone afterwards."""

    @abc.abstractmethod
    def check(self, key: str, sha256: str, size: int) -> None:
        """Check a content-addressed key as far as the place allows without moving its content.

        Raises:
            ArtifactError: Missing or damaged.
        """

    @abc.abstractmethod
    def fetch(self, key: str, sha256: str, size: int) -> Path:
        """Return a local file with the content of a content-addressed key, verified.

        Raises:
            ArtifactError: Missing, of another size, or of another content.
        """

    @abc.abstractmethod
    def append(self, key: str, line: bytes) -> None:
        """Append whole lines to a log that has one writer, in a single try.

        Raises:
            StorageUnavailableError: No answer; the lines may be there.
        """

    @abc.abstractmethod
    def leftovers(self) -> tuple[str, ...]:
        """Return the keys of what writers have begun and not yet finished or given up."""

    @abc.abstractmethod
    def sweep(self, leftovers: tuple[str, ...]) -> None:
        """Remove leftovers; those that are gone by now are no error."""


def publish(storage: Storage, key: str, data: bytes, writer: str) -> bytes:
    """Create a contested name and return what it holds in the end: our bytes (won) or another's (lost).

    A refused or unanswered attempt is never taken for a loss: the first of several attempts may have won,
    so the name is read back until the answer is known (docs/reliability.md, publishing).

    Raises:
        StorageUnavailableError: Still unknown after all tries of this storage.
    """
    for _ in storage.tries():
        if storage.create(key, data, writer):
            return data
        found = storage.read(key)
        if found is not None:
            return found
    raise StorageUnavailableError(storage.where(key), "outcome still unknown after all tries")


class Disk:
    """The file system calls of `FolderStorage` below one root; durable only after `sync`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        if self.root.exists() and not self.root.is_dir():
            raise ArtifactError(str(root), "must be a folder")

    def make_root(self) -> None:
        """Make the root folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        sync(self.root.parent)

    def lease(self, key: str) -> None:
        """Lock a file until this process ends; without effect where the file system has no locks.

        The lease only spares two processes the work: what keeps them apart is the fence. The file names its
        holder, because the server of a shared folder goes on holding the lock of a node that died.

        Raises:
            ArtifactError: Another process holds it.
        """
        mine = (os.getpid(), self.path(key))
        if mine in _LEASES:
            return
        descriptor = os.open(self.path(key), os.O_RDWR | os.O_CREAT, 0o644)
        started_s = time.monotonic()
        while not _lock(descriptor):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            wait_s = LEASE_WAIT_S if is_running(holder) else LEASE_LOST_S
            if time.monotonic() - started_s > wait_s:
                os.close(descriptor)
                raise ArtifactError(str(self.root), "another process is running in this folder", holder)
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, this_process().encode(), 0)
        _LEASES[mine] = descriptor

    def path(self, key: str) -> Path:
        """Return the path of a key."""
        return self.root / key

    def make_folder(self, key: str) -> None:
        """Make one folder; its parent must exist."""
        self.path(key).mkdir(exist_ok=True)

    def write(self, key: str, data: bytes) -> None:
        """Write a new file; the name must be free."""
        with open(self.path(key), "xb") as file:
            file.write(data)

    def move_in(self, file: Path, key: str) -> None:
        """Make a local file's content durable and move it below the root, replacing what is there."""
        sync(file)
        os.replace(file, self.path(key))

    def sync(self, key: str) -> None:
        """Make the content of a file, or the names in a folder, durable."""
        sync(self.path(key))

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; the name must be free."""
        os.link(self.path(source), self.path(target))

    def remove(self, key: str) -> None:
        """Remove a name."""
        self.path(key).unlink()

    def read(self, key: str) -> bytes:
        """Return the content of a file."""
        return self.path(key).read_bytes()

    def append(self, key: str, data: bytes) -> None:
        """Append to a file, made when missing: all of it or, where the disk is full, nothing."""
        path = self.path(key)
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(data)
        except OSError:
            os.truncate(path, size)
            raise

    def names(self, key: str) -> tuple[str, ...]:
        """Return the sorted names in a folder; none where there is no folder."""
        folder = self.path(key)
        return tuple(sorted(os.listdir(folder))) if folder.is_dir() else ()


class FolderStorage(Storage):
    """Durable bytes in a local folder.

    A file becomes visible under its name only when its content is on disk: written to a temporary name,
    synced, then linked (which refuses a taken name) or moved, then the folder is synced.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._numbers = itertools.count()
        self._folders: set[str] = set()
        self._verified: set[str] = set()
        self.views = disk.path("views")

    def prepare(self) -> None:
        """Make the folder and take its lease, which the kernel lets go of when this process ends."""
        self._disk.make_root()
        self._disk.lease("lease")

    def where(self, key: str) -> str:
        """Return the path of a key."""
        return str(self._disk.path(key))

    def tries(self) -> Iterable[int]:
        """Return few tries: the outcome is unknown only where a later writer sweeps, and that happens once."""
        return range(1, NUM_ATTEMPTS + 1)

    def create(self, key: str, data: bytes, writer: str) -> bool:
        """Create a file unless the name is taken."""
        temporary = f"tmp/{writer}-{next(self._numbers)}"
        self._ensure_folders(temporary, key)
        is_made = True
        try:
            self._disk.write(temporary, data)
            self._disk.sync(temporary)
            self._disk.link(temporary, key)
        except FileExistsError:
            is_made = False
        except FileNotFoundError:  # a later writer took us for dead and swept the temporary file: unknown
            return False
        # Also when taken: whoever linked the name may have died before it was durable, and we rely on it now.
        self._disk.sync(_parent(key))
        with suppress(FileNotFoundError):
            self._disk.remove(temporary)
        return is_made

    def read(self, key: str) -> bytes | None:
        """Return the content of a file, or None."""
        try:
            return self._disk.read(key)
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        """Return the sorted names in a folder."""
        return self._disk.names(folder)

    def scratch(self, writer: str) -> Path:
        """Return a new folder on the same file system, so that files can be moved."""
        key = f"scratch/{writer}-{next(self._numbers)}"
        self._ensure_folders(key)
        self._disk.make_folder(key)
        return self._disk.path(key)

    def adopt(self, file: Path, key: str) -> None:
        """Move a local file to its content-addressed name."""
        self._ensure_folders(key)
        # Moving, not linking: a damaged file under this name is replaced by the content the name promises.
        self._disk.move_in(file, key)
        self._disk.sync(_parent(key))

    def check(self, key: str, sha256: str, size: int) -> None:
        """Read the file once in the life of this process and compare size and sha256."""
        if key not in self._verified:
            check_file(self._disk.path(key), sha256, size)
            self._verified.add(key)

    def fetch(self, key: str, sha256: str, size: int) -> Path:
        """Return the file itself, verified."""
        self.check(key, sha256, size)
        return self._disk.path(key)

    def append(self, key: str, line: bytes) -> None:
        """Append a line."""
        self._ensure_folders(key)
        self._disk.append(key, line)

    def leftovers(self) -> tuple[str, ...]:
        """Return temporary files, scratch folders and unfinished views."""
        keys = (f"{folder}/{name}" for folder in LEFTOVERS for name in self._disk.names(folder))
        return tuple(key for key in keys if not key.startswith("views/") or key.startswith("views/."))

    def sweep(self, leftovers: tuple[str, ...]) -> None:
        """Remove files and folders."""
        for key in leftovers:
            if key.startswith("tmp/"):
                with suppress(FileNotFoundError):
                    self._disk.remove(key)
            else:
                shutil.rmtree(self._disk.path(key), ignore_errors=True)

    def _ensure_folders(self, *keys: str) -> None:
        for folder in (str(parent) for key in keys for parent in reversed(PurePosixPath(key).parents[:-1])):
            if folder not in self._folders:
                self._disk.make_folder(folder)
                self._disk.sync(_parent(folder))
                self._folders.add(folder)


def object_key(sha256: str) -> str:
    """Return the content-addressed key of a content."""
    return f"objects/{sha256[:2]}/{sha256}"


def check_file(path: Path, sha256: str, size: int) -> None:
    """Check size, then content, of a file.

    Raises:
        ArtifactError: Missing, of another size, or of another content.
    """
    if not path.is_file():
        raise ArtifactError(str(path), "is missing")
    if path.stat().st_size != size:
        raise ArtifactError(str(path), f"is damaged: must have {size} bytes", path.stat().st_size)
    found = sha256_of(path)
    if found != sha256:
        raise ArtifactError(str(path), f"is damaged: must have sha256 {sha256}", found)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, sha256: str, size: int) -> bool:
    """Return whether a file has this size and content."""
    return path.stat().st_size == size and sha256_of(path) == sha256


def this_process() -> str:
    """Return the name of this process, which no other has: host, number, and its start in clock ticks since boot."""
    return f"{socket.gethostname()}-{os.getpid()}-{_started(os.getpid())}"


def is_running(process: str) -> bool | None:
    """Return whether a process, named as by `this_process`, runs; None where this machine cannot tell."""
    rest, _, start = process.rpartition("-")
    host, _, number = rest.rpartition("-")
    if host != socket.gethostname() or not _started(os.getpid()):
        return None
    return start != "" and start == _started(number)


def _started(number: int | str) -> str:
    """Return when a process of this machine started; an empty text where it has ended, or there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if state in (b"Z", b"X") else fields[18].decode()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def _parent(key: str) -> str:
    return str(PurePosixPath(key).parent)
