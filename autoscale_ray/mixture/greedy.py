"""Greedy choice of scenes one after another: what is chosen so far, and what a further scene would add.

Formulae: docs/clusters_and_retrieval.md. Where numba is installed the search for the largest gain is compiled; every
gain that decides is computed here, so the choice is the same without it, to the bit.

Legend: N candidates, D embedding size, E dev queries, X chosen scenes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from importlib import import_module

import numpy as np

from autoscale_ray.config import RetrievalConfig
from autoscale_ray.extras import has_numba
from autoscale_ray.mixture.similarity import Float32, Float64

CHUNK = 8_192
"""Candidates compared with all queries at once; bounds memory, changes nothing."""
BOUND_SLACK = 1e-5
"""Raises a stale gain, as a share of the total query weight: many rows at once round unlike one row."""
MAX_COSINES = 1 << 29
"""Cosines that the compiled search may hold (2 GiB); a larger cluster is searched without."""
ROUNDING = 2.0**-24
"""Largest relative error of one operation in float32."""


class Chosen:
    """The scenes chosen so far, and what a further one would add.

    Args:
        embeddings_ND: Unit rows of the candidates.
        queries_ED: Unit rows of the dev queries.
        weights_E: How much each query wants, >= 0; only ratios matter.
        values_N: What each candidate is worth by itself.
        config: Holds the constants of the rules.
    """

    def __init__(
        self,
        embeddings_ND: Float32,
        queries_ED: Float32,
        weights_E: Float64,
        values_N: Float64,
        config: RetrievalConfig,
    ) -> None:
        total = weights_E.sum()
        self.rows: list[int] = []
        self.embeddings_ND, self.queries_ED, self.values_N = embeddings_ND, queries_ED, values_N
        # mean weight 1: one well covered query is worth as much as one unit of value
        self.weights_E = (weights_E * len(weights_E) / max(total, 1e-300)).astype(np.float32)
        self.covered_E = np.zeros(len(self.weights_E), np.float32)
        self.config = config
        self._is_taken_N = np.zeros(len(embeddings_ND), bool)
        self._chosen_XD = np.empty(embeddings_ND.shape, np.float32)  # takes memory as it is filled
        self._similarity_N = np.zeros(len(embeddings_ND), np.float32)
        self._num_compared_N = np.zeros(len(embeddings_ND), np.int64)

    def similarity(self, row: int) -> float:
        """Return max(0, largest cosine with a chosen scene), comparing only with those added since."""
        start, stop = self._num_compared_N[row], len(self.rows)
        if start < stop:
            cosines = self._chosen_XD[start:stop] @ self.embeddings_ND[row]
            self._similarity_N[row] = max(self._similarity_N[row], cosines.max())
            self._num_compared_N[row] = stop
        return float(self._similarity_N[row])

    def may_take(self, row: int) -> bool:
        """Tell whether a scene is neither taken nor a near-duplicate of one; once False, always False."""
        return not self._is_taken_N[row] and self.similarity(row) <= self.config.duplicate_cosine + 1e-6

    def add(self, row: int) -> None:
        """Choose a scene."""
        self._chosen_XD[len(self.rows)] = self.embeddings_ND[row]
        self.rows.append(row)
        self._is_taken_N[row] = True
        if len(self.weights_E):
            np.maximum(self.covered_E, self.queries_ED @ self.embeddings_ND[row], out=self.covered_E)

    def coverage_gain(self, row: int) -> float:
        """Return sum_e q_e max(0, sim(e, x) - covered_e) + value(x)."""
        similarity_E = self.queries_ED @ self.embeddings_ND[row]
        return float(np.maximum(similarity_E - self.covered_E, 0) @ self.weights_E) + float(
            self.values_N[row]
        )

    def novelty_gain(self, row: int) -> float:
        """Return lambda value(x) - (1 - lambda) max_{y chosen} sim(x, y)."""
        relevance = self.config.mmr_relevance
        return relevance * float(self.values_N[row]) - (1 - relevance) * self.similarity(row)


def _facility_location(state: Chosen) -> Iterator[int]:
    """Greedy maximisation of sum_e q_e max_{x in S} sim(e, x) + sum_{x in S} value(x)."""
    num_cosines = len(state.values_N) * len(state.weights_E)
    if num_cosines > MAX_COSINES or not has_numba():
        return _lazily(state, _coverage_bounds(state), state.coverage_gain)
    return _lazily_compiled(state)


def load_search() -> None:
    """Load the compiled search, which takes a third of a second once in a process, before it is needed."""
    if has_numba():
        unit_ND, one_N = np.eye(2, dtype=np.float32), np.ones(2)
        next(_lazily_compiled(Chosen(unit_ND, unit_ND, one_N, one_N, RetrievalConfig())))


def _coverage_bounds(state: Chosen, cosine_NE: Float32 | None = None) -> Float64:
    """Return upper bounds of the gains before any choice; keep the cosines behind them where there is a place."""
    bounds = []
    for start in range(0, len(state.values_N), CHUNK):
        similarity_XE = state.embeddings_ND[start : start + CHUNK] @ state.queries_ED.T
        bounds.append(np.maximum(similarity_XE, 0) @ state.weights_E)
        if cosine_NE is not None:
            cosine_NE[start : start + CHUNK] = similarity_XE
    return np.concatenate(bounds) + state.values_N + BOUND_SLACK * float(state.weights_E.sum())


def _lazily_compiled(state: Chosen) -> Iterator[int]:
    """Yield what `_lazily` yields for coverage; holds all cosines, N x E, so that a gain is a sum over them.

    Two ways to sum D or E products in float32 differ by at most 2 D or 2 E roundings of the sum of magnitudes.
    """
    kernels = import_module("autoscale_ray.mixture.kernels")
    num_scenes, num_queries = len(state.values_N), len(state.weights_E)
    cosine_NE = np.empty((num_scenes, num_queries), np.float32)
    bounds_N = _coverage_bounds(state, cosine_NE)
    rows_N = np.lexsort((np.arange(num_scenes), -bounds_N))
    keys_N = bounds_N[rows_N]  # sorted, so a heap
    lowest_N, seen_N = np.full(num_scenes, -np.inf), np.full(num_scenes, -1)
    lengths = (np.linalg.norm(table, axis=1).max() for table in (state.embeddings_ND, state.queries_ED))
    tolerance = np.float32((2 * state.queries_ED.shape[1] + 8) * ROUNDING * np.prod([*lengths]))
    sum_tolerance = (2 * num_queries + 8) * ROUNDING
    tables = (cosine_NE, state.covered_E, state.weights_E, state.values_N, tolerance, sum_tolerance)
    known = math.nan
    while True:
        turn = len(state.rows)
        while not kernels.settle_first(keys_N, rows_N, known, lowest_N, seen_N, turn, *tables):
            known = state.coverage_gain(rows_N[0])
        if keys_N[0] == -math.inf:
            return
        row, known = int(rows_N[0]), -math.inf
        if state.may_take(row):
            yield row


def _maximal_marginal_relevance(state: Chosen) -> Iterator[int]:
    """Greedy choice of value against likeness to what is chosen (Carbonell and Goldstein 1998)."""
    return _lazily(state, state.config.mmr_relevance * state.values_N, state.novelty_gain)


def _lazily(state: Chosen, bounds_N: Float64, gain_of: Callable[[int], float]) -> Iterator[int]:
    """Yield the row of largest gain given what is chosen by then; equal gains in row order.

    A gain only falls as more is chosen, so an old one is an upper bound, and a row whose fresh gain still
    beats every old one is the greedy choice (Minoux 1978).
    """
    heap = [(-bound, row) for row, bound in enumerate(bounds_N.tolist())]
    heapq.heapify(heap)
    while heap:
        row = heap[0][1]
        fresh = (-gain_of(row), row)
        heapq.heapreplace(heap, fresh)
        if heap[0] != fresh:
            continue
        heapq.heappop(heap)
        if state.may_take(row):
            yield row


METHODS: dict[str, Callable[[Chosen], Iterator[int]]] = {
    "facility_location": _facility_location,
    "mmr": _maximal_marginal_relevance,
}
"""Greedy selection rules inside a cluster; beside them `random`, a plain sample."""
