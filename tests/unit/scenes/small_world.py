"""A small hand-made recording: a straight two-lane road with a fork, and cars whose motion is known in closed form."""

from __future__ import annotations

import math

import numpy as np

from autoscale_ray.scenes.recording import Recording, Track, gather_tracks
from autoscale_ray.scenes.road_map import Lane, RoadMap, make_road_map, offset_borders

ROTATION_RAD = 0.7
SHIFT = np.array([4.0e5, 5.0e6])


def place(points: np.ndarray) -> np.ndarray:
    """Turn and shift local points into map coordinates."""
    cos, sin = math.cos(ROTATION_RAD), math.sin(ROTATION_RAD)
    return np.asarray(points) @ np.array([[cos, sin], [-sin, cos]]) + SHIFT


def lane(key: str, points: list[tuple[float, float]], **kwargs) -> Lane:
    left, right = offset_borders(place(np.array(points)), 2.0, 2.0)
    return Lane(key=key, left=left, right=right, **kwargs)


def fork_road() -> RoadMap:
    """Lanes a and b side by side, 0 to 100 m; behind a: straight on (a2) or left (turn)."""
    turn = [(100.0, 0.0)] + [
        (100.0 + 15.0 * math.sin(t), 15.0 - 15.0 * math.cos(t)) for t in np.linspace(0.2, 1.57, 8)
    ]
    return make_road_map(
        [
            lane(
                "a", [(0, 0), (100, 0)], successors=("a2", "turn"), right_neighbour="b", speed_limit_mps=13.9
            ),
            lane("b", [(0, -4), (100, -4)], successors=("b2",)),
            lane("a2", [(100, 0), (200, 0)], right_neighbour="b2"),
            lane("b2", [(100, -4), (200, -4)]),
            lane("turn", [*turn, (115.0, 80.0)]),
        ]
    )


def car(key: int, start: float, speed: float, offset: float, first: int, last: int, **kwargs) -> Track:
    """A car driving along +x of the road at constant speed; frames are tenths of a second."""
    frames = np.arange(first, last + 1)
    centers = np.column_stack([start + speed * frames * 0.1, np.full(len(frames), offset)])
    poses = np.column_stack([place(centers), np.full(len(frames), ROTATION_RAD)])
    return Track(
        key=key,
        kind="vehicle",
        length_m=4.0,
        width_m=1.8,
        frames=frames,
        poses=poses,
        can_be_ego=True,
        **kwargs,
    )


def two_cars(name: str = "drive", **kwargs) -> Recording:
    """Car 1 in lane a at 5 m/s for 12 s; car 2 in lane b, 10 m ahead, from 1.0 to 9.0 s."""
    tracks = [car(1, 20.0, 5.0, 0.0, 0, 120), car(2, 30.0, 5.0, -4.0, 10, 90)]
    return Recording(
        name=name,
        log_id=f"test/{name}",
        source="test",
        tracks=gather_tracks(tracks),
        frame_interval_s=0.1,
        road=fork_road(),
        **kwargs,
    )
