"""Damage the files of a source and read it: a scene that keeps every rule, or one refusal; nothing else."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.scenes import safe_pickle
from autoscale_ray.scenes.gates import gate
from autoscale_ray.scenes.pickle_child import answer
from autoscale_ray.scenes.readers import READERS
from autoscale_ray.scenes.schema import check_schema
from autoscale_ray.scenes.trust import read_member
from autoscale_ray.scenes.windows import WindowOptions, cut_windows
from scenes.reader_files import Files

MAX_CASE_S = 5.0
MAY_BE_NAN = ("lane_speed_limit_mps", "route_speed_limit_mps", "expert_quality")
_TOKENS = (
    b"nan",
    b"inf",
    b"-1",
    b"0",
    b"1e400",
    b"1e18",
    b"-9223372036854775809",
    b"",
    b"x",
    b"\x00",
    b"1e-300",
    b"NaN,,",
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")


def damaged(files: Files, generator: np.random.Generator) -> Files:
    """Return the files with one to four damages in one of them."""
    name = list(files)[int(generator.integers(len(files)))]
    content = bytearray(files[name])
    for _ in range(int(generator.integers(1, 5))):
        if not content:
            break
        place = int(generator.integers(len(content)))
        length = int(generator.integers(1, 80))
        match int(generator.integers(8)):
            case 0:
                content[place] ^= 1 << int(generator.integers(8))
            case 1:
                content[place] = int(generator.integers(256))
            case 2:
                content = content[:place]
            case 3:
                del content[place : place + length]
            case 4:
                content[place:place] = content[max(0, place - length) : place]
            case 5:
                content = content[place:] + content[:place]
            case 6:
                lines = bytes(content).split(b"\n")
                generator.shuffle(lines)
                content = bytearray(b"\n".join(lines))
            case 7:
                numbers = list(_NUMBER.finditer(content))
                if numbers:
                    found = numbers[int(generator.integers(len(numbers)))]
                    content[found.start() : found.end()] = _TOKENS[int(generator.integers(len(_TOKENS)))]
    return {**files, name: bytes(content)}


def read_pickle(path: Path, unit: str) -> object:
    """Read a pickle in this process as its child would: fuzzing 10^4 files needs no 10^4 processes."""
    reply = answer(read_member(path, unit))
    if reply[:1] != b"+":
        raise InvalidInputError(unit, "pickle must hold plain values only")
    return safe_pickle._decoded(reply[1:])


def read_source(format: str, folder: Path) -> Counter[str]:
    """Read every unit of a source; return how many were refused and how many scenes were kept and quarantined."""
    counts: Counter[str] = Counter(refused=0, kept=0, quarantined=0)
    reader = READERS[format]
    try:
        units = reader.units(folder)
    except InvalidInputError:
        return Counter(refused=1, kept=0, quarantined=0)
    for unit in units:
        try:
            for good, bad in _gated(format, folder, unit):
                counts["kept"] += len(good)
                counts["quarantined"] += len(bad)
        except InvalidInputError as error:
            if "\n" in str(error):
                raise RuntimeError("a refusal is one line") from error
            counts["refused"] += 1
    return counts


def _gated(format: str, folder: Path, unit: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    reader = READERS[format]
    for recording in reader.read(folder, unit):
        if reader.fingerprints is not None:
            reader.fingerprints(recording.tracks)
        for table in cut_windows(recording, "real", WindowOptions()):
            good, bad = gate(table, unit)
            _check(good)
            yield good, bad


def _check(table: pa.Table) -> None:
    """Assert what every accepted scene keeps: the schema, finite numbers, growing times, ids of its own."""
    check_schema(table.schema, "scenes")
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_floating(kind) and field.name not in MAY_BE_NAN:
            values = table[field.name].combine_chunks()
            values = values.flatten() if pa.types.is_list(field.type) else values
            assert np.isfinite(values.to_numpy(zero_copy_only=False)).all(), field.name
    assert len(set(table["scene_id"].to_pylist())) == len(table)
    for times in table["ego_times_us"].to_pylist():
        assert (np.diff(times) > 0).all()


def timed_case(format: str, folder: Path) -> tuple[Counter[str], float]:
    """Read a source; return its counts and the CPU seconds it took, at most `MAX_CASE_S`."""
    begin = time.process_time()
    counts = read_source(format, folder)
    took_s = time.process_time() - begin
    assert took_s < MAX_CASE_S, f"{took_s:.1f} s"
    return counts, took_s
