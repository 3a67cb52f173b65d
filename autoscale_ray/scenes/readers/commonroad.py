"""Read CommonRoad scenarios (2018b and 2020a XML), a file, a folder or a zip archive.

Facts of the format: positions are box centres; a velocity is a scalar along the orientation; lanelet borders
are paired; speed limits are an element of the lanelet (2018b) or a traffic sign (2020a). The planning problem
holds only the start and goal of a vehicle that was removed, so every fully observed vehicle serves as ego.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.motion_fingerprint import motion_fingerprints
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import MAX_ROWS_IN_GAPS, Recording, Track, gather_tracks, no_lights
from autoscale_ray.scenes.road_map import Area, Lane, RoadMap, make_road_map
from autoscale_ray.scenes.trust import member_names, parse_xml, read_member
from autoscale_ray.scenes.xml_numbers import finite_number, finite_numbers, integer
from autoscale_ray.scenes.xml_records import Kind, Records, parse_with_records

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
_UNLIMITED = ("inf", "INF", "Infinity")
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
_RECORDS = (
    Kind("trajectory", "state"),
    Kind("initialState", before="<planningProblem"),
    Kind("leftBound", "point"),
    Kind("rightBound", "point"),
)
_XS, _YS = (etree.XPath(f"point/{axis}/text()", smart_strings=False) for axis in "xy")

_Parts = dict[str, list[etree._Element]]


def units(path: Path) -> list[str]:
    """Return the names of the XML files."""
    return member_names(path, ".xml")


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one scenario file.

    Raises:
        InputRejectedError: The file is no CommonRoad scenario of a known version, or an element of it is
            malformed.
    """
    content = read_member(path, name)
    found = parse_with_records(content, name, _RECORDS)
    if found is not None:
        try:
            recording = recording_of(found[0], name, found[1])
        except InputRejectedError:
            pass  # What is refused is named below, from the document as it stands.
        else:
            yield recording
            return
    yield recording_of(parse_xml(content, name), name)


def recording_of(root: etree._Element, name: str, taken: Mapping[str, Records] | None = None) -> Recording:
    """Turn a parsed scenario into a recording.

    Args:
        root: Element ``commonRoad``.
        name: File name; gives the scene ids and, before its first ``-``, the site.
        taken: What `parse_with_records` took out of the document, by element.
    """
    if root.tag != "commonRoad" or root.get("commonRoadVersion") not in VERSIONS:
        found = f"{root.tag} {root.get('commonRoadVersion')}"
        raise InputRejectedError(
            name, f"must be a commonRoad document of version {' or '.join(VERSIONS)}", found
        )
    stem = Path(name).stem
    site = stem.split("-")[0].removeprefix("C-")
    interval_s = finite_number(root.get("timeStepSize"), f"{name}: commonRoad", "timeStepSize")
    if not 0.001 <= interval_s <= 0.5:
        raise InputRejectedError(
            f"{name}: commonRoad", "timeStepSize must lie between 0.001 and 0.5 s", interval_s
        )
    tracks = _tracks(root, name, taken or {})
    road = _road(root, name, taken or {})
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


def _tracks(root: etree._Element, name: str, taken: Mapping[str, Records]) -> list[Track]:
    dynamic, static = list(root.iterchildren("dynamicObstacle")), list(root.iterchildren("staticObstacle"))
    for obstacle in root.iterchildren("obstacle"):
        (static if obstacle.findtext("role") == "static" else dynamic).append(obstacle)
    first_S6, later_S6 = (_fields(taken, element, name) for element in ("initialState", "trajectory"))
    states_of = _states
    if later_S6 is not None:
        states_of = partial(_first_and_later, first_S6, later_S6, taken["trajectory"].offsets)
    moving = _moving(dynamic, [states_of(obstacle, _where(name, obstacle)) for obstacle in dynamic], name)
    frames = [track.frames[[0, -1]] for track in moving]
    span = (int(min(f[0] for f in frames)), int(max(f[1] for f in frames))) if frames else (0, 0)
    # What stands is there all the time: one time step that is far off would ask for rows without number.
    num_standing = len(static) * (span[1] - span[0] + 1)
    num_recorded = sum(len(track.frames) for track in moving)
    if num_standing > MAX_ROWS_IN_GAPS + 10 * num_recorded:
        raise InputRejectedError(name, "time steps must not be so far apart", f"{span[0]} and {span[1]}")
    return moving + [_standing(obstacle, first_S6, _where(name, obstacle), *span) for obstacle in static]


def _where(name: str, element: etree._Element) -> str:
    return f"{name}: {element.tag} {element.get('id')}"


def _moving(obstacles: Sequence[etree._Element], states: Sequence[np.ndarray], name: str) -> list[Track]:
    """Return the track of every obstacle; states (n, 6) in the order of `_STATE_PATHS`."""
    if not obstacles:
        return []
    x_R, y_R, yaw_R, time_R, speed_R, acceleration_R = np.concatenate(states).T.copy()
    bounds = np.cumsum([0, *map(len, states)])
    frame_R = np.where(time_R < 1 << 53, time_R, -1.0).astype(np.int64)
    step_R = np.diff(frame_R, prepend=-1)
    step_R[bounds[:-1]] = 1
    wrong = np.flatnonzero((frame_R != time_R) | (frame_R < 0) | (step_R <= 0))
    if len(wrong):
        obstacle = obstacles[int(np.searchsorted(bounds, wrong[0], side="right")) - 1]
        raise InputRejectedError(_where(name, obstacle), "time steps must be ascending integers from 0 on")
    poses_R3 = np.column_stack([x_R, y_R, yaw_R])
    velocities_R2 = speed_R[:, None] * np.column_stack([np.cos(yaw_R), np.sin(yaw_R)])
    tracks = []
    for obstacle, low, high in zip(obstacles, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        where, found = _where(name, obstacle), _by_name(obstacle)
        kind = _kind(found)
        length_m, width_m = _box(found, where)
        track = Track(
            key=integer(obstacle.get("id"), where),
            kind=_KINDS.get(kind, "generic_object"),
            length_m=length_m,
            width_m=width_m,
            frames=frame_R[low:high],
            poses=poses_R3[low:high],
            velocities=velocities_R2[low:high],
            accelerations=acceleration_R[low:high],
            can_be_ego=kind in EGO_TYPES,
        )
        tracks.append(track)
    return tracks


def _kind(parts: _Parts) -> str:
    return (parts["type"][0].text if "type" in parts else None) or "unknown"


def _fields(taken: Mapping[str, Records], element: str, name: str) -> np.ndarray | None:
    """Return the states that were taken out of all such elements (S, 6) in the order of `_STATE_PATHS`; None where they
    stand in the document."""
    if element not in taken:
        return None
    paths, values_SC = taken[element].paths, taken[element].values_SC
    optional = _OPTIONAL if element == "initialState" else set()
    missing = [path for field, path in _STATE_PATHS.items() if path not in paths and field not in optional]
    if missing:
        raise InputRejectedError(name, "every state must have one value of each field", missing[0])
    columns = [paths.index(path) if path in paths else len(paths) for path in _STATE_PATHS.values()]
    return np.pad(values_SC, ((0, 0), (0, 1)), constant_values=math.nan)[:, columns]


def _first_and_later(
    first_S6: np.ndarray | None,
    later_S6: np.ndarray,
    offsets: np.ndarray,
    obstacle: etree._Element,
    where: str,
) -> np.ndarray:
    """Return what `_states` does, where the trajectories' states were taken out of the document."""
    first = _taken_first(first_S6, obstacle, where)
    if first is None:
        first = np.array([_first(obstacle, field, where) for field in _QUERIES])
    numbers = [int(trajectory.text) for trajectory in obstacle.iterchildren("trajectory")]
    if len(numbers) > 1:
        raise InputRejectedError(where, "must have one trajectory", len(numbers))
    return np.concatenate(
        [first[None], *(later_S6[offsets[number] : offsets[number + 1]] for number in numbers)]
    )


def _taken_first(first_S6: np.ndarray | None, obstacle: etree._Element, where: str) -> np.ndarray | None:
    """Return the first state (6,) where it was taken out of the document as one of `first_S6`."""
    if first_S6 is None:
        return None
    found = list(obstacle.iterchildren("initialState"))
    if len(found) != 1:
        raise InputRejectedError(where, "must have one initialState", len(found))
    return None if len(found[0]) else first_S6[int(found[0].text)]


def _first(obstacle: etree._Element, field: str, where: str) -> float:
    texts = _QUERIES[field](obstacle)
    if not texts and field in _OPTIONAL and obstacle.find(f"initialState/{field}") is None:
        return math.nan
    if len(texts) != 1:
        raise InputRejectedError(where, f"its first state must have one exact {field}", len(texts))
    return finite_number(texts[0], where, field)


def _states(obstacle: etree._Element, where: str) -> np.ndarray:
    """Return one row for every state (n, 6); all NaN where no state has an optional value."""
    trajectory = next(obstacle.iterchildren("trajectory"), None)
    count = 1 + (0 if trajectory is None else len(trajectory))
    texts = {field: query(obstacle) for field, query in _QUERIES.items()}
    columns = [_state(obstacle, field, texts[field], count, where) for field in texts]
    return np.column_stack(columns)


def _state(obstacle: etree._Element, field: str, texts: list[str], count: int, where: str) -> np.ndarray:
    if len(texts) != count and not (field in _OPTIONAL and not texts):
        rule = f"each of its {count} states must have one exact {field}"
        # A first state without acceleration is common and harmless.
        if field in _OPTIONAL and len(texts) == count - 1 and obstacle.find(f"initialState/{field}") is None:
            return np.concatenate([[math.nan], finite_numbers(texts, where, field)])
        raise InputRejectedError(where, rule, len(texts))
    return finite_numbers(texts, where, field) if texts else np.full(count, math.nan)


def _standing(
    obstacle: etree._Element, first_S6: np.ndarray | None, where: str, first: int, last: int
) -> Track:
    if obstacle.find("trajectory") is not None:
        raise InputRejectedError(where, "stands, so it must have no trajectory")
    taken = _taken_first(first_S6, obstacle, where)
    x, y, yaw = (
        _state(obstacle, field, _QUERIES[field](obstacle), 1, where)[0] if taken is None else taken[column]
        for column, field in enumerate(("x", "y", "orientation"))
    )
    found = _by_name(obstacle)
    length_m, width_m = _box(found, where)
    num_frames = last - first + 1
    return Track(
        key=integer(obstacle.get("id"), where),
        kind=_KINDS.get(_kind(found), "generic_object"),
        length_m=length_m,
        width_m=width_m,
        frames=np.arange(first, last + 1),
        poses=np.tile([x, y, yaw], (num_frames, 1)),
        velocities=np.zeros((num_frames, 2)),
        accelerations=np.zeros(num_frames),
    )


def _box(parts: _Parts, where: str) -> tuple[float, float]:
    forms: dict[str, etree._Element] = {}
    for shape in parts.get("shape", ()):
        for form in shape:
            forms.setdefault(form.tag, form)
    if "rectangle" in forms:
        length, width = (
            finite_number(forms["rectangle"].findtext(side), where, side) for side in ("length", "width")
        )
    elif "circle" in forms:
        length = width = 2.0 * finite_number(forms["circle"].findtext("radius"), where, "radius")
    elif "polygon" in forms:
        length, width = 2.0 * np.abs(_points(forms["polygon"], where)).max(axis=0)
    else:
        raise InputRejectedError(where, "shape must be a rectangle, circle or polygon")
    return float(length), float(width)


def _road(root: etree._Element, name: str, taken: Mapping[str, Records]) -> RoadMap:
    limits = _sign_limits(root, name)
    crossing = {
        child.get("ref") for child in root.iterfind("intersection/incoming/*") if "successors" in child.tag
    }
    lanelets = list(root.iterchildren("lanelet"))
    parts = [_by_name(lanelet) for lanelet in lanelets]
    lanes, areas = [], []
    borders = zip(
        *(_bounds(lanelets, parts, side, name, taken.get(side)) for side in ("leftBound", "rightBound")),
        strict=True,
    )
    for lanelet, found, (left, right) in zip(lanelets, parts, borders, strict=True):
        where = _where(name, lanelet)
        if len(left) != len(right) or len(left) < 2:
            raise InputRejectedError(
                where, "borders must have the same number of points, at least 2", len(left)
            )
        kinds = {child.text for child in found.get("laneletType", ())}
        if "crosswalk" in kinds:
            areas.append(Area(layer="crosswalk", ring=np.concatenate([left, right[::-1]])))
        elif not kinds & _NO_ROAD:
            lanes.append(_lane(lanelet.get("id"), found, left, right, limits, crossing, where))
    return make_road_map(lanes, areas)


def _by_name(element: etree._Element) -> _Parts:
    """Return the children of an element by their names; asking for each name apart takes several times as long."""
    found: _Parts = {}
    for child in element:
        found.setdefault(child.tag, []).append(child)
    return found


def _bounds(
    lanelets: Sequence[etree._Element], parts: Sequence[_Parts], side: str, name: str, taken: Records | None
) -> list[np.ndarray]:
    """Return one border of every lanelet (n, 2), taken out of the document or as it stands there."""
    for lanelet, found in zip(lanelets, parts, strict=True):
        if side not in found:
            raise InputRejectedError(_where(name, lanelet), f"must have a {side}")
    if taken is not None:
        return _taken_points(taken, [int(found[side][0].text) for found in parts], name)
    return [
        _points(found[side][0], _where(name, lanelet)) for lanelet, found in zip(lanelets, parts, strict=True)
    ]


def _taken_points(taken: Records, numbers: Sequence[int], name: str) -> list[np.ndarray]:
    """Return the points (n, 2) of the elements with some numbers."""
    if not {"x", "y"} <= set(taken.paths):
        raise InputRejectedError(name, "every point must have x and y")
    points_S2 = np.column_stack([taken.values_SC[:, taken.paths.index(axis)] for axis in "xy"])
    return [points_S2[taken.offsets[number] : taken.offsets[number + 1]] for number in numbers]


def _lane(
    key: str | None,
    found: _Parts,
    left: np.ndarray,
    right: np.ndarray,
    limits: dict[str | None, float],
    crossing: set[str | None],
    where: str,
) -> Lane:
    limit_text = found["speedLimit"][0].text if "speedLimit" in found else None
    references = [reference.get("ref") for reference in found.get("trafficSignRef", ())]
    limit = min((limits[reference] for reference in references if reference in limits), default=math.nan)
    if limit_text:
        is_unlimited = limit_text.strip() in _UNLIMITED
        limit = math.nan if is_unlimited else finite_number(limit_text, where, "speedLimit")
    return Lane(
        key=key,
        left=left,
        right=right,
        successors=tuple(child.get("ref") for child in found.get("successor", ())),
        left_neighbour=_same_direction(found.get("adjacentLeft", ())),
        right_neighbour=_same_direction(found.get("adjacentRight", ())),
        speed_limit_mps=limit,
        is_connector=key in crossing if crossing else None,
    )


def _same_direction(neighbours: Sequence[etree._Element]) -> str | None:
    same = bool(neighbours) and neighbours[0].get("drivingDir") == "same"
    return neighbours[0].get("ref") if same else None


def _sign_limits(root: etree._Element, name: str) -> dict[str | None, float]:
    limits = {}
    for sign in root.iterchildren("trafficSign"):
        for element in sign.iterchildren("trafficSignElement"):
            if element.findtext("trafficSignID") in _SPEED_SIGNS and element.findtext("additionalValue"):
                where = _where(name, sign)
                limits[sign.get("id")] = finite_number(
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
    number = road.lane_number
    red_FL = no_lights(road, num_frames)
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
        (phase.findtext("color"), integer(phase.findtext("duration"), where))
        for phase in light.iterfind("cycle/cycleElement")
    ]
    durations = [duration for _, duration in phases]
    steps = sum(durations)
    if min(durations, default=0) < 0 or steps > 1_000_000:
        raise InputRejectedError(where, "cycle must last 0 to 1000000 steps, each phase 0 or more", durations)
    pattern = np.concatenate(
        [np.zeros(0, dtype=bool), *[np.full(num, color == "red") for color, num in phases]]
    )
    offset = light.findtext("cycle/timeOffset")
    return (pattern if steps else np.zeros(1, dtype=bool)), integer(offset, where) if offset else 0


def _tags(root: etree._Element) -> tuple[str, ...]:
    return tuple((root.get("tags") or "").split()) + tuple(
        str(tag.tag) for tag in root.iterfind("scenarioTags/*")
    )


def _points(element: etree._Element, where: str) -> np.ndarray:
    """Return the points of an element (n, 2)."""
    xs, ys = _XS(element), _YS(element)
    if len(xs) != len(ys) or not xs:
        raise InputRejectedError(where, f"every point of {element.tag} must have x and y")
    return np.column_stack(np.split(finite_numbers(xs + ys, where, "x and y"), 2))


READER = Reader(units=units, read=read, fingerprints=motion_fingerprints)
