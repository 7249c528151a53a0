"""How an answer is laid out in tokens: limits, stop strings, streaming of calls, logprobs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines import scripted_tokenizer as tokenizer
from actors.engines.scripted_script import Script, stretched, write
from actors.engines.scripted_text import Answer
from actors.errors import CannotResume
from actors.types import Progress, SamplingParams, TokenDelta, ToolCall

LETTERS = st.text("abc ", max_size=30)


def script(answer: Answer | str, *, limit_tokens: int = 1000, before: str = "", **sampling: Any) -> Script:
    answer = answer if isinstance(answer, Answer) else Answer(text=answer)
    return write(
        answer, choice=0, sampling=SamplingParams(**sampling), limit_tokens=limit_tokens, before=before
    )


def streamed(laid_out: Script) -> str:
    return "".join(delta.text for delta in laid_out.steps())


def test_every_step_is_one_token_and_the_last_one_ends() -> None:
    deltas = list(script("One two three").steps())
    assert [delta.text for delta in deltas] == ["One", " two", " thr", "ee"]
    assert [len(delta.token_ids) for delta in deltas] == [1, 1, 1, 1]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]


def test_the_limit_cuts_with_length() -> None:
    laid_out = script("One two three", limit_tokens=2)
    assert streamed(laid_out) == "One two"
    assert laid_out.finish_reason == "length"


def test_a_text_that_just_fits_the_limit_ends_with_stop() -> None:
    assert script("One two", limit_tokens=2).finish_reason == "stop"


def test_a_stop_string_inside_a_token_cuts_the_text_but_not_the_token() -> None:
    laid_out = script("One two three", stop=("w",))
    assert streamed(laid_out) == "One t"
    assert len(laid_out) == 2
    assert laid_out.finish_reason == "stop"


def test_a_stop_string_over_several_tokens_is_held_back_until_it_is_decided() -> None:
    deltas = list(script("One two three four", stop=("two three",)).steps())
    assert [delta.text for delta in deltas] == ["One", " ", "", ""]
    held = list(script("One two trees", stop=("two three",)).steps())
    assert [delta.text for delta in held] == ["One", " ", "two tre", "es"]


def test_text_held_back_at_the_end_is_released() -> None:
    assert streamed(script("One two thr", stop=("three",))) == "One two thr"
    assert streamed(script("One two three", stop=("three",), limit_tokens=3)) == "One two thr"


@given(LETTERS.filter(bool), st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3))
def test_the_text_ends_where_the_first_completed_stop_string_begins(text: str, stops: list[str]) -> None:
    laid_out = script(text, stop=tuple(stops))
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert streamed(laid_out) == expected
    shown = ""
    for delta in laid_out.steps():
        shown += delta.text
        assert expected.startswith(shown)


def test_echo_shows_the_prompt_first_without_counting_it() -> None:
    laid_out = script("there", before="Hello ")
    assert streamed(laid_out) == "Hello there"
    assert len(laid_out) == len(tokenizer.split("there"))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 100])
def test_free_text_is_stretched_or_cut_to_exactly_so_many_tokens(tokens: int) -> None:
    assert len(script(stretched(Answer(text="One two three"), tokens))) == tokens


def test_json_and_calls_are_never_stretched() -> None:
    structured = Answer(text="{}", structured=True)
    calling = Answer(calls=(ToolCall(id="c", name="f", arguments="{}"),))
    assert stretched(structured, 50) is structured
    assert stretched(calling, 50) is calling


def test_a_call_comes_as_its_name_and_then_its_arguments_token_by_token() -> None:
    arguments = json.dumps({"city": "Paris", "days": 3})
    calls = tuple(ToolCall(id=f"call_{n}", name="get_weather", arguments=arguments) for n in (0, 1))
    laid_out = script(Answer(calls=calls))
    deltas = list(laid_out.steps())
    assert laid_out.finish_reason == deltas[-1].finish_reason == "tool_calls"
    assert all(len(delta.token_ids) == 1 and not delta.text for delta in deltas)
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    for index in (0, 1):
        first, *rest = [piece for piece in pieces if piece.index == index]
        assert (first.id, first.name, first.arguments) == (f"call_{index}", "get_weather", "")
        assert len(rest) > 3
        assert all(piece.id is None and piece.name is None for piece in rest)
        assert "".join(piece.arguments for piece in rest) == arguments


def test_a_call_cut_by_the_limit_ends_with_length() -> None:
    call = ToolCall(id="c", name="f", arguments='{"a": 1, "b": 2}')
    laid_out = script(Answer(calls=(call,)), limit_tokens=3)
    assert laid_out.finish_reason == "length"
    assert len(list(laid_out.steps())) == 3


def test_a_whole_delta_is_the_sum_of_the_steps() -> None:
    call = ToolCall(id="c", name="f", arguments='{"a": 1}')
    for answer in (Answer(text="One two three"), Answer(calls=(call,))):
        laid_out = script(answer, logprobs=True, top_logprobs=2)
        steps, whole = list(laid_out.steps()), laid_out.whole()
        assert whole.text == "".join(delta.text for delta in steps)
        assert whole.token_ids == sum((delta.token_ids for delta in steps), ())
        assert whole.logprobs == sum((delta.logprobs for delta in steps), ())
        assert whole.tool_calls == sum((delta.tool_calls for delta in steps), ())
        assert whole.finish_reason == steps[-1].finish_reason


@given(st.text(min_size=1, max_size=40), st.integers(0, 20))
def test_logprobs_are_plausible(text: str, top: int) -> None:
    for entry in script(text, logprobs=True, top_logprobs=top).whole().logprobs:
        values = [value for _, value in entry.top]
        assert len(values) == top
        assert values == sorted(values, reverse=True)
        assert entry.logprob < 0
        assert sum(map(math.exp, values)) <= 1
        assert len({token for token, _ in entry.top}) == top
        assert not top or entry.top[0] == (entry.token, entry.logprob)


def test_logprobs_are_only_there_when_asked_for() -> None:
    assert script("One two").whole().logprobs == ()


def told(deltas: list[TokenDelta]) -> Progress:
    return Progress(
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text_chars=sum(len(delta.text) for delta in deltas),
    )


@given(
    text=st.text("abc 🦜é", min_size=1, max_size=30),
    stops=st.lists(st.text("abc 🦜", min_size=1, max_size=4), max_size=3),
    limit=st.integers(1, 12),
    place=st.floats(0, 1),
)
def test_behind_any_cut_comes_exactly_the_rest(text: str, stops: list[str], limit: int, place: float) -> None:
    laid_out = script(text, stop=tuple(stops), limit_tokens=limit, logprobs=True)
    deltas = list(laid_out.steps())
    cut = round(place * (len(deltas) - 1))
    rest = laid_out.behind(told(deltas[:cut]))
    assert list(rest.steps()) == deltas[cut:]
    assert rest.whole().text == "".join(delta.text for delta in deltas[cut:])
    assert rest.whole().token_ids == told(deltas[cut:]).token_ids
    assert rest.whole().logprobs == tuple(entry for delta in deltas[cut:] for entry in delta.logprobs)


def test_text_that_was_not_delivered_comes_with_the_next_token() -> None:
    begun = Progress(token_ids=tuple(tokenizer.encode("One two")), text_chars=4)
    assert [delta.text for delta in script("One two three").behind(begun).steps()] == ["two thr", "ee"]


@pytest.mark.parametrize(("said", "chars"), [("Two", 3), ("One two three four", 5), ("One", 4)])
def test_what_this_script_never_said_is_no_beginning(said: str, chars: int) -> None:
    with pytest.raises(CannotResume):
        script("One two three").behind(Progress(token_ids=tuple(tokenizer.encode(said)), text_chars=chars))
