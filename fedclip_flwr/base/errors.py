"""The errors that are meant for the user, and texts that can be shown wherever they come from."""

from __future__ import annotations

import re

UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Line breaks, control characters, what turns the direction of writing around, and halves of characters."""
LONGEST = 4000
"""So many characters of an error are shown."""


def shown(text: object) -> str:
    """The text with a � for each character that would break the line, steer a terminal, or can't be written."""
    return UNSEEN.sub("\ufffd", str(text))


def one_line(text: object, most: int = 300) -> str:
    """The text without line breaks and control characters, and not endless."""
    line = " ".join(UNSEEN.sub(" ", str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


class UserError(Exception):
    """Something the user can mend. Its text is all that is shown: what was expected, what was found, what to do.

    It is one line, whatever the file was called that it tells of; or a heading and a line for each of several problems.
    """

    def __init__(self, text: str, *problems: str) -> None:
        lines = (shown(line) for line in (text, *problems))
        super().__init__(*(line if len(line) <= LONGEST else line[: LONGEST - 1] + "…" for line in lines))

    def __str__(self) -> str:
        return "\n  ".join(self.args)


class FaultError(UserError):
    """The same in two parts, for `fedclip doctor`: what was found, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}: {remedy}")
        self.found, self.remedy = found, remedy


class ReadError(UserError):
    """A file that can't be read now, and perhaps later.

    `unnamed` says so without the file's name: that may tell a class or a person, and does not leave a site.
    """

    def __init__(self, name: object, found: str, remedy: str) -> None:
        super().__init__(f"{name} {found}: {remedy}")
        self.unnamed = f"a file {found}: {remedy}"
        self._given = str(name), found, remedy

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, str, str]]:  # it may come from another process
        return ReadError, self._given
