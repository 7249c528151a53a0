"""kill -9 of runners and of Redis under background responses: each one that was accepted is answered, once."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from actors.errors import ShoalError
from actors.job_loop import JobLoop, JobLoopConfig
from actors.local_services import ValkeyServer, ValkeyServerConfig
from actors.policies.responses import KIND, Ended, ResponseTask, Said
from actors.responder import Responder
from actors.stores.config import StorageConfig
from actors.stores.durable import DurableWrites
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.notices import Notices
from actors.stores.redis import connect
from actors.stores.response_log import ResponseLog
from actors.stores.responses import Responses, StoredResponse
from actors.types import GenerationCall, GenerationRequest, Message, Principal, TokenDelta, Usage
from actors.webhooks import WebhookConfig, WebhookOutbox

T = "acme"
TOKENS = 40
RESPONSES = 40
KILLS = int(os.environ.get("SHOAL_KILLS", "4"))

RUNNER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from actors.stores.redis import connect
from test_responses_killed import loop_over
async def main():
    loop_over(connect(sys.argv[1], timeout_s=5)).start()
    print("running", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Stream:
    """Tokens 0, 1, 2, … from where the request's progress ends, at 200 a second."""

    def __init__(self, call: GenerationCall) -> None:
        told = call.request.progress[0].token_ids if call.request.progress else ()
        assert list(told) == list(range(len(told)))
        self._next = len(told)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._next == TOKENS:
            raise StopAsyncIteration
        await asyncio.sleep(0.005)
        token, self._next = self._next, self._next + 1
        last = self._next == TOKENS
        usage = Usage(prompt_tokens=1, completion_tokens=TOKENS) if last else None
        return TokenDelta(0, f"{token} ", (token,), finish_reason="stop" if last else None, usage=usage)

    def take_ready(self) -> list[TokenDelta]:
        return []

    async def aclose(self) -> None:
        return


class Answers:
    async def generate(self, caller, call, clock, *, context, requests):
        return Stream(call)


def loop_over(redis: Redis) -> JobLoop:
    jobs = JobLog(redis, JobLogConfig(lease_s=0.5))
    log = ResponseLog(redis, Notices(redis))
    responder = Responder(Answers(), log, WebhookOutbox(jobs, WebhookConfig()))
    return JobLoop(jobs, responder, JobLoopConfig(poll_s=0.1, concurrency=16, max_deaths=1000))


@pytest.fixture
def server():
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder)
    server = ValkeyServer(ValkeyServerConfig(storage=storage, max_memory_bytes=64 * 2**20))
    yield server, storage.effective_redis_url
    server.stop()
    shutil.rmtree(folder)


def task(response_id: str) -> ResponseTask:
    request = GenerationRequest(request_id=response_id, messages=(Message(role="user", content="hi"),))
    call = GenerationCall(model="m", request=request)
    return ResponseTask(response_id=response_id, principal=Principal(tenant=T), call=call)


async def accepted(responses: Responses) -> str:
    response_id = responses.new_id()
    await responses.accept(task(response_id), StoredResponse(head=b"{}", items=b"[]", background=True))
    return response_id


async def all_answered_once(redis: Redis, responses: Responses, ids: list[str]) -> None:
    async with asyncio.timeout(60):
        while (await JobLog(redis).stats(KIND)).pending:
            await asyncio.sleep(0.05)
    for response_id in ids:
        facts = await responses.facts(T, response_id)
        tokens = [token for fact in facts if isinstance(fact, Said) for token in fact.delta.token_ids]
        assert tokens == list(range(TOKENS)), response_id
        assert [type(fact) for fact in facts].count(Ended) == 1
        assert facts[-1].status == "completed"
    assert await JobLog(redis).dead_letters(KIND) == []


@pytest.mark.chaos
@pytest.mark.timeout(120 + 5 * KILLS)
async def test_every_accepted_response_is_answered_once_however_often_runners_are_killed(server):
    _, url = server
    async with connect(url, timeout_s=5) as redis:
        responses = Responses(redis, JobLog(redis))
        ids = [await accepted(responses) for _ in range(RESPONSES)]
        deaths = 0
        for _ in range(KILLS):
            await killed_runner(url)
            ids += [await accepted(responses) for _ in range(4)]
        async for key in redis.scan_iter(match=f"shoal:{{jobs:{KIND}}}:job:*"):
            deaths += int(await redis.hget(key, "deaths"))
        last = loop_over(redis)
        last.start()
        await all_answered_once(redis, responses, ids)
        await last.stop()
        assert deaths, "no runner died in the middle of a response: nothing was tested"


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_row_10_no_acknowledged_response_is_lost_when_redis_is_killed(server):
    valkey, url = server
    async with connect(url, timeout_s=5) as redis:
        jobs = JobLog(redis, durable=DurableWrites(redis, "appended"))
        responses = Responses(redis, jobs)
        loop = loop_over(redis)
        loop.start()
        ids: list[str] = []
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                with suppress(ShoalError):  # refused: it may or may not be there, and was not acknowledged
                    ids.append(await accepted(responses))
                await asyncio.sleep(0.01)

        asking = asyncio.create_task(keep_asking())
        for _ in range(2):
            await asyncio.sleep(0.7)
            before = len(ids)
            os.kill(valkey._child.pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                while len(ids) < before + 5:
                    await asyncio.sleep(0.05)
        stop.set()
        await asking
        await all_answered_once(redis, responses, ids)
        await loop.stop()
        assert len(ids) > 20


async def killed_runner(redis_url: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUNNER, redis_url, str(Path(__file__).parent),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    while b"running" not in await child.stdout.readline():  # its log lines go to stdout as well
        pass
    await asyncio.sleep(random.uniform(0.1, 1.0))
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
