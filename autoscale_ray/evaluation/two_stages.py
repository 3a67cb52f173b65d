"""navhard's two-stage score of scored scenes, over the mapping that a split file of NAVSIM lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation.aggregate import StageFrames, aggregate_two_stage
from autoscale_ray.evaluation.combine import COLUMNS_V2
from autoscale_ray.evaluation.scene_score import SceneScore, stacked_states
from autoscale_ray.scenes.trust import read_yaml

MAPPING_KEY = "reactive_all_mapping"
_FORMER_KEY = "two_stage_mapping"
_MAX_MAPPING_BYTES = 64 << 20


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
    if groups is None and isinstance(values, dict) and _FORMER_KEY in values:
        rule = f"must have {MAPPING_KEY}: {_FORMER_KEY} is of a two-stage score with other weights, before NAVSIM 2.2"
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


def two_stage_summary(
    scored: Sequence[SceneScore], mapping: Sequence[tuple[str, str, str, str]]
) -> dict[str, object]:
    """Aggregate navhard's two stages over the mappings whose scenes are all scored.

    Args:
        scored: v2 scenes; of each the first trajectory counts.
        mapping: Result of `read_mapping`.

    Returns:
        Plain numbers: the aggregate, how many mappings it covers, and how many lack a scene and are left out.

    Raises:
        InvalidInputError: No mapping is complete, or paired scenes are not within 0.55 s.
    """
    frames = [frame for frame in scored if frame.version == "v2"]
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
    return {
        "mappings": len(whole),
        "mappings_left_out": len(groups) - len(whole),
        "combined": scores.combined,
        "stage_one": scores.stage_one,
        "stage_two": scores.stage_two,
    }


def _stage_frames(frames: Sequence[SceneScore]) -> StageFrames:
    return StageFrames(
        columns={
            name: np.array([frame.columns[f"filtered_{name}"][0] for frame in frames]) for name in COLUMNS_V2
        },
        start_times_s=np.array([frame.start_us * 1e-6 for frame in frames]),
        endpoints=np.stack([frame.endpoint for frame in frames]),
        start_points=np.stack([frame.start_point for frame in frames]),
        states=stacked_states(frames),
    )
