"""The scenario distance: how different two driving scenes are, from geometry and motion alone, without labels.

delta(i, j) = sum_m alpha_m F_m(d_m(i, j)) / sum_m alpha_m, where d_m compares one aspect of the scenes and F_m is the
distribution function of d_m over random pairs of training scenes: rank normalisation, so that metres, m/s and
histograms add up (docs/graph_rae.md lists the aspects).

Shape legend: N scenes, M nodes, P scenes of the first and Q of the second side, S signature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoscale_ray.representation.kinematics import POSITION_SCALE_M
from autoscale_ray.representation.scene_graph import SceneGraph, global_edges
from autoscale_ray.scenes.ragged import row_of
from autoscale_ray.scenes.schema import AGENT_TYPES

Signature = dict[str, Tensor]
"""What the distance compares, one row for each scene."""

MOTION = ("heading", "speed", "speed_change")
"""Aspects that compare profiles over the frames -1.5 ... 4 s."""
NEGLIGIBLE = {"heading": 0.05, "speed_change": 0.5}
"""Mean differences (rad, m/s) up to which two drives turn and brake alike. Most pairs of scenes go straight on at a
steady speed; without this the ranks of turns and brakes would be crowded by those of noise."""
ASPECTS = (*MOTION, "agents", "interaction", "lanes", "controls")
GRID_S_M = (-40.0, -20.0, -8.0, 0.0, 8.0, 16.0, 28.0, 45.0, 60.0)
GRID_D_M = (-20.0, -9.0, -4.5, -2.0, 0.0, 2.0, 4.5, 9.0, 20.0)
NUM_LANE_BINS = 64
NUM_QUANTILES = 256
APPROACH_SCALE_M = 5.0
NOW = 3
"""Column of t = 0 in the ego's profiles."""
_VEHICLE = AGENT_TYPES.index("vehicle")
_VULNERABLE = (AGENT_TYPES.index("pedestrian"), AGENT_TYPES.index("bicycle"))


def scenario_signature(graph: SceneGraph) -> Signature:
    """Compute what the scenario distance compares.

    Args:
        graph: N scenes with their targets.

    Returns:
        `heading` (rad), `speed` and `speed_change` since t = 0 (m/s) of the ego, and `valid`, all (N, 12); one vector
        for each other aspect.
    """
    speed_NT = graph.targets["ego.speed"]
    return {
        "heading": graph.targets["ego.yaw"],
        "speed": speed_NT,
        "speed_change": speed_NT - speed_NT[:, NOW, None],
        "valid": graph.targets["ego.drive_valid"].float(),
        "agents": _agent_histogram(graph),
        "interaction": _interaction(graph),
        "lanes": _lane_histogram(graph),
        "controls": _controls(graph),
    }


def _motion_groups(graph: SceneGraph) -> Tensor:
    """Share each agent among still, along, crossing and oncoming vehicles, vulnerable users and objects (M, 6)."""
    box, kind = graph.targets["agent.box"], graph.targets["agent.type"]
    turn_M = torch.atan2(box[:, 4], box[:, 3]) - graph.targets["agent.place"][:, 2]
    moving_M = (box[:, 3:5].norm(dim=1) / 2).clamp(max=1)
    vehicle_M = (kind == _VEHICLE).float()
    vulnerable_M = torch.isin(kind, kind.new_tensor(_VULNERABLE)).float()
    cos_M, sin_M = turn_M.cos(), turn_M.sin()
    shares = [1 - moving_M, moving_M * cos_M.clamp(min=0) ** 2, moving_M * sin_M**2,
              moving_M * cos_M.clamp(max=0) ** 2]  # fmt: skip
    return torch.stack(
        [*(vehicle_M * share for share in shares), vulnerable_M, 1 - vehicle_M - vulnerable_M], dim=1
    )


def _tent_weights(value_M: Tensor, grid: tuple[float, ...]) -> Tensor:
    """Split each value linearly between its two neighbouring grid points (M, len(grid))."""
    knots = value_M.new_tensor(grid)
    value_M = value_M.clamp(grid[0], grid[-1]).contiguous()
    high_M = torch.searchsorted(knots, value_M).clamp(min=1)
    share_M = (value_M - knots[high_M - 1]) / (knots[high_M] - knots[high_M - 1])
    weights = value_M.new_zeros(len(value_M), len(grid))
    weights.scatter_(1, high_M[:, None] - 1, 1 - share_M[:, None])
    return weights.scatter_(1, high_M[:, None], share_M[:, None])


def _agent_histogram(graph: SceneGraph) -> Tensor:
    """Return the root of soft counts of agents over (motion group, s, d) in route coordinates (N, 486).

    An agent counts exp(-distance from the ego / 30 m). The L1 distance between two such tables grows with how far the
    agents of one would have to move to lie as those of the other, up to about a cell of the grid.
    """
    place = graph.targets["agent.place"]
    weight_M = torch.exp(-graph.targets["agent.box"][:, :2].norm(dim=1) / 30.0)
    cells = torch.einsum("mg,ms,md->mgsd", _motion_groups(graph) * weight_M[:, None],
                         _tent_weights(place[:, 0], GRID_S_M), _tent_weights(place[:, 1], GRID_D_M))  # fmt: skip
    cells = cells.flatten(1)
    blank = cells.new_zeros(len(graph), cells.shape[1])
    return blank.index_add(0, row_of(graph.offsets["agent"]), cells).sqrt()


def _interaction(graph: SceneGraph) -> Tensor:
    """Return how near the ego's drive comes to vehicles, vulnerable users and objects, and the gap ahead (N, 8)."""
    owner = row_of(graph.offsets["agent"])
    groups = _motion_groups(graph)
    kinds_M3 = torch.stack([groups[:, :4].sum(1), groups[:, 4], groups[:, 5]], dim=1) > 0.5
    plan = graph.targets["ego.drive"][:, NOW + 1 :][owner]
    gap = (graph.targets["agent.future"] - plan).norm(dim=2)
    unseen = ~(graph.targets["agent.future_valid"] & graph.targets["ego.drive_valid"][:, NOW + 1 :][owner])
    nearest_M = gap.masked_fill(unseen, torch.inf).amin(dim=1)
    approach_M = torch.exp(-nearest_M / APPROACH_SCALE_M)
    place, box = graph.targets["agent.place"], graph.targets["agent.box"]
    ahead_M = (place[:, 0] > 0) & (place[:, 1].abs() < 2.0)
    nearness_M = torch.exp(-place[:, 0].clamp(min=0) / POSITION_SCALE_M) * ahead_M
    speed_M = graph.targets["ego.speed"][:, NOW][owner]
    closing_M = ((speed_M - box[:, 3]) / place[:, 0].clamp(min=2.0)).clamp(-1, 1) * ahead_M
    columns = [approach_M[:, None] * kinds_M3, nearness_M[:, None] * kinds_M3, closing_M[:, None].clamp(min=0),
               closing_M[:, None].clamp(max=0).abs()]  # fmt: skip
    table = torch.cat(columns, dim=1)
    index = owner[:, None].expand_as(table)
    return table.new_zeros(len(graph), table.shape[1]).scatter_reduce(0, index, table, "amax")


def _lane_histogram(graph: SceneGraph) -> Tensor:
    """Return Weisfeiler-Lehman label counts of the lane graph: own labels, and label pairs over its edges (N, 88).

    Label of a segment: on the route or not, bending left, straight or right, and its direction against the ego.
    """
    points = graph.targets["lane.points"]
    entry, leave = points[:, 1] - points[:, 0], points[:, 2] - points[:, 1]
    bend = torch.atan2(entry[:, 0] * leave[:, 1] - entry[:, 1] * leave[:, 0], (entry * leave).sum(1))
    bend_class = (bend > 0.1).long() - (bend < -0.1).long() + 1
    heading = torch.atan2(points[:, 2, 1] - points[:, 0, 1], points[:, 2, 0] - points[:, 0, 0])
    quarter = torch.round(heading / (torch.pi / 2)).long() % 4
    label = (graph.targets["lane.on_route"].long() * 3 + bend_class) * 4 + quarter
    own = _counts(row_of(graph.offsets["lane"]), label, len(graph), 24)
    edges = global_edges(graph, "lane_lane")
    pair = (
        (label[edges[:, 0]] * 24 + label[edges[:, 1]])
        * 2654435761
        % 4294967296
        // (4294967296 // NUM_LANE_BINS)
    )
    pairs = _counts(row_of(graph.edge_offsets["lane_lane"]), pair, len(graph), NUM_LANE_BINS)
    return torch.cat([own, pairs], dim=1)


def _counts(owner: Tensor, label: Tensor, num_scenes: int, num_labels: int) -> Tensor:
    counts = torch.bincount(owner * num_labels + label, minlength=num_scenes * num_labels).float()
    counts = counts.reshape(num_scenes, num_labels)
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def _controls(graph: SceneGraph) -> Tensor:
    """Return how near the next red light and the next crosswalk on the route are (N, 2)."""
    place, red = graph.targets["control.place"], graph.targets["control.red"]
    ahead = (place[:, 0] > -5) & (place[:, 1].abs() < 15)
    nearness = torch.exp(-place[:, 0].clamp(min=0) / POSITION_SCALE_M) * ahead
    table = torch.stack([nearness * red, nearness * ~red], dim=1)
    index = row_of(graph.offsets["control"])[:, None].expand_as(table)
    return table.new_zeros(len(graph), 2).scatter_reduce(0, index, table, "amax")


def aspect_distances(first: Signature, second: Signature) -> dict[str, Tensor]:
    """Compare every scene of one side with every scene of the other, aspect by aspect.

    Heading (rad, the short way round), speed and speed change (m/s): the mean over frames known in both scenes of the
    absolute difference, of heading and speed change what exceeds `NEGLIGIBLE`. The other aspects are L1 distances.

    Args:
        first: P scenes.
        second: Q scenes.

    Returns:
        By aspect, float32 (P, Q), >= 0.
    """
    weight_PQT = first["valid"][:, None] * second["valid"][None]
    weight_PQT = weight_PQT / weight_PQT.sum(2, keepdim=True).clamp(min=1)
    gaps = {name: (first[name][:, None] - second[name][None]).abs() for name in MOTION}
    gaps["heading"] = torch.pi - (gaps["heading"] % (2 * torch.pi) - torch.pi).abs()
    found = {name: (gap_PQT * weight_PQT).sum(2) for name, gap_PQT in gaps.items()}
    found |= {name: (found[name] - limit).clamp(min=0) for name, limit in NEGLIGIBLE.items()}
    return found | {name: torch.cdist(first[name], second[name], p=1) for name in ASPECTS[len(MOTION) :]}


@dataclass(frozen=True, slots=True)
class ScenarioDistance:
    """The rank-normalised distance, fitted on training scenes."""

    quantiles: dict[str, Tensor]
    """By aspect, the sorted quantiles of its distance over random pairs (256)."""
    weights: dict[str, float]
    """alpha_m >= 0 by aspect."""

    def __call__(self, first: Signature, second: Signature) -> Tensor:
        """Return delta, float32 (P, Q), in [0, 1]; 0 for equal scenes."""
        parts = aspect_distances(first, second)
        total = sum(self.weights.values())
        return sum(self.weights[name] * self.rank(name, parts[name]) for name in self.quantiles) / total  # type: ignore[return-value]

    def rank(self, name: str, distance: Tensor) -> Tensor:
        """Return the share of random pairs that are closer than each distance, linear between quantiles.

        Args:
            name: Aspect.
            distance: Any shape.
        """
        table = self.quantiles[name]
        high = torch.searchsorted(table, distance.contiguous()).clamp(max=len(table) - 1)
        low = (high - 1).clamp(min=0)
        share = (distance - table[low]) / (table[high] - table[low]).clamp(min=1e-9)
        inside = (low + share.clamp(0, 1) * (high - low)) / (len(table) - 1)
        return torch.where(distance <= table[0], 0.0, inside)


def fit_scenario_distance(
    signature: Signature, weights: Mapping[str, float], seed: int, num_scenes: int = 512
) -> ScenarioDistance:
    """Estimate the distribution of every aspect's distance over random pairs of training scenes.

    Args:
        signature: N training scenes.
        weights: alpha_m by aspect; missing aspects weigh 0.
        seed: Seed of the sampled pairs.
        num_scenes: Scenes on either side of the sampled pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    total = len(signature["speed"])
    rows = torch.randint(total, (2, min(num_scenes, max(total, 1))), generator=generator)
    rows = rows.to(signature["speed"].device)
    sides = [{name: table[rows[side]] for name, table in signature.items()} for side in (0, 1)]
    levels = torch.linspace(0, 1, NUM_QUANTILES, device=rows.device)
    parts = aspect_distances(sides[0], sides[1])
    used = {name: float(weights.get(name, 0.0)) for name in ASPECTS if weights.get(name, 0.0) > 0}
    quantiles = {name: torch.quantile(parts[name].flatten(), levels) for name in used}
    return ScenarioDistance(quantiles, used)


def select_signature(signature: Signature, rows: Tensor) -> Signature:
    """Return the scenes `rows` of a signature.

    Args:
        signature: N scenes.
        rows: Int64.
    """
    return {name: table.index_select(0, rows) for name, table in signature.items()}
