"""The command `fedclip clean`: shows stored files in FEDCLIP_HOME that can be made again, and removes chosen ones."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path, PurePath
from stat import S_ISREG
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from fedclip_flwr.base import UserError, content, files
from fedclip_flwr.base.content import DAY
from fedclip_flwr.base.errors import shown
from fedclip_flwr.base.text import bytes_of, counted, some, table

RECENT = 2 * DAY
"""Seconds since the last use within which a run's files may be in use: last uses are known to the day."""
MOST_DAYS = 36_500


class Kind(NamedTuple):
    """A kind of stored files: their place below FEDCLIP_HOME, which of them belong together, and their description."""

    place: str
    item: Callable[[PurePath], str | None]
    """The name of the item that a file belongs to, given its path below `place`; None: the file is left alone."""
    what: Callable[[Path, str], str]
    """The description of an item, in the folder `place`."""
    locked: bool = False
    """True for entries of the store, which have their own locks."""
    results: bool = False
    """True if it can't be made again."""


class Item(NamedTuple):
    """Files that are removed together."""

    kind: str
    name: str
    what: str
    files: tuple[Path, ...]
    size: int
    used: float


def _remembered(path: PurePath) -> str | None:
    """The item of a file that `content.remember` has written, complete or partial."""
    return path.name if len(path.parts) == 1 and content.PRUNABLE.fullmatch(path.name) else None


def _entry(path: PurePath) -> str | None:
    """The entry of the store that a file belongs to: its tensors, its lock, or a partial file."""
    found = re.fullmatch(r"\.?(.+?\.safetensors)(\.lock|\.part|\.journal|\.[0-9a-f]{16})?", path.name)
    return str(path.with_name(found[1])) if found else None


def _by_model(place: Path, name: str) -> str:
    """The model's name, or its hash if that is unknown, and the precision."""
    folder = Path(name).parent.name
    mark, _, precision = folder.rpartition("-")
    return f"{_model_in(place / folder) or mark[:12]}, {precision}"


@cache
def _model_in(folder: Path) -> str:
    for path in sorted(folder.glob("classes-*.safetensors")):
        with contextlib.suppress(OSError, ValueError, LookupError):
            return files.read_header(path)["model"]
    return ""


KINDS = {
    "features": Kind("features", lambda path: _entry(path) if len(path.parts) == 2 else None, _by_model, locked=True),
    "contents": Kind(
        "contents",
        _remembered,
        lambda _, name: "sessions of runs" if name.startswith("session-") else "hashes of files",
    ),
    "partitions": Kind(
        "partitions",
        lambda path: _entry(path) if len(path.parts) == 1 else None,
        lambda *_: "the rows of simulated sites",
        locked=True,
    ),
    "exchange": Kind(
        "exchange",
        lambda path: path.parts[0] if len(path.parts) > 1 else None,
        lambda _, name: f"adapters of the session {name}",
    ),
    "sweeps": Kind("sweeps/results", _remembered, lambda *_: "results of sweeps"),
    "personal": Kind(
        "personal",
        lambda path: "/".join(path.parts[:2]) if len(path.parts) > 2 else None,
        lambda _, name: f"a site's own adapter, {name}",
        results=True,
    ),
    "given": Kind(
        "given",
        lambda path: path.parts[0] if len(path.parts) > 1 else None,
        lambda _, name: f"what {name} gave under masks: without it, no update can replace that",
        results=True,
    ),
}


def clean(
    kinds: Sequence[str], days: int | None, ask: Callable[[str], bool] | None, say: Callable[[str], object]
) -> None:
    """Shows what is stored, asks about each kind, and removes what is confirmed; without `ask` it removes nothing.

    Without `kinds`, it covers all that can be made again; with `days`, only what was not used for that long.
    """
    if unknown := sorted({*kinds} - {*KINDS}):
        raise UserError(f"{unknown[0]!r}: expected some of {', '.join(KINDS)}")
    if days is not None and not 0 <= days <= MOST_DAYS:
        raise UserError(f"--older-than {days}: expected a number of days from 0 to {MOST_DAYS}")
    home, now = files.home(), time.time()
    chosen = [name for name, kind in KINDS.items() if name in kinds or not (kinds or kind.results)]
    linked = [name for name in chosen if _leads_away(home, KINDS[name].place)]
    before = math.inf if days is None else now - days * DAY
    items = [item for name in chosen if name not in linked for item in _items(home, name) if item.used <= before]
    for name in linked:
        say(f"{home / KINDS[name].place} is behind a link and is left alone: remove its files by hand.")
    unnamed = [] if kinds else [name for name, kind in KINDS.items() if kind.results and (home / kind.place).is_dir()]
    hint = "".join(f" {home / KINDS[name].place} is only cleaned if you name {name}." for name in unnamed)
    if not items:
        unused = "" if days is None else f" that was not used for {counted(days, 'day')}"
        say(f"There is nothing to remove in {home}{unused}.{hint}")
        return
    say(_table(items, now))
    busy = {item for item in items if _may_be_in_use(item, now)}
    some_stay = f" {_amount(busy)} may be in use by a run and are kept." if busy else ""
    say(f"{_amount(items)} in {home}.{some_stay}{hint}")
    free = [item for item in items if item not in busy]
    if ask is None:
        if free:
            say("Nothing was removed: there is no terminal to ask on. Use --yes to remove without asking.")
        return
    wanted: list[Item] = []
    for name, group in groupby(free, lambda item: item.kind):
        own = list(group)
        if ask(f"Remove {name} ({_amount(own)})?"):
            wanted += own
    if wanted:
        _remove(home, wanted, say)


def _items(home: Path, name: str) -> list[Item]:
    """The items of that kind, the longest unused first."""
    kind, place = KINDS[name], home / KINDS[name].place
    found: dict[str, list[tuple[Path, os.stat_result]]] = {}
    for path, facts in tqdm(_files(place), desc=f"looking at {name}", unit=" files", delay=2, leave=False):
        if of := kind.item(path.relative_to(place)):
            found.setdefault(of, []).append((path, facts))
    items = []
    for of, members in found.items():
        own = [(path, facts) for path, facts in members if not (kind.locked and path.suffix == ".lock")]
        if own:  # a lock alone is no item: another process may be waiting for it
            size = sum(facts.st_size for _, facts in own)
            used = max(facts.st_mtime for _, facts in members)
            items.append(Item(name, of, kind.what(place, of), tuple(path for path, _ in own), size, used))
    return sorted(items, key=lambda item: (item.used, item.name))


def _files(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files below the folder; links are neither followed nor counted."""
    for folder, _, names in os.walk(place, onerror=_raise):
        for name in sorted(names):
            with contextlib.suppress(FileNotFoundError):
                facts = os.lstat(path := Path(folder, name))
                if S_ISREG(facts.st_mode):
                    yield path, facts


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"{error.filename} can't be read ({error.strerror}): let this user read it") from None


def _leads_away(home: Path, place: str) -> bool:
    """True if a link leads from that place to another."""
    return (home / place).resolve() != home.resolve() / place


def _may_be_in_use(item: Item, now: float) -> bool:
    """True if it was used recently, has no lock, and belongs to a run or is partial."""
    return (item.kind == "exchange" or item.name.startswith(("session-", "."))) and now - item.used < RECENT


def _table(items: Sequence[Item], now: float) -> str:
    rows: list[tuple[str, ...]] = [("kind", "what", "last used", "size", "files")]
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.kind, item.what), []).append(item)
    for (kind, what), own in groups.items():
        size, count = sum(item.size for item in own), sum(len(item.files) for item in own)
        rows.append((kind, shown(what), _ago(now - max(i.used for i in own)), bytes_of(size), f"{count:,}"))
    return table(rows, left=2)


def _ago(seconds: float) -> str:
    days = int(max(seconds, 0) // DAY)
    return ("today", "yesterday")[days] if days < 2 else f"{days:,} days ago"


def _amount(items: Iterable[Item]) -> str:
    items = list(items)
    return f"{counted(sum(len(item.files) for item in items), 'file')}, {bytes_of(sum(item.size for item in items))}"


def _remove(home: Path, items: Sequence[Item], say: Callable[[str], object]) -> None:
    removed, busy, failed = list[Item](), list[Item](), list[str]()
    for item in tqdm(items, desc="removing", delay=2, leave=False):
        try:
            (removed if _removed(home, item) else busy).append(item)
        except OSError as error:
            failed.append(f"{error.filename} ({error.strerror})")
    say(f"Removed {_amount(removed)}." + (f" {_amount(busy)} are in use and are kept." if busy else ""))
    if failed:
        raise UserError(f"these can't be removed: {some(failed, 3)}; let this user write to their folders")


def _removed(home: Path, item: Item) -> bool:
    """Removes the item; False if it is in use, or was used since it was listed."""
    kind, place = KINDS[item.kind], home / KINDS[item.kind].place
    lock = place / f"{item.name}.lock"
    with contextlib.ExitStack() as stack:
        used = max(map(_time, (*item.files, lock)))  # before the lock is taken, which may write to its file
        try:
            if kind.locked:
                stack.enter_context(FileLock(lock, timeout=0))
        except Timeout:
            return False
        if used > item.used:
            return False
        for path in item.files:
            path.unlink(missing_ok=True)
    for folder in sorted({parent for path in item.files for parent in path.parents}, reverse=True):
        if place in folder.parents:
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
    return True


def _time(path: Path) -> float:
    """The time when the file was written or marked as used; 0 if it does not exist."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
