"""The one exception for mistakes that a user can make and mend."""


class UserError(Exception):
    """Carries one line for the user: what is wrong, in which file or flag, and what mends it.

    Scripts print the line without a traceback and exit with status 1; anything else that is raised is a bug
    and keeps its traceback.
    """
