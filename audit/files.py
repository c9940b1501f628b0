"""The files of an audit: constraints, the copy of the advisories, and the exceptions."""

from __future__ import annotations

import json
import tomllib
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LINES = {"grpc": "constraints.txt", "http": "constraints-http.txt"}
"""The constraints file of each line of Flower."""
NEWEST = LINES["http"]
ADVISORIES, EXCEPTIONS = ROOT / "audit" / "advisories.json", ROOT / "audit" / "exceptions.toml"
EVENTS, REACHABLE = ("introduced", "fixed", "last_affected"), ("no", "unknown", "yes")


class AuditError(Exception):
    """A file that can't be read, or a database that can't be reached; one line."""


class Pin(NamedTuple):
    """A pinned version. Where markers give a name several, each is checked, whichever applies here."""

    name: str
    version: Version


class Advisory(NamedTuple):
    id: str
    aliases: tuple[str, ...]
    package: str
    summary: str
    ranges: tuple[dict[str, Version], ...]
    """Affected versions, in OSV's words: from `introduced` to before `fixed`, up to `last_affected`, or without end."""

    def about(self, pin: Pin) -> dict[str, Version] | None:
        """The range in which the pinned version is, if it is affected."""
        for one in self.ranges if pin.name == self.package else ():
            after = "fixed" in one and pin.version >= one["fixed"]
            after |= "last_affected" in one and pin.version > one["last_affected"]
            if one["introduced"] <= pin.version and not after:
                return one
        return None


class Copy(NamedTuple):
    """The copy of the advisories: when and from where, which packages it was made for, and what it found."""

    date: date
    source: str
    packages: frozenset[str]
    advisories: tuple[Advisory, ...]


class Excepted(NamedTuple):
    """An advisory that is accepted in a constraints file. `kept_by`: the pinned package that excludes its fix."""

    id: str
    package: str
    line: str
    kept_by: str
    reachable: str
    reason: str

    def covers(self, line: str, advisory: Advisory) -> bool:
        named = self.id in (advisory.id, *advisory.aliases)
        return named and (self.line, self.package) == (line, advisory.package)


def read_pins(path: Path) -> tuple[Pin, ...]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if text := line.partition("#")[0].strip():
            try:
                one = Requirement(text)
                (bound,) = one.specifier
                if bound.operator != "==" or one.url:
                    raise ValueError
                found.append(Pin(canonicalize_name(one.name), Version(bound.version)))  # no 1.* either
            except ValueError:
                raise AuditError(f"{path.name}, line {number}: expected name==version, found {text!r}") from None
    return tuple(found)


def read_lines(root: Path) -> dict[str, tuple[Pin, ...]]:
    """The pins of each constraints file."""
    return {name: read_pins(root / name) for name in LINES.values()}


def read_copy(path: Path) -> Copy:
    try:
        data = json.loads(_text(path))
        advisories = tuple(advisory(one) for one in data["advisories"])
        return Copy(date.fromisoformat(data["date"]), str(data["source"]), frozenset(data["packages"]), advisories)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AuditError(f"{path.name} is not a copy of advisories ({error!r}): restore or renew it") from None


def advisory(data: dict[str, Any]) -> Advisory:
    ranges = tuple({key: Version(value) for key, value in one.items()} for one in data["ranges"])
    if not ranges or any("introduced" not in one or one.keys() - {*EVENTS} for one in ranges):
        raise ValueError(f"{data['id']}: expected ranges of {', '.join(EVENTS)}")
    return Advisory(data["id"], tuple(data["aliases"]), data["package"], data["summary"], ranges)


def read_exceptions(path: Path) -> tuple[Excepted, ...]:
    try:
        found = tuple(
            Excepted(one["id"], one["package"], line, one.get("kept_by", ""), one["reachable"], one["reason"].strip())
            for one in tomllib.loads(_text(path)).get("exception", [])
            for line in one["lines"]
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AuditError(f"{path.name} is not a list of exceptions ({error!r})") from None
    for one in found:
        if one.line not in LINES.values() or one.reachable not in REACHABLE or not one.reason:
            allowed = f"lines of {', '.join(LINES.values())}, reachable of {', '.join(REACHABLE)}"
            raise AuditError(f"{path.name}, {one.id}: expected {allowed}, and a reason")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{path} can't be read ({error})") from None
