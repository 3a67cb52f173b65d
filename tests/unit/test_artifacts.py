"""Stages, rounds and identities of a run, on a real folder."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.artifacts import RunStore, StaleWriterError
from autoscale_ray.canonical import canonical_json, fingerprint, first_difference, seal, unseal
from autoscale_ray.errors import ArtifactError, InvalidInputError
from autoscale_ray.journal import read_rounds

IDENTITY = {"seed": 1, "planner": {"num_steps": 800, "modes": [1, 2]}}
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4).filter(str.isascii), inner)
    ),
    max_leaves=8,
)


@dataclasses.dataclass(frozen=True)
class Choice:
    rate: float
    names: tuple[str, ...]


def write_two(folder: Path) -> dict[str, float]:
    (folder / "seed0").mkdir()
    (folder / "seed0" / "weights.bin").write_bytes(b"\x01" * 1000)
    (folder / "table.txt").write_text("a,b\n")
    return {"loss": 0.1}


def open_run(path: Path) -> RunStore:
    return RunStore.open(str(path / "run"), IDENTITY)


def test_stage_is_built_once_and_returned_with_its_files(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> dict[str, float]:
        built.append(folder)
        return write_two(folder)

    first = open_run(tmp_path).stage("train", {"round": 0}, build)
    again = open_run(tmp_path).stage("train", {"round": 0}, build)
    assert len(built) == 1
    assert not built[0].exists()
    assert first == again
    assert again.values == {"loss": 0.1}
    assert again.path("table.txt").read_text() == "a,b\n"
    assert (again.folder() / "seed0" / "weights.bin").read_bytes() == b"\x01" * 1000
    assert sorted(path.name for path in again.folder().iterdir()) == ["seed0", "table.txt"]


def test_another_identity_is_another_stage(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    one, two = (run.stage("train", {"round": number}, lambda folder, n=number: {"n": n}) for number in (1, 2))
    assert (one.values, two.values) == ({"n": 1}, {"n": 2})


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    def fail(folder: Path) -> dict[str, float]:
        write_two(folder)
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        run.stage("train", {}, fail)
    assert not list((tmp_path / "run").glob("stages/*"))
    assert not list((tmp_path / "run").glob("scratch/*"))
    assert run.stage("train", {}, write_two).values == {"loss": 0.1}


def test_opening_another_run_names_the_first_difference(tmp_path: Path) -> None:
    open_run(tmp_path)
    other = {"seed": 1, "planner": {"num_steps": 900, "modes": [1, 2]}}
    with pytest.raises(
        ArtifactError, match=r"run\.json: belongs to another run: planner.num_steps is 800 there and 900"
    ):
        RunStore.open(str(tmp_path / "run"), other)


def test_rounds_form_a_chain_that_readers_see(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    records = [run.commit_round(index, {"score": index / 3}) for index in range(3)]
    assert read_rounds(str(tmp_path / "run")) == tuple(records) == run.rounds()
    assert [record.previous for record in records] == [
        fingerprint(IDENTITY),
        *(r.sha256 for r in records[:2]),
    ]
    assert open_run(tmp_path).rounds() == tuple(records)


def test_a_round_is_published_once(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    record = run.commit_round(0, {"score": 1.0})
    assert run.commit_round(0, {"score": 1.0}) == record
    with pytest.raises(
        ArtifactError, match=r"00000\.json: was published with another content: score was 1.0, is 2.0"
    ):
        run.commit_round(0, {"score": 2.0})
    with pytest.raises(ArtifactError, match="the next round is 1"):
        run.commit_round(2, {})
    assert len(run.rounds()) == 1


def test_a_manifest_is_the_payload_after_the_round_before(tmp_path: Path) -> None:
    open_run(tmp_path).commit_round(0, {"score": 0.5, "counts": {"b": 2, "a": 1}})
    held = (tmp_path / "run" / "rounds" / "00000.json").read_text()
    payload = '"payload":{"counts":{"a":1,"b":2},"score":0.5}'
    assert held == f'{{"index":0,{payload},"previous":"{fingerprint(IDENTITY)}"}}\n'


def test_a_stage_without_files_has_no_folder(tmp_path: Path) -> None:
    stage = open_run(tmp_path).stage("train", {}, lambda folder: {"loss": 0.1})
    with pytest.raises(ArtifactError, match="stage train: has no files"):
        stage.folder()


def test_nothing_that_changes_between_runs_enters_records_or_manifests(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = RunStore.open(str(tmp_path / name), IDENTITY)
        run.commit_round(0, {"stage": run.stage("train", {}, write_two).fingerprint})
        run.log("note", text="at another time")

    def bytes_of(name: str, folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name / folder).iterdir()}

    for folder in ("stages", "rounds"):
        assert bytes_of("one", folder) == bytes_of("two", folder)


def test_events_are_lines_of_json_with_a_clock(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.log("round", index=1, seconds=0.5)
    lines = (tmp_path / "run" / "events" / "000001.jsonl").read_text().splitlines()
    event = json.loads(lines[-1])
    assert (event["event"], event["index"], event["seconds"]) == ("round", 1, 0.5)
    assert event["time_s"] > 1.7e9


def test_a_full_disk_under_the_log_ends_nothing_and_loses_no_line(tmp_path: Path) -> None:
    run, log = open_run(tmp_path), tmp_path / "run" / "events" / "000001.jsonl"
    run.log("first")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 70, before[1]))  # one line and a half
        for _ in range(3):
            run.log("waits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.log("last")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    gap = events[2]
    assert [event["event"] for event in events] == ["first", "waits", "log_failed", "waits", "waits", "last"]
    assert (gap["times"], gap["lines_lost"], "File too large" in gap["reason"]) == (2, 0, True)


def test_opening_sweeps_what_dead_writers_left(tmp_path: Path) -> None:
    open_run(tmp_path)
    for folder in ("tmp", "scratch/dead-0", "views/.draft-1"):
        (tmp_path / "run" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / folder / "dead-1").write_text("half")
    open_run(tmp_path)
    assert [list((tmp_path / "run" / folder).iterdir()) for folder in ("tmp", "scratch", "views")] == [
        [],
        [],
        [],
    ]


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("ftp://host/run", "a run directory is a local path or one of s3, gs, az"),
        ("{file}", "must be a folder"),
    ],
)
def test_bad_run_directories_give_one_line(run_dir: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=message) as caught:
        RunStore.open(run_dir.format(file=tmp_path / "file"), IDENTITY)
    assert "\n" not in str(caught.value)


def test_reading_where_no_run_is(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such run"):
        read_rounds(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["", "Train", "a/b", "..", "a b"])
def test_bad_stage_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="stage name"):
        open_run(tmp_path).stage(name, {}, write_two)


def test_errors_cross_process_boundaries() -> None:
    error = StaleWriterError("journal/000001.json", "writer 1 was superseded by writer 2")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (StaleWriterError, str(error))


def test_fingerprints_do_not_depend_on_order_or_container() -> None:
    choice = Choice(rate=0.1, names=("a", "b"))
    assert fingerprint(choice) == fingerprint({"names": ["a", "b"], "rate": 0.1})
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("changed", [{"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"b": 1}, {"a": [1]}])
def test_fingerprints_tell_values_apart(changed: object) -> None:
    assert fingerprint(changed) != fingerprint({"a": 1})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": float("nan")}}, r"value\.a\.b: must be a finite number"),
        ({"a": [1, {2}]}, r"value\.a\[1\]: a set has no stable form"),
        ({"a": np.float64(1.0)}, "a float64 has no stable form"),
        ({1: "a"}, "keys must be strings"),
        (Path("x"), "a PosixPath has no stable form"),
        (b"bytes", "a bytes has no stable form"),
    ],
)
def test_values_without_a_stable_form_are_refused(value: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        fingerprint(value)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(body=st.dictionaries(st.text(max_size=4).filter(str.isascii), PLAIN, max_size=4))
def test_sealed_files_come_back_and_canonical_text_is_stable(body: dict) -> None:
    assert canonical_json(unseal("file", seal(body))) == canonical_json(body)
    assert canonical_json(json.loads(canonical_json(body))) == canonical_json(body)
    assert first_difference(body, json.loads(canonical_json(body))) is None


@settings(derandomize=True, max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_sealed_file_is_noticed(position: int, bit: int) -> None:
    data = bytearray(seal({"loss": 0.25, "names": ["a", "ü"], "none": None}))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(ArtifactError, match="file: is damaged"):
        unseal("file", bytes(data))
