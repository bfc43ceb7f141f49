"""How a model backend can fail.

ModelError
├── ModelAuthError         401, 403: our credentials are refused
├── ModelRateLimitedError  429: try again after `retry_after`
├── ModelRejectedError     any other 4xx: the request itself is refused
├── ModelUnavailableError  5xx, or no connection
├── ModelTruncatedError    the stream ended before the reply did
├── ModelProtocolError     the answer is not the protocol
├── ModelTimeoutError      no connection, no first byte, no next byte or no end of the turn in time
└── ModelRequestLimitError the run has made all the requests that it may make; none was sent
"""

from __future__ import annotations

from typing import ClassVar


class ModelError(Exception):
    """Base of all failures of a model backend.

    Attributes:
        code: canonical gRPC code name, for the run's failed event.
        reason: the error reason (without its prefix), for the same.
        retryable: whether the same request may succeed later, or at another backend.
        retry_after: seconds that the backend asked to wait, or None.
    """

    code: ClassVar[str] = "UNAVAILABLE"
    reason: ClassVar[str] = "MODEL_UNAVAILABLE"
    retryable: bool = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelAuthError(ModelError):
    """The backend refused our credentials."""

    code = "UNAUTHENTICATED"
    reason = "MODEL_UNAUTHENTICATED"
    retryable = False


class ModelRateLimitedError(ModelError):
    """The backend's rate limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "MODEL_RATE_LIMITED"


class ModelRejectedError(ModelError):
    """The backend refused the request itself."""

    code = "INVALID_ARGUMENT"
    reason = "MODEL_REQUEST_REJECTED"
    retryable = False


class ModelUnavailableError(ModelError):
    """The backend failed or cannot be reached."""


class ModelTruncatedError(ModelError):
    """The stream ended before the reply did."""

    reason = "MODEL_STREAM_TRUNCATED"


class ModelProtocolError(ModelError):
    """The backend answered what is not its protocol."""

    code = "INTERNAL"
    reason = "MODEL_BAD_RESPONSE"
    retryable = False


class ModelTimeoutError(ModelError):
    """The backend sent nothing for too long, or its turn took too long."""

    code = "DEADLINE_EXCEEDED"
    reason = "MODEL_TIMEOUT"


class ModelRequestLimitError(ModelError):
    """The run has made all the requests that it may make; none was sent."""

    code = "RESOURCE_EXHAUSTED"
    reason = "MODEL_REQUEST_LIMIT"
    retryable = False
