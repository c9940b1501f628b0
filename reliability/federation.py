"""A federation of real processes on this machine that can be hit at any point: a SuperLink and three SuperNodes.

All are as real sites have them, with TLS, keys, and each site's store for itself; between a site and the SuperLink is
a relay, which can be cut. Processes stop where they are asked to (`injected/sitecustomize.py`): what happens then
is done from outside. Features are random numbers, for what is computed does not matter here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from deploy.processes import SuperLink, SuperNode, superlink, supernode
from deploy.relay import Relay, relayed
from fedclip_flwr.operations import keys, simulation
from fedclip_flwr.operations.ports import free_ports
from harness.features import write_features
from harness.machine import processes

SITES = ("art-0", "cartoon-0", "photo-0")
"""As three simulated nodes are called."""
DOMAINS = ("art", "cartoon", "photo", "sketch")
UNSEEN = DOMAINS[-1]
ROWS = 200
WAIT = 600.0
"""Seconds within which anything has to come that is waited for."""
INJECTED = Path(__file__).parent / "injected"
SETTINGS: Mapping[str, str | int | float] = {
    "adapter": "scale",
    "learning-rate": 0.03,  # with which rounds 1 and 3 do better than all before
    "holdout": UNSEEN,
    "min-sites": len(SITES),
    "num-server-rounds": 4,
    "round-timeout": 300.0,
}


class BrokenError(Exception):
    """What was promised did not hold."""


def until(found: Callable[[], Any], what: str, seconds: float = WAIT) -> Any:
    """What is found, as soon as it is anything."""
    deadline = time.monotonic() + seconds
    while not (it := found()):
        if time.monotonic() > deadline:
            raise BrokenError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)
    return it


def runs(process: int) -> bool:
    """Whether there is such a process, and it is not dead."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def kill(process: int) -> None:
    """Kills it, as a lack of memory does."""
    os.kill(process, signal.SIGKILL)
    until(lambda: not runs(process), f"the end of process {process}")


def kill_leader(leader: subprocess.Popen[bytes]) -> None:
    """Kills it alone; what it had started sees that, and ends."""
    others = started_by(leader.pid)
    leader.kill()
    leader.wait()
    with suppress(BrokenError):
        until(lambda: not any(map(runs, others)), "the end of what it had started", 10)


class Points:
    """Where processes come by, and where they are to stand still."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("hold", "held"):
            (place / name).mkdir(parents=True, exist_ok=True)
        (place / "passed").touch()

    def hold(self, point: str, count: int = 1, site: str = "") -> None:
        """The next process that comes there (so many times, of that site) stands still."""
        part = self.place / "order"
        part.write_text(str(count))
        part.rename(self.place / "hold" / f"{point}{site and '@'}{site}")

    def standing(self, point: str, site: str = "") -> int | None:
        """The process that stands there, if there is one."""
        file = self._held(f"{point}{site and '@'}{site}")
        return int(file.suffix[1:]) if file else None

    def _held(self, point: str) -> Path | None:
        return next((file for file in (self.place / "held").iterdir() if file.stem == point), None)

    def let_go(self) -> None:
        """Nobody stands still any longer, nor will."""
        for folder in ("hold", "held", "hold"):
            for file in (self.place / folder).iterdir():
                file.unlink(missing_ok=True)

    def release(self, point: str) -> None:
        """Who stands there goes on."""
        if file := self._held(point):
            file.unlink()

    def passed(self, since: int = 0) -> list[dict[str, Any]]:
        """All that came by since the file was so long."""
        with (self.place / "passed").open("rb") as file:
            file.seek(since)
            return [json.loads(line) for line in file.read().decode().splitlines() if line.endswith("}")]

    def now(self) -> int:
        """How long the file is."""
        return (self.place / "passed").stat().st_size

    def first(self, point: str, since: int, site: str = "") -> dict[str, Any] | None:
        """The first process (of that site) that has come there since then."""
        lines = (line for line in self.passed(since) if line["point"] == point and site in ("", line["site"]))
        return next(lines, None)


class Result(NamedTuple):
    """What a run came to, without what may be another each time: times and bytes."""

    status: str
    adapter: str
    facts: Mapping[str, Any]
    checkpoint: Mapping[str, str]
    lines: tuple[Mapping[str, Any], ...]
    figures: Mapping[str, Any]


def result(folder: Path) -> Result:
    """What the run in that folder came to."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with safe_open(folder / "checkpoint" / "adapter.safetensors", "np") as file:
        names = [name for name in file.keys() if name != "facts/json"]  # noqa: SIM118
        checkpoint = {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in names}
    return Result(
        summary["status"],
        hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest(),
        json.loads((folder / "adapter.json").read_text()),
        checkpoint,
        tuple({key: value for key, value in row.items() if key not in ("bytes", "seconds")} for row in rows),
        {key: summary.get(key) for key in ("holdout", "zero_shot", "adapted")},
    )


def difference(found: Result, expected: Result) -> list[str]:
    """In what a result is not that of the undisturbed run."""
    unlike = [name for name in Result._fields if name != "lines" and getattr(found, name) != getattr(expected, name)]
    rounds = {row["round"] for row in (*found.lines, *expected.lines)}
    by_round = [{row["round"]: row for row in result.lines} for result in (found, expected)]
    unlike += [
        f"line of round {number}" for number in sorted(rounds) if by_round[0].get(number) != by_round[1].get(number)
    ]
    if len(found.lines) != len(by_round[0]):
        unlike.append("a round has two lines")
    return unlike


class Run:
    """A run that was handed over, as `fedclip run --on` does it and shows it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, results: Path) -> None:
        self.process, self.log, self.results = process, log, results

    @property
    def folder(self) -> Path:
        match = re.search(r"^run folder +(.+)$", self.said, re.MULTILINE)
        return Path(match[1].strip()) if match else (self.results / "latest").resolve()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def lines(self) -> int:
        """How many rounds have a line."""
        with suppress(OSError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def lines_of_all(self, sites: int, last: int) -> bool:
        """Whether the last so many lines are of so many sites."""
        rows = [json.loads(row) for row in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return len(rows) > last and all(row["sites"] == sites for row in rows[-last:])

    def wait(self, seconds: float = WAIT) -> int:
        """The exit status, once the run is over."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BrokenError(f"the run goes on after {seconds:.0f} s: {self.said[-300:]}") from None

    def leave(self) -> None:
        """Looks at it no longer, as with Ctrl-C."""
        self.process.terminate()
        self.process.wait()


@contextmanager
def handed_over(env: Mapping[str, str], settings: Mapping[str, str | int | float], results: Path) -> Iterator[Run]:
    """A run with these settings, with its folder there."""
    results.mkdir(parents=True, exist_ok=True)
    log = results.with_name(f"{results.name}-{secrets.token_hex(4)}.log")
    given = {**settings, "results-dir": str(results)}
    command = ["fedclip", "run", "--on", simulation.CONNECTION, *(f"{key}={value}" for key, value in given.items())]
    with simulation.started(command, env, log) as process:
        yield Run(process, log, results)


class Federation:
    """The SuperLink, the sites and what lies between them."""

    def __init__(self, place: Path, stack: ExitStack, clocks: str = "") -> None:
        self.place, self._clocks = place, clocks
        self.points = Points(place / "points")
        self.features = write_features(place / "features", dict.fromkeys(DOMAINS, ROWS))
        keys.make(place / "keys", "localhost", SITES)
        self.ports = free_ports(3)
        self._parts: dict[str, ExitStack] = {}
        self.relays: dict[str, Relay] = {}
        self.nodes: dict[str, SuperNode] = {}
        self.results: dict[str, Result] = {}
        self._seconds: dict[str, float] = {}
        stack.callback(self._end)
        stack.callback(self.points.let_go)
        self.link = self.start_superlink()
        self.link.register(*SITES)
        for site in SITES:
            self.relays[site] = stack.enter_context(relayed(self.link.fleet))
            self.start_site(site, wait=False)
        self.link.wait_for(list(self.nodes.values()))

    def _end(self) -> None:
        for part in self._parts.values():
            part.close()

    def home(self, name: str) -> Path:
        """Where the server or a site keeps what outlives a run."""
        return self.place / "homes" / name

    def _environment(self, name: str) -> dict[str, str]:
        path = os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        home = self.home(name or "server")
        env = {"RELIABILITY": str(self.points.place), "RELIABILITY_SITE": name, "PYTHONPATH": path}
        env |= {"OMP_NUM_THREADS": "1", "FEDCLIP_HOME": str(home)}
        if self._clocks:
            home.mkdir(parents=True, exist_ok=True)
            self.set_clock(0, name)
            env |= {"LD_PRELOAD": self._clocks, "CLOCK": str(home / "clock")}
        return env

    def start_superlink(self) -> SuperLink:
        """Starts the SuperLink, again with what it had."""
        part = self._parts["superlink"] = ExitStack()
        opened = superlink(self.place / "flower", self.place / "keys", ports=self.ports, **self._environment(""))
        self.link = part.enter_context(opened)
        return self.link

    def stop_superlink(self) -> None:
        """Ends it in order, if it runs."""
        self._parts.pop("superlink", ExitStack()).close()

    def kill_superlink(self) -> None:
        """Kills the SuperLink; what is left of what it had started is ended afterwards, as systemd does it."""
        kill_leader(self.link.process)
        self._parts["superlink"].close()

    def start_site(self, site: str, wait: bool = True) -> None:
        """Starts the SuperNode of a site, again and again until the SuperLink takes it, as systemd does."""
        since = self.points.now()

        def attempt() -> bool:
            if site not in self._parts or self.nodes[site].process.poll() is not None:
                if site in self._parts:
                    self._parts[site].close()
                part = self._parts[site] = ExitStack()
                number = SITES.index(site)
                config = (
                    f"site='{site}' data='features:{self.features}' partition-id={number} num-partitions={len(SITES)}"
                )
                more = {**self._environment(site), "FLWR_HOME": str(self.home(site) / "flower")}
                (self.home(site) / "flower").mkdir(parents=True, exist_ok=True)
                opened = supernode(self.link, site, config, port=self.relays[site].port, **more)
                self.nodes[site] = part.enter_context(opened)
                if not wait:
                    return True
            return any(line["point"] == "site asks" and line["site"] == site for line in self.points.passed(since))

        until(attempt, f"the SuperNode of {site}, started again")

    def kill_site(self, site: str) -> None:
        """Kills a SuperNode; what is left of what it had started is ended afterwards, as systemd does it."""
        kill_leader(self.nodes[site].process)
        self._parts.pop(site).close()

    def kill_all(self) -> None:
        """The power fails: everything ends at once."""
        leaders = [self.link.process.pid, *(node.process.pid for node in self.nodes.values())]
        for process in [*leaders, *(other for leader in leaders for other in started_by(leader))]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for name in list(self._parts):
            self._parts.pop(name).close()

    def start_all(self) -> None:
        """And comes back."""
        self.start_superlink()
        for site in SITES:
            self.start_site(site)

    def set_clock(self, seconds: int, name: str = "") -> None:
        """How far the clock of the server or of a site is off, if it was started with a clock of its own."""
        part = self.place / "clock"
        part.write_text(f"{seconds:+d}")
        part.replace(self.home(name or "server") / "clock")

    def supervise(self) -> None:
        """Starts a SuperLink and SuperNodes again that have ended by themselves, as systemd does."""
        if self.link.process.poll() is not None:
            self.stop_superlink()
            self.start_superlink()
        for site, node in list(self.nodes.items()):
            if site in self._parts and node.process.poll() is not None:
                self.start_site(site, wait=False)

    def heal(self) -> None:
        """Whatever was done to it is undone: the next run finds all as it should be."""
        self.points.let_go()
        for relay in self.relays.values():
            relay.mend()
        for process in processes("flwr-serverapp", f"RELIABILITY={self.points.place}"):
            kill(process)
        self.supervise()
        for site, node in self.nodes.items():
            if node.process.poll() is not None:
                self.start_site(site)

    @contextmanager
    def run(self, results: Path, **more: str | int | float) -> Iterator[Run]:
        """A run that is handed over and shown meanwhile."""
        settings = {**SETTINGS, "data": f"features:{self.features}", **more}
        with handed_over(self.link.env, settings, results) as run:
            yield run

    def undisturbed(self, **settings: str | int | float) -> Result:
        """What the run with these settings comes to if nothing happens."""
        name = "_".join(f"{key}={value}" for key, value in sorted(settings.items())) or "plain"
        if name not in self.results:
            since = self.points.now()
            with self.run(self.place / "undisturbed" / name, **settings) as run:
                begun = until(
                    lambda: self.points.first("server has sent query", since) and time.monotonic(), "a run that begins"
                )
                if run.wait():
                    raise BrokenError(f"the undisturbed run failed: {run.said[-1000:]}")
                self._seconds[name] = time.monotonic() - begun
                self.results[name] = result(run.folder)
        return self.results[name]

    def seconds(self, **settings: str | int | float) -> float:
        """How long that took, from the first message to the end."""
        self.undisturbed(**settings)
        return self._seconds["_".join(f"{key}={value}" for key, value in sorted(settings.items())) or "plain"]


def started_by(leader: int) -> list[int]:
    """What a process has started, in whatever session: found by the mark that `simulation.started` gave it."""
    variables = []
    with suppress(OSError):
        variables = Path(f"/proc/{leader}/environ").read_text(errors="replace").split("\0")
    marks = [text.split()[-1] for text in variables if text.startswith(f"{simulation.STARTED}=")]
    return [process for mark in marks for process in simulation.marked(mark) if process != leader]


@contextmanager
def federation(place: Path, clocks: str = "") -> Iterator[Federation]:
    """One that runs meanwhile; with the library `clocks` each machine has a clock of its own."""
    with ExitStack() as stack:
        yield Federation(place, stack, clocks)
