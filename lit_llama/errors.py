"""The one exception for mistakes that a user can make and mend."""


class UserError(Exception):
    """One line: what is wrong, in which file or flag, and what mends it. Scripts print it without a traceback.

    One that begins with a flag (`--devices 3: ...`) is a wrong call: exit status 2; any other: 1.
    """
