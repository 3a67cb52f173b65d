"""A run's configuration from YAML and dotted overrides, and back; what is wrong ends in one line."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from autoscale_ray.config import RunConfig
from autoscale_ray.errors import ConfigError

MAX_DEPTH = 8
"""Names in the dotted path of an override; far deeper ones would only exhaust the stack."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration and apply dotted overrides.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: Items ``a.b=value``; the value is read as YAML.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: No such file, not a mapping, an unknown key, a wrong type or a value out of range; the
            message names the file, the dotted path, the rule and the value.
    """
    where = "overrides" if path is None else str(path)
    tree = {} if path is None else _read_yaml(Path(path))
    for item in overrides:
        tree = _with_override(tree, item)
    _refuse_unknown(tree, RunConfig, where, "")
    return _validated(tree, where)


def read_arguments(arguments: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``[run.yaml] [section.field=value ...]`` as on a command line.

    Args:
        arguments: At most one file; items with ``=`` are overrides.
        overrides: Further overrides, which win.

    Raises:
        ConfigError: More than one file, or as `load_config`.
    """
    files = [item for item in arguments if "=" not in item]
    if len(files) > 1:
        raise ConfigError(files[1], "only one configuration file can be given")
    given = [item for item in arguments if "=" in item]
    return load_config(files[0] if files else None, [*given, *overrides])


def override_of(name: str, value: object) -> str:
    """Return the override that gives a field this value; quoted, because YAML reads more into `7` or `a #1`.

    Args:
        name: Dotted path of the field.
        value: A plain value; any other, such as a path or a date, stands for its text.
    """
    return f"{name}={json.dumps(value, ensure_ascii=False, default=str)}"


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


class OneOfAKey(yaml.constructor.SafeConstructor):
    """Refuses YAML in which a mapping gives a key twice: of two sections of one name the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, or say which key comes again and where."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Loader(OneOfAKey, yaml.SafeLoader):
    """Reads plain values, never objects, and no key twice."""


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(str(path), "no such configuration file")
    try:
        # As safe as safe_load, whose loader the class above only makes stricter.
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"must be YAML text: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(str(path), "must be a mapping of sections", tree)
    return tree or {}


def _with_override(tree: Mapping[str, Any], item: str) -> dict[str, Any]:
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(item, "an override must look like section.field=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 40th of a month
        raise ConfigError(item, "the value of an override must be YAML") from error
    keys = dotted.split(".")
    if len(keys) > MAX_DEPTH:
        raise ConfigError("overrides", f"a field lies at most {MAX_DEPTH} names deep", dotted)
    return _set(tree, keys, value, item)


def _set(tree: Mapping[str, Any], keys: Sequence[str], value: Any, item: str) -> dict[str, Any]:
    head, rest = keys[0], keys[1:]
    if not rest:
        return {**tree, head: value}
    inner = tree.get(head) or {}
    if not isinstance(inner, Mapping):
        raise ConfigError(item, f"{head} is not a section")
    return {**tree, head: _set(inner, rest, value, item)}


def _refuse_unknown(tree: Mapping[str, Any], section: type, where: str, prefix: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(section)}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(where, f"unknown key {dotted}{hint}")
        default = fields[key].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ConfigError(where, f"{dotted} must be a section", value)
            _refuse_unknown(value, type(default), where, f"{dotted}.")
        elif isinstance(value, bool) and not isinstance(default, bool):
            # Else they count as 1 and 0.
            raise ConfigError(where, f"{dotted} must not be true or false", value)


def _validated(tree: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):  # a rule of our own, which names its field
            raise ConfigError(where, f"{cause.where}: {cause.rule}", cause.value) from error
        dotted = ".".join(str(part) for part in first["loc"])
        raise ConfigError(where, f"{dotted}: {first['msg'].lower()}", first.get("input")) from error
