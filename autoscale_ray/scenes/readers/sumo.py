"""Read SUMO floating car data (fcd-export XML, plain or .gz) with its network (net.xml).

Facts of the format: x, y is the middle of the *front* bumper; the angle is in degrees, 0 to the north,
clockwise; lane 0 is the rightmost one; boxes stand in vType elements of the route file, defaults are SUMO's.
A recording is cut into pieces of `PIECE_S` seconds, so memory grows with the traffic and not with its
duration.
"""

from __future__ import annotations

import gzip
import itertools
import math
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import Recording, Track, gather_tracks, no_lights
from autoscale_ray.scenes.road_map import Area, Lane, RoadMap, is_apart, make_road_map, offset_borders
from autoscale_ray.scenes.trust import iterate_xml, parse_xml, read_file
from autoscale_ray.scenes.xml_numbers import finite_number

PIECE_S = 600.0
MAX_TIME_S = 1e9
DEFAULT_LANE_WIDTH_M = 3.2
FCD_SUFFIXES = (".fcd.xml", ".fcd.xml.gz")
_BOXES = {
    "DEFAULT_VEHTYPE": (5.0, 1.8, "vehicle"),
    "DEFAULT_BIKETYPE": (1.6, 0.65, "bicycle"),
    "DEFAULT_PEDTYPE": (0.215, 0.478, "pedestrian"),
}
_KIND_OF_CLASS = {"bicycle": "bicycle", "pedestrian": "pedestrian"}
_CAR_CLASSES = {"all", "passenger", "private", "taxi", "bus", "truck", "delivery", "trailer", "custom1"}
_RED_LETTERS = "ru"


def units(path: Path) -> list[str]:
    """Return the names of the fcd files in a folder, or of the file itself."""
    if path.is_file():
        return [path.name]
    if not path.is_dir():
        raise InputRejectedError(str(path), "must be a folder or an fcd file", "no such path")
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.name.endswith(FCD_SUFFIXES))


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the pieces of one fcd file.

    The network is the net.xml of the same name, else the only one in the folder.

    Raises:
        InputRejectedError: No network, or a malformed element.
    """
    file = path if path.is_file() else path / name
    stem = re.sub(r"(\.fcd)?\.xml(\.gz)?$", "", file.name)
    net = parse_xml(read_file(_network_beside(file, stem)), f"{stem}.net.xml")
    road = read_road(net, f"{stem}.net.xml")
    boxes = _boxes_beside(file, stem)
    for piece in _pieces(file, name):
        tracks = _tracks(piece, boxes, name)
        if tracks:
            yield Recording(
                name=f"{stem}-{round(piece.start_s)}",
                log_id=f"sumo/{stem}-{round(piece.start_s)}",
                source=f"sumo/{stem}",
                tracks=gather_tracks(tracks),
                frame_interval_s=piece.interval_s,
                start_us=round(piece.start_s * 1e6),
                road=road,
                red_FL=red_lights(net, road, piece.start_s, piece.interval_s, piece.num_frames),
            )


def _network_beside(file: Path, stem: str) -> Path:
    own = [file.with_name(f"{stem}.net.xml{suffix}") for suffix in ("", ".gz")]
    found = [path for path in own if path.exists()] or sorted(file.parent.glob("*.net.xml*"))
    if len(found) != 1:
        raise InputRejectedError(file.name, f"needs {stem}.net.xml, or one net.xml, beside it", len(found))
    return found[0]


def _boxes_beside(file: Path, stem: str) -> dict[str, tuple[float, float, str]]:
    boxes = dict(_BOXES)
    routes = file.with_name(f"{stem}.rou.xml")
    if not routes.exists():
        return boxes
    with routes.open("rb") as stream:
        for element in iterate_xml(stream, routes.name, ("vType",)):
            kind = element.get("vClass") or "passenger"
            length, width, default = _BOXES["DEFAULT_BIKETYPE" if kind == "bicycle" else "DEFAULT_VEHTYPE"]
            boxes[element.get("id") or ""] = (
                _number(element, "length", routes.name, length),
                _number(element, "width", routes.name, width),
                _KIND_OF_CLASS.get(kind, default),
            )
    return boxes


@dataclass(slots=True)
class _Piece:
    """Rows of some minutes: (frame, x, y, angle, speed, acceleration) of each vehicle."""

    start_s: float
    interval_s: float
    num_frames: int = 0
    rows: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)


def _pieces(file: Path, name: str) -> Iterator[_Piece]:
    steps = _timesteps(file, name)
    first = next(steps, None)
    second = next(steps, None)
    if first is None or second is None:
        raise InputRejectedError(name, "must hold at least two time steps")
    interval = round(second[0] - first[0], 6)
    if not 0.01 <= interval <= 0.5:
        raise InputRejectedError(
            name, "time step must lie between 0.01 and 0.5 s (device.fcd.period)", interval
        )
    piece = _Piece(first[0], interval)
    for time, rows in itertools.chain((first, second), steps):
        if time >= piece.start_s + PIECE_S:
            yield piece
            piece = _Piece(time, interval)
        frame = round((time - piece.start_s) / interval)
        if frame < piece.num_frames or abs(piece.start_s + frame * interval - time) > 1e-3:
            raise InputRejectedError(f"{name}: timestep {time}", f"time must grow in steps of {interval} s")
        piece.num_frames = frame + 1
        for key, kind, *values in rows:
            piece.rows.setdefault(key, []).append((frame, *values))
            piece.kinds[key] = kind
    yield piece


_Step = tuple[float, list[tuple]]


def _timesteps(file: Path, name: str) -> Iterator[_Step]:
    with _opened(file) as stream:
        for step in iterate_xml(stream, name, ("timestep",)):
            where = f"{name}: timestep {step.get('time')}"
            time_s = _number(step, "time", where)
            if abs(time_s) > MAX_TIME_S:
                raise InputRejectedError(where, f"time must be at most {MAX_TIME_S:.0e} s")
            yield time_s, [_row(element, where) for element in step if element.tag in _MOVERS]


_MOVERS = {"vehicle": "DEFAULT_VEHTYPE", "person": "DEFAULT_PEDTYPE"}


def _row(element: etree._Element, where: str) -> tuple:
    key = f"{element.tag} {element.get('id')}"
    inside = f"{where}: {key}"
    values = [_number(element, name, inside) for name in ("x", "y", "angle", "speed")]
    kind = element.get("type") or _MOVERS[str(element.tag)]
    return key, kind, *values, _number(element, "acceleration", inside, math.nan)


def _opened(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _tracks(piece: _Piece, boxes: dict[str, tuple[float, float, str]], name: str) -> list[Track]:
    tracks = []
    for key, rows in piece.rows.items():
        values = np.array(rows, dtype=np.float64)
        frames = values[:, 0].astype(np.int64)
        if (np.diff(frames) <= 0).any():
            raise InputRejectedError(f"{name}: {key}", "must occur once in a time step")
        length, width, kind = boxes.get(piece.kinds[key], _BOXES["DEFAULT_VEHTYPE"])
        yaw = np.radians(90.0 - values[:, 3])
        heading = np.column_stack([np.cos(yaw), np.sin(yaw)])
        tracks.append(
            Track(
                key=len(tracks),
                kind=kind,
                length_m=length,
                width_m=width,
                frames=frames,
                poses=np.column_stack([values[:, 1:3] - length / 2.0 * heading, yaw]),
                velocities=values[:, 4:5] * heading,
                accelerations=values[:, 5],
                can_be_ego=kind == "vehicle",
            )
        )
    return tracks


def read_road(net: etree._Element, name: str) -> RoadMap:
    """Turn a network into a road map.

    Lanes inside junctions become connectors where they cross another lane at an angle or have a traffic light
    (see `road_map.crossing_lanes`), so a motorway merge is no intersection. The junction's shape is drivable:
    intersection where it holds a connector, else roadblock.
    """
    if net.tag != "net":
        raise InputRejectedError(name, "must be a SUMO net", net.tag)
    lights = {c.get("via") for c in net.iterchildren("connection") if c.get("tl") and c.get("via")}
    following: dict[str, list[str]] = {}
    for link in net.iterchildren("connection"):
        start = f"{link.get('from')}_{link.get('fromLane')}"
        following.setdefault(start, []).append(link.get("via") or f"{link.get('to')}_{link.get('toLane')}")
    lanes = [
        lane for edge in net.iterchildren("edge") for lane in _edge_lanes(edge, following, lights, name)
    ]  # fmt: skip
    road = make_road_map(lanes)
    inside = {key for key, is_connector in zip(road.keys, road.is_connector_L, strict=True) if is_connector}
    return make_road_map(
        lanes,
        [area for node in net.iterchildren("junction") for area in _areas(node, inside, name)],
    )


def _edge_lanes(
    edge: etree._Element, following: dict[str, list[str]], lights: set[str | None], name: str
) -> Iterator[Lane]:
    kind = edge.get("function") or "normal"
    if kind not in ("normal", "internal"):
        return
    for element in edge.iterchildren("lane"):
        key = element.get("id") or ""
        where = f"{name}: lane {key}"
        center = _shape(element, where)
        if not _for_cars(element) or len(center) < 2:
            continue
        half_m = _number(element, "width", where, DEFAULT_LANE_WIDTH_M) / 2.0
        left, right = offset_borders(center, half_m, half_m)
        index = int(_number(element, "index", where))
        yield Lane(
            key=key,
            left=left,
            right=right,
            center=center,
            successors=tuple(following.get(key, ())),
            left_neighbour=f"{edge.get('id')}_{index + 1}" if kind == "normal" else None,
            speed_limit_mps=_number(element, "speed", where),
            is_connector=False if kind == "normal" else True if key in lights else None,
        )


def _for_cars(lane: etree._Element) -> bool:
    allowed, forbidden = set((lane.get("allow") or "").split()), set((lane.get("disallow") or "").split())
    return bool(allowed & _CAR_CLASSES) if allowed else not forbidden & {"all", "passenger"}


def _areas(junction: etree._Element, connectors: Set[object], name: str) -> Iterator[Area]:
    if junction.get("type") in ("internal", "dead_end") or not junction.get("shape"):
        return
    ring = _shape(junction, f"{name}: junction {junction.get('id')}")
    if len(ring) >= 3:
        crossing = bool(connectors & set((junction.get("intLanes") or "").split()))
        yield Area(layer="intersection" if crossing else "roadblock", ring=ring)


def red_lights(
    net: etree._Element, road: RoadMap, start_s: float, interval_s: float, num_frames: int
) -> np.ndarray | None:
    """Return which connectors have a red light in which frame (F, L), for programs of fixed times.

    Args:
        net: Network element.
        road: Its road map.
        start_s: Time of frame 0.
        interval_s: Frame step.
        num_frames: F.
    """
    programs = {
        logic.get("id"): logic for logic in net.iterchildren("tlLogic") if logic.get("type") == "static"
    }
    if not programs:
        return None
    number = road.lane_number
    red_FL = no_lights(road, num_frames)
    times = start_s + np.arange(num_frames) * interval_s
    states = {key: _light_states(logic, times) for key, logic in programs.items()}
    for link in net.iterchildren("connection"):
        lane = number.get(link.get("via"))
        if lane is not None and link.get("tl") in states:
            letters_F = states[link.get("tl")].T[_link_index(link, states[link.get("tl")].shape[1])]
            red_FL[:, lane] = np.isin(letters_F, list(_RED_LETTERS))
    return red_FL


def _link_index(link: etree._Element, num_links: int) -> int:
    where = f"connection from {link.get('from')} to {link.get('to')}"
    index = _number(link, "linkIndex", where, 0.0)
    if index not in range(num_links):
        raise InputRejectedError(where, f"linkIndex must be a link of its light, below {num_links}", index)
    return int(index)


def _light_states(logic: etree._Element, times: np.ndarray) -> np.ndarray:
    """Return the state letters of a program at each time (F, links)."""
    where = f"tlLogic {logic.get('id')}"
    phases = list(logic.iterchildren("phase"))
    durations = np.array([_number(phase, "duration", where) for phase in phases])
    states = [phase.get("state") or "" for phase in phases]
    if not phases or durations.sum() <= 0.0 or len(set(map(len, states))) != 1:
        raise InputRejectedError(where, "must have phases of one width and a positive duration")
    at = (times - _number(logic, "offset", where, 0.0)) % durations.sum()
    phase_F = np.minimum(np.searchsorted(np.cumsum(durations), at, side="right"), len(phases) - 1)
    return np.array([list(state) for state in states])[phase_F]


def _shape(element: etree._Element, where: str) -> np.ndarray:
    try:
        points = [
            [float(value) for value in point.split(",")[:2]] for point in (element.get("shape") or "").split()
        ]
        shape = np.array(points, dtype=np.float64).reshape(-1, 2)
    except ValueError as error:
        raise InputRejectedError(where, "shape must be a list of x,y", str(error)) from None
    if not np.isfinite(shape).all():
        raise InputRejectedError(where, "shape must be finite")
    return shape[is_apart(shape)]


def _number(element: etree._Element, name: str, where: str, default: float | None = None) -> float:
    text = element.get(name)
    return default if text is None and default is not None else finite_number(text, where, name)


READER = Reader(units=units, read=read)
