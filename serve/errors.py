"""Every error that Shoal raises on purpose, as one tree.

A leaf knows its HTTP status, its OpenAI `type` and its `code`; its message names the limit and the
value. Errors cross processes as `ErrorInfo` (code and message) and are rebuilt by `from_code`::

    ShoalError
    +-- RequestError               the client's fault: 4xx, never retried
    |   +-- InvalidRequestError        400 invalid_value        (param names the field)
    |   +-- ContextLengthError         400 context_length_exceeded
    |   +-- AuthenticationError        401 invalid_api_key
    |   +-- ModelNotFoundError         404 model_not_found
    |   +-- RouteNotFoundError         404 not_found
    |   +-- MethodNotAllowedError      405 method_not_allowed
    |   +-- RequestTimeoutError        408 request_timeout
    |   +-- PayloadTooLargeError       413 payload_too_large
    +-- ServiceError               ours: worth a retry, says after how long where it can
    |   +-- OverloadedError            429 overloaded
    |   +-- NotReadyError              503 not_ready
    |   +-- ReplicaLostError           503 replica_lost         (its shard or process died)
    |   +-- PoisonedRequestError       500 poisoned_request     (it alone: non-finite logits)
    |   +-- InternalError              500 internal_error
    +-- SetupError                 before anything serves; never crosses HTTP
        +-- ConfigurationError         every reason at once
        +-- CheckpointError            names the file and the tensor
        +-- CollectiveError            a rank is gone
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An error as it crosses processes."""

    code: str
    message: str
    retry_after_s: float | None = None


class ShoalError(Exception):
    """Root of the tree. `str(error)` is what the user reads."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.retry_after_s))

    def info(self) -> ErrorInfo:
        """This error as it crosses processes."""
        return ErrorInfo(self.code, self.message, self.retry_after_s)


def _rebuild(
    kind: type[ShoalError], message: str, param: str | None, retry_after_s: float | None
) -> ShoalError:
    return kind(message, param=param, retry_after_s=retry_after_s)


class RequestError(ShoalError):
    """The client's fault."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A field has a value that cannot be served."""

    code = "invalid_value"


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(RequestError):
    """No key, or not one of ours."""

    status = 401
    code = "invalid_api_key"


class ModelNotFoundError(RequestError):
    """No model of that name is served."""

    status = 404
    code = "model_not_found"


class RouteNotFoundError(RequestError):
    """No such path."""

    status = 404
    code = "not_found"


class MethodNotAllowedError(RequestError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class RequestTimeoutError(RequestError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class PayloadTooLargeError(RequestError):
    """The body is larger than the limit."""

    status = 413
    code = "payload_too_large"


class ServiceError(ShoalError):
    """Our side cannot serve this now."""

    status = 503
    type = "server_error"
    code = "unavailable"


class OverloadedError(ServiceError):
    """The waiting queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class NotReadyError(ServiceError):
    """No replica of the model is ready."""

    code = "not_ready"


class ReplicaLostError(ServiceError):
    """The replica that ran this request is gone."""

    code = "replica_lost"


class PoisonedRequestError(ServiceError):
    """This request alone made the model fail."""

    status = 500
    code = "poisoned_request"


class InternalError(ServiceError):
    """A bug of ours."""

    status = 500
    code = "internal_error"


class SetupError(ShoalError):
    """Something is wrong before anything serves."""


class ConfigurationError(SetupError):
    """The configuration cannot be used; the message lists every reason."""

    code = "configuration"


class CheckpointError(SetupError):
    """A model folder cannot be used; the message names the file and the tensor."""

    code = "checkpoint"


class CollectiveError(SetupError):
    """A rank of the group is gone or out of step."""

    code = "collective"


def from_info(info: ErrorInfo) -> ShoalError:
    """Rebuild an error that another process sent; unknown codes become `InternalError`."""
    kind = _BY_CODE.get(info.code, InternalError)
    return kind(info.message, retry_after_s=info.retry_after_s)


def _leaves(kind: type[ShoalError]) -> list[type[ShoalError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _leaves(child))]


_BY_CODE: dict[str, type[ShoalError]] = {kind.code: kind for kind in _leaves(ShoalError)}
