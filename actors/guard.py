"""Calls parts that may be slow or down: a time-out and a circuit breaker around each.

`actors.retrieval` makes its calls to the embedder and the vector index through it. When a circuit opens is
`actors.policies.breaker`'s to say.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from actors.errors import DeadlineExceeded, InvalidRequest, Overloaded
from actors.policies.breaker import BreakerPolicy, CircuitBreaker
from actors.telemetry import logger

T = TypeVar("T")
_CIRCUITS = 1000  # the ones used last are remembered
_log = logger("guard")


class LeftOut(Exception):
    """A part did not answer.

    Args:
        part: its name in `degraded`.
        reason: whether it was late or down.
        retry_after_s: when it may be back.
    """

    def __init__(
        self, part: str, reason: Literal["timeout", "unavailable"], retry_after_s: float = 1.0
    ) -> None:
        super().__init__(f"{part}={reason}")
        self.reason = reason
        self.retry_after_s = retry_after_s


class Guard:
    """Time-outs and circuits.

    Args:
        policy: of every circuit.
        fair_timeout_s: a part that had less time than this and was late is not blamed for it.
        now: monotonic clock in seconds.
    """

    def __init__(
        self, policy: BreakerPolicy, *, fair_timeout_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._fair_timeout_s = fair_timeout_s
        self._now = now
        self._circuits: OrderedDict[str, CircuitBreaker] = OrderedDict()

    async def call(
        self, part: str, work: Callable[[], Awaitable[T]], *, timeout_s: float, circuit: str = ""
    ) -> T:
        """Await `work()` unless the part's circuit is open.

        Args:
            part: the part's name.
            work: starts the call.
            timeout_s: for the call.
            circuit: what fails alone: one broken collection must not close the others.

        Raises:
            LeftOut: it is down, was late, or is not asked at the moment.
            InvalidRequest: the part refused what it was asked.
        """
        breaker = self._breaker(f"{part}:{circuit}")
        if not breaker.allow(self._now()):
            raise LeftOut(part, "unavailable", breaker.retry_after_s(self._now()))
        try:
            async with asyncio.timeout(timeout_s):
                found = await work()
        except InvalidRequest:
            breaker.succeeded()
            raise
        except (TimeoutError, DeadlineExceeded):
            self._late(breaker, timeout_s)
            raise LeftOut(part, "timeout") from None
        except Overloaded as error:
            breaker.abandoned()  # it is well and busy: it said so itself
            raise LeftOut(part, "unavailable", error.retry_after_s or 1.0) from None
        except Exception as error:
            breaker.failed(self._now())
            _log.warning("part_failed", part=part, error=repr(error))
            raise LeftOut(part, "unavailable") from None
        except BaseException:
            breaker.abandoned()
            raise
        breaker.succeeded()
        return found

    def _late(self, breaker: CircuitBreaker, timeout_s: float) -> None:
        if timeout_s >= self._fair_timeout_s:
            breaker.failed(self._now())
        else:
            breaker.abandoned()

    def _breaker(self, name: str) -> CircuitBreaker:
        breaker = self._circuits.get(name) or CircuitBreaker(self._policy)
        self._circuits[name] = breaker
        self._circuits.move_to_end(name)
        if len(self._circuits) > _CIRCUITS:
            self._circuits.popitem(last=False)
        return breaker
