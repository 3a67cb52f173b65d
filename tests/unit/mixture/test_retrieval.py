"""Retrieval: lazy greedy against brute force, nesting, caps, duplicates, what goes to others, shortlists."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.config import RetrievalConfig
from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture import greedy, similarity
from autoscale_ray.mixture import retrieval as module

PLAIN = RetrievalConfig(random_share=0.0, duplicate_cosine=1.0, gap_weight=0.0)


def _unit(rng: np.random.Generator, num: int, size: int = 6) -> np.ndarray:
    return similarity.normalised(rng.standard_normal((num, size)))


def _pool(num: int, seed: int = 0, **columns) -> module.Candidates:
    rng = np.random.default_rng(seed)
    ids = np.array([f"s{index:05d}" for index in rng.permutation(num)])
    return module.make_candidates(ids, _unit(rng, num), **columns)


def _queries(num: int, seed: int = 1) -> module.Queries:
    rng = np.random.default_rng(seed)
    return module.Queries(embeddings_ED=_unit(rng, num), weights_E=rng.random(num) + 0.05)


def _one_cluster(pool, queries, config, count, seed=0):
    labels = np.full(len(pool.scene_ids_N), "c00")
    wanted = {"c00": queries} if queries is not None else {}
    return _choose(pool, labels, wanted, {"c00": count}, config, seed)["c00"]


def _choose(pool, labels, queries, counts, config, seed=0):
    return module.Search(pool, labels, queries, counts, config, seed).choose(counts)


def _brute_force(pool, queries, config, count) -> list[str]:
    """Full greedy in float64 from the definitions: every gain of every scene at every step."""
    order = np.argsort(pool.scene_ids_N)
    scenes = pool.embeddings_ND[order].astype(np.float64)
    cosine_EN = queries.embeddings_ED.astype(np.float64) @ scenes.T
    shares = queries.weights_E / queries.weights_E.sum()
    beta = 1.0 if config.method == "mmr" else config.similarity_weight
    value_N = beta * shares @ cosine_EN - config.gap_weight * pool.gap_N[order]
    value_N = value_N + config.quality_weight * pool.quality_N[order]

    def objective(chosen: list[int]) -> float:
        if config.method == "mmr":
            raise AssertionError("mmr has no set function")
        covered = np.maximum(cosine_EN[:, chosen].max(axis=1), 0) if chosen else np.zeros(len(shares))
        return float(len(shares) * shares @ covered + value_N[chosen].sum())

    chosen: list[int] = []
    banned: set[int] = set()
    while len(chosen) < min(count, len(scenes)):
        best, best_gain = -1, -np.inf
        for row in range(len(scenes)):
            likeness = max((scenes[row] @ scenes[other] for other in chosen), default=0.0)
            if likeness > config.duplicate_cosine + 1e-7:
                banned.add(row)
            if row in chosen or row in banned:
                continue
            if config.method == "mmr":
                gain = config.mmr_relevance * value_N[row] - (1 - config.mmr_relevance) * max(likeness, 0.0)
            else:
                gain = objective([*chosen, row]) - objective(chosen)
            if gain > best_gain + 1e-12:
                best, best_gain = row, gain
        if best < 0:
            break
        chosen.append(best)
    return pool.scene_ids_N[order[chosen]].tolist()


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num=st.integers(1, 24),
    num_queries=st.integers(1, 6),
    method=st.sampled_from(["facility_location", "mmr"]),
    duplicate_cosine=st.sampled_from([0.6, 0.9, 1.0]),
    similarity_weight=st.sampled_from([0.0, 1.0]),
)
def test_lazy_greedy_equals_brute_force(seed, num, num_queries, method, duplicate_cosine, similarity_weight):
    rng = np.random.default_rng(seed)
    pool = _pool(num, seed, quality_N=rng.random(num))
    config = RetrievalConfig(
        method=method,
        random_share=0.0,
        duplicate_cosine=duplicate_cosine,
        similarity_weight=similarity_weight,
        quality_weight=0.3,
    )
    queries = _queries(num_queries, seed + 1)
    ours = _one_cluster(pool, queries, config, num)
    assert list(ours) == _brute_force(pool, queries, config, num)


def test_the_search_that_is_loaded_early_is_the_one_that_is_used():
    pytest.importorskip("numba")
    program = """
import numpy as np
from autoscale_ray.config import RetrievalConfig
from autoscale_ray.mixture import kernels, retrieval
from autoscale_ray.mixture.greedy import load_search
load_search()
before = kernels.settle_first.signatures
unit_ND = np.eye(4, dtype=np.float32)
queries = retrieval.Queries(embeddings_ED=unit_ND[:3], weights_E=np.ones(3))
pool = retrieval.make_candidates(np.array(["a", "b", "c", "d"]), unit_ND)
config = RetrievalConfig(random_share=0.0)
retrieval.Search(pool, np.full(4, "c0"), {"c0": queries}, ["c0"], config, 0).choose({"c0": 3})
print(len(before), kernels.settle_first.signatures == before)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "1 True"


def _crowded(seed: int, num: int) -> module.Candidates:
    """Return scenes of which a third are copies of others, and a third differ from others in their last bits only."""
    rng = np.random.default_rng(seed)
    scenes = _unit(rng, num, 16)
    scenes[num // 3 : 2 * (num // 3)] = scenes[: num // 3]
    nearly = scenes[: num - 2 * (num // 3)]
    scenes[2 * (num // 3) :] = np.nextafter(nearly, rng.choice([-2, 2], nearly.shape).astype(np.float32))
    origins = np.array([f"o{group}" if group else "" for group in rng.integers(0, 4, num)])
    ids = np.array([f"s{index:05d}" for index in rng.permutation(num)])
    return module.make_candidates(ids, scenes, origin_ids=origins)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num=st.integers(1, 160),
    num_queries=st.sampled_from([1, 2, 7, 33]),
    duplicate_cosine=st.sampled_from([0.5, 0.97, 1.0]),
    share=st.sampled_from([0.0, 0.2, 0.5]),
    max_per_origin=st.sampled_from([1, 2, 1000]),
    equal_weights=st.booleans(),
    similarity_weight=st.sampled_from([0.0, 1.0]),
)
def test_the_compiled_search_chooses_what_the_plain_one_does(
    seed, num, num_queries, duplicate_cosine, share, max_per_origin, equal_weights, similarity_weight
):
    """Ties, copies and gains that differ by rounding alone: the choice is the same in every place."""
    pytest.importorskip("numba")
    queries = module.Queries(
        embeddings_ED=_unit(np.random.default_rng(seed + 1), num_queries, 16),
        weights_E=np.ones(num_queries) if equal_weights else _queries(num_queries, seed).weights_E,
    )
    config = RetrievalConfig(
        random_share=share,
        duplicate_cosine=duplicate_cosine,
        max_per_origin=max_per_origin,
        similarity_weight=similarity_weight,
    )
    pool = _crowded(seed, num)
    compiled = _one_cluster(pool, queries, config, num, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "has_numba", lambda: False)
        plain = _one_cluster(pool, queries, config, num, seed)
    assert compiled == plain


def test_a_cluster_with_too_many_cosines_to_hold_is_searched_without_them(monkeypatch):
    pool, queries = _pool(60), _queries(4)
    usual = _one_cluster(pool, queries, PLAIN, 20)
    monkeypatch.setattr(greedy, "MAX_COSINES", 200)
    monkeypatch.setattr(greedy, "_lazily_compiled", None)
    assert _one_cluster(pool, queries, PLAIN, 20) == usual


def test_a_gain_lies_in_its_interval_however_it_is_summed():
    kernels = pytest.importorskip("autoscale_ray.mixture.kernels")
    rng = np.random.default_rng(0)
    for _ in range(500):
        cosine_E = rng.uniform(-1, 1, 257).astype(np.float32)
        covered_E, weights_E = rng.random((2, 257)).astype(np.float32)
        moved_E = cosine_E + np.float32(1e-5) * rng.uniform(-1, 1, 257).astype(np.float32)
        exact = weights_E.astype(float) @ np.maximum(moved_E.astype(float) - covered_E, 0)
        low, high = kernels.gain_interval(cosine_E, covered_E, weights_E, np.float32(1.1e-5), 5e-5)
        assert low <= exact <= high
        assert high - low < 0.005


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    short=st.integers(0, 60),
    more=st.integers(0, 60),
    method=st.sampled_from(["facility_location", "mmr", "random"]),
    share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_a_shorter_selection_is_a_prefix_of_a_longer_one(short, more, method, share):
    origins = np.array([f"o{index % 30}" if index % 3 else "" for index in range(90)])
    pool, queries = _pool(90, origin_ids=origins), _queries(7)
    config = RetrievalConfig(method=method, random_share=share, duplicate_cosine=0.8)
    first = _one_cluster(pool, queries, config, short)
    second = _one_cluster(pool, queries, config, short + more)
    assert second[: len(first)] == first


@pytest.mark.parametrize("kept", [0, module.MAX_FLOATS_KEPT])
@pytest.mark.parametrize("method", ["facility_location", "mmr", "random"])
def test_a_search_that_goes_on_finds_what_a_new_one_does(method, kept, monkeypatch):
    monkeypatch.setattr(module, "MAX_FLOATS_KEPT", kept)
    pool, labels = _pool(240), np.array(["c00", "c01"] * 120)
    queries = {"c00": _queries(6), "c01": _queries(4)}
    config = RetrievalConfig(method=method, max_candidates=100)
    search = module.Search(pool, labels, queries, ("c00", "c01"), config, 0)
    for counts in ({"c00": 20, "c01": 30}, {"c00": 12, "c01": 45}, {"c00": 55, "c01": 120}):
        assert search.choose(counts) == _choose(pool, labels, queries, counts, config, 0)


def test_a_search_that_is_kept_does_not_begin_anew(monkeypatch):
    begun = []
    monkeypatch.setattr(module, "shortlist", lambda *given: begun.append(given) or given[1])
    search = module.Search(_pool(60), np.full(60, "c00"), {"c00": _queries(4)}, ["c00"], PLAIN, 0)
    assert [len(search.choose({"c00": count})["c00"]) for count in (5, 25, 15, 40)] == [
        5,
        25,
        15,
        40,
    ]
    assert len(begun) == 1


@pytest.mark.parametrize("method", ["facility_location", "mmr", "random"])
def test_row_order_changes_nothing(method):
    pool, queries = _pool(80), _queries(5)
    shuffled = pool.take(np.random.default_rng(3).permutation(80))
    config = RetrievalConfig(method=method)
    assert _one_cluster(pool, queries, config, 30) == _one_cluster(shuffled, queries, config, 30)


def test_one_perfect_scene_for_each_query_is_found_first():
    queries = module.Queries(embeddings_ED=np.eye(4, dtype=np.float32), weights_E=np.array([8.0, 4, 2, 1]))
    scenes = np.concatenate([np.eye(4), similarity.normalised(np.ones((1, 4)) - 2 * np.eye(1, 4))])
    pool = module.make_candidates(np.array(["d", "c", "b", "a", "z"]), scenes.astype(np.float32))
    ids = _one_cluster(pool, queries, PLAIN, 4)
    assert ids == ("d", "c", "b", "a")  # the heaviest query first, every one covered


def test_scenes_that_add_nothing_are_spread_over_all_logs():
    """One query, covered by the first scene: the names of the others, by log and time, decide nothing."""
    scenes = np.tile(np.eye(1, 4, dtype=np.float32), (400, 1))
    names = np.array([f"log{number // 20:02d}-{number % 20:02d}" for number in range(400)])
    queries = module.Queries(embeddings_ED=np.eye(1, 4, dtype=np.float32), weights_E=np.ones(1))
    chosen = _one_cluster(module.make_candidates(names, scenes), queries, PLAIN, 40)
    assert len({name[:5] for name in chosen}) > 12  # 40 of 400 drawn at random are of 17.6 of 20 logs
    order = np.random.default_rng(0).permutation(400)
    assert _one_cluster(module.make_candidates(names[order], scenes), queries, PLAIN, 40) == chosen


def test_near_duplicates_are_left_out_and_reported():
    scenes = _unit(np.random.default_rng(0), 10)
    close = similarity.normalised(scenes + 1e-3)
    pool = module.make_candidates(np.array([f"s{i:02d}" for i in range(20)]), np.concatenate([scenes, close]))
    result = _one_cluster(pool, _queries(3), RetrievalConfig(), 20)
    chosen = np.isin(pool.scene_ids_N, result)
    assert (chosen[:10].astype(int) + chosen[10:] == 1).all()
    assert len(result) == 10


def test_of_one_origin_a_cluster_gives_its_best():
    origins = np.array(["same"] * 8 + [""] * 8)
    pool, queries = _pool(16, origin_ids=origins), _queries(4)
    labels = np.array(["c00", "c01"] * 8)
    result = _choose(pool, labels, {"c00": queries, "c01": queries}, {"c00": 8, "c01": 8}, PLAIN, 0)
    chosen = [name for ids in result.values() for name in ids]
    worth = module.scene_values(pool, queries, PLAIN)[:8]
    is_same = np.isin(pool.scene_ids_N[:8], chosen)
    best = {2 * row + first for first in (0, 1) for row in np.argsort(-worth[first::2])[:2].tolist()}
    assert set(np.flatnonzero(is_same).tolist()) == best
    assert len(chosen) == 12
    assert np.isin(pool.scene_ids_N[8:], chosen).all()


def test_what_a_cluster_can_give_is_known_before():
    """Outliers and origins make a large cluster small; duplicates are found only when they are met."""
    rng = np.random.default_rng(0)
    scenes = _unit(rng, 90)
    scenes[70:80] = scenes[60:70]
    origins = np.array([f"o{row // 10}" if row < 40 else "" for row in range(90)])
    pool = module.make_candidates(np.array([f"s{row:02d}" for row in range(90)]), scenes, origin_ids=origins)
    pool = dataclasses.replace(pool, is_outlier_N=np.arange(90) >= 88, gap_N=np.arange(90) / 100.0)
    labels = np.array(["c00"] * 40 + ["c01"] * 20 + ["c02"] * 30)
    names = ["c00", "c01", "c02", "c03"]
    counts = module.deliverable(pool, labels, names, RetrievalConfig())
    assert counts == {"c00": 8, "c01": 20, "c02": 28, "c03": 0}
    given = _choose(pool, labels, {}, dict.fromkeys(names, 99), RetrievalConfig())
    assert {name: len(ids) for name, ids in given.items()} == {**counts, "c02": 18}
    alike = module.deliverable(pool, labels, names, RetrievalConfig(method="random"))
    assert alike == {"c00": 40, "c01": 20, "c02": 30, "c03": 0}


def test_a_large_cluster_without_queries_is_a_plain_sample():
    pool = _pool(300)
    config = RetrievalConfig(duplicate_cosine=1.0, max_candidates=60)
    sample = _one_cluster(pool, None, RetrievalConfig(method="random"), 30)
    assert _one_cluster(pool, None, config, 30) == sample


@pytest.mark.parametrize(("share", "places"), [(0.2, [4, 9, 14]), (0.5, [1, 3, 5]), (0.0, [])])
def test_random_share_takes_its_places(share, places):
    pool, queries = _pool(400), _queries(6)
    config = RetrievalConfig(random_share=share, duplicate_cosine=1.0)
    mixed = _one_cluster(pool, queries, config, 15, seed=5)
    at_random = _choose(pool, np.full(400, "c00"), {}, {"c00": 15}, RetrievalConfig(method="random"), 5)[
        "c00"
    ]
    assert [mixed[place] for place in places[:3]] == list(at_random[: len(places)])


def test_a_random_place_never_depends_on_the_other_candidates():
    ids = np.array([f"s{index}" for index in range(50)])
    whole = ids[module.random_order(ids, 3)].tolist()
    part = ids[10:40]
    assert part[module.random_order(part, 3)].tolist() == [name for name in whole if name in set(part)]
    assert whole != ids[module.random_order(ids, 4)].tolist()


def test_cluster_without_queries_is_drawn_at_random():
    pool = _pool(60)
    chosen = _one_cluster(pool, None, RetrievalConfig(duplicate_cosine=1.0), 20)
    sample = _one_cluster(pool, None, RetrievalConfig(method="random"), 20)
    assert chosen == sample


def test_what_a_cluster_lacks_goes_to_those_that_have_more():
    """c00 has 4 of its 20, c01 all but its near-copies, c02 was not asked; the rest is taken from c03."""
    rng = np.random.default_rng(0)
    scenes = _unit(rng, 100)
    scenes[24:44] = scenes[4:24]
    labels = np.array(["c00"] * 4 + ["c01"] * 40 + ["c02"] * 6 + ["c03"] * 50)
    pool = module.make_candidates(np.array([f"s{i:03d}" for i in range(100)]), scenes)
    queries = {name: _queries(4, seed) for seed, name in enumerate(["c00", "c01", "c02", "c03"])}
    config = RetrievalConfig(max_candidates=60)
    search = module.Search(pool, labels, queries, queries, config, 0)
    given = search.deliver({"c00": 20, "c01": 18, "c02": 0, "c03": 18})
    assert {name: len(ids) for name, ids in given.items()} == {"c00": 4, "c01": 20, "c02": 0, "c03": 32}
    assert given == _choose(
        pool, labels, queries, {name: len(ids) for name, ids in given.items()}, search._config
    )
    everything = search.deliver({"c00": 40, "c01": 40, "c02": 40, "c03": 40})
    assert {name: len(ids) for name, ids in everything.items()} == {"c00": 4, "c01": 20, "c02": 6, "c03": 50}


def test_a_cluster_that_falls_short_of_its_shortlist_keeps_what_it_gave():
    """Asked for less a second time, a large cluster would be searched on a smaller shortlist and give less again."""
    rng = np.random.default_rng(0)
    scenes = _unit(rng, 400)
    scenes[100:300] = scenes[:1]
    labels = np.array(["c00"] * 300 + ["c01"] * 100)
    pool = module.make_candidates(np.array([f"s{i:03d}" for i in rng.permutation(400)]), scenes)
    queries = {"c00": _queries(6), "c01": _queries(6, 2)}
    search = module.Search(pool, labels, queries, queries, RetrievalConfig(max_candidates=40), 0)
    first = search.choose({"c00": 110})["c00"]
    assert 20 < len(first) < 110
    given = search.deliver({"c00": 110, "c01": 20})
    assert given["c00"] == first
    assert len(given["c01"]) == min(100, 130 - len(first))


@pytest.mark.parametrize("has_numba", [True, False])
def test_a_cluster_that_is_empty_gives_nothing(has_numba, monkeypatch):
    if not has_numba:
        monkeypatch.setattr(greedy, "has_numba", lambda: False)
    pool = _pool(3)
    queries = dict.fromkeys(["c00", "c01", "c02"], _queries(2))
    config = RetrievalConfig(duplicate_cosine=1.0)
    search = module.Search(pool, np.array(["c00", "c00", "c01"]), queries, queries, config, 0)
    assert search.choose({"c02": 3}) == {"c02": ()}
    assert {name: len(ids) for name, ids in search.deliver({"c00": 1, "c02": 2}).items()} == {
        "c00": 2,
        "c02": 0,
    }


def test_exhausted_empty_and_unasked_clusters():
    pool, queries = _pool(10), _queries(3)
    labels = np.array(["c00"] * 4 + ["c02"] * 6)
    counts = {"c00": 7, "c01": 2, "c02": 0}
    result = _choose(pool, labels, {"c00": queries}, counts, PLAIN, 0)
    assert {name: len(ids) for name, ids in result.items()} == {"c00": 4, "c01": 0, "c02": 0}


def test_one_cluster_never_depends_on_the_count_of_another():
    pool, queries = _pool(60, origin_ids=np.array([f"o{i % 9}" for i in range(60)])), _queries(4)
    labels = np.array(["c00", "c01", "c02"] * 20)
    wanted = dict.fromkeys(("c00", "c01", "c02"), queries)
    few, many = (
        _choose(pool, labels, wanted, {"c00": 5, "c01": count, "c02": 5}, RetrievalConfig(), 0)
        for count in (1, 20)
    )
    assert few["c00"] == many["c00"]
    assert few["c02"] == many["c02"]


def test_gap_is_paid_and_outliers_are_dropped_up_to_a_share():
    rng = np.random.default_rng(0)
    scenes = _unit(rng, 40)
    pool = module.make_candidates(np.array([f"s{i:02d}" for i in range(40)]), scenes)
    gap = np.zeros(40)
    gap[:20] = np.arange(20, 0, -1)
    pool = module.Candidates(
        **{n: getattr(pool, n) for n in ("scene_ids_N", "origin_ids_N", "embeddings_ND", "quality_N")},
        gap_N=gap,
        is_outlier_N=gap > 2.5,
    )
    config = RetrievalConfig(duplicate_cosine=1.0, max_dropped_share=0.25)
    chosen = set(_one_cluster(pool, _queries(4), config, 40))
    assert chosen == {f"s{i:02d}" for i in range(10, 40)}  # 18 outliers, at most 10 dropped: the worst ten
    greedy = RetrievalConfig(duplicate_cosine=1.0, max_dropped_share=0.0, gap_weight=100.0, random_share=0.0)
    assert set(_one_cluster(pool, _queries(4), greedy, 20)) == {f"s{i}" for i in range(20, 40)}


def test_shipped_quality_changes_nothing_by_default():
    queries = _queries(4)
    plain = _one_cluster(_pool(50), queries, RetrievalConfig(), 20)
    rated = _one_cluster(
        _pool(50, quality_N=np.random.default_rng(9).random(50)), queries, RetrievalConfig(), 20
    )
    assert plain == rated


def test_unknown_quality_counts_as_the_mean():
    quality = np.array([0.2, np.nan, 0.6])
    pool = module.make_candidates(
        np.array(["a", "b", "c"]), _unit(np.random.default_rng(0), 3), quality_N=quality
    )
    assert pool.quality_N == pytest.approx([0.2, 0.4, 0.6], abs=1e-12)


def test_shortlist_holds_the_best_neighbours_and_values(tmp_path):
    pool, queries = _pool(3000), _queries(8)
    np.save(tmp_path / "embeddings.npy", pool.embeddings_ND)
    mapped = module.Candidates(
        **{name: getattr(pool, name) for name in pool.__slots__ if name != "embeddings_ND"},
        embeddings_ND=np.load(tmp_path / "embeddings.npy", mmap_mode="r"),
    )
    rows = np.argsort(mapped.scene_ids_N)
    config = RetrievalConfig(max_candidates=240)
    kept = module.shortlist(mapped, rows, queries, config, 0, 40)
    assert 80 < len(kept) <= 240
    nearest = np.argsort(-(queries.embeddings_ED @ pool.embeddings_ND.T), axis=1)[:, :10]
    assert np.isin(nearest, kept).all()
    values = module.scene_values(pool, queries, config)
    assert np.isin(np.argsort(-values)[:80], kept).all()
    assert len(_one_cluster(mapped, queries, config, 150)) == 150


def test_shortlisted_selections_nest():
    pool, queries = _pool(2000), _queries(5)
    config = RetrievalConfig(max_candidates=200)
    short, long = (_one_cluster(pool, queries, config, count) for count in (30, 100))
    assert long[:30] == short


def test_selections_repeat_and_follow_the_seed():
    pool, queries = _pool(200), _queries(5)
    first, again, other = (_one_cluster(pool, queries, RetrievalConfig(), 60, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_bad_input_is_refused_in_one_line():
    pool = _pool(5)
    with pytest.raises(InvalidInputError, match="must be >= 0"):
        _one_cluster(pool, None, PLAIN, -1)
    with pytest.raises(InvalidInputError, match="must name clusters of the search \\(found 'c07'"):
        module.Search(pool, np.full(5, "c00"), {}, ["c00"], PLAIN, 0).choose({"c07": 1})
    with pytest.raises(InvalidInputError, match="unique"):
        module.make_candidates(np.array(["a", "a"]), pool.embeddings_ND[:2])


def test_query_weights_are_the_lacks():
    assert module.query_weights(np.array([0.4, 0.8, np.nan])) == pytest.approx([0.75, 0.25, 0.0], abs=1e-12)


def test_query_weights_without_lack_or_knowledge():
    assert module.query_weights(np.array([1.0, 1.0, np.nan])) == pytest.approx([0.5, 0.5, 0.0])
    assert module.query_weights(np.full(3, np.nan)) == pytest.approx([0.0] * 3)
