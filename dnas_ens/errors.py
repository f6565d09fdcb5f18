"""The exceptions shown to a user: a line of cause and a line of remedy."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave, answered with exit code 2 and without a traceback.

    Args:
        cause: One line that says what is wrong and names the offending value.
        remedy: One line that says what to do about it.

    Attributes:
        told: Whether another process of the command tells it; None where that is not known.
    """

    told: bool | None = None

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        """Rebuild from both lines, so that the error survives a process boundary."""
        return (type(self), (self.cause, self.remedy))


class DivergedError(UserError, FloatingPointError):
    """Numbers that are not finite any more: a training that has diverged, stopped before its state is saved.

    Args:
        cause: What is not finite, and where it was seen.
        remedy: What to do about it.
    """

    def __init__(
        self,
        cause: str,
        remedy: str = "The last saved state is finite: lower the learning rate in a fresh run, or go on with "
        "--resume if something else was the cause.",
    ) -> None:
        super().__init__(cause, remedy)
