"""Rows of the fault table that need HAProxy mode, production's default: see `test_rows`."""

from collections.abc import Iterator

import pytest

from tests.chaos.report import held
from tests.chaos.systems import Chaos, chaos

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Chaos]:
    with chaos("haproxy") as shared:
        yield shared


async def test_row_04_haproxy_is_back_soon_after_its_death(shared):
    await held(shared, "4 haproxy")


async def test_row_16_slow_readers_lose_nothing_silently_and_slow_nobody(shared):
    await held(shared, "16")
