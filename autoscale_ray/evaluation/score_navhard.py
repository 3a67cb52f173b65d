"""Score trajectories on navhard's own files: logs for stage one, synthetic scenes for stage two, and maps.

Nothing of NAVSIM need be installed and no metric cache made; PDM-Closed is driven here. The logs of stage one are those
of NAVSIM's split ``test``: in its layout ``navsim_logs/test`` lies beside the folder ``navhard_two_stage``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InputRejectedError, InvalidInputError, InvalidSceneError
from autoscale_ray.evaluation.from_pool import row_values
from autoscale_ray.evaluation.scene_score import SceneScore, Unscored, pairs_in_time, with_comfort
from autoscale_ray.evaluation.score_file import check_waypoints
from autoscale_ray.evaluation.score_rows import score_row
from autoscale_ray.scenes.readers.navhard import scoring_tables
from autoscale_ray.scenes.readers.navsim_scenes import Source, cut_scenes
from autoscale_ray.scenes.readers.nuplan_map import map_files, open_map
from autoscale_ray.scenes.readers.openscene import read_log
from autoscale_ray.scenes.readers.scene_filter import SceneFilter
from autoscale_ray.scenes.trust import member_names, read_member

SCENE_FOLDER = "synthetic_scene_pickles"
LOG_FOLDER = "navsim_logs/test"
_HISTORY, _FUTURE = 4, 8
_SYNTHETIC_LENGTH = 17
"""Letters of a synthetic scene's token, by which NAVSIM tells it from an original one (16)."""
_HEX_RUN = re.compile(rb"[0-9a-f]{8,}")


def score_navhard(
    wanted: Mapping[str, np.ndarray], root: Path, maps: Path, logs: Path | None = None
) -> tuple[list[SceneScore], list[Unscored]]:
    """Score trajectories by token on original scenes (logs) and synthetic ones, by EPDMS.

    Args:
        wanted: Relative waypoints by token; see `read_trajectories`.
        root: Folder `navhard_two_stage` with `synthetic_scene_pickles`.
        maps: Folder with nuPlan maps.
        logs: Folder with the logs of the original scenes; None for `navsim_logs/test` beside `root`.

    Returns:
        What was scored, and the rest.

    Raises:
        InvalidInputError: The logs are not there and an original scene is wanted, neither logs nor synthetic scenes
            are there, or there are no maps.
    """
    map_files(maps)
    scored: dict[str, SceneScore] = {}
    reasons: dict[str, str] = {}
    lost: list[str] = []
    for token, found in _tables(wanted, root, maps, logs):
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


def _tables(
    wanted: Mapping[str, np.ndarray], root: Path, maps: Path, logs: Path | None
) -> Iterator[tuple[str, pa.Table | str]]:
    log_folder, synthetic = log_folder_of(root) if logs is None else logs, root / SCENE_FOLDER
    originals = [token for token in wanted if len(token) != _SYNTHETIC_LENGTH]
    if not log_folder.is_dir() and (logs is not None or originals or not synthetic.is_dir()):
        rule = "must be the folder with the logs of NAVSIM's split test; give it as --logs"
        raise InvalidInputError(str(log_folder), rule)
    if log_folder.is_dir():
        yield from _log_tables(frozenset(wanted), log_folder, maps)
    if synthetic.is_dir():
        yield from scoring_tables(synthetic, maps, list(wanted))


def log_folder_of(root: Path) -> Path:
    """Return where NAVSIM's layout has the logs of navhard's original scenes."""
    return root.resolve().parent / LOG_FOLDER


def _log_tables(wanted: Set[str], logs: Path, maps: Path) -> Iterator[tuple[str, pa.Table | str]]:
    chosen = SceneFilter(num_history_frames=_HISTORY, num_future_frames=_FUTURE, tokens=frozenset(wanted))
    for unit in member_names(logs, ".pkl"):
        try:
            if not may_hold(read_member(logs, unit), wanted):
                continue
            log = read_log(logs, unit)
            source = Source(unit=unit, name="navsim", domain="real")
            for table, refused in cut_scenes(log, open_map(maps, log.location), chosen, source):
                for row in refused.to_pylist():
                    yield row["element"], f"{unit}: {row['rule']} (found {row['value']})"
                for number in range(len(table)):
                    yield table["scene_id"][number].as_py(), table.slice(number, 1)
        except InputRejectedError as error:
            yield unit, str(error) if unit in error.where else f"{unit}: {error}"


def may_hold(content: bytes, tokens: Set[str]) -> bool:
    """Tell whether a pickle can hold one of some tokens; False is certain.

    A pickle holds a text as it is, behind a length or an opcode that is no hexadecimal digit; so few of the split's
    logs have to be taken apart.
    """
    sought = {token.encode() for token in tokens}
    if not all(_HEX_RUN.fullmatch(token) for token in sought):
        return True
    lengths = {len(token) for token in sought}
    return any(run[0][:length] in sought for run in _HEX_RUN.finditer(content) for length in lengths)
