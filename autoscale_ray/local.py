"""Every stage in this process: the reference for tests and debugging, and enough for a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoscale_ray import tasks, tasks_scores
from autoscale_ray.artifacts import RunStore
from autoscale_ray.config import RunConfig
from autoscale_ray.evaluation.from_pool import PreparedPool
from autoscale_ray.inputs import Inputs
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.recorded import RecordedStages


class LocalWork:
    """Does the work of a run here, one piece after another; keeps loaded features and prepared pools.

    Args:
        config: The run.
        inputs: Its pools.
    """

    def __init__(self, config: RunConfig, inputs: Inputs) -> None:
        self._config, self._inputs = config, inputs
        self._prepared: dict[str, PreparedPool] = {}
        self._features: dict[str, Any] = {}

    def train_encoder(self, folder: Path) -> Mapping[str, Any]:
        """Train Graph-RAE on the real and synthetic pools."""
        return tasks.train_encoder(self._config, self._inputs, folder)

    def embed_pools(self, encoder: Path, mark: str, folder: Path) -> Mapping[str, Any]:
        """Embed the four pools."""
        return tasks.embed_pools(encoder, self._inputs, folder)

    def train_planner(
        self, features: Mapping[str, Path], selection: Path, seed: int, start: Path | None, folder: Path
    ) -> Mapping[str, Any]:
        """Train one planner on every real scene and a selection."""
        pools = self._inputs.pools
        rows = tasks.training_rows(len(pools["real"]), pools["synthetic"], selection)
        if "train" not in self._features:
            loaded = [self._spec.load_features(features[side]) for side in ("real", "synthetic")]
            self._features["train"] = self._spec.concatenate(loaded)
        return tasks.train_planner(self._spec, self._features["train"], rows, seed, start, folder)

    def score_planner(self, weights: Path, side: str, features: Path, references: Path) -> pa.Table:
        """Return the scores of every scene of a side, in pool order."""
        if side not in self._prepared:
            self._prepared[side] = tasks_scores.load_prepared(self._inputs.pools[side], references)
            self._features[side] = self._spec.load_features(features)
        return tasks_scores.score_planner(self._spec, weights, self._features[side], self._prepared[side])

    def close(self) -> None:
        """Do nothing: memory goes with the process."""

    @cached_property
    def _spec(self) -> PlannerSpec:
        return load_planner_spec(self._config.planner.factory, self._config.planner)


class LocalStages(RecordedStages):
    """The recorded stages with all work done in this process; see `RecordedStages` for what may be added."""

    def __init__(self, config: RunConfig, inputs: Inputs, store: RunStore, **more: Any) -> None:
        super().__init__(config, inputs, store, LocalWork(config, inputs), **more)
