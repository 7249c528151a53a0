"""One tenant does not hold all slots while another one comes: whose request gives its place up to it.

Pure. Called by `actors.policies.placement`. The order of the line is fair in the long run; but a burst takes all slots
in one instant, and whoever comes next would wait for a whole answer. So one request of the tenant that has had more
comes back to the line, with what it has produced, and goes on when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable

from actors.policies.class_line import OUTPUT_WEIGHT, ClassLine
from actors.policies.credit import Held, ReplicaCredit
from actors.types import Ticket

# Of its share, a tenant keeps so much whatever it was served before. With all of it kept, one that needs a little more
# than its share now and then would wait for a whole answer each time.
_LEFT_SHARE = 0.75

Candidate = tuple[ReplicaCredit, Held]


def to_move(
    replicas: Iterable[ReplicaCredit], line: ClassLine, ticket: Ticket, counter: float
) -> Candidate | None:
    """Who gives a place up to a tenant of the same class: of those that may, the one with the least output.

    A move never makes the order unfair the other way round: the tenant that is moved stays the one that was served
    more, so what is moved does not come back in front, and moves end.

    Args:
        replicas: where.
        line: of the ticket's class.
        ticket: who comes.
        counter: of its tenant, the ticket already charged; service over weight.
    """
    counters = line.counters
    heavy: dict[str, float | None] = {}  # counter of each tenant; None: it is to keep what it has
    best: Candidate | None = None
    for replica in replicas:
        for held in replica.held.values():
            if held.ticket.principal.priority is not ticket.principal.priority:
                continue
            tenant = held.ticket.principal.tenant
            if tenant not in heavy:
                gives = line.share_held(tenant) > _LEFT_SHARE
                heavy[tenant] = counters.counter(tenant) if gives else None
            its_counter = heavy[tenant]
            if its_counter is None or its_counter <= counter or not held.can_move():
                continue
            given_back = OUTPUT_WEIGHT * (held.charged - held.produced) / counters.weight(tenant)
            if its_counter - given_back > counter and (best is None or held.produced < best[1].produced):
                best = replica, held
    return best
