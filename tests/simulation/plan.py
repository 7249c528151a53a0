"""What happens in one run: a scenario made from its seed alone."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field

from actors.types import PriorityClass

FAR_S = 150.0  # a deadline that no fault of these scenarios may reach


class FaultKind(enum.StrEnum):
    """Who dies, and how."""

    KILL_QUEUE = "kill_queue"
    KILL_REPLICA = "kill_replica"
    KILL_GATEWAY = "kill_gateway"
    STOP_REPLICA = "stop_replica"  # SIGSTOP, later SIGCONT or the health check's kill
    STOP_QUEUE = "stop_queue"
    CUT_BUS = "cut_bus"  # the connection alone
    CUT_GRANTS = "cut_grants"
    DRAIN_REPLICA = "drain_replica"
    CRASH_ENGINE = "crash_engine"
    HANG_ENGINE = "hang_engine"


# Each may cost every request on one replica an attempt.
COSTS_AN_ATTEMPT = frozenset(FaultKind) - {
    FaultKind.KILL_QUEUE,
    FaultKind.KILL_GATEWAY,
    FaultKind.STOP_QUEUE,
    FaultKind.CUT_GRANTS,
}
_KINDS = tuple(FaultKind)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that breaks."""

    kind: FaultKind
    at_s: float  # from the start
    steps: int  # of the event loop that still run after this time
    pick: float  # 0..1: which of those that could break
    lasts_s: float  # a stop, until SIGCONT
    back_after_s: float  # until the next incarnation is up


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One caller and its request. The scripted engine repeats the words, so the answer is known."""

    request_id: str
    at_s: float
    gateway: float  # 0..1: which of those that live
    tenant: str
    priority: PriorityClass
    words: int  # of the prompt
    max_tokens: int | None
    choices: int
    stop: str | None
    predicted_tokens: int
    timeout_s: float
    whole: bool
    leaves_after_s: float | None  # from its arrival
    read_pause_s: float  # before each read

    @property
    def prompt(self) -> str:
        """Different in every request, and in every word."""
        return " ".join(f"{self.request_id}{number}" for number in range(self.words))

    @property
    def is_patient(self) -> bool:
        """Nothing but the death of its gateway may cost it its answer."""
        return self.timeout_s >= FAR_S and self.leaves_after_s is None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run."""

    seed: int
    gateways: int
    replicas: int
    slots: int
    kv_tokens: int
    look_ahead: int
    itl_s: float
    latency_s: float
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...] = ()
    tenant_weights: dict[str, float] = field(default_factory=dict)
    hedging: bool = False  # gateways have served long enough to know when a first token is overdue
    overtaking: bool = False  # calls between two processes may overtake each other
    fault_at_step: tuple[int, FaultKind] | None = None  # instead of `faults`: the systematic walk


def scenario(seed: int, *, size: float = 1.0) -> Scenario:
    """The scenario of a seed.

    Args:
        seed: any number.
        size: 1: some ten requests; more: longer runs with more of everything.
    """
    rng = random.Random(seed)
    if rng.random() < 0.1:
        return _backlog(seed, rng, size)
    window_s = rng.uniform(0.05, 3.0) * size
    number = max(1, round(rng.randint(2, 14) * size))
    return Scenario(
        seed=seed,
        gateways=rng.randint(1, 3),
        replicas=rng.randint(1, 3),
        slots=rng.randint(1, 4),
        kv_tokens=rng.choice([256, 256, 4096]),
        look_ahead=rng.randint(0, 2),
        itl_s=rng.choice([0.01, 0.05, 0.2]),
        latency_s=rng.choice([0.0002, 0.002, 0.02]),
        asks=tuple(_ask(rng, number, window_s) for number in range(number)),
        faults=tuple(sorted(_faults(rng, window_s), key=lambda fault: fault.at_s)),
        tenant_weights={"b": rng.choice([0.5, 2.0])},
        hedging=rng.random() < 0.5,
        overtaking=rng.random() < 0.3,
    )


def walk_scenario(fault: tuple[int, FaultKind] | None) -> Scenario:
    """A small one that is always the same, with one fault between two steps: a walk goes over all of them.

    Args:
        fault: before which step of the event loop, and what.
    """
    asks = tuple(
        Ask(
            request_id=f"q{number}-",
            at_s=0.3 + 0.03 * number,
            gateway=0.5 * (number % 2),
            tenant="ab"[number % 2],
            priority=PriorityClass.BATCH if number == 0 else PriorityClass.STANDARD,
            words=3,
            max_tokens=5 if number == 4 else None,
            choices=2 if number == 1 else 1,
            stop=f" q{number}-2" if number == 5 else None,
            predicted_tokens=4,
            timeout_s=FAR_S,
            whole=number == 2,
            leaves_after_s=0.09 if number == 3 else None,
            read_pause_s=0.0,
        )
        for number in range(6)
    )
    return Scenario(
        seed=3,
        gateways=2,
        replicas=2,
        slots=2,
        kv_tokens=256,
        look_ahead=1,
        itl_s=0.02,
        latency_s=0.001,
        asks=asks,
        hedging=True,
        fault_at_step=fault,
    )


def _backlog(seed: int, rng: random.Random, size: float) -> Scenario:
    """Tenants that all wait for long, and nothing breaks: what fairness is about."""
    asks = [_ask(rng, number, 0.3) for number in range(round(rng.randint(20, 40) * size))]
    return Scenario(
        seed=seed,
        gateways=rng.randint(1, 2),
        replicas=rng.randint(1, 2),
        slots=rng.randint(1, 4),
        kv_tokens=rng.choice([256, 4096]),
        look_ahead=rng.randint(0, 2),
        itl_s=0.01,
        latency_s=rng.choice([0.0002, 0.002]),
        asks=tuple(asks),
        tenant_weights={"b": rng.choice([0.25, 0.5, 2.0, 4.0])},
    )


def _ask(rng: random.Random, number: int, window_s: float) -> Ask:
    priority = rng.choices(tuple(PriorityClass), (4, 4, 2))[0]
    words = rng.choice([1, 3, 8, 20])
    request_id = f"q{number}-"
    return Ask(
        request_id=request_id,
        at_s=0.2 + rng.uniform(0.0, window_s),
        gateway=rng.random(),
        tenant=rng.choice("aabc"),
        priority=priority,
        words=words,
        max_tokens=rng.choice([None, None, 1, 5, 12]),
        choices=rng.choices((1, 2), (6, 1))[0],
        stop=rng.choice([None, None, None, f" {request_id}{words - 1}"]) if words > 1 else None,
        predicted_tokens=rng.choice([1, 10, 40]),
        timeout_s=rng.uniform(0.01, 4.0) if rng.random() < 0.12 else FAR_S,
        whole=rng.random() < 0.35,
        leaves_after_s=rng.uniform(0.0, 2.0) if rng.random() < 0.15 else None,
        read_pause_s=rng.choice([0.0, 0.0, 0.0, 0.1]),
    )


def _faults(rng: random.Random, window_s: float) -> list[Fault]:
    number = rng.choices((0, 1, 2, 4), (2, 10, 5, 3))[0]
    return [
        Fault(
            kind=rng.choice(_KINDS),
            at_s=rng.uniform(0.0, window_s + 1.0),
            steps=rng.randint(0, 60),
            pick=rng.random(),
            lasts_s=rng.choice([0.3, 3.0, 6.0, 40.0]),
            back_after_s=rng.choice([0.01, 0.5, 4.0]),
        )
        for _ in range(number)
    ]
