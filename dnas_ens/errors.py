"""The one exception a user's mistake raises: a line of cause and a line of remedy."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave, answered with exit code 2 and without a traceback.

    Args:
        cause: One line that says what is wrong and names the offending value.
        remedy: One line that says what to do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        """Rebuild from both lines, so that the error survives a process boundary."""
        return (type(self), (self.cause, self.remedy))
