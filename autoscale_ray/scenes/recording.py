"""What a reader hands over: one recording at its native rate, in map coordinates.

Shape legend: K tracks, R rows (one a track and frame), L lanes of the road map, F frames of the recording.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.road_map import RoadMap, empty_road_map
from autoscale_ray.scenes.schema import AGENT_TYPES, FRAME_INTERVAL_S

# A passenger car's proportions (Pacifica: 0.597 and 0.282 of the length), used where a source gives the box
# alone.
WHEELBASE_SHARE = 0.6
REAR_AXLE_TO_CENTER_SHARE = 0.28
MAX_COORDINATE_M = 1e8
MAX_ROWS_IN_GAPS = 1_000_000
MAX_LIGHT_CELLS = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One object over time; frames are steps of the recording, ascending, gaps allowed."""

    key: int
    kind: str
    """One of AGENT_TYPES."""
    length_m: float
    width_m: float
    frames: np.ndarray
    """(n,) int64."""
    poses: np.ndarray
    """(n, 3) box centre x, y and yaw in map coordinates."""
    velocities: np.ndarray | None = None
    """(n, 2) in map axes; central differences of the poses by default."""
    accelerations: np.ndarray | None = None
    """(n,) along the heading; central differences of the velocity by default."""
    can_be_ego: bool = False
    is_recorder: bool = False
    """The car that recorded; others are seen from it and often in part only."""
    wheelbase_m: float = math.nan
    """By default `WHEELBASE_SHARE` of the length."""
    rear_axle_to_center_m: float = math.nan
    """By default `REAR_AXLE_TO_CENTER_SHARE` of the length."""


def recorder_track(
    rear_axle_n3: np.ndarray, frames: np.ndarray, length_m: float, width_m: float, wheelbase_m: float
) -> Track:
    """Return the track of a recording car known by its rear axle (x, y, yaw); its axles lie as far from its ends."""
    heading = np.column_stack([np.cos(rear_axle_n3[:, 2]), np.sin(rear_axle_n3[:, 2])])
    centers = rear_axle_n3[:, :2] + wheelbase_m / 2.0 * heading
    return Track(
        key=-1,
        kind="vehicle",
        length_m=length_m,
        width_m=width_m,
        frames=frames,
        poses=np.column_stack([centers, rear_axle_n3[:, 2]]),
        can_be_ego=True,
        is_recorder=True,
        wheelbase_m=wheelbase_m,
        rear_axle_to_center_m=wheelbase_m / 2.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracks:
    """All tracks of a recording, each dense from its first to its last frame."""

    key_K: np.ndarray
    type_K: np.ndarray
    size_K4: np.ndarray
    """Length, width, wheelbase, rear axle to centre."""
    can_be_ego_K: np.ndarray
    is_recorder_K: np.ndarray
    first_frame_K: np.ndarray
    offsets: np.ndarray
    poses_R3: np.ndarray
    velocities_R2: np.ndarray
    """Map axes; NaN where the source gives none."""
    accelerations_R: np.ndarray
    """Along the heading; NaN where the source gives none."""
    valid_R: np.ndarray

    @property
    def last_frame_K(self) -> np.ndarray:
        """Return the last frame of each track."""
        return self.first_frame_K + np.diff(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.key_K)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """One recording with its road."""

    name: str
    """Unique among the recordings of a source; part of every scene id."""
    log_id: str
    source: str
    tracks: Tracks
    frame_interval_s: float
    """Native step; 0.5 s must be a whole multiple of it."""
    start_us: int = 0
    """Time of frame 0."""
    road: RoadMap = field(default_factory=empty_road_map)
    red_FL: np.ndarray | None = None
    """Bool, light of a lane's connector is red; None without traffic lights."""
    tags: tuple[str, ...] = ()

    @property
    def frames_per_step(self) -> int:
        """Return the native frames in one 2 Hz step."""
        return round(FRAME_INTERVAL_S / self.frame_interval_s)


def gather_tracks(tracks: Sequence[Track]) -> Tracks:
    """Lay tracks end to end, each dense in time, absent frames marked invalid.

    Args:
        tracks: At least one frame each.

    Raises:
        InputRejectedError: A pose, velocity or size that is not finite, or beyond all that a map holds; frames
            so far apart that their gaps would fill the memory.
    """
    firsts = np.array([track.frames[0] for track in tracks], dtype=np.int64)
    lengths = np.array([track.frames[-1] - track.frames[0] + 1 for track in tracks], dtype=np.int64)
    # One frame number that is far off would ask for rows without number.
    num_recorded = sum(len(track.frames) for track in tracks)
    if not lengths.astype(np.float64).sum() - 10.0 * num_recorded <= MAX_ROWS_IN_GAPS:
        rule = (
            f"gaps must be at most {MAX_ROWS_IN_GAPS} frames and 9 for each recorded one, all tracks together"
        )
        raise InputRejectedError(f"track {tracks[int(lengths.argmax())].key}", rule, lengths.max())
    offsets = np.cumsum([0, *lengths])
    starts = (offsets[:-1] - firsts).tolist()
    parts = [np.asarray(track.frames) + start for track, start in zip(tracks, starts, strict=True)]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    poses_R3 = np.zeros((offsets[-1], 3))
    velocities_R2 = np.full((offsets[-1], 2), math.nan)
    accelerations_R = np.full(offsets[-1], math.nan)
    valid_R = np.zeros(offsets[-1], dtype=bool)
    poses_R3[rows], valid_R[rows] = _joined([track.poses for track in tracks], (3,)), True
    velocities_R2[rows] = _joined([_given(track.velocities, track, (2,)) for track in tracks], (2,))
    accelerations_R[rows] = _joined([_given(track.accelerations, track, ()) for track in tracks], ())
    size_K4 = np.array([_vehicle_size(track) for track in tracks], dtype=np.float64).reshape(-1, 4)
    if not (_in_range(poses_R3) and _in_range(velocities_R2, nan=True) and _in_range(size_K4[:, :2])):
        for track in tracks:
            _check_range(track)
    return Tracks(
        key_K=np.array([track.key for track in tracks], dtype=np.int64),
        type_K=np.array([AGENT_TYPES.index(track.kind) for track in tracks], dtype=np.int8),
        size_K4=size_K4,
        can_be_ego_K=np.array([track.can_be_ego for track in tracks], dtype=bool),
        is_recorder_K=np.array([track.is_recorder for track in tracks], dtype=bool),
        first_frame_K=firsts,
        offsets=offsets,
        poses_R3=poses_R3,
        velocities_R2=velocities_R2,
        accelerations_R=accelerations_R,
        valid_R=valid_R,
    )


def no_lights(road: RoadMap, num_frames: int) -> np.ndarray:
    """Return lights of which none is red (F, L), for the reader to fill in.

    Raises:
        InputRejectedError: So many frames and lanes that their table would fill the memory.
    """
    if num_frames * road.num_lanes > MAX_LIGHT_CELLS:
        rule = f"frames times lanes must be at most {MAX_LIGHT_CELLS}"
        raise InputRejectedError("traffic lights", rule, f"{num_frames} times {road.num_lanes}")
    return np.zeros((num_frames, road.num_lanes), dtype=bool)


def _joined(parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape)), *parts])


def _given(values: np.ndarray | None, track: Track, shape: tuple[int, ...]) -> np.ndarray:
    return np.full((len(track.frames), *shape), math.nan) if values is None else values


def _in_range(values: np.ndarray, *, nan: bool = False) -> bool:
    good = np.abs(values) <= MAX_COORDINATE_M
    return bool((good | np.isnan(values) if nan else good).all())


def _check_range(track: Track) -> None:
    size = np.array([track.length_m, track.width_m])
    velocities = np.zeros(1) if track.velocities is None else np.asarray(track.velocities)
    for name, values in (("poses", track.poses), ("velocities", velocities), ("sizes", size)):
        if not _in_range(values, nan=name == "velocities"):
            raise InputRejectedError(
                f"track {track.key}", f"{name} must be finite, at most {MAX_COORDINATE_M:.0e}"
            )


def _vehicle_size(track: Track) -> tuple[float, float, float, float]:
    wheelbase, rear = track.wheelbase_m, track.rear_axle_to_center_m
    return (
        track.length_m,
        track.width_m,
        WHEELBASE_SHARE * track.length_m if math.isnan(wheelbase) else wheelbase,
        REAR_AXLE_TO_CENTER_SHARE * track.length_m if math.isnan(rear) else rear,
    )
