"""Medoids and neighbours against loops; the figures show every scene they are given."""

import numpy as np

from autoscale_ray.reporting.embedding_plots import (
    embedding_figure,
    medoid_rows,
    retrieval_figure,
)
from tests.unit.representation.random_scenes import random_batch


def test_medoid_points_most_like_the_mean_of_its_cluster():
    rng = np.random.default_rng(0)
    vectors, label = rng.normal(size=(30, 4)), np.array(list("abc") * 10)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for name, row in medoid_rows(vectors, label).items():
        rows = np.flatnonzero(label == name)
        cosines = [np.mean([unit[i] @ unit[j] for j in rows]) for i in rows]
        assert row == rows[int(np.argmax(cosines))]


def test_map_shows_every_label_and_medoid():
    rng = np.random.default_rng(1)
    labels = {
        "domain": np.array(["real", "synthetic"] * 10),
        "cluster": np.array(["c0", "c1", "c2", "c3"] * 5),
    }
    batch = random_batch(4, 0)
    medoids = {f"c{row}": batch.select([row]) for row in range(4)}
    figure = embedding_figure(rng.normal(size=(20, 8)), labels, medoids)
    maps, thumbnails = (part.get_axes() for part in figure.subfigs)
    assert [len(axes.collections) for axes in maps] == [2, 4]
    titles = [axes.get_title().split(",")[0] for axes in thumbnails[:4]]
    assert titles == [f"medoid of c{row}" for row in range(4)]
    figure.canvas.draw()


def test_retrieval_sheet_has_a_row_for_each_query():
    batch = random_batch(6, 1)
    scenes = [batch.select([row]) for row in range(6)]
    cosine = np.array([[0.9, 0.8], [0.7, 0.61]])
    figure = retrieval_figure(scenes[:2], [scenes[2:4], scenes[4:]], ["c0", "c4"], cosine)
    assert len(figure.get_axes()) == 6
    assert figure.get_axes()[3].get_title().startswith("query c4")
    assert figure.get_axes()[5].get_title().startswith("nearest 2 (0.61)")
