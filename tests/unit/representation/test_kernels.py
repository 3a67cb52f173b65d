"""The compiled pieces of the encoder: the same bits wherever their tables lie, bfloat16 rounded as torch does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

kernels = pytest.importorskip("autoscale_ray.representation.kernels", reason="needs numba")
NUM_SCENES, NODES, SIZE, EDGES = 64, 2, 16, 5
NUM_CALLS = 4000
"""Of so many calls 2 to 9 took a sum that also writes in another order."""


def table(shape: tuple[int, ...], generator: np.random.Generator, kind: torch.dtype) -> np.ndarray:
    """Return normal numbers as the kernels see a table of a type."""
    values = torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
    return values.numpy() if kind == torch.float32 else values.to(kind).view(torch.uint16).numpy()


def numbers(found: np.ndarray) -> torch.Tensor:
    """Return a table as float32."""
    tensor = torch.from_numpy(found)
    return tensor.view(torch.bfloat16).float() if found.dtype == np.uint16 else tensor


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_layer_ends_with_the_same_bits_wherever_its_tables_lie(kind) -> None:
    generator = np.random.default_rng(0)
    num_nodes = NODES * NUM_SCENES
    states_MH = table((num_nodes, SIZE), generator, torch.float32)
    update_MH, ego_NW = (
        table((num_nodes, SIZE), generator, kind),
        table((NUM_SCENES, 3 * SIZE), generator, torch.float32),
    )
    norm_2H = table((2, SIZE), generator, torch.float32)
    offsets = np.arange(0, num_nodes + 1, NODES)
    degree_M = np.full(num_nodes, EDGES, np.int32)
    sources_E = generator.integers(0, NODES, num_nodes * EDGES).astype(np.int32)

    def layer(num: int) -> list[np.ndarray]:
        states, update, ego = (
            states_MH[: NODES * num].copy(),
            update_MH[: NODES * num].copy(),
            ego_NW[:num].copy(),
        )
        taken, scenes = np.zeros((NODES * num, 2 * SIZE), update.dtype), np.zeros((num, 4 * SIZE), np.float32)
        own = offsets[: num + 1]
        kernels.finish_layer(states, taken, update, ego, SIZE, own, *norm_2H, 1e-5, scenes, SIZE)
        kernels.neighbour_mean(taken, SIZE, states, sources_E, degree_M, own * EDGES, own, own)
        kernels.weighted_mean(scenes, 2 * SIZE, states, np.abs(states[:, :4]), own)
        return [states, taken, scenes]

    expected, held = layer(NUM_SCENES), []
    for _ in range(NUM_CALLS):
        held = [*held[-40:], np.empty(generator.integers(1, 4000), np.uint8)]
        num = int(generator.integers(1, NUM_SCENES + 1))
        for found, whole in zip(layer(num), expected, strict=True):
            assert found.tobytes() == whole[: len(found)].tobytes()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_means_over_neighbours_are_those_of_torch(kind) -> None:
    """Set and added, with none to eleven edges a target; bfloat16 rounds as torch does."""
    generator = np.random.default_rng(1)
    states_MH, offsets = table((30, SIZE), generator, torch.float32), np.array([0, 12, 12, 30])
    degree_M = generator.integers(0, 12, 30).astype(np.int32)
    source_offsets = np.concatenate([[0], degree_M.cumsum()])
    owner_E = np.repeat(np.digitize(np.arange(30), offsets[1:-1]), degree_M)
    sources_E = generator.integers(0, np.diff(offsets)[owner_E]).astype(np.int32)
    mean_MH = torch.stack(
        [
            torch.from_numpy(states_MH[sources_E[low:high] + offsets[owner_E[low:high]]]).sum(0)
            / max(high - low, 1)
            for low, high in pairwise(source_offsets)
        ]
    )
    before = table((30, 2 * SIZE), generator, kind)
    given, added = before.copy(), before.copy()
    kernels.neighbour_mean(
        given, SIZE, states_MH, sources_E, degree_M, source_offsets[offsets], offsets, offsets
    )
    kernels.neighbour_mean(
        added, -1, states_MH, sources_E, degree_M, source_offsets[offsets], offsets, offsets
    )
    assert np.array_equal(given[:, :SIZE], before[:, :SIZE])
    assert np.array_equal(added[:, SIZE:], before[:, SIZE:])
    step = 1e-6 if kind == torch.float32 else 2.0**-8  # a sum in another order may round to the other side
    torch.testing.assert_close(numbers(given)[:, SIZE:], mean_MH.to(kind).float(), atol=1e-6, rtol=step)
    total_MH = (numbers(before)[:, :SIZE] + mean_MH).to(kind).float()
    torch.testing.assert_close(numbers(added)[:, :SIZE], total_MH, atol=1e-6, rtol=step)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """Every value between two neighbours of bfloat16, ties among them, and infinity."""
    bits = np.arange(0x3F7F0000, 0x3F840000, 0x800, dtype=np.uint32)
    near = bits.view(np.float32)
    values = np.concatenate([near, -near, np.array([np.inf, -np.inf, 3.4e38, 0], np.float32)]).reshape(-1, 4)
    rows, out = np.arange(len(values) + 1), np.zeros((len(values), 8), np.uint16)
    kernels.neighbour_mean(
        out, 4, values, np.zeros(len(values), np.int32), np.ones(len(values), np.int32), rows, rows, rows
    )
    assert np.array_equal(out[:, 4:], torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())
