"""Settings given on a command line as `key=value`: parsed to their types, with absolute paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import place_of
from fedclip_flwr.data.presets import PRESETS

DATA = ("drawn", *PRESETS)
"""Values of `data` that are never a path."""


def read_settings(given: Sequence[str], here: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings from `key=value` texts, and an error message for each key or text that is wrong.

    Paths become absolute, except if they are on another machine (`here` is false).
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
            problems[key] = f"{text}: set the number of simulated sites with --nodes"
            continue
        if key in settings:
            problems[key] = f"{key}: given twice"
        kind = type(fields[key].default) if key in fields else str
        try:
            settings[key] = _value(value, kind)
        except ValueError:
            settings[key] = value  # the settings' own check reports it
        if kind is str and here and "\0" not in value:  # no path contains NUL: the settings' own check reports it
            settings[key] = _absolute(key, value)
    return settings, problems


def _value(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else text
    return kind(text)


def _absolute(key: str, value: str) -> str:
    """The value, with its path made absolute if it has one."""
    head, rest = place_of(value) if key == "data" else ("", value)
    path = os.path.expanduser(rest)  # pathlib's own raises for an unknown user
    is_path = {
        "data": head or value.startswith((".", "~")) or (value not in DATA and os.path.isdir(path)),
        "model": value != "bundled" and (value.startswith((".", "~")) or os.path.isdir(path)),
        "class-names": value.startswith((".", "~")) or os.path.isfile(path),
        "directions": True,
        "results-dir": True,
    }
    return head + str(Path(path).absolute()) if is_path.get(key) and value not in ("", head) else value
