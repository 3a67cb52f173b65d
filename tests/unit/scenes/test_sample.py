import numpy as np
import pytest

from autoscale_ray.scenes.sample import sampled_rows


@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ([30, 70], 100, [30, 70]),
        ([30, 70], 200, [30, 70]),
        ([30, 70], 40, [20, 20]),
        ([30, 70], 41, [20, 21]),
        ([30, 70_000], 1000, [30, 970]),  # in proportion it would be none
        ([70_000, 30, 0], 1000, [970, 30, 0]),
        ([0, 5], 3, [0, 3]),
        ([], 3, []),
    ],
)
def test_a_small_pool_gives_all_it_has_before_a_large_one_gives_more_than_an_even_share(sizes, limit, wanted):
    first, again, other = (sampled_rows(sizes, limit, seed) for seed in (0, 0, 1))
    assert [len(rows) for rows in first] == wanted
    for rows, same, size in zip(first, again, sizes, strict=True):
        assert rows.tolist() == same.tolist() == sorted(set(rows.tolist()))
        assert not len(rows) or 0 <= rows[0] <= rows[-1] < size
    drawn = [
        (rows, others) for rows, others, size in zip(first, other, sizes, strict=True) if 1 < len(rows) < size
    ]
    assert all(rows.tolist() != others.tolist() for rows, others in drawn)


def test_every_scene_of_a_large_pool_is_drawn_as_often_as_another():
    drawn = np.zeros(60)
    for seed in range(2000):
        drawn[sampled_rows([10, 60], 30, seed)[1]] += 1
    assert np.abs(drawn / 2000 - 20 / 60).max() < 0.05  # five standard errors
