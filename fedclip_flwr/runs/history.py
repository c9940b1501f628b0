"""Runs that were made: their folders, read. Nothing here needs torch, so that looking at runs is quick."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from fedclip_flwr.base import Settings, UserError, files
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.kinds import KINDS

MOST_BYTES = 2**28
"""Of one of a run's files."""
PAGE = "report.html"
"""The report."""
SETTINGS, METRICS, SUMMARY = "settings.json", "metrics.jsonl", "summary.json"
TENSORS, FACTS = "adapter.safetensors", "adapter.json"
"""The selected adapter so far, and what it was made for."""
STATES = ("completed", "failed", "stopped", "running")
"""What summary.json may say of a run; one that is said to be running, and that nothing holds, was killed."""
ROUND = {"round", "seen", "unseen", "val", "loss", "sites", "bytes", "seconds"}
"""What a line of metrics.jsonl tells at least."""
FAILURE = {"round", "site", "why"}
"""And a failure in summary.json."""
WHERE = ("name", "resume", "results-dir")
"""Settings that say where runs are, and nothing of what is learnt."""


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

    @property
    def told(self) -> str:
        """The status as it is written down: a run that was killed is `running`."""
        told = self.summary.get("status", "running")  # it is written last of all
        return told if told in STATES else "unknown"

    @cached_property
    def status(self) -> str:
        """`completed`, `failed`, `stopped`, `running`, or `killed`: what runs holds its folder."""
        return "killed" if self.told == "running" and not held(self.path) else self.told

    @property
    def completed(self) -> bool:
        return self.told == "completed"

    @property
    def method(self) -> str:
        """What was trained, in a word or two."""
        if self.settings["method"] == "full-model":
            return "full-model"
        kind = str(self.settings["adapter"])
        return f"{kind}-{self.settings['adapter-rank']}" if kind in KINDS and KINDS[kind].ranked else kind

    @cached_property
    def known(self) -> Settings:
        """The settings that this version knows, as far as they can be used."""
        keys = Settings.keys()
        return Settings.read({key: value for key, value in self.settings.items() if key in keys})[0]

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not as they are unless given, but for those that say where runs are."""
        plain = Settings().as_run_config()
        return {
            key: self.settings[key] for key, value in plain.items() if self.settings[key] != value and key not in WHERE
        }

    @property
    def wanted(self) -> int:
        """Rounds that were asked for."""
        return int(self.settings["num-server-rounds"])

    @property
    def done(self) -> int:
        """Rounds that are complete."""
        return int(self.summary.get("rounds", self.summary.get("round", 0)))

    @cached_property
    def selected(self) -> int | None:
        """The round whose adapter is the result, so far; of a whole model only a completed run tells it."""
        if self.completed:
            return int(self.summary["adapted"]["round"])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            return int(files.read_header(self.path / TENSORS)["round"])
        return None

    def line(self, number: int) -> dict[str, Any]:
        """What `metrics` has of that round; nothing where it has lost it."""
        return next((line for line in self.metrics if line["round"] == number), {})

    @property
    def best(self) -> dict[str, Any]:
        """The line of the selected round so far, or of the last one where that is not known."""
        last = self.metrics[-1]["round"] if self.metrics else 0
        return self.line(last if self.selected is None else self.selected)

    @property
    def lost(self) -> int:
        """Rounds that have no line in `metrics`, as each has when the next one is complete, or the run."""
        due = self.done + self.completed
        return max(0, due - len({line["round"] for line in self.metrics if 0 <= line["round"] < due}))

    @property
    def start(self) -> str:
        """What round 0 is: zero-shot, or only next to it."""
        return "zero-shot" if self.known.starts_as_zero_shot else "start"

    @property
    def why(self) -> str:
        """What has ended it before it was completed."""
        if self.status != "killed":
            return str(self.summary.get("why", ""))
        how = f". It goes on after round {self.done} with {shlex.join(self.to_resume)}." if self.done else ""
        return f"what ran it is gone, and could not write why{how}"

    @property
    def to_resume(self) -> list[str]:
        """The settings with which it goes on."""
        root = self.path.parent
        return [f"resume={self.name}", *([] if root == runs_folder().resolve() else [f"results-dir={root}"])]

    @property
    def bytes_per_site_round(self) -> float | None:
        """Both ways; the mean over what was asked of sites, or before a run's end over its rounds so far."""
        if self.completed:
            told: float | None = self.summary["traffic"]["per_site_round_bytes"]
            return told
        made = [line for line in self.metrics if line["round"] and line["sites"]]
        return sum(line["bytes"] / line["sites"] for line in made) / len(made) if made else None

    @property
    def epsilon(self) -> float | None:
        """What the sites' privacy has come to so far."""
        last: dict[str, Any] = self.metrics[-1] if self.metrics else {}
        return (self.summary.get("privacy") or last).get("epsilon")

    @property
    def failures(self) -> list[tuple[int, str, str]]:
        """Rounds, sites, and what went wrong there."""
        return [(told["round"], str(told["site"]), str(told["why"])) for told in self.summary.get("failures", [])]


class Reader:
    """A run's folder, read again and again: each time only those of its files that have changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = 0.0
        """When the run last wrote something, in seconds since 1970."""
        self._known: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._run: Run | None = None

    def read(self) -> Run:
        """The run, whatever it has come to so far; the same object if nothing has changed."""
        summary = self._latest(SUMMARY, _summary)  # first: it is written last
        settings, metrics = self.settings(), self._latest(METRICS, _metrics)
        last = self._run
        if not (last and last.settings is settings and last.metrics is metrics and last.summary is summary):
            self._run = last = Run(self.path, settings, metrics, summary)
        return last

    def settings(self) -> dict[str, Any]:
        """What the run was begun with; settings that it does not know are as they are unless given."""
        found: dict[str, Any] = self._latest(SETTINGS, _settings)
        return found

    def _latest(self, name: str, understand: Callable[[bytes | None], Any]) -> Any:
        """What the file tells: the same object if it has not been replaced."""
        path = self.path / name
        mark, value = self._known.get(name, ((), None))
        try:
            now = _mark(path)
            if value is None or now != mark:
                value = understand(files.read_bytes(path, MOST_BYTES) if now else None)
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({one_line(error.strerror or error)}): mend that, or name another run"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): put back a copy, or name another run") from None
        self._known[name] = now, value
        self.changed = max(self.changed, now[0] / 1e9) if now else self.changed
        return value


def _mark(path: Path) -> tuple[int, ...]:
    """What is another one once the file was replaced; empty while there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return ()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def runs_folder() -> Path:
    """Where runs are, unless results-dir says otherwise."""
    return files.home() / "runs"


def results(settings: Settings) -> tuple[Path, str]:
    """Where the run folders of a run with these settings go, and the setting that says so."""
    if settings.results_dir:
        return Path(settings.results_dir), "results-dir"
    return runs_folder(), "FEDCLIP_HOME"


def find(name: str | Path, root: Path | None = None) -> Run:
    """The run in that folder, or of that name in `root`; `latest` is the newest."""
    return read(where(name, root))


def where(name: str | Path, root: Path | None = None) -> Path:
    """The folder of that run."""
    root = root or runs_folder()
    for path in (Path(os.path.expanduser(name)), root / name):
        if os.path.isfile(path / SETTINGS):
            return path.resolve()
    there = names(root)
    if there and str(name) == "latest":  # where the file system has no links
        return root / there[-1]
    if not there and str(name) == "latest":
        raise UserError(f"there is no run in {root} yet: `fedclip run` makes one there")
    known = f"the latest in {root} are {', '.join(there[-3:])}" if there else f"there is none in {root}"
    raise UserError(f"{str(name) or repr('')}: there is no such run, neither as a folder nor by name; {known}")


def names(root: Path) -> list[str]:
    """Of the runs in the folder, the oldest first."""
    try:
        found = [
            (*_begun(entry.name, entry.stat().st_ctime), entry.name)
            for entry in os.scandir(root)
            if entry.name != "latest" and entry.name[0] != "." and os.path.isfile(Path(entry.path, SETTINGS))
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{root} can't be looked into ({error.strerror})") from None
    return [name for *_, name in sorted(found)]


def _begun(name: str, changed: float) -> tuple[str, float]:
    """What runs are ordered by: the time by which one is named, or else when its folder was last changed."""
    named = re.match(r"\d{8}-\d{6}", name)
    return named[0] if named else time.strftime("%Y%m%d-%H%M%S", time.localtime(changed)), changed


def check_name(settings: Settings) -> None:
    """Raises if the run's name is taken."""
    root = results(settings)[0]
    if settings.name and (root / settings.name).exists():
        raise UserError(
            f"name = {settings.name!r}: {root} has a run of that name; give another one, or go on with that by "
            f"resume={settings.name}"
        )


def read(path: Path) -> Run:
    """The run in that folder, whatever it has come to so far."""
    reader = Reader(path)
    run = reader.read()
    return reader.read() if run.status == "killed" else run  # it may have ended just after it was read


def _settings(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise ValueError("it is not there")
    found = _object(data)
    told = Settings().as_run_config() | found
    if "feature-norm" not in found and told["recipe"] == "paper":
        told["feature-norm"] = 1.0  # as it was before there was a choice
    for key, field in Settings.keys().items():
        if type(told[key]) is not type(field.default) and told[key] != field.metadata.get("word", field.default):
            raise ValueError(f"{key} is {told[key]!r}")
    return told


def _metrics(data: bytes | None) -> list[dict[str, Any]]:
    lines = [_object(line) for line in (data or b"").splitlines()]
    for line in lines:
        always = [line.get(key) for key in ("round", "sites", "bytes", "seconds")]
        if not (
            line.keys() >= ROUND
            and all(map(_is_number, always))
            and all(value is None or _is_number(value) for value in line.values())
            and type(line["round"]) is int
        ):
            raise ValueError("a line is no round")
    return lines


def _summary(data: bytes | None) -> dict[str, Any]:
    told = _object(b"{}" if data is None else data)
    failures = told.get("failures", [])
    if not (isinstance(failures, list) and all(isinstance(f, dict) and f.keys() >= FAILURE for f in failures)):
        raise ValueError("failures are not told as such")
    if not isinstance(told.get("rounds", told.get("round", 0)), int):
        raise ValueError("expected a number of rounds")
    if not isinstance(told.get("privacy") or {}, dict):
        raise ValueError("privacy is not told as such")
    if told.get("status") == "completed":
        _check_results(told)
    return told


def _check_results(told: dict[str, Any]) -> None:
    """Raises unless all is there that a completed run tells."""
    try:
        zero, adapted, traffic = told["zero_shot"], told["adapted"], told["traffic"]
        shares = [
            one
            for of in (zero, adapted)
            for one in (of["seen"], of["unseen"], *of["sites"].values(), *of["holdout_sites"].values())
        ]
        shares += (adapted["personal"] or {}).values()
        counts = [adapted["round"], told["rounds"], told["seconds"]["total"]]
        counts += [traffic[key] for key in ("down_bytes", "up_bytes", "per_site_round_bytes")]
        known = "holdout" in told and isinstance(adapted["personal_metrics"] or {}, dict)
    except (LookupError, TypeError, AttributeError):
        known = False
    if not (known and all(map(_is_number, counts)) and all(one is None or _is_number(one) for one in shares)):
        raise ValueError("a completed run's results are not told as such")


def _is_number(value: object) -> bool:
    """Whether it is one with which can be reckoned."""
    return type(value) in (int, float) and abs(cast(float, value)) < 2**63  # no NaN, either


def _object(data: bytes) -> dict[str, Any]:
    facts = json.loads(data)
    if not isinstance(facts, dict):
        raise ValueError("expected an object")
    return facts


def held(path: Path) -> bool:
    """Whether a process has the run's folder locked, or there is no telling."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.EOPNOTSUPP)
    finally:
        os.close(folder)
    return False
