"""Scenes as flat tensors with offsets: no Python object per scene, no padding.

Shape legend: N scenes, T frames (15), A agents, L lanes, V lane vertices, E lane links, Q polygons, W polygon
vertices, C centre line vertices; all counts but T are over the whole batch. Row k of ``agent_offsets`` is the
first agent of scene k. Lane numbers inside `links_E3` and `polygon_lane_Q` are local to their scene, so a
scene keeps its values wherever it stands in a batch.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from autoscale_ray.errors import InvalidSceneError
from autoscale_ray.scenes.ragged import row_of, runs_of
from autoscale_ray.scenes.schema import DOMAINS, NUM_FRAMES, SCENE_SCHEMA, check_schema, inner_shape


@dataclass(frozen=True, slots=True)
class SceneBatch:
    """N scenes as flat tensors; coordinates in each scene's own frame, metres, seconds, radians."""

    scene_ids: tuple[str, ...]
    domain_N: Tensor
    """int8, index into DOMAINS."""
    command_N: Tensor
    """int64, index into DRIVING_COMMANDS."""
    ego_size_N4: Tensor
    """float32 length, width, wheelbase, rear axle to box centre."""
    ego_states_NT7: Tensor
    """float32, order of EGO_STATE; rear axle."""
    ego_valid_NT: Tensor
    """bool, frame recorded."""
    route_speed_limit_N: Tensor
    """float32, NaN when unknown."""
    agent_offsets: Tensor
    """int64, N+1."""
    agent_type_A: Tensor
    """int64, index into AGENT_TYPES."""
    agent_size_A2: Tensor
    """float32 length, width."""
    agent_states_AT5: Tensor
    """float32, order of AGENT_STATE; box centre."""
    agent_valid_AT: Tensor
    """bool."""
    lane_offsets: Tensor
    """int64, N+1: lanes of each scene."""
    lane_point_offsets: Tensor
    """int64, L+1: vertices of each lane."""
    lane_points_V2: Tensor
    """float32, in driving direction."""
    lane_width_L: Tensor
    """float32, NaN when unknown."""
    lane_speed_limit_L: Tensor
    """float32, NaN when unknown."""
    lane_on_route_L: Tensor
    """bool."""
    link_offsets: Tensor
    """int64, N+1."""
    links_E3: Tensor
    """int64 from lane, to lane (scene-local), index into LINK_KINDS."""
    polygon_offsets: Tensor
    """int64, N+1."""
    polygon_point_offsets: Tensor
    """int64, Q+1."""
    polygon_points_W2: Tensor
    """float32, rings are not closed."""
    polygon_layer_Q: Tensor
    """int64, index into POLYGON_LAYERS."""
    polygon_lane_Q: Tensor
    """int64, scene-local lane or -1."""
    polygon_on_route_Q: Tensor
    """bool."""
    polygon_red_QT: Tensor
    """bool."""
    centerline_offsets: Tensor
    """int64, N+1."""
    centerline_C3: Tensor
    """float32 x, y, yaw."""
    agent_neighbours_A8: Tensor | None = None
    """int64 nearest agents (scene-local), -1 where there are fewer; see `graph`."""
    agent_lanes_A3: Tensor | None = None
    """int64 nearest heading-compatible lanes (scene-local), -1 where there are fewer; see `graph`."""

    def __len__(self) -> int:
        return len(self.domain_N)

    @property
    def agent_row_A(self) -> Tensor:
        """Return the scene of every agent, int64."""
        return row_of(self.agent_offsets)

    @property
    def lane_row_L(self) -> Tensor:
        """Return the scene of every lane, int64."""
        return row_of(self.lane_offsets)

    @property
    def polygon_row_Q(self) -> Tensor:
        """Return the scene of every polygon, int64."""
        return row_of(self.polygon_offsets)

    def to(self, device: torch.device | str) -> SceneBatch:
        """Return the batch with every tensor on `device`."""
        moved = {name: tensor.to(device) for name, tensor in tensors_of(self).items()}
        return replace(self, **moved)

    def select(self, rows: Tensor | np.ndarray | Sequence[int]) -> SceneBatch:
        """Return the scenes `rows`, in that order; repeats are allowed.

        A run of consecutive rows is cut out as views; any other order costs one `index_select` per tensor.

        Args:
            rows: Scene numbers, int64, in [0, N).

        Returns:
            A batch of ``len(rows)`` scenes.
        """
        rows_B = torch.as_tensor(rows, dtype=torch.int64).cpu()
        values = rows_B.numpy()
        assert len(values) == 0 or (values.min() >= 0 and values.max() < len(self)), "row out of range"
        rows_B = rows_B.to(self.domain_N.device)
        ids = np.asarray(self.scene_ids, dtype=object)[values] if self.scene_ids else ()
        return select(self, rows_B, tuple(ids))


# Field -> (group that its first axis runs over, pool column). Offsets are derived and therefore not listed.
_FIELDS = {
    "ego_states_NT7": ("scene", "ego_states"),
    "ego_valid_NT": ("scene", "ego_valid"),
    "agent_type_A": ("agent", "agent_type"),
    "agent_size_A2": ("agent", "agent_size"),
    "agent_states_AT5": ("agent", "agent_states"),
    "agent_valid_AT": ("agent", "agent_valid"),
    "lane_points_V2": ("lane_point", "lane_points"),
    "lane_width_L": ("lane", "lane_width_m"),
    "lane_speed_limit_L": ("lane", "lane_speed_limit_mps"),
    "lane_on_route_L": ("lane", "lane_on_route"),
    "links_E3": ("link", "lane_links"),
    "polygon_points_W2": ("polygon_point", "polygon_points"),
    "polygon_layer_Q": ("polygon", "polygon_layer"),
    "polygon_lane_Q": ("polygon", "polygon_lane"),
    "polygon_on_route_Q": ("polygon", "polygon_on_route"),
    "polygon_red_QT": ("polygon", "polygon_red"),
    "centerline_C3": ("centerline", "centerline"),
}
_OPTIONAL_FIELDS = {"agent_neighbours_A8": "agent", "agent_lanes_A3": "agent"}
_GROUP_OFFSETS = {
    "agent": "agent_offsets",
    "lane": "lane_offsets",
    "link": "link_offsets",
    "polygon": "polygon_offsets",
    "centerline": "centerline_offsets",
}
# Two-level groups: vertices hang on lanes and polygons, which hang on scenes.
_POINT_GROUPS = {
    "lane_point": ("lane", "lane_offsets", "lane_point_offsets"),
    "polygon_point": ("polygon", "polygon_offsets", "polygon_point_offsets"),
}
_WIDE_INTEGERS = {"agent_type_A", "links_E3", "polygon_layer_Q", "polygon_lane_Q", *_OPTIONAL_FIELDS}
_INNER_SHAPES = {
    field.name: (inner_shape(field), int(np.prod(inner_shape(field), dtype=np.int64)))
    for field in SCENE_SCHEMA
    if pa.types.is_list(field.type)
}
TENSOR_NAMES = tuple(field.name for field in fields(SceneBatch) if field.name != "scene_ids")


def group_of(name: str) -> str:
    """Return what the first axis of tensor `name` counts: scene, agent, ..., or ``offsets``."""
    if name.endswith("offsets"):
        return "offsets"
    return _OPTIONAL_FIELDS.get(name) or _FIELDS.get(name, ("scene", ""))[0]


_GROUP_OF = {name: group_of(name) for name in TENSOR_NAMES}


def tensors_of(batch: SceneBatch) -> dict[str, Tensor]:
    """Return the tensors of `batch` by field name, without absent optional ones."""
    found = {name: getattr(batch, name) for name in TENSOR_NAMES}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def select(
    batch: SceneBatch, rows_B: Tensor, scene_ids: tuple[str, ...], wide: Container[str] = ()
) -> SceneBatch:
    """Return some scenes of a batch, in any order; repeats are allowed.

    Args:
        batch: N scenes.
        rows_B: Scene numbers, int64, in [0, N), on the device of the batch.
        scene_ids: Ids of the scenes that are taken.
        wide: Names of tensors that are narrow in `batch` and become int64.
    """
    runs = runs_of(rows_B)
    take, parts = {"scene": runs.scene}, {}
    for group, name in _GROUP_OFFSETS.items():
        cut = runs.long_group if group == "centerline" else runs.group
        take[group], parts[name] = cut(getattr(batch, name))
    for group, (owner, scene_offsets, point_offsets) in _POINT_GROUPS.items():
        take[group], parts[point_offsets] = runs.points(
            getattr(batch, scene_offsets), getattr(batch, point_offsets), take[owner], parts[scene_offsets]
        )
    for name, group in _GROUP_OF.items():
        if group != "offsets" and (tensor := getattr(batch, name)) is not None:
            taken = take[group](tensor)
            parts[name] = taken.long() if name in wide else taken
    return SceneBatch(scene_ids=scene_ids, **parts)


def batch_from_table(table: pa.Table) -> SceneBatch:
    """Turn a pool table into flat tensors, without copying the float columns of a one-chunk table.

    Args:
        table: Rows of `SCENE_SCHEMA`.

    Returns:
        One scene for each row.

    Raises:
        PoolError: The table has another schema.
        InvalidSceneError: The flat columns of a row contradict one another.
    """
    check_schema(table.schema, "scene table")
    columns = {column for _, column in _FIELDS.values()} | {"lane_offsets", "polygon_offsets"}
    flat = {name: flat_column(table, name) for name in columns}
    parts: dict[str, Tensor] = _scalar_parts(table)
    counts: dict[str, np.ndarray] = {}
    for point_group, (group, name, point_name) in _POINT_GROUPS.items():
        counts[group], counts[point_group], offsets = _nested(flat[name], table, name)
        parts[point_name] = torch.from_numpy(offsets)
    for name, (group, column) in _FIELDS.items():
        values, lengths = flat[column]
        counts.setdefault(group, np.ones_like(lengths) if group == "scene" else lengths)
        _check_lengths(table, column, lengths, counts[group])
        parts[name] = values.to(torch.int64) if name in _WIDE_INTEGERS else values
    parts |= {name: torch.from_numpy(_ends(counts[group])) for group, name in _GROUP_OFFSETS.items()}
    return SceneBatch(scene_ids=tuple(table["scene_id"].to_pylist()), **parts)


def _scalar_parts(table: pa.Table) -> dict[str, Tensor]:
    def scalar(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(np.array(table[name].to_numpy(), dtype=dtype))

    sizes = ("ego_length_m", "ego_width_m", "ego_wheelbase_m", "ego_rear_axle_to_center_m")
    domain_N = pc.index_in(table["domain"], pa.array(DOMAINS)).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "domain_N": torch.from_numpy(np.array(domain_N, dtype=np.int8)),
        "command_N": scalar("driving_command", np.int64),
        "ego_size_N4": torch.stack([scalar(name, np.float32) for name in sizes], dim=1),
        "route_speed_limit_N": scalar("route_speed_limit_mps", np.float32),
    }


def flat_column(table: pa.Table, name: str) -> tuple[Tensor, np.ndarray]:
    """Return the values of a flat column, shaped by its stride, and the number of elements of each row (int64).

    Args:
        table: Rows of `SCENE_SCHEMA`.
        name: A column with a stride.

    Raises:
        InvalidSceneError: A row's length is no multiple of the stride.
    """
    chunks, (shape, width) = table[name], _INNER_SHAPES[name]
    array = chunks.chunk(0) if chunks.num_chunks == 1 else pa.concat_arrays(chunks.chunks)
    ends = array.offsets.to_numpy()
    lengths = np.subtract(ends[1:], ends[:-1], dtype=np.int64)
    if width > 1:
        rest = lengths % width
        if rest.any():
            raise InvalidSceneError(
                _where(table, int(rest.nonzero()[0][0]), name), f"length must be a multiple of {width}"
            )
        lengths //= width
    return _tensor(array.flatten()).reshape(-1, *shape), lengths


def _tensor(values: pa.Array) -> Tensor:
    # DLPack lends Arrow's buffer without a copy; booleans are bit-packed in Arrow and have to be unpacked.
    if len(values) and not pa.types.is_boolean(values.type):
        return torch.from_dlpack(values)
    if len(values) and not values.null_count:
        bits = np.frombuffer(values.buffers()[1], dtype=np.uint8)
        first, end = values.offset, values.offset + len(values)
        held = np.unpackbits(bits[first // 8 : (end + 7) // 8], bitorder="little")
        return torch.from_numpy(held[first % 8 :][: len(values)].view(bool))
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False)))


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _nested(
    flat: tuple[Tensor, np.ndarray], table: pa.Table, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return items per row, points per row and the batch-wide point offsets of a ``K+1`` column."""
    local, lengths = flat[0].numpy(), flat[1]
    if len(lengths) and int(lengths.min()) < 1:
        raise InvalidSceneError(_where(table, int(lengths.argmin()), name), "must hold at least one entry")
    ends = np.cumsum(lengths) - 1
    firsts = ends - lengths + 1
    steps = np.diff(local.astype(np.int64), append=0)
    steps[ends] = 0
    bad = [*np.flatnonzero(steps < 0).tolist(), *firsts[local[firsts] != 0].tolist()]
    if bad:
        row = int(np.searchsorted(ends, bad[0]))
        raise InvalidSceneError(_where(table, row, name), "must start at 0 and never fall")
    return lengths - 1, local[ends].astype(np.int64), _ends(np.delete(steps, ends))


def _check_lengths(table: pa.Table, column: str, lengths: np.ndarray, expected: np.ndarray) -> None:
    differs = np.flatnonzero(lengths != expected)
    if len(differs):
        row = int(differs[0])
        rule = f"must hold {int(expected[row])} elements like the other columns of its kind"
        raise InvalidSceneError(_where(table, row, column), rule, int(lengths[row]))


def _where(table: pa.Table, row: int, column: str) -> str:
    return f"scene {table['scene_id'][row].as_py()}: {column}"


assert inner_shape(SCENE_SCHEMA.field("agent_states"))[0] == NUM_FRAMES
