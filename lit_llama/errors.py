"""The one exception for mistakes that a user can make and mend."""


class UserError(Exception):
    """One line: what is wrong, in which file or flag, and what mends it. Scripts print it without a traceback.

    One that begins with a flag (`--devices 3: ...`) is a wrong call: exit status 2; any other: 1. What a message quotes
    from a file may be long or have lines: its middle is left out, and it stays one line.
    """

    def __init__(self, message: str) -> None:
        short = message if len(message) < 1000 else f"{message[:600]} ... {message[-300:]}"
        printable = "".join(letter if letter.isprintable() else " " for letter in short)
        super().__init__(" ".join(printable.split()))
