"""Does the embedding find the right scenes? Graph-RAE, its ablations and its rivals on two data sets.

    python -m benchmarks.bench_representation --data DATA --ablation --check --json out.json
    python -m benchmarks.bench_representation --quick

Every arm sees the same training scenes and takes the same number of steps; test scenes come from other logs, and no
test scene may find one of its own log, which overlaps it on the recordings. Families (world) and tags of motion and map
(recordings) judge and enter no loss and no descriptor. Graph-RAE sees the logged future, and so do the rivals on graphs
and one of the two descriptors. Graph-RAE is judged with the whitened embedding that clusters and retrieval use; a rival
with its raw and its whitened one, and counts with the better of the two. Homogeneity is compared between equally many
groups: 16, to which rare tags are merged, and as many as there are tags. The scenario distance, which Graph-RAE is
taught by, stands in the table beside it and is no rival. Finished cells are kept in `--out` under arm, seed and a mark
of configuration and code, and not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t

from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import EmbeddingLossConfig, RepresentationConfig
from autoscale_ray.mixture.similarity import fit_whitening
from autoscale_ray.representation import quality
from autoscale_ray.representation.distance import fit_scenario_distance
from autoscale_ray.representation.training import TrainingSet, fit, training_set
from autoscale_ray.scenes.batch import SceneBatch
from benchmarks import representation_baselines as baselines
from benchmarks import representation_figure
from benchmarks.representation_data import (
    DataSet,
    built_in_world,
    ingest_recordings,
    mark_of_sources,
    most_common,
    recordings,
    source_rows,
    tags_of,
)
from benchmarks.surroundings import common_parser, surroundings

NO_TERM = dict.fromkeys((field.name for field in dataclasses.fields(EmbeddingLossConfig)), 0.0)
DEFAULT = RepresentationConfig()
NUM_CLUSTERS = 16
RETRIEVAL = ("recall@1", "recall@5", "recall@10", "map", "source recall@5")
CLUSTERING = ("nmi", "ari", "purity", "silhouette", "cluster silhouette")
NUM_CLUSTERINGS = 9
"""k-means seeds that the homogeneity is averaged over; one start differs from the next by up to .05."""
HOMOGENEITY = ("score homogeneity", "difference homogeneity", "score homogeneity, many",
               "difference homogeneity, many")  # fmt: skip
"""Of 16 groups, and of as many groups as the test scenes have tags."""
COLUMNS = (*RETRIEVAL, *CLUSTERING, "probe f1", "spearman", "rank", "domain auc", *HOMOGENEITY, "cpu_s")
NUM_COMPARED = 400
"""Test scenes whose distances are correlated with the scenario distance."""


def with_terms(**weights: float) -> RepresentationConfig:
    """Return the default with other loss weights; terms left out keep theirs."""
    return dataclasses.replace(DEFAULT, loss=dataclasses.replace(DEFAULT.loss, **weights))


def only_terms(**weights: float) -> RepresentationConfig:
    return dataclasses.replace(DEFAULT, loss=EmbeddingLossConfig(**{**NO_TERM, **weights}))


OURS: dict[str, RepresentationConfig] = {
    "graph-rae": DEFAULT,
    "without decoder": only_terms(neighbours=1.0),
    "without neighbours": only_terms(decoder=1.0),
    "metric instead": with_terms(neighbours=0.0, metric=1.0),
    "metric alone": only_terms(metric=1.0),
    "with metric": with_terms(metric=1.0),
    "with variance": with_terms(variance=0.1),
    "with masked": with_terms(masked=0.5),
    "with relation": with_terms(relation=0.2),
    "with contrastive": with_terms(contrastive=0.2),
    "with time shift": with_terms(time_shift=0.2),
    "with pairs": with_terms(pairs=0.5),
    "with laplacian": with_terms(laplacian=0.2),
    "with norm": with_terms(norm=1e-4),
    "with response": with_terms(response=1.0),
    "with attention": DEFAULT,
    "history alone": dataclasses.replace(DEFAULT, use_future=False),
    "all terms": only_terms(
        decoder=1.0,
        masked=0.5,
        relation=0.5,
        contrastive=0.5,
        time_shift=0.5,
        metric=0.5,
        neighbours=0.5,
        pairs=0.5,
        variance=0.1,
        norm=1e-4,
    ),
}
ABLATIONS = tuple(name for name in OURS if name != "graph-rae")
TAGS = ("tags", "tags of the history")
DESCRIPTORS = {
    "descriptor + pca": baselines.hand_descriptor,
    "descriptor with future + pca": baselines.descriptor_with_future,
}
TEACHER = "scenario distance"
BASELINES = (
    *DESCRIPTORS,
    "raster autoencoder",
    "vgae",
    "graphmae",
    "graphcl",
    "vicreg",
    "untrained",
    "random",
    *TAGS,
)
RIVAL_RATES = {"raster autoencoder": 5e-4, "vgae": 5e-4, "graphmae": 6e-3, "graphcl": 5e-4, "vicreg": 2e-3}
"""Learning rates of the rivals, the best of .0005, .002 and .006 by recall@5 + NMI on seed 90 of the world."""
SINGLE_TERM = {
    "graphmae": only_terms(masked=1.0),
    "graphcl": only_terms(contrastive=1.0),
    "untrained": dataclasses.replace(DEFAULT, num_steps=0),
}
TRAINED: Mapping[str, Callable[..., baselines.Encode]] = {
    "raster autoencoder": baselines.raster_autoencoder,
    "vgae": baselines.graph_vgae,
    "vicreg": baselines.vicreg,
}


@dataclass
class Prepared:
    """Graphs of a data set, built once for all arms."""

    data: DataSet
    train: TrainingSet
    test: TrainingSet
    held: TrainingSet
    delta_NN: np.ndarray
    """Scenario distance between the test scenes."""

    @property
    def copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of perturbed held scenes and of their sources."""
        source_N = self.held.source_N.numpy()
        rows = np.flatnonzero(source_N >= 0)
        return rows, source_N[rows]

    def batches(self) -> tuple[Iterator[SceneBatch], ...]:
        """Return the scenes of the training, the test and the held side."""
        return tuple(side.batches() for side in (self.data.train, self.data.test, self.data.held))


def prepare(data: DataSet, config: RepresentationConfig) -> Prepared:
    """Build the graphs that an arm with this configuration needs."""
    lessons = data.lessons if config.loss.response > 0 else None
    train = training_set(
        data.train.batches(),
        source_rows(data.train),
        data.train.column("log_id"),
        None if lessons is None else lessons(),
        use_future=config.use_future,
        with_later=config.loss.time_shift > 0,
    )
    test = training_set(data.test.batches(), use_future=config.use_future)
    held = training_set(data.held.batches(), source_rows(data.held), use_future=config.use_future)
    distance = fit_scenario_distance(train.signature, dataclasses.asdict(DEFAULT.distance), 0)
    return Prepared(data, train, test, held, distance(test.signature, test.signature).numpy())


def embed_arm(arm: str, prepared: Prepared, config: RepresentationConfig, seed: int) -> baselines.Embedded:
    """Return the training, test and held embeddings of an arm."""
    sides = (prepared.train.graph, prepared.test.graph, prepared.held.graph)
    if arm == "random":
        rng = np.random.default_rng(seed)
        return tuple(rng.standard_normal((len(side), 64)) for side in sides)
    if arm in DESCRIPTORS:
        tables = [
            torch.cat([DESCRIPTORS[arm](batch) for batch in side]).double().numpy()
            for side in prepared.batches()
        ]
        mean, scale, directions = baselines.fit_principal_components(tables[0], 64)
        return tuple(((table - mean) / scale) @ directions for table in tables)
    encode = trained(arm, prepared.train, config, seed)
    return tuple(baselines.embedded(encode, side) for side in sides)


def trained(arm: str, train: TrainingSet, config: RepresentationConfig, seed: int) -> baselines.Encode:
    """Train an arm and return its embedding."""
    if arm in TRAINED:
        return TRAINED[arm](train.graph, config, seed)
    if arm == "with attention":
        return baselines.with_attention(train, config, seed)
    encoder = fit(train, config, seed).encoder
    return lambda graph: encoder(graph).z_ND


def judge(
    prepared: Prepared,
    test_ND: np.ndarray,
    held_ND: np.ndarray,
    seed: int,
    ranking_NN: np.ndarray | None = None,
) -> dict[str, float]:
    """Compute every figure of one embedding.

    Args:
        prepared: The data set.
        test_ND: Embeddings of the test scenes.
        held_ND: Embeddings of the held scenes; empty where there are none.
        seed: Seed of k-means and of random parts.
        ranking_NN: Order in which named test scenes find one another; None for that of the embedding.
    """
    label_N = prepared.data.label_N
    named = label_N != ""
    z_ND, name_N, log_N = test_ND[named], label_N[named], prepared.data.test.column("log_id")[named]
    if ranking_NN is None:
        ranking_NN = quality.cosine_ranking(z_ND, z_ND, groups_N=log_N)
    relevant = (name_N[ranking_NN] == name_N[:, None]) & (log_N[ranking_NN] != log_N[:, None])
    cluster_N = quality.kmeans_labels(z_ND, len(np.unique(name_N)), seed)
    logs = np.random.default_rng(seed).permutation(np.unique(log_N))
    fitted = np.isin(log_N, logs[::2])
    rows = np.random.default_rng(seed).permutation(len(test_ND))[:NUM_COMPARED]
    found = {f"recall@{k}": quality.recall_at(relevant, k) for k in (1, 5, 10)}
    found |= {
        "map": quality.mean_average_precision(relevant),
        "source recall@5": source_recall(prepared, held_ND),
        "nmi": quality.normalised_mutual_information(cluster_N, name_N),
        "ari": quality.adjusted_rand_index(cluster_N, name_N),
        "purity": quality.purity(cluster_N, name_N),
        "silhouette": quality.silhouette(z_ND, name_N),
        "cluster silhouette": quality.silhouette(z_ND, cluster_N),
        "probe f1": quality.linear_probe_macro_f1(
            z_ND[fitted], name_N[fitted], z_ND[~fitted], name_N[~fitted]
        ),
        "spearman": quality.distance_correlation(test_ND[rows], prepared.delta_NN[np.ix_(rows, rows)]),
        "rank": quality.effective_rank(test_ND),
        "domain auc": domain_auc(prepared, held_ND, seed),
    }
    return found | homogeneity(prepared, lambda num_groups: [
        quality.kmeans_labels(test_ND, num_groups, seed + turn) for turn in range(NUM_CLUSTERINGS)])  # fmt: skip


def judge_teacher(prepared: Prepared, seed: int) -> dict[str, float]:
    """Judge the scenario distance itself: its own order of scenes, and clusters of its classical scaling."""
    named = prepared.data.label_N != ""
    log_N = prepared.data.test.column("log_id")[named]
    delta_NN = prepared.delta_NN[np.ix_(named, named)].copy()
    delta_NN[log_N[:, None] == log_N] = np.inf
    order_NN = np.argsort(delta_NN, axis=1, kind="stable")
    found = judge(
        prepared, baselines.classical_scaling(prepared.delta_NN, 64), np.zeros((0, 64)), seed, order_NN
    )
    return found | {"spearman": 1.0}


def homogeneity(prepared: Prepared, groupings: Callable[[int], Sequence[np.ndarray]]) -> dict[str, float]:
    """Return the share of the variance of scores and of score differences that lies between groups.

    Args:
        prepared: Its responses are judged; without any, everything is NaN.
        groupings: Groupings of the test scenes into a given number of groups; their figures are averaged.
    """
    responses = prepared.data.responses
    if not responses:
        return dict.fromkeys(HOMOGENEITY, float("nan"))
    numbers = {"": NUM_CLUSTERS, ", many": len(np.unique(prepared.data.tag_N))}
    made = {suffix: groupings(number) for suffix, number in numbers.items()}
    return {
        f"{name} homogeneity{suffix}": float(
            np.mean([quality.response_homogeneity(value_N, group_N) for group_N in made[suffix]])
        )
        for suffix in made
        for name, value_N in responses.items()
    }


def source_recall(prepared: Prepared, held_ND: np.ndarray) -> float:
    """Return how often the real source of a perturbed scene is among its five nearest real scenes."""
    copies, sources = prepared.copies
    if len(copies) == 0 or len(held_ND) == 0:
        return float("nan")
    real = np.flatnonzero(prepared.data.held.column("domain") == "real")
    ranking = real[quality.cosine_ranking(held_ND[copies], held_ND[real])]
    return quality.recall_at(ranking == sources[:, None], 5)


def domain_auc(prepared: Prepared, held_ND: np.ndarray, seed: int) -> float:
    """Return how well a linear probe tells synthetic scenes from real ones."""
    if len(held_ND) == 0:
        return float("nan")
    synthetic = prepared.data.held.column("domain") == "synthetic"
    rows = np.random.default_rng(seed).permutation(len(synthetic))[:3000]
    return quality.domain_probe_auc(held_ND[rows], synthetic[rows], seed)


def run_cell(arm: str, prepared: Prepared, config: RepresentationConfig, seed: int) -> dict[str, float]:
    """Embed and judge; of a rival the better of raw and whitened by recall@5 + NMI counts."""
    if arm in TAGS:
        tag_N = prepared.data.tag_N if arm == "tags" else tags_of(prepared.data.test, of_history=True)
        nothing = dict.fromkeys(COLUMNS, float("nan"))
        return nothing | homogeneity(prepared, lambda number: [most_common(tag_N, number)])
    if arm == TEACHER:
        return judge_teacher(prepared, seed) | {"cpu_s": float("nan")}
    start = time.process_time()
    train_ND, test_ND, held_ND = embed_arm(arm, prepared, config, seed)
    seconds = time.process_time() - start
    whitening = fit_whitening(train_ND)
    cells = [judge(prepared, whitening.apply(test_ND), whitening.apply(held_ND), seed) | {"whitened": 1.0}]
    if arm not in OURS:
        cells.append(judge(prepared, test_ND, held_ND, seed) | {"whitened": 0.0})
    return max(cells, key=lambda cell: cell["recall@5"] + cell["nmi"]) | {"cpu_s": seconds}


def run_everything(
    options: argparse.Namespace, data_sets: Mapping[str, Callable[[int], DataSet]]
) -> list[dict]:
    """Run the cells that are not there yet; return all."""
    options.out.mkdir(parents=True, exist_ok=True)
    code, cells = mark_of_sources("representation", "mixture/similarity.py"), []
    for seed in range(options.seed, options.seed + options.seeds):
        for name, make in data_sets.items():
            prepared: dict[tuple[bool, ...], Prepared] = {}
            for arm in arms_of(options, name):
                config = config_of(arm, options)
                mark = fingerprint([dataclasses.asdict(config), code])[:8]
                size = "-quick" if options.quick else ""
                file = options.out / f"{name}-{arm.replace(' ', '_')}-{seed}-{mark}{size}.json"
                if not file.is_file():
                    needs = (config.use_future, config.loss.time_shift > 0, config.loss.response > 0)
                    if needs not in prepared:
                        prepared[needs] = prepare(make(seed), config)
                    found = run_cell(arm, prepared[needs], config, seed)
                    cell = {"data": name, "arm": arm, "seed": seed} | found
                    file.write_text(json.dumps(cell), encoding="utf-8")
                cells.append(json.loads(file.read_text(encoding="utf-8")))
                print(" ".join(f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}"
                               for key, value in cells[-1].items()), flush=True)  # fmt: skip
    return cells


def config_of(arm: str, options: argparse.Namespace) -> RepresentationConfig:
    """Return what an arm trains with."""
    config = SINGLE_TERM.get(arm) or OURS.get(arm, DEFAULT)
    if arm in RIVAL_RATES:
        config = dataclasses.replace(config, learning_rate=options.rival_rate or RIVAL_RATES[arm])
    if options.quick and config.num_steps:
        return dataclasses.replace(config, num_steps=60)
    return config


def arms_of(options: argparse.Namespace, data_name: str) -> tuple[str, ...]:
    """Return the arms to run; terms are switched on the world alone, attention on both."""
    if options.arms:
        return tuple(options.arms.split(","))
    ablations = ABLATIONS if data_name == "world" else ("with attention",)
    return ("graph-rae", *BASELINES, TEACHER, *(ablations if options.ablation else ()))


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its 95 % t interval."""
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) == 0:
        return float("nan"), float("nan")
    if len(known) == 1:
        return float(known[0]), float("nan")
    return float(known.mean()), float(
        student_t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    )


def table_of(cells: Sequence[Mapping], data_name: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return mean and interval by arm and figure."""
    mine = [cell for cell in cells if cell["data"] == data_name]
    arms = dict.fromkeys(cell["arm"] for cell in mine)
    return {
        arm: {key: mean_and_interval([cell[key] for cell in mine if cell["arm"] == arm]) for key in COLUMNS}
        for arm in arms
    }


def missed(cells: Sequence[Mapping], arm_of_ours: str = "graph-rae") -> list[str]:
    """Return one line `name measured target` for each claim that does not hold; an unknown figure does not.

    Args:
        cells: Figures of every arm, data set and seed.
        arm_of_ours: The arm that the claims are made of.
    """
    tables = {name: table_of(cells, name) for name in dict.fromkeys(cell["data"] for cell in cells)}
    lines = [f"{name} without {arm}" for name in tables for arm in BASELINES if arm not in tables[name]]
    lines += [f"{name} was not run" for name in ("world", "recordings") if name not in tables]
    lines += [f"{name} without {arm_of_ours}" for name in tables if arm_of_ours not in tables[name]]
    tables = {name: table for name, table in tables.items() if arm_of_ours in table}
    for name, table in tables.items():
        rivals = [table[arm] for arm in BASELINES if arm in table and arm not in TAGS]
        for key in (*RETRIEVAL, *CLUSTERING):
            if name == "recordings" and key == "source recall@5":
                continue  # no recorded scene has a perturbed copy
            best, width = max((row[key] for row in rivals), default=(np.nan, np.nan))
            if not table[arm_of_ours][key][0] >= best - np.nan_to_num(width):
                lines.append(f"{name} {key} {table[arm_of_ours][key][0]:.3f} {best:.3f} - {width:.3f}")
        for key in HOMOGENEITY:
            for arm in (*DESCRIPTORS, "tags"):
                ours, rival = (table[one][key][0] if one in table else np.nan for one in (arm_of_ours, arm))
                if not ours > rival:
                    lines.append(f"{name} {key} against {arm} {ours:.3f} {rival:.3f}")
    for key in ("recall@5", "nmi"):
        for arm in BASELINES:
            both = [
                (table[arm_of_ours][key][0], table[arm][key][0]) for table in tables.values() if arm in table
            ]
            if arm in TAGS or not both:
                continue
            ours, rival = (float(np.mean(column)) for column in zip(*both, strict=True))
            if not ours > rival:
                lines.append(f"mean {key} against {arm} {ours:.3f} {rival:.3f}")
    return lines


def markdown(cells: Sequence[Mapping]) -> str:
    """Write the tables."""
    parts = []
    for name in dict.fromkeys(cell["data"] for cell in cells):
        parts += [
            f"\n### {name}\n",
            "| arm | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for arm, row in table_of(cells, name).items():
            parts.append(f"| {arm} | " + " | ".join(shown(*figure) for figure in row.values()) + " |")
    return "\n".join(parts)


def shown(mean: float, width: float) -> str:
    """Return a figure with its interval, where it has them."""
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.3f} ± {width:.3f}" if np.isfinite(width) else f"{mean:.3f}"


def parse_arguments() -> argparse.Namespace:
    quick = "small pools, 60 steps, one seed: a smoke test"
    parser = common_parser(__doc__, quick=quick, seed_help="first seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument(
        "--data", type=Path, help="folder with recordings and simulations, ingested into --out"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench_representation"), help="pools and finished cells"
    )
    parser.add_argument("--arms", help="comma-separated arms instead of all")
    parser.add_argument("--ablation", action="store_true", help="also switch every term on or off")
    parser.add_argument("--rival-rate", type=float, help="learning rate of all rivals in place of their own")
    parser.add_argument("--figure", type=Path, help="picture of the tables")
    parser.add_argument(
        "--claim", choices=tuple(OURS), default="graph-rae", help="arm that --check holds to the targets"
    )
    return parser.parse_args()


def main() -> int:
    """Run what is missing, print the tables, check the claims."""
    options = parse_arguments()
    torch.set_num_threads(1)
    if options.quick:
        options.seeds = 1
    data_sets: dict[str, Callable[[int], DataSet]] = {
        "world": lambda seed: built_in_world(options.out, seed, quick=options.quick)
    }
    if options.data:
        pools = options.out / "recorded"
        ingest_recordings(options.data, pools)
        data_sets["recordings"] = lambda seed: recordings(pools, options.out, seed, quick=options.quick)
    cells = run_everything(options, data_sets)
    about = surroundings("torch", "torch-geometric")
    if options.json:
        options.json.write_text(json.dumps({"about": about, "cells": cells}, indent=1), encoding="utf-8")
    print(markdown(cells))
    if options.figure:
        names = dict.fromkeys(cell["data"] for cell in cells)
        representation_figure.draw({name: table_of(cells, name) for name in names}, options.figure)
    lines = missed(cells, options.claim) if options.check else []
    print("\n".join(lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
