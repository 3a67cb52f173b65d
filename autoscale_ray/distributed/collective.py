"""What trainers exchange tensors through: which library, and over which network."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # what a TorchConfig names may be extended, by this alone


def collective_backend(gpus_per_worker: float) -> str:
    """Return what workers exchange tensors through: NCCL takes GPU tensors alone and refuses two workers on one GPU."""
    return "cpu:gloo,cuda:nccl" if gpus_per_worker >= 1 else "gloo"


def interface_of(address: str) -> str | None:
    """Return the network interface of this machine that has an address, or None where none has it."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None


def use_network_of_ray() -> None:
    """Let gloo listen where this node's Ray does, unless the user has said where.

    By itself gloo listens where the host name leads; on Debian that is 127.0.1.1, which no other machine reaches. NCCL
    leaves loopback out by itself.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_network_of_ray)
        super().on_start(worker_group, backend_config)


class CollectiveConfig(TorchConfig):
    """Ray Train's own set-up of the process group, over the network that Ray itself uses."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """Return what sets the process group up."""
        return _Backend
