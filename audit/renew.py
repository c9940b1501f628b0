"""`python -m audit.renew`: fetches all advisories about the pinned packages from OSV, a public database."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from audit import files
from audit.files import AuditError, Pin

API = "https://api.osv.dev/v1/"
MOST = 500
"""Queries in one request; OSV takes 1,000."""


def ask(path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The database's answer, as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(API + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise AuditError(f"{API}{path} does not answer ({error}); nothing was changed") from None


def ids(queries: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """The ids of the advisories that answer each query, all pages of them."""
    found: list[set[str]] = [set() for _ in queries]
    waiting = [*enumerate(queries)]
    while waiting:
        now, waiting = waiting[:MOST], waiting[MOST:]
        results = ask("querybatch", {"queries": [query for _, query in now]})["results"]
        for (number, query), result in zip(now, results, strict=True):
            found[number] |= {one["id"] for one in result.get("vulns", ())}
            if token := result.get("next_page_token"):
                waiting.append((number, {**query, "page_token": token}))
    return found


def ranges(events: Sequence[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """OSV's events, which are in order, as ranges."""
    begun: dict[str, str] = {}
    for event in events:
        if "introduced" in event:
            begun = dict(event)
        elif begun and event.keys() & {"fixed", "last_affected"}:
            yield {**begun, **event}
            begun = {}
    if begun:
        yield begun


def entries(record: Mapping[str, Any], pins: Sequence[Pin], named: set[Pin]) -> Iterator[dict[str, Any]]:
    """The record for each of our packages. `named`: the pins that OSV itself says are affected, whatever the ranges."""
    for name in sorted({pin.name for pin in pins}):
        affected = [one for one in record["affected"] if one.get("package", {}).get("ecosystem") == "PyPI"]
        own = [
            found
            for one in affected
            if canonicalize_name(one["package"]["name"]) == name
            for of in one.get("ranges", ())
            if of["type"] == "ECOSYSTEM"
            for found in ranges(of["events"])
        ]
        entry = {"id": record["id"], "aliases": sorted(record.get("aliases", ())), "package": name}
        entry["summary"] = (record.get("summary") or " ".join(record.get("details", "").split()))[:160]
        for pin in sorted(pin for pin in named if pin.name == name):
            if not own or not files.advisory({**entry, "ranges": own}).about(pin):
                own.append({"introduced": str(pin.version), "last_affected": str(pin.version)})
        if own:
            yield {**entry, "ranges": own, "source": f"https://osv.dev/{record['id']}"}


def fetched(pins: Sequence[Pin]) -> dict[str, Any]:
    """A new copy: what OSV has about each name, and about each name in its pinned version."""
    names = sorted({pin.name for pin in pins})
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}} for name in names]
    answers = ids([*queries, *({**queries[names.index(pin.name)], "version": str(pin.version)} for pin in pins)])
    exact = [*zip(pins, answers[len(names) :], strict=True)]
    records = [ask(f"vulns/{name}") for name in sorted(set().union(*answers))]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "source": "fetched from OSV (api.osv.dev) by python -m audit.renew",
        "packages": names,
        "advisories": [
            entry
            for record in records
            if "withdrawn" not in record
            for entry in entries(record, pins, {pin for pin, own in exact if record["id"] in own})
        ],
    }


def write(data: Mapping[str, Any], path: Path) -> None:
    """Replaces the copy at once, or not at all."""
    new = path.with_suffix(".new")
    try:
        new.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
        files.read_copy(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def main() -> int:
    try:
        pins = dict.fromkeys(pin for pins in files.read_lines(files.ROOT).values() for pin in pins)
        write(data := fetched([*pins]), files.ADVISORIES)
    except (AuditError, LookupError, TypeError, ValueError) as error:
        print(
            error if isinstance(error, AuditError) else f"{API} answers oddly ({error!r}); nothing was changed",
            file=sys.stderr,
        )
        return 2
    print(f"{files.ADVISORIES.name}: {len(data['advisories'])} advisories about {len(data['packages'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
