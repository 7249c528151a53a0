"""`ShoalClient`, its handle code and the direct calls, in one process: a gateway without engines and no Ray.

Serve's local testing mode is not used: it turns the caller's own cancellation into an error, which real handles
do not.
"""

import asyncio
import math
import struct
from types import SimpleNamespace

import fakeredis
import numpy as np
import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

from actors.errors import (
    AuthenticationFailed,
    Conflict,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    Unavailable,
)
from actors.gateway_direct import DirectCalls
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import LastError
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog
from actors.types import (
    Embeddings,
    Message,
    ModelCard,
    Passage,
    Principal,
    RetrievalOptions,
    RetrievalResult,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from app.client import ShoalClient

HELLO = [Message(role="user", content="Hello")]
USAGE = Usage(prompt_tokens=3, completion_tokens=2)
WHALES = Passage(
    chunk_id="c1", file_id="f1", filename="whales.md", vector_store_id="vs", text="Whales sing.", score=0.9,
    attributes={"sea": "north"},
)  # fmt: skip


class FakeStream:
    """Plays a list; None waits until it is closed."""

    expires_at = math.inf

    def __init__(self, items, passages=()):
        self.passages, self.headers = passages, {"x-ratelimit-limit-requests": "60"}
        self.closed = 0
        self._items = list(items)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, Exception):
            raise item
        return item

    def take_ready(self):
        ready = []
        while self._items and isinstance(self._items[0], TokenDelta):
            ready.append(self._items.pop(0))
        return ready

    async def aclose(self):
        self.closed += 1


class FakeGateway(DirectCalls):
    """What `DirectCalls` needs of the gateway; the tests look inside."""

    def __init__(self, shared):
        self._shared = shared
        redis = fakeredis.FakeAsyncRedis(socket_timeout=None)
        self.catalog, self.jobs = Catalog(redis), JobLog(redis)
        self.documents = DocumentStore(f"file://{shared.folder}")
        self.config = SimpleNamespace(
            max_upload_bytes=1000, retrieval=SimpleNamespace(embedding_model="the-embedder")
        )
        shared.gateway = self

    async def authenticate(self, authorization, clock):
        tenant, _, scopes = (authorization or "").removeprefix("Bearer ").partition(":")
        if not tenant:
            raise AuthenticationFailed("no API key")
        return SimpleNamespace(
            principal=Principal(tenant=tenant, scopes=tuple((scopes or "inference documents").split()))
        )

    async def generate(self, caller, call, clock):
        self._shared.calls.append(call)
        if call.model == "absent":
            raise ModelNotFound("no such model", "model")
        clock.enter("decode")
        stream = self._shared.stream
        if isinstance(stream, Exception):
            raise stream
        return stream

    async def embed(self, caller, model, inputs, clock, dimensions=None):
        self._shared.calls.append((model, tuple(inputs)))
        width = dimensions or 3
        return Embeddings(
            vectors=struct.pack(f"<{width * len(inputs)}f", *range(width * len(inputs))),
            dimensions=width,
            tokens=1,
        )

    async def search(self, principal, query, clock=None):
        self._shared.calls.append((principal.tenant, query))
        return RetrievalResult(passages=(WHALES,), degraded="vector=timeout")

    async def models(self):
        return [ModelCard(name="m", context_tokens=0, tokenizer="")]


class LocalHandle:
    """A Serve handle to an object of this process; errors arrive as Ray brings them."""

    def __init__(self, target, method=None, *, stream=False):
        self._target, self._method, self._stream = target, method, stream

    def options(self, *, method_name, stream, _by_reference):
        return LocalHandle(self._target, getattr(self._target, method_name), stream=stream)

    def remote(self, *args):
        return LocalStream(self._method(*args)) if self._stream else raised_as_ray_does(self._method(*args))


async def raised_as_ray_does(call):
    try:
        return await call
    except Exception as error:
        raise RayTaskError("method", "a traceback with pid and address", error) from None


class LocalStream:
    """The generator runs in a task of its own, as on a replica, and is cancelled there."""

    def __init__(self, items):
        self._items = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run(items))

    async def _run(self, items):
        async for item in items:
            self._items.put_nowait(item)
        self._items.put_nowait(None)

    async def __anext__(self):
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self):
        self._task.cancel()


@pytest.fixture
def shared(tmp_path):
    return SimpleNamespace(folder=tmp_path, calls=[], stream=FakeStream([]), gateway=None)


@pytest.fixture
def client(shared, monkeypatch):
    gateway = LocalHandle(FakeGateway(shared))
    monkeypatch.setattr("ray.serve.get_app_handle", lambda name: gateway)
    return ShoalClient("acme", timeout_s=5)


def other(api_key):
    """The same system with another key."""
    return ShoalClient(api_key, timeout_s=5)


def words(*texts, finish="stop"):
    return [*(TokenDelta(choice=0, text=text) for text in texts), end(finish)]


def end(finish="stop", choice=0, usage=USAGE):
    return TokenDelta(choice=choice, finish_reason=finish, usage=usage)


# --- generation --------------------------------------------------------------------------------------


async def test_a_chat_is_answered_whole(client, shared):
    shared.stream = FakeStream(words("Hello", " you"))
    answer = await client.chat(HELLO, "m", sampling=SamplingParams(max_tokens=5), timeout_s=4)
    assert (answer.text, answer.usage, answer.choices[0].finish_reason) == ("Hello you", USAGE, "stop")
    assert answer.headers == {"x-ratelimit-limit-requests": "60"}
    assert set(answer.stage_s) == {"other", "decode"}
    (call,) = shared.calls
    assert (call.model, call.timeout_s, call.request.sampling.max_tokens) == ("m", 4, 5)
    assert call.request.messages == tuple(HELLO)
    assert call.request.request_id == answer.request_id
    assert shared.stream.closed == 1


async def test_a_stream_gives_text_before_the_answer_ends(client, shared):
    shared.stream = FakeStream([TokenDelta(choice=0, text="Hel"), None])
    async with client.stream_chat(HELLO, "m") as stream:
        async for text in stream:
            assert text == "Hel"
            break
    await until(lambda: shared.stream.closed)  # leaving cancelled the work


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_cancelling_the_reader_cancels_the_work(client, shared):
    shared.stream = FakeStream([TokenDelta(choice=0, text="Hel"), None])
    task = asyncio.create_task(client.chat(HELLO, "m"))
    await until(lambda: shared.calls)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: shared.stream.closed)


async def test_choices_tool_calls_and_logprobs_come_whole(client, shared):
    shared.stream = FakeStream(
        [
            TokenDelta(choice=1, text="B", logprobs=(TokenLogprob("B", -0.5),)),
            TokenDelta(choice=0, tool_calls=(ToolCallDelta(index=0, id="t1", name="add", arguments='{"a"'),)),
            TokenDelta(choice=0, tool_calls=(ToolCallDelta(index=0, arguments=": 1}"),)),
            end("tool_calls", usage=None),
            end("length", choice=1),
        ]
    )
    answer = await client.chat(HELLO, "m", sampling=SamplingParams(n=2))
    first, second = answer.choices
    assert first.tool_calls == (ToolCall(id="t1", name="add", arguments='{"a": 1}'),)
    assert (second.text, second.finish_reason, second.logprobs[0].logprob) == ("B", "length", -0.5)


async def test_passages_become_citations_and_markers_leave_the_text(client, shared):
    shared.stream = FakeStream(words("Whales sing", " [1", "]."), passages=(WHALES,))
    options = RetrievalOptions(vector_store_ids=("vs",))
    async with client.stream_chat(HELLO, "m", retrieval=options) as stream:
        shown = "".join([text async for text in stream])
        answer = await stream.answer()
    assert shown == answer.text == "Whales sing."
    (citation,) = answer.citations
    assert citation.passage == WHALES
    assert shared.calls[0].retrieval == options


async def test_a_completion_sends_its_prompt_as_it_is(client, shared):
    shared.stream = FakeStream(words("upon a time"))
    answer = await client.complete("Once ", "m", echo=True)
    assert answer.text == "upon a time"
    assert (shared.calls[0].request.prompt, shared.calls[0].request.echo) == ("Once ", True)


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("no slot before the deadline", retry_after_s=3.5),
        InvalidRequest("bad schema", "response_format"),
    ],
)
async def test_errors_before_the_first_token_arrive_with_all_their_fields(client, shared, error):
    shared.stream = error
    with pytest.raises(type(error)) as raised:
        await client.chat(HELLO, "m")
    assert raised.value.to_wire() == error.to_wire()


async def test_an_error_in_the_middle_ends_the_stream_with_it(client, shared):
    shared.stream = FakeStream([TokenDelta(choice=0, text="Hel"), EngineFailed("the engine died")])
    pieces = aiter(client.stream_chat(HELLO, "m"))
    assert await anext(pieces) == "Hel"
    with pytest.raises(EngineFailed, match="the engine died"):
        await anext(pieces)
    await until(lambda: shared.stream.closed)


async def test_an_answer_without_an_end_is_an_error(client, shared):
    shared.stream = FakeStream([TokenDelta(choice=0, text="Hel")])
    with pytest.raises(EngineFailed):
        await client.chat(HELLO, "m")


async def test_a_gateway_that_says_nothing_is_given_up_after_the_deadline(client, shared, monkeypatch):
    monkeypatch.setattr("actors.handles.gateway._GRACE_S", 0.1)
    shared.stream = FakeStream([None])
    with pytest.raises(DeadlineExceeded):
        await client.chat(HELLO, "m", timeout_s=0.1)
    await until(lambda: shared.stream.closed)


async def test_a_closed_answer_is_not_taken_for_a_whole_one(client, shared):
    shared.stream = FakeStream([TokenDelta(choice=0, text="Hel"), None])
    stream = client.stream_chat(HELLO, "m")
    async with stream:
        pass
    with pytest.raises(EngineFailed, match="closed before"):
        await stream.answer()


# --- keys --------------------------------------------------------------------------------------------


async def test_every_call_is_authenticated_and_scoped(client):
    stranger = other(None)
    for call in (
        lambda it: it.chat(HELLO, "m"), lambda it: it.models(), lambda it: it.embed(["a"]),
        lambda it: it.search("vs", "q"), lambda it: it.create_store("s"), lambda it: it.add_document("vs", "a", b"a"),
    ):  # fmt: skip
        with pytest.raises(AuthenticationFailed):
            await call(stranger)
    with pytest.raises(PermissionDenied, match="'documents'"):
        await other("acme:inference").create_store("s")
    with pytest.raises(PermissionDenied, match="'inference'"):
        await other("acme:documents").embed(["a"])
    assert await other("acme:admin").create_store("s")


async def test_another_tenants_store_does_not_exist(client):
    store = await client.create_store("mine")
    with pytest.raises(NotFound):
        await other("evil").add_document(store.id, "a.md", b"x")


# --- embeddings, search, documents -------------------------------------------------------------------


async def test_embeddings_are_rows_of_a_matrix(client, shared):
    found = await client.embed(["a", "b"])
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (await client.embed(["a"], model="x", dimensions=2)).shape == (1, 2)
    assert [model for model, _ in shared.calls] == ["the-embedder", "x"]


async def test_a_search_is_the_tenants(client, shared):
    found = await client.search("vs", "who sings?", max_num_results=3, filters={"type": "eq"})
    assert found.passages == (WHALES,)
    assert found.degraded == "vector=timeout"
    tenant, query = shared.calls[0]
    assert (tenant, query.text, query.vector_store_ids, query.max_num_results) == (
        "acme",
        "who sings?",
        ("vs",),
        3,
    )


async def test_a_system_that_does_not_run_is_said_at_once(monkeypatch):
    def missing(_name):
        raise RayServeException("Application 'elsewhere' does not exist.")

    monkeypatch.setattr("ray.serve.get_app_handle", missing)
    with pytest.raises(Unavailable, match="no Serve application 'elsewhere' runs"):
        await ShoalClient(app_name="elsewhere").models()


async def test_models_are_listed(client):
    assert [card.name for card in await client.models()] == ["m"]


async def test_a_document_is_stored_attached_and_waited_for(client, shared):
    store = await client.create_store("notes")
    added = await client.add_document(store.id, "a.md", b"# Fish", {"sea": "north"})
    assert (added.status, added.filename, added.attributes) == ("in_progress", "a.md", {"sea": "north"})
    catalog = shared.gateway.catalog
    assert (await catalog.files.get("acme", added.file_id)).bytes == 6
    waiting = asyncio.create_task(client.wait_until_ingested(store.id, added.file_id))
    await asyncio.sleep(0.05)
    record = await catalog.store_files.get("acme", store.id, added.file_id)
    assert await catalog.store_files.publish(record, "acme", "v1", 10)
    assert (await waiting).status == "completed"


async def test_a_document_that_cannot_be_ingested_says_why(client, shared):
    store = await client.create_store("notes")
    catalog = shared.gateway.catalog
    added = await client.add_document(store.id, "a.md", b"# Fish")
    with pytest.raises(DeadlineExceeded, match="0%"):
        await client.wait_until_ingested(store.id, added.file_id, timeout_s=0.0)
    record = await catalog.store_files.get("acme", store.id, added.file_id)
    await catalog.store_files.fail(record, "acme", LastError(code="invalid_file", message="it is encrypted"))
    with pytest.raises(InvalidRequest, match="it is encrypted"):
        await client.wait_until_ingested(store.id, added.file_id)
    cancelled = await client.add_document(store.id, "b.md", b"# Fowl")
    await catalog.store_files.cancel("acme", store.id, cancelled.file_id)
    with pytest.raises(Conflict):
        await client.wait_until_ingested(store.id, cancelled.file_id)


@pytest.mark.parametrize(
    ("filename", "data", "error"),
    [
        ("a.md", b"", InvalidRequest),
        ("a/b.md", b"x", InvalidRequest),
        ("", b"x", InvalidRequest),
        ("a\n.md", b"x", InvalidRequest),
        ("a.md", b"x" * 1001, PayloadTooLarge),
    ],
)
async def test_a_bad_document_is_refused_and_nothing_stays(client, shared, filename, data, error):
    store = await client.create_store("notes")
    with pytest.raises(error):
        await client.add_document(store.id, filename, data)
    assert not [path for path in shared.folder.rglob("*") if path.is_file()]
