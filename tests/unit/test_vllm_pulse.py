"""One question at a time to an engine core, which may never answer; vLLM itself is not needed for it."""

import asyncio

from actors.engines import vllm_pulse
from actors.engines.vllm_pulse import Pulse


class Core:
    """Answers while `answering` is set."""

    def __init__(self) -> None:
        self.answering = asyncio.Event()
        self.asked = 0

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await self.answering.wait()
        return False


async def test_a_core_that_answers_owes_nothing() -> None:
    core = Core()
    core.answering.set()
    pulse = Pulse(core)
    assert await pulse.silent_s() == await pulse.silent_s() == 0.0
    assert core.asked == 2


async def test_silence_is_counted_from_the_first_question_and_nothing_more_is_asked(monkeypatch) -> None:
    monkeypatch.setattr(vllm_pulse, "_PATIENCE_S", 0.02)
    core = Core()
    pulse = Pulse(core)
    silences = [await pulse.silent_s() for _ in range(4)]
    assert core.asked == 1
    assert silences == sorted(silences)
    assert silences[-1] >= 0.08
    core.answering.set()
    assert await pulse.silent_s() == 0.0


async def test_a_core_that_died_is_not_silent() -> None:
    class Dead:
        async def is_sleeping(self) -> bool:
            raise RuntimeError("the engine is dead")

    assert await Pulse(Dead()).silent_s() == 0.0


async def test_a_stopped_pulse_leaves_no_task(monkeypatch) -> None:
    monkeypatch.setattr(vllm_pulse, "_PATIENCE_S", 0.01)
    pulse = Pulse(Core())
    assert await pulse.silent_s() > 0.0
    pulse.stop()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
