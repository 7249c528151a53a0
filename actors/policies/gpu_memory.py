"""Who gets how many bytes of a GPU; pure, asked by `actors.engines.gpu_ledger` and `gpu_share`.

`num_gpus=0.25` is bookkeeping of Ray's and isolates nothing. Here a fraction becomes a budget in bytes, an engine's
need apart from its KV cache is known before it starts, and what is left of the budget is the KV cache: no engine
looks at a card that others change at the same time (vllm#55827, #56830).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from actors.errors import EngineFailed

MIB = 1 << 20
State = Literal["ready", "asleep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU, or a slice of one (MIG)."""

    uuid: str
    total_bytes: int
    reserve_bytes: int = 0  # of the driver and of the contexts of processes that hold no lease

    @property
    def usable_bytes(self) -> int:
        """What leases may add up to."""
        return self.total_bytes - self.reserve_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Bytes of a card that one replica may use."""

    owner: str  # the replica
    card: str  # uuid
    size_bytes: int  # while READY
    asleep_bytes: int = 0  # of them, while it sleeps
    state: State = "ready"
    idle_since: float | None = None  # monotonic seconds of this machine; None: it works
    asked_to_sleep: bool = False  # a neighbour waits for its bytes

    @property
    def held_bytes(self) -> int:
        """What it takes of the card now."""
        return self.size_bytes if self.state == "ready" else self.asleep_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What an engine takes of a card beside its KV cache, measured on a start."""

    size_bytes: int  # weights, activations, CUDA graphs, the process's context


def budget_bytes(num_gpus: float, card: Card) -> int:
    """The bytes that a fraction of a card stands for.

    Raises:
        EngineFailed: the fraction is none of one card.
    """
    if not 0 < num_gpus <= 1:
        raise EngineFailed(f"num_gpus={num_gpus:g} is no share of one card; allowed: above 0, at most 1")
    return int(num_gpus * card.usable_bytes)


def require_room(card: Card, leases: Iterable[Lease], wanted_bytes: int, owner: str) -> None:
    """Refuse a lease that would make the card's leases exceed it; an owner's own lease does not count.

    Raises:
        EngineFailed: there is no room; the message says how much there is and who has the rest.
    """
    missing = missing_bytes(card, leases, wanted_bytes, owner)
    if missing > 0:
        free = wanted_bytes - missing
        raise EngineFailed(
            f"GPU {card.uuid} has {free // MIB} MiB left to lease of {card.usable_bytes // MIB} and "
            f"{wanted_bytes // MIB} are asked for: lower num_gpus, or move a model"
        )


def missing_bytes(card: Card, leases: Iterable[Lease], wanted_bytes: int, owner: str) -> int:
    """How much the card lacks for `owner` to hold `wanted_bytes`; 0 when there is room."""
    held = sum(lease.held_bytes for lease in leases if lease.card == card.uuid and lease.owner != owner)
    return max(held + wanted_bytes - card.usable_bytes, 0)


def kv_cache_bytes(budget: int, footprint: Footprint, least_bytes: int) -> int:
    """What is left of a budget for the KV cache.

    Args:
        budget: bytes of the lease.
        footprint: everything else that the engine takes.
        least_bytes: below this the engine is not worth starting: one sequence must fit.

    Raises:
        EngineFailed: the model does not fit into the budget; the message says how large it must be.
    """
    left = budget - footprint.size_bytes
    if left < least_bytes:
        raise EngineFailed(
            f"the model takes {footprint.size_bytes // MIB} MiB of the card and at least {least_bytes // MIB} of KV "
            f"cache, and its share is {budget // MIB} MiB: raise num_gpus"
        )
    return left


def within(lease_bytes: int, used_bytes: int, tolerance: float) -> bool:
    """Does a process tree keep to its lease? Less is as suspect as more: something was not loaded."""
    return abs(used_bytes - lease_bytes) <= tolerance * lease_bytes


def sleepers(card: Card, leases: Iterable[Lease], wanted_bytes: int, owner: str) -> list[Lease]:
    """Whom to ask to sleep so that `owner` can wake: those idle for longest, no more than it takes.

    Returns:
        The leases to be asked; empty when there is room, or when even all idle ones would not make any.
    """
    here = [lease for lease in leases if lease.card == card.uuid]
    missing = missing_bytes(card, here, wanted_bytes, owner)
    # Those asked before are on their way and count first.
    idle = sorted(
        (
            lease
            for lease in here
            if lease.state == "ready" and lease.owner != owner and lease.idle_since is not None
        ),
        key=lambda lease: (not lease.asked_to_sleep, lease.idle_since),
    )
    chosen: list[Lease] = []
    for lease in idle:
        if missing <= 0:
            break
        chosen.append(lease)
        missing -= lease.size_bytes - lease.asleep_bytes
    return chosen if missing <= 0 else []
