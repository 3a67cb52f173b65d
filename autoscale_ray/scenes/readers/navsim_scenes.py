"""Cut NAVSIM's scenes out of a log: windows by the scene filter, each with what its scorer reads.

The ego is NAVSIM's Pacifica. Agents are all boxes of the window's frames. The map is what NAVSIM's metric cache holds:
roadblocks, intersections and car parks that touch the square of +-100 m around the ego's centre, whole, with the lanes
and connectors of those roadblocks (and, for the planner only, crosswalks).

Shape legend: F frames of the log, M windows, T frames of a scene (15), A agents and J lanes over all windows, S shapes,
L lanes and B roadblocks of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely

from autoscale_ray.scenes.crops import Flat, local_links, local_offsets, per_window, to_scene_frame
from autoscale_ray.scenes.gates import QUARANTINE_SCHEMA
from autoscale_ray.scenes.kinematics import wrap_angle
from autoscale_ray.scenes.ragged import ragged
from autoscale_ray.scenes.readers.nuplan_map import NuplanMap
from autoscale_ray.scenes.readers.nuplan_route import NavsimRoute, RouteFinder
from autoscale_ray.scenes.readers.openscene import OpensceneLog, filled_velocities, is_fid
from autoscale_ray.scenes.readers.reader import SceneTables
from autoscale_ray.scenes.readers.scene_filter import SceneFilter
from autoscale_ray.scenes.road_map import arc_length
from autoscale_ray.scenes.schema import CURRENT_FRAME, FRAME_TIMES_S, NUM_FRAMES, POLYGON_LAYERS, SCENE_SCHEMA
from autoscale_ray.scenes.windows import scene_table

LENGTH_M, WIDTH_M, WHEELBASE_M, REAR_AXLE_TO_CENTER_M = 5.176, 2.297, 3.089, 1.461
MAP_RADIUS_M = 100.0
CENTERLINE_BEHIND_M, CENTERLINE_AHEAD_M = 60.0, 300.0
STEP_S, STEP_TOLERANCE_S = 0.5, 0.1
MAX_PREVIOUS_S = 0.55
MIN_STEP_US = 100_000
SCENES_PER_TABLE = 128
_LAYER = {name: number for number, name in enumerate(POLYGON_LAYERS)}

Naming = Callable[[str, str], tuple[str, str | None]]
"""Log name and token of a scene to its log_id and origin_id."""
Refusal = tuple[str, str, str, str]
"""File, scene, rule and value."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """Windows of a log: first frame, frame at 0 s and one past the last frame of each."""

    first_M: np.ndarray
    current_M: np.ndarray
    end_M: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> _Windows:
        return _Windows(self.first_M[rows], self.current_M[rows], self.end_M[rows])

    def __len__(self) -> int:
        return len(self.first_M)


def plain_names(log_name: str, token: str) -> tuple[str, str | None]:
    """Return the log_id and origin_id of a recorded scene."""
    return log_name, None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What the scenes of a log share beside the log itself."""

    unit: str
    """File name, for quarantine rows."""
    name: str
    """Column ``source``."""
    domain: str
    naming: Naming = plain_names
    quality: Callable[[str, np.ndarray], float] | None = None
    """Score of the logged driver by token and its 8 poses in the scene frame (column ``expert_quality``)."""


def cut_scenes(log: OpensceneLog, road: NuplanMap, chosen: SceneFilter, source: Source) -> SceneTables:
    """Cut the windows of a log that a filter keeps, in the order of time.

    Args:
        log: One log.
        road: The map of its location.
        chosen: Which windows.
        source: Names.

    Yields:
        Tables of the scene schema, each with quarantine rows of windows that were refused.
    """
    windows = _wanted(log, chosen)
    refused: list[Refusal] = []
    windows = _usable(log, windows, source.unit, refused, needs_even_steps=chosen.tokens is None)
    routes, finder = [], RouteFinder(road)
    for current in windows.current_M.tolist():
        route = _route(log, road, finder, current)
        if isinstance(route, tuple):
            refused.append((source.unit, log.tokens[current], *route))
        routes.append(route)
    keep = np.array([isinstance(route, NavsimRoute) for route in routes], dtype=bool)
    found = [route for route in routes if isinstance(route, NavsimRoute)]
    windows = windows[keep]
    cutter = _Cutter(log, road, source)
    for low in range(0, len(windows), SCENES_PER_TABLE):
        part = slice(low, low + SCENES_PER_TABLE)
        sound = cutter.sound(windows[part], found[part], refused)
        kept = [route for route, good in zip(found[part], sound, strict=True) if good]
        if kept:
            yield cutter.table(windows[part][sound], kept), QUARANTINE_SCHEMA.empty_table()
    columns = list(zip(*refused, strict=True)) or [(), (), (), ()]
    rows = [pa.array(column, pa.string()) for column in columns]
    yield SCENE_SCHEMA.empty_table(), pa.table(rows, schema=QUARANTINE_SCHEMA)


def _wanted(log: OpensceneLog, chosen: SceneFilter) -> _Windows:
    """Return the windows of the filter: complete, with a route where asked for, of the wanted tokens."""
    first = np.arange(0, max(len(log.tokens) - chosen.num_frames + 1, 0), chosen.step)
    current = first + chosen.num_history_frames - 1
    keep = np.array(
        [
            (bool(log.routes[frame]) or not chosen.has_route)
            and (chosen.tokens is None or log.tokens[frame] in chosen.tokens)
            for frame in current.tolist()
        ],
        dtype=bool,
    )
    return _Windows(first, current, first + chosen.num_frames)[keep]


def _usable(
    log: OpensceneLog, windows: _Windows, unit: str, refused: list[Refusal], *, needs_even_steps: bool
) -> _Windows:
    """Refuse windows whose token the log has used before, with a track that stands twice in a frame and, where asked
    for, with frames that are not 0.5 s apart.

    NAVSIM takes frames by their place in the log, whatever the time between them, and so do scenes named by token.
    """
    steps_s = np.diff(log.times_us) / 1e6
    uneven = np.concatenate([[0], np.cumsum(np.abs(steps_s - STEP_S) > STEP_TOLERANCE_S)])
    rule = f"frames must be {STEP_S} s apart, within {STEP_TOLERANCE_S} s"
    seen: set[str] = set()
    keep = np.zeros(len(windows), dtype=bool)
    for number, (first, current, end) in enumerate(
        zip(windows.first_M.tolist(), windows.current_M.tolist(), windows.end_M.tolist(), strict=True)
    ):
        token = log.tokens[current]
        if needs_even_steps and uneven[end - 1] > uneven[first]:
            worst = steps_s[first : end - 1][np.argmax(np.abs(steps_s[first : end - 1] - STEP_S))]
            refused.append((unit, token, rule, f"{worst:.6g}"))
        elif log.is_doubled_F[first:end].any():
            double = int(first + np.argmax(log.is_doubled_F[first:end]))
            refused.append((unit, token, "track tokens must be unique in a frame", f"frame {double}"))
        elif token in seen:
            refused.append((unit, token, "token must be unique in a log", token))
        else:
            keep[number] = True
        seen.add(token)
    return windows[keep]


def _named_blocks(log: OpensceneLog, road: NuplanMap, frame: int) -> list[int]:
    """Return the roadblocks that a frame names, -1 for one that the map lacks."""
    return [road.block_number.get(int(name), -1) if is_fid(name) else -1 for name in log.routes[frame]]


def _route(
    log: OpensceneLog, road: NuplanMap, finder: RouteFinder, frame: int
) -> NavsimRoute | tuple[str, str]:
    """Return the route of a frame, or the rule it breaks and the value."""
    ids, blocks = log.routes[frame], _named_blocks(log, road, frame)
    if not blocks:
        return "must have a route", ""
    if -1 in blocks:
        return f"roadblocks of the route must be in the map of {road.location}", ids[blocks.index(-1)]
    pose = log.poses_F3[frame]
    if not np.isfinite(pose).all():
        return "numbers must be finite", f"ego pose {pose.tolist()}"
    route = finder.route(tuple(blocks), pose, ego_footprint(pose))
    if route is None or len(route.centerline_C3) < 2:
        return "the route must have lanes", ids[0]
    return route


def ego_center(poses: np.ndarray) -> np.ndarray:
    """Return the box centres (..., 2) of rear axle poses (..., 3)."""
    heading = np.stack([np.cos(poses[..., 2]), np.sin(poses[..., 2])], axis=-1)
    return poses[..., :2] + REAR_AXLE_TO_CENTER_M * heading


def ego_footprint(pose: np.ndarray) -> shapely.Polygon:
    """Return the ego's box around a rear axle pose (3,)."""
    forward = np.array([np.cos(pose[2]), np.sin(pose[2])])
    half = np.array([forward * LENGTH_M / 2.0, np.array([-forward[1], forward[0]]) * WIDTH_M / 2.0])
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) @ half
    return shapely.Polygon(ego_center(pose) + corners)


class _Cutter:
    """Everything about one log that its scenes share."""

    def __init__(self, log: OpensceneLog, road: NuplanMap, source: Source) -> None:
        self._log, self._road, self._source = log, road, source
        self._boxes_A5 = filled_velocities(log)
        self._frame_A = np.repeat(np.arange(len(log.tokens)), np.diff(log.box_offsets))
        self._along: dict[int, np.ndarray] = {}

    def sound(self, windows: _Windows, routes: Sequence[NavsimRoute], refused: list[Refusal]) -> np.ndarray:
        """Tell which windows (M, bool) have a whole map around them; the others are added to `refused`."""
        road = self._road
        window_P, shape_P = self._near(windows)
        lanes = self._lanes(window_P, shape_P)
        emitted = (shape_P < road.num_roadblocks) | (shape_P >= road.num_blocks)
        line = [road.num_blocks + np.array(route.lanes) for route in routes]
        window = np.concatenate(
            [window_P[emitted], lanes[0], np.repeat(np.arange(len(line)), [len(part) for part in line])]
        )
        shape = np.concatenate([shape_P[emitted], road.num_blocks + lanes[1], *line])
        bad = ~road.sound_S[shape]
        rule = "map areas must be there, and lanes must have a base line"
        for number in np.unique(window[bad]).tolist():
            first = shape[bad & (window == number)][0]
            value = f"{POLYGON_LAYERS[road.layer_S[first]]} {road.fid_S[first]}"
            refused.append((self._source.unit, self._log.tokens[windows.current_M[number]], rule, value))
        return ~np.isin(np.arange(len(windows)), window[bad])

    def table(self, windows: _Windows, routes: Sequence[NavsimRoute]) -> pa.Table:
        """Return the windows as a table of the scene schema."""
        origins_M3 = self._log.poses_F3[windows.current_M]
        frames_MT = windows.current_M[:, None] + np.arange(NUM_FRAMES) - CURRENT_FRAME
        valid_MT = (frames_MT >= windows.first_M[:, None]) & (frames_MT < windows.end_M[:, None])
        frames_MT = np.clip(frames_MT, 0, len(self._log.tokens) - 1)
        columns = self._ego(frames_MT, valid_MT, origins_M3)
        columns |= self._agents(windows, origins_M3)
        columns |= self._map(windows, routes, frames_MT, valid_MT, origins_M3)
        columns["centerline"] = self._centerlines(routes, origins_M3)
        tag = np.array([self._road.location] * len(windows), dtype=object)
        columns["tags"] = (tag, np.ones(len(windows), dtype=np.int64))
        return scene_table(self._scalars(windows, routes, columns["ego_states"][0]), columns)

    def _scalars(
        self, windows: _Windows, routes: Sequence[NavsimRoute], states_MT7: np.ndarray
    ) -> dict[str, object]:
        log, source, count = self._log, self._source, len(windows)
        tokens = [log.tokens[frame] for frame in windows.current_M.tolist()]
        names = [source.naming(log.name, token) for token in tokens]
        poses_M83 = states_MT7[:, CURRENT_FRAME + 1 : CURRENT_FRAME + 9, :3]
        quality = source.quality or (lambda token, poses: float("nan"))
        pose_M3 = log.poses_F3[windows.current_M]
        return {
            "scene_id": tokens,
            "log_id": [log_id for log_id, _ in names],
            "origin_id": [origin_id for _, origin_id in names],
            "prev_scene_id": [self._previous(frame) for frame in windows.current_M.tolist()],
            "domain": [source.domain] * count,
            "source": [source.name] * count,
            "timestamp_us": log.times_us[windows.current_M],
            "origin_x_m": pose_M3[:, 0],
            "origin_y_m": pose_M3[:, 1],
            "origin_yaw_rad": wrap_angle(pose_M3[:, 2]),
            "ego_length_m": np.full(count, LENGTH_M),
            "ego_width_m": np.full(count, WIDTH_M),
            "ego_wheelbase_m": np.full(count, WHEELBASE_M),
            "ego_rear_axle_to_center_m": np.full(count, REAR_AXLE_TO_CENTER_M),
            "driving_command": log.command_F[windows.current_M],
            "route_speed_limit_mps": self._road.speed_limit_L[[route.start_lane for route in routes]],
            "expert_quality": np.array(list(map(quality, tokens, poses_M83)), dtype=np.float32),
        }

    def _previous(self, frame: int) -> str | None:
        """Return the token half a second earlier; the ingest drops it where that scene is not in the pool."""
        near = frame > 0 and self._log.times_us[frame] - self._log.times_us[frame - 1] < MAX_PREVIOUS_S * 1e6
        return self._log.tokens[frame - 1] if near else None

    def _ego(self, frames_MT: np.ndarray, valid_MT: np.ndarray, origins_M3: np.ndarray) -> dict[str, Flat]:
        log = self._log
        poses = log.poses_F3[frames_MT]
        window = np.repeat(np.arange(len(origins_M3)), NUM_FRAMES)
        xy = to_scene_frame(poses[..., :2].reshape(-1, 2), origins_M3, window)
        yaw = wrap_angle(poses[..., 2:] - origins_M3[:, None, 2:])
        states = np.concatenate([xy.reshape(*valid_MT.shape, 2), yaw, log.dynamics_F4[frames_MT]], axis=2)
        states[~valid_MT] = 0.0
        times = log.times_us[frames_MT] - log.times_us[frames_MT[:, CURRENT_FRAME], None]
        times = np.where(valid_MT, times, _times_beside(times, valid_MT))
        ones = np.ones(len(frames_MT), dtype=np.int64)
        return {"ego_states": (states, ones), "ego_valid": (valid_MT, ones), "ego_times_us": (times, ones)}

    def _agents(self, windows: _Windows, origins_M3: np.ndarray) -> dict[str, Flat]:
        log = self._log
        first_M = log.box_offsets[windows.first_M]
        count_M = log.box_offsets[windows.end_M] - first_M
        box_X = ragged(first_M, count_M)
        window_X = np.repeat(np.arange(len(windows)), count_M)
        frame_X = self._frame_A[box_X] - windows.current_M[window_X] + CURRENT_FRAME
        num_tracks = int(log.box_track_A.max(initial=0)) + 1
        key_A, agent_X = np.unique(window_X * num_tracks + log.box_track_A[box_X], return_inverse=True)
        states = np.zeros((len(key_A), NUM_FRAMES, 5))
        states[agent_X, frame_X] = _in_scene(self._boxes_A5[box_X], origins_M3, window_X)
        valid = np.zeros((len(key_A), NUM_FRAMES), dtype=bool)
        valid[agent_X, frame_X] = True
        # NAVSIM's observation starts at 0 s: type and size are those of the first sighting from there on.
        rank_X = np.where(frame_X >= CURRENT_FRAME, frame_X, frame_X + NUM_FRAMES)
        order = np.lexsort((rank_X, agent_X))
        chosen = box_X[order[np.searchsorted(agent_X[order], np.arange(len(key_A)))]]
        num_M = np.bincount(key_A // num_tracks, minlength=len(windows))
        return {
            "agent_type": (log.box_type_A[chosen], num_M),
            "agent_track": (key_A % num_tracks, num_M),
            "agent_size": (log.box_size_A2[chosen], num_M),
            "agent_states": (states, num_M),
            "agent_valid": (valid, num_M),
        }

    def _near(self, windows: _Windows) -> tuple[np.ndarray, np.ndarray]:
        """Return windows and the shapes that touch the square around their ego, ordered."""
        center = ego_center(self._log.poses_F3[windows.current_M])
        boxes = shapely.box(*(center - MAP_RADIUS_M).T, *(center + MAP_RADIUS_M).T)
        window, entry = self._road.tree.query(boxes, predicate="intersects")
        shape = self._road.tree_shape[entry]
        order = np.lexsort((shape, window))
        return window[order], shape[order]

    def _lanes(self, window_P: np.ndarray, shape_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return windows and the lanes of their roadblocks and connectors."""
        road, is_block = self._road, shape_P < self._road.num_blocks
        first = road.block_lane_offsets[shape_P[is_block]]
        count = road.block_lane_offsets[shape_P[is_block] + 1] - first
        return np.repeat(window_P[is_block], count), road.block_lanes[ragged(first, count)]

    def _map(
        self,
        windows: _Windows,
        routes: Sequence[NavsimRoute],
        frames_MT: np.ndarray,
        valid_MT: np.ndarray,
        origins_M3: np.ndarray,
    ) -> dict[str, Flat]:
        road, count = self._road, len(windows)
        window_P, shape_P = self._near(windows)
        window_J, lane_J = self._lanes(window_P, shape_P)
        num_M = np.bincount(window_J, minlength=count)
        on_route_ML = np.zeros((count, road.num_lanes), dtype=bool)
        for row, route in zip(on_route_ML, routes, strict=True):
            row[list(route.route_lanes)] = True
        local_ML = np.full((count, road.num_lanes), -1, dtype=np.int64)
        local_ML[window_J, lane_J] = np.arange(len(lane_J)) - np.repeat(np.cumsum(num_M) - num_M, num_M)
        points, point_J = _gathered(road.center_C2, road.center_offsets, lane_J)
        return {
            "lane_points": per_window(
                to_scene_frame(points, origins_M3, np.repeat(window_J, point_J)), window_J, point_J, count
            ),
            "lane_offsets": local_offsets(window_J, point_J, count),
            "lane_width_m": (road.width_L[lane_J], num_M),
            "lane_speed_limit_mps": (road.speed_limit_L[lane_J], num_M),
            "lane_on_route": (on_route_ML[window_J, lane_J], num_M),
            "lane_links": local_links(road.links_E3, local_ML),
            **self._polygons(
                window_P,
                shape_P,
                on_route_ML,
                local_ML,
                self._red(windows, frames_MT, valid_MT, on_route_ML),
                origins_M3,
            ),
        }

    def _polygons(
        self,
        window_P: np.ndarray,
        shape_P: np.ndarray,
        on_route_ML: np.ndarray,
        local_ML: np.ndarray,
        red_MTL: Callable[[np.ndarray, np.ndarray], np.ndarray],
        origins_M3: np.ndarray,
    ) -> dict[str, Flat]:
        road, count = self._road, len(origins_M3)
        window_J, lane_J = np.nonzero(local_ML >= 0)
        emitted = (shape_P < road.num_roadblocks) | (shape_P >= road.num_blocks)
        window_S = np.concatenate([window_P[emitted], window_J])
        shape_S = np.concatenate([shape_P[emitted], road.num_blocks + lane_J])
        num_S = np.diff(road.shape_ring_offsets)[shape_S]
        ring_Q = ragged(road.shape_ring_offsets[shape_S], num_S)
        window_Q, shape_Q = np.repeat(window_S, num_S), np.repeat(shape_S, num_S)
        layer_Q = road.layer_S[shape_Q]
        order = np.lexsort((ring_Q, layer_Q, window_Q))
        ring_Q, window_Q, shape_Q, layer_Q = ring_Q[order], window_Q[order], shape_Q[order], layer_Q[order]
        points, point_Q = _gathered(road.ring_points_W2, road.ring_offsets, ring_Q)
        is_lane_Q = np.isin(layer_Q, (_LAYER["lane"], _LAYER["lane_connector"]))
        lane_Q = np.where(is_lane_Q, shape_Q - road.num_blocks, 0)
        red_QT = np.zeros((len(ring_Q), NUM_FRAMES), dtype=bool)
        turn_Q = layer_Q == _LAYER["lane_connector"]
        red_QT[turn_Q] = red_MTL(window_Q[turn_Q], lane_Q[turn_Q])
        num_M = np.bincount(window_Q, minlength=count)
        return {
            "polygon_points": per_window(
                to_scene_frame(points, origins_M3, np.repeat(window_Q, point_Q)), window_Q, point_Q, count
            ),
            "polygon_offsets": local_offsets(window_Q, point_Q, count),
            "polygon_layer": (layer_Q, num_M),
            "polygon_lane": (np.where(is_lane_Q, local_ML[window_Q, lane_Q], -1), num_M),
            "polygon_on_route": (is_lane_Q & on_route_ML[window_Q, lane_Q], num_M),
            "polygon_red": (red_QT, num_M),
        }

    def _red(
        self, windows: _Windows, frames_MT: np.ndarray, valid_MT: np.ndarray, on_route_ML: np.ndarray
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Return the lights: windows and connectors to bool (n, T).

        NAVSIM corrects the route for PDM-Closed, which reads the lights of 0 s, but judges traffic lights on the
        roadblocks that the frame names. Lanes that the correction added are therefore not red after 0 s.
        """
        low, high = int(frames_MT.min()), int(frames_MT.max())
        red_FL = np.zeros((high - low + 1, self._road.num_lanes), dtype=bool)
        for row, fids in zip(red_FL, self._log.red[low : high + 1], strict=True):
            row[[self._road.connector_number[fid] for fid in fids if fid in self._road.connector_number]] = (
                True
            )
        added_ML = on_route_ML.copy()
        for row, frame in zip(added_ML, windows.current_M.tolist(), strict=True):
            for block in _named_blocks(self._log, self._road, frame):
                row[self._road.lanes_of(block)] = False
        later_T = np.arange(NUM_FRAMES) > CURRENT_FRAME
        return lambda window, lane: (
            red_FL[frames_MT[window] - low, lane[:, None]]
            & valid_MT[window]
            & ~(added_ML[window, lane][:, None] & later_T)
        )

    def _centerlines(self, routes: Sequence[NavsimRoute], origins_M3: np.ndarray) -> Flat:
        lines = [self._cut(route, pose) for route, pose in zip(routes, origins_M3, strict=True)]
        counts = np.array([len(line) for line in lines], dtype=np.int64)
        flat, window = np.concatenate(lines), np.repeat(np.arange(len(lines)), counts)
        yaw = wrap_angle(flat[:, 2] - origins_M3[window, 2])
        return np.column_stack([to_scene_frame(flat[:, :2], origins_M3, window), yaw]), counts

    def _cut(self, route: NavsimRoute, pose: np.ndarray) -> np.ndarray:
        """Return the vertices of the centre line around the ego."""
        line = route.centerline_C3
        if id(route) not in self._along:
            self._along[id(route)] = arc_length(line[:, :2])
        along = self._along[id(route)]
        foot = along[np.argmin(np.hypot(line[:, 0] - pose[0], line[:, 1] - pose[1]))]
        low, high = np.searchsorted(along, [foot - CENTERLINE_BEHIND_M, foot + CENTERLINE_AHEAD_M])
        return line[low:high] if high - low >= 2 else line


def _times_beside(times_MT: np.ndarray, valid_MT: np.ndarray) -> np.ndarray:
    """Return times (us) for frames that are not recorded: nominal, and 0.1 s or more beside those that are."""
    place_T, rows = np.arange(NUM_FRAMES), np.arange(len(times_MT))
    first, last = np.argmax(valid_MT, axis=1), NUM_FRAMES - 1 - np.argmax(valid_MT[:, ::-1], axis=1)
    before, after = (
        times_MT[rows, end][:, None] + (place_T - end[:, None]) * MIN_STEP_US for end in (first, last)
    )
    nominal_T = np.round(FRAME_TIMES_S * 1e6).astype(np.int64)
    return np.where(place_T < first[:, None], np.minimum(nominal_T, before), np.maximum(nominal_T, after))


def _in_scene(states: np.ndarray, origins_M3: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Turn box states (n, 5) from map axes into the frames of their scenes."""
    turn_M3 = np.column_stack([np.zeros((len(origins_M3), 2)), origins_M3[:, 2]])
    yaw = wrap_angle(states[:, 2] - origins_M3[window, 2])
    xy = to_scene_frame(states[:, :2], origins_M3, window)
    return np.column_stack([xy, yaw, to_scene_frame(states[:, 3:], turn_M3, window)])


def _gathered(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs `rows` of flat values laid end to end, and their lengths."""
    counts = np.diff(offsets)[rows]
    return values[ragged(offsets[rows], counts)], counts
