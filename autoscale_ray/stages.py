"""What the loop asks of its surroundings: five stages and the publication of a finished round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

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

    def train(self, selection: Selection, seeds: tuple[int, ...]) -> Planners:
        """Train a planner for each seed on all real scenes and the selection, for the fixed number of steps."""
        ...

    def evaluate(self, planners: Planners, clusters: Clusters, side: str) -> Scores:
        """Score planners on the dev or test scenes."""
        ...

    def publish(self, clusters: Clusters, history: tuple[Round, ...]) -> None:
        """Make the newest round durable and visible; afterwards no reader ever misses it."""
        ...
