"""What a sweep was asked for: which fields take which values, how they are searched, how many loops at a time."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig
from autoscale_ray.config_file import override_of, read_arguments
from autoscale_ray.distributed.resources import Needs, ResourcesError, needs_of, with_all_trainers
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.errors import ConfigError, MissingExtraError, extra
from autoscale_ray.preflight import check_ready
from autoscale_ray.run_folder import is_url

PREFIX = "sweep."
SLOT = "trial_slot"
SEARCHES = ("grid", "optuna")
AFTER_EMBEDDING = ("clusters", "ascent", "retrieval", "planner", "evaluation", "loop")
"""Sections that bear on no embedding."""
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""What YAML 1.1 takes for text: it wants a point and a sign in 1.0e-4."""


@dataclass(frozen=True, slots=True)
class Range:
    """Values from low to high, both included; whole numbers when both ends are."""

    low: float
    high: float

    @property
    def tried(self) -> list[float]:
        """Return values that show what the field takes: both ends and, of fractions, one between them."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return [self.low, self.high]
        # A share at which hardly any two ends have a whole number between them.
        return [self.low, self.high, self.low + 0.381966 * (self.high - self.low)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """One sweep."""

    space: Mapping[str, list[Any] | Range]
    """Swept fields by dotted name."""
    search: str = "grid"
    """``grid`` runs every combination once, ``optuna`` chooses `num_trials` points."""
    num_trials: int = 0
    """Trials of a search that chooses; 0 for a grid."""
    at_once: int = 0
    """Loops at a time; 0 takes what the cluster holds."""
    early_stop: bool = True
    """Whether poor trials stop early by the scores of their rounds (ASHA)."""
    base: RunConfig
    """The configuration that all trials share, with absolute paths."""

    @property
    def sections(self) -> dict[str, Any]:
        """Return `base` as plain values: trials have other working directories than who asked for them."""
        return sections_of(self.base)

    @property
    def name(self) -> str:
        """Return a name that depends on all that Tune keeps of a sweep and would restore.

        What is finished is found in the run folders of the trials, whatever the sweep is called.
        """
        space = {
            key: [item.low, item.high] if isinstance(item, Range) else item
            for key, item in self.space.items()
        }
        asked = [self.sections, space, self.search, self.num_trials, self.at_once, self.early_stop]
        return f"tune-{fingerprint(asked)[:8]}"


def sections_of(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as mappings, lists and plain values."""
    return json.loads(json.dumps(asdict(config)))


def read_plan(arguments: Sequence[str]) -> SweepPlan:
    """Read ``[run.yaml] [section.field=value ...] sweep.section.field=v1,v2,... [sweep.option=value ...]``.

    Raises:
        ConfigError: Nothing is swept, a field or option is not known, out of range or without values, a run of a
            value would be refused (`check_ready`), or the sweep is to lie in a bucket.
        MissingExtraError: Optuna is asked for and not installed, or faiss is not installed.
    """
    ours = [item for item in arguments if item.startswith(PREFIX) and "=" in item]  # not the file sweep.yaml
    named = [item.removeprefix(PREFIX).partition("=") for item in ours]
    twice = [name for place, (name, _, _) in enumerate(named) if name in [one for one, _, _ in named[:place]]]
    if twice:
        raise ConfigError(f"{PREFIX}{twice[0]}", "must be given at most once")
    swept = {name: text for name, _, text in named}
    base = with_absolute_paths(read_arguments([item for item in arguments if item not in ours]))
    options = {name: _option(name, swept.pop(name)) for name in OPTIONS if name in swept}
    space = {name: read_values(name, text) for name, text in swept.items()}
    if not space:
        raise ConfigError("sweep", f"name at least one field, for example {PREFIX}loop.budget=350,700")
    plan = SweepPlan(space=_checked(space, base, options.get("search", "grid")), base=base, **options)
    _check(plan)
    return plan


def read_values(name: str, text: str) -> list[Any] | Range:
    """Read ``v1,v2,...`` or, between two numbers, ``low..high``; a path such as ``../pool`` is a value.

    Raises:
        ConfigError: No values, one that is no YAML, or a range that does not grow.
    """
    low, high = (_number(end) for end in text.partition("..")[::2])
    if low is not None and high is not None:
        if not low < high:
            raise ConfigError(f"{PREFIX}{name}", "a range is low..high with low < high", text)
        return Range(low, high)
    values = [_yaml(name, value) for value in text.split(",") if value.strip()]
    if not values:
        raise ConfigError(f"{PREFIX}{name}", "needs at least one value")
    _refuse_twice(name, values)
    return values


def _refuse_twice(name: str, values: Sequence[Any]) -> None:
    """Two trials of one value would run in one folder."""
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise ConfigError(f"{PREFIX}{name}", "must name a value at most once", twice[0])


def with_swept(base: Mapping[str, Any], swept: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a trial, its paths absolute.

    Args:
        base: Sections of the shared configuration, as `SweepPlan.sections`.
        swept: Values of the trial's own fields.

    Raises:
        ConfigError: A field is not known, or its value is out of range.
    """
    return with_absolute_paths(
        read_arguments([], [override_of(name, value) for name, value in {**base, **swept}.items()])
    )


def needs_of_trial(plan: SweepPlan) -> Needs:
    """Return the most that a trial holds at once.

    Elastic trainers count in full: each trial may take them all, and what it takes is not there for the scorers of the
    others. Embedders count where trials embed themselves, and not where all find the embeddings that were made first.
    """
    embeds = any(name.partition(".")[0] not in AFTER_EMBEDDING for name in plan.space)
    return needs_of(with_all_trainers(plan.base.placement.ray), embeds=embeds)


def trials_at_once(asked: int, needs: Needs, total: Mapping[str, float]) -> int:
    """Return how many loops may run at a time, so that each can get all it needs and none waits for another.

    A trial holds one slot and no CPU. With more loops at a time than the cluster can hold, each would keep its
    trainer and wait for ever for the CPU of its scorer, which the trainer of another one holds.

    Args:
        asked: `SweepPlan.at_once`; a cluster that grows by itself holds more than it shows.
        needs: What one loop holds at once, `needs_of_trial`.
        total: Resources of the cluster.

    Raises:
        ResourcesError: The cluster declares no slot.
    """
    slots = int(total.get(SLOT, 0))
    if slots < 1:
        raise ResourcesError(
            f"a sweep needs the resource {SLOT} on the head: ray start --resources='{{\"{SLOT}\": 2}}'"
        )
    if asked:
        return min(asked, slots)
    by_cpu = total.get("CPU", 0) / needs.cpus if needs.cpus else math.inf
    by_gpu = total.get("GPU", 0) / needs.gpus if needs.gpus else math.inf
    return max(1, min(slots, math.floor(min(by_cpu, by_gpu, slots))))


def _check(plan: SweepPlan) -> None:
    run_dir = plan.base.placement.run_dir
    if is_url(run_dir):
        rule = "a sweep needs a folder that every node mounts; only a single run may lie in a bucket"
        raise ConfigError("placement.run_dir", rule, run_dir)
    if plan.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("optuna", extra("optuna"))
    if plan.search == "optuna" and plan.num_trials < 1:
        raise ConfigError(f"{PREFIX}num_trials", "a search by optuna needs a number of trials >= 1")


def _checked(space: Mapping[str, Any], base: RunConfig, search: str) -> dict[str, list[Any] | Range]:
    """Return the swept fields, paths made absolute; a bad field or value is said now, not by a trial an hour later."""
    found: dict[str, list[Any] | Range] = {}
    for name, values in space.items():
        if name == "placement.run_dir":
            raise ConfigError(
                f"{PREFIX}{name}", "every trial has a folder of its own; --out names that of the sweep"
            )
        if isinstance(values, Range) and search == "grid":
            raise ConfigError(f"{PREFIX}{name}", f"a range needs {PREFIX}search=optuna")
        ends = values.tried if isinstance(values, Range) else values
        configs = [with_swept(sections_of(base), {name: value}) for value in ends]
        for config in configs:
            check_ready(config)
        if name.startswith("data.") and not isinstance(values, Range):
            values = [str(Path(attrgetter(name)(config)).resolve()) for config in configs]
            _refuse_twice(name, values)
        found[name] = values
    return found


def _yaml(name: str, text: str) -> Any:
    """Return the value of a YAML text, or the number where it is one to everybody but YAML, such as 1e-4."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{PREFIX}{name}", "every value must be YAML without commas", text) from error
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    return value


def _number(text: str) -> int | float | None:
    """Return the number that a text is, or None."""
    try:
        value = _yaml("", text)
    except ConfigError:
        return None
    return value if type(value) in (int, float) else None


def _option(name: str, text: str) -> Any:
    value, (kind, rule, accepts) = _yaml(name, text), OPTIONS[name]
    if type(value) is not kind or not accepts(value):
        raise ConfigError(f"{PREFIX}{name}", rule, value)
    return value


OPTIONS: dict[str, tuple[type, str, Any]] = {
    "search": (str, f"must be one of {', '.join(SEARCHES)}", lambda value: value in SEARCHES),
    "num_trials": (int, "must be an integer >= 1", lambda value: value >= 1),
    "at_once": (int, "must be an integer >= 1", lambda value: value >= 1),
    "early_stop": (bool, "must be true or false", lambda value: True),
}
"""Options beside the swept fields: type, rule in words, rule."""
