"""One replica of known capacity, with API keys: what the open-loop benchmarks put their load on.

32 slots, 50 tokens a second in each, whatever the batch holds: 1,600 tokens or 40 answers of 40 tokens a second. So
two cores are not the limit, and what a queue wastes shows.
"""

import subprocess
import sys
from typing import Any

from tests.conftest import System, app_of, config_of

SLOTS, STEP_S = 32, 0.02
LEAST_TOKENS, MOST_TOKENS = 20, 60  # of an answer, and of its prompt
MEAN_TOKENS = (LEAST_TOKENS + MOST_TOKENS) / 2
TOKENS_PER_S = SLOTS / STEP_S
CAPACITY_RPS = TOKENS_PER_S / MEAN_TOKENS


def config(*beside: dict[str, Any]) -> dict[str, Any]:
    """Keys, one model, one gateway, and other applications beside them."""
    base = config_of("scripted", retrieval=None, announce_url=None)
    model = app_of(base, "build_model")
    model["args"]["engine"]["scripted"] = {
        "max_sequences": SLOTS,
        "itl_base_s": STEP_S,
        "itl_per_sequence_s": 0,
        "prefill_tokens_per_s": None,
    }
    model["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    base["applications"] = [
        app_of(base, "build_local_services"), model, app_of(base, "build_gateway"), *beside,
    ]  # fmt: skip
    return base


def key(system: System, tenant: str, priority: str = "standard") -> dict[str, str]:
    """The headers of a caller: a new key, as an operator makes one."""
    made = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", "keys", "create", "--tenant", tenant,
         "--class", priority, "--config", str(system.data_dir / "config.yaml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {"authorization": f"Bearer {made.stdout.strip()}"}
