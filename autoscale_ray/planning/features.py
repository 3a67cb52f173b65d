"""Planner features: everything a training run reads, computed once per scene and kept as flat arrays.

Inputs come from frames -1.5 ... 0 s and from the map at 0 s; targets from the ego's and the agents' recorded
future. A training run only indexes rows of these arrays, which stay in their files: neither writing nor reading
them holds a whole pool.

Shape legend: N scenes, F features, K slots, R route points, P plan frames (8), O occupancy channels, G grid
cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from autoscale_ray.config import PlannerConfig
from autoscale_ray.errors import ArtifactError
from autoscale_ray.files import begin_array
from autoscale_ray.planning.agent_tokens import agent_tokens
from autoscale_ray.planning.ego_tokens import ego_state_on_route, ego_tokens
from autoscale_ray.planning.frenet import make_routes, project_poses
from autoscale_ray.planning.map_tokens import lane_tokens
from autoscale_ray.planning.occupancy import occupancy_targets
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.pool import ScenePool
from autoscale_ray.scenes.schema import CURRENT_FRAME, NUM_PLAN_FRAMES

CHUNK_SCENES = 512
FEATURES_VERSION = 3


@dataclass(frozen=True, slots=True)
class PlannerFeatures:
    """Inputs and targets of N scenes as dense tensors; row k belongs to row k of the pool."""

    ego_NF: Tensor
    """float32 ego token."""
    agents_NKF: Tensor
    """float32 agent tokens; feature 0 is 1 in filled slots, empty slots are all 0."""
    lanes_NKF: Tensor
    """float32 lane tokens, likewise."""
    state_N4: Tensor
    """float32 ego now on its route: s, d in m, relative heading in rad, speed in m/s."""
    route_NR3: Tensor
    """float32 route points."""
    target_NP3: Tensor
    """float32 recorded ego poses at 0.5 ... 4 s on the route: s, d, relative heading."""
    target_valid_NP: Tensor
    """bool, frame recorded."""
    occupancy_NOGG: Tensor
    """uint8 occupancy targets."""

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.ego_NF)

    def take(self, rows: Tensor) -> PlannerFeatures:
        """Return copies of the given rows (int64), in that order."""
        return PlannerFeatures(*(getattr(self, field.name).index_select(0, rows) for field in fields(self)))

    def most_filled(self, rows: Tensor) -> tuple[int, int]:
        """Return the most agent slots and the most lane slots that one of the given rows fills."""
        return _most_filled(self.agents_NKF, rows), _most_filled(self.lanes_NKF, rows)


@dataclass(frozen=True, slots=True)
class JoinedFeatures:
    """The scenes of several features one after another, left where they are: only rows that are taken are read."""

    parts: tuple[PlannerFeatures, ...]

    def __len__(self) -> int:
        """Return the number of scenes."""
        return sum(map(len, self.parts))

    def take(self, rows: Tensor) -> PlannerFeatures:
        """Return copies of the given rows (int64), in that order."""
        assert len(rows) == 0 or (rows.min() >= 0 and rows.max() < len(self)), "row out of range"
        arrays = {field.name: getattr(self.parts[0], field.name) for field in fields(PlannerFeatures)}
        taken = PlannerFeatures(*(array.new_empty(len(rows), *array.shape[1:]) for array in arrays.values()))
        for part, places, part_rows in self._shares(rows):
            for where, chosen in zip(places.split(CHUNK_SCENES), part_rows.split(CHUNK_SCENES), strict=True):
                for name in arrays:
                    getattr(taken, name)[where] = getattr(part, name).index_select(0, chosen)
        return taken

    def most_filled(self, rows: Tensor) -> tuple[int, int]:
        """Return the most agent slots and the most lane slots that one of the given rows fills."""
        counts = [part.most_filled(part_rows) for part, _, part_rows in self._shares(rows)]
        return max(agents for agents, _ in counts), max(lanes for _, lanes in counts)

    def _shares(self, rows: Tensor) -> Iterator[tuple[PlannerFeatures, Tensor, Tensor]]:
        """Yield each part with the places in `rows` that ask for it, and with its own rows there."""
        start = 0
        for part in self.parts:
            places = ((rows >= start) & (rows < start + len(part))).nonzero()[:, 0]
            yield part, places, rows[places] - start
            start += len(part)


Features = PlannerFeatures | JoinedFeatures


def _most_filled(tokens_NKF: Tensor, rows: Tensor) -> int:
    most = 0
    for chunk in rows.split(CHUNK_SCENES):
        filled_N = tokens_NKF[..., 0].index_select(0, chunk).sum(1)
        most = max(most, int(filled_N.amax()) if len(chunk) else 0)
        if most == tokens_NKF.shape[1]:  # nearly always in the first chunk
            break
    return most


def features_of_batch(batch: SceneBatch, config: PlannerConfig) -> PlannerFeatures:
    """Compute inputs and targets of a batch of scenes.

    Args:
        batch: N scenes, each with a route centre line of at least two distinct points.
        config: Number of agent and lane slots.

    Returns:
        Features of the N scenes.
    """
    route_NR3 = make_routes(batch.centerline_C3, batch.centerline_offsets)
    state_N4 = ego_state_on_route(batch, route_NR3)
    future = slice(CURRENT_FRAME + 1, CURRENT_FRAME + 1 + NUM_PLAN_FRAMES)
    return PlannerFeatures(
        ego_NF=ego_tokens(batch, route_NR3, state_N4),
        agents_NKF=agent_tokens(batch, route_NR3, state_N4[:, [0, 1, 3]], config.num_agents),
        lanes_NKF=lane_tokens(batch, route_NR3, config.num_lanes),
        state_N4=state_N4,
        route_NR3=route_NR3,
        target_NP3=project_poses(route_NR3, batch.ego_states_NT7[:, future, :3]),
        target_valid_NP=batch.ego_valid_NT[:, future].contiguous(),
        occupancy_NOGG=occupancy_targets(batch),
    )


def features_of_pool(pool: ScenePool, config: PlannerConfig) -> PlannerFeatures:
    """Compute the features of a pool in memory, 512 scenes at a time; of a large one use `write_features`.

    Args:
        pool: Scenes.
        config: Number of agent and lane slots.
    """
    chunks = list(_chunks(pool, config))
    return PlannerFeatures(
        *(torch.cat([getattr(chunk, field.name) for chunk in chunks]) for field in fields(PlannerFeatures))
    )


def _chunks(pool: ScenePool, config: PlannerConfig) -> Iterator[PlannerFeatures]:
    for start in range(0, len(pool), CHUNK_SCENES):
        yield features_of_batch(pool.batch(np.arange(start, min(start + CHUNK_SCENES, len(pool)))), config)


def concatenate(parts: Sequence[PlannerFeatures]) -> JoinedFeatures:
    """Put the scenes of several features one after another, for example real before synthetic; nothing is copied."""
    return JoinedFeatures(tuple(parts))


def write_features(pool: ScenePool, path: Path | str, config: PlannerConfig) -> None:
    """Compute the features of a pool and write them as `save_features` does, 512 scenes at a time.

    Args:
        pool: Scenes.
        path: Folder, created if missing.
        config: Number of agent and lane slots.
    """
    _write(_chunks(pool, config), len(pool), Path(path))


def save_features(features: Features, path: Path | str) -> None:
    """Write features as one .npy file per array; the description is written last.

    Args:
        features: What to write.
        path: Folder, created if missing.
    """
    chunks = (features.take(rows) for rows in torch.arange(len(features)).split(CHUNK_SCENES))
    _write(chunks, len(features), Path(path))


def _write(chunks: Iterable[PlannerFeatures], num_scenes: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for chunk in chunks:
            for field in fields(chunk):
                array = np.ascontiguousarray(getattr(chunk, field.name).numpy())
                if field.name not in files:
                    files[field.name] = stack.enter_context((folder / f"{field.name}.npy").open("wb"))
                    begin_array(files[field.name], array, num_scenes)
                files[field.name].write(array.data)
    description = {"version": FEATURES_VERSION, "num_scenes": num_scenes}
    (folder / "features.json").write_text(json.dumps(description))


def load_features(path: Path | str) -> PlannerFeatures:
    """Map features written by `save_features` into memory; pages are read when rows are used.

    Args:
        path: Folder.

    Returns:
        Features backed by the files; they must not be written to.

    Raises:
        ArtifactError: No complete features of this version in the folder.
    """
    folder = Path(path)
    try:
        description = json.loads((folder / "features.json").read_text())
        # Mode "c" (copy on write) keeps torch from warning about read-only memory; nothing writes to it.
        arrays = [np.load(folder / f"{field.name}.npy", mmap_mode="c") for field in fields(PlannerFeatures)]
    except (OSError, ValueError) as error:
        raise ArtifactError(str(folder), "must hold planner features", str(error)) from error
    if description.get("version") != FEATURES_VERSION:
        raise ArtifactError(
            str(folder), f"planner features must have version {FEATURES_VERSION}", description
        )
    return PlannerFeatures(*(torch.from_numpy(array) for array in arrays))
