"""Storages for tests: a disk that forgets what was not synced, and hooks at every storage call."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from autoscale_ray.artifacts import Artifact, RunStore
from autoscale_ray.storage import Disk

IDENTITY = {"seed": 7, "loop": {"budget": 10}}


class KilledError(BaseException):
    """The process is gone: not an Exception, so no error handler of the code under test can see it."""


class Node:
    """One file: what a reader sees, and what a power cut would leave."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.durable = b""


class MemoryDisk(Disk):
    """A disk in memory with the rules of POSIX: content and names become durable by `sync`.

    Args:
        root: Real folder for scratch files and for files handed out by path.
        hook: Called with (call, key, perform, tear) in place of each call that changes the disk.
    """

    def __init__(self, root: Path, hook: Callable[..., Any] | None = None) -> None:
        super().__init__(root)
        self.hook = hook
        self.live: dict[str, Node | None] = {".": None}
        self.safe: dict[str, Node | None] = {".": None}

    def cut_power(self) -> None:
        """Forget everything that was not synced."""
        whole = {key for key in self.safe if all(above in self.safe for above in _above(key))}
        self.live = {key: node for key, node in self.safe.items() if key in whole}
        for node in filter(None, self.live.values()):
            node.content = node.durable
        for folder in (self.root / "scratch").glob("*"):
            if f"scratch/{folder.name}" not in self.live:
                shutil.rmtree(folder)

    def make_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def lease(self, key: str) -> None:
        return None

    def path(self, key: str) -> Path:
        path = self.root / key
        node = self.live.get(key)
        path.unlink(missing_ok=True) if node is None and path.is_file() else None
        if node is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(node.content)
        return path

    def make_folder(self, key: str) -> None:
        def perform() -> None:
            assert _above(key)[0] in self.live, f"no parent for {key}"
            self.live.setdefault(key, None)
            (self.root / key).mkdir(parents=True, exist_ok=True)

        self._call("make_folder", key, perform)

    def write(self, key: str, data: bytes) -> None:
        def perform(content: bytes = data) -> None:
            if key in self.live:
                raise FileExistsError(key)
            self.live[key] = Node(content)

        self._call("write", key, perform, lambda: perform(data[: len(data) // 2]))

    def move_in(self, file: Path, key: str) -> None:
        content = file.read_bytes()

        def perform() -> None:
            node = Node(content)
            node.durable = content
            self.live[key] = node
            file.unlink()

        self._call("move_in", key, perform)

    def sync(self, key: str) -> None:
        def perform() -> None:
            if key not in self.live:
                raise FileNotFoundError(key)
            node = self.live[key]
            if node is not None:
                node.durable = node.content
                return
            for name in {*self.safe, *self.live}:
                if name != "." and _above(name)[0] == key:
                    if name in self.live:
                        self.safe[name] = self.live[name]
                    else:
                        del self.safe[name]

        self._call("sync", key, perform)

    def link(self, source: str, target: str) -> None:
        def perform() -> None:
            if target in self.live:
                raise FileExistsError(target)
            if source not in self.live:
                raise FileNotFoundError(source)
            self.live[target] = self.live[source]

        self._call("link", target, perform)

    def remove(self, key: str) -> None:
        def perform() -> None:
            if key not in self.live:
                raise FileNotFoundError(key)
            del self.live[key]

        self._call("remove", key, perform)

    def read(self, key: str) -> bytes:
        node = self.live.get(key)
        if node is None:
            raise FileNotFoundError(key)
        return node.content

    def append(self, key: str, data: bytes) -> None:
        def perform(added: bytes = data) -> None:
            node = self.live.setdefault(key, Node(b""))
            assert node is not None
            node.content += added

        self._call("append", key, perform, lambda: perform(data[: len(data) // 2]))

    def names(self, key: str) -> tuple[str, ...]:
        return tuple(sorted(name.rsplit("/", 1)[-1] for name in self.live if _above(name)[:1] == [key]))

    def _call(
        self, call: str, key: str, perform: Callable[[], None], tear: Callable[[], None] | None = None
    ) -> None:
        if self.hook is None:
            perform()
        else:
            self.hook(call, key, perform, tear)


class CrashAt:
    """Hook that kills the process at one call, counted from 1, in one of four ways."""

    def __init__(self, at: int, mode: str) -> None:
        self.at, self.mode, self.calls = at, mode, 0

    def __call__(
        self, call: str, key: str, perform: Callable[[], Any], tear: Callable[[], None] | None = None
    ) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return perform()
        if self.mode == "torn" and tear is not None:
            tear()
        elif self.mode in ("after", "lost"):
            with suppress(Exception):
                perform()
        raise KilledError(f"{self.mode} {call} {key}")


class HookedStore:
    """An obstore store whose every call goes through a hook."""

    def __init__(self, store: Any, hook: Callable[..., Any] | None = None) -> None:
        self.store, self.hook = store, hook

    def put(self, key: str, data: Any, **options: Any) -> Any:
        return self._call("create" if options else "put", key, lambda: self.store.put(key, data, **options))

    def get(self, key: str) -> Any:
        return self._call("get", key, lambda: self.store.get(key))

    def head(self, key: str) -> Any:
        return self._call("head", key, lambda: self.store.head(key))

    def list_with_delimiter(self, prefix: str) -> Any:
        return self._call("list", prefix, lambda: self.store.list_with_delimiter(prefix))

    def _call(self, call: str, key: str, perform: Callable[[], Any]) -> Any:
        return perform() if self.hook is None else self.hook(call, key, perform)


def play(store: RunStore, num_rounds: int = 2, acknowledged: list[str] | None = None) -> None:
    """Run a small run to its end: one shared stage, then a stage and a commit for each round."""
    pool = store.stage("pool", {"size": 3}, build_pool)
    for index in range(len(store.rounds()), num_rounds):
        trained = store.stage("train", {"round": index, "pool": pool.fingerprint}, train(pool, index))
        payload = {"score": trained.values["score"], "stage": trained.fingerprint}
        record = store.commit_round(index, payload)
        if acknowledged is not None:
            acknowledged.append(record.sha256)


def build_pool(folder: Path) -> dict[str, Any]:
    (folder / "part").mkdir()
    (folder / "part" / "0.bin").write_bytes(bytes(range(200)))
    (folder / "index.txt").write_text("three scenes")
    return {"num_scenes": 3}


def train(pool: Artifact, index: int) -> Callable[[Path], dict[str, Any]]:
    def build(folder: Path) -> dict[str, Any]:
        digest = hashlib.sha256(pool.path("part/0.bin").read_bytes() + index.to_bytes(4, "little")).digest()
        (folder / "weights.bin").write_bytes(digest * 4)
        return {"score": digest[0] / 256}

    return build


def _above(key: str) -> list[str]:
    """Return the folders above a key, nearest first."""
    return [str(parent) for parent in Path(key).parents]
