"""Pinned versions against advisories and exceptions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import NamedTuple

from audit.files import NEWEST, Advisory, Copy, Excepted, Pin

Lines = Mapping[str, Sequence[Pin]]


class Finding(NamedTuple):
    """A pinned version that an advisory is about."""

    line: str
    pin: Pin
    advisory: Advisory

    def fix(self) -> str:
        return str((self.advisory.about(self.pin) or {}).get("fixed", ""))

    def __str__(self) -> str:
        until = f"fixed in {self.fix()}" if self.fix() else "no fixed version is known"
        return (
            f"{self.line}: {self.pin.name} {self.pin.version} has {self.advisory.id} ({until}): {self.advisory.summary}"
        )


def findings(lines: Lines, copy: Copy) -> list[Finding]:
    every = ((line, pin) for line, pins in lines.items() for pin in pins)
    return [Finding(*one, advisory) for one in every for advisory in copy.advisories if advisory.about(one[1])]


def uncovered(found: Iterable[Finding], exceptions: Sequence[Excepted]) -> list[str]:
    """The findings that no exception is about."""
    return [str(one) for one in found if not any(e.covers(one.line, one.advisory) for e in exceptions)]


def problems(lines: Lines, copy: Copy, exceptions: Sequence[Excepted]) -> list[str]:
    """All that must change: versions, exceptions, or the copy."""
    found = findings(lines, copy)
    return uncovered(found, exceptions) + [
        f"exceptions.toml: {one.id} of {one.package}, {one.line}: {why}"
        for one in exceptions
        for why in _faults(one, lines[one.line], [f for f in found if one.covers(f.line, f.advisory)], copy)
    ]


def _faults(one: Excepted, pins: Sequence[Pin], about: Sequence[Finding], copy: Copy) -> Iterator[str]:
    if not any(one.id in (advisory.id, *advisory.aliases) for advisory in copy.advisories):
        yield "the copy has no such advisory"
    elif not about:
        yield "it no longer applies: remove it"
    if one.kept_by and one.kept_by not in {pin.name for pin in pins}:
        yield f"kept_by names {one.kept_by}, which is not pinned there"
    if one.line == NEWEST and one.reachable != "no":
        yield "the newest line has no exceptions for what is reachable, or may be"
    if one.line == NEWEST and not one.kept_by and any(f.fix() for f in about):
        yield "the newest line takes the fixed version, unless a package that it pins excludes that (kept_by)"


def summary(lines: Lines, copy: Copy, exceptions: Sequence[Excepted], today: date) -> Iterator[str]:
    """The findings of each file, which packages could not be checked, and how old the copy is."""
    for line, pins in lines.items():
        own = findings({line: pins}, copy)
        excepted = len(own) - len(uncovered(own, exceptions))
        yield f"{line}: {len(pins)} pinned versions: {len(own)} findings, {excepted} of them excepted"
        if unknown := sorted({pin.name for pin in pins} - copy.packages):
            yield f"  not checked: {len(unknown)} packages that the copy was not made for: {', '.join(unknown[:8])}…"
    age = (today - copy.date).days
    yield f"The copy has {len(copy.advisories)} advisories, of {copy.date} ({age} days old): {copy.source}"
