"""The two ways to drive and measure, plain torch and compiled numba, behind one set of functions.

Shape legend: N trajectories, T = 41.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoscale_ray.errors import InvalidInputError, MissingExtraError, extra
from autoscale_ray.evaluation.arena import Arena, stack_arenas
from autoscale_ray.evaluation.metrics import Measures, Rules, measure
from autoscale_ray.evaluation.scene import Floats
from autoscale_ray.evaluation.simulate import simulate
from autoscale_ray.evaluation.vehicle import VehicleParameters
from autoscale_ray.extras import has_numba


def choose_backend(backend: str, device: str = "cpu") -> str:
    """Resolve "auto" to numba on the CPU where it is installed, else torch; refuse what cannot run.

    Args:
        backend: "auto", "torch" or "numba".
        device: Device of the torch backend.

    Returns:
        "torch" or "numba".

    Raises:
        InvalidInputError: No such backend.
        MissingExtraError: If "numba" is asked for and not installed.
    """
    if backend not in ("auto", *IN_ARENA):
        raise InvalidInputError("backend", f"must be auto, {' or '.join(IN_ARENA)}", backend)
    if backend == "auto":
        return "numba" if has_numba() and torch.device(device).type == "cpu" else "torch"
    if backend == "numba" and not has_numba():
        raise MissingExtraError("numba", extra("cpu"))
    return backend


def drive_in_arena(arena: Arena, poses_NT3: Floats, rules: Rules, backend: str) -> tuple[Tensor, Measures]:
    """Drive along reference poses in one arena and measure; the past is left out, and v2 comfort is 1.

    Args:
        arena: The arena.
        poses_NT3: (N, 41, 3) reference poses in its frame.
        rules: RULES_V1 or RULES_V2.
        backend: "auto", "torch" or "numba".

    Returns:
        States (N, 41, 11) and measures.
    """
    return IN_ARENA[choose_backend(backend)](arena, poses_NT3, rules)


def drive_freely(poses_NT3: Floats, start_N11: Floats, vehicle: VehicleParameters, backend: str) -> Tensor:
    """Drive along reference poses without a scene; see `simulate`."""
    if choose_backend(backend) == "numba":
        from autoscale_ray.evaluation.compiled import simulate_poses

        return torch.as_tensor(simulate_poses(poses_NT3, start_N11, vehicle))
    return simulate(torch.tensor(poses_NT3), torch.tensor(start_N11), vehicle)


def _in_arena_with_torch(arena: Arena, poses_NT3: Floats, rules: Rules) -> tuple[Tensor, Measures]:
    start_N11 = torch.as_tensor(arena.ego_state).expand(len(poses_NT3), -1)
    states_NT11 = simulate(torch.as_tensor(poses_NT3), start_N11, arena.vehicle)
    scene_N = torch.zeros(len(poses_NT3), dtype=torch.int64)
    return states_NT11, measure(states_NT11, scene_N, stack_arenas([arena]), rules, with_history=False)


def _in_arena_with_numba(arena: Arena, poses_NT3: Floats, rules: Rules) -> tuple[Tensor, Measures]:
    from autoscale_ray.evaluation.compiled import make_tables, measure_poses

    return measure_poses(make_tables(arena), poses_NT3, rules)


IN_ARENA: dict[str, Callable[[Arena, Floats, Rules], tuple[Tensor, Measures]]] = {
    "torch": _in_arena_with_torch,
    "numba": _in_arena_with_numba,
}
