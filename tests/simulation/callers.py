"""Callers of the simulated gateways: what each got, and whether it may have got that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from actors.engines import scripted_tokenizer as tokenizer
from actors.errors import ShoalError
from actors.handles.model import Admission, ModelClient, ModelStream
from actors.telemetry import StageClock
from actors.types import (
    GenerationRequest,
    Principal,
    SamplingParams,
    TokenDelta,
    Usage,
)
from tests.simulation.plan import Ask

_ALWAYS_OK = ("deadline_exceeded", "overloaded")  # for who has a near deadline


class Caller:
    """One request in a gateway's process.

    Attributes:
        outcome: "complete", "left", "connection" (its gateway died) or the code of an error; None until it ends.
        texts: by choice.
        token_ids: by choice.
    """

    def __init__(self, ask: Ask, now: Callable[[], float]) -> None:
        self.ask = ask
        self._now = now
        self.texts = [""] * ask.choices
        self.token_ids: list[list[int]] = [[] for _ in range(ask.choices)]
        self.finished = [""] * ask.choices
        self.outcome: str | None = None
        self.message = ""
        self.began_at = self.ended_at = now()
        self.usage: Usage | None = None
        self.settled: list[Usage | None] = []
        self.faults_before: list[str] = []

    async def run(self, model: ModelClient) -> None:
        """Ask, read, and note what came of it."""
        ask = self.ask
        self.began_at = self._now()
        stream: ModelStream | None = None
        try:
            stream = await model.generate(
                _request(ask), _admission(ask), StageClock(self._now), self.settled.append
            )
            async for delta in stream:
                self._take(delta)
                if ask.read_pause_s:
                    await asyncio.sleep(ask.read_pause_s)
                    for ready in stream.take_ready():
                        self._take(ready)
            self.end("complete")
        except asyncio.CancelledError:
            self.end("left")
        except ShoalError as error:
            self.end(error.code, error.message)
        finally:
            if stream is not None:
                await stream.aclose()

    def end(self, outcome: str, message: str = "") -> None:
        """Note the outcome, once."""
        if self.outcome is None:
            self.outcome, self.message, self.ended_at = outcome, message, self._now()

    def wrongs(self, deaths: int) -> list[str]:
        """What should not have happened to it.

        Args:
            deaths: how many faults of the run may have cost it an attempt.
        """
        found = [f"{self.ask.request_id}: {wrong}" for wrong in self._wrong_tokens()]
        if self.outcome is None:
            found.append(f"{self.ask.request_id}: it never heard anything")
            return found
        late_s = self.ended_at - self.began_at - self.ask.timeout_s
        if late_s > 1.0 and not self.ask.read_pause_s:
            found.append(f"{self.ask.request_id}: its outcome came {late_s:.2f} s after its deadline")
        allowed = {"complete", "connection"}
        if not self.ask.is_patient:
            allowed.update(_ALWAYS_OK)
        if self.ask.leaves_after_s is not None:
            allowed.add("left")
        if deaths >= 3:
            allowed.update({"replica_gone", "engine_failed", "unavailable"})
        if self.outcome not in allowed:
            found.append(f"{self.ask.request_id}: {self.outcome} is not allowed here: {self.message}")
        if self.outcome != "connection" and len(self.settled) != 1:
            found.append(f"{self.ask.request_id}: settled {len(self.settled)} times")
        return found

    def _take(self, delta: TokenDelta) -> None:
        self.texts[delta.choice] += delta.text
        self.token_ids[delta.choice] += delta.token_ids
        if delta.finish_reason is not None:
            self.finished[delta.choice] = delta.finish_reason
        if delta.usage is not None:
            self.usage = delta.usage

    def _wrong_tokens(self) -> list[str]:
        ids, text, finish = expected(self.ask)
        wrongs = []
        for choice in range(self.ask.choices):
            got_ids, got_text = self.token_ids[choice], self.texts[choice]
            if got_ids != ids[: len(got_ids)] or not text.startswith(got_text):
                wrongs.append(
                    f"choice {choice} has a token twice, missing or wrong: {got_text!r} is no beginning of {text!r}"
                )
            elif self.outcome == "complete" and (got_ids, got_text, self.finished[choice]) != (
                ids,
                text,
                finish,
            ):
                wrongs.append(
                    f"choice {choice} ended silently: {got_text!r} {self.finished[choice]!r} "
                    f"and not {text!r} {finish!r}"
                )
        if self.outcome == "complete":
            made = len(ids) * self.ask.choices
            if self.usage is None or self.usage.completion_tokens != made:
                wrongs.append(f"its usage is {self.usage} for {made} tokens")
        return wrongs


def expected(ask: Ask) -> tuple[list[int], str, str]:
    """Token ids, text and finish reason of an undisturbed answer, without asking any engine."""
    pieces = tokenizer.split(ask.prompt)
    finish = "stop"
    if ask.max_tokens is not None and len(pieces) > ask.max_tokens:
        pieces, finish = pieces[: ask.max_tokens], "length"
    text = "".join(pieces)
    if ask.stop is not None and (cut := text.find(ask.stop)) >= 0:
        produced = 0
        for number, piece in enumerate(pieces):
            produced += len(piece)
            if produced >= cut + len(ask.stop):
                pieces, text, finish = pieces[: number + 1], text[:cut], "stop"
                break
    return [tokenizer.token_id(piece) for piece in pieces], text, finish


def _request(ask: Ask) -> GenerationRequest:
    return GenerationRequest(
        request_id=ask.request_id,
        prompt=ask.prompt,
        sampling=SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=0.0,
            n=ask.choices,
            stop=(ask.stop,) if ask.stop is not None else (),
        ),
    )


def _admission(ask: Ask) -> Admission:
    return Admission(
        principal=Principal(tenant=ask.tenant, priority=ask.priority),
        prompt_tokens=len(tokenizer.split(ask.prompt)),
        predicted_output_tokens=ask.predicted_tokens,
        timeout_s=ask.timeout_s,
        whole=ask.whole,
    )
