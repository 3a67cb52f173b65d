"""The single comparisons behind `navsim_parity`: one list of `Check` for each part of the scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoscale_ray.evaluation import RULES_V1, RULES_V2, PreparedScene, StageFrames, aggregate_two_stage
from autoscale_ray.evaluation.aggregate import ALL_COLUMNS
from autoscale_ray.evaluation.arena import build_arena
from autoscale_ray.evaluation.backends import drive_freely
from autoscale_ray.evaluation.planar import box_corners
from autoscale_ray.evaluation.simulate import interpolate, reference_profiles
from autoscale_ray.evaluation.vehicle import PACIFICA
from benchmarks.golden_scenes import Arrays, GoldenVersion, trajectories_with

RULES = {"v1": RULES_V1, "v2": RULES_V2}
SCORE_TOLERANCE = 1e-6
POSITION_TOLERANCE_M = 1e-8
STATE_TOLERANCE = 1e-9
POSE_TOLERANCE_M = 1e-4
TIE_GAP = 1e-7
AGGREGATION_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Check:
    """One compared quantity: its largest difference, where it is, and the largest one allowed."""

    name: str
    worst: float
    tolerance: float
    where: str
    num_values: int
    note: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the difference is allowed; NaN never is."""
        return self.worst <= self.tolerance


def compare(name: str, ours: np.ndarray, golden: np.ndarray, tolerance: float, note: str = "") -> Check:
    """Compare two arrays; equal infinities and equal NaNs agree, anything else missing is infinitely wrong."""
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(golden, dtype=np.float64)
    if first.shape != second.shape:
        return Check(name, float("inf"), tolerance, f"shape {first.shape} against {second.shape}", 0, note)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.nan_to_num(np.abs(first - second), nan=np.inf))
    if difference.size == 0:
        return Check(name, 0.0, tolerance, "-", 0, note)
    where = np.unravel_index(int(np.argmax(difference)), difference.shape)
    return Check(
        name, float(difference.max()), tolerance, str(tuple(int(i) for i in where)), difference.size, note
    )


def check_tracker(lqr: Arrays, backend: str) -> list[Check]:
    """Compare profiles and driven states of the tracker cases, in map coordinates."""
    poses = lqr["proposal_poses"]
    start = np.broadcast_to(lqr["initial_state"][:, None], (*poses.shape[:2], 11))
    speed, curvature = reference_profiles(torch.as_tensor(poses).flatten(0, 1))
    profiles = [
        compare(
            "tracker: velocity profile",
            speed.view(*poses.shape[:2], -1).numpy(),
            lqr["velocity_profile"],
            STATE_TOLERANCE,
        ),
        compare(
            "tracker: curvature profile",
            curvature.view(*poses.shape[:2], -1).numpy(),
            lqr["curvature_profile"],
            STATE_TOLERANCE,
        ),
    ]
    return profiles + _state_checks(
        "tracker: driven states", _drive(poses, start, backend), lqr["sim_states"]
    )


def check_aggregation(golden: Arrays) -> list[Check]:
    """Compare the two-stage aggregation."""
    index = {token: row for row, token in enumerate(golden["tokens"])}
    mapping = np.array([[index[token] for token in row] for row in golden["mapping"]])
    columns = dict(zip(ALL_COLUMNS, [*golden["multi"].T, *golden["weighted"].T[:4]], strict=False))
    frames = StageFrames(
        columns=columns,
        start_times_s=golden["start_time"],
        endpoints=golden["endpoint"],
        start_points=golden["start_point"],
        states=golden["sim_states"],
    )
    ours = aggregate_two_stage(frames, mapping)
    per_frame = {"out_two_frame": ours.extended_comfort, "out_weight": ours.weights, "out_score": ours.scores}
    per_column = {"out_combined": ours.combined, "out_stage1": ours.stage_one, "out_stage2": ours.stage_two}
    checks = [
        compare(f"two stages: {name}", value, golden[name], AGGREGATION_TOLERANCE)
        for name, value in per_frame.items()
    ]
    for name, table in per_column.items() if "cols" in golden else ():
        values = np.array([table[column] for column in golden["cols"]])
        checks.append(compare(f"two stages: {name}", values, golden[name], AGGREGATION_TOLERANCE))
    return checks


def check_simulation(inputs: Arrays, golden: GoldenVersion, backend: str) -> list[Check]:
    """Compare driven states when fed the golden poses, in map coordinates."""
    start = np.zeros((len(golden.scenes), 1, 11))
    start[:, 0, :7] = inputs["hist_states"][golden.scene_rows][:, -1]
    outputs, version = golden.outputs, golden.version
    checks = []
    for poses, states, name in (
        ("proposal_poses", "sim_states", "trajectories"),
        ("pdm_poses", "pdm_sim_states", "reference"),
    ):
        fed = outputs[poses] if outputs[poses].ndim == 4 else outputs[poses][:, None]
        expected = outputs[states].reshape(*fed.shape[:3], 11)
        driven = _drive(fed, np.broadcast_to(start, (*fed.shape[:2], 11)), backend)
        checks += _state_checks(f"{version}: driven states of {name}", driven, expected)
    return checks


def check_observation(inputs: Arrays, golden: GoldenVersion) -> list[Check]:
    """Compare presence and corners of the 10 Hz boxes."""
    listed = golden.outputs["obs10_scene_agent_t"]
    missing, worst, count = 0.0, np.zeros(0), 0
    covered = np.unique(listed[:, 0])
    for scene, row in zip(golden.scenes, golden.scene_rows, strict=True):
        rows = np.flatnonzero(listed[:, 0] == row)
        agents = np.flatnonzero(inputs["agent_scene"] == row)
        if row > covered.max(initial=-1):
            continue
        arena = build_arena(scene, RULES[golden.version].num_frames)
        local = np.searchsorted(agents, listed[rows, 1])
        present = np.zeros_like(arena.tracks.present)
        present[local, listed[rows, 2]] = True
        missing += float((present != arena.tracks.present).sum())
        boxes = arena.tracks.boxes[local, listed[rows, 2]]
        corners = box_corners(boxes, arena.tracks.half_sizes[local]) + arena.origin
        worst = np.append(worst, np.abs(corners - golden.outputs["obs10_corners"][rows]).max(initial=0.0))
        count += len(rows)
    version = golden.version
    return [
        Check(f"{version}: agents present at 10 Hz", missing, 0.0, "-", count),
        Check(
            f"{version}: agent corners at 10 Hz", float(worst.max(initial=0.0)), SCORE_TOLERANCE, "-", count
        ),
    ]


def check_reference(golden: GoldenVersion, prepared: Sequence[PreparedScene]) -> list[Check]:
    """Compare PDM-Closed: poses, proposals, scores, choice where it is not a tie."""
    outputs, version = golden.outputs, golden.version
    references = [scene.reference for scene in prepared if scene.reference is not None]
    assert len(references) == len(prepared), "scenes must be prepared without given references"
    chosen = np.array([reference.chosen for reference in references])
    best = np.sort(outputs["pdm_closed_scores"], axis=1)
    clear = best[:, -1] - best[:, -2] > TIE_GAP
    lost = best[:, -1] - outputs["pdm_closed_scores"][np.arange(len(chosen)), chosen]
    other = np.flatnonzero(chosen != outputs["pdm_closed_argmax"])
    listed = ", ".join(
        f"{golden.scenes[row].scene_id} ({chosen[row]} for {outputs['pdm_closed_argmax'][row]})"
        for row in other
    )
    same = chosen == outputs["pdm_closed_argmax"]
    poses = np.stack([reference.poses for reference in references])
    listed_proposals = outputs["pdm_closed_proposal_poses"]
    proposals = np.stack([reference.proposals for reference in references])[: len(listed_proposals)]
    scores = np.stack([reference.scores for reference in references])
    wrong = np.where(clear & ~same, 1.0, 0.0)
    return [
        compare(f"{version}: PDM-Closed choice, gap > 1e-7", wrong, np.zeros(len(wrong)), 0.0),
        compare(
            f"{version}: PDM-Closed choice, ties, score lost",
            np.where(clear, 0.0, lost),
            0.0 * lost,
            TIE_GAP,
            listed,
        ),
        compare(f"{version}: PDM-Closed poses", poses[same], outputs["pdm_poses"][same], SCORE_TOLERANCE),
        compare(f"{version}: PDM-Closed proposals", proposals, listed_proposals, SCORE_TOLERANCE),
        compare(f"{version}: PDM-Closed scores", scores, outputs["pdm_closed_scores"], SCORE_TOLERANCE),
    ]


def check_poses(inputs: Arrays, golden: GoldenVersion, prepared: Sequence[PreparedScene]) -> list[Check]:
    """Compare interpolated proposals."""
    outputs, rows = golden.outputs, golden.scene_rows
    ours = np.empty_like(outputs["proposal_poses"])
    for count in (8, 40):
        waypoints = torch.as_tensor(trajectories_with(inputs, rows, count))
        for row, scene in enumerate(prepared):
            grid, num = scene.grids[count], waypoints.shape[1]
            nodes = (torch.as_tensor(grid.left).expand(num, -1), torch.as_tensor(grid.share).expand(num, -1))
            ego = torch.as_tensor(scene.arena.ego_pose).expand(num, 3)
            poses = interpolate(waypoints[row], ego, *nodes).numpy()
            chosen = inputs["traj_n"][rows[row]] == count
            ours[row, chosen] = poses[chosen]
    expected = outputs["proposal_poses"]
    return [compare(f"{golden.version}: interpolated proposals", ours, expected, POSE_TOLERANCE_M)]


def check_history(golden: GoldenVersion, prepared: Sequence[PreparedScene]) -> list[Check]:
    """Compare the resampled past that history comfort reads (v2)."""
    if "history_pad_n" not in golden.outputs:
        return []
    lengths = np.array([len(scene.arena.history) for scene in prepared])
    expected = golden.outputs["history_pad_states"]
    ours = np.zeros_like(expected)
    for row, scene in enumerate(prepared):
        ours[row, : lengths[row], :7] = scene.arena.history
        ours[row, : lengths[row], :2] += scene.arena.origin
        expected[row, lengths[row] :] = 0.0
    return [
        compare("v2: samples of history", lengths, golden.outputs["history_pad_n"], 0.0),
        compare("v2: states of history", ours, expected, POSITION_TOLERANCE_M),
    ]


def _drive(poses: np.ndarray, start: np.ndarray, backend: str) -> np.ndarray:
    flat = drive_freely(poses.reshape(-1, 41, 3), start.reshape(-1, 11), PACIFICA, backend)
    return flat.numpy().reshape(*poses.shape[:-1], 11)


def _state_checks(name: str, ours: np.ndarray, golden: np.ndarray) -> list[Check]:
    return [
        compare(f"{name}, x and y", ours[..., :2], golden[..., :2], POSITION_TOLERANCE_M),
        compare(f"{name}, the rest", ours[..., 2:], golden[..., 2:], STATE_TOLERANCE),
    ]
