"""Background responses in a job loop, over a Redis and an engine of this process: crashes, deaths, cancellations."""

import asyncio
from types import SimpleNamespace

import fakeredis
import pytest

from actors.errors import (
    CannotResume,
    DeadlineExceeded,
    FailedEverywhere,
    InvalidRequest,
    Overloaded,
    ShoalError,
)
from actors.job_loop import JobLoop, JobLoopConfig
from actors.policies.responses import KIND, Began, Ended, ResponseTask, Said, Searched
from actors.rag import Context
from actors.responder import Responder
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.notices import Notices
from actors.stores.response_log import ResponseLog
from actors.stores.responses import Responses, StoredResponse
from actors.types import (
    GenerationCall,
    GenerationRequest,
    Message,
    Passage,
    Principal,
    ResponseFormat,
    RetrievalOptions,
    TokenDelta,
    Usage,
)
from actors.webhooks import WebhookConfig, WebhookOutbox

WORDS = [f"w{n} " for n in range(12)]
PASSAGE = Passage(chunk_id="c", file_id="f", filename="a.txt", vector_store_id="vs", text="t", score=1.0)


class Stream:
    """What is left of the answer behind its progress; `broken_at` breaks it, `gates` hold it."""

    def __init__(self, answers, call):
        told = call.request.progress[0].token_ids if call.request.progress else ()
        assert list(told) == list(range(len(told))), "an engine is told what there is, from the beginning"
        self.left = list(range(len(told), len(WORDS)))
        self.answers, self.closed = answers, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.left:
            raise StopAsyncIteration
        token = self.left.pop(0)
        if token == self.answers.broken_at:
            self.answers.broken_at = None
            raise self.answers.error
        if token == self.answers.hangs_at:
            await asyncio.Event().wait()
        last = token == len(WORDS) - 1
        usage = Usage(prompt_tokens=1, completion_tokens=len(WORDS)) if last else None
        return TokenDelta(0, WORDS[token], (token,), finish_reason="stop" if last else None, usage=usage)

    def take_ready(self):
        return []

    async def aclose(self):
        self.closed = True


class Answers:
    """In place of `Answering`."""

    def __init__(self):
        self.calls, self.streams, self.searches = [], [], 0
        self.broken_at = self.hangs_at = None
        self.error: ShoalError = Overloaded("busy", retry_after_s=0.01)

    async def context(self, principal, call, clock):
        self.searches += 1
        return Context(passages=(PASSAGE,))

    async def generate(self, caller, call, clock, *, context, requests):
        assert requests == 0
        self.calls.append(SimpleNamespace(caller=caller, call=call, context=context))
        self.streams.append(Stream(self, call))
        return self.streams[-1]


class World:
    def __init__(self):
        self.redis = fakeredis.FakeAsyncRedis(protocol=2, socket_timeout=None)
        self.jobs = JobLog(self.redis, JobLogConfig(lease_s=0.4))
        self.notices = Notices(self.redis)
        self.responses = Responses(self.redis, self.jobs)
        self.answers = Answers()

    def loop(self, **config):
        responder = Responder(
            self.answers,
            ResponseLog(self.redis, self.notices),
            WebhookOutbox(self.jobs, WebhookConfig()),
        )
        return JobLoop(self.jobs, responder, JobLoopConfig(poll_s=0.05, **config))

    async def accept(self, *, timeout_s=None, retrieval=None, **request):
        response_id = self.responses.new_id()
        messages = (Message(role="user", content="hi"),)
        call = GenerationCall(
            model="m",
            request=GenerationRequest(request_id=response_id, messages=messages, **request),
            timeout_s=timeout_s,
            retrieval=retrieval,
        )
        task = ResponseTask(response_id=response_id, principal=Principal(tenant="t"), call=call)
        await self.responses.accept(task, StoredResponse(head=b"{}", items=b"[]", background=True))
        return response_id

    async def ended(self, response_id):
        async with asyncio.timeout(10):
            return [fact async for some in self.responses.follow("t", response_id) for fact in some]


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.responses.aclose()
    await world.notices.aclose()
    await world.redis.aclose()


def text_of(facts):
    return "".join(fact.delta.text for fact in facts if isinstance(fact, Said))


def tokens_of(facts):
    return [token for fact in facts if isinstance(fact, Said) for token in fact.delta.token_ids]


async def test_an_accepted_response_is_answered_and_its_job_is_done(world):
    loop = world.loop()
    loop.start()
    response_id = await world.accept()
    facts = await world.ended(response_id)
    await loop.stop()
    assert isinstance(facts[0], Began)
    assert text_of(facts) == "".join(WORDS)
    assert facts[-1].status == "completed"
    assert (await world.jobs.stats(KIND)).pending == 0
    assert world.answers.streams[0].closed


async def test_a_response_whose_runner_stopped_goes_on_elsewhere_from_the_exact_token(world):
    world.answers.hangs_at = 5
    first = world.loop()
    first.start()
    response_id = await world.accept()
    while len(tokens_of(await world.responses.facts("t", response_id))) < 5:
        await asyncio.sleep(0.01)
    await first.stop()
    assert world.answers.streams[0].closed
    world.answers.hangs_at = None
    second = world.loop()
    second.start()
    facts = await world.ended(response_id)
    await second.stop()
    assert tokens_of(facts) == list(range(len(WORDS)))
    assert [type(fact) for fact in facts].count(Began) == 1
    told = world.answers.calls[1].call.request.progress[0]
    assert (told.token_ids, told.text_chars) == ((0, 1, 2, 3, 4), len("".join(WORDS[:5])))


async def test_a_response_whose_runner_died_goes_on_elsewhere_and_the_zombie_adds_nothing(world):
    world.answers.hangs_at = 5
    dead = world.loop()
    dead.start()
    response_id = await world.accept()
    while len(tokens_of(await world.responses.facts("t", response_id))) < 5:
        await asyncio.sleep(0.01)
    for task in dead._loops:
        task.cancel()  # no heartbeat any more, but its work still runs
    world.answers.hangs_at = None
    heir = world.loop()
    heir.start()
    facts = await world.ended(response_id)
    await asyncio.gather(heir.stop(), dead.stop())
    assert tokens_of(facts) == list(range(len(WORDS)))
    assert await world.responses.facts("t", response_id) == facts


async def test_what_was_retrieved_is_not_retrieved_again(world):
    world.answers.broken_at = 3
    loop = world.loop()
    loop.start()
    response_id = await world.accept(retrieval=RetrievalOptions(vector_store_ids=("vs",)))
    facts = await world.ended(response_id)
    await loop.stop()
    assert world.answers.searches == 1
    assert [fact.passages for fact in facts if isinstance(fact, Searched)] == [(PASSAGE,)]
    assert [call.context.passages for call in world.answers.calls] == [(PASSAGE,), (PASSAGE,)]
    assert tokens_of(facts) == list(range(len(WORDS)))


async def test_what_cannot_be_gone_on_with_is_seen_only_when_it_is_complete(world):
    loop = world.loop()
    loop.start()
    schema = ResponseFormat(type="json_schema", schema={"type": "object"})
    facts = await world.ended(await world.accept(response_format=schema))
    await loop.stop()
    assert world.answers.calls[0].call.whole
    assert facts[-1].status == "completed"


async def test_a_refusal_is_tried_again_and_an_error_of_the_callers_is_the_answer(world):
    world.answers.broken_at = 0
    loop = world.loop()
    loop.start()
    assert (await world.ended(await world.accept()))[-1].status == "completed"
    assert len(world.answers.calls) == 2
    world.answers.broken_at, world.answers.error = 0, InvalidRequest("no such schema", "text.format")
    last = (await world.ended(await world.accept()))[-1]
    await loop.stop()
    assert (last.status, last.code, last.message) == ("failed", "invalid_prompt", "no such schema")
    assert await world.jobs.dead_letters(KIND) == []


@pytest.mark.parametrize("error", [FailedEverywhere("three died"), CannotResume("another model")])
async def test_a_request_that_kills_its_replicas_is_a_dead_letter_at_once(world, error):
    world.answers.broken_at, world.answers.error = 2, error
    loop = world.loop()
    loop.start()
    response_id = await world.accept()
    last = (await world.ended(response_id))[-1]
    await loop.stop()
    assert (last.status, last.code) == ("failed", "server_error")
    [letter] = await world.jobs.dead_letters(KIND)
    assert (f"resp_{letter.job_id}", letter.error) == (response_id, error.message)
    assert len(world.answers.calls) == 1


async def test_a_response_whose_runners_die_is_a_dead_letter_after_three(world):
    response_id = await world.accept()
    for _ in range(3):
        assert (await world.jobs.lease(KIND, "dying", 1)).leases
        await asyncio.sleep(0.45)
    loop = world.loop()
    loop.start()
    last = (await world.ended(response_id))[-1]
    await loop.stop()
    assert last.status == "failed"
    assert "died" in last.message
    assert [letter.deaths for letter in await world.jobs.dead_letters(KIND)] == [3]
    assert world.answers.calls == []


async def test_a_deadline_of_the_callers_ends_it_and_one_of_ours_does_not(world):
    world.answers.broken_at, world.answers.error = 2, DeadlineExceeded("late")
    loop = world.loop()
    loop.start()
    assert (await world.ended(await world.accept()))[-1].status == "completed"
    world.answers.broken_at = 2
    last = (await world.ended(await world.accept(timeout_s=60)))[-1]
    await loop.stop()
    assert (last.status, last.message) == ("failed", "late")
    assert world.answers.calls[-1].call.timeout_s <= 60


async def test_a_cancelled_response_stops_its_engine_by_the_next_heartbeat_at_the_latest(world):
    world.answers.hangs_at = 4
    loop = world.loop()
    loop.start()
    response_id = await world.accept()
    while len(tokens_of(await world.responses.facts("t", response_id))) < 4:
        await asyncio.sleep(0.01)
    await world.responses.cancel("t", response_id, 1)
    async with asyncio.timeout(1):
        while not world.answers.streams[0].closed:
            await asyncio.sleep(0.01)
    await loop.stop()
    facts = await world.responses.facts("t", response_id)
    assert facts[-1] == Ended(status="cancelled", at=1)
    assert tokens_of(facts) == [0, 1, 2, 3]


async def test_a_loop_drops_a_job_at_once_when_it_is_told_to(world):
    world.answers.hangs_at = 1
    loop = world.loop()
    loop.start()
    response_id = await world.accept()
    while not loop.active or not world.answers.streams:
        await asyncio.sleep(0.01)
    loop.drop(response_id.removeprefix("resp_"))
    async with asyncio.timeout(0.2):
        while not world.answers.streams[0].closed:
            await asyncio.sleep(0.005)
    await loop.stop()
