"""What each stage computes, as plain functions from pools and files to files; the same wherever they run.

Every function writes into a folder that it is given and returns small plain values (None = missing).

Shape legend: N scenes, K clusters, D embedding, S training seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from autoscale_ray.config import ClusterConfig, PlannerConfig, RetrievalConfig, RunConfig, derive_seed
from autoscale_ray.evaluation.feedback import cluster_weights
from autoscale_ray.inputs import Inputs
from autoscale_ray.mixture.alignment import measure_alignment
from autoscale_ray.mixture.clusters import ClusterModel, cluster_names, fit_clusters, random_labels
from autoscale_ray.mixture.retrieval import (
    Candidates,
    Queries,
    Search,
    deliverable,
    make_candidates,
    query_weights,
)
from autoscale_ray.mixture.similarity import DomainProbe, fit_domain_probe
from autoscale_ray.planning.planner import empty_planner, parameter_shapes
from autoscale_ray.planning.spec import PlannerSpec, load_planner_spec
from autoscale_ray.planning.training import PlannerWeights, TrainState, new_state, one_thread
from autoscale_ray.records import SIDES, number_or_none
from autoscale_ray.scenes.parquet import read_groups, read_parquet, write_table
from autoscale_ray.scenes.pool import ScenePool
from autoscale_ray.scenes.sample import sampled_rows
from autoscale_ray.tasks_scores import objective_by_seed

MODEL_FILE = "clusters.safetensors"
PROBE_FILE = "domain_probe.json"
SELECTION_FILE = "selection.parquet"
PROBE_SCENES, PROBE_DEV_SCENES = 128, 512
"""Scenes behind the mean gradient of a cluster, and of dev."""


def table_file(side: str) -> str:
    """Return the name of the file of a stage that belongs to one side."""
    return f"{side}.parquet"


def train_encoder(config: RunConfig, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Train Graph-RAE on the real and synthetic pools; dev and test are never seen."""
    # Here and below: importing torch_geometric takes seconds, and most processes never need it.
    from autoscale_ray.representation import sharded, training
    from autoscale_ray.representation.model import save

    pools, settings = [inputs.pools["real"], inputs.pools["synthetic"]], config.representation
    seed = encoder_seed(config)
    with one_thread():  # as every trainer on Ray
        if settings.num_shards == 1:
            model = training.train(pools, settings, seed)
        else:
            model = sharded.fit_shared(training.pools_training_set(pools, settings, seed), settings, seed)
    save(model, folder)
    return {}


def encoder_seed(config: RunConfig) -> int:
    """Return the seed of the encoder's training."""
    return derive_seed(config.seed, "encoder")


def embed_pools(encoder: Path, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Embed every scene of the four pools with a trained encoder."""
    from autoscale_ray.representation.model import embed, load

    model = load(encoder)
    for side in SIDES:
        pool = inputs.pools[side]
        write_embeddings(pool.scene_ids, embed(model, pool), folder / table_file(side))
    return {}


def write_embeddings(scene_ids: np.ndarray, embeddings_ND: np.ndarray, path: Path) -> None:
    """Write ids and embeddings as Parquet."""
    size = embeddings_ND.shape[1]
    flat = pa.array(np.ascontiguousarray(embeddings_ND, dtype=np.float32).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, size)
    write_table(pa.table({"scene_id": pa.array(scene_ids.tolist()), "embedding": column}), path)


def read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return scene ids (N,) and embeddings (N, D) of a file of `write_embeddings`."""
    ids, parts = [], []
    for table in read_groups(path):
        ids.append(_strings(table["scene_id"]))
        parts.append(table["embedding"].combine_chunks().values.to_numpy().reshape(len(table), -1))
    return np.concatenate(ids), np.concatenate(parts)


def cluster_scenes(
    config: RunConfig,
    embeddings: Mapping[str, Path],
    inputs: Inputs,
    unscored: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Fit the clusters on real and synthetic scenes and label all four pools.

    Args:
        config: Cluster settings and seed.
        embeddings: Embedding file by side.
        inputs: Pools and dev weights.
        unscored: Dev scenes without a score: they have a cluster, and neither weight nor count there. Where no scene
            with a weight has a score all count, so that one can look at clusters; nothing is trained then.
        folder: Receives the cluster model, the domain probe and one label file a side (scene_id, cluster, fine).

    Returns:
        Cluster ids, sizes and dev weights, in cluster order.
    """
    by_side = {side: read_embeddings(embeddings[side]) for side in SIDES}
    seed = derive_seed(config.seed, "clusters")
    train_ND = np.concatenate([by_side["real"][1], by_side["synthetic"][1]])
    dev_ids, dev_ND = by_side["dev"]
    is_scored_M = ~np.isin(dev_ids, unscored)
    weights_M = np.where(is_scored_M, inputs.weights["dev"], 0.0)
    if not weights_M.any():
        is_scored_M, weights_M = np.ones_like(is_scored_M), inputs.weights["dev"]
    num_real, weighed = len(by_side["real"][1]), weights_M[is_scored_M]
    model = fit_clusters(train_ND, dev_ND[is_scored_M], config.clusters, seed, weighed, num_real)
    model.save(folder / MODEL_FILE)
    probed = []
    for side in ("real", "synthetic"):
        rows_ND = by_side[side][1]
        (chosen,) = sampled_rows([len(rows_ND)], config.clusters.max_sample, seed)
        probed.append(model.whitening.apply(rows_ND[chosen]))
    _save_probe(probed[0], probed[1], folder / PROBE_FILE)
    names, labels = _labels(config.clusters, model, {side: z for side, (_, z) in by_side.items()}, seed)
    for side, (scene_ids, _) in by_side.items():
        _write_labels(scene_ids, names, labels[side], folder / table_file(side))
    sizes = {
        side: np.bincount(labels[side][1], minlength=len(names)).tolist() for side in ("real", "synthetic")
    }
    train_N = np.concatenate([labels["real"][1], labels["synthetic"][1]])
    descriptors_KD = _means(model.whitening.apply(train_ND), train_N, len(names))
    shares_K = cluster_weights(weights_M, labels["dev"][1], len(names))
    dev_counts_K = np.bincount(labels["dev"][1][is_scored_M], minlength=len(names))
    return {
        "cluster_ids": list(names),
        "pool_sizes": sizes["synthetic"],
        "real_counts": sizes["real"],
        "dev_counts": dev_counts_K.tolist(),
        "dev_weights": shares_K.tolist(),
        "descriptors": descriptors_KD.tolist(),
    }


def _write_labels(
    scene_ids: np.ndarray, names: Sequence[str], labels: tuple[np.ndarray, np.ndarray], path: Path
) -> None:
    fine_N, coarse_N = labels
    columns = {"scene_id": scene_ids.tolist(), "cluster": np.array(names)[coarse_N].tolist()}
    write_table(pa.table({**columns, "fine": pa.array(fine_N.astype(np.int32))}), path)


def _means(rows_ND: np.ndarray, clusters_N: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return the mean row (K, D) of every cluster, 0 for an empty one; `bincount` is six times faster than `add.at`."""
    sums_DK = [np.bincount(clusters_N, weights=row_N, minlength=num_clusters) for row_N in rows_ND.T]
    sizes_K = np.bincount(clusters_N, minlength=num_clusters)
    return np.stack(sums_DK, axis=1) / np.maximum(sizes_K, 1)[:, None]


def _save_probe(real_ND: np.ndarray, synthetic_ND: np.ndarray, path: Path) -> None:
    """Fit the domain probe, once for all rounds; null where a domain has fewer than two scenes."""
    told = None
    if min(len(real_ND), len(synthetic_ND)) > 1:
        probe = fit_domain_probe(real_ND, synthetic_ND)
        told = dataclasses.asdict(probe) | {"weights_D": probe.weights_D.tolist()}
    path.write_text(json.dumps(told), encoding="utf-8")


def _load_probe(path: Path) -> DomainProbe | None:
    told = json.loads(path.read_text(encoding="utf-8"))
    return None if told is None else DomainProbe(**told | {"weights_D": np.array(told["weights_D"])})


def _labels(
    config: ClusterConfig, model: ClusterModel, embeddings: Mapping[str, np.ndarray], seed: int
) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, np.ndarray]]]:
    labels = {side: model.assign(z_ND) for side, z_ND in embeddings.items()}
    if config.method == "embedding":
        return model.coarse_ids, labels
    even_K = np.ones(config.num_coarse)
    dealt = {
        side: (fine_N, random_labels(len(fine_N), even_K, derive_seed(seed, "deal", side)))
        for side, (fine_N, _) in labels.items()
    }
    return cluster_names(config.num_coarse), dealt


def deliverable_scenes(
    config: RetrievalConfig, synthetic: ScenePool, files: Mapping[str, Path], cluster_ids: Sequence[str]
) -> dict[str, Any]:
    """Count the scenes of every cluster that `choose_scenes` can choose, near-duplicates aside."""
    candidates, clusters_N = load_candidates(config, synthetic, files)
    counts = deliverable(candidates, clusters_N, cluster_ids, config)
    return {"sizes": [counts[name] for name in cluster_ids]}


def choose_scenes(
    config: RetrievalConfig,
    seed: int,
    counts: Mapping[str, int],
    synthetic: ScenePool,
    files: Mapping[str, Path],
    guide: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """Choose scenes in every cluster and write them in a stable order.

    What a cluster cannot deliver (duplicates, caps) goes to the clusters that can, in proportion to their
    counts.

    Args:
        config: Retrieval settings.
        seed: Seed of the random share.
        counts: Scenes wanted by cluster id, every cluster named.
        synthetic: The pool.
        files: Label files (``labels_<side>``), embedding files (``embeddings_<side>``), cluster ``model``, domain
            ``probe``.
        guide: Score file of a dev evaluation; None when the rule needs no queries.
        folder: Receives the selection (scene_id, cluster).

    Returns:
        Scenes delivered by cluster id.
    """
    chosen: Mapping[str, tuple[str, ...]] = dict.fromkeys(counts, ())
    if sum(counts.values()) > 0:
        candidates, clusters_N = load_candidates(config, synthetic, files)
        queries = {} if guide is None else _queries(files, guide)
        chosen = Search(candidates, clusters_N, queries, counts, config, seed).deliver(counts)
    rows = [(scene, name) for name in sorted(chosen) for scene in chosen[name]]
    scenes, names = zip(*rows, strict=True) if rows else ((), ())
    table = pa.table({"scene_id": pa.array(scenes, pa.string()), "cluster": pa.array(names, pa.string())})
    write_table(table, folder / SELECTION_FILE)
    return {"counts": {name: len(ids) for name, ids in chosen.items()}}


def load_candidates(
    config: RetrievalConfig, synthetic: ScenePool, files: Mapping[str, Path]
) -> tuple[Candidates, np.ndarray]:
    """Return the scenes `choose_scenes` has to choose from and the cluster of each; read once for all rounds."""
    is_guided = config.method != "random" and (config.gap_weight > 0 or config.max_dropped_share > 0)
    return _kept_candidates(
        synthetic,
        files["embeddings_synthetic"],
        files["labels_synthetic"],
        files["model"],
        files["probe"] if is_guided else None,
        with_quality=config.quality_weight > 0,
    )


@lru_cache(maxsize=1)  # the files never change; reading them anew is half of what lies between two rounds
def _kept_candidates(
    synthetic: ScenePool,
    embeddings: Path,
    labels: Path,
    model: Path,
    probe: Path | None,
    *,
    with_quality: bool,
) -> tuple[Candidates, np.ndarray]:
    scene_ids, z_ND = read_embeddings(embeddings)
    candidates = make_candidates(
        scene_ids,
        ClusterModel.load(model).whitening.apply(z_ND),
        origin_ids=synthetic.origin_ids,
        probe=None if probe is None else _load_probe(probe),
        quality_N=synthetic.column("expert_quality").astype(np.float64) if with_quality else None,
    )
    return candidates, _strings(read_parquet(labels)["cluster"])


def _queries(files: Mapping[str, Path], guide: Path) -> dict[str, Queries]:
    whitening = ClusterModel.load(files["model"]).whitening
    _, z_ED = read_embeddings(files["embeddings_dev"])
    unit_ED = whitening.apply(z_ED)
    clusters_E = _strings(read_parquet(files["labels_dev"])["cluster"])
    scores_SE, weights_E = objective_by_seed(read_parquet(guide))
    wanted_E = query_weights(scores_SE.mean(axis=0)) * weights_E
    return {
        name: Queries(embeddings_ED=unit_ED[clusters_E == name], weights_E=wanted_E[clusters_E == name])
        for name in np.unique(clusters_E).tolist()
    }


def retrieval_rule(config: RetrievalConfig, how: str | None) -> RetrievalConfig:
    """Return the retrieval settings with another selection rule in place, where one is given."""
    return config if how is None else dataclasses.replace(config, method=how)  # type: ignore[arg-type]


def pool_features(planner: PlannerConfig, pool: ScenePool, folder: Path) -> dict[str, Any]:
    """Compute the planner's inputs and targets for a whole pool."""
    spec = load_planner_spec(planner.factory, planner)
    if spec.write_features is not None:
        spec.write_features(pool, folder)
    else:
        spec.save_features(spec.features(pool), folder)
    return {}


def training_rows(num_real: int, synthetic: ScenePool, selection: Path) -> np.ndarray:
    """Return the rows to train on: every real row, then those of the selection among the synthetic, int64."""
    chosen = synthetic.rows_of(_strings(read_parquet(selection)["scene_id"]).tolist())
    return np.concatenate([np.arange(num_real), num_real + np.sort(chosen)])


def train_planner(
    spec: PlannerSpec, features: Any, rows: np.ndarray, seed: int, start: Path | None, folder: Path
) -> dict[str, Any]:
    """Train one planner.

    Args:
        spec: The planner.
        features: Real rows first, then the synthetic pool's.
        rows: Rows to train on.
        seed: Training seed.
        start: Folder of weights to begin with; None begins anew.
        folder: Receives the weights.
    """
    more = {} if start is None else {"start": warm_state(spec.load_weights(start))}
    spec.save_weights(spec.train(features, rows, seed, **more), folder)
    return {"num_scenes": len(rows)}


def warm_state(weights: PlannerWeights) -> TrainState:
    """Return a state before its first step that begins with the averaged weights of a trained planner."""
    fresh = new_state(weights.config, 0)
    names = parameter_shapes(empty_planner(weights.config, 1))
    flat_W = torch.cat([weights.average[name].flatten() for name in names])
    return dataclasses.replace(fresh, weights_W=flat_W)


def probe_gradients(
    spec: PlannerSpec,
    directories: Sequence[Path],
    groups: Mapping[str | None, tuple[Any, np.ndarray]],
    cluster_ids: Sequence[str],
) -> dict[str, Any]:
    """Measure the gradient alignment of every cluster, a mean over training seeds.

    Args:
        spec: A planner with a `gradient`.
        directories: Weights of each training seed.
        groups: Features and rows by cluster id (rows of synthetic scenes) and for None (rows of dev scenes).
        cluster_ids: The K clusters.

    Returns:
        ``gradient_alignment_K`` and ``gradient_gram_KK`` as lists; None = unknown.
    """
    compute = spec.gradient
    assert compute is not None, "the caller has refused planners without gradients"

    def of(weights: Any, name: str | None) -> np.ndarray | None:
        features, rows = groups[name]
        return compute(weights, features, rows) if len(rows) else None

    found = [
        measure_alignment(partial(of, spec.load_weights(directory)), cluster_ids) for directory in directories
    ]
    names = ("gradient_alignment_K", "gradient_gram_KK")
    means = {name: np.mean([getattr(one, name) for one in found], axis=0) for name in names}
    return {name: [_numbers(row) for row in value] for name, value in means.items()}


def gradient_rows(
    seed: int, labels: Path, cluster_ids: Sequence[str], dev_weights_N: np.ndarray
) -> dict[str | None, np.ndarray]:
    """Draw the scenes of a gradient probe: some synthetic ones of each cluster; dev scenes by weight, for None."""
    clusters_N = _strings(read_parquet(labels)["cluster"])
    rng = np.random.default_rng(seed)
    rows: dict[str | None, np.ndarray] = {}
    for name in cluster_ids:
        members = np.flatnonzero(clusters_N == name)
        rows[name] = np.sort(rng.permutation(members)[:PROBE_SCENES])
    shares_N = dev_weights_N / dev_weights_N.sum()
    rows[None] = np.sort(rng.choice(len(shares_N), PROBE_DEV_SCENES, p=shares_N))
    return rows


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=np.str_)


def _numbers(value: np.ndarray) -> Any:
    return [number_or_none(one) for one in value] if np.ndim(value) else number_or_none(float(value))


def stage_identity(section: Any) -> dict[str, Any]:
    """Return a configuration section as plain values for a stage's identity."""
    return dataclasses.asdict(section)
