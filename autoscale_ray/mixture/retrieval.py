"""Choose scenes inside each cluster, once its count is known.

Formulae: docs/clusters_and_retrieval.md. A selection sees ids, origins, embeddings, the domain
probe and the shipped expert quality; there is no argument through which tags, families or other truth could
enter. Orders are nested, up to counts of half of `max_candidates`: the first n scenes of a longer selection are the
selection of n.

Legend: N candidates, D embedding size, E dev queries, T training runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from autoscale_ray.config import RetrievalConfig
from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture.allocation import spill
from autoscale_ray.mixture.greedy import CHUNK, METHODS, Chosen
from autoscale_ray.mixture.similarity import DomainProbe, Float32, Float64, Int64, nearest_in_stream

MAX_FLOATS_KEPT = 1 << 22
"""Numbers (16 MiB) up to which the search of a cluster is kept to go on with; a larger one begins anew for more."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """Scenes of the synthetic pool that may be chosen."""

    scene_ids_N: NDArray[np.str_]
    origin_ids_N: NDArray[np.str_]
    """Real scene that each one was made from; the empty string where there is none."""
    embeddings_ND: Float32
    """Unit rows (whitened); may be a memory map."""
    gap_N: Float64
    """Log-odds of being synthetic above the real 95 % quantile, >= 0; zeros without a probe."""
    is_outlier_N: NDArray[np.bool_]
    """Above the real 99.5 % quantile of the log-odds."""
    quality_N: Float64
    """Score of the pseudo-expert that drove the scene, in [0, 1]; unknown = mean of the known ones."""

    def take(self, rows: Int64) -> Candidates:
        """Return some of the candidates, in the order of `rows`."""
        return Candidates(**{name: getattr(self, name)[rows] for name in self.__slots__})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Queries:
    """Dev scenes of one cluster that want more training data."""

    embeddings_ED: Float32
    """Unit rows (whitened)."""
    weights_E: Float64
    """How much each wants it, >= 0; only ratios matter."""


def make_candidates(
    scene_ids: NDArray[np.str_],
    embeddings_ND: Float32,
    *,
    origin_ids: NDArray[np.str_] | None = None,
    probe: DomainProbe | None = None,
    quality_N: Float64 | None = None,
) -> Candidates:
    """Gather what a selection may see.

    Args:
        scene_ids: Unique names.
        embeddings_ND: Unit rows.
        origin_ids: Real source of each scene, empty where there is none; None = no scene has one.
        probe: Domain probe; None = no gap and no outlier.
        quality_N: Expert quality, NaN = unknown; None = unknown for all.

    Raises:
        InvalidInputError: Lengths differ or a name occurs twice.
    """
    ids_N = np.asarray(scene_ids, dtype=np.str_)
    if len(ids_N) != len(embeddings_ND) or len(np.unique(ids_N)) != len(ids_N):
        raise InvalidInputError("candidates", "scene_ids must be unique, one for each embedding", len(ids_N))
    odds_N = np.full(len(ids_N), -np.inf) if probe is None else probe.log_odds(embeddings_ND)
    known = np.full(len(ids_N), np.nan) if quality_N is None else np.asarray(quality_N, dtype=np.float64)
    mean_quality = known[np.isfinite(known)].mean() if np.isfinite(known).any() else 0.0
    return Candidates(
        scene_ids_N=ids_N,
        origin_ids_N=np.full(len(ids_N), "") if origin_ids is None else np.asarray(origin_ids, dtype=np.str_),
        embeddings_ND=embeddings_ND,
        gap_N=np.zeros(len(ids_N)) if probe is None else np.maximum(odds_N - probe.free_to, 0.0),
        is_outlier_N=odds_N > (np.inf if probe is None else probe.kept_to),
        quality_N=np.where(np.isfinite(known), known, mean_quality),
    )


def query_weights(scores_E: Float64) -> Float64:
    """Weigh dev scenes by what they lack: q_e ~ 1 - s_e.

    Args:
        scores_E: Scene scores in [0, 1]; NaN = unknown, or known to be wrong, gets no weight.

    Returns:
        Weights E that sum to 1; uniform over the known where nothing is lacking, zeros where nothing is known.
    """
    known_E = np.isfinite(scores_E)
    lack_E = np.where(known_E, 1.0 - scores_E, 0.0)
    weight_E = lack_E if lack_E.sum() > 0 else known_E.astype(np.float64)
    return weight_E / max(weight_E.sum(), 1e-300)


def scene_values(
    candidates: Candidates, queries: Queries, config: RetrievalConfig, similarity_weight: float = 1.0
) -> Float64:
    """Return what a scene is worth by itself.

    value(x) = beta sum_e q_e sim(x, e) - kappa gap(x) + nu quality(x), q summing to 1
    (docs/clusters_and_retrieval.md, choosing inside a cluster).

    Args:
        candidates: Scenes.
        queries: Dev scenes of their cluster; may be none.
        config: kappa `gap_weight`, nu `quality_weight`.
        similarity_weight: beta; 1 where scenes are ranked one by one, without regard to the others.
    """
    merit_N = config.quality_weight * candidates.quality_N - config.gap_weight * candidates.gap_N
    if len(queries.weights_E) == 0:
        return merit_N
    mean_query_D = (queries.weights_E @ queries.embeddings_ED / queries.weights_E.sum()).astype(np.float32)
    return similarity_weight * (candidates.embeddings_ND @ mean_query_D).astype(np.float64) + merit_N


@dataclass(slots=True)
class _Found:
    """How far one cluster has been searched."""

    size: int
    """`shortlist_size` of the search."""
    scene_ids: list[str]
    more: Iterator[str] | None
    """What comes next; None where it would take too much memory to keep."""


TIES = 1
"""Added to the seed for the order among equals, which is another one than that of the random share."""


class Search:
    """A search for scenes in every cluster that goes on where it stopped when more are wanted.

    The method `random` is a plain sample. The others leave out outliers of the domain probe, scenes of a cluster
    beyond `max_per_origin`, and near-duplicates of chosen scenes. Clusters of more than `max_candidates` scenes are
    read in chunks and cut to a shortlist first.

    Args:
        candidates: The synthetic pool.
        cluster_of_N: Cluster id of each candidate.
        queries: Dev scenes by cluster id; a cluster without any is drawn at random.
        names: Clusters that may be chosen from.
        config: Method and its constants.
        seed: Seed of the random share; the same seed nests selections of different counts.

    Raises:
        InvalidInputError: An unknown method.
    """

    def __init__(
        self,
        candidates: Candidates,
        cluster_of_N: NDArray[np.str_],
        queries: Mapping[str, Queries],
        names: Iterable[str],
        config: RetrievalConfig,
        seed: int,
    ) -> None:
        if config.method not in ("random", *METHODS):
            raise InvalidInputError(
                "retrieval.method", f"must be random or one of {sorted(METHODS)}", config.method
            )
        self._candidates, self._config, self._seed = candidates, config, seed
        members = _members(candidates, cluster_of_N, names, config)
        self._queries = {
            name: _strongest(queries.get(name), config.max_queries, candidates) for name in members
        }
        if config.method != "random":
            members = {
                name: _capped_per_origin(candidates, rows, self._queries[name], config)
                for name, rows in members.items()
            }
        self._members = members
        self._found: dict[str, _Found] = {}

    def deliver(self, counts: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """Choose scenes; what a cluster cannot deliver goes to those that can, in proportion to their counts.

        Less than asked for is chosen only where every cluster of a positive count has given what it has.

        Arguments, result and errors are those of `choose`.
        """
        chosen: dict[str, tuple[str, ...]] = {}
        wanted = dict(counts)
        while wanted:
            chosen |= self.choose(wanted)
            able = {name: count for name, count in wanted.items() if len(chosen[name]) == count}
            wanted = spill(able, sum(counts.values()) - sum(map(len, chosen.values())))
        return chosen

    def choose(self, counts: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """Choose scenes, fewer where a cluster has no more: exhausted, duplicate, capped or off the shortlist.

        Args:
            counts: Scenes wanted by cluster id, >= 0.

        Returns:
            Scenes by cluster id, best first.

        Raises:
            InvalidInputError: A negative count or an unknown cluster.
        """
        if any(count < 0 for count in counts.values()):
            raise InvalidInputError("counts", "must be >= 0", dict(counts))
        if unknown := sorted(counts.keys() - self._members.keys()):
            raise InvalidInputError("counts", "must name clusters of the search", unknown[0])
        return {name: self._first(name, count) for name, count in counts.items()}

    def _first(self, name: str, count: int) -> tuple[str, ...]:
        size = shortlist_size(len(self._members[name]), self._config, count)
        found = self._found.get(name)
        if found is None or found.size != size or (found.more is None and len(found.scene_ids) < count):
            found = self._found[name] = _Found(size, [], self._in_order(name, count))
        if found.more is not None:
            found.scene_ids.extend(itertools.islice(found.more, max(0, count - len(found.scene_ids))))
        row_size = len(self._queries[name].weights_E) + 2 * self._candidates.embeddings_ND.shape[1]
        if size * row_size > MAX_FLOATS_KEPT:
            found.more = None
        return tuple(found.scene_ids[:count])

    def _in_order(self, name: str, count: int) -> Iterator[str]:
        rows = self._members[name]
        if self._config.method == "random":
            scene_ids = self._candidates.scene_ids_N[rows]
            yield from scene_ids[random_order(scene_ids, self._seed)].tolist()
            return
        rows = shortlist(self._candidates, rows, self._queries[name], self._config, self._seed, count)
        part = self._candidates.take(rows)
        # Once every query is covered all gains are 0: in the order of their names scenes of one log would follow.
        part = part.take(random_order(part.scene_ids_N, self._seed + TIES))
        for row in order_scenes(part, self._queries[name], self._config, self._seed):
            yield str(part.scene_ids_N[row])


def deliverable(
    candidates: Candidates, cluster_of_N: NDArray[np.str_], names: Iterable[str], config: RetrievalConfig
) -> dict[str, int]:
    """Count what a `Search` can give of every cluster: without outliers and beyond no cap; near-duplicates aside.

    Arguments are those of `Search`.
    """
    counts = {}
    for name, rows in _members(candidates, cluster_of_N, names, config).items():
        counts[name] = len(rows)
        if config.method != "random":
            origins, per_origin = np.unique(candidates.origin_ids_N[rows], return_counts=True)
            counts[name] -= int(np.maximum(per_origin - config.max_per_origin, 0)[origins != ""].sum())
    return counts


def order_scenes(
    candidates: Candidates, queries: Queries, config: RetrievalConfig, seed: int
) -> Iterator[int]:
    """Yield the candidates of one cluster by a greedy method, near-duplicates left out.

    Every 1 / `random_share`-th place goes to the next scene of a seeded random order, for coverage. Without
    queries all places do.

    Args:
        candidates: Scenes of the cluster; equal gains go to the first.
        queries: Dev scenes of the cluster; may be none.
        config: Method (not `random`) and its constants.
        seed: Seed of the random order.

    Returns:
        Rows in order, found as they are asked for.
    """
    if len(candidates.scene_ids_N) == 0:
        return
    # Coverage is similarity already; `mmr` knows none but this.
    weight = config.similarity_weight if config.method == "facility_location" else 1.0
    values_N = scene_values(candidates, queries, config, weight)
    state = Chosen(candidates.embeddings_ND, queries.embeddings_ED, queries.weights_E, values_N, config)
    greedy = METHODS[config.method](state)
    random_rows = random_order(candidates.scene_ids_N, seed).tolist()
    at_random = (row for row in random_rows if state.may_take(row))
    share = config.random_share if len(queries.weights_E) else 1.0
    for place in itertools.count():
        is_random = math.floor((place + 1) * share + 1e-9) > math.floor(place * share + 1e-9)
        row = next(at_random if is_random else greedy, None)
        if row is None:  # both sources hold the same scenes, so neither has any left
            return
        state.add(row)
        yield row


def shortlist_size(num_scenes: int, config: RetrievalConfig, count: int) -> int:
    """Return about how many scenes of a cluster are searched for `count` of them.

    Counts up to half of `max_candidates` get one and the same shortlist, so their selections nest; larger counts get a
    shortlist of twice the count.
    """
    return num_scenes if config.method == "random" else min(num_scenes, max(config.max_candidates, 2 * count))


def shortlist(
    candidates: Candidates, rows: Int64, queries: Queries, config: RetrievalConfig, seed: int, count: int
) -> Int64:
    """Cut a large cluster to its most valuable scenes, the nearest of every query and a random third.

    Without queries the random order alone decides. Reads embeddings in chunks, so that they may lie in a memory map.

    Args:
        candidates: The pool.
        rows: Scenes of the cluster, sorted by scene id.
        queries: Dev scenes of the cluster.
        config: Holds the method and `max_candidates`.
        seed: Seed of the random order.
        count: Scenes wanted.

    Returns:
        Rows in the order given; all of them where the cluster is small enough.
    """
    limit = shortlist_size(len(rows), config, count)
    if len(rows) <= limit:
        return rows
    if not len(queries.weights_E):  # all places are drawn at random then
        return rows[np.sort(random_order(candidates.scene_ids_N[rows], seed)[:limit])]
    third = limit // 3
    values = _values_in_chunks(candidates, rows, queries, config)
    picks = [
        np.argsort(-values, kind="stable")[:third],
        random_order(candidates.scene_ids_N[rows], seed)[:third],
    ]
    batches = (candidates.embeddings_ND[rows[start : start + CHUNK]] for start in range(0, len(rows), CHUNK))
    num_neighbours = max(1, third // len(queries.weights_E))
    picks.append(nearest_in_stream(batches, queries.embeddings_ED, num_neighbours)[1].ravel())
    return rows[np.unique(np.concatenate(picks))]


def random_order(scene_ids_N: NDArray[np.str_], seed: int) -> Int64:
    """Order scenes by a hash of seed and id: a scene's place among others never depends on who else is there.

    Args:
        scene_ids_N: Names.
        seed: Seed of the order.
    """
    salt = str(seed).encode()[:16]
    digests = [blake2b(name.encode(), digest_size=8, salt=salt).digest() for name in scene_ids_N.tolist()]
    keys_N = np.frombuffer(b"".join(digests), dtype=">u8")
    return np.lexsort((scene_ids_N, keys_N)).astype(np.int64)


def _strongest(queries: Queries | None, limit: int, candidates: Candidates) -> Queries:
    if queries is None:
        size = candidates.embeddings_ND.shape[1]
        return Queries(embeddings_ED=np.zeros((0, size), np.float32), weights_E=np.zeros(0))
    rows = np.sort(np.argsort(-queries.weights_E, kind="stable")[:limit])
    rows = rows[queries.weights_E[rows] > 0]
    return Queries(embeddings_ED=queries.embeddings_ED[rows], weights_E=queries.weights_E[rows])


def _members(
    candidates: Candidates, cluster_of_N: NDArray[np.str_], names: Iterable[str], config: RetrievalConfig
) -> dict[str, Int64]:
    """Return the rows of every cluster by scene id, without outliers where the method leaves them out."""
    order = np.argsort(candidates.scene_ids_N)
    labels = np.asarray(cluster_of_N)[order]
    members = {name: order[labels == name] for name in sorted(names)}
    if config.method == "random":
        return members
    return {name: _without_outliers(candidates, rows, config) for name, rows in members.items()}


def _without_outliers(candidates: Candidates, rows: Int64, config: RetrievalConfig) -> Int64:
    """Drop the worst outliers, at most a share of the cluster.

    A probe that separates the domains outright has only found that the scenes are synthetic, which is no
    fault.
    """
    most = int(config.max_dropped_share * len(rows))
    num_dropped = min(int(candidates.is_outlier_N[rows].sum()), most)
    by_gap = np.argsort(-candidates.gap_N[rows], kind="stable")
    return rows[np.sort(by_gap[num_dropped:])]


def _capped_per_origin(
    candidates: Candidates, rows: Int64, queries: Queries, config: RetrievalConfig
) -> Int64:
    """Keep the most valuable scenes of every origin in a cluster."""
    origins, scene_ids = candidates.origin_ids_N[rows], candidates.scene_ids_N[rows]
    if not (origins != "").any():
        return rows
    worth = _values_in_chunks(candidates, rows, queries, config)
    order = np.lexsort((scene_ids, -worth, origins))
    _, first, sizes = np.unique(origins[order], return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(first, sizes)
    kept = order[(place < config.max_per_origin) | (origins[order] == "")]
    return rows[np.sort(kept)]


def _values_in_chunks(
    candidates: Candidates, rows: Int64, queries: Queries, config: RetrievalConfig
) -> Float64:
    parts = (candidates.take(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK))
    return np.concatenate([np.empty(0), *(scene_values(part, queries, config) for part in parts)])
