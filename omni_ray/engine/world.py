"""The process group of a gang: its ranks meet at a store that the first of them opens."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=10)
"""After this long a collective that some rank never joined is an error, on the ranks that wait in it."""


def open_store(host: str) -> tuple[TCPStore, int]:
    """A store on a free port of this node (address ``host``), and the port. Only the first rank opens one."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    return store, store.port


def join(index: int, size: int, host: str, port: int, device: torch.device, store: TCPStore | None) -> None:
    """Make this process rank ``index`` of ``size``. The first rank passes the store that it opened.

    Between GPUs the ranks talk over NCCL; on CPUs, and where two ranks share a GPU, which NCCL refuses, over gloo.
    """
    store = store or TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if interface := _interface_towards(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and _own_gpus(store, index, size) else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=TIMEOUT)


def _own_gpus(store: TCPStore, index: int, size: int) -> bool:
    """Whether no two ranks share a GPU."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    store.set(f"gpu-{index}", str(properties.uuid))
    return len({store.get(f"gpu-{i}") for i in range(size)}) == size


def _interface_towards(host: str) -> str | None:
    """The network interface by which this node reaches ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # UDP: nothing is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
    addresses = psutil.net_if_addrs().items()
    return next((name for name, found in addresses if own in [address.address for address in found]), None)
