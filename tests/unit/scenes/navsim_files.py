"""Made-up OpenScene logs, scene filters and SimScale clips whose truth is known, in the documented layout."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scenes.navsim_town import LOCATION, Town, make_town

START_US = 1_620_842_400_000_000
LENGTH_M, WIDTH_M, TO_CENTER_M = 5.176, 2.297, 1.461
CAMERAS = ("CAM_F0", "CAM_L0", "CAM_L1", "CAM_L2", "CAM_R0", "CAM_R1", "CAM_R2", "CAM_B0")


@dataclass
class Agent:
    """One object in map coordinates; states (F, 5) x, y, yaw, vx, vy, seen in the frames of the mask."""

    token: str
    kind: str
    size: tuple[float, float, float]
    states: np.ndarray
    seen: np.ndarray


@dataclass
class Drive:
    """The truth of one log."""

    town: Town
    name: str
    tokens: list[str]
    times_us: np.ndarray
    ego: np.ndarray
    """(F, 7) rear axle x, y, yaw (map), vx, vy, ax, ay (body)."""
    tilt: np.ndarray
    """(F, 2) roll and pitch."""
    route: list[int]
    route_lanes: list[int]
    """Lanes of the centre line."""
    agents: list[Agent] = field(default_factory=list)
    red: list[dict[int, bool]] = field(default_factory=list)
    """State of lights by connector, one a frame."""

    @property
    def num_frames(self) -> int:
        return len(self.tokens)


def make_drive(
    town: Town | None = None,
    *,
    junctions: tuple[tuple[int, int], ...] = ((0, 0), (1, 0), (2, 0), (2, 1)),
    num_frames: int = 24,
    num_agents: int = 6,
    speed: float = 7.0,
    start_m: float = 25.0,
    seed: int = 0,
    name: str = "2021.05.12.19.36.12_veh-35_00005_00204",
) -> Drive:
    """An ego that follows the centre of its lane along streets between junctions, among other cars and objects."""
    town = make_town() if town is None else town
    rng = np.random.default_rng(seed)
    blocks = [town.street[pair] for pair in itertools.pairwise(junctions)]
    route, lanes = _route(town, blocks)
    path = np.concatenate([town.lane(fid).line for fid in lanes])
    times_s = np.arange(num_frames) * 0.5
    along = start_m + speed * times_s + 0.8 * np.sin(times_s)
    rate, change = speed + 0.8 * np.cos(times_s), -0.8 * np.sin(times_s)
    pose, turn = _on_path(path, along)
    ego = np.column_stack([pose, rate, np.zeros(num_frames), change, turn * rate**2])
    drive = Drive(
        town=town,
        name=name,
        tokens=[f"{value:016x}" for value in rng.integers(1 << 62, size=num_frames)],
        times_us=START_US + np.arange(num_frames) * 500_000 + rng.integers(-900, 900, num_frames),
        ego=ego,
        tilt=rng.normal(0.0, 0.02, (num_frames, 2)),
        route=route,
        route_lanes=lanes,
        red=[_lights(town, route, frame) for frame in range(num_frames)],
    )
    drive.agents = [_agent(drive, rng, number) for number in range(num_agents)]
    return drive


def _route(town: Town, blocks: list[int]) -> tuple[list[int], list[int]]:
    """The roadblock ids and the lanes of the centre line through streets; lane by lane as turns allow."""
    route, turns = [blocks[0]], []
    for before, after in itertools.pairwise(blocks):
        turn = next(
            t for t in town.block_connectors.values() if (t.start_block, t.end_block) == (before, after)
        )
        route += [turn.fid, after]
        turns.append(turn)
    starts = [set(town.blocks[blocks[0]].lanes)]
    for turn in turns:
        links = [town.connectors[fid] for fid in turn.lanes]
        starts.append({link.end_lane for link in links if link.start_lane in starts[-1]})
    lane = min(starts[-1])
    lanes = [lane]
    for turn in reversed(turns):
        link = next(town.connectors[fid] for fid in turn.lanes if town.connectors[fid].end_lane == lanes[0])
        lanes = [link.start_lane, link.fid, *lanes]
    return route, lanes


def _on_path(path: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses (n, 3) and curvature (n,) at arc lengths, headings blended over 2 m."""
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    path = path[np.concatenate([[True], steps > 1e-6])]
    at = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])

    def point(s: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(s, at, path[:, k]) for k in range(2)], axis=1)

    def heading(s: np.ndarray) -> np.ndarray:
        ahead = point(s + 1.0) - point(s - 1.0)
        return np.arctan2(ahead[:, 1], ahead[:, 0])

    yaw = heading(along)
    bend = (heading(along + 0.5) - heading(along - 0.5) + math.pi) % (2 * math.pi) - math.pi
    return np.column_stack([point(along), yaw]), bend


def _lights(town: Town, route: list[int], frame: int) -> dict[int, bool]:
    """Lights of two turns of the first junction: across the route red at first, along it red from frame 30."""
    along = town.block_connectors[route[1]] if len(route) > 1 else None
    across = [
        t
        for t in town.block_connectors.values()
        if along is not None and t.end_block == along.end_block and t is not along
    ]
    lights = {fid: frame < 12 for turn in across[:1] for fid in turn.lanes}
    return lights | (dict.fromkeys(along.lanes, frame >= 30) if along is not None else {})


def _agent(drive: Drive, rng: np.random.Generator, number: int) -> Agent:
    """Cars on lanes at constant speed; every third a static or walking object beside the road."""
    times_s, count = np.arange(drive.num_frames) * 0.5, drive.num_frames
    lane = list(drive.town.lanes.values())[int(rng.integers(len(drive.town.lanes)))]
    direction = lane.line[-1] - lane.line[0]
    yaw = math.atan2(direction[1], direction[0])
    seen = np.ones(count, dtype=bool)
    if number % 2:
        seen[: int(rng.integers(0, count // 2))] = False
    if number % 3 == 2:
        kind = ("pedestrian", "traffic_cone", "generic_object", "czone_sign", "barrier", "bicycle")[
            number // 3 % 6
        ]
        speed, size = (1.2 if kind in ("pedestrian", "bicycle") else 0.0), (0.7, 0.6, 1.7)
        start = lane.line[len(lane.line) // 2] + 9.0 * np.array([math.sin(yaw), -math.cos(yaw)])
    else:
        kind, speed, size = "vehicle", float(rng.uniform(0.0, 6.0)), (4.6 + 0.1 * (number % 5), 1.9, 1.6)
        start = lane.line[0]
    velocity = speed * np.array([math.cos(yaw), math.sin(yaw)])
    states = np.column_stack(
        [start + times_s[:, None] * velocity, np.full(count, yaw), np.tile(velocity, (count, 1))]
    )
    return Agent(f"{drive.name}-{number:04d}", kind, size, states, seen)


def frames_of(drive: Drive, *, with_cameras: bool = False) -> list[dict]:
    """The list of frames of the log's pickle."""
    return [_frame(drive, number, with_cameras) for number in range(drive.num_frames)]


def _frame(drive: Drive, number: int, with_cameras: bool) -> dict:
    ego, (roll, pitch) = drive.ego[number], drive.tilt[number]
    rotation = _quaternion(roll, pitch, ego[2])
    position = np.array([ego[0], ego[1], 606.5])
    return {
        "token": drive.tokens[number],
        "frame_idx": number,
        "timestamp": int(drive.times_us[number]),
        "log_name": drive.name,
        "log_token": f"{abs(hash(drive.name)) % (1 << 60):016x}",
        "scene_name": "log-0001-scene-0002",
        "scene_token": drive.tokens[0],
        "map_location": LOCATION,
        "roadblock_ids": [str(fid) for fid in drive.route],
        "vehicle_name": "veh-35",
        "can_bus": np.concatenate([position, rotation, [*ego[5:7], 9.8], [*ego[3:5], 0.0], np.zeros(5)]),
        "lidar_path": f"{drive.name}/MergedPointCloud/{drive.tokens[number]}.pcd",
        "lidar2ego_translation": np.zeros(3),
        "lidar2ego_rotation": [1.0, 0.0, 0.0, 0.0],
        "ego2global_translation": position,
        "ego2global_rotation": rotation,
        "ego_dynamic_state": [float(value) for value in ego[3:7]],
        "traffic_lights": [(fid, red) for fid, red in drive.red[number].items()],
        "driving_command": np.eye(4, dtype=int)[1 if number < drive.num_frames // 2 else 0],
        "cams": {name: _camera(drive, number, name) for name in CAMERAS} if with_cameras else {},
        "sample_prev": drive.tokens[number - 1] if number else None,
        "sample_next": drive.tokens[number + 1] if number + 1 < drive.num_frames else None,
        "ego2global": np.eye(4),
        "lidar2ego": np.eye(4),
        "lidar2global": np.eye(4),
        "anns": _annotations(drive, number),
    }


def _quaternion(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """w, x, y, z of R = Rx(roll) Ry(pitch) Rz(yaw)."""
    parts = [
        np.array([math.cos(angle / 2), *(math.sin(angle / 2) * np.eye(3)[axis])])
        for axis, angle in enumerate((roll, pitch, yaw))
    ]
    return _product(_product(parts[0], parts[1]), parts[2])


def _product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    vector = p[0] * q[1:] + q[0] * p[1:] + np.cross(p[1:], q[1:])
    return np.array([p[0] * q[0] - p[1:] @ q[1:], *vector])


def _camera(drive: Drive, number: int, name: str) -> dict:
    return {
        "data_path": f"{drive.name}/{name}/{drive.tokens[number]}.jpg",
        "sensor2lidar_rotation": np.eye(3),
        "sensor2lidar_translation": np.zeros(3),
        "cam_intrinsic": np.diag([1545.0, 1545.0, 1.0]),
        "distortion": np.zeros(5),
    }


def _annotations(drive: Drive, number: int) -> dict:
    """Boxes in the ego frame: turned back by the heading, yaw differences not wrapped, velocities turned likewise."""
    agents = [agent for agent in drive.agents if agent.seen[number]]
    x, y, yaw = drive.ego[number, :3]
    back = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    states = np.array([agent.states[number] for agent in agents]).reshape(-1, 5)
    sizes = np.array([agent.size for agent in agents]).reshape(-1, 3)
    places = (states[:, :2] - [x, y]) @ back
    height = np.full((len(agents), 1), 0.8)
    return {
        "gt_boxes": np.column_stack([places, height, sizes, states[:, 2] - yaw]),
        "gt_names": np.array([agent.kind for agent in agents], dtype=str),
        "gt_velocity_3d": np.column_stack([states[:, 3:] @ back, np.zeros(len(agents))]),
        "instance_tokens": [f"{agent.token}-i" for agent in agents],
        "track_tokens": [agent.token for agent in agents],
    }


def write_log(folder: Path, frames: list[dict], name: str | None = None) -> Path:
    """Write a log pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or frames[0]['log_name']}.pkl"
    path.write_bytes(pickle.dumps(frames, protocol=4))
    return path


def write_filter(path: Path, **values: object) -> Path:
    """Write a scene filter with NAVSIM's keys."""
    settings = {"num_history_frames": 4, "num_future_frames": 10, "frame_interval": 1, "has_route": True,
                "max_scenes": None, "log_names": None, "tokens": None, **values}  # fmt: skip
    lines = ["_target_: navsim.common.dataclasses.SceneFilter", "_convert_: 'all'"]
    for key, value in settings.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- '{item}'" for item in value)]
        else:
            lines.append(f"{key}: {'null' if value is None else str(value).lower()}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_clip(
    folder: Path, drive: Drive, start: int, simulation_round: int, token: str | None = None
) -> Path:
    """Write the SimScale clip of 12 frames from `start`; its current frame is the fourth."""
    frames = frames_of(drive)[start : start + 12]
    real = token or frames[3]["token"]
    name = f"{drive.name}-{real}-{simulation_round:03d}"
    for frame in frames:
        frame |= {"token": f"{frame['token']}-{simulation_round:03d}", "log_name": name, "lidar_path": None}
    frames[3]["token"] = f"{real}-{simulation_round:03d}"
    return write_log(folder, frames, name)


REWARDS = (
    "no_at_fault_collisions", "drivable_area_compliance", "driving_direction_compliance", "traffic_light_compliance",
    "ego_progress", "time_to_collision_within_bound", "lane_keeping", "history_comfort",
)  # fmt: skip


def _rewards(pdm_score: np.ndarray) -> dict:
    """Rewards of one scene: most of the other scores are 1, one is not known and one is not there."""
    ones = {name: np.ones(len(pdm_score), np.float16) for name in REWARDS[2:]}
    unknown = {REWARDS[0]: np.full(len(pdm_score), np.nan, np.float16)}
    return {**ones, **unknown, "pdm_score": pdm_score.astype(np.float16)}


def write_rewards(path: Path, tokens: list[str], pdm_scores: np.ndarray) -> Path:
    """Write a reward file for all scenes, (tokens, anchors)."""
    path.write_bytes(
        pickle.dumps({token: _rewards(row) for token, row in zip(tokens, pdm_scores, strict=True)})
    )
    return path


def write_token_rewards(path: Path, pdm_score: np.ndarray) -> None:
    """Write the reward file of one scene."""
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(_rewards(pdm_score)))
