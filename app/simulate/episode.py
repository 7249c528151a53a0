"""llm-d's published episode: its load, a replica that behaves like the one it ran on, and the pool's bounds.

From llm-d's guide `workload-autoscaling/slo-aware`, benchmark-templates/BENCHMARK.md (Apache-2.0): Qwen3-32B on two
H100, 2-4-6-8-10-4-1 requests/s, about 4,000 tokens in and 1,000 out, 3 to 8 replicas, about 100 s to start, counted
until the pool is back at its least. Published: 95.8 % within TTFT 3 s and TPOT 100 ms at 5.93 mean replicas.
"""

from __future__ import annotations

import numpy as np

from app.simulate.run import Bounds
from app.simulate.tables import Model
from app.simulate.trace import Trace

EPISODE = "llmd"  # the name of the built-in trace
_STAGES = ((2, 330), (4, 360), (6, 360), (8, 360), (10, 360), (4, 360), (1, 300))  # requests/s, seconds

# Its curve was never published. This one lies where such a replica must (a step reads 64 GB of weights over two cards,
# prefill is compute bound, 400,000 tokens of KV cache fit), and within that was chosen so that llm-d's law gives what
# llm-d measured; every policy runs on the same one.
EPISODE_MODEL = Model(
    itl_base_s=0.023,
    itl_per_sequence_s=0.00017,
    prefill_tokens_per_s=14_500.0,
    max_sequences=256,
    kv_tokens=400_000,
    start_up_s=100.0,
    ttft_slo_s=3.0,
    tpot_slo_s=0.1,
    timeout_s=300.0,
)
EPISODE_BOUNDS = Bounds(min_replicas=3, max_replicas=8, first_replicas=3, until_least=True)


def episode(seed: int) -> Trace:
    """The load. The generator spreads the requests of a stage evenly; lengths vary by a tenth."""
    rng = np.random.default_rng(seed)
    times, start = [], 0.0
    for rate, seconds in _STAGES:
        times.append(start + (np.arange(rate * seconds) + rng.random()) / rate)
        start += seconds
    arrive = np.concatenate(times)
    n = len(arrive)
    return Trace(
        name=EPISODE,
        arrive_s=arrive,
        prompt_tokens=np.maximum(rng.normal(4000, 400, n), 1).astype(np.int64),
        output_tokens=np.maximum(rng.normal(1000, 100, n), 1).astype(np.int64),
        tenant=np.zeros(n, np.int64),
        duration_s=start,
    )
