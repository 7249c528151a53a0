"""Contract of `GrantRouter` with Ray 2.60's alpha API `RequestRouter`: a call goes to the replica it names."""

import asyncio
import time

import pytest
import ray
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.request_router import RequestRouter

from actors.errors import ReplicaGone
from actors.handles import grant_router, replica_directory
from actors.handles.grant_router import GrantRouter


def test_the_version_of_ray_that_this_was_written_for_is_installed():
    assert ray.__version__ == "2.60.0", "read RequestRouter again, then change this line"


def test_the_base_class_has_what_the_router_overrides_and_uses():
    for name in ("choose_replicas", "update_replicas", "on_replica_actor_died", "max_num_routing_tasks"):
        assert name in vars(RequestRouter)
        assert name in vars(GrantRouter)


class Replica:
    """A `RunningReplica` as far as routing goes."""

    max_ongoing_requests = 100

    def __init__(self, unique_id):
        self.replica_id = ReplicaID(unique_id, DeploymentID(name="LLMReplica", app_name="m"))

    async def get_queue_len(self, *, deadline_s):
        return 0


def call(replica):
    metadata = RequestMetadata(request_id=replica, internal_request_id=f"call for {replica} {time.time_ns()}")
    return PendingRequest(args=[], kwargs={"replica": replica}, metadata=metadata)


@pytest.fixture
async def router(monkeypatch):
    monkeypatch.setattr(replica_directory, "DIRECTORY", replica_directory.ReplicaDirectory())
    deployment = DeploymentID(name="LLMReplica", app_name="m")
    router = GrantRouter(
        deployment, DeploymentHandleSource.REPLICA, initial_backoff_s=0.001, max_backoff_s=0.005
    )
    router.update_replicas([Replica("a"), Replica("b")])
    yield router
    for task in list(router._routing_tasks):
        task.cancel()
    await asyncio.sleep(0.01)


async def choose(router, replica):
    async with asyncio.timeout(1):
        return (await router._choose_replica_for_request(call(replica))).replica_id.unique_id


async def test_a_call_goes_to_the_replica_it_names(router):
    assert await asyncio.gather(*(choose(router, name) for name in "abba")) == ["a", "b", "b", "a"]
    assert await choose(router, None) in ("a", "b")


async def test_calls_for_a_replica_that_left_fail_and_leave_no_routing_task_behind(router):
    router.update_replicas([Replica("b")])
    for _ in range(10):
        with pytest.raises(ReplicaGone):
            await choose(router, "a")
    await asyncio.sleep(0.05)
    assert router.curr_num_routing_tasks == 0
    assert await choose(router, "b") == "b"


async def test_calls_for_replicas_not_yet_heard_of_wait_and_hold_nobody_up(router):
    early = [asyncio.ensure_future(choose(router, f"new{n}")) for n in range(10)]
    await asyncio.sleep(0.02)
    assert await choose(router, "a") == "a"
    router.update_replicas([Replica(name) for name in ("a", *(f"new{n}" for n in range(10)))])
    assert await asyncio.gather(*early) == [f"new{n}" for n in range(10)]


async def test_a_replica_that_nobody_ever_hears_of_is_gone_after_a_while(router, monkeypatch):
    monkeypatch.setattr(grant_router, "_UNKNOWN_REPLICA_WAIT_S", 0.02)
    with pytest.raises(ReplicaGone):
        await choose(router, "never")
