"""Layers with a leading shard axis: every shard has its own copy of the weights and so its own gradient.

Shape legend: V shards, B scenes of a shard, K tokens, D width, H heads, S = V B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_HEADS = 4


class ShardLinear(nn.Module):
    """A linear layer with one copy of its weights for each shard."""

    def __init__(self, num_shards: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_shards, num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.empty(num_shards, 1, num_outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (V, ..., inputs) to (V, ..., outputs)."""
        shards, shape = inputs.shape[0], inputs.shape[:-1]
        rows = inputs.reshape(shards, -1, inputs.shape[-1])
        return torch.baddbmm(self.bias, rows, self.weight).view(*shape, -1)


class CrossAttention(nn.Module):
    """Attention of one query over K tokens, without forming keys and values of the tokens.

    A head's score q . (W_k x) is (W_k^T q) . x and its output is W_v sum(a x): two products a scene in place
    of two a token, the same function.
    """

    def __init__(self, num_shards: int, width: int) -> None:
        super().__init__()
        self.query = ShardLinear(num_shards, width, NUM_HEADS * width)
        self.value = ShardLinear(num_shards, NUM_HEADS * width, width)

    def forward(self, query_VBD: Tensor, tokens_VBKD: Tensor, bias_VBK: Tensor) -> Tensor:
        """Return what the query finds (V, B, D); the bias is 0 for tokens that count and -inf for others."""
        shards, batch, _, width = tokens_VBKD.shape
        query_SHD = self.query(query_VBD).view(shards * batch, NUM_HEADS, width)
        tokens_SKD = tokens_VBKD.flatten(0, 1)
        scores_SHK = torch.baddbmm(
            bias_VBK.flatten(0, 1)[:, None], query_SHD, tokens_SKD.mT, alpha=width**-0.5
        )
        return self.value((scores_SHK.softmax(-1) @ tokens_SKD).view(shards, batch, -1))
