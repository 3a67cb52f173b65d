from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.planning.order import batch_places, drawn_places, shard_places


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_scenes=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    num_epochs_seen=st.integers(1, 4),
)
def test_every_epoch_holds_every_scene_exactly_once(seed, num_scenes, batch_size, num_epochs_seen):
    num_steps = -(-num_scenes * num_epochs_seen // batch_size)
    stream = np.concatenate([batch_places(seed, step, batch_size, num_scenes) for step in range(num_steps)])
    for epoch in range(num_epochs_seen):
        part = stream[epoch * num_scenes : (epoch + 1) * num_scenes]
        assert sorted(part) == list(range(num_scenes))


def test_order_is_the_same_for_every_worker_count_and_resume_point():
    seed, num_steps, batch_size, num_scenes = 7, 12, 8, 37
    whole = np.concatenate([batch_places(seed, step, batch_size, num_scenes) for step in range(num_steps)])
    for workers in (1, 2, 4):
        for start in range(num_steps):
            steps = range(start, num_steps)
            owned = [
                [shard_places(seed, step, batch_size, num_scenes)[w * 4 // workers : (w + 1) * 4 // workers]
                 for w in range(workers)]
                for step in steps
            ]  # fmt: skip
            found = np.concatenate([np.concatenate(step_parts).ravel() for step_parts in owned])
            np.testing.assert_array_equal(found, whole[start * batch_size :])


def test_order_does_not_depend_on_the_batch_size():
    small = np.concatenate([batch_places(3, step, 4, 50) for step in range(30)])
    large = np.concatenate([batch_places(3, step, 24, 50) for step in range(5)])
    np.testing.assert_array_equal(small, large)


def test_seeds_and_epochs_differ():
    first = batch_places(0, 0, 100, 100)
    assert not np.array_equal(first, batch_places(1, 0, 100, 100))
    assert not np.array_equal(first, batch_places(0, 1, 100, 100))


@pytest.mark.parametrize("shards", [range(4), [0], [1, 3]])
@pytest.mark.parametrize("steps", [range(3), range(2, 9), range(0), range(40)])
def test_drawn_places_are_those_of_the_steps_each_once(shards, steps):
    seen = [shard_places(7, step, 8, 37)[list(shards)].ravel() for step in steps]
    drawn = drawn_places(7, steps, 8, 37, shards)
    np.testing.assert_array_equal(drawn, np.unique(np.concatenate([np.empty(0, np.int64), *seen])))
