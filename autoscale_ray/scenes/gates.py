"""Quality gates: rules that every scene of a pool keeps; a scene that breaks one goes to the quarantine
table.

Shape legend: as in `batch`; D points tested against areas, P point-edge pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from autoscale_ray.scenes.batch import SceneBatch, batch_from_table, flat_column
from autoscale_ray.scenes.ragged import ragged_index, row_of
from autoscale_ray.scenes.schema import (
    CURRENT_FRAME,
    FRAME_INTERVAL_S,
    NUM_PLAN_FRAMES,
    POLYGON_LAYERS,
    REQUIRED_EGO_FRAMES,
)

QUARANTINE_SCHEMA = pa.schema(
    [("file", pa.string()), ("element", pa.string()), ("rule", pa.string()), ("value", pa.string())]
)
MAX_EGO_SPEED_MPS = 60.0
MAX_AGENT_SPEED_MPS = 75.0
MAX_EGO_ACCELERATION_MPS2 = 15.0
MAX_DEAD_RECKONING_ERROR_M = 3.0
MAX_YAW_STEP_RAD = 1.2
MIN_SIDEWAYS_STEP_M = 2.0
MAX_SIDEWAYS_RAD = 0.8
MAX_OFF_ROAD_M = 1.0
EGO_LENGTH_M, EGO_WIDTH_M = (1.5, 30.0), (0.5, 5.0)
AGENT_LENGTH_M, AGENT_WIDTH_M = (0.05, 40.0), (0.05, 15.0)
DRIVABLE_LAYERS = tuple(POLYGON_LAYERS.index(name) for name in ("roadblock", "intersection", "carpark_area"))

Gate = Callable[[SceneBatch], tuple[Tensor, Tensor]]
"""Return, for each scene, whether it breaks the rule (bool) and the value that decided (float)."""


def _worst(values: Tensor, owner: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64).scatter_reduce_(0, owner, values.double(), "amax")


def _none_broken(count: int) -> tuple[Tensor, Tensor]:
    """Return what a gate does whose rule a cheaper test shows to be kept by all."""
    return torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64)


def _not_finite(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    count = len(batch)
    tensors = (batch.agent_states_AT5, batch.agent_size_A2, batch.lane_points_V2, batch.polygon_points_W2,
               batch.centerline_C3)  # fmt: skip
    everything = (batch.ego_states_NT7, batch.ego_size_N4, *tensors)
    # The sum of the squares is finite only where every number is.
    if all(np.isfinite(np.vdot(tensor.numpy(), tensor.numpy())) for tensor in everything):
        return _none_broken(count)
    bad = (~batch.ego_states_NT7.isfinite()).flatten(1).sum(1) + (~batch.ego_size_N4.isfinite()).sum(1)
    owners = (
        batch.agent_row_A,
        batch.agent_row_A,
        batch.lane_row_L.repeat_interleave(batch.lane_point_offsets.diff()),
        batch.polygon_row_Q.repeat_interleave(batch.polygon_point_offsets.diff()),
        row_of(batch.centerline_offsets),
    )
    for tensor, owner in zip(tensors, owners, strict=True):
        bad = bad.index_add(0, owner, (~tensor.isfinite()).flatten(1).sum(1))
    assert len(bad) == count
    return bad > 0, bad.double()


def _missing_frames(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    missing = (~batch.ego_valid_NT[:, REQUIRED_EGO_FRAMES]).sum(1)
    return missing > 0, missing.double()


def _ego_speed(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    speed = batch.ego_states_NT7[..., 3:5].norm(dim=-1).amax(1).double()
    return speed > MAX_EGO_SPEED_MPS, speed


def _ego_acceleration(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    value = batch.ego_states_NT7[..., 5:7].norm(dim=-1).amax(1).double()
    return value > MAX_EGO_ACCELERATION_MPS2, value


def _ego_teleport(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    """Compare each step with the mean of the velocities at its ends."""
    yaw = batch.ego_states_NT7[..., 2]
    vx, vy = batch.ego_states_NT7[..., 3], batch.ego_states_NT7[..., 4]
    velocity = torch.stack([vx * yaw.cos() - vy * yaw.sin(), vx * yaw.sin() + vy * yaw.cos()], dim=-1)
    expected = (velocity[:, 1:] + velocity[:, :-1]) / 2.0 * FRAME_INTERVAL_S
    error = (batch.ego_states_NT7[..., :2].diff(dim=1) - expected).norm(dim=-1)
    both = batch.ego_valid_NT[:, 1:] & batch.ego_valid_NT[:, :-1]
    value = torch.where(both, error, 0.0).amax(1).double()
    return value > MAX_DEAD_RECKONING_ERROR_M, value


def _ego_yaw_jump(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    turn = _wrapped(batch.ego_states_NT7[..., 2].diff(dim=1)).abs()
    both = batch.ego_valid_NT[:, 1:] & batch.ego_valid_NT[:, :-1]
    value = torch.where(both, turn, 0.0).amax(1).double()
    return value > MAX_YAW_STEP_RAD, value


def _ego_sideways(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    """Compare the direction of each larger step with the heading; driving backwards is allowed."""
    step = batch.ego_states_NT7[..., :2].diff(dim=1)
    heading = batch.ego_states_NT7[..., 2]
    middle = heading[:, :-1] + _wrapped(heading.diff(dim=1)) / 2.0
    angle = _wrapped(2.0 * (torch.atan2(step[..., 1], step[..., 0]) - middle)).abs() / 2.0
    both = batch.ego_valid_NT[:, 1:] & batch.ego_valid_NT[:, :-1] & (step.norm(dim=-1) >= MIN_SIDEWAYS_STEP_M)
    value = torch.where(both, angle, 0.0).amax(1).double()
    return value > MAX_SIDEWAYS_RAD, value


def _wrapped(angle: Tensor) -> Tensor:
    return torch.remainder(angle + torch.pi, 2.0 * torch.pi) - torch.pi


def _agent_speed(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    # Single columns: NumPy runs over an axis of two many times as slowly.
    speeds = (batch.agent_states_AT5[..., axis].numpy() for axis in (3, 4))
    if all(np.abs(speed).max(initial=0.0) < 0.7 * MAX_AGENT_SPEED_MPS for speed in speeds):
        return _none_broken(len(batch))
    value = _worst(batch.agent_states_AT5[..., 3:].norm(dim=-1).amax(1), batch.agent_row_A, len(batch))
    return value > MAX_AGENT_SPEED_MPS, value


def _agent_teleport(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    both = batch.agent_valid_AT[:, 1:] & batch.agent_valid_AT[:, :-1]
    furthest = 0.7 * MAX_AGENT_SPEED_MPS * FRAME_INTERVAL_S
    steps = (np.diff(batch.agent_states_AT5[..., axis].numpy(), axis=1)[both.numpy()] for axis in range(2))
    if all(np.abs(step).max(initial=0.0) < furthest for step in steps):
        return _none_broken(len(batch))
    step = torch.where(both, batch.agent_states_AT5[..., :2].diff(dim=1).norm(dim=-1), 0.0)
    value = _worst(step.amax(1) / FRAME_INTERVAL_S, batch.agent_row_A, len(batch))
    return value > MAX_AGENT_SPEED_MPS, value


def _ego_box(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    length, width, wheelbase, rear = batch.ego_size_N4.double().unbind(1)
    good = (
        _between(length, EGO_LENGTH_M)
        & _between(width, EGO_WIDTH_M)
        & (wheelbase > 0.5)
        & (wheelbase < length)
    )
    return ~(good & (rear >= 0.0) & (rear < length)), length


def _agent_box(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    length, width = batch.agent_size_A2.double().unbind(1)
    bad = ~(_between(length, AGENT_LENGTH_M) & _between(width, AGENT_WIDTH_M))
    count = torch.zeros(len(batch), dtype=torch.float64).index_add(0, batch.agent_row_A, bad.double())
    return count > 0, count


def _between(value: Tensor, limits: tuple[float, float]) -> Tensor:
    return (value >= limits[0]) & (value <= limits[1])


def _off_road(batch: SceneBatch) -> tuple[Tensor, Tensor]:
    """Measure how far the ego's box centre is off the drivable area at 0 and 4 s, where the scene has a
    map."""
    frames = [CURRENT_FRAME, CURRENT_FRAME + NUM_PLAN_FRAMES]
    pose = batch.ego_states_NT7[:, frames, :3].double()
    forward = torch.stack([pose[..., 2].cos(), pose[..., 2].sin()], dim=-1)
    centers = pose[..., :2] + batch.ego_size_N4[:, None, 3:].double() * forward
    value = area_distance(batch, centers).amax(1)
    return value > MAX_OFF_ROAD_M, value


GATES: dict[str, Gate] = {
    "numbers must be finite": _not_finite,
    "ego must be recorded from -1.5 to 4 s": _missing_frames,
    f"ego speed must be at most {MAX_EGO_SPEED_MPS:.0f} m/s": _ego_speed,
    f"ego acceleration must be at most {MAX_EGO_ACCELERATION_MPS2:.0f} m/s2": _ego_acceleration,
    f"ego must move as its velocity says, within {MAX_DEAD_RECKONING_ERROR_M:.0f} m a step": _ego_teleport,
    f"ego must turn by at most {MAX_YAW_STEP_RAD} rad a step": _ego_yaw_jump,
    f"ego must drive along its heading, within {MAX_SIDEWAYS_RAD} rad": _ego_sideways,
    f"agent speed must be at most {MAX_AGENT_SPEED_MPS:.0f} m/s": _agent_speed,
    f"agents must not jump faster than {MAX_AGENT_SPEED_MPS:.0f} m/s": _agent_teleport,
    "ego box must be that of a road vehicle": _ego_box,
    "agent boxes must have sane sizes": _agent_box,
    f"ego must be on the drivable area, within {MAX_OFF_ROAD_M:.0f} m": _off_road,
}


def area_distance(batch: SceneBatch, points_ND2: Tensor) -> Tensor:
    """Measure the distance of points to their scene's drivable area; 0 inside, and 0 where a scene has no
    area.

    Args:
        batch: Scenes.
        points_ND2: D points of each scene, float64, scene frame.

    Returns:
        Float64 (N, D), m.
    """
    drivable_Q = torch.isin(batch.polygon_layer_Q, torch.tensor(DRIVABLE_LAYERS))
    rings = torch.nonzero(drivable_Q).flatten()
    has_area_N = torch.zeros(len(points_ND2), dtype=torch.bool)
    has_area_N[batch.polygon_row_Q[rings]] = True
    inside_ND = _inside(batch, drivable_Q, points_ND2)
    # Most points lie inside; only where one does not, the distance to every edge is measured.
    outside_N = has_area_N & ~inside_ND.all(1)
    if not bool(outside_N.any()):
        return torch.zeros_like(inside_ND, dtype=torch.float64)
    far = _nearest_edge(batch, rings[outside_N[batch.polygon_row_Q[rings]]], points_ND2)
    return torch.where(inside_ND | ~has_area_N[:, None], 0.0, far)


def _inside(batch: SceneBatch, drivable_Q: Tensor, points_ND2: Tensor) -> Tensor:
    """Tell of each point (bool, N, D) whether a drivable ring of its scene holds it: a ray along +x crosses the ring
    an odd number of times."""
    offsets, points_W2 = batch.polygon_point_offsets.numpy(), batch.polygon_points_W2.numpy()
    height_W, scene_Q = np.ascontiguousarray(points_W2[:, 1]), batch.polygon_row_Q.numpy()
    counts_N = np.diff(offsets[batch.polygon_offsets.numpy()])
    filled = np.flatnonzero(np.diff(offsets))
    first, last = offsets[filled], offsets[filled + 1] - 1
    inside_ND = np.zeros(points_ND2.shape[:2], dtype=bool)
    for number, points_N2 in enumerate(points_ND2.numpy().swapaxes(0, 1)):
        above_W = height_W > np.repeat(_single_below(points_N2[:, 1]), counts_N)
        next_W = np.append(above_W[1:], False)
        next_W[last] = above_W[first]
        # Few edges span the height of the point; only these are looked at.
        edge = np.flatnonzero(above_W != next_W)
        ring = np.searchsorted(offsets, edge, side="right") - 1
        drivable = drivable_Q.numpy()[ring]
        edge, ring = edge[drivable], ring[drivable]
        begin = points_W2[edge].astype(np.float64)
        end = points_W2[np.where(edge + 1 == offsets[ring + 1], offsets[ring], edge + 1)].astype(np.float64)
        point = points_N2[scene_Q[ring]]
        share = (point[:, 1] - begin[:, 1]) / (end[:, 1] - begin[:, 1])
        crossed = ring[point[:, 0] < begin[:, 0] + share * (end[:, 0] - begin[:, 0])]
        odd_Q = np.bincount(crossed, minlength=len(scene_Q)) % 2 == 1
        inside_ND[scene_Q[odd_Q], number] = True
    return torch.from_numpy(inside_ND)


def _single_below(values: np.ndarray) -> np.ndarray:
    """Return the largest float32 that is at most each float64: whatever float32 is above one is above both."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near)


def _edges(batch: SceneBatch, rings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ring number, begin and end of every edge of some rings, float64."""
    lengths = batch.polygon_point_offsets.diff()[rings]
    vertex, offsets = ragged_index(batch.polygon_point_offsets[rings], lengths)
    ring = row_of(offsets)
    following = torch.where(torch.arange(len(vertex)) + 1 == offsets[ring + 1], 1 - lengths[ring], 1)
    points_W2 = batch.polygon_points_W2
    return ring, points_W2[vertex].double(), points_W2[vertex + following].double()


def _nearest_edge(batch: SceneBatch, rings: Tensor, points_ND2: Tensor) -> Tensor:
    """Return the distance of each point to the nearest edge of its scene's rings (N, D), inf without."""
    ring, begin, end = _edges(batch, rings)
    scene = batch.polygon_row_Q[rings][ring]
    nearest_ND = torch.full(points_ND2.shape[:2], torch.inf, dtype=torch.float64)
    for number in range(points_ND2.shape[1]):
        distance = _edge_distance(points_ND2[scene, number], begin, end)
        nearest_ND[:, number].scatter_reduce_(0, scene, distance, "amin")
    return nearest_ND


def _edge_distance(point: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    along = end - begin
    share = ((point - begin) * along).sum(1) / along.square().sum(1).clamp(min=1e-12)
    return (point - begin - share.clamp(0.0, 1.0)[:, None] * along).norm(dim=1)


def gate(table: pa.Table, file: str) -> tuple[pa.Table, pa.Table]:
    """Part a table into the scenes that keep every rule and quarantine rows for the others.

    Args:
        table: Rows of the scene schema.
        file: Where they came from, for the quarantine rows.

    Returns:
        Good scenes, and one row of `QUARANTINE_SCHEMA` for each other scene with the first rule it breaks.
    """
    batch = batch_from_table(table)
    rule = np.full(len(batch), -1)
    values = np.zeros(len(batch))
    for number, check in enumerate(GATES.values()):
        broken, value = (tensor.numpy() for tensor in check(batch))
        first = broken & (rule < 0)
        rule[first], values[first] = number, value[first]
    times = flat_column(table, "ego_times_us")[0].numpy()
    unordered = (np.diff(times, axis=1) <= 0).any(axis=1) & (rule < 0)
    bad = np.flatnonzero((rule >= 0) | unordered)
    if not len(bad):
        return table, QUARANTINE_SCHEMA.empty_table()
    names = [*GATES, "ego times must grow"]
    ids = table["scene_id"].take(bad).to_pylist()
    rows = {
        "file": [file] * len(bad),
        "element": ids,
        "rule": [names[number] for number in rule[bad]],
        "value": [f"{value:.6g}" for value in values[bad]],
    }
    good = table.take(np.setdiff1d(np.arange(len(table)), bad)).combine_chunks()
    return good, pa.table(rows, schema=QUARANTINE_SCHEMA)
