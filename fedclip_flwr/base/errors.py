"""Errors meant for the user, and text from any origin made safe to show."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Line breaks, control characters, marks that change the direction of text, and lone surrogates."""
LONGEST = 4000
"""The most characters of an error that are shown."""


def shown(text: object) -> str:
    """The text with a � for each character that would break the line, control a terminal, or can't be encoded."""
    return UNPRINTABLE.sub("\ufffd", str(text))


def one_line(text: object, most: int = 300) -> str:
    """The text without line breaks and control characters, cut to `most` characters."""
    line = " ".join(UNPRINTABLE.sub(" ", str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


class UserError(Exception):
    """A problem that the user can fix. Only its text is shown: what was expected, what was found, what to do.

    It is one line, whatever the names of files in it; with several problems, a heading and one line for each.
    """

    def __init__(self, text: str, *problems: str) -> None:
        lines = (shown(line) for line in (text, *problems))
        super().__init__(*(line if len(line) <= LONGEST else line[: LONGEST - 1] + "…" for line in lines))

    def __str__(self) -> str:
        return "\n  ".join(self.args)


class FaultError(UserError):
    """A `UserError` in two parts, for `fedclip doctor`: what was found, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}: {remedy}")
        self.found, self.remedy = found, remedy


class ReadError(UserError):
    """A file that can't be read now, but perhaps later.

    `unnamed` is the text without the file's name, which may reveal a class or a person and must not leave a site.
    """

    def __init__(self, name: object, found: str, remedy: str) -> None:
        super().__init__(f"{name} {found}: {remedy}")
        self.unnamed = f"a file {found}: {remedy}"
        self._given = str(name), found, remedy

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, str, str]]:  # it may be raised in another process
        return ReadError, self._given
