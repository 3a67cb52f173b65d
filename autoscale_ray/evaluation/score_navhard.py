"""Score trajectories on navhard's own files: logs for stage one, synthetic scenes for stage two, and maps.

Nothing of NAVSIM need be installed and no metric cache made; PDM-Closed is driven here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InputRejectedError, InvalidInputError, InvalidSceneError
from autoscale_ray.evaluation.from_pool import row_values
from autoscale_ray.evaluation.scene_score import SceneScore, Unscored, pairs_in_time, with_comfort
from autoscale_ray.evaluation.score_file import check_waypoints
from autoscale_ray.evaluation.score_rows import score_row
from autoscale_ray.scenes.readers.navhard import LOG_FOLDER, scoring_tables
from autoscale_ray.scenes.readers.navsim_scenes import Source, cut_scenes
from autoscale_ray.scenes.readers.nuplan_map import map_files, open_map
from autoscale_ray.scenes.readers.openscene import read_log
from autoscale_ray.scenes.readers.scene_filter import SceneFilter
from autoscale_ray.scenes.trust import member_names

SCENE_FOLDER = "synthetic_scene_pickles"
_HISTORY, _FUTURE = 4, 8


def score_navhard(
    wanted: Mapping[str, np.ndarray], root: Path, maps: Path
) -> tuple[list[SceneScore], list[Unscored]]:
    """Score trajectories by token on original scenes (logs) and synthetic ones, by EPDMS.

    Args:
        wanted: Relative waypoints by token; see `read_trajectories`.
        root: Folder with `openscene_meta_datas` and `synthetic_scene_pickles`, or either of the two.
        maps: Folder with nuPlan maps.

    Returns:
        What was scored, and the rest.

    Raises:
        InvalidInputError: Neither folder is there, or there are no maps.
    """
    map_files(maps)
    scored: dict[str, SceneScore] = {}
    reasons: dict[str, str] = {}
    lost: list[str] = []
    for token, found in _tables(wanted, root, maps):
        if isinstance(found, str):
            if token in wanted:
                reasons[token] = found
            else:
                lost.append(found)
            continue
        try:
            scored[token] = score_row(row_values(found, 0), check_waypoints(token, wanted[token]), "v2")
        except InvalidSceneError as error:
            reasons[token] = str(error)
    for token in wanted:
        if token not in scored and token not in reasons:
            hint = f"; {len(lost)} files were refused, first: {lost[0]}" if lost else ""
            reasons[token] = f"{token}: trajectory: must have a scene{hint}"
    frames = list(scored.values())
    return with_comfort(frames, pairs_in_time(frames)), [
        Unscored(token=token, reason=reason, version="v2")
        for token, reason in reasons.items()
        if token not in scored
    ]


def _tables(wanted: Mapping[str, np.ndarray], root: Path, maps: Path) -> Iterator[tuple[str, pa.Table | str]]:
    logs, synthetic = root / LOG_FOLDER, root / SCENE_FOLDER
    if not logs.is_dir() and not synthetic.is_dir():
        raise InvalidInputError(str(root), f"must hold the folder {LOG_FOLDER} or {SCENE_FOLDER}")
    if logs.is_dir():
        yield from _log_tables(wanted, logs, maps)
    if synthetic.is_dir():
        yield from scoring_tables(synthetic, maps, list(wanted))


def _log_tables(
    wanted: Mapping[str, np.ndarray], logs: Path, maps: Path
) -> Iterator[tuple[str, pa.Table | str]]:
    chosen = SceneFilter(num_history_frames=_HISTORY, num_future_frames=_FUTURE, tokens=frozenset(wanted))
    for unit in member_names(logs, ".pkl"):
        try:
            log = read_log(logs, unit)
            source = Source(unit=unit, name="navsim", domain="real")
            for table, refused in cut_scenes(log, open_map(maps, log.location), chosen, source):
                for row in refused.to_pylist():
                    yield row["element"], f"{unit}: {row['rule']} (found {row['value']})"
                for number in range(len(table)):
                    yield table["scene_id"][number].as_py(), table.slice(number, 1)
        except InputRejectedError as error:
            yield unit, str(error) if unit in error.where else f"{unit}: {error}"
