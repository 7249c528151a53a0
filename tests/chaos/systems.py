"""The systems that rows break: small, of known speed, and put back in order after each fault.

Two gateways, one queue, two replicas of 32 slots, 25 tokens a second per stream: a slot-second is 25 tokens.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.chaos.load import MODEL, ask
from tests.chaos.outcomes import Outcome, classes
from tests.chaos.queue_books import Books
from tests.conftest import System, app_of, config_of, free_port, running_system, until

# Serve looks after its proxies every 10 s, and believes the third failure: HAProxy would be away for half a minute.
PROXY_CHECKS = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
REPLICAS, SLOTS = 2, 32  # slots of each
TOKENS_PER_S = 25  # of one stream
LOAD = 0.4  # of capacity, in all rows but the one about overload
_ALL_THERE_S = 90


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """A system under test, and how to get it back in order."""

    system: System
    books: Books
    mode: str  # "default" or "haproxy"

    def config(self) -> dict[str, Any]:
        """A copy of its config, to be changed and PUT."""
        return json.loads(json.dumps(self.system.config))

    async def in_order(self) -> None:
        """Until everything runs, both replicas get work, and nothing is in flight."""
        system = self.system
        parts = {("gateway", "Gateway"): 2, (MODEL, "LLMReplica"): REPLICAS, (MODEL, "BatchingQueue"): 1}

        def all_there() -> bool:
            apps = system.status()
            return all(
                len([r for r in apps[app]["deployments"][name]["replicas"] if r["state"] == "RUNNING"])
                == count
                and len(apps[app]["deployments"][name]["replicas"]) == count
                for (app, name), count in parts.items()
            )

        await until(all_there, timeout_s=_ALL_THERE_S)
        # A new replica is known to the queue before the gateways' routers.
        calls = await asyncio.gather(*(ask(system, 5, stream=False) for _ in range(REPLICAS * SLOTS // 2)))
        assert classes(calls) == {Outcome.OK: len(calls)}, [call.detail for call in calls if call.detail]

    async def books_are_right(self) -> None:
        """The conservation sum, once nothing is in flight."""
        deadline = asyncio.get_running_loop().time() + 30
        while True:
            books = await asyncio.to_thread(self.books.read)
            accepted = books.pop("accepted")
            if books["in_flight"] == 0 or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.3)
        assert books["in_flight"] == 0, books
        assert accepted == sum(books.values()), (accepted, books)

    @asynccontextmanager
    async def fault(self) -> AsyncIterator[System]:
        """In order before, in order and with right books afterwards."""
        await self.in_order()
        yield self.system
        await self.books_are_right()


def config() -> dict[str, Any]:
    """configs/scripted.yaml, with an engine of known speed that breaks on demand."""
    base = config_of("scripted", auth={"mode": "open"}, announce_url=None)
    model = app_of(base, "build_model")
    model["args"]["engine"]["scripted"] = {
        "max_sequences": SLOTS,
        "itl_base_s": 1 / TOKENS_PER_S,
        "itl_per_sequence_s": 0,
        "prefill_tokens_per_s": None,
        "allow_directives": True,
    }
    # Room for one more on this node while an update is under way; row 24 fills it to get one onto another node.
    model["deployments"] = [
        {
            "name": "LLMReplica",
            "num_replicas": REPLICAS,
            "max_replicas_per_node": REPLICAS + 1,
            "max_surge_percent": 50,
        }
    ]
    app_of(base, "build_gateway")["deployments"] = [
        {"name": "Gateway", "num_replicas": 2, "max_surge_percent": 50}
    ]
    return base


@contextmanager
def chaos(mode: str) -> Iterator[Chaos]:
    """Start one, in Serve's default mode or in HAProxy mode."""
    env = PROXY_CHECKS | (HAPROXY | _own_ports() if mode == "haproxy" else {})
    with running_system(config(), **env) as system:
        for app in ("gateway", MODEL):
            system.wait_for(app)
        with Books(system, MODEL) as books:
            yield Chaos(system=system, books=books, mode=mode)


def _own_ports() -> dict[str, str]:
    """HAProxy's fixed ports, moved: another system on this machine may have them."""
    return {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("STATS", "METRICS")}


def victim(pids: set[int]) -> int:
    """The one to be broken: any, the same in every run of one system."""
    return min(pids)


def rate_rps(tokens: int, share: float = LOAD) -> float:
    """Arrivals per second that keep `share` of the slots busy with answers of `tokens`."""
    return share * REPLICAS * SLOTS * TOKENS_PER_S / tokens
