"""Every default of the package: one tree of frozen dataclasses.

A run is one `RunConfig`, read from YAML by `load_config` and changed on the command line with dotted overrides
(``autoscale run run.yaml loop.num_rounds=8``). Fields under `PlacementConfig` say where and on what a run happens; they
never change its result and stay out of its fingerprint. All other fields bear identity.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from autoscale_ray.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Scene pools of a run. The four sides must not share a log."""

    real: str = ""
    """Folder of the real training pool; always used in full."""
    synthetic: str = ""
    """Folder of the synthetic pool that the mixture draws from."""
    dev: str = ""
    """Folder of the scenes that choose mixtures."""
    test: str = ""
    """Folder of the scenes scored once, after the last round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """The built-in driving world."""

    preset: Literal["harm_low_deficit", "harm_high_deficit", "no_harm", "null"] = "harm_low_deficit"
    """Where the synthetic pool is faithful, gapped or harmful; see docs/world.md."""
    seed: int = 0
    """Seed of the training pools; dev and test use their own streams."""
    num_real: int = 700
    """Real training scenes, >= 1."""
    num_synthetic: int = 10_000
    """Synthetic pool scenes, >= 1."""
    num_dev_per_family: int = 100
    """Dev scenes of each family, >= 1."""
    num_test_per_family: int = 100
    """Test scenes of each family, >= 1."""
    test_seed: int = 1_000_003
    """Seed of the test scenes, apart from every other stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepresentationConfig:
    """Graph-RAE, the scene embedding."""

    hidden_size: int = 64
    """Width of the node states."""
    embedding_size: int = 64
    """Width D of the pooled embedding z."""
    num_layers: int = 2
    """Message passing layers, >= 1."""
    num_steps: int = 400
    """Optimiser steps of the autoencoder training, >= 0 (0 leaves the encoder untrained)."""
    batch_size: int = 128
    """Scenes a step."""
    learning_rate: float = 2e-3
    """Peak AdamW learning rate."""
    max_training_scenes: int = 20_000
    """Largest seeded sample of real and synthetic scenes used for training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Two-level spherical k-means."""

    method: Literal["embedding", "random"] = "embedding"
    """`random` gives clusters of equal size for the control experiment."""
    num_fine: int = 256
    """Fine clusters for retrieval and near-duplicates; reduced to a tenth of the scenes on small pools."""
    num_coarse: int = 16
    """Coarse clusters that carry mixture weights, K >= 1."""
    min_dev_scenes: int = 12
    """A coarse cluster with fewer dev scenes is merged into its nearest neighbour."""
    max_sample: int = 100_000
    """Largest seeded sample that centroids are fitted on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AscentConfig:
    """Cluster-GA: how mixtures are proposed and how the final one is chosen."""

    method: str = "response"
    """A key of `autoscale_ray.mixture.METHODS`, for example response or deficit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """How scenes are chosen inside a cluster once its count is known."""

    method: Literal["facility_location", "mmr", "random"] = "facility_location"
    """Selection rule inside a cluster."""
    random_share: float = 0.2
    """Share of each quota drawn at random for coverage, in [0, 1]."""
    duplicate_cosine: float = 0.97
    """Scenes above this cosine similarity to a chosen one are near-duplicates."""
    max_per_origin: int = 2
    """Chosen scenes that may share one origin_id, >= 1."""
    gap_weight: float = 0.1
    """Weight of the domain-gap penalty."""
    quality_weight: float = 0.0
    """Weight of the shipped expert quality; 0 leaves it out."""
    max_queries: int = 512
    """Largest number of dev queries a cluster keeps, highest weights first."""
    max_candidates: int = 100_000
    """Largest number of candidates of one cluster held in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """The built-in planner and its training."""

    factory: str = "autoscale_ray.planning.planner:planner_spec"
    """Dotted path `module:function` returning a PlannerSpec; bring your own planner here."""
    hidden_size: int = 64
    """Width of the scene tokens."""
    num_modes: int = 16
    """Anchored trajectory modes."""
    num_steps: int = 800
    """Optimiser steps of one training run, the same for every arm."""
    batch_size: int = 128
    """Scenes a step."""
    learning_rate: float = 3e-3
    """Peak AdamW learning rate."""
    ema_decay: float = 0.99
    """Decay of the weight average over the last 30 % of the steps."""
    lateral_weight: float = 3.0
    """Weight of lateral against longitudinal error in the imitation loss."""
    occupancy_weight: float = 0.2
    """Weight of the auxiliary BEV occupancy loss; 0 switches the head off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Closed-loop scoring of dev and test scenes (non-reactive pseudo-simulation)."""

    objective: Literal["epdms", "pdms"] = "epdms"
    """Which score drives the mixture."""
    weights: dict[str, float] = field(default_factory=dict)
    """Dev weight of a scene by tag; a scene takes the largest weight among its tags, 1 without a match."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The data loop."""

    num_rounds: int = 6
    """Mixture rounds after the real-only round 0, >= 0."""
    budget: int = 700
    """Synthetic scenes a round, >= 1; larger than the pool means the whole pool."""
    seeds_per_round: int = 1
    """Training seeds averaged in one evaluation, >= 1; every one is charged."""
    final_seeds: int = 2
    """Fresh training seeds of the final comparison, >= 1."""
    baselines: tuple[str, ...] = ("real_only", "vanilla", "union", "uniform")
    """Arms compared with AutoScale at the end, at equal optimiser steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Where a run happens; never changes its result."""

    run_dir: str = "runs/default"
    """Folder that receives everything the run writes."""
    num_threads: int = 1
    """Threads of one process for torch and faiss, >= 1."""
    num_processes: int = 1
    """Training runs that may go on side by side on this machine, >= 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run of the loop."""

    seed: int = 0
    """Root of every random stream of the run, >= 0."""
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    """Used only when a pool path under `data` is empty: the pools are then made by the built-in world."""
    representation: RepresentationConfig = RepresentationConfig()
    clusters: ClusterConfig = ClusterConfig()
    ascent: AscentConfig = AscentConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    planner: PlannerConfig = PlannerConfig()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loop: LoopConfig = LoopConfig()
    placement: PlacementConfig = PlacementConfig()
