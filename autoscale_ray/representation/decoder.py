"""The decoders. Whole-scene targets are reconstructed from z alone, so that z must hold the scene.

Shape legend: N scenes, M nodes of one type, H hidden size, D embedding size, R raster cells along one side, E edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoscale_ray.representation.rasters import NUM_SECTOR_COUNTS
from autoscale_ray.representation.scene_graph import RELATIONS
from autoscale_ray.scenes.schema import NUM_PLAN_FRAMES

NUM_CELLS = 32
NUM_DRIVE_FRAMES = 4 + NUM_PLAN_FRAMES
MASKED_TYPES = ("agent", "lane")
"""Node types whose features are masked and reconstructed."""


@dataclass(frozen=True, slots=True)
class SceneReconstruction:
    """What the decoder reads out of z."""

    raster_N4C: Tensor
    """Logits of occupancy and lane (channels 0 and 3), flow (1 and 2); C = R * R cells."""
    drive_NT2: Tensor
    """Ego positions at -1.5 ... 4 s in units of 20 m."""
    sectors_NS: Tensor
    """log(1 + count)."""


class GraphDecoder(nn.Module):
    """z -> scene, (node, z) -> masked features, (node, node) -> relation scores."""

    def __init__(
        self, feature_sizes: Mapping[str, int], hidden_size: int, embedding_size: int, num_responses: int = 0
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(embedding_size, 2 * hidden_size), nn.ReLU())
        self.raster = nn.Linear(2 * hidden_size, 4 * NUM_CELLS * NUM_CELLS)
        self.drive = nn.Linear(2 * hidden_size, 2 * NUM_DRIVE_FRAMES)
        self.sectors = nn.Linear(2 * hidden_size, NUM_SECTOR_COUNTS)
        self.nodes = nn.ModuleDict(
            {name: _node_decoder(hidden_size + embedding_size, feature_sizes[name]) for name in MASKED_TYPES}
        )
        self.mask_tokens = nn.ParameterDict({name: torch.zeros(feature_sizes[name]) for name in MASKED_TYPES})
        self.relations = nn.ParameterDict({name: torch.full((hidden_size,), 0.1) for name in RELATIONS})
        self.responses = nn.Linear(embedding_size, num_responses) if num_responses else None

    def scene(self, z_ND: Tensor) -> SceneReconstruction:
        """Reconstruct whole scenes from their embeddings alone."""
        hidden = self.trunk(z_ND)
        raster = self.raster(hidden).unflatten(1, (4, -1))
        return SceneReconstruction(raster, self.drive(hidden).unflatten(1, (-1, 2)), self.sectors(hidden))

    def node(self, name: str, states_MH: Tensor, z_MD: Tensor) -> Tensor:
        """Reconstruct node features from the state of the masked node and its scene's embedding (M, F)."""
        return self.nodes[name](torch.cat([states_MH, z_MD], dim=1))

    def relation(self, name: str, source_EH: Tensor, target_EH: Tensor) -> Tensor:
        """Score edges: s^T diag(r) t (DistMult, arXiv 1412.6575), logits (E)."""
        return (source_EH * self.relations[name] * target_EH).sum(dim=1)


def _node_decoder(input_size: int, output_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(input_size, input_size), nn.ReLU(), nn.Linear(input_size, output_size))
