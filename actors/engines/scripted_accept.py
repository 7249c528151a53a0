"""Takes a request in for the scripted engine: sizes it, lays out its answers and puts what is left into sequences.

Called by `ScriptedEngine.generate`, before anything of the engine is taken. Everything that can be wrong with a
request is found here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.engines import scripted_tokenizer as tokenizer
from actors.engines.progress import progress_of
from actors.engines.scripted_batch import Sequence, Stream
from actors.engines.scripted_script import Script, stretched, write
from actors.engines.scripted_text import Answer, compose
from actors.engines.tokens import prompt_tokens
from actors.errors import ContextLengthExceeded, InvalidRequest
from actors.types import GenerationRequest, ModelCard, Progress, TokenDelta

if TYPE_CHECKING:
    from actors.engines.scripted import ScriptedConfig


def accept(
    request: GenerationRequest, card: ModelCard, config: ScriptedConfig
) -> tuple[Stream, list[Sequence]]:
    """The stream of a request, with what needs no engine in it, and the sequences that do.

    Raises:
        InvalidRequest: max_tokens or n below 1, a tool, schema or token id that cannot be served.
        ContextLengthExceeded: prompt and output do not fit the context.
        CannotResume: its progress is not the beginning of this engine's answer.
    """
    sampling = request.sampling
    if sampling.n < 1:
        raise InvalidRequest("n must be at least 1", param="n")
    prompt_size = prompt_tokens(card, request)
    room_tokens = _room(prompt_size, sampling.max_tokens, card.context_tokens)
    told = progress_of(request)
    ended = [begun for begun in told if begun.finish_reason]
    told_tokens = sum(len(begun.token_ids) for begun in ended)
    scripts = _scripts(request, told, config, room_tokens)
    stream = Stream(request.request_id, prompt_size, len(scripts), told_tokens)
    if not scripts:
        stream.push_usage(TokenDelta(sampling.n - 1))
    for script in scripts:
        if script.start == len(script):  # only its end is left
            stream.push_last(script.whole(), len(script))
    unfinished = [script for script in scripts if script.start < len(script)]
    return stream, [
        Sequence(stream, script, 0 if at else prompt_size) for at, script in enumerate(unfinished)
    ]


def _scripts(
    request: GenerationRequest, told: tuple[Progress, ...], config: ScriptedConfig, room_tokens: int
) -> list[Script]:
    """What is still to be said, for every choice that has not ended."""
    ids = request.prompt_token_ids
    prompt = tokenizer.decode(ids) if ids is not None else request.prompt or ""
    scripts: list[Script] = []
    for choice in range(request.sampling.n):
        begun = told[choice] if told else Progress()
        if begun.finish_reason:
            continue
        script = write(
            _answer(request, prompt, choice, config),
            choice=choice,
            sampling=request.sampling,
            limit_tokens=room_tokens,
            before=prompt if request.echo and not begun.token_ids else "",
        )
        scripts.append(script.behind(begun))
    return scripts


def _answer(request: GenerationRequest, prompt: str, choice: int, config: ScriptedConfig) -> Answer:
    answer = compose(request, prompt=prompt, style=config.style, choice=choice)
    return answer if config.output_tokens is None else stretched(answer, config.output_tokens)


def _room(prompt_size: int, max_tokens: int | None, context: int) -> int:
    """How many tokens may be produced."""
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    wanted = max_tokens or 1
    if prompt_size + wanted > context:
        raise ContextLengthExceeded(
            f"this model's context is {context} tokens, but {prompt_size + wanted} were asked for "
            f"({prompt_size} in the prompt, {wanted} for the output); shorten one of them",
            param="messages",
        )
    return max_tokens or context - prompt_size
