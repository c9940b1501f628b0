"""Systemd's units and their environment files, taken apart as systemd would."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Mapping


def settings(unit: str) -> dict[str, list[str]]:
    """What a unit says: for each key its values, for some keys stand there more than once."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.replace("\\\n", " "), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def variables(file: str) -> dict[str, str]:
    """Those of an environment file."""
    pairs = re.findall(r"^(\w+)=(.*)$", file, re.MULTILINE)
    return {key: "".join(shlex.split(value)) for key, value in pairs}


def started_by(unit: str, given: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """A unit's command and its environment, `given` being the variables of its environment file."""
    said = settings(unit)
    env = dict(pair.split("=", 1) for line in said["Environment"] for pair in line.split()) | dict(given)
    (command,) = said["ExecStart"]
    words: list[str] = []
    for word in shlex.split(command):
        alone = re.fullmatch(r"\$(\w+)", word)
        words += env[alone[1]].split() if alone else [string.Template(word).substitute(env)]
    return words, env
