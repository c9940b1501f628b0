"""Class names, and the templates that turn them into prompts.

A site may number its classes differently from the run, lack some of them, or keep them in folders with other names:
`numbering` maps each of its classes to the run's number.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.base.errors import shown

SEPARATOR = "|"
"""Separates the templates of an ensemble."""
MOST_PROMPTS = 2**20
MOST_BYTES = 2**24
"""The largest size of a file of class names."""


class Vocabulary(NamedTuple):
    """The classes by number, and the templates: with several, a class is the mean of its prompts' features."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        """All classes in the first template, then all in the next; underscores in names become spaces."""
        return [t.replace("{}", name.replace("_", " ")) for t in self.templates for name in self.class_names]

    @property
    def key(self) -> str:
        return content.digest(json.dumps(self))


def check_classes(vocabulary: Vocabulary) -> None:
    """Raises unless it has two or more distinct class names in plain characters: it may come from untrusted input."""
    names, templates = vocabulary
    if len(set(names)) < len(names) or len(names) < 2:
        raise UserError(f"classes: expected at least two names, each once, found {', '.join(names[:9]) or 'none'}")
    check_plain("a class", names)
    if not templates:
        raise UserError("there are no prompts")
    if len(names) * len(templates) > MOST_PROMPTS:
        raise UserError(
            f"{len(names):,} classes with {len(templates):,} templates: expected {MOST_PROMPTS:,} prompts at most"
        )


def usable(vocabulary: Vocabulary) -> Vocabulary:
    """Returns the vocabulary; raises if its prompts do not distinguish classes."""
    names, templates = vocabulary
    check_classes(vocabulary)
    check_distinct(names)
    if any(template.count("{}") != 1 for template in templates):
        raise UserError(
            f"prompt = {SEPARATOR.join(templates[:9])!r}: expected a template with one {{}} for the class name, "
            "such as 'a photo of a {}'"
        )
    return vocabulary


def templates_of(prompt: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in prompt.split(SEPARATOR))


def read_names(setting: str) -> tuple[str, ...]:
    """Class names from the setting: a comma list, or a file with one name per line; none if it is empty."""
    if not setting:
        return ()
    text = setting.replace(",", "\n")
    if "," not in setting and not setting.startswith("/"):
        raise UserError(f"class-names = {setting!r}: there is no such file, and a list needs commas")
    if setting.startswith("/"):
        try:
            text = files.read_bytes(Path(setting), MOST_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"class-names = {setting!r}: the file can't be read ({error})") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"class-names: {', '.join(twice)} more than once; expected each name once")
    if len(names) < 2:
        raise UserError(f"class-names = {setting!r}: expected at least two names")
    check_plain("class-names: a class", names)
    return names


def renamed(own: Sequence[str], wanted: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of the run, given the `wanted` ones, and the run's names for the data's `own` classes.

    If `wanted` includes all names of the data, it sets the order and may have more. Else it must have as many names,
    all of them new: they rename the data's classes in the same order.
    """
    if not wanted:
        return tuple(own), tuple(own)
    if {*own} <= {*wanted}:
        return tuple(wanted), tuple(own)
    if len(own) == len(wanted) and not {*map(_normalized, own)} & {*map(_normalized, wanted)}:
        return tuple(wanted), tuple(wanted)
    missing = ", ".join(sorted({*own} - {*wanted}))
    raise UserError(
        f"class-names has {len(wanted)} names and lacks {missing}; give all of the data's {len(own)} classes "
        f"(more are allowed), or a new name for each of them, in this order: {', '.join(own)}"
    )


def check_plain(what: str, names: Iterable[str]) -> None:
    """Raises if a name, which comes from a file, can't be shown unchanged or used in a prompt."""
    for name in names:
        if shown(name) != name or not name.strip():
            raise UserError(f"{what} is called {name!a}: give it a name of plain characters, in UTF-8")


def check_distinct(names: Sequence[str]) -> None:
    """Raises if two names differ only in spelling: they would become two classes."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(_normalized(name), name)
        if other != name:
            raise UserError(f"{other!r} and {name!r} would be two classes; use one spelling in all of the data")


def _normalized(name: str) -> str:
    """The name in one spelling: Unicode has two ways to write an accent."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def numbering(own: Sequence[str], run: Sequence[str]) -> list[int]:
    """For each of the site's classes, its number in the run; the site may have fewer classes."""
    if unknown := sorted({*own} - {*run}):
        raise UserError(
            f"this site has classes that the run does not know: {', '.join(unknown)} (it knows {', '.join(run)}); "
            "rename or remove their folders, or add them to class-names at the server"
        )
    return [run.index(name) for name in own]
