"""Read SimScale's synthetic clips and reward files.

Facts of the format: one OpenScene pickle a clip, named ``<log>-<token>-00R.pkl``; 12 frames, of which the fourth is
at 0 s and gives the scene's token ``<token of the real scene>-00R`` (R: round of the simulation). A reward file maps
tokens to arrays of float16, one value for each of 16384 anchor trajectories (4 s, 40 poses); ``pdm_score`` is the score
of the anchor and the only one that is read.

Shape legend: V anchors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InputRejectedError, InvalidInputError
from autoscale_ray.scenes.gates import QUARANTINE_SCHEMA
from autoscale_ray.scenes.readers.navsim import checked_files, chosen_scenes
from autoscale_ray.scenes.readers.navsim_scenes import Source, cut_scenes
from autoscale_ray.scenes.readers.nuplan_map import open_map
from autoscale_ray.scenes.readers.openscene import read_log
from autoscale_ray.scenes.readers.reader import Reader, SceneTables
from autoscale_ray.scenes.readers.scene_filter import SceneFilter
from autoscale_ray.scenes.safe_pickle import read_pickle
from autoscale_ray.scenes.schema import SCENE_SCHEMA
from autoscale_ray.scenes.trust import MAX_MEMBER_BYTES, member_names, read_array, read_file

FILTER = SceneFilter(num_history_frames=4, num_future_frames=8)
REWARD = "pdm_score"
MAX_REWARD_BYTES = MAX_MEMBER_BYTES
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
    refused: list[InputRejectedError] = []

    def quality(token: str, poses_83: np.ndarray) -> float:
        """Note refused rewards: they cost the scene its quality, not its place."""
        assert rewards is not None
        try:
            return rewards.quality(token, poses_83)
        except InputRejectedError as error:
            refused.append(error)
            return float("nan")

    source = Source(
        unit=unit,
        name=_source_name(path, unit),
        domain=domain,
        naming=lambda _, token: (clip["log"], origin_of(token)),
        quality=None if rewards is None else quality,
    )
    chosen = chosen_scenes(files, FILTER)
    if len(log.tokens) < chosen.num_frames:
        raise InputRejectedError(unit, f"must hold at least {chosen.num_frames} frames", len(log.tokens))
    yield from cut_scenes(log, road, chosen, source)
    rows = [
        {
            "file": unit,
            "element": f"reward {error.where}",
            "rule": error.rule,
            "value": str(error.value or "")[:200],
        }
        for error in refused
    ]
    yield SCENE_SCHEMA.empty_table(), pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


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
    refused: Mapping[str, InputRejectedError]
    """Why a token of that file has none."""

    def quality(self, token: str, poses_83: np.ndarray) -> float:
        """Return the ``pdm_score`` of the anchor nearest to a plan (mean distance of positions), NaN without one.

        Raises:
            InputRejectedError: The token's rewards are refused.
        """
        if token in self.refused:
            raise self.refused[token]
        scores = self.pdm_score.get(token)
        if scores is None and self.path.is_dir() and (self.path / token / "tmp.pkl").is_file():
            unit = f"{token}/tmp.pkl"
            scores = read_rewards(read_pickle(self.path, unit), len(self.anchors_V83), unit)
        if scores is None:
            return float("nan")
        distance_V = np.linalg.norm(self.anchors_V83[..., :2] - poses_83[:, :2], axis=2).mean(axis=1)
        return float(scores[int(np.argmin(distance_V))])


def read_rewards(values: Any, num_anchors: int, where: str) -> np.ndarray:
    """Return the total score (V, float32) of one scene; the scores that it is made of are not looked at.

    Args:
        values: What a reward file holds for the scene.
        num_anchors: V.
        where: File and token for messages.

    Raises:
        InputRejectedError: The score is missing, has another length or is not in 0 to 1.
    """
    if not isinstance(values, dict) or REWARD not in values:
        raise InputRejectedError(where, f"must have the score {REWARD}")
    array = np.asarray(values[REWARD])
    if array.shape != (num_anchors,) or array.dtype.kind not in "biuf":
        raise InputRejectedError(f"{where}: {REWARD}", f"must hold {num_anchors} numbers", array.shape)
    scores = array.astype(np.float32)
    if not ((scores >= 0.0) & (scores <= 1.0)).all():
        raise InputRejectedError(f"{where}: {REWARD}", "must lie in 0 to 1")
    return scores


def read_vocabulary(path: Path) -> np.ndarray:
    """Read the anchors (V, 8, 3) of a .npy file with (V, 40, 3) poses every 0.1 s.

    Raises:
        InputRejectedError: Malformed.
    """
    anchors = read_array(read_file(path, MAX_VOCABULARY_BYTES), str(path))
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
    if path.is_dir():
        return Rewards(path, anchors_V83, {}, {})
    if path.is_file() and path.stat().st_size > MAX_REWARD_BYTES:
        rule = f"must be at most {MAX_REWARD_BYTES >> 30} GiB; give a folder of files <token>/tmp.pkl instead"
        raise InputRejectedError(str(path), rule, f"{path.stat().st_size} bytes")
    values = read_pickle(path, path.name)
    if not isinstance(values, dict):
        raise InputRejectedError(str(path), "must map tokens to scores")
    found: dict[str, np.ndarray] = {}
    refused: dict[str, InputRejectedError] = {}
    for token, scores in values.items():
        try:
            found[str(token)] = read_rewards(scores, len(anchors_V83), f"{path.name}: {token}")
        except InputRejectedError as error:
            refused[str(token)] = error
    if refused and not found:  # Most likely the rewards of another vocabulary.
        raise next(iter(refused.values()))
    return Rewards(path, anchors_V83, found, refused)


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
