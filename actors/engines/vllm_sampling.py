"""Translates sampling options and structured output to vLLM's `SamplingParams`, and checks them there.

Called by `VllmEngine.generate`. A schema is checked in a thread and within a time, before anything reaches the
engine: a schema that cannot be compiled is the request's error, never the engine's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from actors.engines.vllm_tools import ToolPlan
from actors.errors import InvalidRequest
from actors.types import GenerationRequest

SCHEMA_CHECK_S = 1.0  # what compiles slower would hold up every other request's grammar in the engine
SEED_RANGE = 1 << 62  # vLLM takes 64-bit seeds, adds the choice's number and reads -1 as none


async def sampling_params(
    llm: Any, request: GenerationRequest, max_tokens: int, tools: ToolPlan | None
) -> Any:
    """Make vLLM's parameters for one request.

    Raises:
        InvalidRequest: a value out of range, or a schema that is none, unsupported or too complex.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    asked = request.sampling
    # vLLM refuses n > 1 when greedy; the likeliest token alone, ties broken by a fixed seed, is the same.
    greedy_choices = asked.n > 1 and asked.temperature == 0.0
    seed = 0 if greedy_choices else asked.seed
    try:
        params = SamplingParams(
            n=asked.n,
            max_tokens=max_tokens,
            temperature=1.0 if greedy_choices else asked.temperature,
            top_k=1 if greedy_choices else 0,
            top_p=asked.top_p,
            stop=list(asked.stop),
            seed=None if seed is None else seed % SEED_RANGE,
            logprobs=asked.top_logprobs if asked.logprobs else None,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            skip_special_tokens=not (tools and tools.special_tokens),
            structured_outputs=_structured_outputs(request, tools),
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,  # made for this request alone
        )
        await _check(llm, params, has_schema=params.structured_outputs is not None)
    except (VLLMClientError, ValueError, TypeError) as error:
        raise InvalidRequest(_reason(error), param=_param(error, request, tools)) from error
    return params


async def _check(llm: Any, params: Any, *, has_schema: bool) -> None:
    """Run vLLM's own validation; with a schema in a thread and bounded, since it compiles a grammar."""
    config = llm.vllm_config

    def verify() -> None:
        params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            llm.get_tokenizer(),
        )

    if not has_schema:
        verify()
        return
    try:
        async with asyncio.timeout(SCHEMA_CHECK_S):
            await asyncio.to_thread(verify)
    except TimeoutError:
        raise ValueError(
            f"the schema is too complex: compiling it takes more than {SCHEMA_CHECK_S:g} s"
        ) from None


def _structured_outputs(request: GenerationRequest, tools: ToolPlan | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    wanted = request.response_format
    if tools is not None and tools.schema is not None:
        return StructuredOutputsParams(json=_encoded(tools.schema))
    if wanted.type == "json_schema":
        if wanted.schema is None:
            raise ValueError("response_format.json_schema needs a schema")
        return StructuredOutputsParams(json=_encoded(wanted.schema))
    return StructuredOutputsParams(json_object=True) if wanted.type == "json_object" else None


def _encoded(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema)


def _reason(error: Exception) -> str:
    """The message alone: vLLM appends parameter and value to it, which may be a whole prompt."""
    return str(error.args[0]) if error.args else str(error)


def _param(error: Exception, request: GenerationRequest, tools: ToolPlan | None) -> str | None:
    named = getattr(error, "parameter", None)
    if named is not None:
        return str(named)
    if tools is not None and tools.schema is not None:
        return "tools"
    return "response_format" if request.response_format.type != "text" else None
