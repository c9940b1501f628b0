"""The errors that are meant for the user."""


class UserError(Exception):
    """Something the user can mend. Its text is all that is shown: what was expected, what was found, what to do."""


class FaultError(UserError):
    """The same in two parts, for `fedclip doctor`: what was found, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}: {remedy}")
        self.found, self.remedy = found, remedy
