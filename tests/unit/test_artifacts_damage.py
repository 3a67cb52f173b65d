"""Every stored byte that changes is noticed and named before it is used (P11)."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from storage_shims import IDENTITY, build_pool, play

from autoscale_ray.artifacts import RunStore
from autoscale_ray.errors import ArtifactError
from autoscale_ray.journal import read_rounds
from autoscale_ray.storage import Disk, FolderStorage

DAMAGES = ("flip", "truncate", "zero", "empty", "delete", "swap", "stale")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return a finished run that was opened twice, so that its journal holds two claims."""
    run_dir = tmp_path_factory.mktemp("damage") / "run"
    for num_rounds in (2, 4):
        play(RunStore.claim(_storage(run_dir), IDENTITY), num_rounds)
    return run_dir


def _storage(run_dir: Path) -> FolderStorage:
    return FolderStorage(Disk(run_dir))


def kinds(run_dir: Path) -> dict[str, list[Path]]:
    """Return the files that a run relies on, by kind."""
    found = defaultdict(list)
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        kind = path.relative_to(run_dir).parts[0]
        if kind not in ("lease", "events", "views"):
            found[kind].append(path)
    return found


def damage(path: Path, how: str, others: list[Path], generator: np.random.Generator) -> bool:
    """Damage one file; return whether its bytes are other than before."""
    before = path.read_bytes()
    content = bytearray(before)
    if how == "flip":
        content[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
    elif how == "truncate":
        del content[int(generator.integers(len(content))) :]
    elif how == "zero":
        content = bytearray(len(content))
    elif how == "empty":
        content = bytearray()
    elif how == "swap":
        content = bytearray(others[int(generator.integers(len(others)))].read_bytes())
    elif how == "stale":
        content = bytearray(before.replace(b"7", b"6", 1))
    path.unlink()
    if how != "delete":
        path.write_bytes(bytes(content))
    return how == "delete" or bytes(content) != before


def outcome(run_dir: Path, damaged: Path, reference: tuple[str, ...]) -> str:
    """Open and replay a damaged run: 'named', or 'unread' when it ends with the same chain, else fail."""
    name = "journal" if damaged.parent.name == "journal" else damaged.name
    try:
        assert tuple(record.sha256 for record in read_rounds(str(run_dir))) == reference
        for index in range(len(reference)):
            replay_train(run_dir, index)
    except ArtifactError as error:
        return "named" if name in str(error) else pytest.fail(f"{damaged}: {error}")
    assert tuple(record.sha256 for record in read_rounds(str(run_dir))) == reference
    return "unread"


def replay_train(run_dir: Path, index: int) -> None:
    """Ask for the stages again, as a resumed run does."""
    store = RunStore.claim(_storage(run_dir), IDENTITY)
    pool = store.stage("pool", {"size": 3}, build_pool)
    pool.path("part/0.bin")
    marks = {"round": index, "pool": pool.fingerprint}
    store.stage("train", marks, lambda folder: pytest.fail("a finished stage was built again"))


def campaign(whole: Path, folder: Path, num_trials: int, seed: int) -> dict[str, int]:
    generator = np.random.default_rng(seed)
    reference = tuple(record.sha256 for record in read_rounds(str(whole)))
    counts: dict[str, int] = defaultdict(int)
    for kind, files in kinds(whole).items():
        for trial in range(num_trials):
            run_dir = folder / f"{kind}-{trial}"
            shutil.copytree(whole, run_dir, copy_function=shutil.copyfile)
            path = run_dir / files[int(generator.integers(len(files)))].relative_to(whole)
            how = DAMAGES[trial % len(DAMAGES)]
            if damage(path, how, files, generator):
                counts[f"{kind} {outcome_of(run_dir, path, reference, how)}"] += 1
            shutil.rmtree(run_dir)
    return counts


def outcome_of(run_dir: Path, path: Path, reference: tuple[str, ...], how: str) -> str:
    if how == "delete" and path.parent.name == "stages":
        # A stage record that is gone is a stage that never finished: it is built again, to the same chain.
        store = RunStore.claim(_storage(run_dir), IDENTITY)
        store.stage("pool", {"size": 3}, build_pool)
        assert tuple(record.sha256 for record in store.rounds()) == reference
        return "built again"
    return outcome(run_dir, path, reference)


def test_every_damage_is_named_or_harmless(whole: Path, tmp_path: Path) -> None:
    counts = campaign(whole, tmp_path, num_trials=42, seed=11)
    assert {name.split()[0] for name in counts} == {"journal", "objects", "rounds", "run.json", "stages"}
    assert sum(number for name, number in counts.items() if name.endswith("named")) > 120
    assert "stages unread" not in counts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_damages_of_each_kind(whole: Path, tmp_path: Path) -> None:
    print(dict(campaign(whole, tmp_path, num_trials=1000, seed=12)))
