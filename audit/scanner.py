"""Asks pip-audit about a constraints file: its findings, and whether it had a database."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from audit.check import Finding
from audit.files import Advisory, Pin

OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")


def scan(program: str | Path, path: Path) -> tuple[str, list[Finding]]:
    """The verdict of this program, in words, and its findings."""
    try:
        done = subprocess.run([program, "-r", path, *OPTIONS], capture_output=True, text=True)
        every = json.loads(done.stdout)["dependencies"]
    except OSError as error:
        return f"{path.name}: pip-audit did not run ({error})", []
    except (ValueError, LookupError, TypeError):
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"{path.name}: pip-audit had no database to ask, and checked nothing: {said[-1][:200]}", []
    known = [(canonicalize_name(one["name"]), one) for one in every if "skip_reason" not in one]
    found = [
        Finding(
            path.name,
            Pin(name, Version(one["version"])),
            Advisory(of["id"], tuple(of["aliases"]), name, of["description"], _ranges(of["fix_versions"])),
        )
        for name, one in known
        for of in one["vulns"]
    ]
    none = "" if known else ": its database has none of them, so this proves nothing"
    return f"{path.name}: pip-audit checked {len(known)} of {len(every)} packages{none}; {len(found)} findings", found


def _ranges(fixes: Sequence[str]) -> tuple[dict[str, Version], ...]:
    """pip-audit names fixed versions only: affected is all before."""
    begun = {"introduced": Version("0")}
    return tuple({**begun, "fixed": Version(fix)} for fix in fixes) or (begun,)
