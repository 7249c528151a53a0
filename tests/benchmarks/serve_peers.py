"""What Serve costs without Shoal: a FastAPI gateway, a handle, a deployment behind it, and nothing else.

Baseline of `gateway` (unary: an echo) and of `token_path` (a handle stream: one item per token, passed on as it
is). Its gateway gets preformatted frames and neither checks nor counts anything.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve import Application
from starlette.responses import Response, StreamingResponse

from tests.benchmarks.zero_backend import ANSWER, DONE, FRAME, steps

_UNBOUNDED = {"max_ongoing_requests": 100_000, "ray_actor_options": {"num_cpus": 0.1}}
_QUIET = {"enable_access_log": False}
api = FastAPI()


@serve.deployment(**_UNBOUNDED, logging_config=_QUIET)
class Echo:
    """The far end."""

    async def answer(self, _: Any) -> bytes:
        return ANSWER

    async def stream(self, tokens: int, step_s: float | None) -> AsyncIterator[bytes]:
        for _ in range(tokens):
            if step_s:
                await steps(step_s).wait()
            yield FRAME
        yield DONE


@serve.deployment(**_UNBOUNDED, logging_config=_QUIET)
@serve.ingress(api)
class Front:
    """HTTP → handle."""

    def __init__(self, echo: Any, by_reference: bool) -> None:
        options = {} if by_reference else {"_by_reference": False}
        self._answer = echo.options(method_name="answer", **options)
        self._stream = echo.options(method_name="stream", stream=True, **options)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            frames = self._stream.remote(body["max_tokens"], body.get("step_s"))
            return StreamingResponse(frames, media_type="text/event-stream")
        return Response(await self._answer.remote(body), media_type="application/json")


def build(args: dict) -> Application:
    """One application; `args.by_reference` is Serve's default way of passing values."""
    return Front.bind(Echo.bind(), args["by_reference"])


def application(name: str, *, by_reference: bool) -> dict[str, Any]:
    """Its entry in a Serve config; it answers below `/NAME`."""
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "tests.benchmarks.serve_peers:build",
        "args": {"by_reference": by_reference},
    }
