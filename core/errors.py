"""Every error that crosses a border, drawn as a tree. Each class answers: whose move is it, and may it be tried again?

    BatonError
    |-- ConfigError            the operator's file or option is wrong; nothing was started
    |   `-- CheckpointError    a model folder cannot be used; names file and tensor
    |-- InvalidRequest         the client's request is wrong; names field and limit           400
    |   |-- TooLarge           the body is over a limit                                       413
    |   |-- PromptTooLong      the prompt leaves no room in the longest sequence              400
    |   `-- ModelNotFound      the request names a model that is not served                   404
    |-- Unauthorized           no valid API key                                               401
    |-- Overloaded             a bounded queue is full; carries retry_after_s                 429
    |-- Cancelled              the client left or asked to stop                               499
    |-- DeadlineExceeded       a wait reached its deadline                                    504
    |-- Unavailable            no member can serve now, or one was lost                       503  retryable
    |   |-- NoMembers          waited for a rank of a role for as long as configured
    |   |-- MemberLost         the session to a rank broke                                         retryable
    |   |-- Draining           the rank takes no new work                                          retryable
    |   |-- Preempted          decode gave up the sequence's pages; run it again                   retryable
    |   |-- TransferFailed     pages did not arrive                                                retryable
    |   `-- GroupLost          a rank of a group died or did not answer; the group restarts        retryable
    |-- Mismatch               two workers do not fit each other (layout, version, role)      500
    `-- InternalError          a bug of ours, confined to one request                         500

`retryable` means: the same request may be run again on other members with the same result (only `router/relay.py` does so).
"""

from __future__ import annotations

from typing import ClassVar


class BatonError(Exception):
    """Base of all errors above. `str(error)` is the sentence shown to whoever must act."""

    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    @property
    def code(self) -> str:
        """The class name: the stable word used on the wire, in logs and in metrics."""
        return type(self).__name__


class ConfigError(BatonError):
    pass


class CheckpointError(ConfigError):
    pass


class InvalidRequest(BatonError):
    """`param` names the offending field in the client's dialect, e.g. "messages[1].content"."""

    http_status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLarge(InvalidRequest):
    http_status = 413


class PromptTooLong(InvalidRequest):
    pass


class ModelNotFound(InvalidRequest):
    http_status = 404


class Unauthorized(BatonError):
    http_status = 401


class Overloaded(BatonError):
    """`retry_after_s`: when it is this client's turn, or room is expected."""

    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(BatonError):
    http_status = 499


class DeadlineExceeded(BatonError):
    http_status = 504


class Unavailable(BatonError):
    http_status = 503
    retryable = True


class NoMembers(Unavailable):
    retryable = False


class MemberLost(Unavailable):
    pass


class Draining(Unavailable):
    pass


class Preempted(Unavailable):
    pass


class TransferFailed(Unavailable):
    pass


class GroupLost(Unavailable):
    pass


class Mismatch(BatonError):
    pass


class InternalError(BatonError):
    pass


def _tree(root: type[BatonError]) -> dict[str, type[BatonError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[BatonError]] = _tree(BatonError)
"""Wire code (class name) -> class. A code that is not here decodes as InternalError."""
