"""The stages of a run, each recorded once under its identity; the heavy work in them is handed to a `Work`.

Shape legend: K clusters.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autoscale_ray import __version__, tasks, tasks_scores
from autoscale_ray.artifacts import Artifact, RunStore
from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig, derive_seed
from autoscale_ray.errors import ConfigError, PoolError
from autoscale_ray.evaluation.from_pool import SCORER_VERSION, check_scorable
from autoscale_ray.inputs import Inputs
from autoscale_ray.planning.features import FEATURES_VERSION
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.records import (
    SIDES,
    Clusters,
    Embeddings,
    Planners,
    Round,
    Scores,
    Selection,
    number_or_nan,
    number_or_none,
)
from autoscale_ray.representation import ENCODER_VERSION
from autoscale_ray.stages import Work


class RecordedStages:
    """The stages of one run, one after another.

    Identities and records are made here, the same whoever does the work, so a run may go on anywhere.

    Args:
        config: The run.
        inputs: Its pools.
        store: Where finished stages and rounds are kept.
        work: Does what is worth handing out.
        observe: Called with the history after every published round.
        watch: Makes the context in which a stage runs, from its name; a progress line for example.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        store: RunStore,
        work: Work,
        observe: Callable[[Clusters, tuple[Round, ...]], None] = lambda clusters, history: None,
        watch: Callable[[str], AbstractContextManager[Any]] = lambda stage: nullcontext(),
    ) -> None:
        self.config, self.inputs, self.store, self.work = config, inputs, store, work
        self.observe, self.watch = observe, watch
        self.seconds: dict[str, float] = defaultdict(float)
        """Wall seconds spent so far, by stage, those of earlier starts of the run included."""
        self._before_s = store.seconds_of_stages()
        self.is_searching = True
        """False once the rounds are over and the arms are compared."""
        self._pool_marks = inputs.identity()
        self._ready: dict[tuple[str, str], Path] = {}
        self._drives: dict[str, Artifact] = {}
        self._is_scorable = False

    def embed(self) -> Embeddings:
        """Train the encoder and embed all four pools."""
        section = tasks.stage_identity(self.config.representation)
        encoder = self._stage(
            "encoder",
            {
                "config": section,
                "seed": self.config.seed,
                "pools": self._marks("real", "synthetic"),
                "encoder_version": ENCODER_VERSION,
            },
            self.work.train_encoder,
        )
        identity = {"encoder": encoder.fingerprint, "pools": self._marks(*SIDES)}
        artifact = self._stage(
            "embed",
            identity,
            lambda folder: self.work.embed_pools(encoder.folder(), fingerprint(identity), folder),
        )
        return Embeddings(fingerprint=artifact.fingerprint, files=_by_side(artifact))

    def cluster(self, embeddings: Embeddings) -> Clusters:
        """Group real and synthetic scenes; assign dev and test scenes.

        Dev scenes that have no score have no weight and count for nothing: they are in no mean of the objective.
        """
        unscored = sorted(self._unscored("dev"))
        artifact = self._stage(
            "cluster",
            {
                "config": tasks.stage_identity(self.config.clusters),
                "embeddings": embeddings.fingerprint,
                "seed": self.config.seed,
                "weights": self._pool_marks["dev_weights"],
                "unscored": unscored,
            },
            lambda folder: tasks.cluster_scenes(self.config, embeddings.files, self.inputs, unscored, folder),
        )
        values: Mapping[str, Any] = artifact.values
        cluster_ids = tuple(values["cluster_ids"])
        labels = {f"labels_{side}": path for side, path in _by_side(artifact).items()}
        vectors = {f"embeddings_{side}": path for side, path in embeddings.files.items()}
        models = {"model": artifact.path(tasks.MODEL_FILE), "probe": artifact.path(tasks.PROBE_FILE)}
        files = {**labels, **vectors, **models}
        retrieval, synthetic = self.config.retrieval, self.inputs.pools["synthetic"]
        choosable = self._stage(
            "deliverable",
            {"config": tasks.stage_identity(retrieval), "clusters": artifact.fingerprint},
            lambda folder: tasks.deliverable_scenes(retrieval, synthetic, files, cluster_ids),
        )
        return Clusters(
            fingerprint=artifact.fingerprint,
            cluster_ids=cluster_ids,
            pool_sizes_K=np.array(values["pool_sizes"], dtype=np.int64),
            deliverable_K=np.array(choosable.values["sizes"], dtype=np.int64),
            real_counts_K=np.array(values["real_counts"], dtype=np.int64),
            dev_counts_K=np.array(values["dev_counts"], dtype=np.int64),
            dev_weights_K=np.array(values["dev_weights"]),
            descriptors_KD=np.array(values["descriptors"]),
            files=files,
        )

    def retrieve(
        self, clusters: Clusters, counts: Mapping[str, int], guide: Scores | None, *, how: str | None = None
    ) -> Selection:
        """Choose that many synthetic scenes in each cluster."""
        section = tasks.retrieval_rule(self.config.retrieval, how)
        wanted = {name: int(counts.get(name, 0)) for name in clusters.cluster_ids}
        guided = guide if section.method != "random" else None
        artifact = self._stage(
            "retrieve",
            {
                "config": tasks.stage_identity(section),
                "clusters": clusters.fingerprint,
                "counts": wanted,
                "guide": guided.fingerprint if guided else None,
                "seed": self.config.seed,
            },
            lambda folder: tasks.choose_scenes(
                section,
                derive_seed(self.config.seed, "retrieve"),
                wanted,
                self.inputs.pools["synthetic"],
                clusters.files,
                guided.file if guided else None,
                folder,
            ),
        )
        delivered: Mapping[str, int] = artifact.values["counts"]
        return Selection(
            fingerprint=artifact.fingerprint,
            counts={name: delivered[name] for name in clusters.cluster_ids},
            file=artifact.path(tasks.SELECTION_FILE),
        )

    def train(
        self, selection: Selection, seeds: tuple[int, ...], *, start: Planners | None = None
    ) -> Planners:
        """Train one planner for each seed at the fixed number of steps."""
        self._check_scorable()
        starts: list[tuple[str, Path] | None] = [None] * len(seeds)
        if start is not None:
            starts = list(zip(start.fingerprints, start.directories, strict=True))
        artifacts = [
            self._train_one(selection, seed, before) for seed, before in zip(seeds, starts, strict=True)
        ]
        return Planners(
            fingerprints=tuple(artifact.fingerprint for artifact in artifacts),
            seeds=seeds,
            directories=tuple(artifact.folder() for artifact in artifacts),
        )

    def evaluate(self, planners: Planners, clusters: Clusters, side: str) -> Scores:
        """Score planners on the dev or test scenes."""
        objective, pool = self.config.evaluation.objective, self.inputs.pools[side]
        artifact = self._stage(
            f"evaluate_{side}",
            {
                "planners": planners.fingerprint,
                "clusters": clusters.fingerprint,
                "objective": objective,
                "scorer_version": SCORER_VERSION,
                "pool": self._marks(side, f"{side}_weights"),
            },
            lambda folder: tasks_scores.gather_scores(
                [self._score_one(directory, side) for directory in planners.directories],
                planners.seeds,
                objective,
                pool,
                self.inputs.weights[side],
                clusters.files[f"labels_{side}"],
                clusters.cluster_ids,
                folder,
            ),
        )
        return scores_record(artifact, side, planners.seeds, len(self._unscored(side)))

    def probe(self, planners: Planners, clusters: Clusters) -> Mapping[str, np.ndarray]:
        """Measure how the planners' training gradients on each cluster agree with dev."""
        spec = load_planner_spec(self.config.planner.factory, self.config.planner)
        if spec.gradient is None:
            method, factory = self.config.ascent.method, self.config.planner.factory
            raise ConfigError(
                "ascent.method", f"{method} needs gradients, which {factory} does not offer", method
            )
        artifact = self._stage(
            "gradients",
            {
                "planners": planners.fingerprint,
                "clusters": clusters.fingerprint,
                "pools": self._marks("synthetic", "dev", "dev_weights"),
                "seed": self.config.seed,
            },
            lambda folder: tasks.probe_gradients(
                spec, planners.directories, self._probe_groups(spec, clusters), clusters.cluster_ids
            ),
        )
        return {name: np.array(value, dtype=np.float64) for name, value in artifact.values.items()}

    def _probe_groups(
        self, spec: PlannerSpec, clusters: Clusters
    ) -> dict[str | None, tuple[Any, np.ndarray]]:
        dev, weights_N = self.inputs.pools["dev"], self.inputs.weights["dev"]
        rows = tasks.gradient_rows(
            derive_seed(self.config.seed, "gradients"),
            clusters.files["labels_synthetic"],
            clusters.cluster_ids,
            np.where(np.isin(dev.scene_ids, list(self._unscored("dev"))), 0.0, weights_N),
        )
        features = {side: spec.load_features(self._features(side)) for side in ("synthetic", "dev")}
        return {
            name: (features["dev" if name is None else "synthetic"], chosen) for name, chosen in rows.items()
        }

    def published_weights(self, clusters: Clusters, index: int) -> dict[str, float] | None:
        """Return the cluster weights of a round that was published before, or None for a new round."""
        published = self.store.rounds()
        if index >= len(published):
            return None
        payload: Mapping[str, Any] = published[index].payload
        weights = payload["weights"]  # sorted by name there
        return {name: weights[name] for name in clusters.cluster_ids if name in weights}

    def publish(self, clusters: Clusters, history: tuple[Round, ...]) -> None:
        """Make the newest round durable and visible."""
        self.store.commit_round(history[-1].index, round_payload(history[-1]))
        self.observe(clusters, history)

    def _train_one(self, selection: Selection, seed: int, start: tuple[str, Path] | None) -> Artifact:
        identity = {
            **self._planner(),
            "selection": selection.fingerprint,
            "pools": self._marks("real", "synthetic"),
            "seed": seed,
            **({"start": start[0]} if start else {}),
        }
        return self._stage(
            "train",
            identity,
            lambda folder: self.work.train_planner(
                {side: self._features(side) for side in ("real", "synthetic")},
                selection.file,
                seed,
                start[1] if start else None,
                folder,
            ),
        )

    def _score_one(self, weights: Path, side: str) -> pa.Table:
        return self.work.score_planner(weights, side, self._features(side), self._references(side))

    def _features(self, side: str) -> Path:
        identity = {**self._planner(), "pool": self._marks(side)}
        planner, pool = self.config.planner, self.inputs.pools[side]

        def build(folder: Path) -> Mapping[str, Any]:
            return tasks.pool_features(planner, pool, folder)

        return self._once("features", side, lambda: self._stage("features", identity, build))

    def _planner(self) -> dict[str, Any]:
        return {"config": tasks.stage_identity(self.config.planner), "features_version": FEATURES_VERSION}

    def _references(self, side: str) -> Path:
        return self._once("reference_drives", side, lambda: self._reference_drives(side))

    def _reference_drives(self, side: str) -> Artifact:
        if side not in self._drives:
            pool = self.inputs.pools[side]
            identity = {"pool": self._marks(side), "scorer_version": SCORER_VERSION}
            self._drives[side] = self._stage(
                "reference_drives", identity, lambda folder: tasks_scores.reference_drives(pool, folder)
            )
        return self._drives[side]

    def _unscored(self, side: str) -> Mapping[str, str]:
        """Return why scenes of a side cannot be scored by the objective, by scene id."""
        values: Mapping[str, Any] = self._reference_drives(side).values
        return values["unscored"][self.config.evaluation.objective]

    def _check_scorable(self) -> None:
        """Refuse sides that have no scores before anything is trained for them."""
        if not self._is_scorable:
            for side in ("dev", "test"):
                check_scorable(self.inputs.pools[side], self.config.evaluation.objective)
            for side in ("dev", "test"):
                pool, weights_N = self.inputs.pools[side], self.inputs.weights[side]
                if set(pool.scene_ids[weights_N > 0].tolist()) <= self._unscored(side).keys():
                    can = f"{self.config.evaluation.objective} can score"
                    raise PoolError(str(pool.path), f"must hold a scene that has a weight and that {can}", 0)
            self._is_scorable = True

    def _once(self, name: str, side: str, stage: Callable[[], Artifact]) -> Path:
        """Return the folder of a stage that belongs to a pool; its files are checked once in a run."""
        if (name, side) not in self._ready:
            self._ready[name, side] = stage().folder()
        return self._ready[name, side]

    def _marks(self, *names: str) -> dict[str, str]:
        return {name: self._pool_marks[name] for name in names}

    def _stage(
        self, name: str, identity: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact:
        started = time.perf_counter()
        with self.watch(name.replace("_", " ")):
            artifact = self.store.stage(name, {"version": __version__, **identity}, build)
        took_s = self._before_s.pop(artifact.fingerprint, 0.0)  # where an earlier start has made it
        self.seconds[name] += max(time.perf_counter() - started, took_s)
        return artifact


def scores_record(artifact: Artifact, side: str, seeds: tuple[int, ...], num_unscored: int) -> Scores:
    """Return the record of a finished evaluation; missing values become NaN."""
    values: Mapping[str, Any] = artifact.values
    return Scores(
        fingerprint=artifact.fingerprint,
        side=side,
        seeds=seeds,
        cluster_scores_K=np.array(values["cluster_scores"], dtype=np.float64),
        cluster_se_K=np.array(values["cluster_se"], dtype=np.float64),
        totals={name: number_or_nan(value) for name, value in values["totals"].items()},
        error_unit=values["error_unit"],
        total_se={name: number_or_nan(value) for name, value in values["total_se"].items()},
        seed_totals={name: tuple(map(number_or_nan, row)) for name, row in values["seed_totals"].items()},
        num_unscored=num_unscored,
        file=artifact.path(tasks_scores.SCORES_FILE),
    )


def round_payload(finished: Round) -> dict[str, Any]:
    """Return what the manifest of a round says: the mixture, and the stages that hold its parts."""
    scores = finished.scores
    return {
        "weights": dict(finished.weights),
        "counts": dict(finished.selection.counts),
        "selection": finished.selection.fingerprint,
        "scores": scores.fingerprint,
        "seeds": list(scores.seeds),
        "totals": {name: number_or_none(value) for name, value in scores.totals.items()},
    }


def _by_side(artifact: Artifact) -> dict[str, Path]:
    return {side: artifact.path(tasks.table_file(side)) for side in SIDES}
