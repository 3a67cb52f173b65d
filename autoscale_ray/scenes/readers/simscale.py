"""Read SimScale's synthetic clips and reward files.

Facts of the format: one OpenScene pickle a clip, named ``<log>-<token>-00R.pkl``; 12 frames, of which the fourth is
at 0 s and gives the scene's token ``<token of the real scene>-00R`` (R: round of the simulation). A reward file maps
tokens to arrays of float16, one value for each of 16384 anchor trajectories (4 s, 40 poses); ``pdm_score`` is the score
of the anchor.

Shape legend: V anchors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from autoscale_ray.errors import InputRejectedError, InvalidInputError
from autoscale_ray.scenes.readers.navsim import checked_files, chosen_scenes
from autoscale_ray.scenes.readers.navsim_scenes import Source, cut_scenes
from autoscale_ray.scenes.readers.nuplan_map import open_map
from autoscale_ray.scenes.readers.openscene import read_log, read_pickle
from autoscale_ray.scenes.readers.reader import Reader, SceneTables
from autoscale_ray.scenes.readers.scene_filter import SceneFilter
from autoscale_ray.scenes.trust import member_names, read_file

FILTER = SceneFilter(num_history_frames=4, num_future_frames=8)
REWARD_NAMES = (
    "no_at_fault_collisions", "drivable_area_compliance", "driving_direction_compliance",
    "traffic_light_compliance", "ego_progress", "time_to_collision_within_bound", "lane_keeping",
    "history_comfort", "pdm_score",
)  # fmt: skip
MAX_VOCABULARY_BYTES = 256 << 20
ANCHOR_SHAPE = (40, 3)
_PLAN_POSES = slice(4, None, 5)
_CLIP = re.compile(r"(?P<log>.+)-(?P<token>[0-9a-f]{16})-(?P<round>\d{3})")
_TOKEN = re.compile(r"(?P<token>[0-9a-f]{16})-(?P<round>\d{3})")


def clip_units(path: Path, files: Mapping[str, Path] | None = None) -> list[str]:
    """Return the clip pickles, only those that the filter names."""
    wanted = chosen_scenes(files or {}, FILTER).log_names
    return [name for name in member_names(path, ".pkl") if wanted is None or Path(name).stem in wanted]


def read_scenes(files: Mapping[str, Path], path: Path, unit: str, domain: str) -> SceneTables:
    """Yield the scene of one clip.

    Args:
        files: ``maps``; ``filter``; ``rewards`` and ``vocabulary`` for the column expert_quality.
        path: Folder, archive or file with clips.
        unit: One of `clip_units`.
        domain: ``synthetic``, or ``real`` if so wished.

    Raises:
        InputRejectedError: The clip, its name or its map is refused.
    """
    clip = _CLIP.fullmatch(PurePosixPath(unit).stem)
    if clip is None:
        raise InputRejectedError(unit, "must be named <log>-<token of 16 hex digits>-<round of 3 digits>.pkl")
    log = read_log(path, unit)
    road = open_map(files["maps"], log.location)
    rewards = open_rewards(files["rewards"], files["vocabulary"]) if "rewards" in files else None
    source = Source(
        unit=unit,
        name=_source_name(path, unit),
        domain=domain,
        naming=lambda _, token: (clip["log"], origin_of(token)),
        quality=None if rewards is None else rewards.quality,
    )
    chosen = chosen_scenes(files, FILTER)
    if len(log.tokens) < chosen.num_frames:
        raise InputRejectedError(unit, f"must hold at least {chosen.num_frames} frames", len(log.tokens))
    yield from cut_scenes(log, road, chosen, source)


def origin_of(token: str) -> str | None:
    """Return the token of the real scene that a synthetic one was made from, None for another token."""
    found = _TOKEN.fullmatch(token)
    return None if found is None else found["token"]


def _source_name(path: Path, unit: str) -> str:
    """Return ``simscale/`` and the folder that tells kind and round, where there is one."""
    folders = [
        part for part in (*path.parts, *PurePosixPath(unit).parts[:-1]) if part.startswith("synthetic_")
    ]
    return f"simscale/{folders[-1].removeprefix('synthetic_')}" if folders else "simscale"


@dataclass(frozen=True, slots=True)
class Rewards:
    """Scores of all anchors for many scenes: one file for all, or a folder with one file ``<token>/tmp.pkl`` each."""

    path: Path
    anchors_V83: np.ndarray
    """Poses every 0.5 s relative to the rear axle at 0 s."""
    pdm_score: Mapping[str, np.ndarray]
    """Total score (V, float32) by token, where one file holds all."""

    def quality(self, token: str, poses_83: np.ndarray) -> float:
        """Return the ``pdm_score`` of the anchor nearest to a plan (mean distance of positions), NaN without one.

        Raises:
            InputRejectedError: The token's file is refused.
        """
        scores = self.pdm_score.get(token)
        if scores is None and self.path.is_dir() and (self.path / token / "tmp.pkl").is_file():
            unit = f"{token}/tmp.pkl"
            scores = read_rewards(read_pickle(self.path, unit), len(self.anchors_V83), unit)["pdm_score"]
        if scores is None:
            return float("nan")
        distance_V = np.linalg.norm(self.anchors_V83[..., :2] - poses_83[:, :2], axis=2).mean(axis=1)
        return float(scores[int(np.argmin(distance_V))])


def read_rewards(values: Any, num_anchors: int, where: str) -> dict[str, np.ndarray]:
    """Return the scores (V, float32) of one scene by name.

    Args:
        values: What a reward file holds for the scene.
        num_anchors: V.
        where: File and token for messages.

    Raises:
        InputRejectedError: A score is missing, has another length or is not in 0 to 1.
    """
    missing = [name for name in REWARD_NAMES if not isinstance(values, dict) or name not in values]
    if missing:
        raise InputRejectedError(where, f"must have the score {missing[0]}")
    scores = {}
    for name in REWARD_NAMES:
        array = np.asarray(values[name])
        if array.shape != (num_anchors,) or array.dtype.kind not in "biuf":
            raise InputRejectedError(f"{where}: {name}", f"must hold {num_anchors} numbers", array.shape)
        scores[name] = array.astype(np.float32)
        if not ((scores[name] >= 0.0) & (scores[name] <= 1.0)).all():
            raise InputRejectedError(f"{where}: {name}", "must lie in 0 to 1")
    return scores


def read_vocabulary(path: Path) -> np.ndarray:
    """Read the anchors (V, 8, 3) of a .npy file with (V, 40, 3) poses every 0.1 s.

    Raises:
        InputRejectedError: Malformed.
    """
    content = read_file(path, MAX_VOCABULARY_BYTES)
    try:
        anchors = np.lib.format.read_array(BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise InputRejectedError(str(path), "must be a .npy file of numbers", str(error)) from None
    if (
        anchors.ndim != 3
        or anchors.shape[1:] != ANCHOR_SHAPE
        or anchors.dtype.kind != "f"
        or not len(anchors)
    ):
        raise InputRejectedError(
            str(path), "must hold n x 40 x 3 numbers", f"{anchors.dtype} {anchors.shape}"
        )
    if not np.isfinite(anchors).all():
        raise InputRejectedError(str(path), "must be finite")
    return anchors[:, _PLAN_POSES].astype(np.float64)


def open_rewards(path: Path, vocabulary: Path) -> Rewards:
    """Open the rewards of a set of scenes.

    Args:
        path: Reward file, or folder with one for each token.
        vocabulary: The anchors, see `read_vocabulary`.

    Raises:
        InputRejectedError: A file is refused.
    """
    state = [file.stat().st_mtime_ns for file in (path, vocabulary) if file.exists()]
    return _cached_rewards(path, vocabulary, tuple(state))


@lru_cache(maxsize=1)
def _cached_rewards(path: Path, vocabulary: Path, state: tuple[int, ...]) -> Rewards:
    anchors_V83 = read_vocabulary(vocabulary)
    found: dict[str, np.ndarray] = {}
    if not path.is_dir():
        values = read_pickle(path, path.name)
        if not isinstance(values, dict):
            raise InputRejectedError(str(path), "must map tokens to scores")
        for token, scores in values.items():
            where = f"{path.name}: {token}"
            found[str(token)] = read_rewards(scores, len(anchors_V83), where)["pdm_score"]
    return Rewards(path, anchors_V83, found)


def _with_files(files: Mapping[str, Path]) -> Reader:
    checked_files(files, ("maps", "filter", "rewards", "vocabulary"), "simscale")
    chosen_scenes(files, FILTER)
    if ("rewards" in files) != ("vocabulary" in files):
        raise InvalidInputError(
            "rewards", "must come with the vocabulary that they score, and the other way round"
        )
    if "rewards" in files:
        open_rewards(files["rewards"], files["vocabulary"])
    return replace(READER, units=partial(clip_units, files=files), read_scenes=partial(read_scenes, files))


READER = Reader(units=clip_units, with_files=_with_files)
