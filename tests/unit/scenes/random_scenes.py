"""Random pool tables: right in structure, arbitrary in content."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from autoscale_ray.scenes.schema import (
    AGENT_TYPES,
    FRAME_TIMES_S,
    NUM_FRAMES,
    POLYGON_LAYERS,
    SCENE_SCHEMA,
)


def random_row(
    rng: np.random.Generator, name: str, *, log: str = "log-0", most: int = 6
) -> dict[str, object]:
    num_agents, num_lanes, num_polygons, num_links, num_center = rng.integers(0, most, size=5)
    lane_counts = rng.integers(2, 6, size=num_lanes)
    polygon_counts = rng.integers(3, 7, size=num_polygons)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(scale=10.0, size=shape).astype(np.float32).ravel()

    def flags(*shape: int) -> np.ndarray:
        return (rng.random(shape) < 0.7).ravel()

    valid = flags(num_agents, NUM_FRAMES)
    states = normal(num_agents, NUM_FRAMES, 5).reshape(-1, 5) * valid[:, None]
    return {
        "scene_id": name,
        "log_id": log,
        "origin_id": None if rng.random() < 0.5 else "origin",
        "prev_scene_id": None,
        "domain": ("real", "synthetic")[rng.integers(2)],
        "source": f"random/{rng.integers(3)}",
        "timestamp_us": int(rng.integers(10**9)),
        "origin_x_m": float(rng.normal(scale=1e6)),
        "origin_y_m": float(rng.normal(scale=1e6)),
        "origin_yaw_rad": float(rng.uniform(-3, 3)),
        "ego_length_m": 4.5,
        "ego_width_m": 1.8,
        "ego_wheelbase_m": 2.7,
        "ego_rear_axle_to_center_m": 1.3,
        "driving_command": int(rng.integers(4)),
        "route_speed_limit_mps": float(rng.choice([np.nan, 13.9])),
        "expert_quality": float("nan"),
        "tags": ["night"] * int(rng.integers(3)),
        "ego_times_us": np.round(FRAME_TIMES_S * 1e6).astype(np.int64),
        "ego_states": normal(NUM_FRAMES, 7),
        "ego_valid": np.ones(NUM_FRAMES, dtype=bool),
        "agent_type": rng.integers(len(AGENT_TYPES), size=num_agents).astype(np.int8),
        "agent_track": rng.permutation(1000)[:num_agents],
        "agent_size": np.abs(normal(num_agents, 2)),
        "agent_states": states.ravel(),
        "agent_valid": valid,
        "lane_points": normal(int(lane_counts.sum()), 2),
        "lane_offsets": np.cumsum([0, *lane_counts]).astype(np.int32),
        "lane_width_m": np.abs(normal(num_lanes)),
        "lane_speed_limit_mps": np.abs(normal(num_lanes)),
        "lane_on_route": flags(num_lanes),
        "lane_links": rng.integers(max(num_lanes, 1), size=(num_links * (num_lanes > 0), 3))
        .astype(np.int32)
        .ravel(),
        "polygon_points": normal(int(polygon_counts.sum()), 2),
        "polygon_offsets": np.cumsum([0, *polygon_counts]).astype(np.int32),
        "polygon_layer": rng.integers(len(POLYGON_LAYERS), size=num_polygons).astype(np.int8),
        "polygon_lane": np.full(num_polygons, -1, dtype=np.int32),
        "polygon_on_route": flags(num_polygons),
        "polygon_red": flags(num_polygons, NUM_FRAMES),
        "centerline": normal(num_center, 3),
    }


def table_of(rows: list[dict[str, object]]) -> pa.Table:
    columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in SCENE_SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCENE_SCHEMA)


def random_table(num_scenes: int, seed: int = 0, *, log: str = "log-0", most: int = 6) -> pa.Table:
    rng = np.random.default_rng(seed)
    return table_of([random_row(rng, f"{log}/{seed}-{n}", log=log, most=most) for n in range(num_scenes)])
