"""Read Waymo Open Motion scenarios (TFRecord files of Scenario messages) without TensorFlow.

Facts of the format: 91 steps of 0.1 s, box centres, map axes with an arbitrary origin; lane centres every half metre
with the parts of their borders as other features; lanes within intersections have no borders; ids in exit_lanes may
lie outside the scenario. tf.Example files hold the same scenarios without the links between lanes and are refused.
Only the fields that are read are described below; protobuf's own decoder skips the others.

Shape legend: F frames, L lanes, n points of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import shapely

from autoscale_ray.errors import InputRejectedError, MissingExtraError
from autoscale_ray.scenes.motion_fingerprint import motion_fingerprints
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import Recording, Track, gather_tracks, no_lights
from autoscale_ray.scenes.road_map import Area, Lane, RoadMap, is_apart, make_road_map, offset_borders
from autoscale_ray.scenes.tfrecord import records

FRAME_INTERVAL_S = 0.1
TIME_TOLERANCE_S = 0.05
MAX_RECORD_BYTES = 32 << 20
MAX_FRAMES = 1000
MAX_NAME = 100
MAX_POINTS = 20_000
MAX_BORDERS = 100
MAX_COORDINATE_M = 1e6
MAX_STEP_M = 50.0
MAX_MPH = 150.0
HALF_WIDTH_M = 1.85
HALF_WIDTHS_M = (1.0, 3.5)
MPS_PER_MPH = 0.44704
_KINDS = {1: "vehicle", 2: "pedestrian", 3: "bicycle"}
_BIKE_LANE = 3
_RED_STATES = (1, 4)
"""Arrow stop and stop; a flashing stop is a stop sign's."""

_FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "Point": {"x": (1, "double"), "y": (2, "double")},
    "State": {"center_x": (2, "double"), "center_y": (3, "double"), "length": (5, "float"), "width": (6, "float"),
              "heading": (8, "float"), "velocity_x": (9, "float"), "velocity_y": (10, "float"), "valid": (11, "bool")},
    "Track": {"id": (1, "int32"), "object_type": (2, "int32"), "states": (3, "State*")},
    "Light": {"lane": (1, "int64"), "state": (2, "int32")},
    "Lights": {"lane_states": (1, "Light*")},
    "Border": {"start": (1, "int32"), "end": (2, "int32"), "feature": (3, "int64")},
    "Neighbor": {"feature": (1, "int64"), "start": (2, "int32"), "end": (3, "int32")},
    "Center": {"speed_limit_mph": (1, "double"), "type": (2, "int32"), "polyline": (8, "Point*"),
               "exit_lanes": (10, "int64*"), "left_neighbors": (11, "Neighbor*"), "right_neighbors": (12, "Neighbor*"),
               "left_boundaries": (13, "Border*"), "right_boundaries": (14, "Border*")},
    "Line": {"polyline": (2, "Point*")},
    "Ring": {"polygon": (1, "Point*")},
    "Feature": {"id": (1, "int64"), "lane": (3, "Center"), "road_line": (4, "Line"), "road_edge": (5, "Line"),
                "crosswalk": (8, "Ring"), "driveway": (10, "Ring")},
    "Scenario": {"timestamps_seconds": (1, "double*"), "tracks": (2, "Track*"), "scenario_id": (5, "string"),
                 "sdc_track_index": (6, "int32"), "dynamic_map_states": (7, "Lights*"),
                 "map_features": (8, "Feature*")},
}  # fmt: skip
"""Number and type of each field by message; a star marks a repeated one."""


def units(path: Path) -> list[str]:
    """Return the names of the TFRecord files."""
    if path.is_file():
        return [path.name]
    return sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if "tfrecord" in file.name and file.is_file()
    )


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recordings of one file; bad records are left out and counted in one refusal at the end.

    Raises:
        InputRejectedError: Some records were refused, or the rest of the file is lost.
    """
    refused: list[InputRejectedError] = []
    num_records = 0
    with (path if path.is_file() else path / name).open("rb") as stream:
        for found in _recordings(stream, name):
            num_records += 1
            if isinstance(found, Recording):
                yield found
            else:
                refused.append(found)
    if refused:
        first = refused[0]
        rule = f"{len(refused)} of {num_records} records were refused, the first: {first.rule}"
        raise InputRejectedError(first.where, rule, first.value)


def _recordings(stream: IO[bytes], name: str) -> Iterator[Recording | InputRejectedError]:
    """Yield the recording of each record, or why it was refused."""
    decode = _scenario_class().FromString
    try:
        for number, content in enumerate(records(stream, name, MAX_RECORD_BYTES)):
            yield (
                _recording(decode, content, f"{name}: record {number}")
                if isinstance(content, bytes)
                else content
            )
    except InputRejectedError as error:
        yield error


def _recording(decode: Callable[[bytes], Any], content: bytes, where: str) -> Recording | InputRejectedError:
    from google.protobuf.message import DecodeError

    try:
        message = decode(content)
        name = message.scenario_id
        if not message.tracks or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            return InputRejectedError(
                where, "must be a Scenario message with name and tracks (not a tf.Example)"
            )
        return recording_of(message, f"{where}: scenario {name}")
    except (DecodeError, RecursionError, UnicodeDecodeError) as error:
        return InputRejectedError(where, "must be a Scenario message", str(error) or None)
    except InputRejectedError as error:
        return error


@lru_cache(maxsize=1)
def _scenario_class() -> Any:
    """Return protobuf's class of the messages described in `_FIELDS`."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise MissingExtraError("protobuf", "pip install protobuf") from None
    file = descriptor_pb2.FileDescriptorProto(
        name="autoscale_waymo.proto", package="autoscale", syntax="proto2"
    )
    types = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            plain = kind.removesuffix("*")
            message.field.add(
                name=field,
                number=number,
                label=types.LABEL_REPEATED if kind.endswith("*") else types.LABEL_OPTIONAL,
                type=types.TYPE_MESSAGE if plain in _FIELDS else getattr(types, f"TYPE_{plain.upper()}"),
                type_name=f".autoscale.{plain}" if plain in _FIELDS else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("autoscale.Scenario"))


def recording_of(scenario: Any, where: str) -> Recording:
    """Turn a decoded scenario into a recording; `where` is its place for messages."""
    times = np.array(scenario.timestamps_seconds, dtype=np.float64)
    if not 2 <= len(times) <= MAX_FRAMES or not np.isfinite(times).all():
        raise InputRejectedError(
            f"{where}: timestamps", f"must be 2 to {MAX_FRAMES} finite times", len(times)
        )
    uneven = np.abs(np.diff(times) - FRAME_INTERVAL_S).max()
    if uneven > TIME_TOLERANCE_S:
        raise InputRejectedError(f"{where}: timestamps", "must be 0.1 s apart, within 0.05 s", float(uneven))
    tracks = [
        _track(number, track, len(times), number == scenario.sdc_track_index, where)
        for number, track in enumerate(scenario.tracks)
    ]
    found = [track for track in tracks if track is not None]
    if not found:
        raise InputRejectedError(f"{where}: tracks", "must have a track that is seen")
    road = _road(scenario.map_features, where)
    return Recording(
        name=scenario.scenario_id,
        log_id=f"waymo/{scenario.scenario_id}",
        source="waymo/motion",
        tracks=gather_tracks(found),
        frame_interval_s=FRAME_INTERVAL_S,
        road=road,
        red_FL=_red_lights(scenario.dynamic_map_states, road, len(times)),
    )


def _track(number: int, track: Any, num_frames: int, is_recorder: bool, where: str) -> Track | None:
    if len(track.states) != num_frames:
        raise InputRejectedError(
            f"{where}: track {number}", f"must have {num_frames} states", len(track.states)
        )
    frames = np.array([frame for frame, state in enumerate(track.states) if state.valid], dtype=np.int64)
    if not len(frames):
        return None
    values = np.array(
        [
            (s.center_x, s.center_y, s.heading, s.velocity_x, s.velocity_y, s.length, s.width)
            for s in track.states
            if s.valid
        ]
    )
    if not (np.abs(values) <= MAX_COORDINATE_M).all():
        rule = f"states must be finite and within {MAX_COORDINATE_M:.0f} m"
        raise InputRejectedError(f"{where}: track {number}", rule)
    length, width = np.median(values[:, 5:], axis=0)
    kind = _KINDS.get(track.object_type, "generic_object")
    return Track(
        key=number,
        kind=kind,
        length_m=float(length),
        width_m=float(width),
        frames=frames,
        poses=values[:, :3],
        velocities=values[:, 3:5],
        can_be_ego=kind == "vehicle",
        is_recorder=is_recorder,
    )


def _road(features: Sequence[Any], where: str) -> RoadMap:
    lines: dict[int, shapely.STRtree] = {}
    centers: dict[int, tuple[Any, np.ndarray]] = {}
    areas: list[Area] = []
    for feature in features:
        place = f"{where}: feature {feature.id}"
        for kind in ("road_line", "road_edge"):
            if feature.HasField(kind):
                lines[feature.id] = _pieces(_points(getattr(feature, kind).polyline, place))
        for kind, layer in (("crosswalk", "crosswalk"), ("driveway", "carpark_area")):
            if feature.HasField(kind) and len(ring := _points(getattr(feature, kind).polygon, place)) >= 3:
                areas.append(Area(layer=layer, ring=ring))
        if feature.HasField("lane") and feature.lane.type != _BIKE_LANE:
            centers[feature.id] = feature.lane, _lane_points(feature.lane, place)
    lanes = [
        _lane(key, lane, points, lines)
        for key, (lane, points) in centers.items()
        if is_apart(points).sum() > 1
    ]
    return make_road_map(lanes, areas)


def _lane_points(lane: Any, where: str) -> np.ndarray:
    points = _points(lane.polyline, where)
    longest = float(np.linalg.norm(np.diff(points, axis=0), axis=1).max(initial=0.0))
    num_borders = len(lane.left_boundaries) + len(lane.right_boundaries)
    if longest > MAX_STEP_M or num_borders > MAX_BORDERS:
        rule = f"steps must be at most {MAX_STEP_M:.0f} m and borders at most {MAX_BORDERS}"
        raise InputRejectedError(where, rule, f"{longest:.1f} m, {num_borders} borders")
    return points


def _points(points: Sequence[Any], where: str) -> np.ndarray:
    if len(points) > MAX_POINTS:
        raise InputRejectedError(where, f"must have at most {MAX_POINTS} points", len(points))
    array = np.array([(point.x, point.y) for point in points], dtype=np.float64).reshape(-1, 2)
    if not (np.abs(array) <= MAX_COORDINATE_M).all():
        raise InputRejectedError(where, f"points must be finite and within {MAX_COORDINATE_M:.0f} m")
    return array


def _pieces(points: np.ndarray) -> shapely.STRtree:
    """Return a search tree over the segments of a polyline, or over its only point."""
    if len(points) < 2:
        return shapely.STRtree(np.asarray(shapely.points(points)))
    return shapely.STRtree(np.asarray(shapely.linestrings(np.stack([points[:-1], points[1:]], axis=1))))


def _lane(key: int, lane: Any, points: np.ndarray, lines: Mapping[int, shapely.STRtree]) -> Lane:
    kept = is_apart(points)
    center = points[kept]
    half_widths = [
        _half_widths(points, borders, lines)[kept]
        for borders in (lane.left_boundaries, lane.right_boundaries)
    ]
    left, right = offset_borders(center, *half_widths)
    return Lane(
        key=key,
        left=left,
        right=right,
        center=center,
        successors=tuple(lane.exit_lanes),
        left_neighbour=_longest(lane.left_neighbors),
        right_neighbour=_longest(lane.right_neighbors),
        speed_limit_mps=lane.speed_limit_mph * MPS_PER_MPH
        if 0 < lane.speed_limit_mph < MAX_MPH
        else math.nan,
        is_connector=not lane.left_boundaries and not lane.right_boundaries,
    )


def _half_widths(
    points: np.ndarray, borders: Sequence[Any], lines: Mapping[int, shapely.STRtree]
) -> np.ndarray:
    """Return the distance from each lane point (n,) to its border, a usual one where there is no border."""
    widths = np.full(len(points), HALF_WIDTH_M)
    for border in borders:
        pieces = lines.get(border.feature)
        run = slice(max(border.start, 0), max(border.end + 1, 0))
        if pieces is not None and len(pieces) and len(points[run]):
            _, widths[run] = pieces.query_nearest(
                shapely.points(points[run]), return_distance=True, all_matches=False
            )
    return np.clip(widths, *HALF_WIDTHS_M)


def _longest(neighbors: Sequence[Any]) -> int | None:
    return max(neighbors, key=lambda found: found.end - found.start).feature if neighbors else None


def _red_lights(steps: Sequence[Any], road: RoadMap, num_frames: int) -> np.ndarray | None:
    if not any(step.lane_states for step in steps):
        return None
    number = road.lane_number
    red_FL = no_lights(road, num_frames)
    for frame, step in enumerate(steps[:num_frames]):
        red = [
            number[light.lane]
            for light in step.lane_states
            if light.state in _RED_STATES and light.lane in number
        ]
        red_FL[frame, red] = True
    return red_FL


READER = Reader(units=units, read=read, fingerprints=motion_fingerprints)
