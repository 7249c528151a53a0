"""How the command line reads the API: events, errors in words, patience."""

import pytest

from app.cli_http import Api, Event, events, patiently
from app.cli_output import CliError, ExitCode, one_line, printable


async def read(*pieces: bytes) -> list[Event]:
    async def stream():
        for piece in pieces:
            yield piece

    return [event async for event in events(stream())]


async def test_events_are_the_same_wherever_the_network_cuts_them():
    whole = 'data: {"a": "ü\u2028"}\n\n: server-timing queue;dur=1\n\ndata: [DONE]\n\n'.encode()
    expected = [
        Event("data", '{"a": "ü\u2028"}'),
        Event("comment", "server-timing queue;dur=1"),
        Event("data", "[DONE]"),
    ]
    assert await read(whole) == expected
    for cut in range(1, len(whole)):
        assert await read(whole[:cut], whole[cut:]) == expected


async def test_crlf_and_several_data_lines_are_one_event():
    assert await read(b"data: a\r\ndata:b\r\n\r\n") == [Event("data", "a\nb")]


async def test_an_event_that_was_not_ended_is_no_event():
    assert await read(b"data: {}\n") == []


async def test_nothing_that_answers_is_said_with_the_command_to_start_it():
    async with Api("http://127.0.0.1:9", "") as api:
        with pytest.raises(
            CliError, match=r"nothing answers at http://127.0.0.1:9; start Shoal with: serve run"
        ) as error:
            await api.call("GET", "/v1/models")
    assert error.value.exit_code is ExitCode.UNREACHABLE


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "ftp://x", "http://x:port", ""])
async def test_an_address_that_is_none_is_a_wrong_command_line(url):
    with pytest.raises(CliError, match=r"--url must be like http://127.0.0.1:8000") as error:
        async with Api(url, "") as api:
            await api.call("GET", "/v1/models")
    assert error.value.exit_code is ExitCode.USAGE


async def test_v1_may_stand_in_the_address_as_in_the_sdks(shoal):
    async with Api(f"{shoal.url}/v1/", "") as api:
        assert [model async for model in api.pages("/v1/models")] == shoal.models


async def test_something_else_that_answers_is_not_taken_for_shoal(shoal):
    async with Api(shoal.url, "") as api:
        with pytest.raises(CliError, match="answered HTTP 404 in no form of Shoal's"):
            await api.call("GET", "/elsewhere")


async def test_a_call_is_made_again_as_long_as_the_server_asks_for_it():
    tries = []

    async def call():
        tries.append(1)
        if len(tries) < 3:
            raise CliError("busy", retry_after_s=0.0)
        return "done"

    assert await patiently(call) == "done"
    with pytest.raises(CliError, match="final"):
        await patiently(lambda: fail(CliError("final")))
    with pytest.raises(CliError, match="too late"):
        await patiently(lambda: fail(CliError("too late", retry_after_s=60)))


async def fail(error):
    raise error


def test_text_of_others_cannot_drive_the_terminal():
    assert printable("a\x1b[2J\x9b1m\x07\tb\nc\r\x7f") == "a[2J1m\tb\nc"
    assert one_line("  much \n white   space ", 80) == "much white space"
    assert one_line("abcdef", 4) == "abc…"
