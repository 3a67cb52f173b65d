"""One byte string for one value: canonical JSON, fingerprints, and small files that notice a changed byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from autoscale_ray.errors import ArtifactError, InvalidInputError

JSON = None | bool | int | float | str | list["JSON"] | tuple["JSON", ...] | Mapping[str, "JSON"]


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of a value: sorted keys, no spaces, shortest float text.

    Raises:
        InvalidInputError: Part of the value has no stable form (NaN, sets, arrays); names the field.
    """
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON of a value, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def plain(value: Any, where: str = "value") -> Any:
    """Return a value as JSON types alone: dict, list, str, int, float, bool, None.

    Raises:
        InvalidInputError: Part of the value has no stable form; names the field.
    """
    if not isinstance(value, type) and dataclasses.is_dataclass(value):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise InvalidInputError(where, "keys must be strings", key)
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if type(value) is list or type(value) is tuple:
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if type(value) is float and not math.isfinite(value):
        raise InvalidInputError(where, "must be a finite number", value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise InvalidInputError(where, f"a {type(value).__name__} has no stable form", value)


def seal(body: Mapping[str, Any]) -> bytes:
    """Return a small JSON file that carries the sha256 of its own body."""
    text = canonical_json(body)
    return canonical_json({"body": plain(body), "sha256": hashlib.sha256(text).hexdigest()}) + b"\n"


def unseal(where: str, data: bytes) -> dict[str, Any]:
    """Return the body of a sealed file.

    Raises:
        ArtifactError: The bytes are not exactly what `seal` wrote for this body.
    """
    try:
        body = json.loads(data)["body"]
        intact = seal(body) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ArtifactError(where, "is damaged: its content does not match its own checksum")
    return body


def first_difference(left: Any, right: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Return dotted path and both values of the first field in which two plain values differ, or None."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        pairs: Iterator[tuple[str, Any, Any]] = (
            (f"{where}.{key}".lstrip("."), left.get(key, "<missing>"), right.get(key, "<missing>"))
            for key in sorted({*left, *right})
        )
        return next((found for path, one, two in pairs if (found := first_difference(one, two, path))), None)
    return None if canonical_json(left) == canonical_json(right) else (where, left, right)
