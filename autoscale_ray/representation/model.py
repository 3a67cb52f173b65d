"""The Graph-RAE model: made, applied to scenes, kept on disk.

Shape legend: N scenes, D embedding size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoscale_ray.config import RepresentationConfig
from autoscale_ray.errors import ArtifactError
from autoscale_ray.representation import ENCODER_VERSION
from autoscale_ray.representation.decoder import GraphDecoder
from autoscale_ray.representation.encoder import GraphEncoder
from autoscale_ray.representation.encoder import Path as EncoderPath
from autoscale_ray.representation.scene_graph import SceneGraph, graph_from_batch
from autoscale_ray.scenes.batch import SceneBatch
from autoscale_ray.scenes.pool import ScenePool

GRAPH_CHUNK = 1024
"""Scenes turned into a graph at a time; bounds memory, not the result."""
WEIGHTS_FILE = "graph_rae.safetensors"
CONFIG_FILE = "graph_rae.json"


class GraphRae(nn.Module):
    """Encoder and decoder with the configuration they were made from."""

    def __init__(
        self, config: RepresentationConfig, feature_sizes: Mapping[str, int], num_responses: int = 0
    ):
        super().__init__()
        self.config = config
        self.feature_sizes = dict(feature_sizes)
        self.num_responses = num_responses
        self.encoder = GraphEncoder(
            feature_sizes, config.hidden_size, config.embedding_size, config.num_layers
        )
        self.decoder = GraphDecoder(feature_sizes, config.hidden_size, config.embedding_size, num_responses)


def new_model(
    config: RepresentationConfig, feature_sizes: Mapping[str, int], seed: int, num_responses: int = 0
) -> GraphRae:
    """Make an untrained model whose weights depend on the seed alone.

    Args:
        config: Sizes.
        feature_sizes: Width of the encoder input by node type.
        seed: Seed of the initial weights.
        num_responses: Width of the response head, 0 for none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GraphRae(config, feature_sizes, num_responses).eval()


def feature_sizes_of(graph: SceneGraph) -> dict[str, int]:
    """Return the width of the encoder input by node type."""
    return {name: table.shape[1] for name, table in graph.features.items()}


def pool_batches(pool: ScenePool, rows: np.ndarray, size: int = GRAPH_CHUNK) -> Iterator[SceneBatch]:
    """Yield the scenes `rows` of a pool, so many at a time."""
    for start in range(0, len(rows), size):
        yield pool.batch(rows[start : start + size])


@torch.no_grad()
def embed_batch(model: GraphRae, batch: SceneBatch, path: EncoderPath = "fast") -> Tensor:
    """Embed the scenes of a batch.

    Args:
        model: In evaluation mode; the scenes are taken to its device and become graphs there.
        batch: N scenes.
        path: See `encoder.GraphEncoder`.

    Returns:
        Float32 (N, D), on the device of the model.
    """
    device = next(model.parameters()).device
    graph = graph_from_batch(batch.to(device), use_future=model.config.use_future)
    return model.encoder.embed(graph, path).float()


def embed(
    model: GraphRae, pool: ScenePool, rows: np.ndarray | None = None, batch_size: int = GRAPH_CHUNK
) -> np.ndarray:
    """Embed scenes of a pool.

    Args:
        model: In evaluation mode, on any device.
        pool: Scenes.
        rows: Row numbers; None for all.
        batch_size: Scenes encoded at a time; bears on memory only.

    Returns:
        Float32 (N, D), in the order of `rows`.
    """
    chosen = np.arange(len(pool)) if rows is None else np.asarray(rows, dtype=np.int64)
    parts = [embed_batch(model, batch).cpu().numpy() for batch in pool_batches(pool, chosen, batch_size)]
    return np.concatenate([np.zeros((0, model.config.embedding_size), np.float32), *parts])


def save(model: GraphRae, folder: Path | str) -> None:
    """Write weights (safetensors) and configuration (JSON) into a folder.

    Args:
        model: Any model.
        folder: Created if it is missing.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / WEIGHTS_FILE)
    described = {
        "version": ENCODER_VERSION,
        "feature_sizes": model.feature_sizes,
        "num_responses": model.num_responses,
        "config": dataclasses.asdict(model.config),
    }
    (path / CONFIG_FILE).write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")


def load(folder: Path | str) -> GraphRae:
    """Read a model written by `save`.

    Args:
        folder: Folder with both files.

    Raises:
        ArtifactError: A file is missing, damaged, of another version, or does not fit the other.
    """
    path = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ArtifactError(str(path / name), "file of a saved encoder is missing")
    try:
        described = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        version = described["version"]
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError(str(path / CONFIG_FILE), "must be the description of an encoder") from error
    if version != ENCODER_VERSION:
        raise ArtifactError(str(path / CONFIG_FILE), f"must be of encoder version {ENCODER_VERSION}", version)
    try:
        config = TypeAdapter(RepresentationConfig).validate_python(described["config"])
        model = new_model(config, described["feature_sizes"], 0, described["num_responses"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # pydantic's are ValueErrors
        raise ArtifactError(str(path / CONFIG_FILE), "must be the description of an encoder") from error
    try:
        model.load_state_dict(load_file(path / WEIGHTS_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            str(path / WEIGHTS_FILE), "weights do not fit the configuration beside them"
        ) from error
    return model
