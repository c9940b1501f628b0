"""Runs, read from their folders. Nothing here needs torch, so that commands on runs start quickly."""

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
from fedclip_flwr.base.settings import LORA
from fedclip_flwr.base.text import counted

MOST_BYTES = 2**28
"""The largest of a run's files that is read."""
PAGE = "report.html"
"""The page of the report."""
SETTINGS, METRICS, SUMMARY = "settings.json", "metrics.jsonl", "summary.json"
TENSORS, FACTS = "adapter.safetensors", "adapter.json"
"""The selected adapter so far, and its metadata."""
STATES = ("completed", "failed", "stopped", "running")
"""Each status in summary.json. A run that is `running` there, and whose folder no process has locked, was killed."""
ROUND = {"round", "seen", "unseen", "val", "loss", "sites", "bytes", "seconds"}
"""Required keys of a line of metrics.jsonl."""
FAILURE = {"round", "site", "why"}
"""Required keys of a failure in summary.json."""
WHERE = ("name", "resume", "results-dir")
"""Settings that say where runs are, and do not affect training."""


@dataclass(frozen=True)
class Run:
    """A run as its folder has it: `settings` by key, a record of each round in `metrics`, and the `summary`."""

    path: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def family(self) -> str:
        """What all versions of the same result have in common."""
        return str(self.settings.get("family", self.settings.get("run", self.path)))

    @property
    def version(self) -> int:
        number = self.settings.get("version", 1)
        return number if isinstance(number, int) else 1

    @property
    def forgotten(self) -> str:
        """A sentence on sites that were forgotten, and when; empty if there were none."""
        found = self.summary.get("forgotten", [])
        when, sites = [str(each["when"])[:10] for each in found], sum(each["sites"] for each in found)
        which = "A site was forgotten, and this is the result without it"
        if sites > 1:
            which = f"{sites} sites were forgotten, and this is the result without them"
        return f"{which} ({', '.join(dict.fromkeys(when))})" if when else ""

    @property
    def updated(self) -> str:
        """A sentence on the version that this one goes on from; empty for a first version."""
        if not (facts := self.summary.get("update")):
            return ""
        new, changed = len(facts["new"]), len(facts["changed"])
        return (
            f"Version {self.version}, from {facts['of']}: {counted(new, 'new site')}, {changed} changed, "
            f"{facts['sites'] - new - changed} as before"
        )

    @property
    def recorded(self) -> str:
        """The status in summary.json: a run that was killed is still `running`."""
        status = self.summary.get("status", "running")  # a new run writes it last
        return status if status in STATES else "unknown"

    @cached_property
    def status(self) -> str:
        """`completed`, `failed`, `stopped`, `running`, or `killed` if no process has the folder locked."""
        return "killed" if self.recorded == "running" and not held(self.path) else self.recorded

    @property
    def completed(self) -> bool:
        return self.recorded == "completed"

    @property
    def method(self) -> str:
        """The adapter with its rank if it has one, LoRA with its rank and where it is, or `full-model`."""
        if self.settings["method"] == "full-model":
            return "full-model"
        name, rank = self.adapter
        words = [f"{name}-{rank}" if rank else name]
        if self.settings["method"] == LORA:
            words += [self.settings[key] for key in ("lora-targets", "lora-layers") if key in self.changed]
        return " ".join(words)

    @property
    def adapter(self) -> tuple[str, int | None]:
        """The adapter's name, and its rank if it has one."""
        facts = self.settings["adapter-facts"]
        rank = self.settings["lora-rank" if self.settings["method"] == LORA else "adapter-rank"]
        return facts["name"], rank if facts["ranked"] else None

    @cached_property
    def known(self) -> Settings:
        """The settings that this version knows and accepts."""
        keys = Settings.keys()
        return Settings.read({key: value for key, value in self.settings.items() if key in keys})[0]

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, without those that say where runs are."""
        defaults = Settings().as_run_config()
        return {
            key: own for key, value in defaults.items() if (own := self.settings[key]) != value and key not in WHERE
        }

    @property
    def wanted(self) -> int:
        """The number of rounds in the settings."""
        return self.known.rounds

    @property
    def done(self) -> int:
        """The number of complete rounds."""
        return int(self.summary.get("rounds", self.summary.get("round", 0)))

    @cached_property
    def selected(self) -> int | None:
        """The selected round so far; of a whole model it is known only once the run is completed."""
        if self.completed:
            return int(self.summary["adapted"]["round"])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            return int(files.read_header(self.path / TENSORS)["round"])
        return None

    def line(self, number: int) -> dict[str, Any]:
        """The record of that round in `metrics`; empty if it is missing."""
        return next((line for line in self.metrics if line["round"] == number), {})

    @property
    def best(self) -> dict[str, Any]:
        """The record of the selected round so far, or of the last one if that is unknown."""
        last = self.metrics[-1]["round"] if self.metrics else 0
        return self.line(last if self.selected is None else self.selected)

    @property
    def lost(self) -> int:
        """The number of rounds whose record is missing; it is due once the next round, or the run, is complete."""
        due = self.done + self.completed
        return max(0, due - len({line["round"] for line in self.metrics if 0 <= line["round"] < due}))

    @property
    def start(self) -> str:
        """The name of round 0: `zero-shot`, or `start` if the untrained adapter differs from zero-shot."""
        return "zero-shot" if self.settings["adapter-facts"]["zero-shot"] else "start"

    @property
    def why(self) -> str:
        """The reason why the run ended before it was completed."""
        if self.status != "killed":
            return str(self.summary.get("why", ""))
        how = f". Resume it after round {self.done} with {shlex.join(self.to_resume)}." if self.done else ""
        return f"its process is gone, and left no reason{how}"

    @property
    def to_resume(self) -> list[str]:
        """The settings that resume it."""
        root = self.path.parent
        return [f"resume={self.name}", *([] if root == runs_folder().resolve() else [f"results-dir={root}"])]

    @property
    def bytes_per_site_round(self) -> float | None:
        """Both directions; the mean over sites and rounds, before the run's end over those so far."""
        if self.completed:
            mean: float | None = self.summary["traffic"]["per_site_round_bytes"]
            return mean
        made = [line for line in self.metrics if line["round"] and line["sites"]]
        return sum(line["bytes"] / line["sites"] for line in made) / len(made) if made else None

    @property
    def epsilon(self) -> float | None:
        """The privacy spent so far."""
        last: dict[str, Any] = self.metrics[-1] if self.metrics else {}
        return (self.summary.get("privacy") or last).get("epsilon")

    @property
    def unit(self) -> str:
        """What ε is for: a `site`, or an `image`."""
        return self.known.dp_unit

    @property
    def failures(self) -> list[tuple[int, str, str]]:
        """The round, the site and the reason of each failure."""
        return [(each["round"], str(each["site"]), str(each["why"])) for each in self.summary.get("failures", [])]


class Reader:
    """Reads a run's folder repeatedly, each time only the files that have changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = 0.0
        """When the run last wrote a file, in seconds since 1970."""
        self._known: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._run: Run | None = None

    def read(self) -> Run:
        """The run so far; the same object if nothing has changed."""
        summary = self._latest(SUMMARY, _summary)  # first: it is written last
        settings, metrics = self.settings(), self._latest(METRICS, _metrics)
        last = self._run
        if not (last and last.settings is settings and last.metrics is metrics and last.summary is summary):
            self._run = last = Run(self.path, settings, metrics, summary)
        return last

    def settings(self) -> dict[str, Any]:
        """The run's original settings; those that its file lacks have their defaults."""
        found: dict[str, Any] = self._latest(SETTINGS, parse_settings)
        return found

    def _latest(self, name: str, parse: Callable[[bytes | None], Any]) -> Any:
        """The parsed file; the same object if it has not been replaced."""
        path = self.path / name
        stamp, value = self._known.get(name, ((), None))
        try:
            now = _stamp(path)
            if value is None or now != stamp:
                value = parse(files.read_bytes(path, MOST_BYTES) if now else None)
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({one_line(error.strerror or error)}): fix that, or name another run"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): restore a copy, or name another run") from None
        self._known[name] = now, value
        self.changed = max(self.changed, now[0] / 1e9) if now else self.changed
        return value


def _stamp(path: Path) -> tuple[int, ...]:
    """A value that changes when the file is replaced; empty if there is no file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return ()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def runs_folder() -> Path:
    """The default folder for runs, without results-dir."""
    return files.home() / "runs"


def results(settings: Settings) -> tuple[Path, str]:
    """The folder for runs with these settings, and the setting that determines it."""
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
    if found := later(root / name):
        raise UserError(f"{name}: there is no run of that name, but {', '.join(found)}")
    if there and str(name) == "latest":  # on a file system without links
        return root / there[-1]
    if not there and str(name) == "latest":
        raise UserError(f"there is no run in {root} yet: `fedclip run` makes one there")
    known = f"the latest in {root} are {', '.join(there[-3:])}" if there else f"there is none in {root}"
    raise UserError(f"{str(name) or repr('')}: there is no such run, neither as a folder nor by name; {known}")


def names(root: Path) -> list[str]:
    """The names of the runs in the folder, the oldest first."""
    try:
        found = [
            (*_begun(entry.name, entry.stat().st_ctime), entry.name)
            for entry in os.scandir(root)
            if entry.name != "latest" and entry.name[0] != "." and os.path.isfile(Path(entry.path, SETTINGS))
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{root} can't be listed ({error.strerror})") from None
    return [name for *_, name in sorted(found)]


def _begun(name: str, changed: float) -> tuple[str, float]:
    """The sort key of a run: the time in its name, or else when its folder was last changed."""
    named = re.match(r"\d{8}-\d{6}", name)
    return named[0] if named else time.strftime("%Y%m%d-%H%M%S", time.localtime(changed)), changed


def next_version(path: Path) -> tuple[str, str, int]:
    """What the next version of that run gets: the family, a name that no folder has, and a number."""
    run, number = read(path), versions(path)[-1].version + 1
    first = run.name.removesuffix(f".{run.version}") if run.version > 1 else run.name
    while os.path.lexists(path.parent / f"{first}.{number}"):
        number += 1
    return run.family, f"{first}.{number}", number


def versions(path: Path) -> list[Run]:
    """All versions of that run, the oldest first.

    Raises if one is damaged. Other runs in the folder that are damaged are left out, and so are the `unreadable` ones.
    """
    run = read(path)
    found, first = [run], run.name.removesuffix(f".{run.version}")
    own = {first, *later(path.parent / first)}
    for name in names(path.parent):
        try:
            other = read(path.parent / name)
        except UserError:
            family = family_of(path.parent / name)
            if family == run.family or (not family and name in own):
                raise
        else:
            found += [other] if other.family == run.family and name != run.name else []
    return sorted(found, key=lambda each: each.version)


def family_of(path: Path) -> str:
    """What a run's settings alone say of its family; empty if they can't be read."""
    try:
        return Run(path, Reader(path).settings(), [], {}).family
    except UserError:
        return ""


def unreadable(root: Path) -> list[str]:
    """The names of the runs in the folder whose settings can't be read: nobody can tell what they are versions of."""
    return [name for name in names(root) if not family_of(root / name)]


def later(path: Path) -> list[str]:
    """The names that later versions of that run have, the oldest first; the run itself may be gone."""
    found = [name for name in names(path.parent) if re.fullmatch(rf"{re.escape(path.name)}\.\d+", name)]
    return sorted(found, key=lambda name: int(name.rpartition(".")[2]))


def check_name(settings: Settings) -> None:
    """Raises if the run's name is taken."""
    root = results(settings)[0]
    if settings.name and (root / settings.name).exists():
        raise UserError(
            f"name = {settings.name!r}: {root} has a run of that name; give another one, or resume that run with "
            f"resume={settings.name}"
        )


def read(path: Path) -> Run:
    """The run in that folder, completed or not."""
    reader = Reader(path)
    run = reader.read()
    return reader.read() if run.status == "killed" else run  # it may have ended just after it was read


def parse_settings(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise ValueError("the file is missing")
    found = _object(data)
    settings = Settings().as_run_config() | found
    if "feature-norm" not in found and settings["recipe"] == "paper":
        settings["feature-norm"] = 1.0  # the only choice in earlier versions
    for key, field in Settings.keys().items():
        if type(own := settings[key]) is not type(field.default) and own != field.metadata.get("word", field.default):
            raise ValueError(f"{key} is {own!r}")
    kind, exact = settings["adapter"], settings["method"] == "full-model" or settings["recipe"] != "paper"
    earlier = {"name": kind, "ranked": kind == "gate", "zero-shot": exact or kind == "scale"}  # with three adapters
    facts = settings.setdefault("adapter-facts", earlier)
    types = {key: type(value) for key, value in facts.items()} if isinstance(facts, dict) else {}
    if types != {"name": str, "ranked": bool, "zero-shot": bool} or not facts["name"]:
        raise ValueError(f"adapter-facts is {facts!r}")
    return settings


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
            raise ValueError("invalid round record")
    return lines


def _summary(data: bytes | None) -> dict[str, Any]:
    summary = _object(b"{}" if data is None else data)
    failures = summary.get("failures", [])
    if not (isinstance(failures, list) and all(isinstance(f, dict) and f.keys() >= FAILURE for f in failures)):
        raise ValueError("failures are malformed")
    if not isinstance(summary.get("rounds", summary.get("round", 0)), int):
        raise ValueError("expected a number of rounds")
    if not isinstance(summary.get("privacy") or {}, dict):
        raise ValueError("privacy is malformed")
    forgotten = summary.get("forgotten", [])
    if not (isinstance(forgotten, list) and all(map(_is_forgotten, forgotten))):
        raise ValueError("forgotten is malformed")
    update = summary.get("update", {"of": "", "new": [], "changed": [], "sites": 0})
    if not (isinstance(update, dict) and update.keys() >= {"of", "new", "changed", "sites"}):
        raise ValueError("update is malformed")
    if summary.get("status") == "completed":
        _check_results(summary)
    return summary


def _is_forgotten(found: object) -> bool:
    return isinstance(found, dict) and "when" in found and isinstance(found.get("sites"), int)


def _check_results(summary: dict[str, Any]) -> None:
    """Raises unless the results of a completed run are all there."""
    try:
        zero, adapted, traffic = summary["zero_shot"], summary["adapted"], summary["traffic"]
        shares = [
            one
            for of in (zero, adapted)
            for one in (of["seen"], of["unseen"], *of["sites"].values(), *of["holdout_sites"].values())
        ]
        shares += (adapted["personal"] or {}).values()
        counts = [adapted["round"], summary["rounds"], summary["seconds"]["total"]]
        counts += [traffic[key] for key in ("down_bytes", "up_bytes", "per_site_round_bytes")]
        known = "holdout" in summary and isinstance(adapted["personal_metrics"] or {}, dict)
    except (LookupError, TypeError, AttributeError):
        known = False
    if not (known and all(map(_is_number, counts)) and all(one is None or _is_number(one) for one in shares)):
        raise ValueError("a completed run's results are malformed")


def _is_number(value: object) -> bool:
    """True for a finite number of ordinary size."""
    return type(value) in (int, float) and abs(cast(float, value)) < 2**63  # no NaN, either


def _object(data: bytes) -> dict[str, Any]:
    facts = json.loads(data)
    if not isinstance(facts, dict):
        raise ValueError("expected an object")
    return facts


def held(path: Path) -> bool:
    """True if a process has the run's folder locked, or if that can't be determined."""
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
