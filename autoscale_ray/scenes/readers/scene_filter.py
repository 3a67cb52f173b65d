"""NAVSIM's scene filters (``scene_filter/*.yaml``): which windows of which logs make a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.scenes.schema import CURRENT_FRAME, NUM_FRAMES, NUM_HISTORY, NUM_PLAN_FRAMES
from autoscale_ray.scenes.trust import read_yaml

MAX_FILTER_BYTES = 64 << 20
_HYDRA_KEYS = ("_target_", "_convert_", "defaults")


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneFilter:
    """One filter, with NAVSIM's names; None keeps everything.

    The defaults are ours: every frame begins a window. A file that does not say has NAVSIM's, by which windows do not
    overlap; see `read_scene_filter`.
    """

    num_history_frames: int = 4
    """Frames up to 0 s, 4 or 5."""
    num_future_frames: int = 10
    """Frames after 0 s, 8 to 10."""
    frame_interval: int | None = 1
    """Frames from one window to the next; None for windows that do not overlap, NAVSIM's default."""
    has_route: bool = True
    """Leave out windows without a route at 0 s."""
    max_scenes: int | None = None
    log_names: frozenset[str] | None = None
    tokens: frozenset[str] | None = None
    """Tokens of frames at 0 s."""
    include_synthetic_scenes: bool = False
    synthetic_scene_tokens: frozenset[str] | None = None
    reactive_synthetic_initial_tokens: frozenset[str] | None = None
    non_reactive_synthetic_initial_tokens: frozenset[str] | None = None

    @property
    def num_frames(self) -> int:
        """Return the frames of a window."""
        return self.num_history_frames + self.num_future_frames

    @property
    def step(self) -> int:
        """Return the frames from one window to the next."""
        return self.num_frames if self.frame_interval is None else self.frame_interval


def read_scene_filter(path: Path) -> SceneFilter:
    """Read a filter file, once for each of its states; what it does not say is as in NAVSIM.

    Args:
        path: YAML file of scalars and lists of names.

    Raises:
        InvalidInputError: Not a scene filter; names the key and the rule.
    """
    state = path.stat() if path.is_file() else None
    return _read(path, None if state is None else (state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=4)
def _read(path: Path, state: tuple[int, int] | None) -> SceneFilter:
    where = str(path)
    values = read_yaml(path, MAX_FILTER_BYTES)
    if not isinstance(values, dict):
        raise InvalidInputError(where, "must be a mapping of filter settings")
    if "scene_filter" in str(values.get("defaults")) and "num_history_frames" not in values:
        raise InvalidInputError(where, "is a split; give the scene filter that it names under defaults")
    return _checked({key: value for key, value in values.items() if key not in _HYDRA_KEYS}, where)


def _checked(values: Mapping[Any, Any], where: str) -> SceneFilter:
    known = {field.name: str(field.type) for field in fields(SceneFilter)}
    kept: dict[str, Any] = {"frame_interval": None}
    for key, value in values.items():
        if key not in known and not str(key).endswith("all_mapping"):
            raise InvalidInputError(
                f"{where}: {key}", f"is no setting of a scene filter; known: {', '.join(known)}"
            )
        if key in known:
            kept[key] = _value(value, known[key], f"{where}: {key}")
    chosen = SceneFilter(**kept)
    limits = (
        ("num_history_frames", CURRENT_FRAME, NUM_HISTORY),
        ("num_future_frames", NUM_PLAN_FRAMES, NUM_FRAMES - NUM_HISTORY),
        ("step", 1, 10_000),
    )
    for name, low, high in limits:
        if not low <= getattr(chosen, name) <= high:
            raise InvalidInputError(f"{where}: {name}", f"must be {low} to {high}", getattr(chosen, name))
    if chosen.max_scenes is not None:
        raise InvalidInputError(
            f"{where}: max_scenes", "must be null; draw a sample from the pool", chosen.max_scenes
        )
    return chosen


def _value(value: Any, kind: str, where: str) -> Any:
    if value is None and "None" in kind:
        return None
    if kind.startswith("frozenset"):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidInputError(where, "must be a list of texts or null")
        return frozenset(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise InvalidInputError(where, "must be true or false", value)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(where, "must be an integer", value)
    return value
