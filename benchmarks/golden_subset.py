"""Cut a folder of golden vectors down to some scenes.

python -m benchmarks.golden_subset --golden DIR --out DIR --scenes 0 4 29 [--tracker-cases 8] [--mappings 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.golden_scenes import Arrays, load_arrays, load_inputs

PER_SCENE = (
    "scene_kind",
    "dense",
    "hist_t_us",
    "hist_states",
    "speed_limit",
    "human_poses",
    "human_kind",
    "traj_poses",
    "traj_n",
    "traj_kind",
)


def cut_inputs(inputs: Arrays, scenes: np.ndarray) -> tuple[Arrays, np.ndarray]:
    """Return the inputs of some scenes, renumbered, and the kept rows of the agents."""
    agents = np.flatnonzero(np.isin(inputs["agent_scene"], scenes))
    rings = np.flatnonzero(np.isin(inputs["poly_scene"], scenes))
    cut = {name: inputs[name][scenes] for name in PER_SCENE if name in inputs}
    cut |= {name: inputs[name][agents] for name in inputs if name.startswith("agent_")}
    cut |= {name: inputs[name][rings] for name in ("poly_layer", "poly_on_route", "poly_red", "poly_scene")}
    cut["agent_scene"] = np.searchsorted(scenes, cut["agent_scene"]).astype(np.int32)
    cut["poly_scene"] = np.searchsorted(scenes, cut["poly_scene"]).astype(np.int32)
    cut["poly_offsets"], cut["poly_xy"] = _cut_ragged(inputs["poly_offsets"], inputs["poly_xy"], rings)
    cut["cl_offsets"], cut["cl_xyh"] = _cut_ragged(inputs["cl_offsets"], inputs["cl_xyh"], scenes)
    return cut, agents


def cut_outputs(outputs: Arrays, scenes: np.ndarray, agents: np.ndarray) -> Arrays:
    """Return the outputs of some scenes, renumbered."""
    rows = np.flatnonzero(np.isin(outputs["scene_index"], scenes))
    cut = {name: value[rows] for name, value in outputs.items() if len(value) == len(outputs["scene_index"])}
    cut["scene_index"] = np.searchsorted(scenes, cut["scene_index"])
    proposals = outputs["pdm_closed_proposal_poses"]
    cut["pdm_closed_proposal_poses"] = proposals[rows[rows < len(proposals)]]
    listed = outputs["obs10_scene_agent_t"]
    kept = np.isin(listed[:, 0], scenes)
    scene, agent, step = listed[kept].T
    renumbered = [np.searchsorted(scenes, scene), np.searchsorted(agents, agent), step]
    cut["obs10_scene_agent_t"] = np.stack(renumbered, axis=1).astype(np.int32)
    cut["obs10_corners"] = outputs["obs10_corners"][kept]
    return cut


def cut_aggregation(golden: Arrays, num_mappings: int) -> Arrays:
    """Return the inputs of the first mappings and their per-frame outputs; the combined outputs need all of them."""
    names = list(dict.fromkeys(golden["mapping"][:, 0]))[:num_mappings]
    mapping = golden["mapping"][np.isin(golden["mapping"][:, 0], names)]
    kept = np.isin(golden["tokens"], mapping)
    per_frame = {name: value[kept] for name, value in golden.items() if len(value) == len(golden["tokens"])}
    return {**per_frame, "mapping": mapping, "weights": golden["weights"]}


def _cut_ragged(offsets: np.ndarray, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [values[offsets[row] : offsets[row + 1]] for row in rows]
    sizes = np.cumsum([0] + [len(part) for part in parts]).astype(np.int64)
    return sizes, np.concatenate(parts) if parts else values[:0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, nargs="+", required=True)
    parser.add_argument("--tracker-cases", type=int, default=8)
    parser.add_argument("--mappings", type=int, default=2)
    options = parser.parse_args()
    scenes = np.unique(options.scenes)
    inputs, agents = cut_inputs(load_inputs(options.golden), scenes)
    files = {"inputs": inputs}
    for version in ("v1", "v2"):
        outputs = load_arrays(options.golden, f"outputs_{version}")
        if outputs is not None:
            files[f"outputs_{version}"] = cut_outputs(outputs, scenes, agents)
    lqr, aggregation = load_arrays(options.golden, "lqr"), load_arrays(options.golden, "aggregation")
    if lqr is not None:
        files["lqr"] = {name: value[: options.tracker_cases] for name, value in lqr.items() if value.ndim}
    if aggregation is not None:
        files["aggregation"] = cut_aggregation(aggregation, options.mappings)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, arrays in files.items():
        np.savez_compressed(options.out / f"{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
