"""From vLLM's outputs to token deltas; vLLM itself is not needed for it."""

from types import SimpleNamespace
from typing import Any

import pytest

from actors.engines.vllm_output import OutputMapper
from actors.engines.vllm_tools import ForcedCall, ToolPlan
from actors.errors import CannotResume, InvalidRequest, ShoalError
from actors.types import Progress, SamplingParams, TokenDelta, Usage


def completion(
    index: int = 0, text: str = "", ids: tuple[int, ...] = (), finish: str | None = None, logprobs=None
):
    return SimpleNamespace(index=index, text=text, token_ids=ids, finish_reason=finish, logprobs=logprobs)


def output(
    *completions: SimpleNamespace, finished: bool = False, cached: int | None = None
) -> SimpleNamespace:
    return SimpleNamespace(outputs=list(completions), finished=finished, num_cached_tokens=cached)


def mapper(
    n: int = 1, *, echo: str = "", tools=None, constrained: bool = False, **sampling: Any
) -> OutputMapper:
    return OutputMapper(
        SamplingParams(n=n, **sampling), prompt_tokens=7, echo=echo, tools=tools, constrained=constrained
    )


def run(mapped: OutputMapper, *outputs: SimpleNamespace) -> list[TokenDelta]:
    return [delta for one in outputs for delta in mapped.deltas(one)]


def test_usage_comes_once_with_the_last_delta_and_counts_every_token() -> None:
    deltas = run(
        mapper(),
        output(completion(text="He", ids=(1,)), cached=4),
        output(completion(text="llo", ids=(2, 3))),
        output(completion(ids=(9,), finish="stop"), finished=True),
    )
    assert "".join(delta.text for delta in deltas) == "Hello"
    assert [delta.usage for delta in deltas] == [None, None, Usage(7, 4, 4)]
    assert deltas[-1].finish_reason == "stop"


def test_choices_that_end_in_one_step_share_one_usage() -> None:
    first, second = run(
        mapper(2),
        output(completion(0, "a", (1,), "length"), completion(1, "b", (2,), "length"), finished=True),
    )
    assert (first.choice, first.usage) == (0, None)
    assert (second.choice, second.usage) == (1, Usage(7, 2, 0))


def test_an_echo_stands_before_the_first_text_of_every_choice() -> None:
    deltas = run(
        mapper(2, echo="Once "),
        output(completion(0, "a", (1,))),
        output(completion(1, "b", (2,))),
        output(completion(0, "c", (3,))),
    )
    assert [delta.text for delta in deltas] == ["Once a", "Once b", "c"]


def candidate(token: str, logprob: float, rank: int) -> SimpleNamespace:
    return SimpleNamespace(decoded_token=token, logprob=logprob, rank=rank)


def test_logprobs_name_the_sampled_token_and_the_likeliest_in_order() -> None:
    position = {5: candidate("rare", -7.0, 40), 1: candidate("a", -0.1, 1), 2: candidate("b", -2.0, 2)}
    (delta,) = run(
        mapper(logprobs=True, top_logprobs=2), output(completion(text="rare", ids=(5,), logprobs=[position]))
    )
    (entry,) = delta.logprobs
    assert (entry.token, entry.logprob) == ("rare", -7.0)
    assert entry.top == (("a", -0.1), ("b", -2.0))


def test_an_impossible_token_has_a_finite_logprob() -> None:
    position = {5: candidate("x", float("-inf"), 1)}
    (delta,) = run(mapper(logprobs=True), output(completion(ids=(5,), logprobs=[position])))
    assert delta.logprobs[0].logprob == -9999.0
    assert delta.logprobs[0].top == ()


def test_logprobs_that_were_not_asked_for_are_not_sent() -> None:
    (delta,) = run(mapper(), output(completion(ids=(5,), logprobs=[{5: candidate("x", -1.0, 1)}])))
    assert delta.logprobs == ()


def test_a_forced_call_ends_with_tool_calls_and_has_no_text() -> None:
    plan = ToolPlan(new_stream=lambda: ForcedCall("add"))
    deltas = run(
        mapper(tools=plan, constrained=True),
        output(completion(text='{"a":', ids=(1,))),
        output(completion(text="1}", ids=(2,), finish="stop"), finished=True),
    )
    assert "".join(delta.text for delta in deltas) == ""
    assert "".join(call.arguments for delta in deltas for call in delta.tool_calls) == '{"a":1}'
    first = deltas[0].tool_calls[0]
    assert first.name == "add"
    assert first.id is not None
    assert deltas[1].tool_calls[0].name is None
    assert deltas[1].finish_reason == "tool_calls"


def test_a_call_that_max_tokens_cut_ends_with_length() -> None:
    plan = ToolPlan(new_stream=lambda: ForcedCall("add"))
    (delta,) = run(
        mapper(tools=plan, constrained=True),
        output(completion(text='{"a', ids=(1,), finish="length"), finished=True),
    )
    assert delta.finish_reason == "length"


def test_an_aborted_request_gives_nothing_more() -> None:
    mapped = mapper()
    assert run(mapped, output(completion(ids=(), finish="abort"), finished=True)) == []
    assert mapped.aborted


def test_a_request_the_engine_gave_up_is_an_error_that_blames_a_schema_where_there_is_one() -> None:
    failed = output(completion(finish="error"), finished=True)
    with pytest.raises(ShoalError) as plain:
        run(mapper(), failed)
    assert plain.value.status_code == 500
    with pytest.raises(InvalidRequest, match="schema"):
        run(mapper(constrained=True), failed)


def test_a_schema_that_lets_nothing_be_said_is_the_requests_error() -> None:
    with pytest.raises(InvalidRequest, match="allows nothing"):
        run(mapper(constrained=True), output(completion(ids=(2,), finish="stop"), finished=True))


def test_behind_what_was_told_come_its_missing_text_and_the_whole_usage() -> None:
    mapped = mapper(echo="Once ")
    mapped.take_over(0, [("He", 1, False), ("llo", 2, False)], Progress(token_ids=(1, 2), text_chars=3))
    (delta,) = run(mapped, output(completion(text=" you", ids=(3,), finish="stop"), finished=True, cached=9))
    assert (delta.text, delta.token_ids, delta.usage) == ("lo you", (3,), Usage(7, 3, 7))


def test_a_choice_that_had_ended_counts_and_says_nothing() -> None:
    mapped = mapper(2)
    mapped.take_over(0, [], Progress(token_ids=(1, 2, 3), text_chars=50, finish_reason="stop"))
    (delta,) = run(mapped, output(completion(1, "a", (1,), "length"), finished=True))
    assert (delta.choice, delta.usage) == (1, Usage(7, 4, 0))


def test_more_text_than_the_tokens_give_is_another_answer() -> None:
    with pytest.raises(CannotResume, match="more of the answer"):
        mapper().take_over(0, [("He", 1, False)], Progress(token_ids=(1,), text_chars=3))


def test_a_call_whose_name_was_told_goes_on_with_its_arguments() -> None:
    mapped = mapper(tools=ToolPlan(new_stream=lambda: ForcedCall("add")), constrained=True)
    mapped.take_over(0, [('{"a":', 1, False)], Progress(token_ids=(1,)))
    (delta,) = run(mapped, output(completion(text="1}", ids=(2,), finish="stop"), finished=True))
    (call,) = delta.tool_calls
    assert (call.id, call.name, call.arguments) == (None, None, "1}")
    assert delta.finish_reason == "tool_calls"


def test_an_end_alone_carries_the_text_that_was_held_back() -> None:
    mapped = mapper()
    mapped.take_over(0, [("He", 1, False), ("llo", 2, True)], Progress(token_ids=(1, 2), text_chars=4))
    delta = mapped.with_usage(mapped.end(0, "length"))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("o", (), "length")
    assert delta.usage == Usage(7, 2, 0)
