"""Frozen records that pass between the stages of the loop; large data goes by path, small data by value.

Shape legend: N scenes, K clusters, S training seeds, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

Side = Literal["real", "synthetic", "dev", "test"]
SIDES: tuple[Side, ...] = ("real", "synthetic", "dev", "test")
"""The four pools of a run."""


def number_or_none(value: float) -> float | None:
    """Return a number as JSON holds it: None for one that is missing (NaN) or not finite."""
    return float(value) if math.isfinite(value) else None


def number_or_nan(value: float | None) -> float:
    """Return a number that JSON held: NaN for None."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """Scene embeddings of every pool."""

    fingerprint: str
    """Identity of the encoder and of the pools it was applied to."""
    files: Mapping[str, Path]
    """Parquet file by side: scene_id, embedding (D float32)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clusters:
    """The coarse clusters that carry mixture weights."""

    fingerprint: str
    cluster_ids: tuple[str, ...]
    """Names of the K clusters: the key of every weight, count and score."""
    pool_sizes_K: np.ndarray
    """Synthetic scenes per cluster."""
    deliverable_K: np.ndarray
    """Those of them that retrieval can choose: without outliers and beyond no cap; near-duplicates aside."""
    real_counts_K: np.ndarray
    """Real training scenes per cluster."""
    dev_counts_K: np.ndarray
    """Dev scenes per cluster that have a score."""
    dev_weights_K: np.ndarray
    """Weight of each cluster in the objective; sums to 1."""
    descriptors_KD: np.ndarray
    """Mean whitened embedding of the training scenes of each cluster; 0 for a cluster without any."""
    files: Mapping[str, Path]
    """By name: ``labels_<side>`` (Parquet: scene_id, cluster (str), fine (int32)), ``embeddings_<side>`` as in
    `Embeddings`, the cluster ``model`` and the domain ``probe``."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selection:
    """The synthetic scenes of one training run, in a stable order."""

    fingerprint: str
    counts: Mapping[str, int]
    """Scenes delivered per cluster id; all zero for the real-only run."""
    file: Path
    """Parquet file: scene_id, cluster."""

    @property
    def num_scenes(self) -> int:
        """Return the number of synthetic scenes."""
        return sum(self.counts.values())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planners:
    """Planners trained on one selection, one for each training seed."""

    fingerprints: tuple[str, ...]
    """Identity of the training with each seed."""
    seeds: tuple[int, ...]
    directories: tuple[Path, ...]
    """One folder of weights for each seed."""

    @property
    def fingerprint(self) -> str:
        """Return the identity of all of them."""
        return "+".join(self.fingerprints)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """Closed-loop scores of planners on one side (non-reactive pseudo-simulation).

    All cluster arrays are NaN where a cluster has no scored scene: missing is not zero.
    """

    fingerprint: str
    side: str
    """dev or test."""
    seeds: tuple[int, ...]
    cluster_scores_K: np.ndarray
    """Weighted mean objective per cluster over scenes and seeds, in [0, 1]."""
    cluster_se_K: np.ndarray
    """Standard error of the above from scenes alone, clustered by log."""
    totals: Mapping[str, float]
    """Means over scenes and seeds: objective (weighted), epdms, pdms, miou (plain); NaN when missing."""
    total_se: Mapping[str, float]
    """Standard errors of the totals from scenes alone, clustered by log."""
    error_unit: Literal["log", "scene"]
    """What the errors count as independent: logs, or the scenes of a side that is one log (then they are too
    small)."""
    seed_totals: Mapping[str, tuple[float, ...]]
    """The totals of each training seed."""
    num_unscored: int
    """Scenes of the side that the objective cannot be computed for; they are in no mean of it."""
    file: Path
    """Parquet file: scene_id, seed, weight, every sub-score, epdms, pdms, miou."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Round:
    """One finished round: the mixture, what was trained on, and what it scored on dev."""

    index: int
    """0 for the real-only run."""
    weights: Mapping[str, float]
    """Proposed share per cluster id; empty for the real-only run."""
    selection: Selection
    scores: Scores
    planners: Planners | None = None
    """What the next round may begin with; None where a history was put together from elsewhere."""
    probed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What the mixture method reads beyond scores, by field of its feedback; empty for methods that read none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arm:
    """One arm of the final comparison."""

    name: str
    selection: Selection
    scores: Scores
    """Test scores."""
