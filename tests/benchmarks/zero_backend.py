"""The backend that takes no time, as a raw ASGI application: what a server costs before anything is done.

    uvicorn tests.benchmarks.zero_backend:app

Peers stand before it in `gateway`; with `stream` it is the bare uvicorn SSE of `token_path`: preformatted frames,
one send per token, as fast as they go or one per step of `step_s`, common to all streams.
"""

import asyncio
import json
from typing import Any

_HEAD = {"id": "chatcmpl-0", "created": 0, "model": "scripted"}
_USAGE = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
_MESSAGE = {"role": "assistant", "content": "hello there"}
ANSWER = json.dumps(
    {
        **_HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": _MESSAGE, "logprobs": None, "finish_reason": "stop"}],
        "usage": _USAGE,
    }
).encode()
# As long as Shoal's own: the same fields around a token of the same length.
FRAME = (
    b"data: %b\n\n"
    % json.dumps(
        {
            "id": "chatcmpl-0123456789abcdef01234567",
            "object": "chat.completion.chunk",
            "created": 1_790_000_000,
            "model": "scripted",
            "service_tier": "default",
            "system_fingerprint": None,
            "choices": [{"index": 0, "delta": {"content": " tok"}, "logprobs": None, "finish_reason": None}],
        },
        separators=(",", ":"),
    ).encode()
)
DONE = b"data: [DONE]\n\n"
_CATALOG = json.dumps(
    {"object": "list", "data": [{"id": "scripted", "object": "model"}], "status": "ok"}
).encode()


class Steps:
    """A clock that many wait for: one future per step, whoever waits."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._due = 0.0  # of the last step, on the loop's clock
        self._next: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Until the next step."""
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            self._due = max(self._due + self._step_s, loop.time())  # absolute: late timers do not add up
            loop.call_at(self._due, self._strike, self._next)
        await self._next  # shared: whoever is cancelled would cancel all, but nobody is

    def _strike(self, step: asyncio.Future[None]) -> None:
        self._next = None
        step.set_result(None)


_clocks: dict[float, Steps] = {}


def steps(step_s: float) -> Steps:
    """The clock of this process with this step."""
    return _clocks.setdefault(step_s, Steps(step_s))


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer a chat, whole or streamed; everything else gets a list of models."""
    if scope["type"] != "http":
        return
    if scope["method"] != "POST":
        await _whole(send, _CATALOG)
        return
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    body = json.loads(b"".join(parts))
    if body.get("stream"):
        await _stream(send, body["max_tokens"], body.get("step_s"))
    else:
        await _whole(send, ANSWER)


async def _whole(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(send: Any, tokens: int, step_s: float | None) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(tokens):
        if step_s:
            await steps(step_s).wait()
        await send({"type": "http.response.body", "body": FRAME, "more_body": True})
    await send({"type": "http.response.body", "body": DONE})
