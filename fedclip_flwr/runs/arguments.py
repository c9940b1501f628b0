"""Settings as they are typed on a command line, `key=value`: with their types, and with paths made absolute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import place_of
from fedclip_flwr.data.presets import PRESETS

DATA = ("drawn", *PRESETS)
"""Data that is not looked for in the current folder."""


def read_settings(given: Sequence[str], here: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings from `key=value`, and what is wrong with texts that are nothing of the kind.

    Paths become absolute if they are those of the machine `here`.
    """
    fields = Settings.keys()
    settings: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems[text] = f"{text}: expected key=value"
            continue
        if key == "nodes":
            problems[key] = f"{text}: how many sites are simulated is told by --nodes"
            continue
        if key in settings:
            problems[key] = f"{key}: given twice"
        kind = type(fields[key].default) if key in fields else str
        try:
            settings[key] = _value(value, kind)
        except ValueError:
            settings[key] = value  # the settings' own check says what was expected
        if kind is str and here and "\0" not in value:  # which no path has: the settings' own check says it
            settings[key] = _absolute(key, value)
    return settings, problems


def _value(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else text
    return kind(text)


def _absolute(key: str, value: str) -> str:
    """The setting with an absolute path, where it is a path."""
    head, rest = place_of(value) if key == "data" else ("", value)
    path = os.path.expanduser(rest)  # pathlib's own raises for a user that is not there
    named = {
        "data": head or value.startswith((".", "~")) or (value not in DATA and os.path.isdir(path)),
        "model": value != "bundled" and (value.startswith((".", "~")) or os.path.isdir(path)),
        "class-names": value.startswith((".", "~")) or os.path.isfile(path),
        "results-dir": True,
    }
    return head + str(Path(path).absolute()) if named.get(key) and value not in ("", head) else value
