"""What a request carries of an answer that another replica began: checked once, the same for every engine.

Called by the engines when they accept a request. How an answer goes on behind it is each engine's own.
"""

from __future__ import annotations

from actors.errors import CannotResume
from actors.types import GenerationRequest, Progress


def progress_of(request: GenerationRequest) -> tuple[Progress, ...]:
    """One entry per choice, in order; empty when nothing of the answer has reached its reader.

    Raises:
        CannotResume: entries for another number of choices.
    """
    if not any(told.token_ids or told.finish_reason for told in request.progress):
        return ()
    if len(request.progress) != request.sampling.n:
        raise CannotResume(
            f"the answer was begun with {len(request.progress)} choices, but {request.sampling.n} are asked for"
        )
    return request.progress
