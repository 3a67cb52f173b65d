"""What a sweep was asked for: which fields take which values, how they are searched, how many loops at a time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig
from autoscale_ray.config_file import load_config, override_of
from autoscale_ray.distributed.resources import Needs, ResourcesError
from autoscale_ray.distributed.session import with_absolute_paths
from autoscale_ray.errors import ConfigError, MissingExtraError, extra
from autoscale_ray.preflight import check_ready
from autoscale_ray.run_folder import is_url

PREFIX = "sweep."
SLOT = "trial_slot"
SEARCHES = ("grid", "optuna")


@dataclass(frozen=True, slots=True)
class Range:
    """Values from low to high, both included; whole numbers when both ends are."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """One sweep."""

    space: Mapping[str, list[Any] | Range]
    """Swept fields by dotted name."""
    arguments: tuple[str, ...]
    """``[run.yaml] [section.field=value ...]``, the same for every trial."""
    search: str = "grid"
    """``grid`` runs every combination once, ``optuna`` chooses `num_trials` points."""
    num_trials: int = 0
    """Trials of a search that chooses; 0 for a grid."""
    at_once: int = 0
    """Loops at a time; 0 takes what the cluster holds."""
    early_stop: bool = True
    """Whether poor trials stop early by the scores of their rounds (ASHA)."""
    base: RunConfig = field(compare=False)
    """The configuration that `arguments` give."""

    @property
    def name(self) -> str:
        """Return a name that depends on what is searched, not on how many trials run at a time."""
        space = {
            key: [item.low, item.high] if isinstance(item, Range) else item
            for key, item in self.space.items()
        }
        return f"tune-{fingerprint([list(self.arguments), space, self.search, self.num_trials])[:8]}"


def read_plan(arguments: Sequence[str]) -> SweepPlan:
    """Read ``[run.yaml] [section.field=value ...] sweep.section.field=v1,v2,... [sweep.option=value ...]``.

    Raises:
        ConfigError: Nothing is swept, a field or option is not known, out of range or without values, a run of a
            value would be refused (`check_ready`), or the sweep is to lie in a bucket.
        MissingExtraError: Optuna is asked for and not installed, or faiss is not installed.
    """
    ours = [item for item in arguments if item.startswith(PREFIX) and "=" in item]  # not the file sweep.yaml
    swept = dict(item.removeprefix(PREFIX).split("=", 1) for item in ours)
    rest = tuple(item for item in arguments if item not in ours)
    options = {name: _option(name, swept.pop(name)) for name in OPTIONS if name in swept}
    space = {name: read_values(name, text) for name, text in swept.items()}
    if not space:
        raise ConfigError("sweep", f"name at least one field, for example {PREFIX}loop.budget=350,700")
    plan = SweepPlan(space=space, arguments=rest, base=config_of(rest), **options)
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
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:  # two trials of one value would run in one folder
        raise ConfigError(f"{PREFIX}{name}", "must name a value at most once", twice[0])
    return values


def config_of(arguments: Sequence[str], swept: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the configuration of ``[run.yaml] [section.field=value ...]``, with absolute paths.

    Args:
        arguments: As on a command line.
        swept: Values of a trial's own fields.

    Raises:
        ConfigError: More than one file, or a bad field or value.
    """
    files = [item for item in arguments if "=" not in item]
    if len(files) > 1:
        raise ConfigError(files[1], "only one configuration file can be given")
    overrides = [item for item in arguments if "=" in item]
    overrides += [override_of(name, value) for name, value in (swept or {}).items()]
    return with_absolute_paths(load_config(files[0] if files else None, overrides))


def trials_at_once(asked: int, needs: Needs, total: Mapping[str, float]) -> int:
    """Return how many loops may run at a time, so that each can get all it needs and none waits for another.

    A trial holds one slot and no CPU. With more loops at a time than the cluster can hold, each would keep its
    trainer and wait for ever for the CPU of its scorer, which the trainer of another one holds.

    Args:
        asked: `SweepPlan.at_once`; a cluster that grows by itself holds more than it shows.
        needs: What one loop holds at once.
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
    for name, values in plan.space.items():
        if isinstance(values, Range):
            if plan.search == "grid":
                raise ConfigError(f"{PREFIX}{name}", f"a range needs {PREFIX}search=optuna")
            values = [values.low, values.high]
        for value in values:  # a bad field or value is said now, not by a trial an hour later
            check_ready(config_of(plan.arguments, {name: value}))


def _yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{PREFIX}{name}", "every value must be YAML without commas", text) from error


def _number(text: str) -> int | float | None:
    """Return the number that a text is in YAML, or None."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
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
