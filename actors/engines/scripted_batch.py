"""The scripted engine's batch: who runs, who waits, and how much KV cache they hold.

Driven by `scripted_loop`, which decides when; nothing here knows time. A sequence is admitted, first come first
served, when a place in the batch is free and its prompt and all its output fit the KV cache, so nothing is ever
preempted. `Stream` carries what a request's sequences produce to the one consumer of `generate`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from actors.engines.protocol import EngineCapacity, EngineStats
from actors.engines.scripted_script import Script
from actors.types import TokenDelta, Usage


class Stream:
    """The deltas of one request on their way to its consumer.

    Args:
        request_id: whose.
        prompt_tokens: of the request.
        choices: how many of its choices have not ended yet.
        told_tokens: of choices that ended in an earlier attempt.
    """

    def __init__(self, request_id: str, prompt_tokens: int, choices: int, told_tokens: int = 0) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.deltas: deque[TokenDelta] = deque()
        self.ended = False  # nothing more comes: answered, aborted or failed
        self.failure: str | None = None
        self._open_choices = choices
        self._completion_tokens = told_tokens
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        """Add a delta and wake the consumer. The engine's hottest lines: once per token."""
        self.deltas.append(delta)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def push_last(self, delta: TokenDelta, produced: int) -> None:
        """Add the delta that ends a choice of `produced` tokens; the last choice's also ends the request."""
        self._completion_tokens += produced
        self._open_choices -= 1
        if self._open_choices:
            self.push(delta)
        else:
            self.push_usage(delta)

    def push_usage(self, delta: TokenDelta) -> None:
        """Add the request's last delta."""
        usage = Usage(self.prompt_tokens, self._completion_tokens)
        self.ended = True
        self.push(msgspec.structs.replace(delta, usage=usage))

    def end(self, failure: str | None = None) -> None:
        """Nothing more comes; the consumer sees `failure` as EngineFailed, or just the end."""
        self.ended = True
        self.failure = failure
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def arrival(self) -> asyncio.Future[None]:
        """Done with the next delta, or with the end. Only for a consumer that has taken all deltas."""
        self._waiter = self._loop.create_future()
        return self._waiter


class Sequence:
    """One choice of one request.

    Args:
        stream: where its deltas go.
        script: what it will produce.
        prompt_tokens: that its first step computes; the request's other choices share them.
    """

    __slots__ = ("admitted_at_step", "done", "due", "prefill_tokens", "script", "steps", "stream")

    def __init__(self, stream: Stream, script: Script, prompt_tokens: int) -> None:
        self.stream = stream
        self.script = script
        self.prefill_tokens = prompt_tokens + script.start  # what was delivered is computed again
        self.steps: Iterator[TokenDelta] = script.steps()
        self.admitted_at_step = 0
        self.due = 0.0  # when its fixed service time is over, on the loop's clock
        self.done = False

    @property
    def kv_tokens(self) -> int:
        """KV cache it needs at its end."""
        return self.stream.prompt_tokens + len(self.script)


class Batch:
    """Sequences and their KV cache.

    Args:
        capacity: what fits.
    """

    def __init__(self, capacity: EngineCapacity) -> None:
        self._capacity = capacity
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.output_tokens_total = 0
        self._prompt_tokens_total = 0
        self._steps = 0
        self._kv_used = 0
        self._kv_reserved = 0

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let sequences wait for their turn."""
        self.waiting.extend(sequences)

    def admit(self) -> list[Sequence]:
        """Move those that fit into the batch, in order; the first that does not fit blocks the rest."""
        admitted: list[Sequence] = []
        while self.waiting and len(self.running) < self._capacity.max_sequences:
            first = self.waiting[0]
            if self._kv_reserved + first.kv_tokens > self._capacity.kv_tokens:
                break
            self.waiting.popleft()
            first.admitted_at_step = self._steps
            self._kv_reserved += first.kv_tokens
            self._kv_used += first.stream.prompt_tokens + first.script.start
            self._prompt_tokens_total += first.prefill_tokens
            self.running.append(first)
            admitted.append(first)
        return admitted

    def step(self) -> None:
        """Every running sequence gives one token."""
        running = self.running
        self._steps += 1
        self._kv_used += len(running)
        self.output_tokens_total += len(running)
        ended = False
        for sequence in running:
            delta = next(sequence.steps)
            if delta.finish_reason is None:
                sequence.stream.push(delta)
            else:
                ended = True
                self._release(sequence, produced=len(sequence.script) - sequence.script.start)
                sequence.stream.push_last(delta, len(sequence.script))
        if ended:
            self.running = [sequence for sequence in running if not sequence.done]

    def finish(self, sequence: Sequence) -> None:
        """Give a running sequence's whole output at once and take it out of the batch."""
        self.output_tokens_total += len(sequence.script) - sequence.script.start
        self._release(sequence, produced=0)
        self.running.remove(sequence)
        sequence.stream.push_last(sequence.script.whole(), len(sequence.script))

    def drop(self, stream: Stream) -> None:
        """Forget a request, running or waiting."""
        for sequence in self.running:
            if sequence.stream is stream:
                self._release(sequence, produced=self._steps - sequence.admitted_at_step)
        self.running = [sequence for sequence in self.running if not sequence.done]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.stream is not stream)

    def stats(self) -> EngineStats:
        """The current snapshot."""
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage=self._kv_used / self._capacity.kv_tokens,
            prompt_tokens_total=self._prompt_tokens_total,
            output_tokens_total=self.output_tokens_total,
            preemptions_total=0,
        )

    def _release(self, sequence: Sequence, *, produced: int) -> None:
        sequence.done = True
        self._kv_reserved -= sequence.kv_tokens
        self._kv_used -= sequence.stream.prompt_tokens + sequence.script.start + produced
