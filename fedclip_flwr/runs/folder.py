"""The run folder: what a run leaves behind, and how it is read again.

settings.json        the settings, the versions and the package's hash
metrics.jsonl        a line for each round
adapter.safetensors  the selected round's adapter; adapter.json: all that is needed to load it elsewhere
model/               instead of these: the selected round's whole model, where that is what was trained
checkpoint/          the last complete round, with all that is needed to go on after it
summary.json         how it ended, or how far it has come

Every file is replaced as a whole, or not at all. While a run goes on its folder is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from fedclip_flwr.base import Settings, UserError, files
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.features import Features, Pixels
from fedclip_flwr.runs import checkpoint, history
from fedclip_flwr.runs.checkpoint import Checkpoint
from fedclip_flwr.runs.saved import TENSORS, save_adapter, save_model, write_json
from fedclip_flwr.runs.trackers import Trackers
from fedclip_flwr.server import RoundResult
from fedclip_flwr.server.nodes import Failure

PACKAGES = ("fedclip-flwr", "flwr", "torch", "transformers", "numpy")


FREE = frozenset({"num-server-rounds", "early-stop", "min-sites", "round-timeout", "device", "track", *history.WHERE})
"""Settings that a run may go on with others of."""
LOOKS = 5
"""So often it is tried to lock a folder: who only looks whether it is locked (`history.held`) holds it for a moment."""


class RunFolder:
    """The folder of a new run, or of one that goes on. As a context manager it records how the run ends.

    Where it goes on, `before` is the last complete round, if there is one, and nothing is written before `begin`.
    """

    def __init__(self, settings: Settings, package: str) -> None:
        root, self._setting = history.results(settings)
        self._settings, self._lines = settings, list[str]()
        self._facts = {**settings.as_run_config(), "resume": "", "versions": _versions(), "package": package}
        self.with_other_package = False
        self._round, self._failures = 0, list[Failure]()
        self._writing = threading.RLock()
        self._going, self._stopped = False, False
        self.before: Checkpoint | None = None
        self.trackers = Trackers(settings.track)
        if settings.resume:
            self.path = _found(root, settings.resume)
        else:
            with files.writing_to(root, self._setting):
                self.path = _new_folder(root, settings)
        with contextlib.ExitStack() as held:
            held.enter_context(_locked(self.path))
            if settings.resume:
                begun = _check_settings(self.path, self._facts)
                self._facts |= {"run": begun.get("run", self.path.name), "name": begun["name"]}
                self.with_other_package = begun.get("package", package) != package
                self.before = checkpoint.read(self._checkpoint)
            else:
                self._facts["run"] = f"{self.path.name}-{secrets.token_hex(4)}"
                self.begin([])
            self._held = held.pop_all()

    @property
    def run(self) -> str:
        """What nobody else calls a run, whatever folder it is in: sites keep what belongs to it under this name."""
        return str(self._facts["run"])

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint" / TENSORS

    def begin(self, failures: list[Failure], sites: int | None = None) -> None:
        """From now on the run is under way, with so many sites; the failures are those so far, and may become more."""
        self._going, self._failures, self._facts["sites"] = True, failures, sites
        for folder in (self.path, self._checkpoint.parent, self.path / "model"):
            files.tidy(folder, self._setting)
        if self.before:
            self._round = self.before.state.round
            self._lines = [json.dumps(line) + "\n" for line in self.before.metrics]
        self._json(history.SETTINGS, self._facts)
        self._write_lines()
        self._tell("running")
        _link(self.path.parent / "latest", self.path.name)

    @property
    def how_to_resume(self) -> str:
        """For the user, where the run has come to something."""
        return f"It goes on after round {self._round} with resume='{self.path.name}'." if self._round else ""

    def line(self, line: RoundResult) -> None:
        """Adds a line to metrics.jsonl."""
        self._lines.append(json.dumps(line.facts) + "\n")
        self._write_lines()
        self.trackers.line(line.facts)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines]

    def checkpoint(self, made: Checkpoint) -> None:
        """The last complete round."""
        with self._under_way():
            checkpoint.write(self._checkpoint, made, self._setting)
        self._round = made.state.round
        self._tell("running")

    def adapter(self, number: int, state: State, features: Features, blend: float | None = None) -> None:
        """The selected adapter, so far: that of round `number`; or the whole model, where that is trained."""
        with self._under_way():
            if isinstance(features, Pixels):
                save_model(self.path / "model", state, features, number, self._setting)
            else:
                save_adapter(self.path, state, self._settings, features, number, self._setting, blend=blend)

    def finish(self, summary: dict[str, Any]) -> None:
        self._json(history.SUMMARY, summary)
        self._going = False
        self.trackers.finish(summary)

    def stop(self) -> None:
        """Records that the run was ended from outside; from then on nothing more is written."""
        with self._writing:
            if self._going:
                self._end("stopped", f"it was ended from outside. {self.how_to_resume}".strip())
            self._stopped = True
        self.trackers.end("stopped")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self.stop()
        with self._writing:
            if self._going:
                self._end("failed", str(error) if isinstance(error, UserError) else one_line(repr(error)))
        self.trackers.end("failed")  # no matter to those that have been told otherwise
        self._held.close()

    def _end(self, status: str, why: str) -> None:
        with contextlib.suppress(UserError):  # the disk may be what failed: the error itself is told
            self._tell(status, why=why)
        self._going = False

    def _tell(self, status: str, **more: str) -> None:
        failures = [failure._asdict() for failure in self._failures]
        self._json(history.SUMMARY, {"status": status, **more, "round": self._round, "failures": failures})

    def _json(self, name: str, facts: dict[str, Any]) -> None:
        with self._under_way():
            write_json(self.path / name, facts, self._setting)

    def _write_lines(self) -> None:
        with self._under_way():
            files.write_whole(
                self.path / history.METRICS, lambda part: part.write_text("".join(self._lines)), self._setting
            )

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """Nothing is written by two threads at once, or by one that does not know yet that the run was stopped."""
        with self._writing:
            if self._stopped:
                raise SystemExit
            yield


def _found(root: Path, name: str) -> Path:
    """The folder of a run that was begun before."""
    path = root / name
    if not (path / history.SETTINGS).is_file():
        runs = history.names(root)
        there = f"the latest are {', '.join(runs[-3:])}" if runs else "nothing was run there yet"
        raise UserError(f"resume = {name!r}: there is no such run in {root}; {there}")
    return path.resolve()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps others from going on with the run meanwhile; ends with this process at the latest."""
    folder = os.open(path, os.O_RDONLY)
    for look in range(1, LOOKS + 1):
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                break  # the file system has no locks
            if look == LOOKS:
                os.close(folder)
                raise UserError(f"resume = {path.name!r}: that run is still under way; stop it first") from None
            time.sleep(0.1)
        else:
            break
    try:
        yield
    finally:
        os.close(folder)


def _check_settings(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the run was begun with: the same settings, but for those that are free."""
    begun = history.Reader(path).settings()
    others = {key: begun[key] for key in Settings.keys() if key not in FREE and begun.get(key) != wanted[key]}  # noqa: SIM118
    if others:
        raise UserError(
            f"resume = {path.name!r}: that run has other settings; give them again: "
            + " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in others.items())
        )
    return begun


def begun_with(settings: Settings) -> tuple[dict[str, Any], int | None]:
    """The settings of the run that is to go on, and how many sites it had, if it has met them."""
    facts = history.Reader(_found(history.results(settings)[0], settings.resume)).settings()
    sites = facts.get("sites")
    begun = {key: facts[key] for key in Settings.keys() if key not in history.WHERE}  # noqa: SIM118
    return begun, sites if isinstance(sites, int) else None


def _new_folder(root: Path, settings: Settings) -> Path:
    """A folder with the run's name, or one named by the time, that nobody else has."""
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
    raise UserError(f"results-dir: {root} has no room for another run of {stamp}")


def _link(link: Path, name: str) -> None:
    """Lets the link point to the run, where the file system has links."""
    part = link.with_name(f".{link.name}.{name}")
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)  # of a process that was killed
        part.symlink_to(name)
        part.replace(link)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
