"""Draw scenes: a contact sheet in which a person sees at a glance whether a source was read rightly."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from autoscale_ray.files import in_one_step
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, DRIVING_COMMANDS, POLYGON_LAYERS

VIEW_M = 45.0
"""Half width of the view."""
MAX_COLUMNS = 6
_AREA_COLORS = {
    "roadblock": "#dfe3e8",
    "intersection": "#e9dfcf",
    "carpark_area": "#e3eadf",
    "crosswalk": "#c9d8ea",
}
_AGENT_COLORS = {"vehicle": "#4878a8", "pedestrian": "#c44e52", "bicycle": "#dd8452"}


def plot_pool(path: Path | str, out: Path | str, *, num_scenes: int = 24, seed: int = 0) -> None:
    """Draw random scenes of a pool into one image.

    Args:
        path: Pool folder.
        out: Image file; its suffix gives the format.
        num_scenes: Scenes on the sheet, >= 1; fewer when the pool is smaller.
        seed: Seed of the choice.

    Raises:
        PoolError: No usable pool.
    """
    pool = open_pool(path)
    rows = np.random.default_rng(seed).choice(len(pool), size=min(num_scenes, len(pool)), replace=False)
    batch = pool.batch(np.sort(rows))
    columns = min(MAX_COLUMNS, len(batch))
    lines = math.ceil(len(batch) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * lines), layout="constrained")
    for number, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        axes.set_axis_off()
        if number < len(batch):
            draw_scene(axes, batch.select([number]))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "scenes"}), in_one_step(Path(out)) as temporary:
        figure.savefig(temporary, dpi=90)


def draw_scene(axes: Axes, scene: SceneBatch) -> None:
    """Draw one scene in its own frame: areas, lanes, route, agents with their motion, ego with past and
    future.

    Args:
        axes: Where to draw.
        scene: Batch of one scene.
    """
    _draw_areas(axes, scene)
    _draw_lanes(axes, scene)
    _draw_agents(axes, scene)
    _draw_ego(axes, scene)
    axes.set_xlim(-VIEW_M, VIEW_M)
    axes.set_ylim(-VIEW_M, VIEW_M)
    axes.set_aspect("equal")
    speed = float(scene.ego_states_NT7[0, CURRENT_FRAME, 3])
    name = scene.scene_ids[0].split("/", 1)[-1][-38:]
    axes.set_title(f"{name}\n{speed:.1f} m/s, {DRIVING_COMMANDS[int(scene.command_N[0])]}", fontsize=6)


def _draw_areas(axes: Axes, scene: SceneBatch) -> None:
    offsets = scene.polygon_point_offsets.tolist()
    points = scene.polygon_points_W2.numpy()
    for number, layer in enumerate(scene.polygon_layer_Q.tolist()):
        ring = points[offsets[number] : offsets[number + 1]]
        color = _AREA_COLORS.get(POLYGON_LAYERS[layer])
        if color is not None:
            axes.fill(*ring.T, color=color, linewidth=0, zorder=0)
        elif bool(scene.polygon_red_QT[number, CURRENT_FRAME]):
            axes.fill(*ring.T, color="#d62728", alpha=0.25, linewidth=0, zorder=1)


def _draw_lanes(axes: Axes, scene: SceneBatch) -> None:
    offsets = scene.lane_point_offsets.tolist()
    points = scene.lane_points_V2.numpy()
    lanes = [points[low:high] for low, high in itertools.pairwise(offsets)]
    colors = ["#f0a030" if on_route else "#9aa0a6" for on_route in scene.lane_on_route_L.tolist()]
    axes.add_collection(LineCollection(lanes, colors=colors, linewidths=0.6, zorder=2))
    axes.plot(*scene.centerline_C3[:, :2].numpy().T, color="#2ca02c", linewidth=1.2, alpha=0.7, zorder=3)


def _draw_agents(axes: Axes, scene: SceneBatch) -> None:
    states = scene.agent_states_AT5.numpy()[:, CURRENT_FRAME:]
    valid = scene.agent_valid_AT.numpy()[:, CURRENT_FRAME:]
    present = valid[:, 0]
    sizes = scene.agent_size_A2.numpy()[present]
    boxes = [box_corners(pose, *size) for pose, size in zip(states[present, 0, :3], sizes, strict=True)]
    colors = [_AGENT_COLORS.get(AGENT_TYPES[kind], "#7f7f7f") for kind in scene.agent_type_A.numpy()[present]]
    axes.add_collection(
        PolyCollection(boxes, facecolors=colors, edgecolors="black", linewidths=0.3, zorder=4)
    )
    ahead = [state[seen, :2] for state, seen in zip(states, valid, strict=True) if seen.sum() > 1]
    axes.add_collection(LineCollection(ahead, colors="#4878a8", linewidths=0.5, zorder=4))
    noses = [np.stack([box[[0, 3]].mean(axis=0), box.mean(axis=0)]) for box in boxes]
    axes.add_collection(LineCollection(noses, colors="white", linewidths=0.7, zorder=5))


def _draw_ego(axes: Axes, scene: SceneBatch) -> None:
    length, width, _, rear = scene.ego_size_N4[0].tolist()
    poses = scene.ego_states_NT7[0, :, :3].numpy()
    valid = scene.ego_valid_NT[0].numpy()
    center = poses[CURRENT_FRAME] + np.array([rear, 0.0, 0.0])
    axes.fill(*box_corners(center, length, width).T, color="#d62728", zorder=6)
    axes.plot(*poses[valid, :2].T, color="#d62728", linewidth=0.9, marker=".", markersize=2.0, zorder=6)


def box_corners(pose: np.ndarray, length_m: float, width_m: float) -> np.ndarray:
    """Return the corners of a box (4, 2): front left, rear left, rear right, front right.

    Args:
        pose: x, y, yaw of the box centre.
        length_m: Along the heading.
        width_m: Across it.
    """
    half = (
        np.array([[length_m, width_m], [-length_m, width_m], [-length_m, -width_m], [length_m, -width_m]])
        / 2.0
    )
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    return half @ np.array([[cos, sin], [-sin, cos]]) + pose[:2]
