"""The simulated device refuses what CUDA refuses and computes what the CPU computes."""

from __future__ import annotations

import pytest
import torch

from tests.device.simulated import NAME


def test_tensors_of_two_devices_may_not_meet():
    there, here = torch.ones(3, device=NAME), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, here])
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, 2, device=NAME).index_select(0, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()


def test_numbers_and_indices_of_the_cpu_may_come():
    there = torch.arange(3.0, device=NAME)
    assert (there * torch.tensor(2.0))[torch.tensor([2, 0])].cpu().tolist() == [4.0, 0.0]


def test_results_and_gradients_are_those_of_the_cpu():
    results = []
    for device in ("cpu", NAME):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 4).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.arange(6.0, device=device).reshape(2, 3)).relu().sum().backward()
            optimizer.step()
        assert layer.weight.device.type == device
        results.append(layer.weight.detach().cpu())
    assert torch.equal(*results)


def test_views_share_their_memory():
    table = torch.zeros(4, 2, device=NAME)
    table[1].add_(1)
    table[2:] += 2
    assert table.cpu().tolist() == [[0, 0], [1, 1], [2, 2], [2, 2]]
