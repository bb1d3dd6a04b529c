"""Errors that a user can fix. Scripts print them as one line, without a traceback."""


class UserError(Exception):
    """Say in one line what is wrong, in which file or flag, and how to fix it.

    Scripts exit with status 1, or with 2 if the text starts with a flag (`--devices 3: ...`).
    """

    def __init__(self, message: str) -> None:
        # the message may quote a file: keep it short, and remove control characters
        if len(message) > 1000:
            message = f"{message[:600]} ... {message[-300:]}"
        message = "".join(char if char.isprintable() else " " for char in message)
        super().__init__(" ".join(message.split()))


class UsageError(UserError):
    """A wrong call of a script: an unknown flag or an invalid value. Exit status 2."""
