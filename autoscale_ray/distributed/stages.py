"""The stages on Ray: the same stages and identities as in one process, with four pieces of work handed out.

What `LocalStages` computes itself for embedding, training and scoring goes to Ray Data, to the Train run and to the
scorers here; identities, records and everything else are inherited, so a run may go on in either place.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autoscale_ray import tasks
from autoscale_ray.artifacts import Artifact, RunStore, fingerprint
from autoscale_ray.config import RunConfig
from autoscale_ray.distributed.board import Task, TaskBoard
from autoscale_ray.distributed.embed import embed_pools
from autoscale_ray.distributed.evaluate import ScorerPool
from autoscale_ray.inputs import Inputs
from autoscale_ray.local import LocalStages
from autoscale_ray.planning.spec import PlannerSpec
from autoscale_ray.records import Clusters, Round


class RayStages(LocalStages):
    """The stages of one run on a Ray cluster.

    Args:
        config: The run.
        inputs: Its pools, on storage that every node sees.
        store: Where finished stages and rounds are kept, on storage that every node sees.
        board: Where training tasks are posted for the Train run.
        observe: Called with the history after every published round.
        watch: Makes the context in which a stage runs, from its name.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        store: RunStore,
        board: TaskBoard,
        observe: Callable[[Clusters, tuple[Round, ...]], None] = lambda clusters, history: None,
        watch: Callable[[str], AbstractContextManager[Any]] = lambda stage: nullcontext(),
    ) -> None:
        super().__init__(config, inputs, store, observe, watch)
        self._board = board
        self._encoder: Path | None = None
        self._scorers: dict[str, ScorerPool] = {}

    def close(self) -> None:
        """End the scorers."""
        for scorers in self._scorers.values():
            scorers.close()
        self._scorers.clear()

    def _stage(
        self, name: str, identity: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact:
        if name != "embed":
            artifact = super()._stage(name, identity, build)
        else:
            parts = Path(self.config.placement.run_dir).absolute() / "parts" / fingerprint(identity)[:16]
            artifact = super()._stage(name, identity, lambda folder: self._embed(parts, folder))
            shutil.rmtree(parts, ignore_errors=True)
        if name == "encoder":
            self._encoder = artifact.folder()
        return artifact

    def _embed(self, parts: Path, folder: Path) -> dict[str, Any]:
        assert self._encoder is not None, "embedding follows the encoder"
        pools = dict(self.inputs.pools)
        return embed_pools(self._encoder, pools, parts, folder, self.config.placement.ray)

    @cached_property
    def _spec(self) -> PlannerSpec:
        """Return the planner with training handed out; features stay folders and weights stay files."""
        return dataclasses.replace(
            super()._spec,
            load_features=lambda folder: (str(folder),),
            concatenate=lambda folders: sum(folders, ()),
            train=self._train_remotely,
            save_weights=write_files,
        )

    def _train_remotely(self, features: tuple[str, ...], rows: np.ndarray, seed: int) -> Mapping[str, bytes]:
        planner = self.config.planner
        what = [dataclasses.asdict(planner), rows.tolist(), seed, self._marks("real", "synthetic")]
        return self._board.post(Task(fingerprint(what)[:16], planner, features, rows, seed))

    def _score_one(self, directory: Path, side: str) -> Any:
        if side not in self._scorers:
            pool = self.inputs.pools[side]
            drives = self._stage(
                "reference_drives",
                {"pool": self._marks(side)},
                lambda folder: tasks.reference_drives(pool, folder),
            )
            (features,) = self._features(side)
            num_scorers = self.config.placement.ray.num_scorers
            self._scorers[side] = ScorerPool(
                self.config.planner, pool, drives.folder(), Path(features), num_scorers
            )
        return self._scorers[side].score(directory)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by name into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
