"""When a second start is worth it, and what it may cost."""

import random

from actors.policies.hedging import Hedging


def test_nothing_is_late_while_too_little_is_known():
    hedging = Hedging()
    assert hedging.delay_s() is None
    for _ in range(20):
        hedging.observe(0.4, 10)
    assert hedging.delay_s() >= 3 * 0.4 * 0.5


def test_the_delay_follows_the_slow_ones_and_has_a_floor():
    quick, slow, rng = Hedging(), Hedging(), random.Random(1)
    for _ in range(2000):
        quick.observe(0.01, 10)
        slow.observe(rng.expovariate(1.0), 10)
    assert quick.delay_s() == 0.5
    assert 3 * 2.0 < slow.delay_s() < 3 * 4.5  # the 95th percentile is 3.0


def test_second_starts_cost_at_most_two_percent_of_the_tokens():
    hedging, served, spent = Hedging(), 0, 0
    assert not hedging.spend(1)
    rng = random.Random(2)
    for _ in range(5000):
        tokens = rng.randrange(1, 500)
        hedging.observe(0.1, tokens)
        hedging.earn(tokens)
        served += 2 * tokens
        if hedging.spend(cost := rng.randrange(1, 800)):
            spent += cost
        assert spent <= 0.02 * served
    assert spent > 0.015 * served
