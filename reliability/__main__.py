"""Breaks a federation of real processes in every way that it should survive, and writes docs/reliability.md.

    python -m reliability [NAME…] [--seed N]

NAME is a journey of faults.py, or kills, soak or fuzz; without names all of it is done, which takes an hour and a half
on two cores. What was found is kept part by part, so that single ones can be done again: in docs/reliability.json, or
in docs/reliability-http.json with Flower's HTTP line. The page is made of both. The exit status is 1 if anything that
was promised did not hold; the page then says so, too. The small disks need root (or `unshare --map-root-user --mount`
before the command), the clocks a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple
from xml.etree import ElementTree

from filelock import FileLock

from fedclip_flwr.base import UserError, content
from fedclip_flwr.flower import lines
from fedclip_flwr.operations import simulation
from harness.machine import OURS, machine, table
from reliability import faults, kills, trials
from reliability.federation import INJECTED, BrokenError, Result, federation
from reliability.soak import GROWTH, HANDLES, LAST, Soak, flat, grown, named, soak

PAGE = OURS / "docs" / "reliability.md"
FOUND = {"grpc": PAGE.with_suffix(".json"), "http": PAGE.with_name("reliability-http.json")}
FUZZ = OURS / "tests" / "fuzz"
HEARTBEAT = 10
"""Seconds between signs of life in the processes that are started here: the shortest that Flower takes. The dead are
missed after two of them."""
JOURNEYS = {journey.name: journey for journey in faults.JOURNEYS}
ALONE = {journey.name: journey for journey in faults.ALONE}
"""Those for which each machine must have a clock of its own."""
NAMES = [*JOURNEYS, *ALONE, "kills", "soak", "fuzz"]


class Part(NamedTuple):
    """What was found: a table's rows or a text, how many promises did not hold, and with what, where, in how long."""

    rows: Sequence[Sequence[str]]
    text: str
    broken: int
    package: str = ""
    seconds: float = 0.0
    machine: str = ""


Found = Mapping[str, Part]


def of_outcomes(outcomes: Sequence[trials.Outcome]) -> Part:
    rows = [[one.fault, one.text if one.good else f"**FAILED**: {one.text}"] for one in outcomes]
    return Part(rows, "", sum(not one.good for one in outcomes))


def clocks(place: Path) -> str:
    """The library with which a process has another time of day, made there."""
    library = place / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(INJECTED / "clock.c")]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BrokenError(f"clocks can't be moved here without a C compiler, `cc` ({error})") from None
    return str(library)


def journeys(names: Sequence[str], seed: int, say: Callable[[str], None]) -> Iterator[tuple[str, Part]]:
    """The chosen faults and kills, each with its outcomes as soon as they are known."""
    known: dict[str, Result] = {}
    common = [journey for name, journey in JOURNEYS.items() if name in names]
    if common or "kills" in names:
        with TemporaryDirectory() as place, federation(Path(place)) as one:
            one.results = known
            for journey in common:
                yield journey.name, of_outcomes(reported(trials.go(one, journey, say), say))
            if "kills" in names:
                found = of_outcomes(reported(kills.go(one, kills.drawn(seed), say), say))
                yield "kills", found._replace(text=f"Seed {seed}: `python -m reliability kills --seed {seed}`.")
    if alone := [journey for name, journey in ALONE.items() if name in names]:
        try:
            with TemporaryDirectory() as place, federation(Path(place), clocks(Path(place))) as one:
                one.results = known
                for journey in alone:
                    yield journey.name, of_outcomes(reported(trials.go(one, journey, say), say))
        except (BrokenError, UserError) as error:
            for journey in alone:
                yield (
                    journey.name,
                    of_outcomes([trials.Outcome(fault.name, str(error), False) for fault in journey.faults]),
                )


def reported(outcomes: list[trials.Outcome], say: Callable[[str], None]) -> list[trials.Outcome]:
    for one in outcomes:
        say(f"  {'' if one.good else 'FAILED '}{one.fault}: {one.text}")
    return outcomes


def soaked(seed: int, say: Callable[[str], None]) -> Part:
    """The long run's part of the page."""
    with TemporaryDirectory() as place:
        os.environ["FEDCLIP_HOME"] = str(Path(place) / "home")
        of, begun = Soak(Path(place), seed=seed), time.monotonic()
        try:
            summary = soak(of, say)
        except (BrokenError, UserError) as error:
            return Part([], f"**FAILED**: {error}", 1)
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
    return Part([], "\n\n".join(text), sum(not good for *_, good in checks))


def fuzzed(say: Callable[[str], None]) -> Part:
    """The fuzz tests with many inputs."""
    say("fuzz tests")
    with TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(FUZZ), "-m", "", "--hypothesis-profile", "soak", "-q"]
        subprocess.run([*command, f"--junitxml={report}", "-o", "junit_family=xunit1"], cwd=OURS)
        return of_report(report)


def of_report(report: Path) -> Part:
    """What the tests that count their inputs say of themselves, and whatever failed."""
    if not report.exists():
        return Part([], "**FAILED**: the tests came to no end.", 1)
    rows, broken = [], 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = any(case.find(kind) is not None for kind in ("failure", "error"))
        counts = {str(one.get("name")): int(str(one.get("value"))) for one in case.iter("property")}
        if counts or bad:
            kind, name = (str(case.get(key)).rpartition("test_")[2].replace("_", " ") for key in ("classname", "name"))
            numbers = (f"{counts.get(what, 0):,}" for what in ("inputs", "refused"))
            rows.append([f"{kind}: {name}", *numbers, "**FAILED**" if bad else "held"])
            broken += bad
    return Part(rows, "", broken + (not rows))


PROMISES = """\
What a run survives, tried with real processes: a SuperLink, SuperNodes with keys and TLS, the ServerApp and the
processes in which sites answer. `python -m reliability` does all of it and writes this page.

**What is promised.** Whatever is killed, at any moment, nothing is lost but the round under way: with `resume='NAME'`
the run goes on after its last complete round and ends with the very adapter that it would have come to, to the bit. A
site that fails, hangs or sends what can't be used is left out of its round, and named with its reason in
`summary.json`; where fewer than `min-sites` are left, the round is repeated. A run that can't go on says why, and how
it is resumed. Two runs can't go on in one folder."""


FAULTS = f"""\
Each fault is caused from outside (SIGKILL, SIGSTOP, a relay that lets nothing through, a tmpfs that is full or
read-only, another clock) while the process that it falls on stands still at the point that is named. Then what was
killed is started again, as systemd does it, and a run that ended is resumed, as its owner would. In brackets is who was
named meanwhile. To save time, signs of life come every {HEARTBEAT} s, where Flower has 30."""
KILLS = """\
`kill -9` at moments drawn at random from the whole run, not at chosen points; then the run is resumed."""
SOAKED = """\
Sites spoil their answers at random all the time, and processes are killed; the last ones then have two hundred rounds
in which nothing may grow. Sites answer with the real ClientApp, all in one process. This is the gRPC line's."""
FUZZED = """\
Files, messages and settings that strangers might make, most of them whole ones that were changed at random:
`pytest tests/fuzz -m "" --hypothesis-profile soak`. Each is taken, left out and counted, or refused in one plain line;
none may crash, take longer than a minute or make memory grow by half a gigabyte (a gigabyte and a half for images, of
which the largest that is read has 89 million pixels)."""


def page(found: Found, http: Found) -> str:
    """The complete page; it names what has not been done. `http`: found with Flower's HTTP line."""
    parts = {name: found.get(name, Part([], f"**Not done: {name}.**", 1)) for name in NAMES}
    faulty = [*JOURNEYS, *ALONE]
    undone = " ".join(parts[name].text for name in faulty if parts[name].text)
    chunks = [
        f"# Reliability\n\n{PROMISES}\n\n```text\n{head(found)}\n{head(http)}\n```",
        f"## Faults\n\n{FAULTS}\n\n{beside('fault', faulty, parts, http)}\n\n{undone}".rstrip(),
        f"## Killed at random moments\n\n{KILLS} {parts['kills'].text}\n\n"
        + beside("run, and what is killed", ["kills"], parts, http),
        f"## Soak\n\n{SOAKED}\n\n{parts['soak'].text}",
        f"## Fuzzing\n\n{FUZZED} {parts['fuzz'].text}\n\n"
        + table(["inputs", "tried", "refused in words", "outcome"], parts["fuzz"].rows),
    ]
    return "\n\n".join(chunks) + "\n"


def head(found: Found) -> str:
    """Where, with what and in how long that was found."""
    machines, packages = ({getattr(part, key) for part in found.values()} - {""} for key in ("machine", "package"))
    content_ = ", ".join(sorted(package[:12] for package in packages))
    seconds = sum(part.seconds for part in found.values())
    return f"{'; '.join(sorted(machines))}\nin all {seconds:.0f} s, content of the package: {content_}"


def beside(what: str, names: Sequence[str], found: Found, http: Found) -> str:
    """A table of these parts' outcomes on both lines."""
    sides = [{row[0]: row[1] for name in names if name in of for row in of[name].rows} for of in (found, http)]
    rows = [[fault, *(side.get(fault, "not done") for side in sides)] for fault in {**sides[0], **sides[1]}]
    return table([what, "outcome, gRPC line", "HTTP line"], rows)


def read(file: Path) -> dict[str, Part]:
    return {name: Part(**facts) for name, facts in json.loads(file.read_text()).items()} if file.exists() else {}


def keep(name: str, part: Part) -> None:
    """What was found takes the place of what was found before; the page follows."""
    with FileLock(Path(gettempdir()) / "fedclip-reliability.lock"):  # parts may be done side by side
        own = FOUND[lines.line().name]
        known = {**read(own), name: part}
        own.write_text(json.dumps({name: known[name]._asdict() for name in NAMES if name in known}, indent=1) + "\n")
        PAGE.write_text(page(*map(read, FOUND.values())))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of what is random; printed, so that a run can be repeated"
    )
    given = parser.parse_args()
    if strange := [name for name in given.names if name not in NAMES]:
        parser.error(f"{', '.join(strange)}: expected {', '.join(NAMES)}")
    os.environ["RELIABILITY_HEARTBEAT"] = str(HEARTBEAT)  # for injected/sitecustomize.py
    simulation.stop_in_order("Stopped: what was found so far is kept.")
    chosen, begun = given.names or NAMES, time.monotonic()
    package, since, broken = content.of_package(content.memory()), begun, 0

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True)

    def parts() -> Iterator[tuple[str, Part]]:
        yield from journeys(chosen, given.seed, say)
        if "soak" in chosen:
            yield "soak", soaked(given.seed, say)
        if "fuzz" in chosen:
            yield "fuzz", fuzzed(say)

    say(f"seed {given.seed}")
    for name, part in parts():
        keep(name, part._replace(package=package, seconds=time.monotonic() - since, machine=machine()))
        since, broken = time.monotonic(), broken + part.broken
    print(f"\n{PAGE.read_text()}\nWritten: {PAGE}")
    if broken:
        raise SystemExit(f"{broken} promises did not hold: see FAILED above")


if __name__ == "__main__":
    main()
