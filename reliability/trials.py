"""A run that is broken: what befalls it, what its owner and the server's administrator then do, and what must hold.

Several faults fall on one run, one after the other: a journey. What was killed is started again (systemd does that),
and a run that ended is handed over again with `resume`. In the end the run is compared with an undisturbed one. Sites
that lose an answer make their round count too few (`min-sites` is all of them), and it is repeated; journeys that can
do with fewer have to name who was left out.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedclip_flwr.base import UserError
from reliability.federation import BrokenError, Federation, Result, Run, difference, result, until

REFUSED = "This run can't continue. "
SAME = "the same adapter and figures, to the bit"


class Outcome(NamedTuple):
    """A fault and what became of it."""

    fault: str
    text: str
    good: bool


class Trial:
    """A run with what befalls it."""

    def __init__(
        self, federation: Federation, results: Path, settings: Mapping[str, str | int | float], ends: bool = False
    ) -> None:
        self.federation, self.points = federation, federation.points
        self.results, self.settings, self._ends = results, settings, ends
        self.start_notes()
        self._stack = ExitStack()
        self._run: Run | None = None
        self._broken_off = False

    @property
    def run(self) -> Run:
        assert self._run is not None
        return self._run

    @property
    def name(self) -> str:
        return self.run.folder.name

    def begin(self) -> None:
        """Hands the run over; if it was begun before, to be resumed."""
        settings = {**self.settings, "resume": self.name} if self._run else self.settings
        self._stack.close()
        self._run = self._stack.enter_context(self.federation.run(self.results, **settings))
        self._broken_off = False

    def ensure(self) -> None:
        """The run is under way, begun or resumed if need be."""
        if self._run and self.run.process.poll():
            if not self._ends:
                raise BrokenError(f"the run failed: {last_line(self.run.said)}")
            self.notes.append(f"it ended, and was resumed: {last_line(self.run.said)}")
            self.begin()
        elif not self._run:
            self.begin()

    def passes(self, point: str, site: str = "", since: int | None = None) -> int:
        """The process (of that site) that comes there next, or has since then; the run has to go on meanwhile."""
        since = self.points.now() if since is None else since
        found = self._while_it_runs(lambda: self.points.first(point, since, site), point)
        return int(found["process"])

    def stands(self, point: str, site: str = "") -> int:
        """The process that stands still there, once there is one."""
        found: int = self._while_it_runs(lambda: self.points.standing(point, site), point)
        return found

    def next_round(self) -> None:
        """Until a round's messages are sent; the run is begun, or resumed where it may end by itself."""
        self.ensure()
        since = self.points.now()
        try:
            self.passes("server has sent train", since=since)
        except BrokenError:
            self.ensure()
            self.passes("server has sent train", since=since)

    def _while_it_runs(self, found: Callable[[], Any], point: str) -> Any:
        def found_or_over() -> Any:
            self.federation.supervise()
            return found() or (self.run.process.poll() is not None and "over")

        it = until(found_or_over, f"a process that comes to where it {point!r}")
        if it == "over":
            raise BrokenError(
                f"the run was over before a process came to where it {point!r}: {last_line(self.run.said)}"
            )
        return it

    def start_notes(self) -> list[str]:
        """From now on what is worth telling is noted here."""
        self.notes: list[str] = []
        return self.notes

    def leave(self) -> None:
        self._stack.close()

    def break_off(self) -> None:
        """The run has lost its ServerApp, which the SuperLink will see after a while: nobody waits for that."""
        self.points.let_go()
        self.leave()
        self._broken_off = True

    def ended(self) -> str:
        """What the run said; it ended, and not as completed."""
        if not self.run.wait():
            raise BrokenError("the run was completed, where it had to end")
        return self.run.said

    def finish(self) -> None:
        """The run is completed, resumed if need be."""
        self.points.let_go()
        if self._broken_off:
            self.begin()
        if self.status() and self._ends:
            self.ensure()
        if self.status():
            raise BrokenError(f"the run failed: {last_line(self.run.said)}")

    def status(self) -> int:
        """The run's exit status, once it is over."""

        def over() -> bool:
            self.federation.supervise()
            return self.run.process.poll() is not None

        until(over, "the end of the run")
        return self.run.wait()


def last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line.removeprefix(REFUSED) for line in lines if line.startswith(REFUSED)]
    return (own or lines or ["it said nothing"])[-1][:300]


@dataclass(frozen=True)
class Fault:
    """What happens, in words and in deed; and to which site, if to one."""

    name: str
    cause: Callable[[Trial], None]
    site: str = ""


@dataclass(frozen=True)
class Journey:
    """A run on which these faults fall. Where sites may be `left_out`, they must be named, each with such a reason.

    Where it may end by itself (`ends`), it is resumed, and its last words are reported.
    """

    name: str
    faults: Sequence[Fault]
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    ends: bool = False


def go(federation: Federation, journey: Journey, say: Callable[[str], None]) -> list[Outcome]:
    """What becomes of each of its faults."""
    trial = Trial(federation, federation.place / "results" / journey.name, journey.settings, journey.ends)
    notes: list[list[str]] = []
    try:
        expected = None if journey.left_out else federation.undisturbed(**journey.settings)
        for fault in journey.faults:
            say(f"{journey.name}: {fault.name}")
            notes.append(trial.start_notes())
            fault.cause(trial)
        trial.finish()
        failures = {(failure["site"], failure["why"]): None for failure in trial.run.summary()["failures"]}
        text, good = judged(journey, trial, expected, list(failures))
    except (BrokenError, UserError, OSError, subprocess.SubprocessError) as error:
        happened = [fault.name for fault in journey.faults[: len(notes)]]
        return [
            *(Outcome(name, "its run came to no end", False) for name in happened[:-1]),
            *(Outcome(name, str(error), False) for name in happened[-1:]),
            *(Outcome(fault.name, f"not reached: {error}", False) for fault in journey.faults[len(notes) :]),
        ]
    finally:
        trial.leave()
        federation.heal()

    def noted(fault: Fault, own: list[str]) -> str:
        words = [*(f"{site}: {why}" for site, why in failures if site == fault.site), *own]
        return f" ({'; '.join(words)})" if words else ""

    return [
        Outcome(fault.name, text + noted(fault, own), good) for fault, own in zip(journey.faults, notes, strict=True)
    ]


def judged(
    journey: Journey, trial: Trial, expected: Result | None, failures: Sequence[tuple[str, str]]
) -> tuple[str, bool]:
    """What the run came to, in words, and whether that is what was promised."""
    if expected:
        unlike = difference(result(trial.run.folder), expected)
        return (f"not the undisturbed result: {', '.join(unlike)}" if unlike else SAME), not unlike
    named = {site for site, why in failures if journey.left_out.get(site, "-") in why}
    lacking = sorted({*journey.left_out} - named)
    return (
        f"not named: {', '.join(lacking)}" if lacking else "left out of its round and named; completed"
    ), not lacking
