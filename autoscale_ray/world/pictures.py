"""Pictures of the world: a sheet with a few scenes of every family, the ego travelling up the page."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from autoscale_ray.evaluation.planar import box_corners
from autoscale_ray.files import in_one_step
from autoscale_ray.scenes.schema import AGENT_TYPES, CURRENT_FRAME, POLYGON_LAYERS
from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.pools import generate

PAPER, ROAD, JUNCTION, ZEBRA, MARKING = "#e9ede4", "#c3c6ca", "#b3b7bc", "#f7f7f2", "#8b9096"
ROUTE, EGO, RED, LIGHT_GREEN = "#3b7dd8", "#c02626", "#e03131", "#2f9e44"
AGENT_COLORS = {"vehicle": "#2b3a55", "pedestrian": "#d97706", "bicycle": "#0f9d8a"}
STATIC_COLOR = "#7b4fa3"
WIDE_M, NARROW_M = (26.0, 60.0, 30.0), (14.0, 43.4, 20.0)
"""Drawn behind, ahead and to each side of the ego, at junctions and elsewhere."""
PAST, AHEAD = slice(0, CURRENT_FRAME + 1), slice(CURRENT_FRAME, CURRENT_FRAME + 9)
JUNCTIONS = ("red_light", "merge", "crossing", "left_turn", "roundabout")

Scene = Mapping[str, np.ndarray]


def plot_families(out_dir: str | Path, seed: int = 0, scenes_per_family: int = 2) -> Path:
    """Draw scenes of every family on one sheet.

    Args:
        out_dir: Folder for `families.png`; made if absent.
        seed: Seed of the scenes.
        scenes_per_family: Scenes drawn of each family, >= 1.

    Returns:
        Path of the picture.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    panels = [
        (f"{name.replace('_', ' ')} {i + 1}", scene, WIDE_M if name in JUNCTIONS else NARROW_M)
        for name in FAMILIES
        for i, scene in enumerate(scene_rows(generate(name, scenes_per_family, seed, side="dev")))
    ]
    columns = 3 * scenes_per_family
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.9 * rows + 0.4), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, scene, window_m) in zip(axes, panels, strict=False):
        draw_scene(axis, scene, window_m)
        axis.set_title(title, fontsize=10)
    figure.text(0.01, 0.004, _LEGEND, fontsize=9)
    figure.subplots_adjust(0.01, 0.03, 0.99, 0.975, 0.04, 0.09)
    path = folder / "families.png"
    with in_one_step(path) as temporary:
        figure.savefig(temporary, dpi=100)
    return path


_LEGEND = (
    "red box: ego, dots: its history, red line: the expert's next 4 s; blue: route; boxes: agents now, lines: "
    "past (thin) and next 4 s (thick); orange: pedestrian, green: cyclist, violet: static; dots at a junction: "
    "traffic lights, large for the ego's"
)


def scene_rows(table) -> list[dict[str, np.ndarray]]:
    """Return scenes of a table as plain arrays shaped by the schema's strides."""
    strides = {field.name: field.metadata[b"stride"] for field in table.schema if b"stride" in field.metadata}
    shapes = {
        name: [int(size) if size.isdigit() else -1 for size in stride.decode().split(",")]
        for name, stride in strides.items()
    }
    return [
        {name: np.reshape(value, shapes.get(name, ())) for name, value in row.items()}
        for row in table.to_pylist()
    ]


def draw_scene(axis: Axes, scene: Scene, window_m: tuple[float, float, float] = WIDE_M) -> None:
    """Draw one scene with the ego heading up; the window is metres behind, ahead and to each side."""
    _draw_ground(axis, scene)
    centre = _turned(scene["centerline"][:, :2])
    axis.plot(*centre.T, color=ROUTE, lw=1.3, alpha=0.8, zorder=3)
    _draw_lights(axis, scene)
    for i in range(len(scene["agent_type"])):
        _draw_agent(axis, scene, i)
    _draw_ego(axis, scene)
    behind_m, ahead_m, side_m = window_m
    axis.set_xlim(-side_m, side_m)
    axis.set_ylim(-behind_m, ahead_m)
    axis.set_aspect("equal")


def _turned(points: np.ndarray) -> np.ndarray:
    """Rotate so that the ego's x axis points up the page."""
    return np.stack([-points[..., 1], points[..., 0]], axis=-1)


_CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def _pieces(points: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    return [_turned(points[a:b]) for a, b in pairwise(offsets)]


def _draw_ground(axis: Axes, scene: Scene) -> None:
    axis.add_collection(PolyCollection([200.0 * np.array(_CORNERS)], facecolors=PAPER, zorder=0))
    rings = _pieces(scene["polygon_points"], scene["polygon_offsets"])
    layer = np.array([POLYGON_LAYERS[i] for i in scene["polygon_layer"]])
    for name, color, order in (("roadblock", ROAD, 1.0), ("intersection", JUNCTION, 1.1)):
        chosen = [ring for ring, kind in zip(rings, layer, strict=True) if kind == name]
        axis.add_collection(PolyCollection(chosen, facecolors=color, zorder=order))
    borders = [np.vstack([r, r[:1]]) for r, kind in zip(rings, layer, strict=True) if kind == "lane"]
    axis.add_collection(LineCollection(borders, colors=MARKING, linewidths=0.6, zorder=1.3))
    lanes = _pieces(scene["lane_points"], scene["lane_offsets"])
    axis.add_collection(
        LineCollection(lanes, colors="white", linewidths=0.7, linestyles=(0, (4, 4)), zorder=1.4)
    )
    for ring in (r for r, kind in zip(rings, layer, strict=True) if kind == "crosswalk"):
        axis.add_collection(PolyCollection(_zebra(ring), facecolors=ZEBRA, zorder=1.5))


def _zebra(ring: np.ndarray) -> list[np.ndarray]:
    """Return the white bars of a crossing: strips along the shorter pair of sides."""
    a, b, c, d = ring
    if np.linalg.norm(b - a) > np.linalg.norm(d - a):
        a, b, c, d = b, c, d, a
    num_bars = max(3, int(np.linalg.norm(d - a) / 1.0))
    share = np.linspace(0.0, 1.0, 2 * num_bars)
    low, high = a + share[:, None] * (d - a), b + share[:, None] * (c - b)
    return [np.stack([low[i], high[i], high[i + 1], low[i + 1]]) for i in range(0, 2 * num_bars - 1, 2)]


def _draw_lights(axis: Axes, scene: Scene) -> None:
    layer = scene["polygon_layer"]
    connector = POLYGON_LAYERS.index("lane_connector")
    red_now = scene["polygon_red"][:, CURRENT_FRAME]
    if not scene["polygon_red"].any():
        return
    for i in np.flatnonzero(layer == connector):
        start = _turned(scene["lane_points"][scene["lane_offsets"][scene["polygon_lane"][i]]])
        color = RED if red_now[i] else LIGHT_GREEN
        axis.scatter(*start, s=26 if scene["polygon_on_route"][i] else 9, color=color, zorder=6, linewidths=0)


def _box(x: float, y: float, yaw: float, length: float, width: float) -> np.ndarray:
    box = np.array([x, y, np.cos(yaw), np.sin(yaw)])
    return _turned(box_corners(box, 0.5 * np.array([length, width])))


def _draw_agent(axis: Axes, scene: Scene, number: int) -> None:
    states, valid = scene["agent_states"][number], scene["agent_valid"][number].astype(bool)
    color = AGENT_COLORS.get(AGENT_TYPES[scene["agent_type"][number]], STATIC_COLOR)
    for frames, width, alpha in ((PAST, 0.8, 0.8), (AHEAD, 2.0, 0.35)):
        drive = _turned(states[frames][valid[frames], :2])
        axis.plot(*drive.T, color=color, lw=width, alpha=alpha, zorder=4)
    if not valid[CURRENT_FRAME]:
        return
    x, y, yaw = states[CURRENT_FRAME, :3]
    length, width = scene["agent_size"][number]
    ring = _box(x, y, yaw, length, width)
    # A dark rim keeps cones and people visible, a white one parts vehicles.
    rim = "white" if width > 1.0 else color
    box = PolyCollection([ring], facecolors=color, edgecolors=rim, linewidths=1.2 if rim == color else 0.4)
    axis.add_collection(box)
    box.set_zorder(6.5)
    nose = np.array([[x, y], [x + 0.5 * np.cos(yaw) * length, y + 0.5 * np.sin(yaw) * length]])
    axis.plot(*_turned(nose).T, color="white", lw=0.8, zorder=6.6)


def _draw_ego(axis: Axes, scene: Scene) -> None:
    states = scene["ego_states"]
    axis.scatter(*_turned(states[:CURRENT_FRAME, :2]).T, s=5, color=EGO, zorder=6)
    drive = _turned(states[AHEAD, :2])
    axis.plot(*drive.T, color=EGO, lw=2.2, zorder=6)
    axis.scatter(*drive[1:].T, s=6, color=EGO, zorder=6)
    names = ("ego_rear_axle_to_center_m", "ego_length_m", "ego_width_m")
    ahead, length, width = (float(scene[name]) for name in names)
    ring = _box(ahead, 0.0, 0.0, length, width)
    axis.add_collection(PolyCollection([ring], facecolors=EGO, edgecolors="white", linewidths=0.6, zorder=7))
