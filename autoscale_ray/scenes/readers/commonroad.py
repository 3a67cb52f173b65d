"""Read CommonRoad scenarios (2018b and 2020a XML), a file, a folder or a zip archive.

Facts of the format: positions are box centres; a velocity is a scalar along the orientation; lanelet borders
are paired; speed limits are an element of the lanelet (2018b) or a traffic sign (2020a). The planning problem
holds only the start and goal of a vehicle that was removed, so every fully observed vehicle serves as ego.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.motion_fingerprint import motion_fingerprints
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import Recording, Track, gather_tracks
from autoscale_ray.scenes.road_map import Area, Lane, RoadMap, make_road_map
from autoscale_ray.scenes.trust import member_names, parse_xml, read_member

VERSIONS = ("2018b", "2020a")
EGO_TYPES = ("car", "truck", "bus", "taxi", "priorityVehicle")
_KINDS = {
    **dict.fromkeys((*EGO_TYPES, "motorcycle", "parkedVehicle", "train"), "vehicle"),
    "bicycle": "bicycle",
    "pedestrian": "pedestrian",
    "constructionZone": "czone_sign",
    "roadBoundary": "barrier",
    "median_strip": "barrier",
}
_NO_ROAD = {"sidewalk", "bicycleLane", "border"}
_SPEED_SIGNS = {"274", "274.1", "R2-1", "R301"}
_STATE_PATHS = {
    "x": "position/point/x",
    "y": "position/point/y",
    "orientation": "orientation/exact",
    "time": "time/exact",
    "velocity": "velocity/exact",
    "acceleration": "acceleration/exact",
}
_OPTIONAL = {"velocity", "acceleration"}
_QUERIES = {
    name: etree.XPath(f"initialState/{path}/text() | trajectory/state/{path}/text()", smart_strings=False)
    for name, path in _STATE_PATHS.items()
}
_XS, _YS = (etree.XPath(f"point/{axis}/text()", smart_strings=False) for axis in "xy")


def units(path: Path) -> list[str]:
    """Return the names of the XML files."""
    return member_names(path, ".xml")


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one scenario file.

    Raises:
        InputRejectedError: The file is no CommonRoad scenario of a known version, or an element of it is
            malformed.
    """
    yield recording_of(parse_xml(read_member(path, name), name), name)


def recording_of(root: etree._Element, name: str) -> Recording:
    """Turn a parsed scenario into a recording.

    Args:
        root: Element ``commonRoad``.
        name: File name; gives the scene ids and, before its first ``-``, the site.
    """
    if root.tag != "commonRoad" or root.get("commonRoadVersion") not in VERSIONS:
        found = f"{root.tag} {root.get('commonRoadVersion')}"
        raise InputRejectedError(
            name, f"must be a commonRoad document of version {' or '.join(VERSIONS)}", found
        )
    stem = Path(name).stem
    site = stem.split("-")[0].removeprefix("C-")
    interval_s = _number(root.get("timeStepSize"), f"{name}: commonRoad", "timeStepSize")
    if not 0.001 <= interval_s <= 0.5:
        raise InputRejectedError(
            f"{name}: commonRoad", "timeStepSize must lie between 0.001 and 0.5 s", interval_s
        )
    tracks = _tracks(root, name)
    road = _road(root, name)
    return Recording(
        name=stem,
        log_id=f"commonroad/{stem}",
        source=f"commonroad/{site}",
        tracks=gather_tracks(tracks),
        frame_interval_s=interval_s,
        road=road,
        red_FL=_red_lights(root, name, road, tracks),
        tags=_tags(root),
    )


def _tracks(root: etree._Element, name: str) -> list[Track]:
    dynamic, static = list(root.iterchildren("dynamicObstacle")), list(root.iterchildren("staticObstacle"))
    for obstacle in root.iterchildren("obstacle"):
        (static if obstacle.findtext("role") == "static" else dynamic).append(obstacle)
    moving = [
        track for obstacle in dynamic if (track := _moving(obstacle, _where(name, obstacle))) is not None
    ]
    frames = [track.frames[[0, -1]] for track in moving]
    span = (min(f[0] for f in frames), max(f[1] for f in frames)) if frames else (0, 0)
    return moving + [_standing(obstacle, _where(name, obstacle), *span) for obstacle in static]


def _where(name: str, element: etree._Element) -> str:
    return f"{name}: {element.tag} {element.get('id')}"


def _moving(obstacle: etree._Element, where: str) -> Track | None:
    trajectory = next(obstacle.iterchildren("trajectory"), None)
    count = 1 + (0 if trajectory is None else len(trajectory))
    states = _states(obstacle, count, where)
    frames = np.where(states["time"] < 1 << 53, states["time"], -1.0).astype(np.int64)
    if not np.array_equal(frames, states["time"]) or (np.diff(frames) <= 0).any() or frames[0] < 0:
        raise InputRejectedError(where, "time steps must be ascending integers from 0 on")
    yaw = states["orientation"]
    speed = states["velocity"][:, None]
    kind = _kind(obstacle)
    length_m, width_m = _box(obstacle, where)
    return Track(
        key=_integer(obstacle.get("id"), where),
        kind=_KINDS.get(kind, "generic_object"),
        length_m=length_m,
        width_m=width_m,
        frames=frames,
        poses=np.column_stack([states["x"], states["y"], yaw]),
        velocities=speed * np.column_stack([np.cos(yaw), np.sin(yaw)]),
        accelerations=states["acceleration"],
        can_be_ego=kind in EGO_TYPES,
    )


def _kind(obstacle: etree._Element) -> str:
    return obstacle.findtext("type") or "unknown"


def _states(obstacle: etree._Element, count: int, where: str) -> dict[str, np.ndarray]:
    """Return one value of every state by field; all NaN where no state has an optional value."""
    texts = {field: query(obstacle) for field, query in _QUERIES.items()}
    if all(len(found) == count for found in texts.values()):
        values = _parsed([text for found in texts.values() for text in found])
        if values is not None and np.isfinite(values).all():
            return dict(zip(texts, values.reshape(len(texts), count), strict=True))
    return {field: _state(obstacle, field, texts[field], count, where) for field in texts}


def _state(obstacle: etree._Element, field: str, texts: list[str], count: int, where: str) -> np.ndarray:
    if len(texts) != count and not (field in _OPTIONAL and not texts):
        rule = f"each of its {count} states must have one exact {field}"
        # A first state without acceleration is common and harmless.
        if field in _OPTIONAL and len(texts) == count - 1 and obstacle.find(f"initialState/{field}") is None:
            return np.concatenate([[math.nan], _numbers(texts, where, field)])
        raise InputRejectedError(where, rule, len(texts))
    return _numbers(texts, where, field) if texts else np.full(count, math.nan)


def _standing(obstacle: etree._Element, where: str, first: int, last: int) -> Track:
    x, y, yaw = (
        _state(obstacle, field, _QUERIES[field](obstacle), 1, where)[0] for field in ("x", "y", "orientation")
    )
    length_m, width_m = _box(obstacle, where)
    num_frames = last - first + 1
    return Track(
        key=_integer(obstacle.get("id"), where),
        kind=_KINDS.get(_kind(obstacle), "generic_object"),
        length_m=length_m,
        width_m=width_m,
        frames=np.arange(first, last + 1),
        poses=np.tile([x, y, yaw], (num_frames, 1)),
        velocities=np.zeros((num_frames, 2)),
        accelerations=np.zeros(num_frames),
    )


def _box(obstacle: etree._Element, where: str) -> tuple[float, float]:
    forms: dict[str, etree._Element] = {}
    for shape in obstacle.iterchildren("shape"):
        for form in shape:
            forms.setdefault(form.tag, form)
    if "rectangle" in forms:
        length, width = (
            _number(forms["rectangle"].findtext(side), where, side) for side in ("length", "width")
        )
    elif "circle" in forms:
        length = width = 2.0 * _number(forms["circle"].findtext("radius"), where, "radius")
    elif "polygon" in forms:
        length, width = 2.0 * np.abs(_points(forms["polygon"], where)).max(axis=0)
    else:
        raise InputRejectedError(where, "shape must be a rectangle, circle or polygon")
    return float(length), float(width)


def _road(root: etree._Element, name: str) -> RoadMap:
    limits = _sign_limits(root, name)
    crossing = {
        child.get("ref") for child in root.iterfind("intersection/incoming/*") if "successors" in child.tag
    }
    lanes, areas = [], []
    for lanelet in root.iterchildren("lanelet"):
        where = _where(name, lanelet)
        kinds = {child.text for child in lanelet.iterchildren("laneletType")}
        left, right = _bound(lanelet, "leftBound", where), _bound(lanelet, "rightBound", where)
        if len(left) != len(right) or len(left) < 2:
            raise InputRejectedError(
                where, "borders must have the same number of points, at least 2", len(left)
            )
        if "crosswalk" in kinds:
            areas.append(Area(layer="crosswalk", ring=np.concatenate([left, right[::-1]])))
        elif not kinds & _NO_ROAD:
            lanes.append(_lane(lanelet, left, right, limits, crossing, where))
    keys = [lane.key for lane in lanes]
    if len(set(keys)) < len(keys):
        raise InputRejectedError(name, "lanelet ids must be unique")
    return make_road_map(lanes, areas)


def _lane(
    lanelet: etree._Element,
    left: np.ndarray,
    right: np.ndarray,
    limits: dict[str | None, float],
    crossing: set[str | None],
    where: str,
) -> Lane:
    limit_text = lanelet.findtext("speedLimit")
    signs = [
        limits[ref.get("ref")] for ref in lanelet.iterchildren("trafficSignRef") if ref.get("ref") in limits
    ]
    limit = (
        _number(limit_text, where, "speedLimit", infinite=True)
        if limit_text
        else min(signs, default=math.nan)
    )
    return Lane(
        key=lanelet.get("id"),
        left=left,
        right=right,
        successors=tuple(child.get("ref") for child in lanelet.iterchildren("successor")),
        left_neighbour=_same_direction(lanelet, "adjacentLeft"),
        right_neighbour=_same_direction(lanelet, "adjacentRight"),
        speed_limit_mps=limit if math.isfinite(limit) else math.nan,
        is_connector=lanelet.get("id") in crossing if crossing else None,
    )


def _same_direction(lanelet: etree._Element, tag: str) -> str | None:
    neighbour = lanelet.find(tag)
    return neighbour.get("ref") if neighbour is not None and neighbour.get("drivingDir") == "same" else None


def _sign_limits(root: etree._Element, name: str) -> dict[str | None, float]:
    limits = {}
    for sign in root.iterchildren("trafficSign"):
        for element in sign.iterchildren("trafficSignElement"):
            if element.findtext("trafficSignID") in _SPEED_SIGNS and element.findtext("additionalValue"):
                where = _where(name, sign)
                limits[sign.get("id")] = _number(
                    element.findtext("additionalValue"), where, "additionalValue"
                )
    return limits


def _red_lights(root: etree._Element, name: str, road: RoadMap, tracks: Sequence[Track]) -> np.ndarray | None:
    """Return when the lanes behind each light are red (F, L); a light stands at the end of the lanelets
    naming it."""
    cycles = {light.get("id"): _red_steps(light, name) for light in root.iterchildren("trafficLight")}
    if not cycles or not tracks:
        return None
    num_frames = 1 + max(int(track.frames[-1]) for track in tracks)
    number = {key: lane for lane, key in enumerate(road.keys)}
    red_FL = np.zeros((num_frames, road.num_lanes), dtype=bool)
    for lanelet in root.iterchildren("lanelet"):
        behind = [
            number[child.get("ref")]
            for child in lanelet.iterchildren("successor")
            if child.get("ref") in number
        ]
        for reference in lanelet.iterchildren("trafficLightRef"):
            pattern, offset = cycles.get(reference.get("ref"), (np.zeros(1, dtype=bool), 0))
            red_F = pattern[(np.arange(num_frames) - offset) % len(pattern)]
            red_FL[:, behind] |= red_F[:, None]
    return red_FL


def _red_steps(light: etree._Element, name: str) -> tuple[np.ndarray, int]:
    """Return which steps of the light's cycle are red, and the step at which the cycle begins."""
    where = _where(name, light)
    phases = [
        (phase.findtext("color"), _integer(phase.findtext("duration"), where))
        for phase in light.iterfind("cycle/cycleElement")
    ]
    steps = sum(duration for _, duration in phases)
    if not 0 <= steps <= 1_000_000:
        raise InputRejectedError(where, "cycle must last at most 1000000 steps", steps)
    pattern = np.concatenate(
        [np.zeros(0, dtype=bool), *[np.full(num, color == "red") for color, num in phases]]
    )
    offset = light.findtext("cycle/timeOffset")
    return (pattern if steps else np.zeros(1, dtype=bool)), _integer(offset, where) if offset else 0


def _tags(root: etree._Element) -> tuple[str, ...]:
    return tuple((root.get("tags") or "").split()) + tuple(
        str(tag.tag) for tag in root.iterfind("scenarioTags/*")
    )


def _bound(lanelet: etree._Element, tag: str, where: str) -> np.ndarray:
    bound = next(lanelet.iterchildren(tag), None)
    if bound is None:
        raise InputRejectedError(where, f"must have a {tag}")
    return _points(bound, where)


def _points(element: etree._Element, where: str) -> np.ndarray:
    xs, ys = _XS(element), _YS(element)
    if len(xs) != len(ys) or not xs:
        raise InputRejectedError(where, f"every point of {element.tag} must have x and y")
    return np.ascontiguousarray(_numbers(xs + ys, where, "x and y").reshape(2, -1).T)


def _parsed(texts: list[str]) -> np.ndarray | None:
    try:
        # Several times as fast as an array of texts that is cast.
        return np.fromiter(map(float, texts), dtype=np.float64, count=len(texts))
    except ValueError:
        return None


def _numbers(texts: list[str], where: str, field: str) -> np.ndarray:
    values = _parsed(texts)
    if values is None:
        raise InputRejectedError(where, f"{field} must be a number", next(filter(_is_no_number, texts)))
    if not np.isfinite(values).all():
        raise InputRejectedError(where, f"{field} must be finite")
    return values


def _is_no_number(text: str) -> bool:
    return _parsed([text]) is None


def _number(text: str | None, where: str, field: str, *, infinite: bool = False) -> float:
    if infinite and text is not None and text.strip() in ("inf", "INF", "Infinity"):
        return math.inf
    return float(_numbers([text or ""], where, field)[0])


def _integer(text: str | None, where: str) -> int:
    try:
        value = int(text or "")
    except ValueError:
        raise InputRejectedError(where, "must be an integer", text) from None
    if abs(value) >= 1 << 62:
        raise InputRejectedError(where, "must be a 63-bit integer", text)
    return value


def fingerprints(recording: Recording) -> np.ndarray:
    """Return hashes of every stretch of motion, by which overlapping cuts of one recording are found."""
    return motion_fingerprints(recording.tracks)


READER = Reader(
    title="CommonRoad scenarios, 2018b and 2020a XML",
    units=units,
    read=read,
    fingerprints=fingerprints,
)
