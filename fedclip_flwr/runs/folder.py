"""The run folder: created, locked, written and resumed.

settings.json        the settings, the versions and the package's hash
metrics.jsonl        a line for each round
adapter.safetensors  the selected round's adapter; adapter.json: everything needed to load it elsewhere
model/               instead of these: the selected round's whole model, if that was trained
checkpoint/          the last complete round, with everything needed to resume
summary.json         the status, and the results of a completed run

`saved.py` writes adapters and models, `checkpoint.py` the checkpoint, `summary.py` makes the summary; the report adds
files of its own. Every file is replaced atomically. The folder is locked while its run is in progress.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedclip_flwr.base import Settings, UserError, files
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.plugins import GROUPS as PLUGINS
from fedclip_flwr.base.settings import LORA, ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.features import Features, Pixels
from fedclip_flwr.learning.adapters import adapter_class
from fedclip_flwr.learning.recipes import starts_as_zero_shot
from fedclip_flwr.runs import checkpoint, history
from fedclip_flwr.runs.checkpoint import Checkpoint
from fedclip_flwr.runs.saved import save_adapter, save_model, write_json
from fedclip_flwr.runs.trackers import Trackers
from fedclip_flwr.server import RoundResult
from fedclip_flwr.server.nodes import Failure

PACKAGES = ("fedclip-flwr", "flwr", "torch", "transformers", "numpy")
FREE = frozenset({"num-server-rounds", "early-stop", "min-sites", "round-timeout", "device", "track", *history.WHERE})
"""Settings that may differ when a run is resumed."""
MAY_CHANGE = frozenset(
    {
        "update",
        "leave",
        "data",
        "image-column",
        "label-column",
        "domain-column",
        "class-names",
        "strategy",
        "hostile-share",
    }
    | {"one-round-choose", "personalize", "model", "model-revision", "partition", "alpha"}
)
"""Settings that may differ when a run is updated, too; of the model its content is compared."""
VERSION = ("family", "version")
"""Facts in settings.json of a run that goes on from another: the run that all began with, and the version's number."""
LOCK_ATTEMPTS = 5
"""More than one, because a process that only checks the lock (`history.held`) holds it for a moment."""


class RunFolder:
    """The folder of a new or resumed run. As a context manager it records how the run ends.

    Of a resumed run, `before` is the last complete round, if there is one; nothing is written before `begin`.
    """

    def __init__(self, settings: Settings, package: str) -> None:
        root, self.setting = history.results(settings)
        self._settings, self._lines = settings, list[str]()
        self._facts = {
            **settings.as_run_config(),
            "resume": "",
            "versions": _versions(),
            "package": package,
            "plugins": settings.packages(*PLUGINS),
            "adapter-facts": _adapter_facts(settings),
        }
        self.with_other_package = False
        self._round, self._failures = 0, list[Failure]()
        self._writing = threading.RLock()
        self._running, self._stopped = False, False
        self.before: Checkpoint | None = None
        self.trackers = Trackers(settings.track)
        self.before_update: Path | None = None
        if settings.update:
            self.before_update = existing(root, settings.update, "update")
            self._facts["update"] = self.before_update.name
        if settings.resume:
            self.path = existing(root, settings.resume)
        else:
            with files.writing_to(root, self.setting):
                self.path = self._new_version(root) if self.before_update else _new_folder(root, settings)
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self.path, f"resume = {self.path.name!r}"))
            if settings.resume:
                kept = {"min-sites"} if settings.shares_noise else set[str]()  # sites have added noise for as many
                original = _check_settings(self.path, self._facts, FREE - kept, "resume")
                self._facts |= {"run": original.get("run", self.path.name), "name": original["name"]}
                self._facts |= {key: original[key] for key in VERSION if key in original}
                now = [package, self._facts["plugins"]]
                self.with_other_package = [original.get("package", package), original.get("plugins", [])] != now
                self.before = checkpoint.read(self._checkpoint)
            else:
                self._facts["run"] = f"{self.path.name}-{secrets.token_hex(4)}"
                self.begin([])
            self._held = held.pop_all()

    def _new_version(self, root: Path) -> Path:
        """Makes the folder of the next version of the run to update; this run's settings must fit it."""
        assert self.before_update
        _check_settings(self.before_update, self._facts, FREE | MAY_CHANGE, "update")
        family, name, version = history.next_version(self.before_update)
        self._facts |= {"family": family, "version": version}
        return _new_folder(root, self._settings if self._settings.name else replace(self._settings, name=name))

    def discard(self) -> None:
        """Removes the folder of a run that turned out to be needless."""
        with self._writing:
            self._stopped, self._running = True, False
            with contextlib.suppress(OSError):
                remove(self.path)
        if self.before_update:
            _link(self.path.parent / "latest", self.before_update.name)

    @property
    def run(self) -> str:
        """A name that no other run has, in any folder: sites store what belongs to the run under it."""
        return str(self._facts["run"])

    @property
    def _checkpoint(self) -> Path:
        return checkpoint.path_of(self.path)

    def begin(self, failures: list[Failure], sites: int | None = None, simulated: bool = False) -> None:
        """Marks the run as running, with that number of sites. `failures` may grow afterwards."""
        self._running, self._failures = True, failures
        self._facts |= {"sites": sites, "simulated": sites if simulated else None}
        for folder in (self.path, self._checkpoint.parent, self.path / "model", self.path / "sums"):
            files.tidy(folder, self.setting)
        if self.before:
            self._round = self.before.state.round
            self._lines = [json.dumps(line) + "\n" for line in self.before.metrics]
        self._json(history.SETTINGS, self._facts)
        self._write_lines()
        self._write_status("running")
        _link(self.path.parent / "latest", self.path.name)

    @property
    def how_to_resume(self) -> str:
        """A sentence for the user; empty before the first complete round."""
        return f"Resume it after round {self._round} with resume='{self.path.name}'." if self._round else ""

    def line(self, result: RoundResult) -> None:
        """Adds a line to metrics.jsonl."""
        self._lines.append(json.dumps(result.facts) + "\n")
        self._write_lines()
        self.trackers.line(result.facts)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines]

    def checkpoint(self, made: Checkpoint) -> None:
        """Saves the last complete round."""
        with self._writable():
            checkpoint.write(self._checkpoint, made, self.setting)
        self._round = made.state.round
        self._write_status("running")

    def adapter(self, number: int, state: State, features: Features, blend: float | None = None) -> None:
        """Saves the selected round so far, `number`: its adapter, or the whole model if that is trained."""
        with self._writable():
            if isinstance(features, Pixels):
                save_model(self.path / "model", state, features, number, self.setting)
            else:
                save_adapter(self.path, state, self._settings, features, number, self.setting, blend=blend)

    def finish(self, summary: dict[str, Any]) -> None:
        if self._facts["leave"]:  # who has left is not remembered
            self._json(history.SETTINGS, {**self._facts, "leave": ""})
        self._json(history.SUMMARY, summary)
        self._running = False
        self.trackers.finish(summary)

    def stop(self) -> None:
        """Records that the run was stopped from outside; nothing is written afterwards."""
        with self._writing:
            if self._running:
                self._end("stopped", f"it was stopped from outside. {self.how_to_resume}".strip())
            self._stopped = True
        self.trackers.end("stopped")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Exception):
            self.stop()
        with self._writing:
            if self._running:
                self._end("failed", str(error) if isinstance(error, UserError) else one_line(repr(error)))
        self.trackers.end("failed")  # no effect after `finish` or `stop`
        self._held.close()

    def _end(self, status: str, why: str) -> None:
        with contextlib.suppress(UserError):  # the disk itself may have failed: the first error matters
            self._write_status(status, why=why)
        self._running = False

    def _write_status(self, status: str, **more: str) -> None:
        failures = [failure._asdict() for failure in self._failures]
        self._json(history.SUMMARY, {"status": status, **more, "round": self._round, "failures": failures})

    def _json(self, name: str, facts: dict[str, Any]) -> None:
        with self._writable():
            write_json(self.path / name, facts, self.setting)

    def _write_lines(self) -> None:
        with self._writable():
            files.write_text(self.path / history.METRICS, "".join(self._lines), self.setting)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Lets one thread write at a time, and ends a thread that writes after the run was stopped."""
        with self._writing:
            if self._stopped:
                raise SystemExit
            yield


def _adapter_facts(settings: Settings) -> dict[str, Any]:
    """What commands that can't load the adapter's class show of it."""
    adapter, exact = adapter_class(settings.adapter), starts_as_zero_shot(settings)
    if settings.method == ONE_ROUND:
        return {"name": ONE_ROUND, "ranked": False, "zero-shot": exact}
    if settings.method == LORA:
        return {"name": LORA, "ranked": True, "zero-shot": exact}
    return {"name": adapter.name, "ranked": adapter.ranked, "zero-shot": exact}


def existing(root: Path, name: str, key: str = "resume") -> Path:
    """The folder of an earlier run, which the setting `key` names."""
    path = root / name
    if not (path / history.SETTINGS).is_file():
        runs = history.names(root)
        there = f"the latest are {', '.join(runs[-3:])}" if runs else "it has no runs yet"
        raise UserError(f"{key} = {name!r}: there is no such run in {root}; {there}")
    return path.resolve()


def remove(path: Path) -> None:
    """Removes a run's folder: its summary first, its settings last.

    What an interruption leaves is then still found, as a run without a summary.
    """
    (path / history.SUMMARY).unlink(missing_ok=True)
    for each in path.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != history.SETTINGS:
            each.unlink()
    (path / history.SETTINGS).unlink()
    path.rmdir()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keeps other processes from writing to the run meanwhile; ends with this process at the latest.

    If another process has it, the error begins with `what`.
    """
    folder = os.open(path, os.O_RDONLY)
    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                break  # the file system has no locks
            if attempt == LOCK_ATTEMPTS:
                os.close(folder)
                raise UserError(f"{what}: that run is still under way; stop it first") from None
            time.sleep(0.1)
        else:
            break
    try:
        yield
    finally:
        os.close(folder)


def _check_settings(path: Path, wanted: dict[str, Any], free: Collection[str], how: str) -> dict[str, Any]:
    """The run's original settings. Raises if any that is not in `free` differs; `how` is the setting that names it."""
    saved = history.Reader(path).settings()
    changed = {key: saved[key] for key in Settings.keys() if key not in free and saved.get(key) != wanted[key]}  # noqa: SIM118
    if changed:
        raise UserError(
            f"{how} = {path.name!r}: that run has different settings; give the same: "
            + " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changed.items())
        )
    return saved


def saved_settings(settings: Settings) -> tuple[dict[str, Any], int | None]:
    """The settings of the run to resume or to update, and its number of sites if it is known."""
    named = ("resume", settings.resume) if settings.resume else ("update", settings.update)
    facts = history.Reader(existing(history.results(settings)[0], named[1], named[0])).settings()
    sites = facts.get("simulated") or facts.get("sites")  # `forget` lowers the second
    own = {*history.WHERE, *(() if settings.resume else ("update", "leave"))}
    if not (settings.resume or facts["secure-aggregation"]):
        own.add("min-sites")  # of an update, as few sites may have something new; else it is how many hide each other
    original = {key: facts[key] for key in Settings.keys() if key not in own}  # noqa: SIM118
    return original, sites if isinstance(sites, int) else None


def _new_folder(root: Path, settings: Settings) -> Path:
    """Makes a new folder with the run's name, or else one named by the time."""
    if settings.name:
        history.check_name(settings)
        (root / settings.name).mkdir()
        return root / settings.name
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = root / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise UserError(f"results-dir: {root} already has 1,000 runs of {stamp}")


def _link(link: Path, name: str) -> None:
    """Points the link to the run, if the file system has links."""
    part = link.with_name(f".{link.name}.{name}")
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)  # left by a process that was killed
        part.symlink_to(name)
        part.replace(link)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
