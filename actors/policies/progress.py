"""What has come of an answer, over all replicas that worked on it.

Pure. Kept by `actors.handles.generation` for every request, since any replica may die; it is what the next one
goes on from. Costs a few bytes per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.types import FinishReason, GenerationRequest, Progress, TokenDelta


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    text_chars: int = 0
    finish_reason: FinishReason | None = None


class Made:
    """Tokens and text of one answer, by choice.

    Args:
        request: what was asked; its echoed prompt is no text of the answer. What it brings of an answer that was
            begun elsewhere counts as made.

    Attributes:
        tokens: over all choices.
    """

    def __init__(self, request: GenerationRequest) -> None:
        echoed = len(request.prompt or "") if request.echo else 0
        self._choices = [_Choice(text_chars=-echoed) for _ in range(request.sampling.n)]
        self.tokens = 0
        for choice, begun in zip(self._choices, request.progress, strict=False):
            choice.token_ids += begun.token_ids
            choice.text_chars += begun.text_chars
            choice.finish_reason = begun.finish_reason
            self.tokens += len(begun.token_ids)

    def add(self, delta: TokenDelta) -> None:
        """Take what a replica has delivered."""
        choice = self._choices[delta.choice]
        choice.token_ids += delta.token_ids
        choice.text_chars += len(delta.text)
        self.tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason

    def progress(self) -> tuple[Progress, ...]:
        """What an engine is told, a choice each."""
        return tuple(
            Progress(
                token_ids=tuple(choice.token_ids),
                text_chars=max(choice.text_chars, 0),
                finish_reason=choice.finish_reason,
            )
            for choice in self._choices
        )
