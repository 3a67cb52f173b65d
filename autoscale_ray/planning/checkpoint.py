"""Planner files: weights and training states as safetensors, the configuration as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoscale_ray.config import PlannerConfig
from autoscale_ray.errors import ArtifactError
from autoscale_ray.files import in_one_step
from autoscale_ray.planning.training import PlannerWeights, TrainState

WEIGHTS_NAME, CONFIG_NAME = "planner.safetensors", "planner.json"
_STATE_TENSORS = tuple(field.name for field in fields(TrainState) if field.name != "step")


def save_weights(weights: PlannerWeights, path: Path | str) -> None:
    """Write a trained planner as `planner.safetensors` (model and average) and `planner.json`.

    Args:
        weights: What to write.
        path: Folder, created if missing.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"model": weights.model, "average": weights.average}
    tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    _write(tensors, folder / WEIGHTS_NAME, {})
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(weights.config), indent=1))


def load_weights(path: Path | str) -> PlannerWeights:
    """Read a planner written by `save_weights`.

    Args:
        path: Folder.

    Returns:
        The planner.

    Raises:
        ArtifactError: Missing or damaged files.
    """
    folder = Path(path)
    tensors, _ = _read(folder / WEIGHTS_NAME)
    try:
        tree = json.loads((folder / CONFIG_NAME).read_text())
        tree |= {name: tuple(value) for name, value in tree.items() if isinstance(value, list)}
        config = PlannerConfig(**tree)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            str(folder / CONFIG_NAME), "must hold a planner configuration", str(error)
        ) from error
    model, average = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("model.", "average.")
    )
    return PlannerWeights(config, model, average)


def save_state(state: TrainState, path: Path | str) -> None:
    """Write a training state to one file; a crash leaves the old file or the new one.

    Args:
        state: What to write.
        path: File.
    """
    _write({name: getattr(state, name) for name in _STATE_TENSORS}, Path(path), {"step": str(state.step)})


def load_state(path: Path | str) -> TrainState:
    """Read a training state written by `save_state`.

    Args:
        path: File.

    Returns:
        The state.

    Raises:
        ArtifactError: Missing or damaged file.
    """
    tensors, metadata = _read(Path(path))
    if set(tensors) != set(_STATE_TENSORS) or not metadata.get("step", "").isdigit():
        raise ArtifactError(str(path), "must hold a planner training state", sorted(tensors))
    return TrainState(step=int(metadata["step"]), **tensors)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with in_one_step(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, temporary, metadata
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: torch.clone(file.get_tensor(name)) for name in names}
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(str(path), "must be a readable safetensors file", str(error)) from error
