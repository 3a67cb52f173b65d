"""The table that `autoscale score` writes, and the summary beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autoscale_ray.evaluation.aggregate import EXTENDED_COMFORT, aggregate_one_stage
from autoscale_ray.evaluation.combine import COLUMNS_V1, COLUMNS_V2
from autoscale_ray.evaluation.scene_score import SCORE_WITH_COMFORT, SceneScore, Unscored
from autoscale_ray.evaluation.scoring import TRAFFIC
from autoscale_ray.evaluation.two_stages import two_stage_summary
from autoscale_ray.files import in_one_step

MAX_REASONS = 20


def write_scores(
    wanted: Mapping[str, np.ndarray],
    scored: Sequence[SceneScore],
    unscored: Sequence[Unscored],
    out: Path,
    mapping: Sequence[tuple[str, str, str, str]] | None = None,
) -> dict[str, Any]:
    """Write the scores of scenes as a table, and a summary beside it as JSON.

    Args:
        wanted: Relative waypoints by token; see `read_trajectories`.
        scored: Scenes that could be scored, with extended comfort where it is known.
        unscored: The others.
        out: Parquet file; see `score_schema`.
        mapping: Result of `read_mapping`, or None.

    Returns:
        Numbers of rows ``scored`` and ``invalid``, means by version, the first reasons, and the two-stage score where
        asked for.
    """
    rows = [row for frame in scored for row in _rows(frame)]
    refused = [row for item in unscored for row in _refused_rows(item, len(wanted[item.token]))]
    summary: dict[str, Any] = {"scored": len(rows), "invalid": len(refused), **_means(scored)}
    if unscored:
        reasons = {item.token: item.reason for item in unscored}
        summary["reasons"] = dict(itertools.islice(reasons.items(), MAX_REASONS))
    table = pa.Table.from_pylist(rows + refused, schema=score_schema())
    # Through an open file: an error of Arrow by itself does not name the file.
    with in_one_step(out) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
    if mapping is not None:  # may be refused; the scores above are kept then
        summary["two_stage"] = two_stage_summary(scored, mapping)
    with in_one_step(out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def score_schema() -> pa.Schema:
    """Return the columns of the table: those of both versions, null where a version has no such sub-score.

    Scores are null where ``valid`` is false, extended comfort where no scene before is known; `score_with_comfort` is
    `score` then.
    """
    names = dict.fromkeys(
        f"{kind}_{name}" for name in (*COLUMNS_V1, *COLUMNS_V2) for kind in ("raw", "filtered")
    )
    last = ("raw_score", "score", EXTENDED_COMFORT, SCORE_WITH_COMFORT)
    return pa.schema(
        [
            ("version", pa.string()),
            ("scene_id", pa.string()),
            ("trajectory", pa.int32()),
            ("valid", pa.bool_()),
            ("reason", pa.string()),
            ("traffic", pa.string()),
            *((name, pa.float64()) for name in (*names, *last)),
        ]
    )


def _rows(frame: SceneScore) -> list[dict[str, object]]:
    """Return one row for each trajectory of a scene."""
    shared = {"version": frame.version, "scene_id": frame.token, "valid": True, "traffic": TRAFFIC}
    return [
        {
            **shared,
            "trajectory": index,
            **{name: _known(value[index]) for name, value in frame.columns.items()},
        }
        for index in range(len(frame.columns["score"]))
    ]


def _refused_rows(item: Unscored, num_trajectories: int) -> list[dict[str, object]]:
    """Return the rows of trajectories that could not be scored, at least one."""
    row = {"version": item.version, "scene_id": item.token, "valid": False, "reason": item.reason}
    return [{**row, "traffic": TRAFFIC, "trajectory": index} for index in range(max(1, num_trajectories))]


def _means(scored: Sequence[SceneScore]) -> dict[str, dict[str, float]]:
    """Return the mean of every column over all trajectories, by version; the score is the one with comfort."""
    means = {}
    for version, names in (("v1", COLUMNS_V1), ("v2", COLUMNS_V2)):
        frames = [frame.columns for frame in scored if frame.version == version]
        if frames:
            named = {name: f"filtered_{name}" for name in names}
            named |= {EXTENDED_COMFORT: EXTENDED_COMFORT, "score": SCORE_WITH_COMFORT}
            columns = {name: np.concatenate([frame[key] for frame in frames]) for name, key in named.items()}
            known = {name: value for name, value in columns.items() if not np.isnan(value).all()}
            means[f"mean_{version}"] = aggregate_one_stage(known)
    return means


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
