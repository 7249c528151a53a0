"""`GrantRouter`: takes a call to the replica that its grant names.

Serve instantiates it inside every handle of a deployment whose `request_router_config` names it. It reads the
plain keyword argument `replica` of the call (a replica's unique id; absent or None means any). Nothing ever
waits here for capacity: the queue has given a slot before a call is made. Built on the alpha API
`RequestRouter` of Ray 2.60; `tests/serve/test_grant_router.py` is its contract test.

The class is pickled by value into other processes, so what it shares with them (the directory, the errors)
is imported inside its methods.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

# A replica registers its credit before every gateway's router has heard of it: usually by less than 2 s, more on
# a machine whose controller is busy.
_UNKNOWN_REPLICA_WAIT_S = 8.0
_MOST_ROUTING_TASKS = 1000


class GrantRouter(RequestRouter):
    """Routes by name; see the module's docstring."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank with the named replica, or all of them when none is named."""
        if pending_request is None:
            return [candidate_replicas]
        # It failed here before: the base class only sees that when it is given something.
        if pending_request.future.done():
            return [candidate_replicas]
        # Without this the base class spins instead of backing off.
        pending_request.routing_context.should_backoff = True
        wanted = pending_request.kwargs.get("replica")
        if wanted is None:
            return [candidate_replicas]
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        if named:
            return [named]
        from actors.handles.replica_directory import DIRECTORY

        left = DIRECTORY.has_left(self._deployment_id.app_name, wanted)
        if left or time.time() - pending_request.created_at > _UNKNOWN_REPLICA_WAIT_S:
            self._fail(pending_request)
            return [candidate_replicas]  # see above: with nothing, its routing task would turn for ever
        return []

    @property
    def max_num_routing_tasks(self) -> int:
        """One per call, where the base class allows two per replica: those for a new replica wait, others must not."""
        return _MOST_ROUTING_TASKS

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Remember who was ever here (gone is different from not yet known) and tell the directory."""
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """A dead replica leaves at once, before the controller says so."""
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        from actors.handles.replica_directory import DIRECTORY

        ids = frozenset(replica_id.unique_id for replica_id in self._replica_id_set)
        DIRECTORY.update(self._deployment_id.app_name, ids)

    @staticmethod
    def _fail(pending_request: PendingRequest) -> None:
        from actors.errors import ReplicaGone

        # Raising from choose_replicas would only end the routing task and leave the caller waiting.
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone("the granted replica has left"))
