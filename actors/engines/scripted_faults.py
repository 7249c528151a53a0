"""Faults that the scripted engine can be told to have.

Static ones stand in its config, `ScriptedEngine.inject` adds one at run time, and where the config allows it a
request may carry one as a directive in its last user message: `[[shoal:crash after=5]]`,
`[[shoal:slow factor=10]]`, `[[shoal:hang]]`, `[[shoal:oom]]`, `[[shoal:exit]]`.
"""

from __future__ import annotations

import enum
import re

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.errors import InvalidRequest

_DIRECTIVE = re.compile(r"\[\[shoal:([^\]]*)\]\]")


class FaultKind(enum.StrEnum):
    """What breaks."""

    CRASH = "crash"  # the engine dies: EngineFailed for everyone
    EXIT = "exit"  # the whole process is gone, as by kill -9
    OUT_OF_MEMORY = "oom"  # the engine dies of memory: EngineFailed that says so
    HANG = "hang"  # no step ends any more; nothing is raised
    SLOW = "slow"  # every step takes `factor` times as long


class ScriptedFault(BaseModel):
    """One fault and when it strikes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    after_tokens: int = Field(
        default=0,
        ge=0,
        description="Output tokens the engine still produces, over all its requests, before it strikes.",
    )
    factor: float = Field(default=10.0, gt=0, description="How many times as long steps take, for `slow`.")


def directive(text: str) -> ScriptedFault | None:
    """The first fault that `text` asks for.

    Raises:
        InvalidRequest: a directive that names no fault, or an argument that it does not have.
    """
    found = _DIRECTIVE.search(text)
    if found is None:
        return None
    kind, *words = found.group(1).split() or [""]
    arguments = dict(word.partition("=")[::2] for word in words)
    if "after" in arguments:
        arguments["after_tokens"] = arguments.pop("after")
    try:
        return ScriptedFault.model_validate({"kind": kind, **arguments})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InvalidRequest(
            f"{found.group()} is no fault: {wrong['loc'][0]}: {wrong['msg']}; the faults are "
            f"{', '.join(FaultKind)}, with after=TOKENS and, for slow, factor=NUMBER",
            param="messages",
        ) from error
