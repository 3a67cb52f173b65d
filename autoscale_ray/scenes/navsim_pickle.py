"""Read pickles with objects of NAVSIM, nuPlan and shapely without making a single one of them.

Runs in the child process of `safe_pickle`; imports the standard library and NumPy only. Every class on the list
below is replaced by a `Record` that keeps what the pickle says about the object and runs nothing; a class that is
not on the list is refused. Geometries stay well-known binary until `decode_wkb` takes them apart.

Shape legend: n points of a ring.
"""

from __future__ import annotations

import io
import lzma
import struct
from typing import Any

import numpy as np

from autoscale_ray.scenes.pickle_child import PlainUnpickler, Refused, check_opcodes

MAX_UNPACKED_BYTES = 512 << 20
MAX_RATIO = 400
_RATIO_FLOOR_BYTES = 4 << 20
_LZMA_MEMORY_BYTES = 512 << 20
_CHUNK_BYTES = 1 << 22
_XZ_MAGIC = b"\xfd7zXZ\x00"

CLASSES = (
    "Agent", "AgentTemporalState", "Annotations", "CarFootprint", "DetectionsTracks", "DynamicCarState", "EgoState",
    "EgoStatus", "InterpolatedTrajectory", "MapParameters", "MetricCache", "OrientedBox", "PDMDrivableMap",
    "PDMObservation", "PDMOccupancyMap", "PDMPath", "Point2D", "PredictedTrajectory", "ProgressStateSE2",
    "SceneFrameType", "SceneObject", "SceneObjectMetadata", "SemanticMapLayer", "StateSE2", "StateVector2D",
    "StaticObject", "TimePoint", "TrackedObjectType", "TrackedObjects", "TrafficLightStatusData",
    "TrafficLightStatusType", "TrafficLightStatuses", "Trajectory", "TrajectorySampling", "VehicleParameters",
    "Waypoint",
)  # fmt: skip
"""Classes of nuPlan and NAVSIM whose pickled form is kept; found by name alone, because forks move modules."""
_SETTING_TYPES = {
    ("typing", "Any"),
    *(("builtins", name) for name in ("dict", "list", "str", "int", "float", "bool")),
}
_POLYGON, _MULTI_POLYGON = 3, 6
_HAS_Z, _HAS_M, _HAS_SRID = 0x80000000, 0x40000000, 0x20000000

Rings = list[list[np.ndarray]]
"""Parts of a geometry; each part is its outer ring (n, 2) and its holes, first vertex not repeated."""


class Record:
    """What a pickle says about one object: the arguments of its call and its state."""

    def __new__(cls, *arguments: object) -> Record:
        """Keep the arguments."""
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = {}
        return record

    arguments: tuple[object, ...]
    state: dict[str, object]

    def __setstate__(self, state: object) -> None:
        """Keep the state, a mapping or a pair of mappings; shapely 1 gives bytes."""
        if isinstance(state, bytes):
            self.arguments = (state,)
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)


class Setting(Record):
    """A value of a configuration, as submissions carry beside their predictions; never looked at."""


class Geometry(Record):
    """A shapely geometry in well-known binary, its only argument."""


RECORDS: dict[str, type[Record]] = {name: type(name, (Record,), {}) for name in CLASSES}


def _joined(*parts: object) -> str:
    return "/".join(str(part) for part in parts if isinstance(part, str))


def _plain_dict(*factory: object) -> dict[object, object]:
    """Stand in for a defaultdict, as every node of a configuration carries one; its factory is never called."""
    return {}


class NavsimUnpickler(PlainUnpickler):
    """Resolves the listed classes to records, geometries to their bytes, and paths to text."""

    def find_class(self, module: str, name: str) -> object:
        """Return what a global stands for."""
        root = module.split(".")[0]
        if root in ("nuplan", "navsim") and name in RECORDS:
            return RECORDS[name]
        if root == "shapely" and name in ("from_wkb", "Polygon", "MultiPolygon"):
            return Geometry
        if root == "pathlib" and name.endswith("Path"):
            return _joined
        if root == "omegaconf" or (module, name) in _SETTING_TYPES:
            return Setting
        if (module, name) == ("collections", "defaultdict"):
            return _plain_dict
        if root in ("metadrive", "scenarionet"):
            raise Refused(f"global {module}.{name}")
        return super().find_class(module, name)


def load(content: bytes) -> Any:
    """Return the records of a pickle, unpacked first where it is an xz file.

    Raises:
        Refused: With the reason.
    """
    plain = unpack(content) if content.startswith(_XZ_MAGIC) else content
    check_opcodes(plain)
    return NavsimUnpickler(io.BytesIO(plain)).load()


def unpack(content: bytes) -> bytes:
    """Unpack one xz stream within limits on its size, its ratio and the decoder's memory.

    Raises:
        Refused: Damaged, truncated, too large, or bytes after the end.
    """
    limit = min(MAX_UNPACKED_BYTES, max(_RATIO_FLOOR_BYTES, MAX_RATIO * len(content)))
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_BYTES)
    parts, total, rest = [], 0, content
    try:
        while not decoder.eof:
            part = decoder.decompress(rest, max_length=_CHUNK_BYTES)
            if not part and not rest and decoder.needs_input:
                raise Refused("xz stream: truncated")
            parts.append(part)
            total, rest = total + len(part), b""
            if total > limit:
                raise Refused(f"xz stream: more than {limit} bytes unpacked")
    except lzma.LZMAError as error:
        raise Refused(f"xz stream: {error}") from None
    if decoder.unused_data:
        raise Refused("xz stream: bytes after the end")
    return b"".join(parts)


def take(value: object, kind: str, name: str) -> Any:
    """Return a field of a record of one class.

    Raises:
        Refused: Another class, or no such field.
    """
    if type(value).__name__ != kind or not isinstance(value, Record):
        raise Refused(f"{type(value).__name__} where a {kind} must be")
    if name not in value.state:
        raise Refused(f"{kind} without {name}")
    return value.state[name]


def argument(value: object, kind: str, position: int) -> Any:
    """Return an argument that a record of one class was called with.

    Raises:
        Refused: Another class, or too few arguments.
    """
    if type(value).__name__ != kind or not isinstance(value, Record):
        raise Refused(f"{type(value).__name__} where a {kind} must be")
    if len(value.arguments) <= position:
        raise Refused(f"{kind} with {len(value.arguments)} arguments")
    return value.arguments[position]


def number(value: object, name: str) -> float:
    """Return a real number, plain or NumPy's.

    Raises:
        Refused: Something else.
    """
    if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 and value.dtype.kind in "iuf":
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise Refused(f"{name} of type {type(value).__name__}")


def whole(value: object, name: str) -> int:
    """Return a whole number below 2^62, plain or NumPy's.

    Raises:
        Refused: Something else.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if not isinstance(plain, int) or isinstance(plain, bool) or abs(plain) >= 1 << 62:
        raise Refused(f"{name} must be a whole number")
    return plain


def items(value: object, name: str) -> list[Any]:
    """Return a list, tuple or one-dimensional array as a list.

    Raises:
        Refused: Something else.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return list(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    raise Refused(f"{name} of type {type(value).__name__}")


def text(value: object, name: str) -> str:
    """Return a string.

    Raises:
        Refused: Something else.
    """
    if not isinstance(value, str):
        raise Refused(f"{name} of type {type(value).__name__}")
    return str(value)


def decode_wkb(geometry: object) -> Rings:
    """Take a polygon or multipolygon in well-known binary apart; heights are dropped.

    Raises:
        Refused: Another kind of geometry, too few points, or sizes that exceed the content.
    """
    content = geometry.arguments[0] if isinstance(geometry, Geometry) and geometry.arguments else None
    if not isinstance(content, bytes):
        raise Refused(f"{type(geometry).__name__} where a polygon must be")
    reader = _WkbReader(content)
    parts = reader.parts()
    reader.finish()
    return parts


class _WkbReader:
    def __init__(self, content: bytes) -> None:
        self._content, self._place, self._order = content, 0, "<"

    def parts(self) -> Rings:
        kind, num_axes = self._head()
        if kind == _POLYGON:
            return [self._rings(num_axes)]
        if kind != _MULTI_POLYGON:
            raise Refused(f"geometry of kind {kind} where a polygon must be")
        found = []
        for _ in range(self._count(9)):
            kind, num_axes = self._head()
            if kind != _POLYGON:
                raise Refused(f"geometry of kind {kind} where a polygon must be")
            found.append(self._rings(num_axes))
        return found

    def finish(self) -> None:
        if self._place != len(self._content):
            raise Refused("geometry with bytes after its end")

    def _head(self) -> tuple[int, int]:
        (order,) = self._bytes(1)
        if order > 1:
            raise Refused("geometry without a byte order")
        self._order = "<" if order else ">"
        (code,) = struct.unpack(f"{self._order}I", self._bytes(4))
        if code & _HAS_SRID:
            self._bytes(4)
        dimensions, kind = divmod(code & 0x0FFFFFFF, 1000)
        if dimensions > 3:
            raise Refused(f"geometry code {code}")
        num_axes = 2 + max(bool(code & _HAS_Z) + bool(code & _HAS_M), (0, 1, 1, 2)[dimensions])
        return kind, num_axes

    def _rings(self, num_axes: int) -> list[np.ndarray]:
        return [self._ring(num_axes) for _ in range(self._count(4))]

    def _ring(self, num_axes: int) -> np.ndarray:
        count = self._count(8 * num_axes)
        values = np.frombuffer(self._bytes(8 * num_axes * count), dtype=f"{self._order}f8")
        points = values.reshape(count, num_axes)[:, :2].astype(np.float64)
        if len(points) > 1 and np.array_equal(points[0], points[-1]):
            points = points[:-1]
        if len(points) < 3:
            raise Refused(f"polygon ring of {len(points)} points")
        return points

    def _count(self, item_bytes: int) -> int:
        (count,) = struct.unpack(f"{self._order}I", self._bytes(4))
        if count * item_bytes > len(self._content) - self._place:
            raise Refused(f"geometry with {count} items")
        return count

    def _bytes(self, count: int) -> bytes:
        if count > len(self._content) - self._place:
            raise Refused("geometry that ends too early")
        self._place += count
        return self._content[self._place - count : self._place]
