"""Score a file of trajectories against NAVSIM's metric caches: what `autoscale score --metric-cache` does.

Shape legend: F scored scenes, P trajectories per scene, T = 41.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.aggregate import (
    EXTENDED_COMFORT,
    StageFrames,
    TwoStageScores,
    aggregate_one_stage,
    aggregate_two_stage,
)
from autoscale_ray.evaluation.combine import COLUMNS_V1, COLUMNS_V2
from autoscale_ray.evaluation.epdms import MAX_INTERVAL_S, two_frame_extended_comfort, with_extended_comfort
from autoscale_ray.evaluation.from_metric_cache import prepared_from_cache
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.score_file import (
    SCORERS,
    check_waypoints,
    read_trajectories,
    refused_rows,
    result_row,
    score_schema,
)
from autoscale_ray.evaluation.scoring import Metric, ScoreResult
from autoscale_ray.files import in_one_step
from autoscale_ray.scenes.readers.metric_cache import (
    MetricCache,
    cache_names,
    open_reader,
    read_metric_cache,
)
from autoscale_ray.scenes.safe_pickle import PickleReader
from autoscale_ray.scenes.trust import read_yaml

MAPPING_KEY = "reactive_all_mapping"
SCORE_WITH_COMFORT = "score_with_comfort"
MAX_REASONS = 20
_MAX_MAPPING_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheScore:
    """The trajectories of one scene, scored."""

    token: str
    log_name: str
    is_synthetic: bool
    start_us: int
    start_point: Floats
    """(2,) rear axle at 0 s, map."""
    endpoint: Floats
    """(2,) last pose of the first trajectory as the planner gave it, map."""
    result: ScoreResult


def score_cache_file(
    trajectories: Path,
    caches: Path,
    out: Path,
    two_stage: Path | None = None,
    backend: str = "auto",
    num_processes: int = 1,
) -> dict[str, object]:
    """Score every trajectory by the version of the score that the caches were made for.

    A cache that is refused is reported for its trajectories, and the rest is scored.

    Args:
        trajectories: npz, Parquet or submission pickle; scene_id is the token.
        caches: Folder, zip archive or one file.
        out: Parquet file; see `write_scores`.
        two_stage: Split YAML of NAVSIM whose mapping gives the two-stage score; see `score_two_stages`.
        backend: "auto", "torch" or "numba".
        num_processes: Caches read side by side.

    Returns:
        See `write_scores`.

    Raises:
        InvalidInputError: The trajectories, the folder or the mapping break a rule.
    """
    wanted = read_trajectories(trajectories)
    mapping = None if two_stage is None else read_mapping(two_stage)
    return write_scores(wanted, *score_caches(wanted, caches, backend, num_processes), out, mapping)


def write_scores(
    wanted: Mapping[str, np.ndarray],
    scored: Sequence[CacheScore],
    reasons: Mapping[str, str],
    out: Path,
    mapping: Sequence[tuple[str, str, str, str]] | None = None,
) -> dict[str, object]:
    """Write the scores of scenes as a table, and a summary beside it as JSON.

    A v2 scene whose log has another scene at most 0.55 s earlier gets extended comfort against it, where each has one
    trajectory.

    Args:
        wanted: Relative waypoints by token; see `read_trajectories`.
        scored: Scenes that could be scored.
        reasons: By token, why the others could not.
        out: Parquet file: version, then the columns of `score_file`, then two_frame_extended_comfort and
            score_with_comfort.
        mapping: Result of `read_mapping`, or None.

    Returns:
        Numbers of rows ``scored`` and ``invalid``, means by version, and the two-stage score where asked for.
    """
    scored = with_previous_frames(scored)
    rows = [row for frame in scored for row in _rows(frame)]
    summary: dict[str, object] = {"scored": len(rows)}
    for token, reason in reasons.items():
        rows += refused_rows(token, len(wanted[token]), reason)
    summary |= {"invalid": len(rows) - int(str(summary["scored"])), **_means(scored)}
    if reasons:
        summary["reasons"] = dict(itertools.islice(reasons.items(), MAX_REASONS))
    with in_one_step(out) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=cache_schema()), temporary, compression="zstd")
    if mapping is not None:  # may be refused; the scores above are kept then
        summary["two_stage"] = two_stage_summary(scored, mapping)
    with in_one_step(out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def score_caches(
    wanted: Mapping[str, np.ndarray], path: Path, backend: str = "auto", num_processes: int = 1
) -> tuple[list[CacheScore], dict[str, str]]:
    """Score trajectories by token; each reading process holds one cache at a time.

    Args:
        wanted: Relative waypoints by token; see `read_trajectories`.
        path: Where the caches are.
        backend: "auto", "torch" or "numba".
        num_processes: Caches read side by side, >= 1; reading costs far more than scoring.

    Returns:
        What was scored, and reasons by token for the rest.

    Raises:
        InvalidInputError: No caches at all.
    """
    names = cache_names(path)
    reasons = {
        token: f"{token}: trajectory: must have a metric cache" for token in wanted if token not in names
    }
    readers: SimpleQueue[PickleReader] = SimpleQueue()

    def read_and_score(token: str) -> CacheScore | str:
        reader = readers.get()
        try:
            cache = read_metric_cache(reader, path, names[token], token)
            return score_cache(cache, check_waypoints(token, wanted[token]), backend)
        except InvalidInputError as error:
            return str(error)
        finally:
            readers.put(reader)

    present = [token for token in wanted if token in names]
    with ExitStack() as stack:
        for _ in range(max(1, num_processes)):
            readers.put(stack.enter_context(open_reader()))
        threads = stack.enter_context(ThreadPoolExecutor(max(1, num_processes)))
        found = list(threads.map(read_and_score, present))
    reasons |= {token: item for token, item in zip(present, found, strict=True) if isinstance(item, str)}
    return [item for item in found if isinstance(item, CacheScore)], reasons


def score_cache(cache: MetricCache, waypoints: Floats, backend: str = "auto") -> CacheScore:
    """Score (P, 8 or 40, 3) trajectories in one scene.

    Raises:
        InvalidSceneError: The trajectories break a rule.
    """
    prepared = prepared_from_cache(cache, backend)
    result = SCORERS[cache.version](
        [prepared], np.asarray(waypoints)[None], backend=backend, keep_states=True
    )
    result = slimmed(result)
    return CacheScore(
        token=cache.token,
        log_name=cache.log_name,
        is_synthetic=cache.is_synthetic,
        start_us=cache.start_us,
        start_point=cache.ego_state[:2],
        endpoint=endpoint(cache.ego_state[:3], waypoints),
        result=result,
    )


def slimmed(result: ScoreResult) -> ScoreResult:
    """Return a result that keeps drive and measures of the first trajectory alone, for they fill the memory."""
    assert result.states is not None
    return replace(result, states=result.states[:, :1].clone(), measures=result.measures.select(slice(0, 1)))


def endpoint(pose: Floats, waypoints: Floats) -> Floats:
    """Return the last position (2,) of the first of (P, n, 3) relative trajectories, from a pose x, y, yaw."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    return pose[:2] + np.array([[cos, -sin], [sin, cos]]) @ np.asarray(waypoints)[0, -1, :2]


def with_previous_frames(scored: Sequence[CacheScore]) -> list[CacheScore]:
    """Add extended comfort to v2 scenes with one trajectory whose log has an earlier one close by.

    As the official one-stage score does: original scenes only, the scene before in time, less than 0.55 s earlier.
    """
    order = sorted(
        (frame for frame in scored if frame.result.version == "v2" and not frame.is_synthetic),
        key=lambda frame: (frame.log_name, frame.start_us),
    )
    pairs = [
        (before, now)
        for before, now in itertools.pairwise(order)
        if before.log_name == now.log_name
        and 0 < now.start_us - before.start_us < MAX_INTERVAL_S * 1e6
        and len(before.result.score.value[0]) == len(now.result.score.value[0]) == 1
    ]
    if not pairs:
        return list(scored)
    states = [torch.cat([_states(frame) for frame in side]) for side in zip(*pairs, strict=True)]
    interval_s = np.array([(now.start_us - before.start_us) * 1e-6 for before, now in pairs])
    comfort = two_frame_extended_comfort(states[1], states[0], interval_s)
    found = {
        now.token: with_extended_comfort(now.result, Metric(value.view(1, 1), valid.view(1, 1)))
        for (_, now), value, valid in zip(pairs, comfort.value, comfort.valid, strict=True)
    }
    return [replace(frame, result=found.get(frame.token, frame.result)) for frame in scored]


def read_mapping(path: Path) -> list[tuple[str, str, str, str]]:
    """Read the mapping of a two-stage split: tokens of stage one now and before, synthetic now and before.

    Args:
        path: YAML with `reactive_all_mapping`: a list of [now, before, [[synthetic now, synthetic before], ...]].

    Raises:
        InvalidInputError: Not such a file.
    """
    values = read_yaml(path, _MAX_MAPPING_BYTES)
    groups = values.get(MAPPING_KEY) if isinstance(values, dict) else None
    rule = f"{MAPPING_KEY} must list [token, token, [[token, token], ...]]"
    if not isinstance(groups, list) or not groups:
        raise InvalidInputError(str(path), rule)
    found = []
    for group in groups:
        if not (isinstance(group, list) and len(group) == 3 and isinstance(group[2], list) and group[2]):
            raise InvalidInputError(str(path), rule, group)
        for pair in group[2]:
            row = [*group[:2], *pair] if isinstance(pair, list) else []
            if len(row) != 4 or not all(isinstance(token, str) for token in row):
                raise InvalidInputError(str(path), rule, pair)
            found.append((row[0], row[1], row[2], row[3]))
    return found


def score_two_stages(
    scored: Sequence[CacheScore], mapping: Sequence[tuple[str, str, str, str]]
) -> tuple[TwoStageScores, int, int]:
    """Aggregate navhard's two stages over the mappings whose scenes are all scored.

    Args:
        scored: v2 scenes; of each the first trajectory counts.
        mapping: Result of `read_mapping`.

    Returns:
        The aggregate, how many mappings it covers, and how many lack a scene and are left out.

    Raises:
        InvalidInputError: No mapping is complete, or paired scenes are not within 0.55 s.
    """
    frames = [frame for frame in scored if frame.result.version == "v2"]
    number = {frame.token: place for place, frame in enumerate(frames)}
    groups: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {}
    for row in mapping:
        groups.setdefault(row[:2], []).append(row)
    whole = [rows for rows in groups.values() if all(token in number for row in rows for token in row)]
    if not whole:
        raise InvalidInputError("two-stage mapping", "must have a mapping whose scenes are all scored")
    used = sorted({number[token] for rows in whole for row in rows for token in row})
    place = {frames[index].token: row for row, index in enumerate(used)}
    indices = np.array([[place[token] for token in row] for rows in whole for row in rows])
    scores = aggregate_two_stage(_stage_frames([frames[index] for index in used]), indices)
    return scores, len(whole), len(groups) - len(whole)


def two_stage_summary(
    scored: Sequence[CacheScore], mapping: Sequence[tuple[str, str, str, str]]
) -> dict[str, object]:
    """Return the two-stage score as plain numbers; see `score_two_stages`."""
    scores, used, left_out = score_two_stages(scored, mapping)
    return {
        "mappings": used,
        "mappings_left_out": left_out,
        "combined": scores.combined,
        "stage_one": scores.stage_one,
        "stage_two": scores.stage_two,
    }


def cache_schema() -> pa.Schema:
    """Return the columns of the table that `score_cache_file` writes: those of both versions."""
    fields = {field.name: field for version in SCORERS for field in score_schema(version)}
    last = [fields.pop(name) for name in ("raw_score", "score")]
    added = [pa.field(name, pa.float64()) for name in (EXTENDED_COMFORT, SCORE_WITH_COMFORT)]
    return pa.schema([pa.field("version", pa.string()), *fields.values(), *last, *added])


def _rows(frame: CacheScore) -> list[dict[str, object]]:
    result, rows = frame.result, []
    for index in range(len(result.score.value[0])):
        row = {"version": result.version, **result_row(frame.token, index, result)}
        row[SCORE_WITH_COMFORT] = float(result.score_with_comfort.value[0, index])
        if bool(result.extended_comfort.valid[0, index]):
            row[EXTENDED_COMFORT] = float(result.extended_comfort.value[0, index])
        rows.append(row)
    return rows


def _means(scored: Sequence[CacheScore]) -> dict[str, dict[str, float]]:
    """Return the mean of every column over all trajectories, by version."""
    means = {}
    for version, names in (("v1", COLUMNS_V1), ("v2", COLUMNS_V2)):
        results = [frame.result for frame in scored if frame.result.version == version]
        if results:
            columns = {name: _column([result.filtered[name] for result in results]) for name in names}
            columns["score"] = _column([result.score_with_comfort for result in results])
            means[f"mean_{version}"] = aggregate_one_stage(columns)
    return means


def _column(metrics: Sequence[Metric]) -> Floats:
    return torch.cat([metric.value.flatten() for metric in metrics]).numpy()


def _states(frame: CacheScore) -> torch.Tensor:
    assert frame.result.states is not None
    return frame.result.states[:, 0]


def _stage_frames(frames: Sequence[CacheScore]) -> StageFrames:
    return StageFrames(
        columns={
            name: np.array([float(frame.result.filtered[name].value[0, 0]) for frame in frames])
            for name in COLUMNS_V2
        },
        start_times_s=np.array([frame.start_us * 1e-6 for frame in frames]),
        endpoints=np.stack([frame.endpoint for frame in frames]),
        start_points=np.stack([frame.start_point for frame in frames]),
        states=torch.cat([_states(frame) for frame in frames]),
    )
