"""Node features of the scene graph, all in the ego frame at t = 0; docs/graph_rae.md lists every column.

Everything is computed for the whole batch at once. The domain of a scene (real or synthetic) is no feature.

Shape legend: N scenes, A agents, G lane segments, B controls (red connectors and crosswalks), H history frames (4),
M nodes of one type, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from autoscale_ray.representation.kinematics import (
    POSITION_SCALE_M,
    SPEED_SCALE_MPS,
    Route,
    relative_motion,
    route_ahead,
    route_coordinates,
    route_of,
)
from autoscale_ray.representation.segments import KINDS, Segments
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.graph import RADIUS_M
from autoscale_ray.scenes.ragged import ragged_index, row_of
from autoscale_ray.scenes.schema import (
    AGENT_TYPES,
    CURRENT_FRAME,
    DRIVING_COMMANDS,
    NUM_FRAMES,
    NUM_PLAN_FRAMES,
    POLYGON_LAYERS,
)

HISTORY = slice(1, CURRENT_FRAME + 1)
"""Frames -1.5 ... 0 s; the optional frame at -2.0 s is not used, so that every source has the same input."""
PLAN = slice(CURRENT_FRAME + 1, CURRENT_FRAME + 1 + NUM_PLAN_FRAMES)
ROUTE_AHEAD_M = (5.0, 10.0, 20.0, 30.0, 40.0)
FEATURE_LIMIT = 5.0
ACCELERATION_SCALE_MPS2 = 3.0
LATERAL_SCALE_M = 4.0
SPEED_LIMIT_SCALE_MPS = 15.0
CORRIDOR_HALF_WIDTH_M = 1.75


@dataclass(frozen=True, slots=True)
class SceneGeometry:
    """Places of all candidate nodes of a batch."""

    segments: Segments
    route: Route
    controls_B: Tensor
    """Polygon (batch-wide) of each control, int64."""
    control_center_B2: Tensor
    control_reach_B: Tensor
    """Largest distance of a vertex from the centre, m."""
    owner: dict[str, Tensor]
    """Scene of each candidate by node type."""
    near: dict[str, Tensor]
    """Candidate is known at t = 0 and within RADIUS_M, by node type."""
    place: dict[str, Tensor]
    """Route coordinates (s m, d m, route yaw rad) by node type."""


def scene_geometry(batch: SceneBatch, segments: Segments) -> SceneGeometry:
    """Find the candidate nodes of a batch and where they are.

    Args:
        batch: N scenes.
        segments: Their lane pieces.
    """
    red_Q = batch.polygon_red_QT[:, HISTORY].any(dim=1)
    crosswalk_Q = batch.polygon_layer_Q == POLYGON_LAYERS.index("crosswalk")
    controls_B = torch.nonzero(red_Q | crosswalk_Q).flatten()
    center_B2, reach_B = _center_and_reach(batch, controls_B)
    owner = {
        "agent": batch.agent_row_A,
        "lane": batch.lane_row_L[segments.lane_G],
        "control": batch.polygon_row_Q[controls_B],
    }
    point = {
        "agent": batch.agent_states_AT5[:, CURRENT_FRAME, :2],
        "lane": segments.points_G32[:, 1],
        "control": center_B2,
    }
    near = {name: position.norm(dim=1) < RADIUS_M for name, position in point.items()}
    near["agent"] &= batch.agent_valid_AT[:, CURRENT_FRAME]
    route = route_of(batch)
    place = {name: route_coordinates(point[name], owner[name], route) for name in point}
    return SceneGeometry(segments, route, controls_B, center_B2, reach_B, owner, near, place)


def _center_and_reach(batch: SceneBatch, controls_B: Tensor) -> tuple[Tensor, Tensor]:
    starts = batch.polygon_point_offsets[controls_B]
    index, offsets = ragged_index(starts, batch.polygon_point_offsets[controls_B + 1] - starts)
    vertices, owner = batch.polygon_points_W2[index], row_of(offsets)
    count_B1 = offsets.diff().clamp(min=1)[:, None]
    center_B2 = vertices.new_zeros(len(controls_B), 2).index_add(0, owner, vertices) / count_B1
    distance = (vertices - center_B2[owner]).norm(dim=1)
    return center_B2, distance.new_zeros(len(controls_B)).scatter_reduce(0, owner, distance, "amax")


def agent_pairs(batch: SceneBatch) -> Tensor:
    """Return (neighbour, agent) pairs, batch-wide, int64 (E, 2), from the stored neighbour table."""
    assert batch.agent_neighbours_A8 is not None, "graph_from_batch fills the neighbour tables"
    return _table_pairs(batch.agent_neighbours_A8, batch.agent_offsets, batch.agent_row_A)


def _table_pairs(table_AK: Tensor, source_offsets: Tensor, owner_A: Tensor) -> Tensor:
    target, slot = torch.nonzero(table_AK >= 0, as_tuple=True)
    return torch.stack([table_AK[target, slot] + source_offsets[owner_A[target]], target], dim=1)


def agent_segment_pairs(batch: SceneBatch, scene: SceneGeometry) -> Tensor:
    """Return (segment, agent) pairs: of each of an agent's nearest lanes the segment nearest to the agent.

    Args:
        batch: N scenes.
        scene: Their geometry.
    """
    assert batch.agent_lanes_A3 is not None, "graph_from_batch fills the neighbour tables"
    pairs_E2 = _table_pairs(batch.agent_lanes_A3, batch.lane_offsets, batch.agent_row_A)
    first_L = scene.segments.lane_offsets_L
    lane_E, agent_E = pairs_E2.unbind(1)
    candidate, offsets = ragged_index(first_L[lane_E], first_L[lane_E + 1] - first_L[lane_E])
    pair = row_of(offsets)
    position_A2 = batch.agent_states_AT5[:, CURRENT_FRAME, :2]
    distance = (scene.segments.points_G32[candidate, 1] - position_A2[agent_E[pair]]).norm(dim=1)
    best_E = distance.new_full((len(lane_E),), torch.inf).scatter_reduce(0, pair, distance, "amin")
    chosen = torch.nonzero(distance == best_E[pair]).flatten()
    return torch.stack([candidate[chosen], agent_E[pair[chosen]]], dim=1).unique(dim=0)


def control_segment_pairs(batch: SceneBatch, scene: SceneGeometry) -> Tensor:
    """Return (control, segment) pairs: a red connector acts on every segment of its lane.

    Args:
        batch: N scenes.
        scene: Their geometry.
    """
    local_B = batch.polygon_lane_Q[scene.controls_B]
    control = torch.nonzero(local_B >= 0).flatten()
    lane = local_B[control] + batch.lane_offsets[scene.owner["control"][control]]
    first_L = scene.segments.lane_offsets_L
    segment, offsets = ragged_index(first_L[lane], first_L[lane + 1] - first_L[lane])
    return torch.stack([control[row_of(offsets)], segment], dim=1)


def node_features(
    batch: SceneBatch,
    scene: SceneGeometry,
    kept: dict[str, Tensor],
    pairs: dict[str, Tensor],
    *,
    use_future: bool,
) -> dict[str, Tensor]:
    """Compute the encoder input of every node.

    Args:
        batch: N scenes.
        scene: Their geometry.
        kept: Candidates that are nodes, by type.
        pairs: Batch-wide (source, target) pairs between nodes, by relation; of lanes with the kind of the link.
        use_future: Add the logged future of ego and agents.

    Returns:
        Float32 (M, F) by node type, every value in [-5, 5].
    """
    parts = {
        "ego": [_ego_motion(batch), _ego_route(batch, scene), _node_counts(batch, scene)],
        "agent": [*_agent_motion(batch, scene), _agent_relations(batch, scene, pairs)],
        "lane": [_lane_features(batch, scene), _lane_relations(scene, pairs["lane_lane"])],
        "control": [_control_features(batch, scene)],
    }
    if use_future:
        parts["ego"].append(_future(batch.ego_states_NT7, batch.ego_valid_NT))
        parts["agent"].append(_future(batch.agent_states_AT5, batch.agent_valid_AT))
    joined = {
        name: torch.cat(columns, dim=1).clamp(-FEATURE_LIMIT, FEATURE_LIMIT)
        for name, columns in parts.items()
    }
    return {name: table if name == "ego" else table[kept[name]] for name, table in joined.items()}


def _flag_and_value(value_M: Tensor, scale: float) -> Tensor:
    known_M = value_M.isfinite()
    return torch.stack([known_M.float(), torch.where(known_M, value_M, 0) / scale], dim=1)


def _poses(states_MH: Tensor, valid_MH: Tensor) -> Tensor:
    """Return x, y, cos yaw, sin yaw of the frames, 0 where not seen, flattened, with the flags."""
    pose = torch.cat(
        [states_MH[..., :2] / POSITION_SCALE_M, states_MH[..., 2:3].cos(), states_MH[..., 2:3].sin()], 2
    )
    return torch.cat([(pose * valid_MH[..., None]).flatten(1), valid_MH.float()], dim=1)


def _ego_motion(batch: SceneBatch) -> Tensor:
    states, valid = batch.ego_states_NT7[:, HISTORY], batch.ego_valid_NT[:, HISTORY]
    rates = torch.cat([states[..., 3:5] / SPEED_SCALE_MPS, states[..., 5:7] / ACCELERATION_SCALE_MPS2], dim=2)
    command = one_hot(batch.command_N, len(DRIVING_COMMANDS)).float()
    limit = _flag_and_value(batch.route_speed_limit_N, SPEED_LIMIT_SCALE_MPS)
    size = batch.ego_size_N4 / batch.ego_size_N4.new_tensor([5.0, 2.0, 3.0, 1.5])
    rates = (rates * valid[..., None]).flatten(1)
    return torch.cat([_poses(states, valid), rates, size, command, limit], dim=1)


def _ego_route(batch: SceneBatch, scene: SceneGeometry) -> Tensor:
    known_N = scene.route.known_N
    origin_N2 = scene.route.points_NR3.new_zeros(len(known_N), 2)
    here_N3 = route_coordinates(origin_N2, torch.arange(len(known_N), device=known_N.device), scene.route)
    ahead_NP3 = route_ahead(scene.route, ROUTE_AHEAD_M)
    columns = [ahead_NP3[..., :2] / POSITION_SCALE_M, ahead_NP3[..., 2:].cos(), ahead_NP3[..., 2:].sin()]
    pose = torch.stack([here_N3[:, 1] / LATERAL_SCALE_M, here_N3[:, 2].cos(), here_N3[:, 2].sin()], dim=1)
    return torch.cat([pose, torch.cat(columns, dim=2).flatten(1)], dim=1)


def _node_counts(batch: SceneBatch, scene: SceneGeometry) -> Tensor:
    counts = [
        torch.bincount(scene.owner[name][near], minlength=len(batch)) for name, near in scene.near.items()
    ]
    return torch.log1p(torch.stack(counts, dim=1).float()) / 3


def _agent_motion(batch: SceneBatch, scene: SceneGeometry) -> list[Tensor]:
    states, valid = batch.agent_states_AT5[:, HISTORY], batch.agent_valid_AT[:, HISTORY]
    now_A5 = states[:, -1]
    speed_AH = states[..., 3:5].norm(dim=2) * valid / SPEED_SCALE_MPS
    kind_A = one_hot(batch.agent_type_A, len(AGENT_TYPES)).float()
    size_A2 = batch.agent_size_A2 / batch.agent_size_A2.new_tensor([5.0, 2.0])
    ego_A5 = torch.zeros_like(now_A5)
    ego_A5[:, 3:] = batch.ego_states_NT7[:, CURRENT_FRAME, 3:5][scene.owner["agent"]]
    return [_poses(states, valid), speed_AH, kind_A, size_A2, relative_motion(ego_A5, now_A5),
            _route_motion(now_A5, scene.place["agent"])]  # fmt: skip


def _route_motion(now_A5: Tensor, place_A3: Tensor) -> Tensor:
    """Return route place, corridor flag, velocity along and across the route, and heading against it."""
    cos_A, sin_A = place_A3[:, 2].cos(), place_A3[:, 2].sin()
    along_A = cos_A * now_A5[:, 3] + sin_A * now_A5[:, 4]
    across_A = cos_A * now_A5[:, 4] - sin_A * now_A5[:, 3]
    turn_A = now_A5[:, 2] - place_A3[:, 2]
    inside_A = (place_A3[:, 1].abs() < CORRIDOR_HALF_WIDTH_M).float()
    columns = [place_A3[:, 0] / POSITION_SCALE_M, place_A3[:, 1] / LATERAL_SCALE_M, inside_A,
               along_A / SPEED_SCALE_MPS, across_A / ACCELERATION_SCALE_MPS2, turn_A.cos(), turn_A.sin()]  # fmt: skip
    return torch.stack(columns, dim=1)


def _agent_relations(batch: SceneBatch, scene: SceneGeometry, pairs: dict[str, Tensor]) -> Tensor:
    """Return the mean and largest relation to the neighbours and the mean relation to the nearest lanes."""
    now_A5 = batch.agent_states_AT5[:, CURRENT_FRAME]
    neighbour_E, agent_E = pairs["agent_agent"].unbind(1)
    relation_EF = relative_motion(now_A5[agent_E], now_A5[neighbour_E])
    index_EF = agent_E[:, None].expand_as(relation_EF)
    blank = now_A5.new_zeros(len(now_A5), relation_EF.shape[1])
    mean = blank.scatter_reduce(0, index_EF, relation_EF, "mean", include_self=False)
    largest = blank.scatter_reduce(0, index_EF, relation_EF, "amax", include_self=False)
    segment_E, agent_E = pairs["lane_agent"].unbind(1)
    place_EF = _lane_place(now_A5[agent_E], scene.segments.points_G32[segment_E])
    index_EF = agent_E[:, None].expand_as(place_EF)
    lane = now_A5.new_zeros(len(now_A5), place_EF.shape[1]).scatter_reduce(
        0, index_EF, place_EF, "mean", include_self=False
    )
    return torch.cat([mean, largest, lane], dim=1)


def _lane_place(now_E5: Tensor, points_E32: Tensor) -> Tensor:
    """Return lateral error, heading error (cos, sin) and a flag of agents on lane segments."""
    direction_E2 = torch.nn.functional.normalize(points_E32[:, 2] - points_E32[:, 0], dim=1)
    offset_E2 = now_E5[:, :2] - points_E32[:, 1]
    across_E = direction_E2[:, 0] * offset_E2[:, 1] - direction_E2[:, 1] * offset_E2[:, 0]
    turn_E = now_E5[:, 2] - torch.atan2(direction_E2[:, 1], direction_E2[:, 0])
    return torch.stack(
        [across_E / LATERAL_SCALE_M, turn_E.cos(), turn_E.sin(), torch.ones_like(turn_E)], dim=1
    )


def _lane_features(batch: SceneBatch, scene: SceneGeometry) -> Tensor:
    points_G32, lane_G = scene.segments.points_G32, scene.segments.lane_G
    entry_G2, exit_G2 = points_G32[:, 1] - points_G32[:, 0], points_G32[:, 2] - points_G32[:, 1]
    heading_G2 = torch.nn.functional.normalize(points_G32[:, 2] - points_G32[:, 0], dim=1)
    bend_G = torch.atan2(
        entry_G2[:, 0] * exit_G2[:, 1] - entry_G2[:, 1] * exit_G2[:, 0], (entry_G2 * exit_G2).sum(1)
    )
    place_G3 = scene.place["lane"]
    single = [bend_G * 3, scene.segments.length_G / POSITION_SCALE_M, batch.lane_on_route_L[lane_G].float(),
              place_G3[:, 0] / POSITION_SCALE_M, place_G3[:, 1] / LATERAL_SCALE_M,
              torch.exp(-points_G32[:, 1].norm(dim=1) / POSITION_SCALE_M)]  # fmt: skip
    return torch.cat([points_G32.flatten(1) / POSITION_SCALE_M, heading_G2, torch.stack(single, dim=1),
                      _flag_and_value(batch.lane_width_L[lane_G], 4.0),
                      _flag_and_value(batch.lane_speed_limit_L[lane_G], SPEED_LIMIT_SCALE_MPS)], dim=1)  # fmt: skip


def _lane_relations(scene: SceneGeometry, links_E3: Tensor) -> Tensor:
    """Return log counts of the linked segments by kind, and the mean turn (cos, sin) into the next ones."""
    source_E, target_E, kind_E = links_E3.unbind(1)
    points_G32 = scene.segments.points_G32
    yaw_G = torch.atan2(*(points_G32[:, 2] - points_G32[:, 0]).flip(1).unbind(1))
    counts_GK = points_G32.new_zeros(len(points_G32), len(KINDS))
    counts_GK.index_put_((target_E, kind_E), counts_GK.new_ones(()), accumulate=True)
    next_E = torch.nonzero(kind_E == KINDS.index("next")).flatten()
    turn_E = (yaw_G[source_E] - yaw_G[target_E])[next_E]
    turn_G2 = counts_GK.new_zeros(len(points_G32), 2).index_add(
        0, target_E[next_E], torch.stack([turn_E.cos(), turn_E.sin()], dim=1)
    )
    return torch.cat([counts_GK.log1p(), turn_G2 / counts_GK[:, :1].clamp(min=1)], dim=1)


def _control_features(batch: SceneBatch, scene: SceneGeometry) -> Tensor:
    polygon_B, place_B3 = scene.controls_B, scene.place["control"]
    layer_B = one_hot(batch.polygon_layer_Q[polygon_B], len(POLYGON_LAYERS)).float()
    single = [scene.control_reach_B / POSITION_SCALE_M, batch.polygon_on_route_Q[polygon_B].float(),
              place_B3[:, 0] / POSITION_SCALE_M, place_B3[:, 1] / LATERAL_SCALE_M,
              torch.exp(-scene.control_center_B2.norm(dim=1) / POSITION_SCALE_M)]  # fmt: skip
    return torch.cat([scene.control_center_B2 / POSITION_SCALE_M, layer_B, torch.stack(single, dim=1),
                      batch.polygon_red_QT[polygon_B][:, HISTORY].float()], dim=1)  # fmt: skip


def _future(states: Tensor, valid: Tensor) -> Tensor:
    """Return poses and speeds of every second future frame (1, 2, 3 and 4 s)."""
    frames = torch.arange(CURRENT_FRAME + 2, PLAN.stop, 2)
    speed = states[:, frames, 3:5].norm(dim=2) * valid[:, frames] / SPEED_SCALE_MPS
    return torch.cat([_poses(states[:, frames], valid[:, frames]), speed], dim=1)


def targets(batch: SceneBatch, scene: SceneGeometry, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what decoders reconstruct and what the scenario distance compares.

    Args:
        batch: N scenes.
        scene: Their geometry.
        kept: Candidates that are nodes, by type.

    Returns:
        Keys `type.name`, rows as the nodes of the type: `agent.box` (x, y, yaw, vx, vy, length, width), `agent.type`,
        `agent.place` and `control.place` (s, d, route yaw), `agent.future` (8 x 2) with `agent.future_valid`,
        `lane.points` (3 x 2), `lane.on_route`, `control.red`, and for the frames -1.5 ... 4 s `ego.drive` (12 x 2),
        `ego.yaw`, `ego.speed`, `ego.drive_valid`.
    """
    agent, control = kept["agent"], kept["control"]
    drive = slice(HISTORY.start, PLAN.stop)
    return {
        "agent.box": torch.cat(
            [batch.agent_states_AT5[agent, CURRENT_FRAME], batch.agent_size_A2[agent]], dim=1
        ),
        "agent.type": batch.agent_type_A[agent],
        "agent.place": scene.place["agent"][agent],
        "agent.future": batch.agent_states_AT5[agent, PLAN, :2],
        "agent.future_valid": batch.agent_valid_AT[agent, PLAN],
        "lane.points": scene.segments.points_G32[kept["lane"]],
        "lane.on_route": batch.lane_on_route_L[scene.segments.lane_G[kept["lane"]]],
        "control.place": scene.place["control"][control],
        "control.red": batch.polygon_red_QT[scene.controls_B[control], CURRENT_FRAME],
        "ego.drive": batch.ego_states_NT7[:, drive, :2],
        "ego.yaw": batch.ego_states_NT7[:, drive, 2],
        "ego.speed": batch.ego_states_NT7[:, drive, 3:5].norm(dim=2),
        "ego.drive_valid": batch.ego_valid_NT[:, drive],
    }


assert PLAN.stop <= NUM_FRAMES
