"""The card that the suite runs on: one in a file, and with `-m gpu` the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from actors.engines.gpu_share import SharedCardEngine
from actors.engines.gpu_start import Plan, ShareConfig
from actors.errors import EngineFailed
from actors.policies.gpu_memory import MIB
from tests.gpu.card_engine import CardEngine
from tests.gpu.cards import CudaCard, FileCard, Memory

WEIGHTS_BYTES = 2 << 30


def real_card() -> CudaCard:
    """The GPU of this machine; skips with the reason where there is none."""
    try:
        card = CudaCard()
    except EngineFailed as error:
        pytest.skip(f"no GPU to run on: {error.message}")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU to run on: this torch is built without CUDA")
    return card


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return FileCard(tmp_path / "card") if request.param == "fake" else real_card()


Make = Callable[..., SharedCardEngine]


@pytest.fixture
async def make(memory: Memory, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes shared engines that are ended with the test; `made` of each holds what it has made."""
    async with AsyncExitStack() as stack:

        def one(
            name: str, num_gpus: float, weights_bytes: int = WEIGHTS_BYTES, **config: float
        ) -> SharedCardEngine:
            made: list[CardEngine] = []

            def engine(plan: Plan) -> CardEngine:
                made.append(CardEngine(memory, name, weights_bytes, plan))
                return made[-1]

            shared = SharedCardEngine(
                owner=name,
                num_gpus=num_gpus,
                make=engine,
                key=f"{name} {weights_bytes}",
                cards=memory,
                config=ShareConfig(folder=tmp_path / "node", least_kv_bytes=64 * MIB, **config),
            )
            shared.made = made  # type: ignore[attr-defined]
            stack.push_async_callback(shared.stop)
            return shared

        yield one
