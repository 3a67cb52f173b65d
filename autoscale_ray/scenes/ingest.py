"""Make a pool of a source: read its units, cut windows, gate them, and account for every scene.

The work is done in parts (some units each). A finished part is a pair of files in a staging folder beside the
pool, so an interrupted ingest goes on where it stopped, and the result does not depend on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from autoscale_ray import __version__
from autoscale_ray.errors import InputRejectedError, InvalidInputError, SourceReadError
from autoscale_ray.scenes.gates import QUARANTINE_SCHEMA, gate
from autoscale_ray.scenes.manifest import PoolManifest
from autoscale_ray.scenes.motion_fingerprint import shared_groups
from autoscale_ray.scenes.parquet import open_parquet, read_parquet
from autoscale_ray.scenes.pool_writer import PoolWriter, check_unused
from autoscale_ray.scenes.readers import READERS
from autoscale_ray.scenes.readers.reader import Reader, SceneTables, bound_reader
from autoscale_ray.scenes.schema import DOMAINS, SCENE_SCHEMA
from autoscale_ray.scenes.windows import WindowOptions, cut_windows

UNITS_PER_PART = 8
READER_FAULT = "the reader must not fail on any file (a fault of this package: please report it)"
"""Rule of the quarantine row of a file whose reader raised something else than a refusal."""
_PRINTS_SCHEMA = pa.schema([("log_id", pa.string()), ("prints", pa.list_(pa.uint64()))])


@dataclass(frozen=True, kw_only=True, slots=True)
class PartJob:
    """Units that one process reads in one go; plain values, so that it travels anywhere."""

    format: str
    path: str
    units: tuple[str, ...]
    domain: str
    options: WindowOptions
    staging: str
    signature: str
    """Size and time of the source files and of what stands beside them, so that a changed source is read again."""
    files: tuple[tuple[str, str], ...] = ()
    """Names and paths of files beside the source, see `Reader.with_files`."""

    @property
    def stem(self) -> str:
        """Return the file stem of the finished part: the same job of the same release gives the same stem."""
        source = [__version__, self.format, self.path, self.units, self.files, self.signature]
        identity = json.dumps([*source, self.domain, asdict(self.options)])
        return hashlib.sha256(identity.encode()).hexdigest()[:24]


def ingest(
    format: str,
    path: Path | str,
    out: Path | str,
    domain: str,
    *,
    options: WindowOptions | None = None,
    files: Mapping[str, Path | str] | None = None,
    known_groups: Mapping[str, str] | None = None,
    num_processes: int = 1,
    max_quarantined_share: float = 1.0,
    run_parts: Callable[[Sequence[PartJob]], Iterable[object]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PoolManifest:
    """Read a source into a new pool; what was refused stands in its quarantine table.

    Args:
        format: Key of `READERS`.
        path: File, folder or archive, as the format says.
        out: Folder of the new pool; must not exist, or be empty.
        domain: ``real`` or ``synthetic``.
        options: How windows are cut.
        files: Files beside the source by name, where the format uses some (``maps``, ``filter``).
        known_groups: Group of recordings by file name; recordings of one group get one log_id. It adds to
            what shared motion tells, for links that run through files which are not at hand.
        num_processes: Parts read side by side on this machine, >= 1.
        max_quarantined_share: More than this share of quarantined scenes and refused files, 0 to 1, is no pool.
        run_parts: Calls `run_part` on every job, elsewhere than in processes of this machine, and yields once
            for each finished one; the pool does not depend on it.
        progress: Called with the number of finished and of all parts.

    Returns:
        The manifest of the pool.

    Raises:
        InvalidInputError: Unknown format or domain, a share that is none, or nothing to read.
        PoolError: The folder is in use.
        InputRejectedError: Too much was quarantined; what is finished is kept, the same call with a larger share
            makes the pool of it.
        SourceReadError: The storage failed; what is finished is kept, the same call goes on there.
    """
    if num_processes < 1:
        raise InvalidInputError("num_processes", "must be >= 1", num_processes)
    if not 0 <= max_quarantined_share <= 1:
        raise InvalidInputError("max_quarantined_share", "must be in [0, 1]", max_quarantined_share)
    jobs = plan_parts(format, path, out, domain, options, files)
    staging = Path(jobs[0].staging)
    staging.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not _finished(job)]
    finished = run_parts(missing) if run_parts is not None else _run_all(missing, num_processes)
    for done, _ in enumerate(finished, start=1 + len(jobs) - len(missing)):
        if progress is not None:
            progress(done, len(jobs))
    _check_quarantined(jobs, max_quarantined_share)
    manifest = merge_parts(jobs, out, known_groups)
    shutil.rmtree(staging)
    return manifest


def plan_parts(
    format: str,
    path: Path | str,
    out: Path | str,
    domain: str,
    options: WindowOptions | None = None,
    files: Mapping[str, Path | str] | None = None,
) -> list[PartJob]:
    """Return the jobs of an ingest, in pool order; see `ingest` for the arguments and errors."""
    if format not in READERS:
        raise InvalidInputError("format", f"must be one of {', '.join(READERS)}", format)
    if domain not in DOMAINS:
        raise InvalidInputError("domain", f"must be {' or '.join(DOMAINS)}", domain)
    beside = tuple((name, str(file)) for name, file in (files or {}).items())
    target, reader = Path(out), _reader(format, beside)
    check_unused(target)
    names = reader.units(Path(path))
    if not names:
        raise InvalidInputError(str(path), f"holds nothing that the format {format} can read")
    staging = target.with_name(f".{target.name}.ingest")
    groups = [tuple(names[low : low + UNITS_PER_PART]) for low in range(0, len(names), UNITS_PER_PART)]
    others = " ".join([_others(Path(path), names), _signature(Path(), [file for _, file in beside])])
    return [
        PartJob(
            format=format,
            path=str(path),
            units=group,
            domain=domain,
            options=options or WindowOptions(),
            staging=str(staging),
            signature=f"{_signature(Path(path), group)} {others}",
            files=beside,
        )
        for group in groups
    ]


def _reader(format: str, files: Iterable[tuple[str, str]]) -> Reader:
    return bound_reader(READERS[format], format, {name: Path(file) for name, file in files})


def _signature(path: Path, units: Iterable[str]) -> str:
    """Return size and time of every file of some units; a unit may be a folder."""
    places = [path / unit for unit in units] if path.is_dir() else [path]
    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return " ".join(_size_and_time(file.stat()) for file in files if file.is_file())


def _others(path: Path, units: Iterable[str]) -> str:
    """Return a digest of the files in a source folder that are of no unit, such as a network or maps."""
    names, found, folders = set(units), [], [path] if path.is_dir() else []
    while folders:
        for entry in os.scandir(folders.pop()):
            name = os.path.relpath(entry.path, path)
            if name in names or entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(Path(entry.path))
            elif entry.is_file():
                found.append(f"{name} {_size_and_time(entry.stat())}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:24]


def _size_and_time(stat: os.stat_result) -> str:
    return f"{stat.st_size}@{stat.st_mtime_ns}"


def _run_all(jobs: Sequence[PartJob], num_processes: int) -> Iterator[object]:
    if num_processes <= 1 or len(jobs) <= 1:
        yield from map(run_part, jobs)
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_processes, mp_context=context) as executor:
            yield from executor.map(run_part, jobs)
    except BrokenProcessPool:
        raise SourceReadError(jobs[0].path, "a reading process was ended from outside (memory?)") from None


def run_part(job: PartJob) -> None:
    """Read the units of one job into its part files; a refused unit becomes a quarantine row."""
    stem = Path(job.staging) / job.stem
    scratch = stem.with_name(f"{stem.name}.{os.getpid()}-{secrets.token_hex(4)}")
    quarantined, prints = [QUARANTINE_SCHEMA.empty_table()], [_PRINTS_SCHEMA.empty_table()]
    with pq.ParquetWriter(f"{scratch}.scenes", SCENE_SCHEMA, compression="none") as writer:
        counts = [_read_unit(job, unit, writer, quarantined, prints) for unit in job.units]
    pq.write_table(pa.table({"unit": list(job.units), "num_scenes": counts}), f"{scratch}.units")
    pq.write_table(pa.concat_tables(quarantined), f"{scratch}.bad")
    pq.write_table(pa.concat_tables(prints), f"{scratch}.prints")
    # The scenes file comes last: a part counts as finished when it is there.
    for suffix in ("units", "bad", "prints", "scenes"):
        os.replace(f"{scratch}.{suffix}", f"{stem}.{suffix}")


def _read_unit(
    job: PartJob, unit: str, writer: pq.ParquetWriter, quarantined: list[pa.Table], prints: list[pa.Table]
) -> int:
    """Write the scenes of a unit that keep every rule; return their number."""
    reader, count = _reader(job.format, job.files), 0
    try:
        for table, left_out in _scenes(reader, job, unit, prints):
            good, bad = gate(table, unit) if len(table) else (table, left_out[:0])
            quarantined += [left_out, bad]
            if len(good):
                writer.write_table(good)
                count += len(good)
    except MemoryError:
        raise
    except Exception as error:
        # The one place that holds a fault of a reader: one file is lost, with a row that says so, and not the run.
        failed = isinstance(error, OSError) and error.errno is not None
        if failed or not Path(job.path).exists():
            problem = f"{error}; what is finished is kept, the same command goes on there"
            raise SourceReadError(f"{job.path}: {unit}", problem) from error
        refused = isinstance(error, InvalidInputError)
        quarantined.append(_refusal(unit, error) if refused else _fault(job.format, unit, error))
    return count


def _scenes(reader: Reader, job: PartJob, unit: str, prints: list[pa.Table]) -> SceneTables:
    """Yield the scenes of a unit before the gates, and what its reader refused."""
    if reader.read_scenes is not None:
        yield from reader.read_scenes(Path(job.path), unit, job.domain)
        return
    for recording in reader.read(Path(job.path), unit):
        if reader.fingerprints is not None:
            values = reader.fingerprints(recording.tracks)
            prints.append(pa.table([[recording.log_id], [values]], schema=_PRINTS_SCHEMA))
        for table in cut_windows(recording, job.domain, job.options):
            yield table, QUARANTINE_SCHEMA.empty_table()


def _fault(format: str, unit: str, error: Exception) -> pa.Table:
    """Return the quarantine row of a reader that failed, with the error and the innermost place of our code."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "autoscale_ray" in frame.filename
    ]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    value = f"{type(error).__name__} at {place}: {error}".replace("\n", " ")[:200]
    return pa.table([[unit], [f"reader {format}"], [READER_FAULT], [value]], schema=QUARANTINE_SCHEMA)


def num_reader_faults(pool: Path | str) -> int:
    """Return how many files of a pool's source were lost to a fault of their reader."""
    return sum(
        rule == READER_FAULT for rule in read_parquet(Path(pool) / "quarantine.parquet")["rule"].to_pylist()
    )


def _refusal(unit: str, error: InvalidInputError) -> pa.Table:
    """Return the quarantine row of an error whose place reads ``file: element``."""
    element = error.where.removeprefix(unit).lstrip(": ")
    value = "" if error.value is None else str(error.value)
    return pa.table([[unit], [element], [error.rule], [value[:200]]], schema=QUARANTINE_SCHEMA)


def _finished(job: PartJob) -> bool:
    return (Path(job.staging) / f"{job.stem}.scenes").exists()


def _check_quarantined(jobs: Sequence[PartJob], max_share: float) -> None:
    """Stop where a source is so bad that leaving its bad scenes out would hide it."""
    stems = [Path(job.staging) / job.stem for job in jobs]
    rules = Counter(rule for stem in stems for rule in _read_part(stem, "bad")["rule"].to_pylist())
    num_kept = sum(sum(_read_part(stem, "units")["num_scenes"].to_pylist()) for stem in stems)
    total = num_kept + rules.total()
    if rules.total() <= max_share * total:
        return
    (rule, count), *_ = rules.most_common(1)
    limit = f"at most {100.0 * max_share:g} % may be quarantined (most often, {count} times: {rule})"
    hint = "what is read is kept, the same command with a larger --max-quarantined-share goes on with it"
    raise InputRejectedError(jobs[0].path, f"{limit}; {hint}", f"{rules.total()} of {total}")


def merge_parts(
    jobs: Sequence[PartJob], out: Path | str, known_groups: Mapping[str, str] | None = None
) -> PoolManifest:
    """Publish finished parts as one pool, with the logs that shared motion tells.

    Args:
        jobs: All jobs of the ingest, finished.
        out: Folder of the new pool.
        known_groups: As in `ingest`.
    """
    stems = [Path(job.staging) / job.stem for job in jobs]
    groups = _log_groups(stems, known_groups or {})
    with PoolWriter(out) as writer:
        bad = [_read_part(stem, "bad") for stem in stems]
        for table, units in _part_tables(stems):
            twice = writer.repeated(table["scene_id"].to_pylist())
            if twice.any():
                bad.append(_duplicates(table.filter(pa.array(twice)), units[twice]))
                table = table.filter(pa.array(~twice)).combine_chunks()
            if len(table):
                writer.add(_with_logs(table, groups))
        writer.add_side_table("quarantine", pa.concat_tables(bad))
    return writer.manifest


def _duplicates(table: pa.Table, units: np.ndarray) -> pa.Table:
    """Return quarantine rows for scenes whose id an earlier one has: two files hold the same recording."""
    ids = table["scene_id"].to_pylist()
    rules = ["scene_id must be unique in a pool"] * len(ids)
    return pa.table([units.tolist(), ids, rules, [""] * len(ids)], schema=QUARANTINE_SCHEMA)


def _part_tables(stems: Iterable[Path]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield the scenes of finished parts in order, with the unit of each."""
    for stem in stems:
        # Both windows of a pair lie in one part, so a link can be checked against the part alone.
        ids = read_parquet(f"{stem}.scenes", ["scene_id"])["scene_id"].combine_chunks()
        parts = _read_part(stem, "units")
        units = np.repeat(np.array(parts["unit"].to_pylist(), dtype=object), parts["num_scenes"].to_numpy())
        start = 0
        with open_parquet(f"{stem}.scenes") as file:
            for batch in file.iter_batches(batch_size=1024):
                table = pa.Table.from_batches([batch]).cast(SCENE_SCHEMA)
                yield _linked(table, ids), units[start : start + len(table)]
                start += len(table)


def _read_part(stem: Path, suffix: str) -> pa.Table:
    return read_parquet(f"{stem}.{suffix}")


def _linked(table: pa.Table, ids: pa.Array) -> pa.Table:
    """Drop links to earlier windows that are not in the pool."""
    links = table["prev_scene_id"]
    return _replaced(
        table,
        "prev_scene_id",
        pc.if_else(pc.is_in(links, ids), links, pa.scalar(None, pa.string())),  # pyright: ignore[reportAttributeAccessIssue]
    )


def _log_groups(stems: Iterable[Path], known: Mapping[str, str]) -> dict[str, str]:
    prints: dict[str, list[np.ndarray]] = {}
    for stem in stems:
        table = _read_part(stem, "prints")
        for row, log_id in enumerate(table["log_id"].to_pylist()):
            prints.setdefault(log_id, []).append(table["prints"][row].values.to_numpy())
    groups = {Path(name).stem: group for name, group in known.items()}
    known_logs = {log: groups[log.rsplit("/", 1)[-1]] for log in prints if log.rsplit("/", 1)[-1] in groups}
    return shared_groups({log: np.unique(np.concatenate(parts)) for log, parts in prints.items()}, known_logs)


def _with_logs(table: pa.Table, groups: dict[str, str]) -> pa.Table:
    logs = [groups.get(log, log) for log in table["log_id"].to_pylist()]
    return _replaced(table, "log_id", pa.array(logs, type=pa.string()))


def _replaced(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    position = table.schema.get_field_index(name)
    return table.set_column(position, table.schema.field(position), values)
