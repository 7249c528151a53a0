"""The public HTTP API as the command line uses it: JSON calls, pages, events, and errors in words.

Used by `shoal ingest`, `ask` and `status`. It speaks to any Shoal by its URL and knows nothing of its inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import httpx
import typer

from app.cli_output import CliError, ExitCode, one_line, printable

T = TypeVar("T")

Url = Annotated[
    str, typer.Option("--url", envvar="SHOAL_URL", help="Where Shoal answers.", rich_help_panel="Connection")
]
ApiKey = Annotated[
    str,
    typer.Option(
        "--api-key",
        envvar="SHOAL_API_KEY",
        show_default=False,
        help="Needed unless auth.mode is open. Other users of this machine can see options: "
        "the environment variable is safer.",
        rich_help_panel="Connection",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"

_CONNECT_TIMEOUT_S = 5.0
_TIMEOUT_S = 60.0  # between two pieces of an answer; generation may wait in the queue for longer
_STREAM_TIMEOUT_S = 600.0
_PATIENCE_S = 30.0  # as long as a gateway takes to come back
_LONGEST_PAUSE_S = 5.0
_RETRYABLE = (429, 503)
_PAGE = "100"


class ApiError(CliError):
    """The server refused the call; `code` is OpenAI's."""

    def __init__(self, message: str, code: str, status: int, retry_after_s: float | None) -> None:
        super().__init__(f"{message} ({code}, HTTP {status})", retry_after_s=retry_after_s)
        self.reason = message
        self.code = code
        self.status = status


class Event(NamedTuple):
    """One server-sent event, or a comment between them."""

    kind: Literal["data", "comment"]
    text: str


class Api:
    """One Shoal, with one key; an async context manager.

    Args:
        url: with or without `/v1`.
        api_key: empty for none.
    """

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not (api_key.isascii() and api_key.isprintable()):
            raise CliError("the API key holds characters that no key has", ExitCode.USAGE)
        with _in_words(self.url):
            self._client = httpx.AsyncClient(
                base_url=self.url,
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S, pool=None),
                trust_env=not _is_loopback(self.url),  # a proxy cannot reach this machine's loopback
            )

    async def __aenter__(self) -> Self:
        """Nothing is sent yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def call(self, method: str, path: str, **content: Any) -> Any:
        """The JSON that a call answers with.

        Args:
            method: of HTTP.
            path: from `/`.
            content: as httpx takes it: `json`, `data`, `files`, `params`.

        Raises:
            ApiError: the server refused it.
            CliError: nothing answers there, or something that is no Shoal.
        """
        with _in_words(self.url):
            response = await self._client.request(method, path, **content)
        return self._json(response)

    async def pages(self, path: str, **params: str) -> AsyncIterator[dict[str, Any]]:
        """Every object of a listing.

        Args:
            path: of the listing.
            params: of the query; `limit` is the size of a page.

        Raises:
            CliError: as `call`.
        """
        after: dict[str, str] = {}
        while True:
            page = await self.call("GET", path, params={"limit": _PAGE, **params, **after})
            for item in page["data"]:
                yield item
            if not page.get("has_more") or not page["data"]:
                return
            after = {"after": page["data"][-1]["id"]}

    @asynccontextmanager
    async def stream(
        self, path: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[httpx.Headers, AsyncIterator[Event]]]:
        """Post `body` and give the headers and events of the answer; leaving cancels the work behind it.

        Raises:
            CliError: as `call`, also from the events.
        """
        timeout = httpx.Timeout(_STREAM_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        with _in_words(self.url):
            async with self._client.stream("POST", path, json=body, timeout=timeout) as response:
                if response.is_error:
                    await response.aread()
                    self._json(response)
                yield response.headers, events(response.aiter_bytes())

    def _json(self, response: httpx.Response) -> Any:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and body is not None:
            return body
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict):
            raise CliError(f"{self.url} answered HTTP {response.status_code} in no form of Shoal's")
        raise _refusal(error, response)


async def patiently(call: Callable[[], Awaitable[T]], patience_s: float = _PATIENCE_S) -> T:
    """Make a call again while the server asks for it or is not there; for work that is worth waiting for.

    Args:
        call: made anew for each try; only repeated where nothing was done.
        patience_s: from the first failure to giving up.
    """
    gives_up_at = None
    pause_s = 0.5
    while True:
        try:
            return await call()
        except CliError as error:
            gives_up_at = gives_up_at or time.monotonic() + patience_s
            if error.retry_after_s is None or time.monotonic() + error.retry_after_s > gives_up_at:
                raise
            await asyncio.sleep(max(error.retry_after_s, pause_s))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Server-sent events, by the HTML standard, section 9.2.6, without the fields that no answer has.

    Lines are cut as bytes: text may hold characters, such as U+2028, that only Python takes for line ends.
    """
    rest, data = b"", []
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if text.startswith("data:"):
                data.append(text.removeprefix("data:").removeprefix(" "))
            elif text.startswith(":"):
                yield Event("comment", text[1:].strip())
            elif not text and data:
                yield Event("data", "\n".join(data))
                data = []


def event_error(data: str) -> CliError | None:
    """The error that an event carries, if it is one."""
    error = json.loads(data).get("error")
    return None if error is None else CliError(f"{_words(error)} ({error.get('code')})")


def _refusal(error: dict[str, Any], response: httpx.Response) -> ApiError:
    message = _words(error)
    if response.status_code == 401:
        message += "; give a key by --api-key or SHOAL_API_KEY"
    retry_after_s = None
    if response.status_code in _RETRYABLE:
        asked = response.headers.get("retry-after", "")
        retry_after_s = float(asked) if asked.isdigit() else 1.0
    return ApiError(message, str(error.get("code")), response.status_code, retry_after_s)


def _words(error: dict[str, Any]) -> str:
    return one_line(str(error.get("message", "the server gave no reason")), 1000)


@contextmanager
def _in_words(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise CliError(f"--url must be like {DEFAULT_URL}, not {printable(url)!r}", ExitCode.USAGE) from None
    except (httpx.ConnectError, httpx.ConnectTimeout):
        hint = "start Shoal with: serve run configs/local.yaml"
        raise CliError(f"nothing answers at {url}; {hint}", ExitCode.UNREACHABLE, retry_after_s=0.5) from None
    except httpx.TimeoutException:
        raise CliError(f"{url} did not answer in time", ExitCode.UNREACHABLE) from None
    except httpx.HTTPError as error:
        raise CliError(
            f"the connection to {url} broke ({type(error).__name__})", ExitCode.UNREACHABLE
        ) from None


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
