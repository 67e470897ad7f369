"""Errors that a user can cause: printed as one sentence and a remedy, never as a traceback."""


class UserError(Exception):
    """Something the user can put right (exit code 1).

    `sentence` says what is wrong, `remedy` what to do about it; both are one line.
    """

    exit_code = 1

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence, remedy)  # both positional, so that the error survives pickling
        self.sentence, self.remedy = sentence, remedy

    def __str__(self) -> str:
        return f"{self.sentence.rstrip('.')}. {self.remedy}".strip() if self.remedy else self.sentence


class UsageError(UserError):
    """A word, key or value that cannot be understood (exit code 2)."""

    exit_code = 2
