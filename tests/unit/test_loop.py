"""The loop on stages whose response to scenes is a known formula: what it asks for, and that it finds the optimum."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from autoscale_ray.config import AscentConfig, LoopConfig, RunConfig
from autoscale_ray.loop import compare, run
from autoscale_ray.records import Clusters, Embeddings, Planners, Round, Scores, Selection

NAMES = tuple("abcd")
GAIN_K = np.array([0.30, 0.05, 0.0, -0.25])
"""Score that cluster k gains from endless scenes of its own; the last one is harmful."""


class FormulaStages:
    """Stages in which training is a formula: y_k = 0.5 + gain_k (1 - exp(-n_k / 30)), no noise."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, tuple[int, ...]]] = []
        self.published: list[int] = []
        self.counts: dict[str, Mapping[str, int]] = {}

    def embed(self) -> Embeddings:
        return Embeddings(fingerprint="e", files={})

    def cluster(self, embeddings: Embeddings) -> Clusters:
        return Clusters(
            fingerprint="c",
            cluster_ids=NAMES,
            pool_sizes_K=np.array([500, 500, 500, 500]),
            deliverable_K=np.array([500, 500, 500, 500]),
            real_counts_K=np.array([10, 10, 10, 10]),
            dev_counts_K=np.array([400, 400, 400, 400]),
            dev_weights_K=np.full(4, 0.25),
            descriptors_KD=np.eye(4),
            files={},
        )

    def retrieve(self, clusters, counts, guide, *, how=None) -> Selection:
        full = {name: int(counts.get(name, 0)) for name in NAMES}
        key = repr(full)
        self.counts[key] = full
        return Selection(fingerprint=key, counts=full, file=Path())

    def train(
        self, selection: Selection, seeds: tuple[int, ...], *, start: Planners | None = None
    ) -> Planners:
        self.trained.append((selection.num_scenes, seeds))
        return Planners(fingerprints=(selection.fingerprint,), seeds=seeds, directories=())

    def evaluate(self, planners: Planners, clusters: Clusters, side: str) -> Scores:
        counts_K = np.array([self.counts[planners.fingerprint][name] for name in NAMES])
        scores_K = 0.5 + GAIN_K * (1 - np.exp(-counts_K / 30))
        total = float(scores_K.mean())
        totals = {"objective": total, "epdms": total, "pdms": total, "miou": float("nan")}
        return Scores(
            fingerprint=planners.fingerprint + side,
            side=side,
            seeds=planners.seeds,
            cluster_scores_K=scores_K,
            cluster_se_K=np.full(4, 0.005),
            totals=totals,
            error_unit="log",
            total_se=dict.fromkeys(totals, 0.0025),
            seed_totals={name: (value,) for name, value in totals.items()},
            num_unscored=0,
            file=Path(),
        )

    def published_weights(self, clusters: Clusters, index: int) -> dict[str, float] | None:
        return None

    def publish(self, clusters: Clusters, history: tuple[Round, ...]) -> None:
        self.published.append(history[-1].index)


def config(**loop) -> RunConfig:
    return RunConfig(loop=LoopConfig(**{"budget": 200, "num_rounds": 6, **loop}), ascent=AscentConfig())


def test_rounds_are_published_in_order_and_seeds_never_repeat():
    stages = FormulaStages()
    _, history, final = run(config(seeds_per_round=2), stages)
    assert stages.published == list(range(7))
    assert [done.index for done in history] == list(range(7))
    assert history[0].selection.num_scenes == 0
    assert all(done.selection.num_scenes == 200 for done in history[1:])
    seeds = [seed for _, row in stages.trained for seed in row]
    assert len(seeds) == 14
    assert len(set(seeds)) == 14
    assert sum(final.values()) == 200


def test_the_recommended_mixture_is_near_the_optimum():
    stages = FormulaStages()
    _, _, final = run(config(), stages)
    final_K = np.array([final[name] for name in NAMES])

    def value(counts_K: np.ndarray) -> float:
        return (GAIN_K * (1 - np.exp(-counts_K / 30))).mean()

    best = max(
        value(np.array([a, b, c, 200 - a - b - c]))
        for a in range(0, 201, 5)
        for b in range(0, 201 - a, 5)
        for c in range(0, 201 - a - b, 5)
    )
    uniform = value(np.full(4, 50))
    assert (best - value(final_K)) / (best - uniform) < 0.15
    assert final["d"] <= 8


def test_a_method_plays_no_round_that_it_cannot_use():
    stages = FormulaStages()
    _, history, final = run(dataclasses.replace(config(), ascent=AscentConfig(method="uniform")), stages)
    assert [done.index for done in history] == [0]
    assert final == dict.fromkeys(NAMES, 50)


def test_the_mixture_keeps_to_what_retrieval_can_choose_and_random_arms_do_not():
    """b would be given most; what it cannot give goes where it is worth most, not in proportion to what others got."""

    class Capped(FormulaStages):
        def cluster(self, embeddings: Embeddings) -> Clusters:
            return dataclasses.replace(
                super().cluster(embeddings), deliverable_K=np.array([20, 20, 300, 300])
            )

    stages = Capped()
    clusters, history, final = run(config(), stages)
    assert max(final["a"], final["b"]) <= 20
    assert all(done.selection.counts["a"] <= 20 for done in history)
    assert sum(final.values()) == 200
    arms = compare(config(baselines=("uniform", "union")), stages, clusters, history, final)
    assert [arm.selection.counts["a"] for arm in arms] == [50, 500, final["a"]]


def test_more_rounds_continue_the_same_history():
    short, long = FormulaStages(), FormulaStages()
    _, three, _ = run(config(num_rounds=3), short)
    _, five, _ = run(config(num_rounds=5), long)
    for before, after in zip(three, five, strict=False):
        assert before.weights == after.weights
        assert before.selection.counts == after.selection.counts


def test_a_search_stops_early_only_where_asked_and_where_nothing_is_left_to_gain(monkeypatch):
    monkeypatch.setitem(globals(), "GAIN_K", 4 * GAIN_K)
    _, improving, found = run(config(num_rounds=12, stop_early=True), FormulaStages())
    assert len(improving) == 7, "after two pairs there was more to gain than a run can err"
    _, _, searched_on = run(config(num_rounds=12), FormulaStages())
    assert sum(abs(found[name] - searched_on[name]) for name in NAMES) <= 20, "stopped at the optimum"
    monkeypatch.setitem(globals(), "GAIN_K", np.zeros(4))
    _, stopped, final = run(config(num_rounds=12, stop_early=True), FormulaStages())
    assert len(stopped) == 5, "two pairs after the real-only round"
    assert sum(final.values()) == 200
    _, whole, _ = run(config(num_rounds=12), FormulaStages())
    assert len(whole) == 13
    for early, late in zip(stopped, whole, strict=False):
        assert early.selection.counts == late.selection.counts


def test_zero_rounds_still_recommend_a_mixture():
    _, history, final = run(config(num_rounds=0), FormulaStages())
    assert len(history) == 1
    assert sum(final.values()) == 200


def test_budget_beyond_the_pool_takes_all():
    _, history, final = run(config(budget=10_000, num_rounds=2), FormulaStages())
    assert final == dict.fromkeys(NAMES, 500)
    assert history[1].selection.num_scenes == 2000


def test_arms_have_equal_budgets_and_share_seeds():
    stages = FormulaStages()
    settings = config(final_seeds=3)
    clusters, history, final = run(settings, stages)
    stages.trained.clear()
    arms = {arm.name: arm for arm in compare(settings, stages, clusters, history, final)}
    assert {name: arm.selection.num_scenes for name, arm in arms.items()} == {
        "real_only": 0,
        "vanilla": 200,
        "union": 2000,
        "uniform": 200,
        "autoscale": 200,
    }
    assert len({seeds for _, seeds in stages.trained}) == 1
    assert all(arm.scores.side == "test" for arm in arms.values())
    assert dataclasses.asdict(arms["autoscale"].selection)["counts"] == final


@pytest.mark.parametrize("method", ["response", "deficit"])
def test_replay_gives_the_same_mixtures(method):
    settings = dataclasses.replace(config(), ascent=dataclasses.replace(AscentConfig(), method=method))
    first, second = run(settings, FormulaStages()), run(settings, FormulaStages())
    assert [done.weights for done in first[1]] == [done.weights for done in second[1]]
    assert first[2] == second[2]
