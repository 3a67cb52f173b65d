"""`ScoringScene`: everything the scorer must know about one scene, as plain arrays in one frame.

Shape legend: H history frames, A agents, F 2 Hz frames, G polygons, V polygon vertices, C centreline vertices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from autoscale_ray.errors import InvalidSceneError
from autoscale_ray.evaluation.vehicle import PACIFICA, VehicleParameters

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

AGENT_TYPES = ("vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object")
"""Agent type codes are positions in this tuple; the first three move, the others are static objects."""

NUM_MOVING_TYPES = 3

POLYGON_LAYERS = ("roadblock", "lane", "lane_connector", "intersection", "carpark_area")
"""Polygon layer codes are positions in this tuple."""

ROADBLOCK, LANE, LANE_CONNECTOR, INTERSECTION, CARPARK = range(5)
DRIVABLE_LAYERS = (ROADBLOCK, INTERSECTION, CARPARK)
"""Their union is the drivable area."""

NUM_HISTORY_FRAMES = 4
MAX_HISTORY_US = 60_000_000
"""Longest past. NAVSIM takes four frames of a log whatever the time between them; ours bounds the samples."""
NUM_FRAMES_V2 = 9
NUM_FRAMES_V1 = 11


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoringScene:
    """One scene as the scorer sees it; every position is in one frame, a map frame or an ego frame alike.

    Fields (units m, s, rad, m/s, m/s^2 unless named otherwise):
        scene_id: Name used in results and errors.
        ego_history_times_us: (H,) increasing timestamps in microseconds, the last one is t = 0; H is 4 (5 is read
            as its last 4).
        ego_history_states: (H, 7) rear axle x, y, yaw, then vx, vy, ax, ay in the body frame.
        human_poses: (8, 3) the logged future every 0.5 s relative to the current rear axle, or None.
        agent_types: (A,) codes of `AGENT_TYPES`.
        agent_dims: (A, 3) length, width, height, all positive.
        agent_states: (A, F, 5) box centre x, y, yaw, vx, vy at t = 0, 0.5, ... s; F is 9 (EPDMS) or 11 (PDMS too).
        agent_mask: (A, F) whether the agent was seen in that frame; unseen states are never read.
        polygon_layers: (G,) codes of `POLYGON_LAYERS`.
        polygon_on_route: (G,) whether the lane or connector belongs to the route.
        polygon_red: (G, F) whether the connector's light is red in that frame.
        polygon_offsets: (G + 1,) where each ring starts in `polygon_xy`.
        polygon_xy: (V, 2) simple rings; the last vertex joins the first, repeating it is allowed.
        centreline: (C, 3) x, y, yaw of the route's centreline, C >= 2; neighbours may coincide.
        speed_limit_mps: Limit of the starting lane, or None.
        vehicle: The ego vehicle.
        is_synthetic: True switches the human penalty filter off.
    """

    scene_id: str
    ego_history_times_us: Integers
    ego_history_states: Floats
    agent_types: Integers
    agent_dims: Floats
    agent_states: Floats
    agent_mask: Flags
    polygon_layers: Integers
    polygon_on_route: Flags
    polygon_red: Flags
    polygon_offsets: Integers
    polygon_xy: Floats
    centreline: Floats
    human_poses: Floats | None = None
    speed_limit_mps: float | None = None
    vehicle: VehicleParameters = PACIFICA
    is_synthetic: bool = False

    @property
    def num_agents(self) -> int:
        """Return A."""
        return len(self.agent_types)

    @property
    def num_polygons(self) -> int:
        """Return G."""
        return len(self.polygon_layers)

    @property
    def num_frames(self) -> int:
        """Return F, the number of 2 Hz frames with agents and lights."""
        return self.agent_states.shape[1]


def make_scene(scene_id: str, **values: object) -> ScoringScene:
    """Build a scene from array-likes, with the right dtypes, and check every rule of `ScoringScene`.

    Args:
        scene_id: Name used in results and errors.
        **values: The other fields of `ScoringScene`, as arrays, tensors or nested lists.

    Returns:
        A valid scene.

    Raises:
        InvalidSceneError: Naming the scene, the field and the rule that does not hold.
    """
    dtypes = {"Floats": np.float64, "Integers": np.int64, "Flags": np.bool_}
    known = {item.name: str(item.type).split(" ")[0] for item in fields(ScoringScene)}
    converted = {
        name: value
        if value is None or known.get(name) not in dtypes
        else _as_array(scene_id, name, value, dtypes[known[name]])
        for name, value in values.items()
    }
    return validate_scene(ScoringScene(scene_id=scene_id, **converted))  # type: ignore[arg-type]


def pack_rings(rings: Sequence[npt.ArrayLike], scene_id: str = "scene") -> tuple[Integers, Floats]:
    """Pack explicitly closed rings into `polygon_offsets` and `polygon_xy`.

    Args:
        rings: Rings (n, 2) whose last vertex repeats the first, as in GeoJSON and shapely.
        scene_id: Name used in errors.

    Returns:
        Offsets (G + 1,) and vertices (V, 2) without the repeated ones.

    Raises:
        InvalidSceneError: If a ring is not closed, not (n, 2) or no numbers.
    """
    arrays = [_as_array(scene_id, f"polygon {index}", ring, np.float64) for index, ring in enumerate(rings)]
    for index, ring in enumerate(arrays):
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 4:
            raise InvalidSceneError(f"{scene_id}: polygon {index}", "must be (n, 2) with n >= 4", ring.shape)
        if not np.array_equal(ring[0], ring[-1]):
            raise InvalidSceneError(
                f"{scene_id}: polygon {index}", "must be closed: last vertex equal to the first", ring[-1]
            )
    offsets = np.concatenate([[0], np.cumsum([len(ring) - 1 for ring in arrays])]).astype(np.int64)
    return offsets, np.concatenate([ring[:-1] for ring in arrays]) if arrays else np.zeros((0, 2))


def validate_scene(scene: ScoringScene) -> ScoringScene:
    """Check every rule stated in `ScoringScene` and return the scene.

    Args:
        scene: Any scene.

    Returns:
        The same scene.

    Raises:
        InvalidSceneError: Naming the scene, the field and the rule that does not hold.
    """
    _check_shapes(scene)
    _check_ego(scene)
    _check_agents(scene)
    _check_polygons(scene)
    _require(
        scene,
        "centreline",
        bool(np.ptp(scene.centreline[:, :2], axis=0).any()),
        "must not be one single point",
    )
    return scene


def check_trajectories(scene_ids: Sequence[str], trajectories: npt.ArrayLike) -> Floats:
    """Check the shape and finiteness of trajectories and return them as float64.

    Args:
        scene_ids: Names of the S scenes.
        trajectories: (S, P, 8, 3) every 0.5 s or (S, P, 40, 3) every 0.1 s; x, y, yaw relative to the rear axle
            at t = 0.

    Returns:
        The array in float64.

    Raises:
        InvalidSceneError: Naming the scene and the rule.
    """
    rule = "must have shape (S, P, 8 or 40, 3)"
    try:
        array = np.asarray(trajectories, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidSceneError("trajectories", rule, "ragged lists, or no numbers") from None
    if array.ndim != 4 or array.shape[2] not in (8, 40) or array.shape[3] != 3:
        raise InvalidSceneError("trajectories", rule, array.shape)
    if array.shape[0] != len(scene_ids):
        raise InvalidSceneError(
            "trajectories", f"must have one row for each of {len(scene_ids)} scenes", array.shape[0]
        )
    bad_S = ~np.isfinite(array).all(axis=(1, 2, 3))
    if bad_S.any():
        raise InvalidSceneError(f"{scene_ids[int(np.argmax(bad_S))]}: trajectory", "must be finite")
    return array


def _as_array(scene_id: str, name: str, value: object, dtype: type) -> np.ndarray:
    try:
        return np.ascontiguousarray(np.asarray(value, dtype=dtype))
    except (TypeError, ValueError) as error:
        raise InvalidSceneError(
            f"{scene_id}: {name}", f"must be an array of {np.dtype(dtype).name}", error
        ) from error


def _require(scene: ScoringScene, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidSceneError(f"{scene.scene_id}: {name}", rule)


def _check_shapes(scene: ScoringScene) -> None:
    num_agents, num_polygons = len(scene.agent_types), len(scene.polygon_layers)
    num_frames = scene.agent_states.shape[1] if scene.agent_states.ndim == 3 else -1
    expected: dict[str, tuple[int | None, ...]] = {
        "ego_history_times_us": (None,),
        "ego_history_states": (len(scene.ego_history_times_us), 7),
        "agent_types": (num_agents,),
        "agent_dims": (num_agents, 3),
        "agent_states": (num_agents, num_frames, 5),
        "agent_mask": (num_agents, num_frames),
        "polygon_layers": (num_polygons,),
        "polygon_on_route": (num_polygons,),
        "polygon_red": (num_polygons, num_frames),
        "polygon_offsets": (num_polygons + 1,),
        "polygon_xy": (None, 2),
        "centreline": (None, 3),
    }
    _require(
        scene, "agent_states", num_frames in (NUM_FRAMES_V2, NUM_FRAMES_V1), "must have shape (A, 9 or 11, 5)"
    )
    for name, shape in expected.items():
        actual = getattr(scene, name).shape
        fits = len(actual) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, actual, strict=True)
        )
        _require(scene, name, fits, f"must have shape {shape}, has {actual}")
    if scene.human_poses is not None:
        fits = scene.human_poses.shape == (8, 3) and bool(np.isfinite(scene.human_poses).all())
        _require(scene, "human_poses", fits, "must be (8, 3) and finite")


def _check_ego(scene: ScoringScene) -> None:
    times_us, states = scene.ego_history_times_us, scene.ego_history_states
    _require(scene, "ego_history_times_us", len(times_us) in (4, 5), "must have 4 or 5 frames")
    _require(scene, "ego_history_times_us", bool((np.diff(times_us) > 0).all()), "must increase")
    spans_history = 100_000 < times_us[-1] - times_us[-NUM_HISTORY_FRAMES] <= MAX_HISTORY_US
    _require(scene, "ego_history_times_us", bool(spans_history), "last 4 frames must span 0.1 to 60 s")
    _require(scene, "ego_history_states", bool(np.isfinite(states).all()), "must be finite")
    _require(scene, "centreline", len(scene.centreline) >= 2, "must have at least 2 vertices")
    _require(scene, "centreline", bool(np.isfinite(scene.centreline).all()), "must be finite")
    limit = scene.speed_limit_mps
    _require(
        scene,
        "speed_limit_mps",
        limit is None or (np.isfinite(limit) and limit > 0),
        "must be positive or None",
    )


def _check_agents(scene: ScoringScene) -> None:
    types = scene.agent_types
    _require(
        scene, "agent_types", bool(((types >= 0) & (types < len(AGENT_TYPES))).all()), "must be codes 0 to 6"
    )
    dims = scene.agent_dims
    _require(scene, "agent_dims", bool((np.isfinite(dims) & (dims > 0)).all()), "must be positive")
    _require(
        scene,
        "agent_states",
        bool(np.isfinite(scene.agent_states[scene.agent_mask]).all()),
        "must be finite where seen",
    )


def _check_polygons(scene: ScoringScene) -> None:
    layers, offsets, xy = scene.polygon_layers, scene.polygon_offsets, scene.polygon_xy
    _require(
        scene,
        "polygon_layers",
        bool(((layers >= 0) & (layers < len(POLYGON_LAYERS))).all()),
        "must be codes 0 to 4",
    )
    covers = offsets[0] == 0 and offsets[-1] == len(xy) and bool((np.diff(offsets) >= 3).all())
    _require(
        scene,
        "polygon_offsets",
        covers,
        "must start at 0, end at len(polygon_xy) and give each ring >= 3 vertices",
    )
    _require(scene, "polygon_xy", bool(np.isfinite(xy).all()), "must be finite")
    red_elsewhere = scene.polygon_red[layers != LANE_CONNECTOR].any()
    _require(scene, "polygon_red", not red_elsewhere, "must be False outside lane connectors")
    if len(layers):
        from autoscale_ray.scenes.rings import is_tangled  # here: the scorer is imported without shapely

        tangled = is_tangled(xy - xy[0], np.diff(offsets))
        rule = f"ring {np.argmax(tangled)} must be simple: no crossing or zero area"
        _require(scene, "polygon_xy", not tangled.any(), rule)
