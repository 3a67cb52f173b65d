"""A device without hardware: tensors that lie on it are tensors of the CPU, and may not meet others.

What runs on an accelerator fails there for reasons that arithmetic on the CPU does not show: a table made on the wrong
side, an index left behind, `.numpy()` of a tensor that lies elsewhere. This device, a Python backend of torch's
PrivateUse1 key, computes what the CPU computes and refuses what CUDA refuses, so those faults are found where there is
no accelerator. It says nothing about the numbers, the kernels or the speed of a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
_DEVICE = torch.device("privateuseone", 0)  # what it is called before it has its name
_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
"""Operations that may take tensors of two devices."""
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)
"""Operations that take indices of the CPU too, as those of CUDA do."""


class SimulatedTensor(torch.Tensor):
    """A tensor on the device; `held` is its content on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=_DEVICE
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _refuse_strangers(operation, tensors)
        here = {**tree_map(_held, kwargs), **({} if device is None else {"device": "cpu"})}
        found = operation(*tree_map(_held, args), **here)
        if operation is _ATEN.copy_.default and not isinstance(args[0], SimulatedTensor):
            return args[0]  # copied to the CPU
        if device is not None and torch.device(device).type == "cpu":
            return found.clone()
        made = tree_map(lambda leaf: SimulatedTensor(leaf) if isinstance(leaf, Tensor) else leaf, found)
        made = return_and_correct_aliasing(operation, args, kwargs, made)
        for tensor in tensors:
            if isinstance(tensor, SimulatedTensor) and tensor.held.size() != tensor.size():
                # Its face cannot follow: a test that needs this must fail, not go on with a wrong shape.
                raise NotImplementedError(f"{operation} changed the size of a tensor of this device")
        return made


def _held(leaf: Any) -> Any:
    if not isinstance(leaf, SimulatedTensor):
        return leaf
    # torch has changed the face alone: fail, rather than compute in another type.
    if leaf.dtype != leaf.held.dtype:
        raise NotImplementedError(
            "assignment to .data (Module.half() and the like) of a tensor of this device"
        )
    return leaf.held


def _refuse_strangers(operation: Any, tensors: list[Tensor]) -> None:
    """Raise where a tensor of the CPU meets one of the device; a single number of the CPU may."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0]
    if strangers and operation not in _COPIES + _INDEXED:
        raise RuntimeError(
            f"{operation}: expected all tensors to be on the same device, found {NAME} and cpu"
        )


def _empty(size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype))


def _empty_strided(
    size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _made_on_cpu(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a kernel for what torch would otherwise make empty and then resize."""

    def make(*args: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return SimulatedTensor(operation(*args, dtype=dtype))

    return make


_setup_privateuseone_for_python_backend(NAME)
_KERNELS = torch.library.Library("aten", "IMPL")
for _name, _kernel in {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy_from,
    "arange": _made_on_cpu(_ATEN.arange.default),
    "arange.start": _made_on_cpu(_ATEN.arange.start),
    "arange.start_step": _made_on_cpu(_ATEN.arange.start_step),
    "eye": _made_on_cpu(_ATEN.eye.default),
}.items():
    _KERNELS.impl(_name, _kernel, "PrivateUse1")
