"""What the driver says about GPUs: a small Protocol, and NVML behind it.

`gpu_share` asks which card is this process's and how much of it a process tree uses. `NvmlCards` needs the package
nvidia-ml-py (extra `gpu`) and a driver; tests bring a card of their own that lives in a file.
"""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

from actors.errors import EngineFailed
from actors.policies.gpu_memory import MIB, Card

_RESERVE_BYTES = 512 * MIB  # the driver's own, and the contexts of whoever looks at the card


class Cards(Protocol):
    """The GPUs of this machine."""

    def mine(self) -> Card:
        """The one card (or MIG slice) that this process was given.

        Raises:
            EngineFailed: there is none, or more than one.
        """

    def used_bytes(self, card: Card) -> int:
        """Memory of the card that anybody uses."""

    def used_by(self, card: Card, pids: AbstractSet[int]) -> int | None:
        """What these processes use together; None where the driver cannot tell (in containers it often cannot)."""


class NvmlCards:
    """Cards as NVML knows them; names a card by CUDA_VISIBLE_DEVICES, which Ray sets for each replica.

    Raises:
        EngineFailed: nvidia-ml-py is not installed, or there is no driver.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise EngineFailed("a share of a GPU needs nvidia-ml-py: pip install shoal[gpu]") from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise EngineFailed(f"the GPU's driver does not answer: {error}") from error
        self._nvml: Any = pynvml

    def mine(self) -> Card:
        """See `Cards.mine`."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        if len(visible) != 1 or not visible[0]:
            raise EngineFailed(
                f"a share is of one GPU and CUDA_VISIBLE_DEVICES names {visible}: set num_gpus ≤ 1"
            )
        handle = self._handle(visible[0])
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        return Card(
            uuid=self._nvml.nvmlDeviceGetUUID(handle),
            total_bytes=int(memory.total),
            reserve_bytes=min(_RESERVE_BYTES, int(memory.total) // 16),  # a slice has less of everything
        )

    def used_bytes(self, card: Card) -> int:
        """See `Cards.used_bytes`."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(card.uuid)).used)

    def used_by(self, card: Card, pids: AbstractSet[int]) -> int | None:
        """See `Cards.used_by`; NVML counts processes as the machine does, not as a container does."""
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle(card.uuid))
        ours = [p for p in processes if p.pid in pids and p.usedGpuMemory is not None]
        return sum(int(p.usedGpuMemory) for p in ours) if ours else None

    def _handle(self, name: str) -> Any:
        try:
            if name.isdigit():
                return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
            return self._nvml.nvmlDeviceGetHandleByUUID(name.encode())  # "GPU-..." and "MIG-..."
        except self._nvml.NVMLError as error:
            raise EngineFailed(f"NVML does not know the GPU {name}: {error}") from error
