"""The whole loop on the built-in world: AutoScale against its baselines at equal steps and budget.

One replicate is one seed of everything random in a run: encoder, clusters, search design, selection, training.
A replicate searches on dev, then trains every arm once and scores it on test scenes that were drawn after the
world was frozen. Replicates are paired: differences between arms are taken inside a replicate. Every training
run is kept on disk, so a stopped benchmark continues.

    python -m benchmarks.bench_loop --out DIR --seeds 10 --processes 2 --check --json FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats

from autoscale_ray.artifacts import RunStore
from autoscale_ray.canonical import fingerprint
from autoscale_ray.config import RunConfig, derive_seed
from autoscale_ray.config_file import load_config
from autoscale_ray.inputs import Inputs, open_inputs
from autoscale_ray.local import LocalStages
from autoscale_ray.loop import cluster_info, observations, play, seeded_ascent, training_seeds
from autoscale_ray.mixture import METHODS
from autoscale_ray.mixture.allocation import allocate
from autoscale_ray.mixture.problem import Observation
from autoscale_ray.records import SIDES, Clusters, Round, Scores, Selection
from autoscale_ray.world.presets import PRESETS
from benchmarks.surroundings import surroundings

FRESH_TEST_SEED = 20_261_122
"""Test scenes of this benchmark; no part of the world or of a method was tuned on them."""
NUM_SCREENING_RUNS = 96
"""Training runs of the near-oracle's screening design over the true families."""
SCREENING_SD = 0.8
"""Log-normal spread of the family weights in the screening design."""


def base_config(preset: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """Return the configuration of one replicate."""
    overrides = [
        f"seed={seed}",
        f"world.preset={preset}",
        f"world.test_seed={options.test_seed}",
        f"loop.num_rounds={options.rounds}",
        *options.override,
    ]
    return load_config(None, overrides)


def open_store(config: RunConfig, out: Path, name: str) -> tuple[RunStore, Inputs]:
    """Open the pools of a preset, shared by all replicates, and a store shared by those of one process."""
    torch.set_num_threads(1)
    inputs = open_inputs(config, out / "pools")
    return RunStore.open(str(out / name), {"pools": inputs.identity()}), inputs


def search(
    config: RunConfig, stages: LocalStages, clusters: Clusters, method: str, real_only: Round
) -> Callable[[int], dict[str, int]]:
    """Run the rounds of one mixture method from a shared real-only round.

    Returns:
        What the method recommends in the end: scenes of each cluster for a budget, from these rounds.
    """
    info = cluster_info(clusters, config.loop.budget)
    ascent = seeded_ascent(config)
    history: tuple[Round, ...] = (real_only,)
    for _ in range(config.loop.num_rounds):
        weights = METHODS[method].propose(observations(history), info, ascent)
        history = (*history, play(config, stages, clusters, weights, history))

    def recommended(budget: int) -> dict[str, int]:
        at = dataclasses.replace(info, budget=budget, search_budget=info.budget)
        return allocate(METHODS[method].final(observations(history), at, ascent), at)

    return recommended


class Quiet(LocalStages):
    """Local stages that publish no rounds: several searches share one folder of finished stages."""

    def publish(self, clusters: Clusters, history: tuple[Round, ...]) -> None:
        """Leave the manifest chain alone; finished stages are kept all the same."""


def replicates(
    preset: str, seeds: Sequence[int], part: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run some replicates one after another in one process, which share what does not depend on the seed."""
    store, inputs = open_store(base_config(preset, 0, options), options.out, f"{preset}-{part}")
    results = []
    for seed in seeds:
        results.append(replicate(preset, seed, store, inputs, options))
        print(json.dumps({"preset": preset, "seed": seed, **_brief(results[-1])}), flush=True)
    return results


def _brief(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(arm["W"], 2) for name, arm in result["arms"].items()}


def replicate(
    preset: str, seed: int, store: RunStore, inputs: Inputs, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one replicate: searches on dev, then every arm once on test."""
    config = base_config(preset, seed, options)
    stages = Quiet(config, inputs, store)
    clusters = stages.cluster(stages.embed())
    info = cluster_info(clusters, config.loop.budget)
    start = play(config, stages, clusters, {}, ())
    found = search(config, stages, clusters, "response", start)
    sizes = dict(zip(clusters.cluster_ids, map(int, clusters.pool_sizes_K), strict=True))
    budget = config.loop.budget
    plans: dict[str, tuple[Clusters, Mapping[str, int], str | None]] = {
        "uniform": (clusters, allocate(dict.fromkeys(sizes, 1.0), info), "random"),
        "autoscale": (clusters, found(budget), None),
        "autoscale_weights_only": (clusters, found(budget), "random"),
        "retrieval_only": (clusters, allocate(dict.fromkeys(sizes, 1.0), info), None),
    }
    if preset == "null":  # what there would be to lose
        largest = max(sizes, key=sizes.__getitem__)
        alone = {name: float(name == largest) for name in sizes}
        plans["largest_cluster"] = (clusters, allocate(alone, info), "random")
    else:
        deficit = search(config, stages, clusters, "deficit", start)
        plans |= {
            "real_only": (clusters, {}, None),
            "vanilla": (clusters, allocate({k: float(n) for k, n in sizes.items()}, info), "random"),
            "union": (clusters, sizes, "random"),
            "deficit": (clusters, deficit(budget), "random"),
            "autoscale_70_percent": (clusters, found(max(1, round(0.7 * budget))), None),
            "autoscale_30_percent": (clusters, found(max(1, round(0.3 * budget))), None),
            "random_clusters": random_clusters_plan(config, stages, start),
        }
        if options.screening > 0:
            plans["near_oracle"] = near_oracle_plan(config, inputs, clusters, options)
    arms = {name: score_arm(stages, *plan, guide=start.scores, config=config) for name, plan in plans.items()}
    return {"preset": preset, "seed": seed, "arms": arms, "dev_real_only": start.scores.totals["objective"]}


def score_arm(
    stages: LocalStages,
    clusters: Clusters,
    counts: Mapping[str, int],
    how: str | None,
    *,
    guide: Scores,
    config: RunConfig,
) -> dict[str, Any]:
    """Train one arm with the replicate's final seed and score it on test."""
    selection = stages.retrieve(clusters, counts, guide, how=how)
    planners = stages.train(selection, training_seeds(config, "final", 1))
    scores = stages.evaluate(planners, clusters, "test")
    shown = config.planner.num_steps * config.planner.batch_size
    num_scenes = selection.num_scenes + len(stages.inputs.pools["real"])
    return {
        "W": 100 * scores.totals["objective"],
        "epdms": 100 * scores.totals["epdms"],
        "pdms": 100 * scores.totals["pdms"],
        "miou": 100 * scores.totals["miou"],
        "num_scenes": selection.num_scenes,
        "epochs": shown / num_scenes,
        "counts": dict(selection.counts),
    }


def random_clusters_plan(
    config: RunConfig, stages: LocalStages, start: Round
) -> tuple[Clusters, Mapping[str, int], str]:
    """Search over random clusters of equal size: the control in which clusters mean nothing."""
    dealt = dataclasses.replace(config, clusters=dataclasses.replace(config.clusters, method="random"))
    control = Quiet(dealt, stages.inputs, stages.store)
    clusters = control.cluster(control.embed())
    again = control.evaluate(control.train(start.selection, start.scores.seeds), clusters, "dev")
    first = Round(index=0, weights={}, selection=control.retrieve(clusters, {}, None), scores=again)
    found = search(dealt, _RandomInside(dealt, stages.inputs, stages.store), clusters, "response", first)
    return clusters, found(config.loop.budget), "random"


class _RandomInside(Quiet):
    """Stages that draw at random inside a cluster, whatever the configuration says."""

    def retrieve(
        self, clusters: Clusters, counts: Mapping[str, int], guide: Scores | None, *, how: str | None = None
    ) -> Selection:
        """Draw that many scenes at random in each cluster."""
        return super().retrieve(clusters, counts, guide, how="random")


def family_clusters(inputs: Inputs, folder: Path, embeddings: Mapping[str, Path]) -> Clusters:
    """Return the true families as clusters; only judges of a mixture may look at them."""
    folder.mkdir(parents=True, exist_ok=True)
    labels, files = {}, dict(embeddings)
    for side in SIDES:
        truth = inputs.pools[side].side_table("truth")
        assert truth is not None, "the built-in world writes its truth"
        by_id = dict(zip(truth["scene_id"].to_pylist(), truth["family"].to_pylist(), strict=True))
        ids = inputs.pools[side].scene_ids.tolist()
        labels[side] = [by_id[scene] for scene in ids]
        files[f"labels_{side}"] = folder / f"{side}.parquet"
        pq.write_table(pa.table({"scene_id": ids, "cluster": labels[side]}), files[f"labels_{side}"])
    names = tuple(sorted(set(labels["dev"])))
    count = {side: np.array([labels[side].count(name) for name in names]) for side in SIDES}
    weights = inputs.weights["dev"]
    shares = np.array([weights[np.array(labels["dev"]) == name].sum() for name in names])
    return Clusters(
        fingerprint=fingerprint({"families": inputs.identity()}),
        cluster_ids=names,
        pool_sizes_K=count["synthetic"],
        deliverable_K=count["synthetic"],
        real_counts_K=count["real"],
        dev_counts_K=count["dev"],
        dev_weights_K=shares / shares.sum(),
        descriptors_KD=np.zeros((len(names), 1)),
        files=files,
    )


def near_oracle_plan(
    config: RunConfig, inputs: Inputs, clusters: Clusters, options: argparse.Namespace
) -> tuple[Clusters, Mapping[str, int], str]:
    """Return the near-oracle mixture over true families, fitted once on dev by `fit_near_oracle`."""
    counts = json.loads(screening_file(options.out, config.world.preset).read_text())["counts"]
    folder = options.out / f"families-{config.world.preset}-{config.seed}"
    return family_clusters(inputs, folder, clusters.files), counts, "random"


def screening_file(out: Path, preset: str) -> Path:
    """Return where the near-oracle of a preset is kept."""
    return out / f"near_oracle-{preset}.json"


def screen(preset: str, part: int, num_runs: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and score random mixtures over the true families on dev; one part of the screening design."""
    base = base_config(preset, 0, options)
    config = dataclasses.replace(
        base,
        representation=dataclasses.replace(base.representation, num_steps=0),
        retrieval=dataclasses.replace(base.retrieval, method="random"),
    )
    store, inputs = open_store(config, options.out, f"screening-{preset}-{part}")
    stages = Quiet(config, inputs, store)
    files = stages.cluster(stages.embed()).files
    clusters = family_clusters(inputs, options.out / f"families-{preset}-part{part}", files)
    info = cluster_info(clusters, config.loop.budget)
    runs = []
    for index in range(num_runs):
        seed = derive_seed(0, "screening", preset, str(part), str(index))
        spread_K = np.random.default_rng(seed).normal(0.0, SCREENING_SD, len(clusters.cluster_ids))
        weights = dict(zip(clusters.cluster_ids, np.exp(spread_K).tolist(), strict=True))
        selection = stages.retrieve(clusters, allocate(weights, info), None)
        scores = stages.evaluate(stages.train(selection, (seed,)), clusters, "dev")
        runs.append(
            {
                "counts": dict(selection.counts),
                "scores": scores.cluster_scores_K.tolist(),
                "se": scores.cluster_se_K.tolist(),
            }
        )
    return runs


def fit_near_oracle(preset: str, runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Fit the response of every family on all screening runs and keep the best mixture."""
    config = base_config(preset, 0, options)
    inputs = open_inputs(config, options.out / "pools")
    clusters = family_clusters(inputs, options.out / f"families-{preset}-fit", {})
    info = cluster_info(clusters, config.loop.budget)
    history = tuple(
        Observation(
            cluster_ids=tuple(run["counts"]),
            counts_K=np.array(list(run["counts"].values()), dtype=float),
            scores_K=np.array(run["scores"]),
            score_se_K=np.array(run["se"]),
        )
        for run in runs
    )
    counts = allocate(METHODS["response"].final(history, info, config.ascent), info)
    screening_file(options.out, preset).write_text(json.dumps({"counts": counts, "runs": len(runs)}))


CONTRASTS = (
    ("autoscale", "vanilla"),
    ("autoscale", "uniform"),
    ("autoscale", "union"),
    ("autoscale", "real_only"),
    ("autoscale", "deficit"),
    ("autoscale", "autoscale_weights_only"),
    ("autoscale_weights_only", "uniform"),
    ("autoscale", "near_oracle"),
    ("near_oracle", "uniform"),
    ("autoscale_70_percent", "uniform"),
    ("autoscale_30_percent", "vanilla"),
    ("retrieval_only", "uniform"),
    ("random_clusters", "vanilla"),
    ("largest_cluster", "uniform"),
)


def paired(
    results: Sequence[Mapping[str, Any]], first: str, second: str, metric: str, level: float
) -> dict[str, float]:
    """Return the mean difference of two arms over replicates with its Student interval."""
    gaps = np.array([r["arms"][first][metric] - r["arms"][second][metric] for r in results])
    half = stats.t.ppf(0.5 + level / 2, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return {
        "mean": gaps.mean(),
        "low": gaps.mean() - half,
        "high": gaps.mean() + half,
        "sd": gaps.std(ddof=1),
    }


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return arm means and paired contrasts of one preset."""
    names = list(results[0]["arms"])
    metrics = ("W", "miou", "epdms", "pdms", "num_scenes", "epochs")
    arms = {}
    for name in names:
        columns = {metric: np.array([r["arms"][name][metric] for r in results]) for metric in metrics}
        arms[name] = {metric: float(column.mean()) for metric, column in columns.items()}
        arms[name] |= {"W_sd": float(columns["W"].std(ddof=1)), "miou_sd": float(columns["miou"].std(ddof=1))}
    pairs = [pair for pair in CONTRASTS if set(pair) <= set(names)]
    level = 0.90 if results[0]["preset"] == "null" else 0.95
    contrasts = {
        f"{first} - {second}": {
            metric: paired(results, first, second, metric, level) for metric in ("W", "miou")
        }
        for first, second in pairs
    }
    return {"arms": arms, "contrasts": contrasts, "num_replicates": len(results)}


def missed(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line ``name measured target`` for each missed target of the presets that were run."""
    lines: list[str] = []

    def need(name: str, measured: float, target: float, holds: bool) -> None:
        if not holds:
            lines.append(f"{name} {measured:.2f} {target:g}")

    if "harm_low_deficit" in summaries:
        _need_gains(summaries["harm_low_deficit"]["contrasts"], need)
    if "null" in summaries:
        null = summaries["null"]["contrasts"]["autoscale - uniform"]["W"]
        need("null-lower-90", null["low"], -1.0, null["low"] >= -1.0)
        need("null-upper-90", null["high"], 1.0, null["high"] <= 1.0)
    return lines


def _need_gains(main: Mapping[str, Any], need: Callable[[str, float, float, bool], None]) -> None:
    for other, points in (("vanilla", 5.0), ("uniform", 4.0)):
        gap = main[f"autoscale - {other}"]["W"]
        need(f"autoscale-minus-{other}", gap["mean"], points, gap["mean"] >= points)
        need(f"autoscale-minus-{other}-lower-95", gap["low"], 0.0, gap["low"] > 0)
    for arm in ("autoscale", "autoscale_70_percent"):  # the second: with 30 % fewer synthetic scenes
        closed = float("nan")  # without a screening it stays unmeasured, which is a miss
        if "near_oracle - uniform" in main:
            closed = main[f"{arm} - uniform"]["W"]["mean"] / main["near_oracle - uniform"]["W"]["mean"]
        need(f"share-of-gap-to-near-oracle-{arm}", closed, 0.8, closed >= 0.8)
    small = main["autoscale_30_percent - vanilla"]["W"]["mean"]
    need("autoscale-with-30-percent-minus-vanilla", small, 0.0, small >= 0.0)
    control = main["random_clusters - vanilla"]["W"]
    need("random-clusters-minus-vanilla-lower-95", control["low"], 0.0, control["low"] <= 0.0)


def markdown(summaries: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Return the result as Markdown tables."""
    lines = [f"command: python -m benchmarks.bench_loop {' '.join(sys.argv[1:])}", ""]
    for preset, summary in summaries.items():
        lines += [
            f"## {preset}, {summary['num_replicates']} replicates",
            "",
            "| arm | W | SD | BEV mIoU | SD | EPDMS | PDMS | synthetic scenes | epochs |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, arm in summary["arms"].items():
            cells = [f"{arm[key]:.1f}" for key in ("W", "W_sd", "miou", "miou_sd", "epdms", "pdms")]
            lines.append(f"| {name} | {' | '.join(cells)} | {arm['num_scenes']:.0f} | {arm['epochs']:.1f} |")
        level = 90 if preset == "null" else 95
        lines += [
            "",
            f"| contrast | W [{level} % interval] | BEV mIoU [{level} % interval] |",
            "|---|---|---|",
        ]
        for name, contrast in summary["contrasts"].items():
            cells = [f"{c['mean']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]" for c in contrast.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Run what is not finished yet, print the tables, check the targets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_loop"), help="folder of finished runs")
    parser.add_argument("--seed", type=int, default=0, help="first replicate")
    parser.add_argument("--seeds", type=int, default=10, help="replicates")
    parser.add_argument("--null-seeds", type=int, default=10, help="replicates of the null preset")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--screening",
        type=int,
        default=NUM_SCREENING_RUNS,
        help="runs behind the near-oracle; 0 leaves it out",
    )
    parser.add_argument("--test-seed", type=int, default=FRESH_TEST_SEED)
    parser.add_argument("--presets", nargs="+", default=["harm_low_deficit", "null"], choices=PRESETS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--override", nargs="*", default=[], help="configuration overrides for every replicate"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="2 replicates of a small world; figures mean nothing"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    options = parser.parse_args()
    if options.quick:
        options.seeds = options.null_seeds = options.rounds = 2
        options.override = [*options.override, *QUICK]
        options.screening = 8
    results = run_all(options)
    summaries = {preset: summarise(rows) for preset, rows in results.items()}
    print(markdown(summaries, options))
    if options.json:
        record = {
            "date": date.today().isoformat(),
            **surroundings("torch", "numpy"),
            "options": {key: str(value) for key, value in vars(options).items()},
            "summaries": summaries,
            "replicates": results,
        }
        options.json.write_text(json.dumps(record, indent=1))
    lines = missed(summaries)
    print("\n".join(lines) if lines else "all targets met")
    return 1 if options.check and lines else 0


QUICK = (
    "world.num_real=150",
    "world.num_synthetic=1200",
    "world.num_dev_per_family=6",
    "world.num_test_per_family=6",
    "representation.num_steps=30",
    "planner.num_steps=40",
    "clusters.num_coarse=6",
    "clusters.min_dev_scenes=4",
    "loop.budget=150",
)


def run_all(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run pools, screening and replicates over processes; everything finished before is kept."""
    for preset in options.presets:  # pools first: processes share them
        open_inputs(base_config(preset, options.seed, options), options.out / "pools")
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as executor:
        for preset in options.presets:
            if preset == "null" or options.screening == 0 or screening_file(options.out, preset).exists():
                continue
            parts, share = options.processes, options.screening // options.processes
            jobs = [executor.submit(screen, preset, part, share, options) for part in range(parts)]
            fit_near_oracle(preset, [run for job in jobs for run in job.result()], options)
        waiting = {preset: _submit(executor, preset, options) for preset in options.presets}
        return {preset: [row for job in jobs for row in job.result()] for preset, jobs in waiting.items()}


def _submit(executor: ProcessPoolExecutor, preset: str, options: argparse.Namespace) -> list[Future[Any]]:
    count = options.null_seeds if preset == "null" else options.seeds
    seeds = list(range(options.seed, options.seed + count))
    parts = [seeds[part :: options.processes] for part in range(options.processes)]
    return [
        executor.submit(replicates, preset, part, number, options)
        for number, part in enumerate(parts)
        if part
    ]


if __name__ == "__main__":
    sys.exit(main())
