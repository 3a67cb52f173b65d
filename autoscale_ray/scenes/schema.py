"""The Arrow schema of a scene pool: one row per window around one ego vehicle, sampled at 2 Hz.

Frame of reference: every coordinate of a row is in that row's *scene frame*, whose origin is the ego's rear
axle at t = 0, x forward, y left, yaw counter-clockwise; ``origin_*`` is the pose of that frame in map
coordinates (float64, because map coordinates are about 1e6 m). Times: ``NUM_FRAMES`` frames at -2.0, -1.5,
..., 0, ..., 5.0 s; frame ``CURRENT_FRAME`` is t = 0. Frames -1.5 ... 4.0 s of the ego are required; -2.0 s
and the fifth second are optional and masked by ``ego_valid`` (without the fifth second PDMS v1 is missing,
not 0).

Ragged data is stored flat: a ``list`` column holds all values of a scene in C order and the field metadata
key ``stride`` names the shape of one element, for example ``15,5`` for the states of one agent.

Shape legend: T frames (15), A agents, L lanes, Q polygons.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from autoscale_ray.errors import PoolError

SCHEMA_VERSION = 1
FRAME_INTERVAL_S = 0.5
NUM_HISTORY = 5
NUM_FUTURE = 10
NUM_FRAMES = NUM_HISTORY + NUM_FUTURE
CURRENT_FRAME = NUM_HISTORY - 1
NUM_PLAN_FRAMES = 8
FRAME_TIMES_S = (np.arange(NUM_FRAMES) - CURRENT_FRAME) * FRAME_INTERVAL_S
REQUIRED_EGO_FRAMES = slice(1, CURRENT_FRAME + NUM_PLAN_FRAMES + 1)

DOMAINS = ("real", "synthetic")
AGENT_TYPES = ("vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object")
POLYGON_LAYERS = ("roadblock", "lane", "lane_connector", "intersection", "carpark_area", "crosswalk")
DRIVING_COMMANDS = ("left", "forward", "right", "unknown")
LINK_KINDS = ("successor", "left", "right")
EGO_STATE = ("x_m", "y_m", "yaw_rad", "vx_mps", "vy_mps", "ax_mps2", "ay_mps2")
AGENT_STATE = ("x_m", "y_m", "yaw_rad", "vx_mps", "vy_mps")


def _flat(name: str, value_type: pa.DataType, stride: str, meaning: str) -> pa.Field:
    return pa.field(
        name, pa.list_(pa.field("item", value_type, nullable=False)), nullable=False
    ).with_metadata({"stride": stride, "meaning": meaning})


def _scalar(name: str, value_type: pa.DataType, meaning: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, value_type, nullable=nullable).with_metadata({"meaning": meaning})


SCENE_SCHEMA = pa.schema(
    [
        _scalar("scene_id", pa.string(), "unique in the pool; the only join key"),
        _scalar("log_id", pa.string(), "recording the window was cut from; the unit of every split"),
        _scalar(
            "origin_id", pa.string(), "scene_id of the real source of a perturbed scene, else null", True
        ),
        _scalar("prev_scene_id", pa.string(), "window half a second earlier in this pool, else null", True),
        _scalar("domain", pa.string(), "real or synthetic"),
        _scalar("source", pa.string(), "data set or generator, for example commonroad/USA_US101"),
        _scalar("timestamp_us", pa.int64(), "time of frame 0 s in the recording"),
        _scalar("origin_x_m", pa.float64(), "map position of the ego's rear axle at 0 s"),
        _scalar("origin_y_m", pa.float64(), "map position of the ego's rear axle at 0 s"),
        _scalar("origin_yaw_rad", pa.float64(), "map heading of the ego at 0 s"),
        _scalar("ego_length_m", pa.float64(), "bumper to bumper"),
        _scalar("ego_width_m", pa.float64(), "without mirrors"),
        _scalar("ego_wheelbase_m", pa.float64(), "rear axle to front axle"),
        _scalar("ego_rear_axle_to_center_m", pa.float64(), "rear axle to box centre, positive forward"),
        _scalar("driving_command", pa.int8(), "index into DRIVING_COMMANDS"),
        _scalar("route_speed_limit_mps", pa.float64(), "limit on the route at the ego, NaN when unknown"),
        _scalar("expert_quality", pa.float32(), "score of the logged driver in [0, 1] if shipped, else NaN"),
        _flat("tags", pa.string(), "", "free labels from the source; never used for selection by default"),
        _flat("ego_times_us", pa.int64(), "15", "frame times relative to 0 s; nominal k * 500000"),
        _flat(
            "ego_states",
            pa.float32(),
            "15,7",
            "x, y, yaw (scene frame), vx, vy, ax, ay (body frame), rear axle",
        ),
        _flat("ego_valid", pa.bool_(), "15", "frame recorded"),
        _flat("agent_type", pa.int8(), "A", "index into AGENT_TYPES"),
        _flat("agent_track", pa.int64(), "A", "track number within the log"),
        _flat("agent_size", pa.float32(), "A,2", "length, width in m"),
        _flat("agent_states", pa.float32(), "A,15,5", "box centre x, y, yaw, vx, vy, all in the scene frame"),
        _flat("agent_valid", pa.bool_(), "A,15", "seen in that frame; invalid states are 0"),
        _flat("lane_points", pa.float32(), "V,2", "centre line vertices of all lanes, in driving direction"),
        _flat("lane_offsets", pa.int32(), "L+1", "first vertex of each lane; last entry is V"),
        _flat("lane_width_m", pa.float32(), "L", "mean width, NaN when unknown"),
        _flat("lane_speed_limit_mps", pa.float32(), "L", "NaN when unknown"),
        _flat("lane_on_route", pa.bool_(), "L", "lane belongs to the ego's route"),
        _flat("lane_links", pa.int32(), "E,3", "from lane, to lane, index into LINK_KINDS"),
        _flat("polygon_points", pa.float32(), "W,2", "ring vertices of all polygons, not closed"),
        _flat("polygon_offsets", pa.int32(), "Q+1", "first vertex of each polygon; last entry is W"),
        _flat("polygon_layer", pa.int8(), "Q", "index into POLYGON_LAYERS"),
        _flat("polygon_lane", pa.int32(), "Q", "lane of a lane or connector polygon, else -1"),
        _flat("polygon_on_route", pa.bool_(), "Q", "lane or connector of the route"),
        _flat("polygon_red", pa.bool_(), "Q,15", "connector whose light is red in that frame"),
        _flat("centerline", pa.float32(), "C,3", "route centre line x, y, yaw; covers the drive and beyond"),
    ],
    metadata={"autoscale_schema_version": str(SCHEMA_VERSION)},
)


def inner_shape(field: pa.Field) -> tuple[int, ...]:
    """Return the fixed trailing shape of one element of a flat column: ``(15, 5)`` for stride ``A,15,5``."""
    parts = (field.metadata or {}).get(b"stride", b"").decode().split(",")
    return tuple(int(part) for part in parts if part.isdigit())


def check_schema(schema: pa.Schema, where: str) -> None:
    """Refuse a table whose columns or version differ from `SCENE_SCHEMA`; never cast.

    Args:
        schema: Schema of the table or file.
        where: Path or name for the message.

    Raises:
        PoolError: Other schema version, missing column, extra column or another type.
    """
    if schema.equals(SCENE_SCHEMA, check_metadata=True):
        return
    found_version = (schema.metadata or {}).get(b"autoscale_schema_version", b"none").decode()
    if found_version != str(SCHEMA_VERSION):
        raise PoolError(where, f"scene schema version must be {SCHEMA_VERSION}", found_version)
    for field in SCENE_SCHEMA:
        if field.name not in schema.names:
            raise PoolError(where, f"column {field.name} is missing")
        found = schema.field(field.name).type
        if found != field.type:
            raise PoolError(where, f"column {field.name} must have type {field.type}", str(found))
    extra = [name for name in schema.names if name not in SCENE_SCHEMA.names]
    if extra:
        raise PoolError(where, "unknown columns", extra)
