"""The work of a run on Ray: embedding to Ray Data, training to the Train run, scoring to the scorers.

Identities and records stay with `RecordedStages`, so a run may go on in one process or on a cluster.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoscale_ray import __version__, tasks
from autoscale_ray.artifacts import RunStore
from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig
from autoscale_ray.distributed.board import EncoderTask, Task, TaskBoard
from autoscale_ray.distributed.deadline import Deadline
from autoscale_ray.distributed.evaluate import ScorerPool, Side
from autoscale_ray.inputs import Inputs
from autoscale_ray.recorded import RecordedStages
from autoscale_ray.records import Clusters, Embeddings, Scores, Selection
from autoscale_ray.representation import ENCODER_VERSION
from autoscale_ray.run_folder import work_dir


class RayWork:
    """Hands the work of one run to a cluster.

    Args:
        config: The run.
        inputs: Its pools, on storage that every node sees.
        board: Where training tasks are posted for the Train run.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, board: TaskBoard) -> None:
        self._config, self._inputs, self._board = config, inputs, board
        run_dir, placement = work_dir(config).absolute(), config.placement.ray
        self._stacks = run_dir / "stacks"
        deadline = Deadline(placement.stall_timeout_s, self._stacks)
        self._scorers = ScorerPool(config.planner, placement, deadline)
        self._parts = run_dir / "parts"
        self.beside: Callable[[], None] = lambda: None
        """Called before a planner is trained, to start what can go on beside it."""

    def train_encoder(self, folder: Path) -> Mapping[str, Any]:
        """Train Graph-RAE on the real and synthetic pools."""
        settings, seed = self._config.representation, tasks.encoder_seed(self._config)
        self._build_caches()
        pools = [self._inputs.pools[side] for side in ("real", "synthetic")]
        scenes = [pool.manifest.content_hash for pool in pools]
        what = [ENCODER_VERSION, dataclasses.asdict(settings), seed, scenes]
        task = EncoderTask(fingerprint(what)[:16], settings, tuple(pool.path for pool in pools), seed)
        write_files(self._board.post(task), folder)
        return {}

    def embed_pools(self, encoder: Path, mark: str, folder: Path) -> Mapping[str, Any]:
        """Embed the four pools; parts of an attempt that was killed are used again."""
        # Imported here: Ray Data and torch_geometric take seconds that a run with embeddings does not need.
        from autoscale_ray.distributed.embed import embed_pools

        self._build_caches()
        pools, placement = dict(self._inputs.pools), self._config.placement
        parts = self._parts / mark[:16]
        return embed_pools(encoder, pools, parts, self._stacks, folder, placement.ray)

    def _build_caches(self) -> None:
        """Build the caches of the pools once, here, where no deadline ends a process that takes long."""
        for pool in self._inputs.pools.values():
            _ = pool.cached

    def train_planner(
        self, features: Mapping[str, Path], selection: Path, seed: int, start: Path | None, folder: Path
    ) -> Mapping[str, Any]:
        """Train one planner on every real scene and a selection."""
        self.beside()
        planner, pools = self._config.planner, self._inputs.pools
        rows = tasks.training_rows(len(pools["real"]), pools["synthetic"], selection)
        folders = tuple(str(features[side]) for side in ("real", "synthetic"))
        chosen = hashlib.sha256(rows.tobytes()).hexdigest()
        what = [__version__, dataclasses.asdict(planner), chosen, seed, folders, str(start)]
        begin = None if start is None else str(start)
        write_files(
            self._board.post(Task(fingerprint(what)[:16], planner, folders, rows, seed, begin)), folder
        )
        return {"num_scenes": len(rows)}

    def score_planner(self, weights: Path, side: str, features: Path, references: Path) -> pa.Table:
        """Return the scores of every scene of a side, in pool order."""
        return self._scorers.score(Side(self._inputs.pools[side].path, features, references), weights)

    def close(self) -> None:
        """End the scorers."""
        self._scorers.close()

    def drop_parts(self) -> None:
        """Remove the parts of embeddings that are whole."""
        shutil.rmtree(self._parts, ignore_errors=True)


class RayStages(RecordedStages):
    """The recorded stages with their work handed to a cluster; see `RecordedStages` for what may be added."""

    def __init__(
        self, config: RunConfig, inputs: Inputs, store: RunStore, board: TaskBoard, **more: Any
    ) -> None:
        work = RayWork(config, inputs, board)
        super().__init__(config, inputs, store, work, **more)
        work.beside, self._drop_parts = self._read_candidates, work.drop_parts
        self._reader: threading.Thread | None = None
        self._files: Mapping[str, Path] = {}

    def embed(self) -> Embeddings:
        """Train the encoder and embed all four pools; parts that an attempt has left go once all is published."""
        embeddings = super().embed()
        self._drop_parts()
        return embeddings

    def retrieve(
        self, clusters: Clusters, counts: Mapping[str, int], guide: Scores | None, *, how: str | None = None
    ) -> Selection:
        """Choose scenes; what is being read for it is waited for."""
        if self._reader is not None:
            self._reader.join()
        self._files = clusters.files
        return super().retrieve(clusters, counts, guide, how=how)

    def _read_candidates(self) -> None:
        """Read what retrieval needs of the synthetic pool while the first planner is trained."""
        if self._reader is None:
            what = (self.config.retrieval, self.inputs.pools["synthetic"], self._files)
            self._reader = threading.Thread(target=tasks.load_candidates, args=what, daemon=True)
            self._reader.start()


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by name into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
