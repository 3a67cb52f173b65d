"""Clusters: agreement with independent references, determinism, merging, round trip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from autoscale_ray.config import ClusterConfig
from autoscale_ray.errors import ArtifactError, InvalidInputError, MissingExtraError
from autoscale_ray.mixture import clusters as module
from autoscale_ray.mixture import similarity

pytest.importorskip("faiss", reason="the fine level needs faiss")


def _blobs(num_scenes: int, num_blobs: int, seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Scenes around well separated directions, with their true blob."""
    centres = np.linalg.qr(np.random.default_rng(5).standard_normal((size, size)))[0][:num_blobs] * 6
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_blobs, num_scenes)
    return (centres[labels] + 0.3 * rng.standard_normal((num_scenes, size))).astype(np.float32), labels


def _same_partition(left: np.ndarray, right: np.ndarray) -> bool:
    pairs = {(int(a), int(b)) for a, b in zip(left, right, strict=True)}
    return len(pairs) == len(set(left.tolist())) == len(set(right.tolist()))


def test_recovers_separated_blobs_exactly():
    train, _ = _blobs(1500, 8, seed=0)
    dev, dev_labels = _blobs(300, 8, seed=1)
    model = module.fit_clusters(
        train, dev, ClusterConfig(num_fine=64, num_coarse=8, min_dev_scenes=5), seed=3
    )
    assert _same_partition(model.assign(dev)[1], dev_labels)


def test_same_seed_same_bits_and_other_seed_other_centroids():
    train, _ = _blobs(800, 8, seed=0)
    config = ClusterConfig(num_fine=40, num_coarse=6)
    first, again, other = (module.fit_clusters(train, train[:200], config, seed) for seed in (7, 7, 8))
    assert np.array_equal(first.centroids_fine_FD, again.centroids_fine_FD)
    assert np.array_equal(first.coarse_of_fine_F, again.coarse_of_fine_F)
    assert not np.array_equal(first.centroids_fine_FD, other.centroids_fine_FD)


def test_dev_scenes_move_no_centroid():
    train, _ = _blobs(800, 8, seed=0)
    config = ClusterConfig(num_fine=40, num_coarse=6, min_dev_scenes=0, dev_share=0.0)
    few, many = (module.fit_clusters(train, _blobs(n, 3, seed=n)[0], config, 0) for n in (20, 400))
    assert np.array_equal(few.centroids_fine_FD, many.centroids_fine_FD)
    assert np.array_equal(few.coarse_of_fine_F, many.coarse_of_fine_F)


def test_clusters_are_fine_where_the_objective_has_weight():
    """Two directions with most scenes and little dev weight, six rare ones with most of the weight."""
    centres = np.linalg.qr(np.random.default_rng(5).standard_normal((16, 16)))[0] * 6
    labels = np.repeat(np.arange(8), [3000, 3000, *[100] * 6])
    noise = np.random.default_rng(6).standard_normal((len(labels), 16))
    train = (centres[labels] + np.where(labels < 2, 1.5, 0.3)[:, None] * noise).astype(np.float32)
    dev_labels = np.repeat(np.arange(8), 30)
    dev = (centres[dev_labels] + 0.3 * np.random.default_rng(7).standard_normal((240, 16))).astype(np.float32)
    weights = np.where(dev_labels < 2, 0.05, 1.0)
    found = {
        share: module.fit_clusters(
            train,
            dev,
            ClusterConfig(num_fine=64, num_coarse=8, min_dev_scenes=5, dev_share=share),
            0,
            weights,
        ).assign(dev)[1]
        for share in (0.0, 0.9)
    }
    rare = dev_labels >= 2
    assert len(set(found[0.0][rare].tolist())) < 6
    assert _same_partition(found[0.9][rare], dev_labels[rare])


def test_coarse_clusters_are_numbered_by_size():
    train, _ = _blobs(2000, 8, seed=0)
    train = np.concatenate([train, train[:300] * 1.01])
    model = module.fit_clusters(train, train[:500], ClusterConfig(num_fine=60, num_coarse=8), seed=0)
    counts = np.bincount(model.assign(train)[1])
    assert (np.diff(counts) <= 0).all()
    assert model.coarse_ids[0] == "c00"


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_points=st.integers(2, 14), groups=st.integers(1, 6))
def test_weighted_ward_equals_scipy_ward_on_repeated_points(seed, num_points, groups):
    rng = np.random.default_rng(seed)
    points, sizes = rng.standard_normal((num_points, 3)), rng.integers(1, 6, num_points)
    groups = min(groups, num_points)
    repeated = np.repeat(points, sizes, axis=0)
    reference = (
        fcluster(linkage(repeated, "ward"), groups, criterion="maxclust") if len(repeated) > 1 else np.ones(1)
    )
    ours = module.ward_labels(points, sizes, groups)
    assert _same_partition(np.repeat(ours, sizes), reference)


def test_nearest_centroid_equals_brute_force_in_any_chunk():
    rng = np.random.default_rng(0)
    scenes, centroids = (similarity.normalised(rng.standard_normal((n, 8))) for n in (200, 11))
    brute = [max(range(11), key=lambda f: float(np.dot(scene, centroids[f]))) for scene in scenes]
    for chunk in (1, 7, 1000):
        assert module.nearest_centroid(scenes, centroids, chunk).tolist() == brute


def test_clusters_below_the_dev_floor_join_their_nearest():
    centroids = similarity.normalised(np.array([[1, 0], [0.9, 0.2], [0, 1], [-1, 0.1]]))
    labels = module.merge_below_floor(
        np.arange(4), centroids, np.array([10, 10, 10, 10]), np.array([20, 3, 15, 1]), min_dev_scenes=5
    )
    # 3 (one dev scene) is nearest to 2 (cosine .10); 1 (three) is nearest to 0
    assert labels.tolist() == [0, 0, 1, 1]


@settings(derandomize=True, max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), floor=st.integers(0, 60), num_fine=st.integers(1, 12))
def test_after_merging_every_cluster_reaches_the_floor_or_one_is_left(seed, floor, num_fine):
    rng = np.random.default_rng(seed)
    centroids = similarity.normalised(rng.standard_normal((num_fine, 4)))
    dev = rng.integers(0, 30, num_fine)
    merged = module.merge_below_floor(
        np.arange(num_fine), centroids, rng.integers(0, 50, num_fine), dev, floor
    )
    counts = np.bincount(merged, weights=dev)
    assert counts.sum() == dev.sum()
    assert len(counts) == 1 or counts.min() >= floor


@pytest.mark.parametrize("num_scenes", [1, 3, 25])
def test_tiny_pools_and_one_cluster(num_scenes):
    train, _ = _blobs(num_scenes, 3, seed=0)
    model = module.fit_clusters(train, train[:1], ClusterConfig(num_coarse=1), seed=0)
    assert model.num_coarse == 1
    assert model.assign(train)[1].tolist() == [0] * num_scenes


def test_no_dev_scene_keeps_all_clusters():
    train, _ = _blobs(600, 8, seed=0)
    model = module.fit_clusters(train, train[:0], ClusterConfig(num_fine=40, num_coarse=5), seed=0)
    assert model.num_coarse == 5


def test_labels_do_not_depend_on_row_order():
    train, _ = _blobs(400, 6, seed=0)
    model = module.fit_clusters(train, train[:100], ClusterConfig(num_fine=30, num_coarse=6), seed=0)
    order = np.random.default_rng(1).permutation(400)
    assert np.array_equal(model.assign(train[order])[1], model.assign(train)[1][order])


def test_save_and_load_give_the_same_labels(tmp_path):
    train, _ = _blobs(400, 6, seed=0)
    model = module.fit_clusters(train, train[:100], ClusterConfig(num_fine=30, num_coarse=6), seed=0)
    model.save(tmp_path / "clusters.safetensors")
    loaded = module.ClusterModel.load(tmp_path / "clusters.safetensors")
    for ours, theirs in zip(model.assign(train), loaded.assign(train), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_file_with_other_tables_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"centroids_fine_FD": np.zeros((2, 3), np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(ArtifactError, match="must hold exactly"):
        module.ClusterModel.load(tmp_path / "bad.safetensors")


@settings(derandomize=True, max_examples=40, deadline=None)
@given(num_scenes=st.integers(0, 300), shares=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_random_labels_hold_their_shares(num_scenes, shares):
    labels = module.random_labels(num_scenes, np.array(shares), seed=0)
    wanted = num_scenes * np.array(shares) / sum(shares)
    assert len(labels) == num_scenes
    assert (np.abs(np.bincount(labels, minlength=len(shares)) - wanted) < 1 + 1e-9).all()


def test_random_labels_ignore_the_embedding():
    _, truth = _blobs(6000, 6, seed=0)
    labels = module.random_labels(6000, np.ones(6), seed=0)
    table = np.zeros((6, 6))
    np.add.at(table, (truth, labels), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / 6000
    assert ((table - expected) ** 2 / expected).sum() < 52.6  # chi-square, 25 degrees of freedom, p = .001


def test_bad_embeddings_are_refused_with_the_row():
    train, _ = _blobs(40, 3, seed=0)
    train[4, 2] = np.nan
    with pytest.raises(InvalidInputError, match=r"first bad row.*4"):
        module.fit_clusters(train, train[:0], ClusterConfig(), seed=0)
    with pytest.raises(InvalidInputError, match="at least one scene"):
        module.fit_clusters(train[:0], train[:0], ClusterConfig(), seed=0)


def test_without_faiss_the_error_names_the_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    train, _ = _blobs(40, 3, seed=0)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[cpu\]'"):
        module.fit_clusters(train, train[:0], ClusterConfig(), seed=0)


def test_whitened_training_scenes_have_unit_covariance():
    rng = np.random.default_rng(0)
    train = (rng.standard_normal((5000, 6)) @ rng.standard_normal((6, 6)) + 3).astype(np.float32)
    whitening = similarity.fit_whitening(train, shrinkage=1e-6)
    white = (train - whitening.mean_D) @ whitening.matrix_DD
    assert np.allclose(np.cov(white.T, bias=True), np.eye(6), atol=2e-3)  # float32 products


def test_whitening_survives_constant_and_identical_embeddings():
    train = np.ones((10, 4), np.float32)
    unit = similarity.fit_whitening(train).apply(train)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-6)
    train[:, 0] = np.arange(10)
    assert np.isfinite(similarity.fit_whitening(train).apply(train)).all()
