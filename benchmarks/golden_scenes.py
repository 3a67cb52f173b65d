"""Read a folder of golden vectors (inputs.npz, outputs_v2.npz, outputs_v1.npz, lqr.npz, aggregation.npz)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation import ScoringScene, make_scene

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class GoldenVersion:
    """Outputs of one version of the official scorer and the scenes they belong to, row by row."""

    version: str
    outputs: Arrays
    scenes: list[ScoringScene]
    scene_rows: np.ndarray


def load_arrays(folder: Path, name: str) -> Arrays | None:
    """Return the arrays of one file, or None where the folder has no such file."""
    path = folder / f"{name}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def load_inputs(folder: Path) -> Arrays:
    inputs = load_arrays(folder, "inputs")
    if inputs is None:
        raise InvalidInputError(str(folder), "must hold inputs.npz of the golden vectors")
    return inputs


def load_version(folder: Path, inputs: Arrays, version: str) -> GoldenVersion | None:
    outputs = load_arrays(folder, f"outputs_{version}")
    if outputs is None:
        return None
    rows = outputs["scene_index"]
    return GoldenVersion(version, outputs, [golden_scene(inputs, int(row)) for row in rows], rows)


def golden_scene(inputs: Arrays, row: int) -> ScoringScene:
    """Build one scene from the flat input arrays; it may have no agents and no polygons."""
    agents = np.flatnonzero(inputs["agent_scene"] == row)
    rings = np.flatnonzero(inputs["poly_scene"] == row)
    offsets, vertices = _rings(inputs, rings)
    first, last = inputs["cl_offsets"][row : row + 2]
    limit = float(inputs["speed_limit"][row])
    return make_scene(
        f"golden-{row}",
        ego_history_times_us=inputs["hist_t_us"][row],
        ego_history_states=inputs["hist_states"][row],
        human_poses=inputs["human_poses"][row],
        agent_types=inputs["agent_type"][agents],
        agent_dims=inputs["agent_dims"][agents],
        agent_states=inputs["agent_states"][agents],
        agent_mask=inputs["agent_mask"][agents],
        polygon_layers=inputs["poly_layer"][rings],
        polygon_on_route=inputs["poly_on_route"][rings],
        polygon_red=inputs["poly_red"][rings],
        polygon_offsets=offsets,
        polygon_xy=vertices,
        centreline=inputs["cl_xyh"][first:last],
        speed_limit_mps=None if np.isnan(limit) else limit,
    )


def trajectories_with(inputs: Arrays, scene_rows: np.ndarray, num_waypoints: int) -> np.ndarray:
    """Return (S, K, n, 3) trajectories; those of another length are zeros and must not be read."""
    poses = inputs["traj_poses"][scene_rows][:, :, :num_waypoints]
    chosen = inputs["traj_n"][scene_rows] == num_waypoints
    return np.where(chosen[..., None, None], poses, 0.0)


def _rings(inputs: Arrays, rings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts, ends = inputs["poly_offsets"][rings], inputs["poly_offsets"][rings + 1]
    vertices = [inputs["poly_xy"][start:end] for start, end in zip(starts, ends, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64)
    return offsets, np.concatenate(vertices) if vertices else np.zeros((0, 2))
