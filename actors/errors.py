"""Every error a caller can see, in one hierarchy, with its HTTP status on the class.

Everyone raises these; `app.api.errors` turns them into OpenAI's error object, `actors.handles` carries them
over the wire with `to_wire` / `from_wire`. Messages are for the caller: no traceback, address or pid.

    ShoalError 500
    ├── InvalidRequest 400
    │   └── ContextLengthExceeded
    ├── AuthenticationFailed 401
    ├── PermissionDenied 403
    ├── NotFound 404
    │   └── ModelNotFound
    ├── Conflict 409
    ├── PayloadTooLarge 413
    ├── RateLimited 429            the caller's own limit; `limits` become x-ratelimit-* headers
    ├── Overloaded 429             ours; retry_after_s is computed from the backlog
    ├── ClientClosed 499
    ├── Unavailable 503            a part is down; try again
    │   ├── EngineFailed           the engine died or broke under this request
    │   │   └── FailedEverywhere   so did those of all other replicas that it was given to
    │   └── ReplicaGone            the replica named by a grant is not there any more
    ├── DeadlineExceeded 504
    └── StorageFull 507
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class ShoalError(Exception):
    """Base of all errors a caller can see.

    Args:
        message: what is wrong and, for bad input, what is allowed.
        param: the request field that is wrong, in OpenAI's path syntax.
        retry_after_s: when trying again makes sense; becomes Retry-After.
        headers: extra response headers (the state of a limit).
    """

    status_code: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False  # may another attempt, elsewhere or later, succeed unchanged?

    def __init__(
        self,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross processes: pickling must keep every field."""
        return (type(self), (self.message, self.param, self.retry_after_s, self.headers))

    def to_wire(self) -> dict[str, Any]:
        """A msgpack-able form that `from_wire` turns back into the same class."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
            "headers": self.headers,
        }


class InvalidRequest(ShoalError):
    """The request is malformed or asks for something that is not allowed."""

    status_code = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationFailed(ShoalError):
    """No key, a malformed one, an unknown, revoked or expired one."""

    status_code = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDenied(ShoalError):
    """The key is good and lacks the scope."""

    status_code = 403
    type = "invalid_request_error"
    code = "permission_denied"


class NotFound(ShoalError):
    """There is no such thing, or it belongs to another tenant."""

    status_code = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of that name is deployed."""

    code = "model_not_found"


class Conflict(ShoalError):
    """The thing is in a state that does not allow this."""

    status_code = 409
    type = "invalid_request_error"
    code = "conflict"


class PayloadTooLarge(ShoalError):
    """The body or file is larger than allowed."""

    status_code = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class RateLimited(ShoalError):
    """The caller's own limit is used up."""

    status_code = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class Overloaded(ShoalError):
    """The predicted wait passes the request's deadline: refused at once, with a computed Retry-After."""

    status_code = 429
    type = "overloaded_error"
    code = "overloaded"
    retryable = True


class ClientClosed(ShoalError):
    """The client left before its answer; seen in logs and metrics only."""

    status_code = 499
    type = "client_error"
    code = "client_closed_request"


class Unavailable(ShoalError):
    """A part that is needed is down or starting."""

    status_code = 503
    code = "unavailable"
    retryable = True


class EngineFailed(Unavailable):
    """The engine died, ran out of memory or broke while it served this request."""

    code = "engine_failed"


class FailedEverywhere(EngineFailed):
    """Every replica that ran the request died under it: it may well be the request's own doing."""

    code = "engine_failed_repeatedly"
    retryable = False


class ReplicaGone(Unavailable):
    """The replica named by a grant has left; a new grant names another one."""

    code = "replica_gone"


class CannotResume(Unavailable):
    """The replica died in the middle of an answer that no other one can go on with."""

    code = "cannot_resume"


class DeadlineExceeded(ShoalError):
    """The request's deadline passed before its answer was complete."""

    status_code = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class StorageFull(ShoalError):
    """No room to write; reading goes on."""

    status_code = 507
    code = "insufficient_storage"
    retryable = True


def _registry(root: type[ShoalError]) -> dict[str, type[ShoalError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _registry(child)
    return found


def from_wire(wire: Mapping[str, Any]) -> ShoalError:
    """Rebuild the error that `to_wire` described; an unknown code becomes a plain `ShoalError`."""
    cls = _registry(ShoalError).get(str(wire.get("code")), ShoalError)
    return cls(
        str(wire.get("message", "internal error")),
        wire.get("param"),
        wire.get("retry_after_s"),
        wire.get("headers"),
    )
