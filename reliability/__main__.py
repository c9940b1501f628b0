"""Breaks a federation of real processes in every way that it should survive, and writes docs/reliability.md.

    python -m reliability [NAME…] [--seed N]

NAME is a journey of faults.py, or kills, soak or fuzz; with names only these are done, and the page is left as it is.
The exit status is 1 if anything that was promised did not hold; the page then says so, too. It takes half an hour on
two cores, as root (or behind `unshare --map-root-user --mount`) for the small disks, and with a C compiler for the
clocks.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.common import OURS, machine, table
from fedclip_flwr import simulation
from fedclip_flwr.errors import UserError
from reliability import faults, kills
from reliability.faults import Outcome
from reliability.federation import HEARTBEAT, INJECTED, BrokenError, Result, federation
from reliability.soak import GROWTH, HANDLES, LAST, Soak, flat, grown, named, soak

PAGE = OURS / "docs" / "reliability.md"
FUZZ = OURS / "tests" / "fuzz"
JOURNEYS = {journey.name: journey for journey in faults.JOURNEYS}
ALONE = {journey.name: journey for journey in faults.ALONE}
"""Those for which each machine must have a clock of its own."""


class Part(NamedTuple):
    """A part of the page, and how many of its promises did not hold."""

    text: str
    broken: int


def outcomes_table(head: str, outcomes: Sequence[Outcome]) -> Part:
    rows = [[one.fault, one.told if one.good else f"**FAILED**: {one.told}"] for one in outcomes]
    return Part(table([head, "outcome"], rows), sum(not one.good for one in outcomes))


def clocks(place: Path) -> str:
    """The library with which a process has another time of day, made there."""
    library = place / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(INJECTED / "clock.c")]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BrokenError(f"clocks can't be moved here without a C compiler, `cc` ({error})") from None
    return str(library)


def disturbed(names: Sequence[str], seed: int, say: Callable[[str], None]) -> tuple[list[Outcome], list[Outcome]]:
    """The outcomes of the chosen faults, and those of the kills."""
    found: list[Outcome] = []
    killed: list[Outcome] = []
    known: dict[str, Result] = {}
    common = [journey for name, journey in JOURNEYS.items() if name in names]
    if common or "kills" in names:
        with TemporaryDirectory() as place, federation(Path(place)) as one:
            one.results = known
            for journey in common:
                found += told(faults.go(one, journey, say), say)
            if "kills" in names:
                killed = told(kills.go(one, kills.drawn(seed), say), say)
    if alone := [journey for name, journey in ALONE.items() if name in names]:
        try:
            with TemporaryDirectory() as place, federation(Path(place), clocks(Path(place))) as one:
                one.results = known
                for journey in alone:
                    found += told(faults.go(one, journey, say), say)
        except (BrokenError, UserError) as error:
            found += told([Outcome(fault.name, str(error), False) for one in alone for fault in one.faults], say)
    return found, killed


def told(outcomes: list[Outcome], say: Callable[[str], None]) -> list[Outcome]:
    for one in outcomes:
        say(f"  {'' if one.good else 'FAILED '}{one.fault}: {one.told}")
    return outcomes


def soaked(seed: int, say: Callable[[str], None]) -> Part:
    """The long run's part of the page."""
    with TemporaryDirectory() as place:
        os.environ["FEDCLIP_HOME"] = str(Path(place) / "home")
        of, begun = Soak(Path(place), seed=seed), time.monotonic()
        try:
            summary = soak(of, say)
        except (BrokenError, UserError) as error:
            return Part(f"**FAILED**: {error}", 1)
    checks: list[tuple[str, str, bool]] = []
    rows = []
    for name, samples in of.samples.items():
        share, handles = grown(samples)
        last = [sample for sample in samples if sample.process == samples[-1].process]
        figures = [f"{mean(s.memory for s in last[-LAST:]) / 1e6:.0f} MB", f"{100 * share:+.1f} %"]
        rows.append([name, str(len(last)), *figures, str(last[-1].handles), f"{handles:+d}"])
        checks.append((f"{name} stays as it was", "memory and file handles are flat", flat(samples)))
    missed = named(of, summary["failures"])
    spoilt = {what: sum(one.what == what for one in of.spoilt) for what in sorted({one.what for one in of.spoilt})}
    checks += [
        ("every spoilt answer is named", f"forgotten: {missed.forgotten or 'none'}", not missed.forgotten),
        ("nobody else is named", f"named without cause: {missed.wrongly or 'none'}", not missed.wrongly),
        ("all rounds", f"{summary['rounds']} of {of.rounds}", summary["rounds"] == of.rounds),
    ]
    head = ["process", "rounds since its start", "memory", "grown by", "file handles", "grown by"]
    text = [
        f"{of.rounds} rounds of {of.count} sites took {time.monotonic() - begun:.0f} s. Spoilt answers: "
        + ", ".join(f"{what} {count}" for what, count in spoilt.items())
        + f". Processes were killed or started again after rounds {', '.join(map(str, of.begun[1:]))}; seed {seed}.",
        table(head, rows),
        f"Compared are the last {LAST} rounds with {LAST} soon after the process's start; allowed: "
        f"{100 * GROWTH:.0f} % and {HANDLES} file handles.",
        table(["check", "found"], [[what, found if good else f"**FAILED**: {found}"] for what, found, good in checks]),
    ]
    return Part("\n\n".join(text), sum(not good for *_, good in checks))


def fuzzed(say: Callable[[str], None]) -> Part:
    """What the fuzz tests say of themselves."""
    say("fuzz tests")
    with TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(FUZZ), "-m", "", "--hypothesis-profile", "soak", "-q"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=OURS)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    rows, broken = [], 0
    for case in cases:
        bad = case.find("failure") is not None or case.find("error") is not None
        inputs = sum(int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "inputs")
        name = str(case.get("name")).removeprefix("test_").replace("_", " ")
        rows.append([name, f"{inputs:,}", "**FAILED**" if bad else "held"])
        broken += bad
    return Part(table(["what must hold", "inputs", "outcome"], rows), broken + (not rows))


PROMISES = """\
What a run survives, tried with real processes: a SuperLink, SuperNodes with keys and TLS, the ServerApp and the
processes in which sites answer. `python -m reliability` does all of it and writes this page.

**What is promised.** Whatever is killed, at any moment, nothing is lost but the round under way: with `resume='NAME'`
the run goes on after its last complete round and ends with the very adapter that it would have come to, to the bit. A
site that fails, hangs or sends what can't be used is left out of its round, and named with its reason in
`summary.json`; where fewer than `min-sites` are left, the round is repeated. A run that can't go on says why, and how
it is resumed. Two runs can't go on in one folder."""


def page(parts: Sequence[tuple[str, str, str]], seconds: float) -> str:
    head = f"# Reliability\n\n{PROMISES}\n\n```\n{machine()}\nall of it: {seconds:.0f} s\n```"
    return "\n\n".join([head, *(f"## {title}\n\n{words}\n\n{text}" for title, words, text in parts)]) + "\n"


FAULTS = f"""\
Each fault is caused from outside (SIGKILL, SIGSTOP, a relay that lets nothing through, a full tmpfs, another clock)
while the process that it falls on stands still at the point that is named. Then what was killed is started again, as
systemd does it, and a run that ended is resumed, as its owner would. In brackets is who was named meanwhile. To save
time, signs of life come every {HEARTBEAT} s, where Flower has 30."""
KILLS = """\
`kill -9` at moments drawn at random from the whole run, not at chosen points; then the run is resumed."""
SOAKED = """\
Sites spoil their answers at random all the time, and processes are killed; the last ones then have two hundred rounds
in which nothing may grow. Sites answer with the real ClientApp, all in one process."""
FUZZED = """\
Messages, files and settings that were made up at random, by `pytest tests/fuzz`."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__.splitlines()[0])
    names = [*JOURNEYS, *ALONE, "kills", "soak", *(["fuzz"] if FUZZ.is_dir() else [])]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is random; told, to be repeated")
    given = parser.parse_args()
    if strange := [name for name in given.names if name not in names]:
        parser.error(f"{', '.join(strange)}: expected {', '.join(names)}")
    simulation.stop_in_order("Stopped: the page is as it was.")
    chosen, begun = given.names or names, time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True)

    say(f"seed {given.seed}")
    found, killed = disturbed(chosen, given.seed, say)
    parts: list[tuple[str, str, Part]] = []
    if found:
        parts.append(("Faults", FAULTS, outcomes_table("fault", found)))
    if killed:
        words = f"{KILLS} Seed {given.seed}: `python -m reliability kills --seed {given.seed}` draws the same."
        parts.append(("Killed at random moments", words, outcomes_table("run, and what is killed", killed)))
    if "soak" in chosen:
        parts.append(("Soak", SOAKED, soaked(given.seed, say)))
    if "fuzz" in chosen:
        parts.append(("Fuzzing", FUZZED, fuzzed(say)))
    text = page([(title, words, part.text) for title, words, part in parts], time.monotonic() - begun)
    print(f"\n{text}")
    if not given.names:
        PAGE.write_text(text)
        print(f"Written: {PAGE}")
    if broken := sum(part.broken for *_, part in parts):
        raise SystemExit(f"{broken} promises did not hold: see FAILED above")


if __name__ == "__main__":
    main()
