"""The one error that a user can mend: the command line prints it as a single line and exits with
2."""


class UserError(ValueError):
    """Bad input. The message is one line that names the field or file and the fix."""
