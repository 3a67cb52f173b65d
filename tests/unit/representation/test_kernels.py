"""The compiled pieces of the encoder: the same bits wherever their tables lie in memory."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("autoscale_ray.representation.kernels", reason="needs numba")
NUM_SCENES, NODES, SIZE = 64, 2, 16
NUM_CALLS = 4000
"""Of so many calls 2 to 9 took a sum that also writes in another order."""


def test_a_layer_ends_with_the_same_bits_wherever_its_tables_lie() -> None:
    generator = np.random.default_rng(0)
    num_nodes = NODES * NUM_SCENES
    shapes = ((num_nodes, SIZE), (num_nodes, 3 * SIZE), (NUM_SCENES, SIZE), (2, SIZE))
    states_MH, update_MW, ego_NH, norm_2H = (generator.standard_normal(s).astype(np.float32) for s in shapes)
    offsets = np.arange(0, num_nodes + 1, NODES)

    def layer(num: int) -> np.ndarray:
        states = states_MH[: NODES * num].copy()
        update, ego = update_MW[: NODES * num].copy(), ego_NH[:num].copy()
        kernels.finish_layer(states, update, ego, offsets[: num + 1], *norm_2H, 1e-5)
        return states

    expected_MH, held = layer(NUM_SCENES), []
    for _ in range(NUM_CALLS):
        held = [*held[-40:], np.empty(generator.integers(1, 4000), np.uint8)]
        num = int(generator.integers(1, NUM_SCENES + 1))
        assert layer(num).tobytes() == expected_MH[: NODES * num].tobytes()
