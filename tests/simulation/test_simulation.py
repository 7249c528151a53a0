"""A thousand seeds of the whole token path in virtual time, and one fault between any two steps of a small run.

A failure prints its trace and the command that plays it again. What is simulated: gateways, queue and replicas as
they are, with the scripted engine; what is not: Serve, processes, clocks and the network, which are
`tests.simulation`'s own.
"""

import pytest

from actors.handles.queue import QueueClient
from actors.policies.dispatch import Dispatcher
from actors.policies.progress import Made
from tests.simulation.__main__ import told
from tests.simulation.plan import FaultKind, scenario, walk_scenario
from tests.simulation.run import Result, play

_SEEDS = 1000
_PER_TEST = 100
_SHOWN = 3


def check(results: dict[int, Result], walk: FaultKind | None = None) -> None:
    wrong = [told(result, number, walk) for number, result in results.items() if result.wrongs]
    assert not wrong, f"{len(wrong)} runs went wrong, the first:\n" + "\n\n".join(wrong[:_SHOWN])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", range(0, _SEEDS, _PER_TEST))
def test_whatever_breaks_every_caller_gets_its_tokens_once_or_one_error(first):
    check({seed: play(scenario(seed)) for seed in range(first, first + _PER_TEST)})


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", FaultKind)
def test_one_fault_between_any_two_steps_costs_nobody_an_answer(kind):
    quiet = play(walk_scenario(None))
    assert quiet.outcomes == {"complete": 5, "left": 1}
    steps = range(quiet.first_step, quiet.last_step)
    results = {step: play(walk_scenario((step, kind))) for step in steps}
    check(results, kind)
    assert all(result.faults for result in list(results.values())[len(steps) // 4 : len(steps) // 2])


def test_a_seed_is_the_same_run_every_time():
    assert play(scenario(7), verbose=True) == play(scenario(7), verbose=True)


@pytest.mark.parametrize(
    ("owner", "name", "broken", "told_of"),
    [
        (Made, "progress", lambda _: (), "has a token twice, missing or wrong"),
        (
            QueueClient,
            "_connected",
            lambda self, connection: setattr(self, "_connection", connection),
            "not allowed",
        ),
        (Dispatcher, "replica_gone", lambda *_: [], "not allowed"),
        (Dispatcher, "_finish", lambda *_: None, "is not the sum of"),
    ],
)
def test_a_bug_is_seen(monkeypatch, owner, name, broken, told_of):
    monkeypatch.setattr(owner, name, broken)
    wrongs = [wrong for seed in range(40) for wrong in play(scenario(seed)).wrongs]
    assert any(told_of in wrong for wrong in wrongs)
