"""Read INTERACTION-style track files (CSV) with Lanelet2 maps; the FZI test area recordings have this layout.

``recorded_trackfiles/<place>/vehicle_tracks_*.csv`` with ``meta_data.csv`` beside it and ``maps/<place>.osm``.
Columns are read by name, because their order differs. Velocities are differenced from the positions: in the FZI
recordings at hand the given ones point against the motion (k733_2018-05-02) or are 0.57 times as fast
(k733_2020-09-15), while the motion of the positions agrees with the lanes. Headings that contradict that motion (half
of k733_2018-05-02 is turned by 180 degrees) are replaced by its direction. A frame in which a track stands twice is
taken as not recorded.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.readers.kitti import mercator
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import Recording, Track, gather_tracks
from autoscale_ray.scenes.road_map import Area, Lane, RoadMap, make_road_map, pair_borders
from autoscale_ray.scenes.trust import parse_xml, read_file

_NUMBERS = ("track_id", "timestamp_ms", "x", "y", "psi_rad", "length", "width")
_KINDS = {
    **dict.fromkeys(("car", "truck", "bus", "van", "motorcycle"), "vehicle"),
    **dict.fromkeys(("pedestrian", "pedestrian/bicycle"), "pedestrian"),
    **dict.fromkeys(("bicycle", "bike", "cyclist"), "bicycle"),
}
_EGO_TYPES = ("car", "truck", "bus", "van")
MOVING_MPS = 0.5
CLEARLY_MOVING_MPS = 2.0
MOTION_HALF_WIDTH_S = 0.5
MAX_CONTRADICTING_SHARE = 0.05
MAX_NUMBER = 1e15
"""Times in ms and ids up to here are whole numbers of 64 bits."""


def units(path: Path) -> list[str]:
    """Return the names of the vehicle track files."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("vehicle_tracks_*.csv"))


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one track file.

    Raises:
        InputRejectedError: The tracks, their metadata or the map are missing or malformed.
    """
    file = path / name
    place = file.parent.name
    rows = read_rows(file)
    interval_s, origin = _metadata(file.parent / "meta_data.csv", place)
    maps = [folder / "maps" / f"{place}.osm" for folder in (path, *file.parents)]
    osm = next((candidate for candidate in maps if candidate.exists()), None)
    if osm is None:
        raise InputRejectedError(name, f"needs the Lanelet2 map maps/{place}.osm")
    road = read_lanelet2(parse_xml(read_file(osm), osm.name), osm.name, *origin)
    recording = f"{place}-{file.stem.rsplit('_', 1)[-1]}"
    yield Recording(
        name=recording,
        log_id=f"interaction/{recording}",
        source=f"interaction/{place.split('_')[0]}",
        tracks=gather_tracks(list(_tracks(rows, interval_s, name))),
        frame_interval_s=interval_s,
        road=road,
        tags=(place,),
    )


def read_rows(file: Path) -> dict[str, np.ndarray]:
    """Return the columns of a track file by name.

    Raises:
        InputRejectedError: A column is missing or holds something else than finite numbers.
    """
    rows = _csv_rows(file)
    missing = [name for name in (*_NUMBERS, "agent_type") if rows and name not in rows[0]]
    if missing or not rows:
        raise InputRejectedError(file.name, "must have rows and its columns", missing)
    columns: dict[str, np.ndarray] = {
        "agent_type": np.array([row["agent_type"].strip().lower() for row in rows])
    }
    for name in _NUMBERS:
        columns[name] = _numbers([row[name] for row in rows], f"{file.name}: {name}")
    return columns


def _csv_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV table by column, blanks around the names left out."""
    text = read_file(file).decode("utf-8", errors="replace")
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True))
    except csv.Error as error:
        raise InputRejectedError(file.name, "must be a CSV table", str(error)) from None
    names, *rows = [line for line in lines if line] or [[]]
    return [
        dict(zip([name.strip() for name in names], row + [""] * len(names), strict=False)) for row in rows
    ]


def _numbers(texts: list[str], where: str) -> np.ndarray:
    try:
        values = np.array([text.strip().lstrip("P") for text in texts], dtype=np.float64)
    except ValueError as error:
        raise InputRejectedError(where, "must be numbers", str(error)) from None
    if not (np.abs(values) <= MAX_NUMBER).all():
        raise InputRejectedError(where, f"must be finite, at most {MAX_NUMBER:.0e}")
    return values


def _metadata(file: Path, place: str) -> tuple[float, tuple[float, float]]:
    """Return the frame interval and the latitude and longitude of the map's origin."""
    first = next(iter(_csv_rows(file)), {})
    where = f"{place}: meta_data.csv"
    try:
        rate, latitude, longitude = (float(first[key]) for key in ("frameRate_hz", "originLat", "originLon"))
    except (KeyError, ValueError) as error:
        raise InputRejectedError(
            where, "must have frameRate_hz, originLat and originLon", str(error)
        ) from None
    if not 2.0 <= rate <= 100.0:
        raise InputRejectedError(where, "frame rate must be 2 to 100 Hz", rate)
    _check_degrees(np.array([latitude]), np.array([longitude]), where)
    return 1.0 / rate, (latitude, longitude)


def _tracks(rows: Mapping[str, np.ndarray], interval_s: float, where: str) -> Iterator[Track]:
    frames = np.round(rows["timestamp_ms"] / (interval_s * 1e3)).astype(np.int64)
    order = np.lexsort((frames, rows["track_id"]))
    bounds = np.flatnonzero(np.diff(rows["track_id"][order], prepend=np.nan, append=np.nan) != 0)
    runs = [_once(order[low:high], frames) for low, high in itertools.pairwise(bounds)]
    runs = [run for run in runs if len(run)]
    if not runs:
        raise InputRejectedError(where, "must have a track that stands once in a frame")
    motions = [motion(rows["x"][run], rows["y"][run], frames[run], interval_s) for run in runs]
    trusted = _headings_agree(np.concatenate(motions), rows["psi_rad"][np.concatenate(runs)])
    for run, velocities in zip(runs, motions, strict=True):
        given = rows["psi_rad"][run]
        yaw = given if trusted else heading_of_motion(velocities, given)
        kind = str(rows["agent_type"][run[0]])
        yield Track(
            key=int(rows["track_id"][run[0]]),
            kind=_KINDS.get(kind, "generic_object"),
            length_m=float(rows["length"][run[0]]),
            width_m=float(rows["width"][run[0]]),
            frames=frames[run],
            poses=np.column_stack([rows["x"][run], rows["y"][run], yaw]),
            can_be_ego=kind in _EGO_TYPES,
        )


def _once(run: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Return the rows of a track whose frame occurs once."""
    _, first, counts = np.unique(frames[run], return_index=True, return_counts=True)
    return run[first[counts == 1]]


def motion(x: np.ndarray, y: np.ndarray, frames: np.ndarray, interval_s: float) -> np.ndarray:
    """Return the mean velocity (n, 2) of a track over half a second before and after each row, fewer at its ends."""
    half = max(1, round(MOTION_HALF_WIDTH_S / interval_s))
    low = np.searchsorted(frames, frames - half)
    high = np.searchsorted(frames, frames + half, side="right") - 1
    elapsed = np.maximum(frames[high] - frames[low], 1) * interval_s
    return np.column_stack([(x[high] - x[low]) / elapsed, (y[high] - y[low]) / elapsed])


def _headings_agree(velocities: np.ndarray, yaw: np.ndarray) -> bool:
    """Tell whether the headings follow the motion in nearly all rows that move clearly."""
    moving = np.hypot(*velocities.T) >= CLEARLY_MOVING_MPS
    direction = np.arctan2(velocities[moving, 1], velocities[moving, 0])
    against = np.abs(wrap_angle(direction - yaw[moving])) > math.pi / 2.0
    return not moving.any() or float(against.mean()) <= MAX_CONTRADICTING_SHARE


def heading_of_motion(velocities: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Return the direction of motion of one track; while it stands, the last one before, else the first one
    after.

    Args:
        velocities: (n, 2).
        fallback: (n,) headings for a track that never moves.
    """
    moving = np.flatnonzero(np.hypot(*velocities.T) >= MOVING_MPS)
    if len(moving) == 0:
        return fallback
    last = moving[np.maximum(np.searchsorted(moving, np.arange(len(velocities)), side="right") - 1, 0)]
    return np.arctan2(velocities[last, 1], velocities[last, 0])


def read_lanelet2(root: etree._Element, name: str, latitude_deg: float, longitude_deg: float) -> RoadMap:
    """Turn a Lanelet2 map into a road map, in metres east and north of an origin.

    Borders are turned so that the left one lies left of the driving direction. A lanelet follows another when
    both its borders begin at the points where the other's end; two are neighbours when they share a border in
    one direction.

    Args:
        root: Element ``osm``.
        name: File name for messages.
        latitude_deg: Origin.
        longitude_deg: Origin.
    """
    nodes = _nodes(root, name, latitude_deg, longitude_deg)
    ways = {
        way.get("id"): [node.get("ref") for node in way.iterchildren("nd")]
        for way in root.iterchildren("way")
    }
    lanes, areas, borders = [], [], {}
    for relation in root.iterchildren("relation"):
        tags = {tag.get("k"): tag.get("v") for tag in relation.iterchildren("tag")}
        where = f"{name}: relation {relation.get('id')}"
        if tags.get("type") != "lanelet":
            continue
        left, right = _oriented(
            *(_border(relation, role, ways, where) for role in ("left", "right")),
            nodes,
            where,  # pyright: ignore[reportArgumentType]
        )
        points = pair_borders(*(np.array([nodes[key] for key in side]) for side in (left, right)))  # pyright: ignore[reportArgumentType]
        if tags.get("subtype") in ("crosswalk", "walkway"):
            areas.append(Area(layer="crosswalk", ring=np.concatenate([points[0], points[1][::-1]])))
        elif tags.get("subtype") not in ("bicycle_lane", "stairs", "shared_walkway"):
            borders[relation.get("id")] = (tuple(left), tuple(right))
            lanes.append((relation.get("id"), points, _speed_mps(tags)))
    return make_road_map([_lane(*lane, borders) for lane in lanes], areas)  # pyright: ignore[reportArgumentType]


def _lane(
    key: str, points: tuple[np.ndarray, np.ndarray], limit: float, borders: Mapping[str, tuple]
) -> Lane:
    left, right = borders[key]
    return Lane(
        key=key,
        left=points[0],
        right=points[1],
        successors=tuple(
            other
            for other, (a, b) in borders.items()
            if other != key and (a[0], b[0]) == (left[-1], right[-1])
        ),
        left_neighbour=next((other for other, (_, b) in borders.items() if b == left), None),
        right_neighbour=next((other for other, (a, _) in borders.items() if a == right), None),
        speed_limit_mps=limit,
    )


def _nodes(
    root: etree._Element, name: str, latitude_deg: float, longitude_deg: float
) -> dict[str | None, np.ndarray]:
    keys = [node.get("id") for node in root.iterchildren("node")]
    texts = [(node.get("lat"), node.get("lon")) for node in root.iterchildren("node")]
    latitude, longitude = (_numbers([str(pair[k]) for pair in texts], f"{name}: node") for k in range(2))
    _check_degrees(latitude, longitude, f"{name}: node")
    east, north = mercator(latitude, longitude, latitude_deg)
    east_0, north_0 = mercator(np.array([latitude_deg]), np.array([longitude_deg]), latitude_deg)
    return dict(zip(keys, np.column_stack([east - east_0, north - north_0]), strict=True))


def _check_degrees(latitude: np.ndarray, longitude: np.ndarray, where: str) -> None:
    if not ((np.abs(latitude) <= 85.0) & (np.abs(longitude) <= 360.0)).all():
        raise InputRejectedError(where, "latitude must be at most 85 degrees, longitude at most 360")


def _border(relation: etree._Element, role: str, ways: Mapping[str | None, list], where: str) -> list:
    found = [member.get("ref") for member in relation.iterchildren("member") if member.get("role") == role]
    if not found or any(len(ways.get(way, ())) < 2 for way in found):
        raise InputRejectedError(where, f"must have a {role} border of at least 2 points")
    chain = list(ways[found[0]])
    for way in found[1:]:
        part = list(ways[way])
        chain += part[1:] if part[0] == chain[-1] else part[::-1][1:] if part[-1] == chain[-1] else part
    return chain


def _oriented(
    left: list, right: list, nodes: Mapping[str | None, np.ndarray], where: str
) -> tuple[list, list]:
    missing = [key for key in (*left, *right) if key not in nodes]
    if missing:
        raise InputRejectedError(where, "border names a node that is not in the map", missing[0])
    one, two = (np.array([nodes[key] for key in side]) for side in (left, right))
    same = np.linalg.norm(one[0] - two[0]) + np.linalg.norm(one[-1] - two[-1])
    crossed = np.linalg.norm(one[0] - two[-1]) + np.linalg.norm(one[-1] - two[0])
    if crossed < same:
        right, two = right[::-1], two[::-1]
    ring = np.concatenate([one, two[::-1]])
    area = np.dot(ring[:, 0], np.roll(ring[:, 1], -1)) - np.dot(ring[:, 1], np.roll(ring[:, 0], -1))
    # Left border forwards and right border backwards run clockwise around the lane.
    return (left, right) if area <= 0.0 else (left[::-1], right[::-1])


def _speed_mps(tags: Mapping[str | None, str | None]) -> float:
    text = (tags.get("speed_limit") or tags.get("maxspeed") or "").removesuffix("km/h").strip()
    try:
        return float(text) / 3.6
    except ValueError:
        return math.nan


READER = Reader(units=units, read=read)
