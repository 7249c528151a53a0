"""A response as OpenAI's object and as the events of its stream, both read from its facts.

`ResponseReader` is a state machine over the facts of one response (`actors.policies.responses`). Reading the same
facts again, in any process, gives the same events with the same numbers: that is what lets a stream be resumed at
any of them. `app.api.responses` feeds it, with facts as they come or from the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from actors.errors import ShoalError
from actors.policies.citations import MarkerFilter, attribute
from actors.policies.responses import ENDED, Began, Ended, Fact, Said, Searched, Status
from actors.types import Message, Passage, TokenDelta, Usage
from app.schemas.chat_answers import file_citation
from app.schemas.responses import ResponsesRequest

_FRAME = b"event: %b\ndata: %b\n\n"
_DELTA = (
    b"event: response.output_text.delta\n"
    b'data: {"type":"response.output_text.delta",%b,"delta":%b,"sequence_number":%d}\n\n'
)


def head_of(body: ResponsesRequest, response_id: str, created_at: int) -> dict[str, Any]:
    """What a response object says that its log does not.

    Args:
        body: the request; most of it is repeated.
        response_id: its id.
        created_at: unix seconds.
    """
    text = (
        body.text.format.model_dump(by_alias=True, exclude_none=True)
        if body.text and body.text.format
        else {}
    )
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": True,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": body.tier_name(),
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text", **text}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump(by_alias=True, exclude_none=True) for tool in body.tools or ()],
        "top_logprobs": 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
        "searches": body.search is not None,
    }


def input_items(messages: Sequence[Message], response_id: str) -> list[dict[str, Any]]:
    """The input of a response, as `/input_items` shows it."""
    return [
        {
            "id": f"msg_{response_id.removeprefix('resp_')}in{index}",
            "type": "message",
            "role": message.role,
            "status": "completed",
            "content": [
                {"type": "input_text", "text": message.content}
                if message.role != "assistant"
                else {"type": "output_text", "text": message.content, "annotations": []}
            ],
        }
        for index, message in enumerate(messages)
    ]


class ResponseReader:
    """One response as its facts come.

    Args:
        head: of `head_of`.
        results: the passages of a search are shown, as `include` asks.

    Attributes:
        status: up to now.
    """

    def __init__(self, head: dict[str, Any], *, results: bool = False) -> None:
        self._head = {name: value for name, value in head.items() if name != "searches"}
        self._searches = bool(head["searches"])
        self._results = results
        self._number = 0
        self.status: Status = "queued" if head["background"] else "in_progress"
        suffix = str(head["id"]).removeprefix("resp_")
        self._message_id, self._search_id = f"msg_{suffix}", f"fs_{suffix}"
        self._searched: Searched | None = None
        self._filter: MarkerFilter | None = None
        self._parts: list[str] = []
        self._speaks = False  # the message has begun
        self._annotations: list[dict[str, Any]] = []
        self._usage: Usage | None = None
        self._ended: Ended | None = None
        place = {"item_id": self._message_id, "output_index": int(self._searches), "content_index": 0}
        self._place = msgspec.json.encode({**place, "logprobs": []})[1:-1]

    # --- the object ----------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The answer up to now, without citation markers."""
        return "".join(self._parts)

    def body(self) -> dict[str, Any]:
        """The response object as it is now."""
        ended = self._ended
        error = {"code": ended.code, "message": ended.message} if ended is not None and ended.code else None
        reason = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            **self._head,
            "store": self._head["store"] and (ended is None or ended.stored),
            "status": self.status,
            "completed_at": ended.at if ended is not None and self.status == "completed" else None,
            "error": error,
            "incomplete_details": reason,
            "output": self._output(),
            "usage": _usage(self._usage),
        }

    def _output(self) -> list[dict[str, Any]]:
        found = []
        if self._searched is not None:
            found.append(self._search_item(_search_status(self._searched)))
        if self._speaks:
            found.append(self._message_item())
        return found

    def _search_item(self, status: str) -> dict[str, Any]:
        done = self._searched
        shown = self._results and done is not None
        return {
            "id": self._search_id,
            "type": "file_search_call",
            "status": status,
            "queries": [done.query] if done is not None else [],
            "results": [_result(passage) for passage in done.passages]
            if shown and done is not None
            else None,
        }

    def _message_item(self) -> dict[str, Any]:
        over = self.status in ENDED
        status = ("completed" if self.status == "completed" else "incomplete") if over else "in_progress"
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": self._annotations, "logprobs": []}

    # --- the events ----------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The events before the first fact."""
        names = ["response.created", *(["response.queued"] if self._head["background"] else [])]
        return b"".join(self._with_body(name) for name in names)

    def add(self, fact: Fact) -> bytes:
        """Take the next fact; returns its events, encoded."""
        if isinstance(fact, Said):
            return self._say(fact.delta)
        return b"".join(self._about(fact))

    def broken(self, error: ShoalError) -> bytes:
        """The event that says that no more can be told; the response itself may go on."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def skip_to(self, number: int, events: Callable[[], bytes]) -> bytes:
        """The events that `events` makes, without those up to `number`."""
        first = self._number
        made = events()
        if first > number:
            return made
        frames = made.split(b"\n\n")[:-1]
        return b"".join(frame + b"\n\n" for at, frame in enumerate(frames, start=first) if at > number)

    def _about(self, fact: Began | Searched | Ended) -> Iterator[bytes]:
        if isinstance(fact, Began):
            self.status = "in_progress"
            yield self._with_body("response.in_progress")
        elif isinstance(fact, Searched):
            yield from self._search(fact)
        else:
            yield from self._end(fact)

    def _search(self, fact: Searched) -> Iterator[bytes]:
        place = {"item_id": self._search_id, "output_index": 0}
        yield self._event("response.output_item.added", output_index=0, item=self._search_item("in_progress"))
        for name in ("in_progress", "searching", "completed"):
            yield self._event(f"response.file_search_call.{name}", **place)
        self._searched = fact
        if fact.passages:
            self._filter = MarkerFilter(len(fact.passages))
        yield self._event(
            "response.output_item.done", output_index=0, item=self._search_item(_search_status(fact))
        )

    def _say(self, delta: TokenDelta) -> bytes:
        self._usage = delta.usage or self._usage
        opening = b"" if self._speaks else b"".join(self._begin_message())
        text = delta.text
        if self._filter is not None:
            text = self._filter.feed(text)
            if delta.finish_reason:
                text += self._filter.flush()
        if not text:
            return opening
        self._parts.append(text)
        number = self._next()
        return opening + _DELTA % (self._place, msgspec.json.encode(text), number)

    def _begin_message(self) -> Iterator[bytes]:
        self._speaks = True
        index = int(self._searches)
        item = {**self._message_item(), "content": []}
        yield self._event("response.output_item.added", output_index=index, item=item)
        yield self._event("response.content_part.added", **self._at(), part=self._part())

    def _end(self, fact: Ended) -> Iterator[bytes]:
        if self._speaks:
            if self._filter is not None and (rest := self._filter.flush()):
                self._parts.append(rest)  # it was cut off in what might have become a marker
                yield _DELTA % (self._place, msgspec.json.encode(rest), self._next())
            yield from self._annotate()
            yield self._event("response.output_text.done", **self._at(), text=self.text, logprobs=[])
            yield self._event("response.content_part.done", **self._at(), part=self._part())
        self.status, self._ended = fact.status, fact
        if self._speaks:
            index = int(self._searches)
            yield self._event("response.output_item.done", output_index=index, item=self._message_item())
        # OpenAI has no event for the end of a cancelled response; this one carries its status and what there is.
        last = "incomplete" if fact.status == "cancelled" else fact.status
        yield self._with_body(f"response.{last}")

    def _annotate(self) -> Iterator[bytes]:
        if self._filter is None or self._searched is None:
            return
        cited = attribute(self.text, self._searched.passages, self._filter.marks)
        for index, citation in enumerate(cited):
            annotation = file_citation(citation.passage, citation.index)
            self._annotations.append(annotation)
            yield self._event(
                "response.output_text.annotation.added",
                **self._at(),
                annotation_index=index,
                annotation=annotation,
            )

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": int(self._searches), "content_index": 0}

    def _with_body(self, name: str) -> bytes:
        return self._event(name, response=self.body())

    def _event(self, name: str, **fields: Any) -> bytes:
        value = {"type": name, **fields, "sequence_number": self._next()}
        return _FRAME % (name.encode(), msgspec.json.encode(value))

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def _search_status(fact: Searched) -> str:
    """What a degraded search left out is said where OpenAI says it."""
    if not fact.degraded:
        return "completed"
    return "incomplete" if fact.passages else "failed"


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    """OpenAI's `usage` of a response."""
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _result(passage: Passage) -> dict[str, Any]:
    return {
        "file_id": passage.file_id,
        "filename": passage.filename,
        "score": passage.score,
        "text": passage.text,
        "attributes": dict(passage.attributes),
    }
