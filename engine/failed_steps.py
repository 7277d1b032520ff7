"""Steps that fail one after the other: then it is the rank that is broken, and not what it was given."""

from __future__ import annotations

from core.errors import InternalError
from engine.runner import ChunkResult

MAX_FAILED_STEPS = 3
"""In a row, before the rank gives itself up, to be restarted."""


class FailedSteps:
    """Counts them. A step has failed if it raised, or gave none of the tokens that were due."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def failed(self, error: Exception) -> None:
        """Raises InternalError if that was one too many."""
        self._in_a_row += 1
        if self._in_a_row >= MAX_FAILED_STEPS:
            raise InternalError(f"{self._in_a_row} steps in a row failed, the last with {error!r}") from error

    def ended(self, results: list[ChunkResult]) -> None:
        """A step has not raised. Raises InternalError as `failed` does."""
        errors = [result.error for result in results if result.error is not None]
        if any(result.token is not None for result in results):
            self._in_a_row = 0
        elif errors:
            self.failed(errors[0])
