"""What the scripted engine says: an answer made from the request alone, the same every time.

Called by the scripted engine, once per choice. It owns the choice between a tool call, JSON and words, and the
words; `scripted_tools` fills calls, `scripted_schema` fills JSON, `scripted_script` cuts it all into tokens.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from actors.engines.scripted_material import Material
from actors.engines.scripted_schema import instance
from actors.engines.scripted_tools import choose_calls
from actors.types import GenerationRequest, Message, ToolCall

Style = Literal["echo", "paraphrase"]

_PHRASES: dict[str, Sequence[str]] = {
    "echo": ("{}", "You said: {}", "Your words were: {}", "As you put it: {}", "I heard this: {}"),
    "paraphrase": (
        "You are asking about this: {}",
        "In other words: {}",
        "To say it back to you: {}",
        "Your message, put differently: {}",
        "If I understand you well: {}",
    ),
    "quote": (
        "According to the context: {}",
        "The context says: {}",
        "In the documents it stands: {}",
        "What I found is this: {}",
    ),
    "tool": ("The result is: {}", "Here is what came back: {}", "The tool answered: {}"),
}
_EMPTY = "There is nothing to answer."
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+(?!\s|$)[^.!?\n]+)*[.!?]*")
_PASSAGE = re.compile(r"\[(\d+)\] ")  # heads a numbered passage
_WORD = re.compile(r"\w{3,}")
# Words that say nothing about what a sentence is about.
_COMMON = frozenset(
    _WORD.findall(
        "about also and any are but can could did does for from had has have here how into its just may not only our "
        "out please should some such than that the their them then there these they this those was were what when "
        "where which who whose why will with would you your"
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one choice says: words or JSON, or tool calls."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    structured: bool = False  # the text is JSON, so it must not be stretched


def compose(request: GenerationRequest, *, prompt: str, style: Style, choice: int) -> Answer:
    """The answer of one choice.

    Args:
        request: the request.
        prompt: the text of its `prompt` or `prompt_token_ids`; unused for messages.
        style: how free text relates to the last user message.
        choice: index of the choice; at temperature 0 all choices are the same.

    Raises:
        InvalidRequest: a tool or schema that cannot be served; the message names the place.
    """
    asked = prompt if request.messages is None else last_user_text(request.messages)
    calls = choose_calls(request, asked, choice)
    if calls:
        return Answer(calls=calls)
    wanted = request.response_format
    if wanted.type == "json_schema":
        value = instance(
            wanted.schema if wanted.schema is not None else {}, Material(asked), param="response_format"
        )
        return Answer(text=json.dumps(value, ensure_ascii=False), structured=True)
    words = _words(request, asked, style, choice)
    if wanted.type == "json_object":
        return Answer(text=json.dumps({"answer": words}, ensure_ascii=False), structured=True)
    return Answer(text=words)


def last_user_text(messages: Sequence[Message]) -> str:
    """The content of the last user message, or nothing."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")


def _words(request: GenerationRequest, asked: str, style: Style, choice: int) -> str:
    messages = request.messages or ()
    results = _tool_results(messages)
    quote = _quote(messages, asked)
    if results:
        kind, core = "tool", "; ".join(results)
    elif quote:
        kind, core = "quote", quote
    else:
        kind, core = style, asked
    if not core.strip():
        return _EMPTY
    phrases = _PHRASES[kind]
    number = _variant(request, choice)
    again = "" if number < len(phrases) else f"({number // len(phrases) + 1}) "
    return again + phrases[number % len(phrases)].format(core)


def _variant(request: GenerationRequest, choice: int) -> int:
    """Which phrase: the first at temperature 0, else by seed and choice; choices of one request all differ."""
    sampling = request.sampling
    if sampling.temperature == 0:
        return 0
    if sampling.seed is None:
        return choice
    return zlib.crc32(str(sampling.seed).encode()) % 4 + choice


def _tool_results(messages: Sequence[Message]) -> list[str]:
    """Contents of the tool messages at the end of the conversation, in order."""
    results: list[str] = []
    for message in reversed(messages):
        if message.role != "tool":
            break
        results.insert(0, message.content)
    return results


def _quote(messages: Sequence[Message], asked: str) -> str:
    """The context's sentence that shares most words with the question: at least two, or more than half.

    Context is what system messages say, and what stands above the last paragraph of the last user message. Where
    it holds numbered passages only those count, and the quote cites its passage, like [1].
    """
    above, _, question = asked.rstrip().rpartition("\n\n")
    instructions = [message.content for message in messages if message.role in {"system", "developer"}]
    sentences = _sentences("\n".join([above, *instructions]))
    about = _topic(question)
    best = max(sentences, key=lambda sentence: len(about & _topic(sentence)), default="")
    shared = len(about & _topic(best))
    return best if shared >= 2 or shared * 2 > len(about) else ""


def _sentences(context: str) -> list[str]:
    """The sentences of all passages, each with its citation; without passages, all sentences."""
    passages: list[str] = []
    number = ""
    for line in context.splitlines():
        if head := _PASSAGE.match(line):
            number = head.group(1)  # the rest of this line is the file's name
        elif number:
            passages += [f"{sentence.strip()} [{number}]" for sentence in _SENTENCE.findall(line)]
    return passages or [sentence.strip() for sentence in _SENTENCE.findall(context)]


def _topic(text: str) -> frozenset[str]:
    """The words that carry meaning, without case and plural."""
    return frozenset(word.rstrip("s") for word in _WORD.findall(text.lower()) if word not in _COMMON)
