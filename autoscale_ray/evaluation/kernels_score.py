"""Compiled sub-scores of one drive at a time; the same rules as `metrics` and `comfort`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from autoscale_ray.evaluation import metrics as rules
from autoscale_ray.evaluation.arena import IS_DRIVABLE, IS_INTERSECTION, IS_LANE, IS_ROUTE_LANE
from autoscale_ray.evaluation.comfort import BOUNDS, NUM_DECIMALS
from autoscale_ray.evaluation.kernels_geometry import box_meets_ring, boxes_meet, nearest_on_path
from autoscale_ray.evaluation.kernels_grid import RingGrid, cell_of
from autoscale_ray.evaluation.kernels_track import sample_waypoints, simulate_one
from autoscale_ray.evaluation.timing import NUM_STEPS

NUM_VALUES = 10
NC, DAC, DDC, TLC, TTC, LK, COMFORT, PROGRESS, COLLISION_STEP, TTC_STEP = range(NUM_VALUES)
MULTIPLE, OFF_ROAD, OFF_ROUTE, CENTRE_IN, REAR_IN = 1, 2, 4, 8, 16
CX, CY, COS, SIN, SPEED = range(5)
SCALE = 10.0**NUM_DECIMALS
LIMITS = np.array(BOUNDS)
LOW_M, HIGH_M = rules.DIRECTION_LIMITS_M
WINDOW = rules.DIRECTION_HORIZON + 1
COS_AHEAD, COS_BEHIND = rules.COS_AHEAD, rules.COS_BEHIND
STOPPED_MPS, STANDING_MPS = rules.STOPPED_EGO_SPEED_MPS, rules.STANDING_SPEED_MPS
DEVIATION_M, LANE_STEPS = rules.LANE_DEVIATION_M, rules.LANE_STEPS
TTC_OFFSETS = rules.TTC_OFFSETS


class Filter(NamedTuple):
    """A linear filter by rows: output t is the dot of weights[t] with the input from starts[t] on."""

    starts: np.ndarray
    weights: np.ndarray


class ComfortFilters(NamedTuple):
    """Filters of one number of samples: accelerations, smoothing before jerk, jerk, yaw acceleration, yaw rate."""

    acceleration: Filter
    smoothing: Filter
    jerk: Filter
    yaw_acceleration: Filter
    yaw_rate: Filter


class SceneTables(NamedTuple):
    """An arena as the kernels read it; `vehicle` holds half length, half width, rear to centre, wheel base."""

    boxes: np.ndarray
    present: np.ndarray
    half_sizes: np.ndarray
    is_static: np.ndarray
    is_stopped: np.ndarray
    is_ignored: np.ndarray
    agent_bounds: np.ndarray
    ring_offsets: np.ndarray
    ring_xy: np.ndarray
    ring_next: np.ndarray
    ring_kinds: np.ndarray
    ring_bounds: np.ndarray
    grid: RingGrid
    red_rings: np.ndarray
    red_steps: np.ndarray
    path_xy: np.ndarray
    path_progress: np.ndarray
    path_circles: np.ndarray
    history: np.ndarray
    start: np.ndarray
    ego_pose: np.ndarray
    vehicle: np.ndarray
    speed_matrix: np.ndarray


@njit(cache=True, nogil=True, error_model="numpy")
def agent_bounds(boxes, present):
    """Return the bounds (A, 4) of every agent's centres; an agent never present has empty bounds."""
    bounds = np.empty((len(boxes), 4))
    for agent in range(len(boxes)):
        low_x, low_y, high_x, high_y = np.inf, np.inf, -np.inf, -np.inf
        for step in range(boxes.shape[1]):
            if present[agent, step]:
                x, y = boxes[agent, step, 0], boxes[agent, step, 1]
                low_x, low_y, high_x, high_y = min(low_x, x), min(low_y, y), max(high_x, x), max(high_y, y)
        bounds[agent, 0], bounds[agent, 1], bounds[agent, 2], bounds[agent, 3] = low_x, low_y, high_x, high_y
    return bounds


@njit(cache=True, nogil=True, error_model="numpy")
def _ego_boxes(states, vehicle, ego):
    for step in range(NUM_STEPS):
        cos, sin = math.cos(states[step, 2]), math.sin(states[step, 2])
        ego[step, CX] = states[step, 0] + vehicle[2] * cos
        ego[step, CY] = states[step, 1] + vehicle[2] * sin
        ego[step, COS], ego[step, SIN] = cos, sin
        ego[step, SPEED] = math.sqrt(states[step, 3] ** 2 + states[step, 4] ** 2)


@njit(cache=True, nogil=True, error_model="numpy")
def _slot_holds(x, y, first, last, slot_edges, ring_next, ring_xy):
    """Tell whether the point lies strictly inside the ring of the slot with edges first..last - 1."""
    is_inside = False
    for index in range(first, last):
        edge = slot_edges[index]
        other = ring_next[edge]
        y1, y2 = ring_xy[edge, 1], ring_xy[other, 1]
        if (y1 < y and y2 < y) or (y1 > y and y2 > y):
            continue
        x1, x2 = ring_xy[edge, 0], ring_xy[other, 0]
        if x1 < x and x2 < x:
            continue
        turn = (x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)
        if turn == 0.0 and min(x1, x2) <= x <= max(x1, x2) and min(y1, y2) <= y <= max(y1, y2):
            return False
        if (y1 > y) != (y2 > y) and (turn > 0.0) == (y2 > y1):
            is_inside = not is_inside
    return is_inside


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _kinds_at(x, y, scene, corner_counts, touched, num_touched):
    """Return the kinds of all rings that hold the point; with num_touched >= 0 also count lanes per ring."""
    grid, kinds = scene.grid, 0
    cell = cell_of(x, y, grid.cell_m, grid.origin, grid.shape)
    if cell >= 0:
        for index in range(grid.cell_starts[cell], grid.cell_starts[cell + 1]):
            entry = grid.cell_entries[index]
            slot = -entry - 1
            ring = entry - 1 if entry > 0 else grid.slot_ring[slot]
            kind = scene.ring_kinds[ring]
            counts_lane = num_touched >= 0 and (kind & IS_LANE) > 0
            if (kinds | kind) == kinds and not counts_lane:
                continue
            if entry < 0:
                first, last = grid.slot_starts[slot], grid.slot_starts[slot + 1]
                if not _slot_holds(x, y, first, last, grid.slot_edges, scene.ring_next, scene.ring_xy):
                    continue
            kinds |= kind
            if counts_lane:
                if corner_counts[ring] == 0:
                    touched[num_touched] = ring
                    num_touched += 1
                corner_counts[ring] += 1
    return kinds, num_touched


@njit(cache=True, nogil=True, error_model="numpy")
def _areas(states, ego, scene, areas):
    """Fill the area bits (41,) of one drive."""
    corner_counts = np.zeros(len(scene.ring_kinds), dtype=np.int64)
    touched = np.empty(len(scene.ring_kinds), dtype=np.int64)
    half_length, half_width = scene.vehicle[0], scene.vehicle[1]
    for step in range(NUM_STEPS):
        cos, sin = ego[step, COS], ego[step, SIN]
        num_touched, bits = 0, 0
        for point in range(6):  # front left, rear left, rear right, front right, centre, rear axle
            x, y = states[step, 0], states[step, 1]
            if point < 5:
                along = 0.0 if point == 4 else (half_length if point == 0 or point == 3 else -half_length)
                left = 0.0 if point == 4 else (half_width if point < 2 else -half_width)
                x, y = ego[step, CX] + along * cos - left * sin, ego[step, CY] + along * sin + left * cos
            listed = num_touched if point < 4 else -1
            kinds, listed = _kinds_at(x, y, scene, corner_counts, touched, listed)
            if point < 4:
                num_touched = listed
                bits |= 0 if (kinds & IS_DRIVABLE) > 0 else OFF_ROAD
            elif point == 4:
                bits |= 0 if (kinds & IS_ROUTE_LANE) > 0 else OFF_ROUTE
                bits |= CENTRE_IN if (kinds & IS_INTERSECTION) > 0 else 0
            else:
                bits |= REAR_IN if (kinds & IS_INTERSECTION) > 0 else 0
        whole = False
        for index in range(num_touched):
            whole = whole or corner_counts[touched[index]] == 4
            corner_counts[touched[index]] = 0
        areas[step] = bits | (MULTIPLE if num_touched > 1 and not whole else 0)


@njit(cache=True, nogil=True, error_model="numpy")
def _meets(ego, step, offset, box, size, vehicle, reach):
    """Tell whether the ego, moved on for `offset` steps, shares a point with an agent's box then."""
    at = step + offset
    ahead = ego[step, SPEED] * (0.1 * offset)
    dx = box[at, 0] - (ego[step, CX] + ahead * ego[step, COS])
    dy = box[at, 1] - (ego[step, CY] + ahead * ego[step, SIN])
    if dx * dx + dy * dy > reach:
        return False
    return boxes_meet(
        dx,
        dy,
        ego[step, COS],
        ego[step, SIN],
        vehicle[0],
        vehicle[1],
        box[at, 2],
        box[at, 3],
        size[0],
        size[1],
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _bearing(states, ego, step, x, y):
    dx, dy = x - states[step, 0], y - states[step, 1]
    along, distance = dx * ego[step, COS] + dy * ego[step, SIN], math.sqrt(dx * dx + dy * dy)
    return along > COS_AHEAD * distance, along < COS_BEHIND * distance


@njit(cache=True, nogil=True, error_model="numpy")
def _is_at_fault(states, ego, areas, step, agent, scene):
    if ego[step, SPEED] <= STOPPED_MPS:
        return False
    if scene.is_stopped[agent]:
        return True
    x, y, cos, sin = scene.boxes[agent, step]
    if _bearing(states, ego, step, x, y)[1]:
        return False
    if areas[step] & (MULTIPLE | OFF_ROAD):
        return True
    half_length, half_width = scene.vehicle[0], scene.vehicle[1]
    dx = x - (ego[step, CX] + half_length * ego[step, COS])
    dy = y - (ego[step, CY] + half_length * ego[step, SIN])
    size = scene.half_sizes[agent]
    return boxes_meet(dx, dy, ego[step, COS], ego[step, SIN], 0.0, half_width, cos, sin, size[0], size[1])


@njit(cache=True, nogil=True, error_model="numpy")
def _first_contacts(ego, box, present, size, vehicle, num_ttc_steps):
    """Return the first step of a contact, and the first (step, offset) of one within the next second."""
    contact, ttc_step, ttc_offset = -1, -1, 0
    reach = math.sqrt(size[0] ** 2 + size[1] ** 2) + math.sqrt(vehicle[0] ** 2 + vehicle[1] ** 2)
    reach = reach * reach * (1.0 + 1e-9)
    for step in range(NUM_STEPS):
        tests_ttc = ttc_step < 0 and step < num_ttc_steps and ego[step, SPEED] >= STANDING_MPS
        if contact >= 0 and (ttc_step >= 0 or step >= num_ttc_steps):
            break
        if (contact < 0 or tests_ttc) and present[step] and _meets(ego, step, 0, box, size, vehicle, reach):
            contact = step if contact < 0 else contact
            if tests_ttc:
                ttc_step, tests_ttc = step, False
        if tests_ttc:
            for offset in TTC_OFFSETS[1:]:
                if present[step + offset] and _meets(ego, step, offset, box, size, vehicle, reach):
                    ttc_step, ttc_offset = step, offset
                    break
    return contact, ttc_step, ttc_offset


@njit(cache=True, nogil=True, error_model="numpy")
def _reach_bounds(ego, margin):
    """Bound all centres of the ego, moved on for up to 0.9 s, with a margin."""
    low_x, low_y, high_x, high_y = np.inf, np.inf, -np.inf, -np.inf
    for step in range(NUM_STEPS):
        ahead = 0.1 * TTC_OFFSETS[-1] * ego[step, SPEED]
        x, y = ego[step, CX], ego[step, CY]
        end_x, end_y = x + ahead * ego[step, COS], y + ahead * ego[step, SIN]
        low_x, low_y = min(low_x, x, end_x), min(low_y, y, end_y)
        high_x, high_y = max(high_x, x, end_x), max(high_y, y, end_y)
    return low_x - margin, low_y - margin, high_x + margin, high_y + margin


@njit(cache=True, nogil=True, error_model="numpy")
def _agents(states, ego, areas, scene, num_ttc_steps, values):
    """Fill NC and TTC and the steps of their first infractions."""
    values[NC], values[TTC], values[COLLISION_STEP], values[TTC_STEP] = 1.0, 1.0, np.inf, np.inf
    margin = math.sqrt(scene.vehicle[0] ** 2 + scene.vehicle[1] ** 2) * (1.0 + 1e-9)
    low_x, low_y, high_x, high_y = _reach_bounds(ego, margin)
    for agent in range(len(scene.boxes)):
        radius = math.sqrt(scene.half_sizes[agent, 0] ** 2 + scene.half_sizes[agent, 1] ** 2) * (1.0 + 1e-9)
        bounds = scene.agent_bounds[agent]
        apart = bounds[0] - radius > high_x or bounds[2] + radius < low_x
        if apart or bounds[1] - radius > high_y or bounds[3] + radius < low_y or scene.is_ignored[agent]:
            continue
        track = (scene.boxes[agent], scene.present[agent], scene.half_sizes[agent])
        contact, ttc_step, offset = _first_contacts(ego, *track, scene.vehicle, num_ttc_steps)
        if contact >= 0 and _is_at_fault(states, ego, areas, contact, agent, scene):
            values[NC] = min(values[NC], 0.5 if scene.is_static[agent] else 0.0)
            values[COLLISION_STEP] = min(values[COLLISION_STEP], float(contact))
        if ttc_step >= 0:
            at = ttc_step + offset
            ahead, behind = _bearing(
                states, ego, ttc_step, scene.boxes[agent, at, 0], scene.boxes[agent, at, 1]
            )
            if ahead or (areas[ttc_step] & (MULTIPLE | OFF_ROAD | REAR_IN) and not behind):
                values[TTC] = 0.0
                values[TTC_STEP] = min(values[TTC_STEP], float(ttc_step))


@njit(cache=True, nogil=True, error_model="numpy")
def _route(ego, areas, scene, spares_intersections, values):
    """Fill DAC, DDC, LK and raw progress."""
    moved = np.zeros(NUM_STEPS)
    off_road, run, keeps_lane, edge, first_along, along = False, 0, 1.0, 0, 0.0, 0.0
    for step in range(NUM_STEPS):
        bits = areas[step]
        off_road = off_road or (bits & OFF_ROAD) > 0
        spared = spares_intersections and (bits & CENTRE_IN) > 0
        if step > 0 and (bits & OFF_ROUTE) > 0 and not spared:
            dx, dy = ego[step, CX] - ego[step - 1, CX], ego[step, CY] - ego[step - 1, CY]
            moved[step] = math.sqrt(dx * dx + dy * dy)
        judged = (bits & CENTRE_IN) == 0
        if judged or step == 0 or step == NUM_STEPS - 1:
            distance, along, edge = nearest_on_path(
                ego[step, CX], ego[step, CY], scene.path_xy, scene.path_progress, scene.path_circles, edge
            )
            if step == 0:
                first_along = along
            if judged:
                run = run + 1 if distance > DEVIATION_M else 0
                keeps_lane = 0.0 if run >= LANE_STEPS else keeps_lane
    worst = 0.0
    for step in range(NUM_STEPS):
        total = 0.0
        for index in range(max(0, step - WINDOW + 1), step + 1):
            total += moved[index]
        worst = max(worst, total)
    values[DAC], values[LK] = 0.0 if off_road else 1.0, keeps_lane
    values[DDC] = 1.0 if worst < LOW_M else (0.5 if worst < HIGH_M else 0.0)
    values[PROGRESS] = max(along - first_along, 0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def _red_lights(ego, scene):
    half_length, half_width = scene.vehicle[0], scene.vehicle[1]
    radius = math.sqrt(half_length**2 + half_width**2) * (1.0 + 1e-9)
    for red in range(len(scene.red_rings)):
        ring = scene.red_rings[red]
        first, last = scene.ring_offsets[ring], scene.ring_offsets[ring + 1]
        bounds = scene.ring_bounds[ring]
        for step in range(NUM_STEPS):
            x, y = ego[step, CX], ego[step, CY]
            near_x = bounds[0] - radius <= x <= bounds[2] + radius
            if not (scene.red_steps[red, step] and near_x and bounds[1] - radius <= y <= bounds[3] + radius):
                continue
            if box_meets_ring(
                x, y, ego[step, COS], ego[step, SIN], half_length, half_width, first, last, scene.ring_xy
            ):
                return 0.0
    return 1.0


@njit(cache=True, nogil=True, error_model="numpy")
def _filtered(signal, table, out):
    for sample in range(len(signal)):
        total, start = 0.0, table.starts[sample]
        for index in range(table.weights.shape[1]):
            total += table.weights[sample, index] * signal[start + index]
        out[sample] = np.rint(total * SCALE) / SCALE


@njit(cache=True, nogil=True, error_model="numpy")
def _within(signal, table, bound, out):
    _filtered(signal, table, out)
    inside = True
    for sample in range(len(out)):
        inside = inside and LIMITS[bound, 0] < out[sample] < LIMITS[bound, 1]
    return inside


@njit(cache=True, nogil=True, error_model="numpy")
def _comfort(states, history, centre_offset, filters, flags):
    """Fill the six comfort flags; a centre offset of 0 keeps rear-axle accelerations (v1)."""
    past = len(history)
    size = past + NUM_STEPS
    lon, lat, magnitude, yaw, out = (
        np.empty(size),
        np.empty(size),
        np.empty(size),
        np.empty(size),
        np.empty(size),
    )
    turns = 0.0
    for sample in range(size):
        row = history[sample] if sample < past else states[sample - past]
        rate, change = (0.0, 0.0) if sample < past else (row[9], row[10])
        lon[sample] = row[5] + centre_offset * (rate * rate + change)
        lat[sample] = row[6]
        magnitude[sample] = math.hypot(row[5], row[6])
        yaw[sample] = row[2]
    previous = yaw[0]
    for sample in range(1, size):
        turns += np.rint((yaw[sample] - previous) / (2.0 * math.pi))
        previous = yaw[sample]
        yaw[sample] -= 2.0 * math.pi * turns
    flags[0] = _within(lon, filters.acceleration, 0, out)
    flags[1] = _within(lat, filters.acceleration, 1, out)
    smooth = np.empty(size)
    _filtered(magnitude, filters.smoothing, smooth)
    flags[2] = _within(smooth, filters.jerk, 2, out)
    _filtered(lon, filters.smoothing, smooth)
    flags[3] = _within(smooth, filters.jerk, 3, out)
    flags[4] = _within(yaw, filters.yaw_acceleration, 4, out)
    flags[5] = _within(yaw, filters.yaw_rate, 5, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _score_one(poses, scene, filters, is_v2, num_ttc_steps, judges_comfort, states, values, flags, areas):
    simulate_one(poses, scene.start, scene.speed_matrix, scene.vehicle[3], states)
    ego, bits = np.empty((NUM_STEPS, 5)), np.empty(NUM_STEPS, dtype=np.int64)
    _ego_boxes(states, scene.vehicle, ego)
    _areas(states, ego, scene, bits)
    _agents(states, ego, bits, scene, num_ttc_steps, values)
    _route(ego, bits, scene, is_v2, values)
    values[TLC] = _red_lights(ego, scene)
    if judges_comfort:
        _comfort(states, scene.history, scene.vehicle[2] if is_v2 else 0.0, filters, flags)
    else:
        flags[:] = True
    values[COMFORT] = 1.0 if flags.all() else 0.0
    for step in range(NUM_STEPS):
        for area in range(3):
            areas[step, area] = (bits[step] >> area) & 1 == 1


@njit(cache=True, nogil=True, error_model="numpy")
def score_poses(poses, scene, filters, is_v2, num_ttc_steps, judges_comfort, states, values, flags, areas):
    """Drive and measure reference poses (N, 41, 3); fill states, values, flags and areas."""
    for row in range(len(poses)):
        one = (states[row], values[row], flags[row], areas[row])
        _score_one(poses[row], scene, filters, is_v2, num_ttc_steps, judges_comfort, *one)


@njit(cache=True, nogil=True, error_model="numpy")
def score_waypoints(
    waypoints, left, share, scene, filters, is_v2, num_ttc_steps, states, values, flags, areas
):
    """Drive and measure relative waypoints (N, n, 3); fill states, values, flags and areas."""
    poses = np.empty((NUM_STEPS, 3))
    for row in range(len(waypoints)):
        sample_waypoints(waypoints[row], scene.ego_pose, left, share, poses)
        one = (states[row], values[row], flags[row], areas[row])
        _score_one(poses, scene, filters, is_v2, num_ttc_steps, True, *one)
