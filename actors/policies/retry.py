"""Which answers survive their replica, and how often is tried.

Pure. Called by `actors.handles.generation`; how an engine goes on behind the tokens that exist is the engine's.
"""

from __future__ import annotations

from actors.types import GenerationRequest

ATTEMPTS = (
    3  # replicas that may fail under one request; three deaths make it the request's own fault (row 19)
)


def can_continue(request: GenerationRequest) -> bool:
    """Can another replica go on behind any token of this answer, as engines do it?

    Plain text of one choice goes on from its tokens. What follows a grammar, or has several choices, can only be
    made again and compared, which works where the same request gives the same tokens.
    """
    if request.sampling.temperature == 0:
        return True
    constrained = request.response_format.type != "text" or request.tool_choice.mode in (
        "required",
        "function",
    )
    return request.sampling.n == 1 and not constrained
