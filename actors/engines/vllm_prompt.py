"""Renders a request to the token ids that vLLM takes, and refuses what does not fit the model.

Called by `VllmEngine.generate`. vLLM's renderer does the work in its own threads: chat template (with what
single model families need), tokenizer, salt of the prefix cache. Sizes are checked here, so that both numbers
can be named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from actors.errors import ContextLengthExceeded, InvalidRequest
from actors.types import GenerationRequest, Message, Tool


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A rendered prompt."""

    engine_input: Any  # vLLM's TokensInput
    tokens: int
    text: str  # what `echo` returns; empty otherwise


async def render(llm: Any, request: GenerationRequest) -> Prompt:
    """Turn messages, text or token ids into vLLM's input.

    Raises:
        InvalidRequest: no chat template, messages the template refuses, token ids outside the vocabulary, an
            empty prompt.
        ContextLengthExceeded: the prompt alone leaves no room for one token.
    """
    context = llm.model_config.max_model_len
    _refuse_hopeless(request, context, llm.get_tokenizer().max_chars_per_token)
    if request.messages is not None:
        engine_input = await _render_chat(llm, request, request.messages)
    else:
        engine_input = await _render_completion(llm, request)
    tokens = len(engine_input["prompt_token_ids"])
    if tokens == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if request.cache_salt:
        engine_input["cache_salt"] = request.cache_salt
    return Prompt(engine_input=engine_input, tokens=tokens, text=_echo(llm, request))


def room(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """How many tokens may be produced.

    Args:
        prompt_tokens: of the rendered prompt.
        max_tokens: what was asked for; None: all that is left.
        context: of the model, prompt and output together.

    Raises:
        InvalidRequest: max_tokens is below 1.
        ContextLengthExceeded: it does not fit.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + wanted > context:
        raise ContextLengthExceeded(
            f"this model's context is {context} tokens, but {prompt_tokens + wanted} were asked for "
            f"({prompt_tokens} in the prompt, {wanted} for the output); shorten one of them",
            param="messages",
        )
    return context - prompt_tokens if max_tokens is None else max_tokens


def _refuse_hopeless(request: GenerationRequest, context: int, max_chars_per_token: int) -> None:
    """Refuse text that is too long by any count, before a tokenizer spends seconds on it."""
    chars = len(request.prompt or "") + sum(len(message.content) for message in request.messages or ())
    at_least = chars // max_chars_per_token
    if at_least >= context:
        raise ContextLengthExceeded(
            f"this model's context is {context} tokens, but the prompt alone has at least {at_least}",
            param="messages",
        )


async def _render_chat(llm: Any, request: GenerationRequest, messages: tuple[Message, ...]) -> Any:
    from vllm.exceptions import VLLMClientError
    from vllm.renderers import ChatParams, TokenizeParams
    from vllm.renderers.chat_utils import ChatTemplateResolutionError

    tools = [as_openai(tool) for tool in request.tools] or None
    special = tuple(llm.get_tokenizer().all_special_tokens)
    conversation = [_as_dict(message, special) for message in messages]
    params = ChatParams(
        chat_template_kwargs={"add_generation_prompt": True, "continue_final_message": False, "tools": tools},
        tool_choice=request.tool_choice.mode if tools else None,
    )
    unbounded = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
    try:
        _, prompts = await llm.renderer.render_chat_async([conversation], params, unbounded)
    except ChatTemplateResolutionError:
        raise InvalidRequest(
            "this model has no chat template: it takes a prompt (/v1/completions), not messages",
            param="messages",
        ) from None
    except (
        VLLMClientError,
        ValueError,
        TypeError,
        TimeoutError,
    ) as error:  # what templates raise on odd input
        raise InvalidRequest(f"the messages do not fit this model: {error}", param="messages") from error
    return prompts[0]


async def _render_completion(llm: Any, request: GenerationRequest) -> Any:
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.renderers import TokenizeParams

    ids = request.prompt_token_ids
    if ids is None:
        prompt: Any = TextPrompt(prompt=_clean(request.prompt or ""))
    else:
        prompt = TokensPrompt(prompt_token_ids=_checked(ids, llm.model_config.get_vocab_size()))
    unbounded = TokenizeParams(max_total_tokens=None, add_special_tokens=True)
    return (await llm.renderer.render_cmpl_async([prompt], unbounded))[0]


def _checked(ids: tuple[int, ...], vocabulary: int) -> list[int]:
    for token_id in ids:
        if not 0 <= token_id < vocabulary:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary, 0 to {vocabulary - 1}", param="prompt"
            )
    return list(ids)


def _echo(llm: Any, request: GenerationRequest) -> str:
    if not request.echo:
        return ""
    if request.sampling.logprobs:
        raise InvalidRequest("echo together with logprobs is not supported", param="logprobs")
    if request.prompt_token_ids is not None:
        return str(llm.get_tokenizer().decode(list(request.prompt_token_ids)))
    return request.prompt or ""


def _clean(text: str) -> str:
    """Lone surrogates, which JSON can carry and no tokenizer takes, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def defused(text: str, special_tokens: tuple[str, ...]) -> str:
    """The text with a zero-width space inside every special token that it spells out.

    Tokenizers read such a spelling as the token itself, wherever it stands: a document that says `<|im_end|>`
    would end the user's message and could go on as the system.

    Args:
        text: content of a message.
        special_tokens: of the model's tokenizer.
    """
    pattern = _any_of(special_tokens)
    return pattern.sub(lambda found: found[0][:1] + "\u200b" + found[0][1:], text) if pattern else text


@lru_cache(maxsize=8)
def _any_of(special_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _as_dict(message: Message, special_tokens: tuple[str, ...]) -> dict[str, Any]:
    """A message as OpenAI writes it, the form that vLLM and chat templates know."""
    content = defused(_clean(message.content), special_tokens)
    out: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        out["name"] = message.name
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return out


def as_openai(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI writes it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
