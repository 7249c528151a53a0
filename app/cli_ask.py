"""`shoal ask`: one question, answered in the terminal as the answer comes, with its sources and its time.

Speaks `POST /v1/chat/completions` with a stream. The answer goes to stdout; sources, times and notes to stderr.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from app.cli_http import DEFAULT_URL, Api, ApiKey, Event, Url, event_error
from app.cli_output import CliError, one_line, printable, say
from app.cli_stores import store_named

_DONE = "[DONE]"
_TIMING = "server-timing "
_QUOTE_CHARS = 160


def ask(  # noqa: PLR0913  one argument per option
    *,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    store: Annotated[
        str | None,
        typer.Option(help="Answer from this vector store: its name or id.", show_default="no documents"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model.", show_default="the first that can chat")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default="as long as it gets")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Ask a question and watch the answer come, from your documents with --store."""
    asyncio.run(_ask(question, store, model, max_tokens, Api(url, api_key)))


@dataclass(kw_only=True, slots=True)
class Answer:
    """What is known of an answer besides its text."""

    annotations: list[Mapping[str, Any]] = field(default_factory=list)
    stages_ms: dict[str, float] = field(default_factory=dict)  # in the order of the server
    tokens: int = 0
    cut: bool = False  # ended by a limit, not by the model


async def _ask(question: str, store: str | None, model: str | None, max_tokens: int | None, api: Api) -> None:
    async with api:
        body: dict[str, Any] = {
            "model": model or await default_model(api),
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if max_tokens is not None:
            body["max_completion_tokens"] = max_tokens
        if store is not None:
            body["retrieval"] = {"vector_store_ids": [await store_named(api, store)]}
        async with api.stream("/v1/chat/completions", body) as (headers, events):
            answer = await show(events)
        typer.echo()
        report(answer, headers.get("x-shoal-degraded", ""), asked_store=store is not None)


async def default_model(api: Api) -> str:
    """The first model that is not for embeddings.

    Raises:
        CliError: there is none.
    """
    models = await api.call("GET", "/v1/models")
    for model in models["data"]:
        if model.get("type") != "embedding":
            return str(model["id"])
    raise CliError("no chat model is deployed; see: shoal status")


async def show(events: AsyncIterator[Event]) -> Answer:
    """Print the text as it comes; returns the rest once the answer is whole.

    Raises:
        CliError: the server reported an error, or stopped in the middle.
    """
    answer = Answer()
    async for event in events:
        if event.kind == "comment":
            if event.text.startswith(_TIMING):
                answer.stages_ms = stages(event.text.removeprefix(_TIMING))
        elif event.text == _DONE:
            return answer
        else:
            _take(answer, event.text)
    raise CliError("the answer was cut off: the server ended the stream before the answer was complete")


def _take(answer: Answer, data: str) -> None:
    error = event_error(data)
    if error is not None:
        typer.echo()  # the error stands on a line of its own
        raise error
    chunk = json.loads(data)
    answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.tokens)
    for choice in chunk["choices"]:
        delta = choice["delta"]
        answer.annotations += delta.get("annotations") or ()
        answer.cut = answer.cut or choice.get("finish_reason") == "length"
        typer.echo(printable(delta.get("content") or ""), nl=False)


def stages(server_timing: str) -> dict[str, float]:
    """Milliseconds by stage, of a `Server-Timing` value like `queue;dur=1.2, decode;dur=30`."""
    found = {}
    for part in server_timing.split(","):
        name, _, duration = part.strip().partition(";dur=")
        try:
            found[name] = float(duration)
        except ValueError:
            continue
    return found


def report(answer: Answer, degraded: str, *, asked_store: bool) -> None:
    """Print sources, notes and the time of each stage."""
    for number, source in enumerate(sources(answer.annotations), start=1):
        say(f"[{number}] {source}")
    if asked_store and not answer.annotations:
        say("no sources: nothing in the vector store fits the question")
    if degraded:
        say(f"note: the answer had less context than asked for ({degraded})")
    if answer.cut:
        say("note: the answer was cut at the token limit; see --max-tokens")
    if answer.stages_ms:
        parts = [f"{name} {spent:,.0f} ms" for name, spent in answer.stages_ms.items()]
        total_s = sum(answer.stages_ms.values()) / 1e3
        say(f"{total_s:.2f} s for {answer.tokens} tokens: {', '.join(parts)}")


def sources(annotations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each cited chunk once, in the order of the answer: its file and how it begins."""
    cited: dict[str, str] = {}
    for note in annotations:
        if note.get("type") != "file_citation":
            continue
        name, text = str(note.get("filename", "")), str(note.get("text", ""))
        quote = f": “{one_line(text, _QUOTE_CHARS)}”" if text else ""
        cited.setdefault(str(note.get("chunk_id") or note.get("file_id")), f"{name}{quote}")
    return list(cited.values())
