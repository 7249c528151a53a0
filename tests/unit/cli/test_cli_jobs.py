"""`shoal jobs` against a real Valkey."""

import asyncio
import json
import shutil
import tempfile
from pathlib import Path

import pytest

from actors.local_services import ValkeyServer, ValkeyServerConfig
from actors.policies.responses import KIND, Ended, ResponseTask
from actors.stores.config import StorageConfig
from actors.stores.jobs import JobLog
from actors.stores.notices import Notices
from actors.stores.redis import connect
from actors.stores.response_log import ResponseLog
from actors.stores.responses import Responses, StoredResponse
from actors.types import GenerationCall, GenerationRequest, Principal


@pytest.fixture(scope="module")
def storage():
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder)
    server = ValkeyServer(ValkeyServerConfig(storage=storage, max_memory_bytes=32 * 2**20))
    yield storage
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def jobs(run, storage):
    return lambda *words, **env: run("jobs", *words, "--data-dir", storage.data_dir, **env)


def in_redis(storage, work):
    async def connected():
        async with connect(storage.effective_redis_url, timeout_s=5) as redis:
            return await work(redis)

    return asyncio.run(connected())


async def buried(redis):
    """A background response that was given up."""
    log = JobLog(redis)
    responses = Responses(redis, log)
    response_id = responses.new_id()
    call = GenerationCall(model="m", request=GenerationRequest(request_id=response_id, prompt="hi"))
    task = ResponseTask(response_id=response_id, principal=Principal(tenant="acme"), call=call)
    await responses.accept(task, StoredResponse(head=b"{}", items=b"[]", background=True))
    [lease] = (await log.lease(KIND, "a", 1)).leases
    facts = [Ended(status="failed", at=1)]
    await ResponseLog(redis, Notices(redis)).append(lease, 0, facts, "dead", "it kills its replicas")
    return response_id


async def state(redis, response_id):
    job = await JobLog(redis).get(KIND, "acme", response_id.removeprefix("resp_"))
    return job.state, await Responses(redis, JobLog(redis)).facts("acme", response_id)


def test_dead_letters_are_listed_shown_and_put_back(jobs, storage):
    assert "no dead letters" in jobs("list").stderr
    response_id = in_redis(storage, buried)
    listed = json.loads(jobs("list", "--json").stdout)
    assert [(one["job_id"], one["error"]) for one in listed["dead"]] == [
        (response_id.removeprefix("resp_"), "it kills its replicas")
    ]
    assert "it kills its replicas" in jobs("list").stdout
    shown = json.loads(jobs("show", response_id).stdout)
    assert (shown["tenant"], shown["payload"]["call"]["model"]) == ("acme", "m")
    assert jobs("replay", response_id).exit_code == 0
    assert in_redis(storage, lambda redis: state(redis, response_id)) == ("waiting", [])
    assert json.loads(jobs("list", "--json").stdout)["pending"]["response"]["waiting"] == 1
    again = jobs("replay", response_id)
    assert again.exit_code == 1
    assert "no dead letter" in again.stderr
