"""The sub-scores of driven states in their arenas, in plain torch; rules of v1 and v2 side by side.

Shape legend: N trajectories, T = 41 steps, A agents (padded), K candidate pairs, G rings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autoscale_ray.evaluation.arena import IS_DRIVABLE, IS_INTERSECTION, IS_LANE, IS_ROUTE_LANE, ArenaBatch
from autoscale_ray.evaluation.comfort import comfort_flags
from autoscale_ray.evaluation.geometry import (
    boxes_meet_rings,
    boxes_overlap,
    groups_in_rings,
    project_on_path,
)
from autoscale_ray.evaluation.simulate import VX, VY, YAW

STOPPED_EGO_SPEED_MPS = 0.05
STANDING_SPEED_MPS = 0.005
COS_AHEAD = math.cos(math.radians(30.0))
COS_BEHIND = math.cos(math.radians(150.0))
TTC_OFFSETS = (0, 3, 6, 9)
DIRECTION_HORIZON = 10
DIRECTION_LIMITS_M = (2.0, 6.0)
LANE_DEVIATION_M = 0.5
LANE_STEPS = 20
NEVER = 1_000_000
PROJECTED_ROWS_CPU = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What differs between the two versions of the score.

    Fields:
        version: "v1" (PDMS) or "v2" (EPDMS).
        num_frames: 2 Hz frames of agents used.
        num_ttc_steps: Steps t = 0, 1, ... tested for time to collision.
        direction_spares_intersections: Driving direction is not judged inside intersections.
    """

    version: str
    num_frames: int
    num_ttc_steps: int
    direction_spares_intersections: bool


RULES_V1 = Rules(version="v1", num_frames=11, num_ttc_steps=41, direction_spares_intersections=False)
RULES_V2 = Rules(version="v2", num_frames=9, num_ttc_steps=32, direction_spares_intersections=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measures:
    """Raw measures of N trajectories, before any normalisation.

    Fields, all (N,) float64 unless named: no_at_fault_collisions, drivable_area, driving_direction, traffic_light,
    time_to_collision, lane_keeping, comfort: sub-scores in {0, 0.5, 1}; progress_m: raw progress along the
    centreline; collision_step, ttc_step: first infraction, inf if none; comfort_flags: (N, 6) bool; ego_areas:
    (N, 41, 3) bool multiple lanes, not drivable, off route.
    """

    no_at_fault_collisions: Tensor
    drivable_area: Tensor
    driving_direction: Tensor
    traffic_light: Tensor
    time_to_collision: Tensor
    lane_keeping: Tensor
    comfort: Tensor
    progress_m: Tensor
    collision_step: Tensor
    ttc_step: Tensor
    comfort_flags: Tensor
    ego_areas: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Ego:
    """Geometry of N drives: rear axle (N, T, 2), axis cos/sin (N, T, 2), centre (N, T, 2), speed (N, T), half (2,)."""

    rear: Tensor
    axis: Tensor
    centre: Tensor
    speed: Tensor
    half: Tensor


def measure(
    states_NT11: Tensor, scene_N: Tensor, arenas: ArenaBatch, rules: Rules, with_history: bool
) -> Measures:
    """Compute every raw measure of driven states.

    Args:
        states_NT11: (N, 41, 11) driven states in the arenas' frames.
        scene_N: (N,) arena of each trajectory.
        arenas: The arenas.
        rules: RULES_V1 or RULES_V2.
        with_history: Judge comfort together with the past (v2); without it v2 comfort is 1.

    Returns:
        Raw measures.
    """
    ego = _ego_geometry(states_NT11, arenas)
    areas_NT3, centre_in_NT, rear_in_NT = _ego_areas(ego, scene_N, arenas)
    risky_NT = areas_NT3[..., 0] | areas_NT3[..., 1]
    near_K2 = _near_agents(ego, scene_N, arenas)
    collision, collision_step = _collisions(ego, near_K2, risky_NT, scene_N, arenas)
    ttc, ttc_step = _time_to_collision(ego, near_K2, risky_NT | rear_in_NT, scene_N, arenas, rules)
    distance_NT, along_NT = _project_in_chunks(ego.centre, scene_N, arenas)
    flags_N6 = _comfort(states_NT11, scene_N, arenas, rules, with_history)
    spared_NT = centre_in_NT & rules.direction_spares_intersections
    return Measures(
        no_at_fault_collisions=collision,
        drivable_area=(~areas_NT3[..., 1].any(dim=1)).to(collision.dtype),
        driving_direction=_driving_direction(ego.centre, areas_NT3[..., 2] & ~spared_NT),
        traffic_light=_traffic_light(ego, scene_N, arenas),
        time_to_collision=ttc,
        lane_keeping=_lane_keeping(distance_NT, centre_in_NT),
        comfort=flags_N6.all(dim=1).to(collision.dtype),
        progress_m=(along_NT[:, -1] - along_NT[:, 0]).clamp(min=0.0),
        collision_step=collision_step,
        ttc_step=ttc_step,
        comfort_flags=flags_N6,
        ego_areas=areas_NT3,
    )


def _ego_geometry(states_NT11: Tensor, arenas: ArenaBatch) -> _Ego:
    yaw_NT = states_NT11[..., YAW]
    axis_NT2 = torch.stack([torch.cos(yaw_NT), torch.sin(yaw_NT)], dim=-1)
    vehicle = arenas.vehicle
    half_2 = states_NT11.new_tensor([vehicle.half_length_m, vehicle.half_width_m])
    rear_NT2 = states_NT11[..., :2]
    speed_NT = torch.hypot(states_NT11[..., VX], states_NT11[..., VY])
    return _Ego(rear_NT2, axis_NT2, rear_NT2 + vehicle.rear_axle_to_centre_m * axis_NT2, speed_NT, half_2)


def _corners(centre: Tensor, axis: Tensor, half_2: Tensor) -> Tensor:
    along = axis * half_2[0]
    left = torch.stack([-axis[..., 1], axis[..., 0]], dim=-1) * half_2[1]
    signs = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
    return torch.stack([centre + forward * along + side * left for forward, side in signs], dim=-2)


def _ego_areas(ego: _Ego, scene_N: Tensor, arenas: ArenaBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return ego area flags (N, T, 3), centre in intersection (N, T), rear axle in intersection (N, T)."""
    num_drives, num_steps = ego.speed.shape
    corners_NT42 = _corners(ego.centre, ego.axis, ego.half)
    points_B62 = torch.cat([corners_NT42, ego.centre[:, :, None], ego.rear[:, :, None]], dim=2).flatten(0, 1)
    pose_K, ring_K = _candidate_rings(points_B62.reshape(num_drives, -1, 2), points_B62, scene_N, arenas)
    rings = (arenas.ring_offsets, arenas.ring_xy, arenas.ring_next)
    inside_K6 = groups_in_rings(points_B62[pose_K], ring_K, *rings)
    kind_K = arenas.ring_kinds[ring_K]
    is_lane_K = (kind_K & IS_LANE) > 0
    corner_count_K = inside_K6[:, :4].sum(dim=1)

    def count(flag_K: Tensor) -> Tensor:
        zeros_B = torch.zeros(num_drives * num_steps, dtype=torch.int32, device=pose_K.device)
        return zeros_B.index_add_(0, pose_K, flag_K.int())

    touched_B = count(is_lane_K & (corner_count_K > 0))
    whole_B = count(is_lane_K & (corner_count_K == 4))
    drivable_K = (kind_K & IS_DRIVABLE) > 0
    covered_B4 = torch.stack([count(drivable_K & inside_K6[:, corner]) > 0 for corner in range(4)], dim=1)
    on_route_B = count(((kind_K & IS_ROUTE_LANE) > 0) & inside_K6[:, 4]) > 0
    crossing_K = (kind_K & IS_INTERSECTION) > 0
    areas_B3 = torch.stack([(touched_B > 1) & (whole_B == 0), ~covered_B4.all(dim=1), ~on_route_B], dim=1)
    centre_in_B, rear_in_B = count(crossing_K & inside_K6[:, 4]) > 0, count(crossing_K & inside_K6[:, 5]) > 0
    shape = (num_drives, num_steps)
    return areas_B3.view(*shape, 3), centre_in_B.view(shape), rear_in_B.view(shape)


def _candidate_rings(
    drive_NQ2: Tensor, pose_B62: Tensor, scene_N: Tensor, arenas: ArenaBatch
) -> tuple[Tensor, Tensor]:
    """Pair poses with the rings whose bounds they touch, first per drive, then per pose."""
    num_steps = len(pose_B62) // max(1, len(scene_N))
    lists_NG = arenas.rings_of_scene[scene_N]
    if not len(arenas.ring_kinds):
        return lists_NG.new_zeros(0), lists_NG.new_zeros(0)
    bounds_NG4 = arenas.ring_bounds[lists_NG.clamp(min=0)]
    near_NG = _bounds_meet(bounds_NG4, drive_NQ2.amin(dim=1)[:, None], drive_NQ2.amax(dim=1)[:, None]) & (
        lists_NG >= 0
    )
    drive_K, slot_K = near_NG.nonzero(as_tuple=True)
    ring_K = lists_NG[drive_K, slot_K]
    low_NT2, high_NT2 = (
        bound.view(-1, num_steps, 2) for bound in (pose_B62.amin(dim=1), pose_B62.amax(dim=1))
    )
    near_KT = _bounds_meet(arenas.ring_bounds[ring_K][:, None], low_NT2[drive_K], high_NT2[drive_K])
    pair_K, step_K = near_KT.nonzero(as_tuple=True)
    return drive_K[pair_K] * num_steps + step_K, ring_K[pair_K]


def _bounds_meet(bounds_4: Tensor, low_2: Tensor, high_2: Tensor) -> Tensor:
    below = (bounds_4[..., 0] <= high_2[..., 0]) & (bounds_4[..., 1] <= high_2[..., 1])
    return below & (bounds_4[..., 2] >= low_2[..., 0]) & (bounds_4[..., 3] >= low_2[..., 1])


def _near_agents(ego: _Ego, scene_N: Tensor, arenas: ArenaBatch) -> Tensor:
    """Return (K, 2) drive and agent whose paths, the ego's next 0.9 s included, may come into contact."""
    ahead_NT2 = ego.centre + (ego.speed * 0.1 * TTC_OFFSETS[-1])[..., None] * ego.axis
    path_NQ2 = torch.cat([ego.centre, ahead_NT2], dim=1)
    ego_bounds_N14 = torch.cat([path_NQ2.amin(dim=1), path_NQ2.amax(dim=1)], dim=1)[:, None]
    seen_SAT1 = arenas.present[..., None]
    low_SA2 = torch.where(seen_SAT1, arenas.boxes[..., :2], math.inf).amin(dim=2)
    high_SA2 = torch.where(seen_SAT1, arenas.boxes[..., :2], -math.inf).amax(dim=2)
    reach_SA = torch.linalg.vector_norm(arenas.half_sizes, dim=-1) + torch.linalg.vector_norm(ego.half)
    reach_SA1 = (reach_SA * (1.0 + 1e-9))[..., None]
    near_NA = _bounds_meet(ego_bounds_N14, (low_SA2 - reach_SA1)[scene_N], (high_SA2 + reach_SA1)[scene_N])
    return (near_NA & ~arenas.is_ignored[scene_N]).nonzero()


def _contacts(
    ego: _Ego, near_K2: Tensor, offset: int, num_steps: int, scene_N: Tensor, arenas: ArenaBatch
) -> Tensor:
    """Return (K, 3) drive, step, agent of boxes that meet when the ego moves on for `offset` steps."""
    drive_P, agent_P = near_K2.unbind(1)
    scene_P = scene_N[drive_P]
    shift_NT2 = (ego.speed * (0.1 * offset))[..., None] * ego.axis
    centre_PT2 = (ego.centre + shift_NT2)[drive_P, :num_steps]
    boxes_PT4 = arenas.boxes[scene_P, agent_P, offset : offset + num_steps]
    half_P2 = arenas.half_sizes[scene_P, agent_P]
    reach_P = torch.linalg.vector_norm(half_P2, dim=-1) + torch.linalg.vector_norm(ego.half)
    away_PT2 = boxes_PT4[..., :2] - centre_PT2
    near_PT = (away_PT2**2).sum(-1) <= (reach_P * (1.0 + 1e-9))[:, None] ** 2
    near_PT &= arenas.present[scene_P, agent_P, offset : offset + num_steps]
    pair_K, step_K = near_PT.nonzero(as_tuple=True)
    axes = (ego.axis[drive_P[pair_K], step_K], boxes_PT4[pair_K, step_K, 2:])
    meets_K = boxes_overlap(away_PT2[pair_K, step_K], axes[0], ego.half, axes[1], half_P2[pair_K])
    return torch.stack([drive_P[pair_K], step_K, agent_P[pair_K]], dim=1)[meets_K]


def _first_contacts(contact_K3: Tensor, order_K: Tensor, shape: tuple[int, int]) -> Tensor:
    """Keep, for every drive and agent, the contact of lowest order."""
    key_K = contact_K3[:, 0] * shape[1] + contact_K3[:, 2]
    first = torch.full((shape[0] * shape[1],), NEVER, dtype=order_K.dtype, device=order_K.device)
    first.scatter_reduce_(0, key_K, order_K, "amin")
    return order_K == first[key_K]


def _bearing(ego: _Ego, drive_K: Tensor, step_K: Tensor, position_K2: Tensor) -> tuple[Tensor, Tensor]:
    """Tell whether positions lie within 30 deg ahead, or beyond 150 deg behind, of the rear axle."""
    away_K2 = position_K2 - ego.rear[drive_K, step_K]
    along_K = (away_K2 * ego.axis[drive_K, step_K]).sum(-1)
    distance_K = torch.linalg.vector_norm(away_K2, dim=-1)
    return along_K > COS_AHEAD * distance_K, along_K < COS_BEHIND * distance_K


def _collisions(
    ego: _Ego, near_K2: Tensor, risky_NT: Tensor, scene_N: Tensor, arenas: ArenaBatch
) -> tuple[Tensor, Tensor]:
    num_drives, num_steps = ego.speed.shape
    contact_K3 = _contacts(ego, near_K2, 0, num_steps, scene_N, arenas)
    contact_K3 = contact_K3[
        _first_contacts(contact_K3, contact_K3[:, 1], (num_drives, arenas.boxes.shape[1]))
    ]
    drive_K, step_K, agent_K = contact_K3.unbind(1)
    scene_K = scene_N[drive_K]
    box_K4 = arenas.boxes[scene_K, agent_K, step_K]
    _, behind_K = _bearing(ego, drive_K, step_K, box_K4[:, :2])
    axis_K2 = ego.axis[drive_K, step_K]
    bumper_K2 = ego.centre[drive_K, step_K] + ego.half[0] * axis_K2
    bumper_half_2 = ego.half * ego.half.new_tensor([0.0, 1.0])
    front_K = boxes_overlap(
        box_K4[:, :2] - bumper_K2, axis_K2, bumper_half_2, box_K4[:, 2:], arenas.half_sizes[scene_K, agent_K]
    )
    moving_K = ego.speed[drive_K, step_K] > STOPPED_EGO_SPEED_MPS
    side_K = front_K | risky_NT[drive_K, step_K]
    fault_K = moving_K & (arenas.is_stopped[scene_K, agent_K] | (~behind_K & side_K))
    value_K = torch.where(arenas.is_static[scene_K, agent_K], 0.5, 0.0).to(ego.speed.dtype)
    score_N = ego.speed.new_ones(num_drives).scatter_reduce_(0, drive_K[fault_K], value_K[fault_K], "amin")
    return score_N, _first_step(drive_K[fault_K], step_K[fault_K], ego)


def _time_to_collision(
    ego: _Ego, near_K2: Tensor, risky_NT: Tensor, scene_N: Tensor, arenas: ArenaBatch, rules: Rules
) -> tuple[Tensor, Tensor]:
    found = [_contacts(ego, near_K2, offset, rules.num_ttc_steps, scene_N, arenas) for offset in TTC_OFFSETS]
    contact_K3 = torch.cat(found)
    later_K = torch.cat(
        [torch.full((len(rows),), offset) for rows, offset in zip(found, TTC_OFFSETS, strict=True)]
    )
    later_K = later_K.to(contact_K3.device)
    driving_K = ego.speed[contact_K3[:, 0], contact_K3[:, 1]] >= STANDING_SPEED_MPS
    contact_K3, later_K = contact_K3[driving_K], later_K[driving_K]
    order_K = contact_K3[:, 1] * (TTC_OFFSETS[-1] + 1) + later_K
    first_K = _first_contacts(contact_K3, order_K, (len(ego.speed), arenas.boxes.shape[1]))
    drive_K, step_K, agent_K = contact_K3[first_K].unbind(1)
    position_K2 = arenas.boxes[scene_N[drive_K], agent_K, step_K + later_K[first_K], :2]
    ahead_K, behind_K = _bearing(ego, drive_K, step_K, position_K2)
    violates_K = ahead_K | (risky_NT[drive_K, step_K] & ~behind_K)
    step_N = _first_step(drive_K[violates_K], step_K[violates_K], ego)
    return torch.isinf(step_N).to(step_N.dtype), step_N


def _first_step(drive_K: Tensor, step_K: Tensor, ego: _Ego) -> Tensor:
    never_N = torch.full((len(ego.speed),), math.inf, dtype=ego.speed.dtype, device=ego.speed.device)
    return never_N.scatter_reduce_(0, drive_K, step_K.to(never_N.dtype), "amin")


def _driving_direction(centre_NT2: Tensor, wrong_NT: Tensor) -> Tensor:
    moved_NT = torch.linalg.vector_norm(torch.diff(centre_NT2, dim=1), dim=-1) * wrong_NT[:, 1:]
    padded_NT = torch.nn.functional.pad(moved_NT, (DIRECTION_HORIZON + 1, 0))
    worst_N = padded_NT.unfold(1, DIRECTION_HORIZON + 1, 1).sum(dim=-1).amax(dim=1)
    low_m, high_m = DIRECTION_LIMITS_M
    return 0.5 * (worst_N < low_m).to(worst_N.dtype) + 0.5 * (worst_N < high_m).to(worst_N.dtype)


def _traffic_light(ego: _Ego, scene_N: Tensor, arenas: ArenaBatch) -> Tensor:
    num_drives, num_steps = ego.speed.shape
    score_N = ego.speed.new_ones(num_drives)
    drive_K, red_K = (scene_N[:, None] == arenas.red_scene[None]).nonzero(as_tuple=True)
    corners_NT42 = _corners(ego.centre, ego.axis, ego.half)
    low_KT2, high_KT2 = corners_NT42.amin(dim=2)[drive_K], corners_NT42.amax(dim=2)[drive_K]
    near_KT = _bounds_meet(arenas.ring_bounds[arenas.red_ring[red_K]][:, None], low_KT2, high_KT2)
    pair, step = (near_KT & arenas.red_steps[red_K, :num_steps]).nonzero(as_tuple=True)
    drive, ring = drive_K[pair], arenas.red_ring[red_K[pair]]
    boxes = (ego.centre[drive, step], ego.axis[drive, step], ego.half.expand(len(drive), 2))
    meets = boxes_meet_rings(*boxes, ring, arenas.ring_offsets, arenas.ring_xy, arenas.ring_next)
    score_N[drive[meets]] = 0.0
    return score_N


def _lane_keeping(distance_NT: Tensor, spared_NT: Tensor) -> Tensor:
    run_N = torch.zeros_like(distance_NT[:, 0])
    longest_N = run_N
    for step in range(distance_NT.shape[1]):
        away_N = distance_NT[:, step] > LANE_DEVIATION_M
        run_N = torch.where(spared_NT[:, step], run_N, torch.where(away_N, run_N + 1.0, 0.0))
        longest_N = torch.maximum(longest_N, run_N)
    return (longest_N < LANE_STEPS).to(distance_NT.dtype)


def _project_in_chunks(centre_NT2: Tensor, scene_N: Tensor, arenas: ArenaBatch) -> tuple[Tensor, Tensor]:
    """Project all centres, a few drives at a time on the CPU, so that temporaries stay in its cache."""
    rows = PROJECTED_ROWS_CPU if centre_NT2.device.type == "cpu" else len(centre_NT2)
    parts = [
        project_on_path(
            centre_NT2[start : start + rows], arenas.path_xy[chosen], arenas.path_progress[chosen]
        )
        for start, chosen in (
            (start, scene_N[start : start + rows]) for start in range(0, len(scene_N), rows)
        )
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _comfort(
    states_NT11: Tensor, scene_N: Tensor, arenas: ArenaBatch, rules: Rules, with_history: bool
) -> Tensor:
    offset_m = arenas.vehicle.rear_axle_to_centre_m
    if rules.version == "v1":
        return comfort_flags(states_NT11, "v1", offset_m)
    flags_N6 = torch.ones(len(scene_N), 6, dtype=torch.bool, device=scene_N.device)
    lengths = [len(history) for history in arenas.history] if with_history else []
    for length in sorted(set(lengths)):
        members = [index for index, size in enumerate(lengths) if size == length]
        slot_S = torch.full((len(lengths),), -1, device=scene_N.device)
        slot_S[members] = torch.arange(len(members), device=scene_N.device)
        chosen_N = (slot_S[scene_N] >= 0).nonzero()[:, 0]
        past = torch.stack([arenas.history[index] for index in members])[slot_S[scene_N[chosen_N]]]
        past = torch.nn.functional.pad(past, (0, states_NT11.shape[-1] - past.shape[-1]))
        flags_N6[chosen_N] = comfort_flags(torch.cat([past, states_NT11[chosen_N]], dim=1), "v2", offset_m)
    return flags_N6
