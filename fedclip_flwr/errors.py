"""The error that is meant for the user."""


class UserError(Exception):
    """Something the user can mend. Its text is all that is shown: what was expected, what was found, what to do."""
