"""Goes on behind an answer that another replica began: what vLLM is asked, and what of its output is new.

Made by `VllmEngine.generate` for a request with `progress`. Two ways:

- *append*: the delivered tokens follow the prompt, vLLM computes them as a prompt and goes on. For one choice of
  free text. At temperature 0 the tokens are those of an unbroken run as far as vLLM's kernels give a prefilled
  token the same logits as a decoded one. Else sampling begins afresh, with a seed made of the request's seed and
  the position. Penalties are carried over as a bias on the delivered tokens; a token that comes again after the
  break is charged its presence penalty twice.
- *replay*: the request runs from its start and the delivered tokens are swallowed. For what has a state that
  cannot be handed over: a grammar (schemas, demanded tool calls), several choices, and penalties at temperature
  0. It needs temperature 0 or a seed, takes as long as the delivered part took, and a token that differs from
  the delivered one ends it with CannotResume.

Text is made here in both ways, by a detokenizer of vLLM's own that has read the prompt and then every delivered
token. vLLM's, behind a prompt that ends within a character, would say the whole prompt again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from types import SimpleNamespace
from typing import Any

from actors.engines.progress import progress_of
from actors.engines.vllm_output import OutputMapper
from actors.engines.vllm_prompt import Prompt
from actors.engines.vllm_sampling import SEED_RANGE
from actors.errors import CannotResume
from actors.types import GenerationRequest, Progress, SamplingParams, TokenDelta

_LONGEST_CHARACTER_TOKENS = 4  # bytes of a character, each of which may be a token
_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbouring positions get seeds far apart


class Continuation:
    """One continued request on its way through the engine.

    It reads the delivered tokens when it is made, which takes some 10 µs each: make it in a thread.

    Args:
        llm: the `AsyncLLM`.
        request: with progress.
        prompt: its own, rendered, without the progress.
        params: for the whole answer, as for a request without progress.
        mapper: takes over what the reader has.

    Raises:
        CannotResume: this kind of answer cannot go on, or the progress is not one of this request.
    """

    def __init__(
        self, llm: Any, request: GenerationRequest, prompt: Prompt, params: Any, mapper: OutputMapper
    ) -> None:
        self._mapper = mapper
        progress = progress_of(request)
        vocabulary = llm.model_config.get_vocab_size()
        if any(not 0 <= token_id < vocabulary for choice in progress for token_id in choice.token_ids):
            raise CannotResume(
                "the answer was begun by another model: it holds a token that this one does not know"
            )
        self._replay = _needs_replay(request.sampling, constrained=params.structured_outputs is not None)
        stops = _stop_tokens(llm, params)
        tokenizer = llm.get_tokenizer()
        self._choices = [
            _Choice(told, _detokenizer(tokenizer, prompt, params), stops, params.max_tokens)
            for told in progress
        ]
        for index, choice in enumerate(self._choices):
            if choice.progress.token_ids:
                mapper.take_over(index, choice.retell(), choice.progress)
        if self._replay:
            self.engine_input, self.params = prompt.engine_input, _without_text(params)
            self._logprobs = None
        else:
            told_ids = progress[0].token_ids
            ids = [*prompt.engine_input["prompt_token_ids"], *told_ids]
            self.engine_input = {**prompt.engine_input, "prompt_token_ids": ids}
            self.params = _behind(params, request.sampling, told_ids)
            self._logprobs = _LogprobTexts(tokenizer, told_ids)

    @property
    def over(self) -> bool:
        """Whether nothing more comes for any choice."""
        return all(choice.over for choice in self._choices)

    def endings(self) -> list[TokenDelta]:
        """What can be said without the engine: ends of choices whose tokens have all been delivered."""
        deltas = [
            self._mapper.end(index, choice.finish)
            for index, choice in enumerate(self._choices)
            if choice.finish is not None
        ]
        if not self.over:
            return deltas
        last = deltas.pop() if deltas else TokenDelta(len(self._choices) - 1)
        return [*deltas, self._mapper.with_usage(last)]

    def rest(self, output: Any) -> Any:
        """The part of one of vLLM's outputs that is new to the reader, with its text.

        Raises:
            CannotResume: the replayed answer is not the one that was begun.
        """
        completions = [self._rest(completion) for completion in output.outputs]
        return SimpleNamespace(
            outputs=[completion for completion in completions if completion is not None],
            finished=self.over,
            num_cached_tokens=output.num_cached_tokens,
        )

    def _rest(self, completion: Any) -> Any:
        choice = self._choices[completion.index]
        if choice.over:
            return None
        if completion.finish_reason in ("abort", "error"):
            return completion
        ids, logprobs = list(completion.token_ids), list(completion.logprobs or ())
        if self._replay:
            known = choice.swallow(ids, ended=completion.finish_reason is not None)
            ids, logprobs = ids[known:], logprobs[known:]
            if not ids and completion.finish_reason is None:
                return None
        text, kept, finish = choice.push(ids, completion.finish_reason)
        if self._logprobs is not None and logprobs:
            self._logprobs.correct(ids[:kept], logprobs)
        return SimpleNamespace(
            index=completion.index,
            text=text,
            token_ids=ids[:kept],
            logprobs=logprobs[:kept],
            finish_reason=finish,
        )


class _Choice:
    """One choice: what its reader has, and the detokenizer that stands behind it.

    Args:
        progress: what the reader has.
        detokenizer: one of vLLM's that has read the prompt.
        stops: token ids that end an answer.
        max_tokens: of the whole answer.
    """

    def __init__(self, progress: Progress, detokenizer: Any, stops: frozenset[int], max_tokens: int) -> None:
        self.progress = progress
        self.over = progress.finish_reason is not None
        self.finish: str | None = None  # how it ends, where its reader has every token but not the end
        self._detokenizer = detokenizer
        self._stops = stops
        self._max_tokens = max_tokens
        self._swallowed = 0

    def retell(self) -> Iterator[tuple[str, int, bool]]:
        """Text and id of every delivered token, and whether the answer ends there; the text as it was streamed."""
        for at, token_id in enumerate(self.progress.token_ids, start=1):
            stop = token_id in self._stops
            text, _, finish = self.push([token_id], "stop" if stop else None)
            if finish is None and at == self._max_tokens:
                finish = "length"
                text += self._detokenizer.get_next_output_text(True, True)  # noqa: FBT003  vLLM's signature
            if finish is not None and at < len(self.progress.token_ids):
                raise CannotResume("the answer that was begun goes on behind its end")
            if finish is not None:
                self.finish, self.over = finish, True
            yield text, token_id, finish is not None

    def swallow(self, ids: Sequence[int], *, ended: bool) -> int:
        """How many of these tokens of a replay are delivered ones."""
        told = self.progress.token_ids
        expected = told[self._swallowed : self._swallowed + len(ids)]
        self._swallowed += len(expected)
        if tuple(ids[: len(expected)]) != expected or (ended and self._swallowed < len(told)):
            raise CannotResume("the model did not say again what it had begun to say")
        return len(expected)

    def push(self, ids: Sequence[int], finish: str | None) -> tuple[str, int, str | None]:
        """Text that these tokens add, how many of them belong to the answer, and how it ends with them."""
        kept = 0
        for token_id in ids:
            kept += 1
            if self._detokenizer.update([token_id], finish == "stop" and kept == len(ids)):
                finish = "stop"  # a stop string; what stands behind it is not part of the answer
                break
        self.over = self.over or finish is not None
        return self._detokenizer.get_next_output_text(finish is not None, True), kept, finish  # noqa: FBT003  vLLM's


class _LogprobTexts:
    """Texts of the tokens in logprobs, where a character was broken off by the attempt's end.

    vLLM says what a piece of a character stands for from the tokens before it, which are a prompt to it here.
    """

    def __init__(self, tokenizer: Any, told_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(told_ids[-_LONGEST_CHARACTER_TOKENS:])
        self._left = _LONGEST_CHARACTER_TOKENS

    def correct(self, ids: Sequence[int], logprobs: Sequence[dict[int, Any]]) -> None:
        """Set the texts of these positions, as long as they are near the break."""
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
        from vllm.v1.engine.logprobs import LogprobsProcessor

        reader = LogprobsProcessor(self._tokenizer, None, None, None, None, None)
        for token_id, candidates in zip(ids[: self._left], logprobs, strict=False):
            texts = convert_ids_list_to_tokens(self._tokenizer, list(candidates))
            texts = reader._verify_tokens(texts, list(candidates), self._before)  # noqa: SLF001  there is no other way
            for candidate, text in zip(candidates.values(), texts, strict=True):
                candidate.decoded_token = text
            self._before = [*self._before, token_id][-_LONGEST_CHARACTER_TOKENS:]
        self._left = max(0, self._left - len(ids))


def _needs_replay(sampling: SamplingParams, *, constrained: bool) -> bool:
    """Which way; see the module.

    Raises:
        CannotResume: neither is possible.
    """
    penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
    if not constrained and sampling.n == 1 and not (penalised and sampling.temperature == 0.0):
        return False
    if sampling.temperature == 0.0 or sampling.seed is not None:
        return True
    raise CannotResume(
        "several choices, structured output and demanded tool calls can go on after a failure at temperature 0 "
        "or with a seed only; ask again"
    )


def _behind(params: Any, sampling: SamplingParams, told_ids: Sequence[int]) -> Any:
    """Parameters for what is left when the delivered tokens have become part of the prompt."""
    rest = _without_text(params)
    rest.max_tokens = max(1, params.max_tokens - len(told_ids))  # at 0 it is over already
    if params.seed is not None:
        rest.seed = (params.seed + len(told_ids) * _SEED_STEP) % SEED_RANGE
    if sampling.presence_penalty or sampling.frequency_penalty:
        rest.logit_bias = {
            token_id: -(sampling.presence_penalty + sampling.frequency_penalty * told_ids.count(token_id))
            for token_id in set(told_ids)
        }
    return rest


def _without_text(params: Any) -> Any:
    """The same without text and stop strings, which are read here."""
    plain = copy(params)
    plain.stop, plain.output_text_buffer_length = [], 0
    plain.detokenize = params.logprobs is not None  # they come with the tokens' texts
    return plain


def _detokenizer(tokenizer: Any, prompt: Prompt, params: Any) -> Any:
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    asked = SimpleNamespace(
        request_id="",
        prompt_token_ids=prompt.engine_input["prompt_token_ids"],
        prompt_embeds=None,
        sampling_params=params,
    )
    return IncrementalDetokenizer.from_new_request(tokenizer, asked)


def _stop_tokens(llm: Any, params: Any) -> frozenset[int]:
    """Token ids that end an answer, as vLLM will work them out when it takes the request."""
    known = copy(params)
    known._all_stop_token_ids = set()  # noqa: SLF001  else the copy shares it
    known.update_from_generation_config(
        llm.input_processor.generation_config_fields, llm.renderer.get_eos_token_id()
    )
    return frozenset(known.all_stop_token_ids)
