"""Runs that were made: their folders, read. Nothing here needs torch, so that looking at runs is quick."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedclip_flwr import content
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError, one_line

MOST_BYTES = 2**28
"""Of one of a run's files."""
SETTINGS, METRICS, SUMMARY = "settings.json", "metrics.jsonl", "summary.json"


@dataclass(frozen=True)
class Run:
    """What a run's folder tells: `settings` by key, a line of `metrics` for each round, and the `summary`."""

    path: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def status(self) -> str:
        """`completed`, `failed`, `stopped`, `running`, or `killed`: what runs holds its folder."""
        told = str(self.summary.get("status", "unknown"))
        return "killed" if told == "running" and not held(self.path) else told

    @property
    def completed(self) -> bool:
        return self.summary.get("status") == "completed"

    @property
    def method(self) -> str:
        """What was trained, in a word or two."""
        if self.settings["method"] == "full-model":
            return "full-model"
        return (
            f"gate-{self.settings['adapter-rank']}" if self.settings["adapter"] == "gate" else self.settings["adapter"]
        )


def runs_folder() -> Path:
    """Where runs are, unless results-dir says otherwise."""
    return content.home() / "runs"


def find(name: str | Path, root: Path | None = None) -> Run:
    """The run in that folder, or of that name in `root`; `latest` is the newest."""
    root = root or runs_folder()
    for path in (Path(name).expanduser(), root / name):
        if (path / SETTINGS).is_file():
            return read(path.resolve())
    there = names(root)
    known = f"the latest in {root} are {', '.join(there[-3:])}" if there else f"there is none in {root}"
    raise UserError(f"{name}: there is no such run, neither as a folder nor by name; {known}")


def names(root: Path) -> list[str]:
    """Of the runs in the folder, the oldest first."""
    try:
        found = [path.parent for path in root.glob(f"[!.]*/{SETTINGS}") if path.parent.name != "latest"]
        return [path.name for path in sorted(found, key=lambda path: (path.name[:15], path.stat().st_ctime, path.name))]
    except OSError as error:
        raise UserError(f"{root} can't be looked into ({error.strerror})") from None


def read(path: Path) -> Run:
    """The run in that folder, whatever it has come to so far."""
    settings = Settings().as_run_config() | _json(path / SETTINGS)
    lines = content.read_bytes(path / METRICS, MOST_BYTES) if (path / METRICS).exists() else b""
    try:
        metrics = [json.loads(line) for line in lines.splitlines()]
        if not all(isinstance(line, dict) and isinstance(line.get("round"), int) for line in metrics):
            raise ValueError("a line is no round")
    except ValueError as error:
        raise UserError(f"{path / METRICS} is damaged ({one_line(error)})") from None
    return Run(path, settings, metrics, _json(path / SUMMARY) if (path / SUMMARY).exists() else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = content.read_json(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)})") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: expected an object")
    return facts


def held(path: Path) -> bool:
    """Whether a process has the run's folder locked, or there is no telling."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.EOPNOTSUPP)
    finally:
        os.close(folder)
    return False
