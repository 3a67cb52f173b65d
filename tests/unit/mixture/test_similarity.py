"""Similarity: neighbours in a stream and in an index against brute force; the domain probe against its truth."""

from __future__ import annotations

import numpy as np
import pytest

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.mixture import similarity


def _unit(rng: np.random.Generator, num: int, size: int = 6) -> np.ndarray:
    return similarity.normalised(rng.standard_normal((num, size)))


def test_stream_neighbours_equal_a_full_sort():
    pytest.importorskip("faiss", reason="candidates are found by faiss")
    rng = np.random.default_rng(0)
    scenes, queries = _unit(rng, 500), _unit(rng, 9)
    full = queries @ scenes.T
    batches = (scenes[start : start + 70] for start in range(0, 500, 70))
    cosines, rows = similarity.nearest_in_stream(batches, queries, 12)
    assert np.array_equal(rows, np.argsort(-full, axis=1, kind="stable")[:, :12])
    assert np.allclose(cosines, -np.sort(-full, axis=1)[:, :12], atol=1e-6)
    few = similarity.nearest_in_stream(iter([scenes[:3]]), queries, 5)[1]
    assert (few[:, 3:] == -1).all()


def test_index_search_equals_brute_force():
    pytest.importorskip("faiss", reason="the index needs faiss")
    rng = np.random.default_rng(0)
    scenes, queries = _unit(rng, 400, 16), _unit(rng, 20, 16)
    _, rows = similarity.nearest(similarity.build_index(scenes), queries, 5)
    assert np.array_equal(rows, np.argsort(-(queries @ scenes.T), axis=1)[:, :5])


def _domains(shift: float, num_real: int, num_synthetic: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    step = np.zeros(5)
    step[0] = shift
    return rng.standard_normal((num_real, 5)), rng.standard_normal((num_synthetic, 5)) + step


def test_domain_probe_recovers_the_log_odds_of_two_gaussians():
    real, synthetic = _domains(1.5, 4000, 12_000)
    probe = similarity.fit_domain_probe(real, synthetic)
    points = np.random.default_rng(1).standard_normal((200, 5))
    truth = 1.5 * points[:, 0] - 1.5**2 / 2  # log N(x; shift, 1) - log N(x; 0, 1): free of the pool sizes
    assert np.abs(probe.log_odds(points) - truth).max() < 0.35
    assert np.corrcoef(probe.log_odds(points), truth)[0, 1] > 0.995


def test_the_quantiles_of_the_probe_hold_for_fresh_real_scenes():
    real, synthetic = _domains(2.0, 3000, 3000)
    probe = similarity.fit_domain_probe(real, synthetic)
    fresh, _ = _domains(2.0, 3000, 1, seed=7)
    assert 0.03 < (probe.log_odds(fresh) > probe.free_to).mean() < 0.07
    assert (probe.log_odds(fresh) > probe.kept_to).mean() < 0.015


def test_the_quantiles_of_the_probe_are_of_rows_that_it_was_not_fitted_on():
    """In 64 dimensions the rows of the fit look more real than others do."""
    above = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        real, synthetic, fresh = (rng.standard_normal((size, 64)) for size in (200, 600, 2000))
        synthetic[:, 0] += 0.5
        probe = similarity.fit_domain_probe(real, synthetic)
        above.append((probe.log_odds(fresh) > probe.free_to).mean())
    assert 0.035 < np.mean(above) < 0.07


def test_domain_probe_on_equal_domains_finds_nothing():
    real, synthetic = _domains(0.0, 2000, 2000)
    probe = similarity.fit_domain_probe(real, synthetic)
    assert np.abs(probe.log_odds(synthetic)).mean() < 0.15


def test_domain_probe_survives_separable_domains_and_refuses_empty_ones():
    real, synthetic = _domains(50.0, 100, 100)
    probe = similarity.fit_domain_probe(real, synthetic)
    assert np.isfinite(probe.log_odds(synthetic)).all()
    assert (probe.log_odds(real) < probe.log_odds(synthetic).min()).all()
    assert (probe.log_odds(synthetic) > probe.free_to).mean() < 0.1, "that they are synthetic is no fault"
    assert (probe.log_odds(synthetic) > probe.kept_to).mean() < 0.05
    with pytest.raises(InvalidInputError, match="two scenes"):
        similarity.fit_domain_probe(real[:1], synthetic)


def test_log_odds_of_a_large_pool_are_read_in_pieces(monkeypatch):
    real, synthetic = _domains(1.0, 300, 300)
    probe = similarity.fit_domain_probe(real, synthetic)
    whole = probe.log_odds(synthetic)
    monkeypatch.setattr(similarity, "ODDS_ROWS", 7)
    np.testing.assert_allclose(probe.log_odds(synthetic), whole, atol=1e-12)
    assert probe.log_odds(synthetic[:0]).shape == (0,)
