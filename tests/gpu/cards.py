"""Cards for tests: one that lives in a file, and the real one, behind the same few calls.

`FileCard` is NVML and the driver's allocator in one: processes allocate, all see what is used, a card that is full
raises, and what a dead process held comes back. `CudaCard` allocates with torch on the GPU that CUDA_VISIBLE_DEVICES
names and asks NVML.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol

import psutil

from actors.engines.gpu_cards import Cards, NvmlCards
from actors.policies.gpu_memory import MIB, Card


class OutOfMemory(RuntimeError):
    """The card is full."""


class Memory(Cards, Protocol):
    """A card that can also be filled."""

    def allocate(self, tag: str, size_bytes: int) -> None:
        """Take memory under a name.

        Raises:
            OutOfMemory: there is not so much.
        """

    def free(self, tag: str) -> None:
        """Give it back."""


class FileCard:
    """A pretended GPU, shared by all processes that know its file."""

    def __init__(self, path: Path, total_bytes: int = 80 << 30, reserve_bytes: int = 512 * MIB) -> None:
        self._path = path
        self._card = Card(uuid="GPU-fake", total_bytes=total_bytes, reserve_bytes=reserve_bytes)

    def mine(self) -> Card:
        return self._card

    def used_bytes(self, card: Card) -> int:
        return sum(sum(tags.values()) for tags in self._change(lambda _: None).values())

    def used_by(self, card: Card, pids: AbstractSet[int]) -> int:
        held = self._change(lambda _: None)
        return sum(sum(tags.values()) for pid, tags in held.items() if int(pid) in pids)

    def allocate(self, tag: str, size_bytes: int) -> None:
        def take(held: dict[str, dict[str, int]]) -> None:
            used = sum(sum(tags.values()) for tags in held.values())
            if used + size_bytes > self._card.total_bytes:
                raise OutOfMemory(
                    f"{size_bytes // MIB} MiB asked for, {(self._card.total_bytes - used) // MIB} free"
                )
            held.setdefault(str(os.getpid()), {})[tag] = size_bytes

        self._change(take)

    def free(self, tag: str) -> None:
        self._change(lambda held: held.get(str(os.getpid()), {}).pop(tag, None))

    def _change(self, change: Callable[[dict[str, dict[str, int]]], Any]) -> dict[str, dict[str, int]]:
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            held = {
                pid: tags
                for pid, tags in json.loads(file.read() or "{}").items()
                if psutil.pid_exists(int(pid))
            }
            change(held)
            file.truncate(0)
            file.write(json.dumps(held))
            return held


class CudaCard:
    """The real card of this process."""

    def __init__(self) -> None:
        self._nvml = NvmlCards()
        self._tensors: dict[str, Any] = {}
        self.mine, self.used_bytes, self.used_by = self._nvml.mine, self._nvml.used_bytes, self._nvml.used_by

    def allocate(self, tag: str, size_bytes: int) -> None:
        import torch

        try:
            self._tensors[tag] = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error

    def free(self, tag: str) -> None:
        import torch

        self._tensors.pop(tag, None)
        torch.cuda.empty_cache()

    def multiply(self) -> None:
        """Work for the card: something to disturb, and to be disturbed."""
        import torch

        square = torch.randn(2048, 2048, device="cuda")
        torch.cuda.synchronize()
        (square @ square).sum().item()
