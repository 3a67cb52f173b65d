"""Every default of the package: one tree of frozen dataclasses.

A run is one `RunConfig`, read from YAML by `config_file.load_config` and changed on the command line with dotted
overrides (``autoscale run run.yaml loop.num_rounds=8``). Fields under `PlacementConfig` say where and on what
a run happens; they never change its result and stay out of its fingerprint. `identity` says which others do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from autoscale_ray.errors import ConfigError


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("must be a whole number above 1")
    return gpus


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
PoolSize = Annotated[int, Field(ge=1, le=100_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Gpus = Annotated[NonNegative, AfterValidator(_whole_above_one)]
Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=4, le=16_384, multiple_of=4)]
Anchors = Annotated[tuple[Annotated[float, Field(ge=-100, le=100)], ...], Field(min_length=1)]
PresetName = Literal["harm_low_deficit", "harm_high_deficit", "no_harm", "even", "null"]
Preset = Annotated[
    PresetName,
    BeforeValidator(lambda value: "null" if value is None else value),  # YAML reads the bare word as nothing
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Scene pools of a run. Dev and test share no log with any other side; real and synthetic may."""

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

    preset: Preset = "harm_low_deficit"
    """Where the synthetic pool is faithful, gapped or harmful; see docs/world.md."""
    seed: CountOrZero = 0
    """Seed of real, synthetic and dev; test scenes have `test_seed`."""
    num_real: PoolSize | None = None
    """Real training scenes, 1 to 10^8; by default what the preset says: 700, and 30 for `null`."""
    num_synthetic: PoolSize = 10_000
    """Synthetic pool scenes, 1 to 10^8."""
    num_dev_per_family: PoolSize = 100
    """Dev scenes of each family, 1 to 10^8."""
    num_test_per_family: PoolSize = 100
    """Test scenes of each family, 1 to 10^8."""
    test_seed: CountOrZero = 1_000_003
    """Seed of the test scenes, apart from every other stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingLossConfig:
    """Weights of the terms of the Graph-RAE objective; 0 switches a term off. Formulae: docs/graph_rae.md."""

    decoder: NonNegative = 0.2
    """Reconstruction of rasters, drive and sector counts from z alone."""
    masked: NonNegative = 0.0
    """Reconstruction of masked agents and lanes."""
    relation: NonNegative = 0.0
    """Prediction of the edges of the graph."""
    contrastive: NonNegative = 0.0
    """Two views of a scene are alike, other scenes are not."""
    time_shift: NonNegative = 0.0
    """A scene and itself half a second later are alike, other scenes are not."""
    metric: NonNegative = 0.0
    """Ratios of embedding distances follow ratios of scenario distances, near and far alike."""
    neighbours: NonNegative = 1.0
    """The nearest scenes of a batch are those of the least scenario distance."""
    pairs: NonNegative = 0.0
    """A perturbed scene stays near its source, the less the more it differs."""
    variance: NonNegative = 0.0
    """Every dimension varies and no two are correlated (VICReg)."""
    norm: NonNegative = 0.0
    """Squared length of z."""
    laplacian: NonNegative = 0.0
    """Squared differences of z between similar scenes."""
    response: NonNegative = 0.0
    """Prediction of the sub-scores of a frozen planner, where they are given: a run has none and refuses it."""

    def __post_init__(self) -> None:
        if not any(dataclasses.astuple(self)):
            raise ConfigError("representation.loss", "must have a term above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioDistanceConfig:
    """Weight of each aspect in the scenario distance, which the terms neighbours (on by default), metric, pairs and
    laplacian follow; 0 leaves an aspect out.
    """

    heading: NonNegative = 0.5
    """Mean difference of the ego's headings, -1.5 to 4 s, beyond 0.05 rad."""
    speed: NonNegative = 0.5
    """Mean difference of its speeds."""
    speed_change: NonNegative = 0.5
    """Mean difference of what its speeds have changed by since t = 0, beyond 0.5 m/s."""
    agents: NonNegative = 1.0
    """Difference of soft histograms of the agents, by kind of motion, in route coordinates."""
    interaction: NonNegative = 1.0
    """How near the ego comes to others, gap and closing speed ahead."""
    lanes: NonNegative = 1.0
    """Weisfeiler-Lehman histogram of the lane graph."""
    controls: NonNegative = 0.5
    """Red lights and crosswalks ahead."""

    def __post_init__(self) -> None:
        if not any(dataclasses.astuple(self)):
            raise ConfigError("representation.distance", "must have a weight above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RepresentationConfig:
    """Graph-RAE, the scene embedding."""

    hidden_size: Width = 64
    """Width of the node states; a multiple of 4, the pooling heads."""
    embedding_size: Annotated[int, Field(ge=2, le=16_384)] = 64
    """Width D of the pooled embedding z, >= 2."""
    num_layers: Count = 2
    """Message passing layers, >= 1."""
    num_steps: CountOrZero = 400
    """Optimiser steps of the autoencoder training, >= 0 (0 leaves the encoder untrained)."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Scenes a step, >= 2: they are compared with one another."""
    learning_rate: Positive = 4e-3
    """Peak AdamW learning rate."""
    num_shards: Literal[1, 4] = 1
    """Logical shards of a training step: 4 let the trainers on Ray share the encoder's training, 1 leaves it to one
    of them. The last bits of the weights depend on this and not on the number of trainers."""
    max_training_scenes: Count = 20_000
    """Largest seeded sample of scenes used for training: all real ones, or half of it, and synthetic ones."""
    use_future: bool = True
    """Whether the logged future of ego and agents is encoder input, beside 1.5 s of history."""
    loss: EmbeddingLossConfig = EmbeddingLossConfig()
    distance: ScenarioDistanceConfig = ScenarioDistanceConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Two-level spherical k-means."""

    method: Literal["embedding", "random"] = "embedding"
    """`random` gives clusters of equal size for the control experiment."""
    num_fine: Count = 256
    """Fine clusters, which coarse ones are made of; reduced to a tenth of the scenes on small pools."""
    num_coarse: Count = 16
    """Coarse clusters that carry mixture weights, K >= 1."""
    min_dev_scenes: CountOrZero = 12
    """A coarse cluster with fewer dev scenes is merged into its nearest neighbour."""
    max_sample: Count = 100_000
    """Largest seeded sample that centroids are fitted on: all real scenes, or half of it, and synthetic ones."""
    dev_share: Share = 0.9
    """Say of the dev weights, beside the scene counts, in which fine clusters join to coarse ones, in [0, 1]: the
    mixture can only be fine where its clusters are, and should be where the objective has weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AscentConfig:
    """Cluster-GA: how mixtures are proposed and how the final one is chosen."""

    method: str = "response"
    """A key of `autoscale_ray.mixture.METHODS`: a rule of docs/baselines.md, or one of ours: response, fused,
    response_ascent, deficit, excess, progress, spsa, vector_spsa, alignment (docs/cluster_ga.md)."""
    seed: int = 0
    """Seed of the exploration design; the pair index enters beside it, so a replay draws the same signs."""
    perturbation: Annotated[float, Field(ge=0, le=10)] = 1.6
    """Log-weight step c of an exploration pair, e^+-c, in [0, 10]; above 3 half of the clusters starve."""
    perturbation_decay: NonNegative = 0.0
    """Exploration schedule: pair t steps by c / sqrt(1 + decay t), >= 0; 0 keeps the step (docs/cluster_ga.md)."""
    floor_explore: Share = 0.1
    """Uniform share f added to the centre of a pair, in [0, 1]: a cluster gets at least f / (1 + f) of budget / K."""
    floor_final: Share = 0.01
    """The same for the recommended mixture, in [0, 1]; 0 lets a cluster get nothing."""
    scene_sd: Positive = 0.146
    """SD of one dev scene's score within a run (score units), used where a run reports no error."""
    offset_sd: Positive = 0.004
    """Prior SD of a run's common score offset (training seed), score units."""
    offset_real_only_sd: Positive = 0.03
    """The same for the real-only run, whose steps all go to real scenes."""
    null_prior: Share = 0.007
    """Prior probability that all clusters share one curve, in [0, 1]; 0 switches the guard off."""
    exposure: Literal["count", "steps"] = "count"
    """`count`: a response depends on a cluster's scene count; `steps`: on how often its scenes are drawn in the fixed
    steps."""
    trust_radius: NonNegative = 0.08
    """Mirror ascent: largest KL divergence of one step, nats, >= 0; 0 stands still."""
    shrinkage: NonNegative = 1.0
    """Mirror ascent: a gradient below this many standard deviations is ignored, >= 0; 0 trusts every gradient."""
    prior_share: Share = 0.1
    """Mirror ascent: share of every step given to the size prior (square root of the pool), in [0, 1]."""
    gate_sd: NonNegative = 1.0
    """Mirror ascent: standard errors below a paired difference that its lower bound lies, >= 0."""
    gate_tolerance: NonNegative = 0.005
    """Mirror ascent: a step is taken back if that lower bound is under minus this, score units, >= 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """How scenes are chosen inside a cluster once its count is known."""

    method: Literal["facility_location", "mmr", "random"] = "facility_location"
    """Selection rule inside a cluster."""
    random_share: Share = 0.2
    """Share of each quota drawn at random for coverage, in [0, 1]."""
    duplicate_cosine: Share = 0.97
    """Scenes above this cosine similarity to a chosen one are near-duplicates."""
    max_per_origin: Count = 2
    """Chosen scenes of a cluster that may share one origin_id, >= 1."""
    similarity_weight: NonNegative = 0.0
    """Weight of a scene's mean similarity to the queries beside the coverage of them in `facility_location`."""
    gap_weight: NonNegative = 0.1
    """Weight of the domain-gap penalty, for one nat of log-odds above the real 95 % quantile."""
    quality_weight: NonNegative = 0.0
    """Weight of the shipped expert quality; 0 leaves it out."""
    max_dropped_share: Share = 0.25
    """Largest share of a cluster that may be dropped as unlike any real scene, in [0, 1]."""
    mmr_relevance: Share = 0.7
    """Relevance against novelty in the `mmr` method, in [0, 1]."""
    max_queries: Count = 512
    """Largest number of dev queries a cluster keeps, highest weights first."""
    max_candidates: Count = 100_000
    """A cluster with more scenes is first cut to a shortlist of about this many, or of twice the wanted count where
    that is more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """The built-in planner and its training."""

    factory: str = "autoscale_ray.planning.spec:planner_spec"
    """Dotted path `module:function` returning a PlannerSpec; bring your own planner here."""
    hidden_size: Width = 64
    """Width of the scene tokens; a multiple of 4, the attention heads."""
    num_agents: Count = 12
    """Agents the planner sees in a scene, the most relevant ones."""
    num_lanes: Count = 8
    """Lanes the planner sees in a scene, the nearest ones."""
    anchor_accelerations_mps2: Anchors = (-6.0, -3.0, -1.5, -0.5, 0.3, 1.5)
    """Accelerations of the anchor trajectories; every acceleration and offset together is one mode."""
    anchor_offsets_m: Anchors = (-2.0, 0.0, 2.0)
    """Final offsets of the anchor trajectories from the route centre line, positive to the left."""
    num_steps: CountOrZero = 800
    """Optimiser steps of one training run, the same for every arm."""
    batch_size: Annotated[int, Field(ge=4, multiple_of=4)] = 128
    """Scenes a step; a multiple of 4, the logical shards."""
    learning_rate: Positive = 3e-3
    """Peak AdamW learning rate."""
    weight_decay: NonNegative = 0.01
    """AdamW weight decay."""
    ema_decay: Share = 0.99
    """Decay of the weight average over the last 30 % of the steps."""
    lateral_weight: Positive = 3.0
    """Weight of lateral against longitudinal error in the imitation loss."""
    occupancy_weight: NonNegative = 0.2
    """Weight of the auxiliary BEV occupancy loss; 0 switches the head off."""
    deterministic: bool = True
    """Whether trainers on Ray share every step as 4 logical shards, to the bits of one process; false trains with
    plain DDP, whose last bits depend on the number of trainers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Closed-loop scoring of dev and test scenes (non-reactive pseudo-simulation)."""

    objective: Literal["epdms", "pdms"] = "epdms"
    """Which score drives the mixture."""
    use_weights: bool = True
    """Weight dev and test scenes by the pool's `weights.parquet` where there is one, else by 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The data loop."""

    num_rounds: CountOrZero = 6
    """Mixture rounds after the real-only round 0, >= 0."""
    stop_early: bool = False
    """Whether the search ends before `num_rounds` when the gain it still expects is below the error of a run; for the
    methods `response` and `fused`."""
    budget: Count = 700
    """Synthetic scenes a round, >= 1; larger than the pool means the whole pool."""
    warm_start: bool = False
    """Whether a round's planners begin with the weights of the round before; the final comparison never does."""
    seeds_per_round: Count = 1
    """Training seeds averaged in one evaluation, >= 1; every one is charged."""
    final_seeds: Count = 2
    """Fresh training seeds of the final comparison, >= 1."""
    baselines: tuple[Literal["real_only", "vanilla", "union", "uniform"], ...] = (
        "real_only",
        "vanilla",
        "union",
        "uniform",
    )
    """Arms compared with AutoScale at the end, at equal optimiser steps; each at most once. `real_only` has no
    synthetic scenes, `vanilla` the budget in proportion to the clusters' pool sizes, `union` the whole pool, `uniform`
    equally many scenes of every cluster. These draw at random inside a cluster, AutoScale chooses by guided
    retrieval."""

    def __post_init__(self) -> None:
        if len(set(self.baselines)) < len(self.baselines):
            raise ConfigError("loop.baselines", "must name an arm at most once", self.baselines)


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """How many Ray workers do what; each holds one CPU."""

    num_trainers: Annotated[int, Field(ge=1, le=4)] = 1
    """Workers that share every training step, 1 to 4: they share its 4 logical shards."""
    min_trainers: Annotated[int, Field(ge=0, le=4)] = 0
    """Fewest trainers to go on with while the cluster has no room for more, 0 to 4; 0 waits for `num_trainers`."""
    num_embedders: Count = 1
    """Actors that embed pools, >= 1."""
    num_scorers: Count = 1
    """Actors that score dev and test scenes, kept alive between rounds, >= 1."""
    gpus_per_worker: Gpus = 0.0
    """GPUs that each trainer and embedder reserves and computes on; 0 runs on CPU."""
    gpus_per_scorer: Gpus = 0.0
    """GPUs that each scorer reserves, for planners of one's own that plan on them; the built-in one does not."""
    checkpoint_steps: Count = 200
    """Training steps between two checkpoints, >= 1: what a killed worker loses at most."""
    stall_timeout_s: Count = 300
    """How long a training step or a scoring may take before its process is ended and started again, >= 1."""
    start_timeout_s: Count = 30
    """How long workers may take to get their CPUs and GPUs before the run stops with a clear line, >= 1."""

    def __post_init__(self) -> None:
        if self.min_trainers > self.num_trainers:
            rule = f"must be at most num_trainers, {self.num_trainers}"
            raise ConfigError("placement.ray.min_trainers", rule, self.min_trainers)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Where a run happens; never changes its result."""

    run_dir: str = "runs/default"
    """Folder that receives everything the run writes."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Torch threads of the driver or local process, 1 to 1024; training and scoring always use one."""
    ray: RayConfig = RayConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run of the loop."""

    seed: CountOrZero = 0
    """Root of every random stream of the run, >= 0."""
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    """Used only where `data` names no pool: the built-in world then makes all four."""
    representation: RepresentationConfig = RepresentationConfig()
    clusters: ClusterConfig = ClusterConfig()
    ascent: AscentConfig = AscentConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    planner: PlannerConfig = PlannerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loop: LoopConfig = LoopConfig()
    placement: PlacementConfig = PlacementConfig()


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what bears on the rounds of a run: the tree without what may change when it is continued.

    Left out are `PlacementConfig`, pool paths (pools enter by content hash), and how far to go: the number of
    rounds, the early stop and the final comparison.
    """
    tree = dataclasses.asdict(config)
    del tree["placement"], tree["data"]
    for name in ("num_rounds", "stop_early", "final_seeds", "baselines"):
        del tree["loop"][name]
    return tree


def derive_seed(root: int, *stream: str) -> int:
    """Return the seed in [0, 2**31) of a named random stream of a run, independent of every other stream."""
    text = "/".join((str(root), *stream)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1
