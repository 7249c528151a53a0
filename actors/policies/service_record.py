"""What a queue learns from requests that ended, for the scaling policy.

Pure. Called by `actors.policies.dispatch`; `actors.batching_queue` makes a `LoadSnapshot` of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.policies.burn import Burn
from actors.policies.credit import Held, ticket_tokens
from actors.policies.pace import Pace

_SMOOTHING = 0.1  # weight of the newest request in the mean of tokens


@dataclass(slots=True)
class ServiceRecord:
    """Of one model."""

    ttft_slo_s: float
    tpot_slo_s: float
    pace: Pace = field(default_factory=Pace)
    burn: Burn = field(default_factory=Burn)
    mean_tokens: float = 0.0  # that a request holds in the KV cache; 0: nothing was learnt yet

    def answered(self, held: Held, load: float, now: float) -> None:
        """A granted request ran to its end.

        Its first token is taken to come with its grant: the queue does not see tokens.

        Args:
            held: the request, with what it produced.
            load: share of its replica in use as it ended.
            now: the time.
        """
        waited_s = held.grant.waited_s if held.grant is not None else 0.0
        service_s = now - held.granted_at
        late = waited_s > self.ttft_slo_s or service_s > self.tpot_slo_s * max(held.produced, 1)
        self.burn.add(1.0, float(late), now)
        self.pace.observe(service_s=service_s, tokens=held.produced, load=min(load, 1.0))
        tokens = float(ticket_tokens(held.ticket))
        self.mean_tokens += (tokens - self.mean_tokens) * (_SMOOTHING if self.mean_tokens else 1.0)

    def missed(self, now: float) -> None:
        """A request was given up in line."""
        self.burn.add(1.0, 1.0, now)

    def concurrency(self, *, max_sequences: int, kv_tokens: int) -> float:
        """c*: sequences that a replica runs when it is full, as its places or its memory bind."""
        if not self.mean_tokens or not kv_tokens:
            return float(max_sequences)
        return min(float(max_sequences), max(kv_tokens / self.mean_tokens, 1.0))
