"""Asks vLLM's engine core now and then whether it is still there.

Owned by `VllmEngine`, which asks in every health check. A stopped process (SIGSTOP, a wedged driver) does not die,
so vLLM notices nothing; without work it would not even miss a step. The core answers between two steps.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

_PATIENCE_S = 0.5  # that one call waits: mostly the answer is there within a step


class Pulse:
    """One question at a time, however often it is asked for.

    Args:
        llm: the `AsyncLLM`.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._asked_at = 0.0
        self._question: asyncio.Task[Any] | None = None

    async def silent_s(self) -> float:
        """Since when the core owes an answer, in seconds; 0.0 when it has answered."""
        question = self._question
        if question is None:
            self._asked_at = time.monotonic()
            question = self._question = asyncio.create_task(self._llm.is_sleeping())
        await asyncio.wait([question], timeout=_PATIENCE_S)
        if not question.done():
            return time.monotonic() - self._asked_at
        if self._question is question:
            self._question = None
        if not question.cancelled():
            question.exception()  # a dead core is vLLM's to tell: `errored`
        return 0.0

    def stop(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
            self._question = None
