"""What the scripted engine says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.engines.scripted_text import Answer, Style, compose
from actors.policies.prompting import with_passages
from actors.types import GenerationRequest, Message, Passage, ResponseFormat, SamplingParams, Tool

QUESTION = "How tall is the Zugspitze mountain?"


def say(*messages: Message | str, choice: int = 0, style: Style = "echo", **fields: Any) -> Answer:
    sampling = SamplingParams(**{"temperature": 0.0, **fields.pop("sampling", {})})
    listed = tuple(Message(role="user", content=m) if isinstance(m, str) else m for m in messages)
    request = GenerationRequest(request_id="r", messages=listed, sampling=sampling, **fields)
    return compose(request, prompt="", style=style, choice=choice)


def passage(number: int, text: str) -> Passage:
    return Passage(
        chunk_id=str(number),
        file_id="f",
        filename=f"mountain-{number}.md",
        vector_store_id="vs",
        text=text,
        score=1.0,
    )


def test_it_echoes_the_last_user_message() -> None:
    assert say("First", Message(role="assistant", content="Hm"), "Second thing").text == "Second thing"


def test_it_paraphrases_when_told_to() -> None:
    answer = say("The sea is blue", style="paraphrase").text
    assert answer != "The sea is blue"
    assert "The sea is blue" in answer


def test_an_empty_message_still_gets_words() -> None:
    assert say("  ").text
    assert say(Message(role="system", content="Be nice.")).text


def test_braces_in_a_message_are_only_text() -> None:
    assert say("Use {0} and {name}").text == "Use {0} and {name}"


def test_a_prompt_is_answered_like_a_message() -> None:
    request = GenerationRequest(request_id="r", prompt="Once", sampling=SamplingParams(temperature=0))
    assert compose(request, prompt="Once", style="echo", choice=0).text == "Once"


def test_choices_are_the_same_at_temperature_zero_and_all_differ_above() -> None:
    assert len({say("Hi", choice=n).text for n in range(20)}) == 1
    warm = {"temperature": 1.0, "seed": 3}
    assert len({say("Hi", choice=n, sampling=warm).text for n in range(20)}) == 20


def test_a_seed_fixes_the_answer_and_seeds_differ() -> None:
    by_seed = [say("Hi", sampling={"temperature": 0.7, "seed": seed}).text for seed in range(12)]
    again = [say("Hi", sampling={"temperature": 0.7, "seed": seed}).text for seed in range(12)]
    assert by_seed == again
    assert len(set(by_seed)) > 1


def test_the_passage_that_fits_the_question_is_quoted_and_cited() -> None:
    passages = [
        passage(1, "The Feldberg is a mountain in Hesse. It has a tower."),
        passage(
            2, "The Zugspitze is 2,962 metres tall. It is a mountain in Bavaria.\nA cog railway leads up."
        ),
        passage(3, "Question and answer passages are numbered documents."),
    ]
    messages = with_passages([Message(role="user", content=QUESTION)], passages)
    answer = say(*messages).text
    assert "The Zugspitze is 2,962 metres tall. [2]" in answer
    assert "Feldberg" not in answer


def test_context_above_the_question_is_quoted_too() -> None:
    answer = say(f"The Zugspitze is 2,962 metres tall. The sea is flat.\n\n{QUESTION}").text
    assert answer.endswith("The Zugspitze is 2,962 metres tall.")


def test_without_a_fitting_sentence_it_does_not_quote() -> None:
    messages = with_passages([Message(role="user", content=QUESTION)], [passage(1, "Bread is baked.")])
    assert say(*messages).text == QUESTION


def test_ordinary_instructions_are_not_quoted() -> None:
    assert say(Message(role="system", content="You are a helpful assistant."), QUESTION).text == QUESTION


def test_a_tool_result_is_put_into_words() -> None:
    result = Message(role="tool", content="18 degrees", tool_call_id="c")
    tools = (Tool(name="get_weather"),)
    answer = say("get_weather please", Message(role="assistant"), result, tools=tools)
    assert not answer.calls
    assert "18 degrees" in answer.text


def test_results_of_several_tools_all_appear() -> None:
    results = [Message(role="tool", content=text, tool_call_id="c") for text in ("18 degrees", "rain")]
    answer = say("Weather?", *results).text
    assert "18 degrees" in answer
    assert "rain" in answer


def test_a_json_object_holds_the_words() -> None:
    answer = say("Tell me", response_format=ResponseFormat(type="json_object"))
    assert json.loads(answer.text) == {"answer": "Tell me"}
    assert answer.structured


@pytest.mark.parametrize("schema", [None, {}])
def test_a_json_schema_without_content_still_gives_json(schema: Any) -> None:
    json.loads(say("Tell me", response_format=ResponseFormat(type="json_schema", schema=schema)).text)
