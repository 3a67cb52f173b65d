"""What the loop asks of its surroundings (`Stages`), and what the stages hand out (`Work`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from autoscale_ray.records import Clusters, Embeddings, Planners, Round, Scores, Selection


class Stages(Protocol):
    """Where and how the stages run; what they compute is the same everywhere.

    A stage that was finished before returns its stored result, so a stopped run continues where it was.
    """

    def embed(self) -> Embeddings:
        """Train the encoder and embed all four pools."""
        ...

    def cluster(self, embeddings: Embeddings) -> Clusters:
        """Group real and synthetic scenes; assign dev and test scenes."""
        ...

    def retrieve(
        self, clusters: Clusters, counts: Mapping[str, int], guide: Scores | None, *, how: str | None = None
    ) -> Selection:
        """Choose that many synthetic scenes in each cluster.

        Args:
            clusters: The clusters.
            counts: Scenes wanted by cluster id; clusters left out count 0.
            guide: Dev scores that say where the planner is weak; None only when nothing is to be chosen.
            how: Selection rule inside a cluster in place of the configured one.
        """
        ...

    def train(
        self, selection: Selection, seeds: tuple[int, ...], *, start: Planners | None = None
    ) -> Planners:
        """Train a planner for each seed on all real scenes and the selection, for the fixed number of steps.

        Args:
            selection: Synthetic scenes.
            seeds: Training seeds.
            start: Planners whose weights the new ones begin with, one for each seed; None begins anew.
        """
        ...

    def evaluate(self, planners: Planners, clusters: Clusters, side: str) -> Scores:
        """Score planners on the dev or test scenes."""
        ...

    def probe(self, planners: Planners, clusters: Clusters) -> Mapping[str, np.ndarray]:
        """Measure how the planners' training gradients on each cluster agree with dev.

        Returns:
            Feedback arrays by name: ``gradient_alignment_K``, ``gradient_gram_KK``; NaN = unknown.
        """
        ...

    def published_weights(self, clusters: Clusters, index: int) -> dict[str, float] | None:
        """Return the cluster weights of a round that was published before, or None for a new round.

        What was published stands: another processor, or another release, may propose other last digits.
        """
        ...

    def publish(self, clusters: Clusters, history: tuple[Round, ...]) -> None:
        """Make the newest round durable and visible; afterwards no reader ever misses it."""
        ...


class Work(Protocol):
    """The four pieces of work worth handing out; each is a function of its arguments.

    Each writes into the folder it is given and returns small plain values.
    """

    def train_encoder(self, folder: Path) -> Mapping[str, Any]:
        """Train Graph-RAE on the real and synthetic pools."""
        ...

    def embed_pools(self, encoder: Path, mark: str, folder: Path) -> Mapping[str, Any]:
        """Embed the four pools; `mark` names this encoder on these pools."""
        ...

    def train_planner(
        self, features: Mapping[str, Path], selection: Path, seed: int, start: Path | None, folder: Path
    ) -> Mapping[str, Any]:
        """Train one planner on every real scene and a selection, from the weights in `start` if given."""
        ...

    def score_planner(self, weights: Path, side: str, features: Path, references: Path) -> pa.Table:
        """Return the scores of every scene of a side, in pool order, as `tasks_scores.score_planner` does."""
        ...

    def close(self) -> None:
        """Give back what the work holds."""
        ...
