"""Cut a recording into windows around its vehicles: one row of the scene schema each.

Shape legend: K tracks, R track rows, M windows, T frames (15), A agents over all windows, L lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.scenes.crops import Flat, crop_radius, crop_road, frames_of, to_scene_frame, turned
from autoscale_ray.scenes.kinematics import center_velocities, gapless_runs, rear_axle_states, wrap_angle
from autoscale_ray.scenes.lane_matching import LaneMatcher
from autoscale_ray.scenes.ragged import ragged
from autoscale_ray.scenes.recording import Recording
from autoscale_ray.scenes.road_map import is_apart
from autoscale_ray.scenes.routes import Route, RoutePlanner, cut_lines
from autoscale_ray.scenes.schema import (
    CURRENT_FRAME,
    DRIVING_COMMANDS,
    FRAME_INTERVAL_S,
    FRAME_TIMES_S,
    NUM_FRAMES,
    NUM_HISTORY,
    NUM_PLAN_FRAMES,
    SCENE_SCHEMA,
    inner_shape,
)

AGENT_RADIUS_M = 60.0
ROUTE_HORIZON_S = 8.0
CENTERLINE_BEHIND_M = 30.0
CENTERLINE_AHEAD_M = 100.0
COMMAND_DISTANCE_M = 20.0
COMMAND_OFFSET_M = 2.0
WINDOWS_PER_TABLE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOptions:
    """How windows are cut."""

    stride_s: float = 2.0
    """Distance of two windows of one track, a multiple of 0.5 s."""
    min_displacement_m: float = 2.0
    """Least distance of the ego's positions at 0 and 4 s; 0 keeps standing egos."""
    num_history: int = NUM_HISTORY
    """Frames up to 0 s that must be recorded: 4 (from -1.5 s) or 5 (from -2.0 s)."""
    egos: Literal["recorder", "all"] = "recorder"
    """Whom windows are cut around: the recording car where there is one, or every vehicle."""
    pairs: bool = False
    """Also cut the window half a second before each one, tagged ``pair_first``, and link the two."""


@dataclass(frozen=True, slots=True)
class _Anchors:
    """Track and native frame at 0 s of every window."""

    track_M: np.ndarray
    frame_M: np.ndarray
    is_first_M: np.ndarray
    """The window is there only as the earlier one of a pair."""

    def __getitem__(self, run: slice) -> _Anchors:
        return _Anchors(self.track_M[run], self.frame_M[run], self.is_first_M[run])


def cut_windows(recording: Recording, domain: str, options: WindowOptions) -> Iterator[pa.Table]:
    """Cut a recording into tables of at most `WINDOWS_PER_TABLE` scenes, in the order of tracks and time.

    A window needs its ego gapless from the first history frame to 4 s. The first window of a gapless run
    starts with the run, the next `stride_s` later. Frame values are the recording's own at multiples of 0.5 s
    from 0 s.

    Args:
        recording: Tracks and road in map coordinates.
        domain: ``real`` or ``synthetic``.
        options: Stride, motion threshold, history, pairs.

    Yields:
        Tables of `SCENE_SCHEMA`.

    Raises:
        InvalidInputError: 0.5 s is not a whole number of native frames.
    """
    steps = FRAME_INTERVAL_S / recording.frame_interval_s
    if abs(steps - round(steps)) > 1e-3 or round(steps) < 1:
        raise InvalidInputError(
            recording.name, "0.5 s must be a whole multiple of the time step", recording.frame_interval_s
        )
    anchors = find_anchors(recording, options)
    if len(anchors.track_M) == 0:
        return
    cutter = _Cutter(recording, domain)
    for low in range(0, len(anchors.track_M), WINDOWS_PER_TABLE):
        yield cutter.table(anchors[low : low + WINDOWS_PER_TABLE], options)


def find_anchors(recording: Recording, options: WindowOptions) -> _Anchors:
    """Find the track and frame of every window, ordered by track and frame."""
    tracks, step = recording.tracks, recording.frames_per_step
    owner, first, last = gapless_runs(tracks)
    only_recorder = options.egos == "recorder" and tracks.is_recorder_K.any()
    usable = tracks.can_be_ego_K[owner] & (tracks.is_recorder_K[owner] | (not only_recorder))
    owner, first, last = owner[usable], first[usable], last[usable]
    history, future = (options.num_history - 1) * step, NUM_PLAN_FRAMES * step
    stride = round(options.stride_s / FRAME_INTERVAL_S) * step
    counts = np.maximum((last - first - history - future) // stride + 1, 0)
    rank = ragged(np.zeros_like(counts), counts)
    row = np.repeat(first, counts) + history + rank * stride
    track = np.repeat(owner, counts)
    moved = np.linalg.norm(tracks.poses_R3[row + future, :2] - tracks.poses_R3[row, :2], axis=1)
    keep = moved >= options.min_displacement_m
    track, row = track[keep], row[keep]
    frame = tracks.first_frame_K[track] + row - tracks.offsets[track]
    is_first = np.zeros(len(track), dtype=bool)
    if options.pairs:
        run_start = first[np.searchsorted(last, row)]
        has_before = row - step - (NUM_HISTORY - 2) * step >= run_start
        track, frame = np.append(track, track[has_before]), np.append(frame, frame[has_before] - step)
        is_first = np.append(is_first, np.ones(int(has_before.sum()), dtype=bool))
    order = np.lexsort((frame, track))
    return _Anchors(track[order], frame[order], is_first[order])


class _Cutter:
    """Everything about one recording that its windows share."""

    def __init__(self, recording: Recording, domain: str) -> None:
        self._recording, self._domain = recording, domain
        tracks, interval = recording.tracks, recording.frame_interval_s
        velocities_R2 = center_velocities(tracks, interval)
        self._ego_R7 = rear_axle_states(tracks, interval, velocities_R2)
        # Single columns: they are gathered several times as fast as rows.
        self._agents_5R = np.stack([*tracks.poses_R3.T, *velocities_R2.T])
        has_road = recording.road.num_lanes > 0
        self._matcher = LaneMatcher(recording.road) if has_road else None
        self._planner = RoutePlanner(recording.road)
        self._run_starts = gapless_runs(tracks)[1]
        self._lanes_by_track: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def table(self, anchors: _Anchors, options: WindowOptions) -> pa.Table:
        """Return the windows `anchors` as one table."""
        row_MT, valid_MT = self._rows(anchors.track_M[:, None], anchors.frame_M[:, None] + self._shift_T())
        origins_M3 = self._ego_R7[row_MT[:, CURRENT_FRAME], :3]
        self._match_lanes(anchors)
        here = zip(anchors.track_M.tolist(), anchors.frame_M.tolist(), origins_M3, strict=True)
        routes = [self._route(*window) for window in here]
        on_route_ML = np.zeros((len(routes), self._recording.road.num_lanes), dtype=bool)
        for window, route in enumerate(routes):
            if route is not None:
                on_route_ML[window] = route.on_route_L
        radius_M = crop_radius(self._ego_R7[row_MT[:, CURRENT_FRAME], 3])
        columns: dict[str, Flat] = crop_road(
            self._recording.road, origins_M3, radius_M, on_route_ML, self._red(anchors)
        )
        columns |= self._agents(anchors, row_MT, origins_M3)
        columns |= self._ego(row_MT, valid_MT, origins_M3)
        columns["centerline"] = self._centerlines(routes, row_MT, valid_MT, origins_M3)
        columns["tags"] = self._tags(anchors, routes)
        scalars = self._scalars(anchors, routes, origins_M3, columns["centerline"], options)
        return scene_table(scalars, columns)

    def _shift_T(self) -> np.ndarray:
        return (np.arange(NUM_FRAMES) - CURRENT_FRAME) * self._recording.frames_per_step

    def _rows(self, track: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of a track at a frame (clipped into the track) and whether it was recorded."""
        tracks = self._recording.tracks
        first, last = tracks.offsets[track], tracks.offsets[track + 1] - 1
        wanted = first + frame - tracks.first_frame_K[track]
        row = np.clip(wanted, first, last)
        return row, (wanted == row) & tracks.valid_R[row]

    def _ego(self, row_MT: np.ndarray, valid_MT: np.ndarray, origins_M3: np.ndarray) -> dict[str, Flat]:
        states = self._ego_R7[row_MT]
        states[..., :2] = to_scene_frame(states[..., :2], origins_M3, np.arange(len(row_MT)))
        states[..., 2] = wrap_angle(states[..., 2] - origins_M3[:, None, 2])
        states[~valid_MT] = 0.0
        ones = np.ones(len(row_MT), dtype=np.int64)
        times_us = np.broadcast_to(np.round(FRAME_TIMES_S * 1e6).astype(np.int64), valid_MT.shape)
        return {"ego_states": (states, ones), "ego_valid": (valid_MT, ones), "ego_times_us": (times_us, ones)}

    def _agents(self, anchors: _Anchors, row_MT: np.ndarray, origins_M3: np.ndarray) -> dict[str, Flat]:
        tracks = self._recording.tracks
        window_A, track_A = self._near_tracks(anchors, row_MT)
        row_AT, valid_AT = self._rows(track_A[:, None], anchors.frame_M[window_A, None] + self._shift_T())
        frames_4A1 = np.take(frames_of(origins_M3), window_A, axis=1)[..., None]
        x, y, yaw, vx, vy = (column_R.take(row_AT) for column_R in self._agents_5R)
        states = np.empty((*row_AT.shape, 5), dtype=np.float32)
        with np.errstate(over="ignore"):  # A gate refuses what becomes infinite.
            states[..., 0], states[..., 1] = turned(x - frames_4A1[0], y - frames_4A1[1], *frames_4A1[2:])
            states[..., 2] = wrap_angle(yaw - origins_M3[window_A, None, 2])
            states[..., 3], states[..., 4] = turned(vx, vy, *frames_4A1[2:])
        states[~valid_AT] = 0.0
        count_M = np.bincount(window_A, minlength=len(row_MT))
        return {
            "agent_type": (tracks.type_K[track_A], count_M),
            "agent_track": (tracks.key_K[track_A], count_M),
            "agent_size": (tracks.size_K4[track_A, :2], count_M),
            "agent_states": (states, count_M),
            "agent_valid": (valid_AT, count_M),
        }

    def _near_tracks(self, anchors: _Anchors, row_MT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the tracks that come within `AGENT_RADIUS_M` of the ego in some frame; windows at one time
        together."""
        tracks, shift_T = self._recording.tracks, self._shift_T()
        x_R, y_R = self._agents_5R[:2]
        pairs = []
        for frame in np.unique(anchors.frame_M):
            windows = np.flatnonzero(anchors.frame_M == frame)
            around = (tracks.first_frame_K <= frame + shift_T[-1]) & (
                tracks.last_frame_K >= frame + shift_T[0]
            )
            active = np.flatnonzero(around)
            row_KT, valid_KT = self._rows(active[:, None], frame + shift_T)
            ego_W1T2 = self._ego_R7[row_MT[windows], :2][:, None]
            distance2 = (x_R[row_KT] - ego_W1T2[..., 0]) ** 2 + (y_R[row_KT] - ego_W1T2[..., 1]) ** 2
            near_WK = ((distance2 <= AGENT_RADIUS_M**2) & valid_KT[None]).any(-1)
            near_WK &= active[None] != anchors.track_M[windows, None]
            window, track = np.nonzero(near_WK)
            pairs.append((windows[window], active[track]))
        window_A, track_A = (np.concatenate(part) for part in zip(*pairs, strict=True))
        order = np.lexsort((track_A, window_A))
        return window_A[order], track_A[order]

    def _match_lanes(self, anchors: _Anchors) -> None:
        """Note the 2 Hz frames of the egos' tracks and the lane each drives in then."""
        tracks, step = self._recording.tracks, self._recording.frames_per_step
        new = [track for track in np.unique(anchors.track_M).tolist() if track not in self._lanes_by_track]
        sampled = []
        for track in new:
            rows = np.arange(int(tracks.offsets[track]), int(tracks.offsets[track + 1]))
            # Anchors of every window, also the earlier ones of pairs, lie a multiple of 0.5 s after a run's
            # start.
            starts = self._run_starts[np.searchsorted(self._run_starts, rows, side="right") - 1]
            sampled.append(rows[tracks.valid_R[rows] & ((rows - starts) % step == 0)])
        poses = [tracks.poses_R3[rows] for rows in sampled]
        lanes = self._matcher.match(poses) if self._matcher else [np.full(len(rows), -1) for rows in sampled]
        for track, rows, driven in zip(new, sampled, lanes, strict=True):
            frames = tracks.first_frame_K[track] + rows - tracks.offsets[track]
            self._lanes_by_track[track] = frames, driven

    def _route(self, track: int, frame: int, pose: np.ndarray) -> Route | None:
        frames, lanes = self._lanes_by_track[track]
        last = frame + round(ROUTE_HORIZON_S / self._recording.frame_interval_s)
        low, high = np.searchsorted(frames, [frame, last + 1])
        return self._planner.route(lanes[low:high], pose[:2])

    def _centerlines(
        self, routes: list[Route | None], row_MT: np.ndarray, valid_MT: np.ndarray, origins_M3: np.ndarray
    ) -> Flat:
        lines: list[np.ndarray] = []
        numbers: dict[object, int] = {}
        line_M = np.zeros(len(routes), dtype=np.int64)
        for window, route in enumerate(routes):
            line_M[window] = numbers.setdefault(("none", window) if route is None else id(route), len(lines))
            if line_M[window] == len(lines):
                driven = self._ego_R7[row_MT[window, valid_MT[window]], :2]
                lines.append(_driven_line(driven, origins_M3[window]) if route is None else route.line_C2)
        ahead_m = self._distances(row_MT, valid_MT) + CENTERLINE_AHEAD_M
        cut, counts = cut_lines(lines, line_M, origins_M3[:, :2], CENTERLINE_BEHIND_M, ahead_m)
        window = np.repeat(np.arange(len(counts)), counts)
        yaw = wrap_angle(cut[:, 2] - origins_M3[window, 2])
        return np.column_stack([to_scene_frame(cut[:, :2], origins_M3, window), yaw]), counts

    def _distances(self, row_MT: np.ndarray, valid_MT: np.ndarray) -> np.ndarray:
        """Return the length of each ego's drive from 0 s on, over the frames that are recorded."""
        distance_M = np.zeros(len(row_MT))
        for pattern in np.unique(valid_MT[:, CURRENT_FRAME:], axis=0):
            same = (valid_MT[:, CURRENT_FRAME:] == pattern).all(axis=1)
            positions = self._ego_R7[row_MT[same, CURRENT_FRAME:][:, pattern], :2]
            distance_M[same] = np.linalg.norm(np.diff(positions, axis=1), axis=2).sum(1)
        return distance_M

    def _red(self, anchors: _Anchors) -> np.ndarray | None:
        red_FL = self._recording.red_FL
        if red_FL is None:
            return None
        frames_MT = anchors.frame_M[:, None] + self._shift_T()
        return red_FL[np.clip(frames_MT, 0, len(red_FL) - 1)] & (frames_MT < len(red_FL))[..., None]

    def _tags(self, anchors: _Anchors, routes: list[Route | None]) -> Flat:
        general = list(self._recording.tags)
        if self._matcher is None:
            general.append("no_map")
        tags = [
            general + ["pair_first"] * bool(first) + ["no_route"] * (route is None)
            for first, route in zip(anchors.is_first_M, routes, strict=True)
        ]
        return np.array([tag for row in tags for tag in row], dtype=object), np.array(
            [len(row) for row in tags]
        )

    def _scalars(
        self,
        anchors: _Anchors,
        routes: list[Route | None],
        origins_M3: np.ndarray,
        centerline: Flat,
        options: WindowOptions,
    ) -> dict[str, object]:
        recording = self._recording
        count = len(anchors.track_M)
        size_M4 = recording.tracks.size_K4[anchors.track_M]
        keys, frames = recording.tracks.key_K[anchors.track_M].tolist(), anchors.frame_M.tolist()
        has_before = (options.pairs & ~anchors.is_first_M).tolist()
        before = [
            self._scene_id(key, frame - recording.frames_per_step) if linked else None
            for key, frame, linked in zip(keys, frames, has_before, strict=True)
        ]
        return {
            "scene_id": list(map(self._scene_id, keys, frames)),
            "log_id": [recording.log_id] * count,
            "origin_id": [None] * count,
            "prev_scene_id": before,
            "domain": [self._domain] * count,
            "source": [recording.source] * count,
            "timestamp_us": recording.start_us
            + np.round(anchors.frame_M * recording.frame_interval_s * 1e6).astype(np.int64),
            "origin_x_m": origins_M3[:, 0],
            "origin_y_m": origins_M3[:, 1],
            "origin_yaw_rad": wrap_angle(origins_M3[:, 2]),
            "ego_length_m": size_M4[:, 0],
            "ego_width_m": size_M4[:, 1],
            "ego_wheelbase_m": size_M4[:, 2],
            "ego_rear_axle_to_center_m": size_M4[:, 3],
            "driving_command": _commands(routes, centerline),
            "route_speed_limit_mps": [self._speed_limit(route) for route in routes],
            "expert_quality": np.full(count, np.nan, dtype=np.float32),
        }

    def _scene_id(self, key: int, frame: int) -> str:
        recording = self._recording
        time_ms = round((recording.start_us / 1e3) + frame * recording.frame_interval_s * 1e3)
        return f"{recording.source}/{recording.name}/{key}/{time_ms}"

    def _speed_limit(self, route: Route | None) -> float:
        return float("nan") if route is None else float(self._recording.road.speed_limit_L[route.lanes[0]])


def _driven_line(driven: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return the driven path as a line, for a vehicle without a route; a standing one gets its heading."""
    line = driven[is_apart(driven, 0.1)]
    if len(line) > 1:
        return line
    heading = np.array([np.cos(pose[2]), np.sin(pose[2])])
    return np.stack([pose[:2], pose[:2] + heading])


def _commands(routes: list[Route | None], centerline: Flat) -> np.ndarray:
    """Return the driving command: where the route's centre line is 20 m ahead, left or right by more than 2
    m."""
    points, counts = centerline
    commands = np.full(len(routes), DRIVING_COMMANDS.index("unknown"), dtype=np.int8)
    x, y = points[:, 0], points[:, 1]
    dx, dy = x[1:] - x[:-1], y[1:] - y[:-1]
    away, steps = np.sqrt(x * x + y * y), np.sqrt(dx * dx + dy * dy)
    ends = np.cumsum(counts)
    for window, (low, high) in enumerate(zip((ends - counts).tolist(), ends.tolist(), strict=True)):
        if routes[window] is None:
            continue
        begin = low + int(away[low:high].argmin())
        side = _side(steps[begin : high - 1].tolist(), points[begin:high, 1].tolist())
        name = "left" if side > COMMAND_OFFSET_M else "right" if side < -COMMAND_OFFSET_M else "forward"
        commands[window] = DRIVING_COMMANDS.index(name)
    return commands


def _side(steps_m: list[float], offsets_m: list[float]) -> float:
    """Return how far to the left a line is after `COMMAND_DISTANCE_M`, rounded as NumPy's interpolation, without the
    vertices beyond."""
    along, behind = 0.0, 0.0
    for vertex, step in enumerate(steps_m):
        behind, along = along, along + step
        if along > COMMAND_DISTANCE_M:
            slope = (offsets_m[vertex + 1] - offsets_m[vertex]) / (along - behind)
            return slope * (COMMAND_DISTANCE_M - behind) + offsets_m[vertex]
    return offsets_m[-1]


def scene_table(scalars: Mapping[str, object], columns: Mapping[str, Flat]) -> pa.Table:
    """Assemble a table of the scene schema.

    Args:
        scalars: Values by scalar column, one for each scene.
        columns: Values of all scenes and the number of elements of each, by flat column.
    """
    arrays, ends = [], {}
    for name, kind, width in _COLUMNS:
        if name in scalars:
            arrays.append(pa.array(scalars[name], type=kind))
            continue
        values, counts = columns[name]
        flat = _column(np.asarray(values).reshape(-1), kind.value_type)
        # Columns of one kind share their counts.
        if id(counts) not in ends:
            ends[id(counts)] = np.cumsum(counts)
        arrays.append(_lists(flat, ends[id(counts)] * width, kind))
    return pa.Table.from_arrays(arrays, schema=SCENE_SCHEMA)


def _lists(flat: pa.Array, ends_M: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Cut the values of all scenes into lists that end at `ends_M`."""
    if len(flat) > _MAX_OFFSET:
        raise pa.ArrowInvalid(f"a column of a table may hold {_MAX_OFFSET} values, found {len(flat)}")
    offsets = np.zeros(len(ends_M) + 1, dtype=np.int32)
    offsets[1:] = ends_M
    return pa.Array.from_buffers(kind, len(ends_M), [None, pa.py_buffer(offsets)], 0, children=[flat])


_MAX_OFFSET = np.iinfo(np.int32).max
_COLUMNS = [(field.name, field.type, int(np.prod(inner_shape(field)))) for field in SCENE_SCHEMA]


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if kind == pa.float32():
        with np.errstate(over="ignore"):  # A gate refuses what becomes infinite.
            return pa.array(values.astype(np.float32, copy=False))
    if values.dtype == bool:
        bits = pa.py_buffer(np.packbits(values, bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, bits], 0)
    array = pa.array(values)
    return array if array.type == kind else array.cast(kind)
