"""Faults, each caused from outside at a point of a round: what is done to a run. What must hold then: trials.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from reliability.federation import SITES, BrokenError, Federation, difference, kill, result, until
from reliability.trials import Fault, Journey, Trial, last_line

PAUSE = 6.0
"""Seconds for which a process or a network stands still."""
HOUR = 3600
ART, CARTOON, PHOTO = SITES


def server_app_killed(when: str, point: str, count: int = 1) -> Fault:
    """The run begins or is resumed, its ServerApp comes to the point, and is killed."""

    def cause(trial: Trial) -> None:
        trial.points.hold(point, count)
        trial.begin()
        process = trial.stands(point)
        kill(process)
        trial.break_off()

    return Fault(f"the ServerApp is killed {when}", cause)


SERVER_APP = Journey(
    "server-app",
    [
        server_app_killed("while it waits for hellos", "server has sent query"),
        server_app_killed("when its messages are sent, before any answer", "server has sent train"),
        server_app_killed("with some answers in", "server has an answer"),
        server_app_killed("while it averages", "server averages"),
        server_app_killed(
            "while it writes the checkpoint, before the new one takes its place",
            "server puts checkpoint adapter.safetensors in place",
        ),
        server_app_killed(
            "after the checkpoint, before the next round's messages",
            "server has put checkpoint adapter.safetensors in place",
            2,
        ),
        server_app_killed(
            "between the files of the best adapter, `adapter.safetensors` and `adapter.json`",
            "server has put adapter.safetensors in place",
        ),
        server_app_killed("during the closing evaluation", "server has sent evaluate"),
        server_app_killed("while it writes summary.json", "server puts the last summary.json in place"),
    ],
)


def superlink_killed(when: str, point: str, site: str = "", count: int = 1) -> Fault:
    """It is killed while a process stands at the point, started again, and the run is resumed."""

    def cause(trial: Trial) -> None:
        trial.points.hold(point, count, site)
        trial.begin()
        trial.stands(point, site)
        trial.federation.kill_superlink()
        trial.break_off()
        trial.federation.start_superlink()

    return Fault(f"the SuperLink is killed {when}", cause)


def superlink_killed_before_messages_are_fetched(trial: Trial) -> None:
    trial.points.hold("server has put checkpoint adapter.safetensors in place")
    trial.begin()
    trial.stands("server has put checkpoint adapter.safetensors in place")
    for site in SITES:
        trial.points.hold("site asks", 1, site)
    for site in SITES:
        trial.stands("site asks", site)
    since = trial.points.now()
    trial.points.release("server has put checkpoint adapter.safetensors in place")
    trial.passes("server has sent train", since=since)
    trial.federation.kill_superlink()
    trial.break_off()
    trial.federation.start_superlink()


SUPERLINK = Journey(
    "superlink",
    [
        Fault(
            "the SuperLink is killed before a round's messages are fetched",
            superlink_killed_before_messages_are_fetched,
        ),
        superlink_killed("while sites train", "answer is being learnt", PHOTO),
        superlink_killed("while answers come in", "server has an answer"),
        superlink_killed("during the closing evaluation", "server has sent evaluate"),
    ],
)


def supernode_killed(when: str, site: str, point: str) -> Fault:
    def cause(trial: Trial) -> None:
        trial.next_round()
        trial.points.hold(point, 1, site)
        trial.stands(point, site)
        trial.federation.kill_site(site)
        trial.points.let_go()
        trial.federation.start_site(site)

    return Fault(f"a SuperNode is killed {when}", cause, site)


def supernode_killed_before_it_fetches(trial: Trial) -> None:
    trial.ensure()
    trial.passes("server averages")
    since = trial.points.now()
    trial.points.hold("site asks", 1, ART)
    trial.stands("site asks", ART)
    trial.passes("server has sent train", since=since)
    trial.federation.kill_site(ART)
    trial.points.let_go()
    trial.federation.start_site(ART)


def client_app_killed(when: str, site: str, point: str) -> Fault:
    def cause(trial: Trial) -> None:
        trial.next_round()
        trial.points.hold(point, 1, site)
        kill(trial.stands(point, site))
        since = trial.points.now()
        trial.points.let_go()
        trial.passes("site has sent its answer", site, since)

    return Fault(f"a site's ClientApp is killed {when}", cause, site)


SITES_KILLED = Journey(
    "sites",
    [
        Fault("a SuperNode is killed before it fetches its message", supernode_killed_before_it_fetches, ART),
        supernode_killed("while its ClientApp works", CARTOON, "answer is being learnt"),
        supernode_killed("after it has answered", PHOTO, "site has sent its answer"),
        client_app_killed("while it starts", ART, "answer begins"),
        client_app_killed("while it trains", CARTOON, "answer is being learnt"),
        client_app_killed("while it answers", PHOTO, "answer goes out"),
    ],
    {"num-server-rounds": 8},
)


def paused(process: int, seconds: float = PAUSE) -> None:
    """It stands still for a while, as under a debugger, in a machine that sleeps, or where others take all time."""
    os.kill(process, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(process, signal.SIGCONT)


def superlink_paused(trial: Trial) -> None:
    trial.next_round()
    paused(trial.federation.link.process.pid)


def server_app_paused(trial: Trial) -> None:
    trial.ensure()
    paused(trial.passes("server has an answer"))


def supernode_paused(trial: Trial) -> None:
    trial.ensure()
    trial.passes("site has taken a message", ART)
    paused(trial.federation.nodes[ART].process.pid)


def client_app_paused(trial: Trial) -> None:
    trial.ensure()
    paused(trial.passes("answer is being learnt", CARTOON))


def network_cut(trial: Trial) -> None:
    trial.ensure()
    trial.passes("answer is being learnt", PHOTO)
    relay = trial.federation.relays[PHOTO]
    relay.cut()
    time.sleep(PAUSE)
    relay.mend()


def network_cut_for_long(trial: Trial) -> None:
    """For longer than it takes until the SuperLink thinks that the site is gone."""
    trial.next_round()
    relay = trial.federation.relays[CARTOON]
    relay.cut()
    time.sleep(5 * PAUSE)
    relay.mend()


PAUSES = Journey(
    "pauses",
    [
        Fault(f"the SuperLink stands still for {PAUSE:.0f} s (SIGSTOP, SIGCONT)", superlink_paused),
        Fault("the same of the ServerApp", server_app_paused),
        Fault("the same of a SuperNode", supernode_paused, ART),
        Fault("the same of a site's ClientApp", client_app_paused, CARTOON),
        Fault(f"a site's network is cut for {PAUSE:.0f} s in the middle of a round", network_cut, PHOTO),
        Fault(f"the same for {5 * PAUSE:.0f} s: the SuperLink takes the site for gone", network_cut_for_long, CARTOON),
    ],
    {"num-server-rounds": 8},
)


def supernode_paused_for_long(trial: Trial) -> None:
    """Until its round has gone on without it; then its late answer comes."""
    trial.next_round()
    trial.passes("site has taken a message", ART)
    process = trial.federation.nodes[ART].process.pid
    since = trial.points.now()
    os.kill(process, signal.SIGSTOP)
    try:
        trial.passes("server averages", since=since)
    finally:
        os.kill(process, signal.SIGCONT)
    trial.passes("site has sent its answer", ART, since)
    until(lambda: trial.run.lines_of_all(len(SITES), 2), "a later round with all sites")


LEFT_BEHIND = Journey(
    "left-behind",
    [Fault("a SuperNode stands still for longer than `round-timeout`", supernode_paused_for_long, ART)],
    {"min-sites": 2, "round-timeout": 15.0},  # shorter than it takes until the SuperLink thinks that it is gone
    {ART: "no answer within 15 s"},
)


@contextmanager
def small_disk(place: Path, megabytes: int = 24) -> Iterator[Callable[[], Path]]:
    """A file system with so much room, mounted there; what is called fills it up, to be removed again."""
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BrokenError(
            f"no small disk can be made here ({done.stderr.strip()}): be root, or put `unshare --map-root-user "
            "--mount` before the command"
        )

    def fill() -> Path:
        path = place / "filling"
        with path.open("wb") as file, suppress(OSError):
            for size in (1 << 20, 1 << 10, 1):
                with suppress(OSError):
                    while True:
                        os.write(file.fileno(), bytes(size))
        return path

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def full(disk: Path, fill: Callable[[], Path]) -> Iterator[None]:
    """Meanwhile the small disk has no room."""
    filling = fill()
    yield
    filling.unlink()


@contextmanager
def read_only(disk: Path, fill: Callable[[], Path]) -> Iterator[None]:
    """Meanwhile nothing can be written to the small disk, as after an error of a real one."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def results_fail(
    when: str, failing: Callable[[Path, Callable[[], Path]], AbstractContextManager[None]], word: str
) -> Fault:
    """From the middle of a run on its folder can't be written to; once it can, the run is resumed."""

    def cause(trial: Trial) -> None:
        with small_disk(trial.results) as fill:
            trial.points.hold("server has put checkpoint adapter.safetensors in place", 2)
            trial.begin()
            trial.stands("server has put checkpoint adapter.safetensors in place")
            with failing(trial.results, fill):
                trial.points.let_go()
                said = trial.ended()
            if word not in said:
                raise BrokenError(f"the error of the disk is not reported: {last_line(said)}")
            trial.notes.append(last_line(said).replace(str(trial.results), "DIR"))
            trial.begin()
            if trial.run.wait():
                raise BrokenError(f"once it could be written to, the run failed: {last_line(trial.run.said)}")
            kept = trial.results.with_name(f"{trial.results.name}-kept")
            shutil.copytree(trial.results, kept, symlinks=True)
        shutil.copytree(kept, trial.results, symlinks=True, dirs_exist_ok=True)

    return Fault(f"the disk of `results-dir` {when} in the middle of a run (a tmpfs)", cause)


RESULTS_FULL = Journey("disk", [results_fail("is full", full, "No space left on device")])
RESULTS_READ_ONLY = Journey("read-only", [results_fail("becomes read-only", read_only, "Read-only file system")])


def site_disk_full(trial: Trial) -> None:
    home = trial.federation.home(ART) / "exchange"
    with small_disk(home) as fill:
        trial.begin()
        trial.passes("server averages")
        filling = fill()
        until(lambda: any(f["site"] == ART for f in trial.run.summary().get("failures", [])), "a word of the site's")
        filling.unlink()
        until(lambda: trial.run.lines_of_all(len(SITES), 2), "a later round with all sites")
        trial.finish()


SITE_FULL = Journey(
    "site-disk",
    [Fault("a site's disk is full (a tmpfs; `codec=int8`, which keeps what rounding takes away)", site_disk_full, ART)],
    {"min-sites": 2, "codec": "int8", "num-server-rounds": 8},
    {ART: "No space left on device"},
)


@contextmanager
def superlink_on_a_small_disk(federation: Federation) -> Iterator[Callable[[], Path]]:
    """Meanwhile all that the SuperLink keeps is on such a disk."""
    flower, beside = federation.link.folder, federation.place / "beside"
    federation.stop_superlink()
    shutil.copytree(flower, beside)
    try:
        with small_disk(flower, 64) as fill:
            shutil.copytree(beside, flower, dirs_exist_ok=True)
            federation.start_superlink()
            try:
                yield fill
            finally:
                federation.stop_superlink()
                shutil.copytree(flower, beside, dirs_exist_ok=True)
    finally:
        shutil.copytree(beside, flower, dirs_exist_ok=True)
        shutil.rmtree(beside)
    federation.start_superlink()


def superlink_disk_full(trial: Trial) -> None:
    """Its database can't grow; then there is room again, and the run is resumed if it ended."""
    with superlink_on_a_small_disk(trial.federation) as fill:
        trial.begin()
        trial.passes("server averages")
        filling = fill()
        time.sleep(2 * PAUSE)
        filling.unlink()
        if trial.status():
            trial.notes.append(last_line(trial.run.said))
            trial.begin()
            if trial.status():
                raise BrokenError(f"with room again, the run failed: {last_line(trial.run.said)}")


SUPERLINK_FULL = Journey(
    "superlink-disk", [Fault("the disk of the SuperLink is full (a tmpfs), and has room again", superlink_disk_full)]
)


def stopped(trial: Trial) -> None:
    trial.begin()
    trial.passes("server has put checkpoint adapter.safetensors in place")
    link = trial.federation.link
    (number,) = (str(run["run-id"]) for run in link.ask("list")["runs"] if run["status"].startswith("running"))
    link.ask("stop", number)
    until(lambda: trial.run.summary()["status"] == "stopped", "a summary that tells of the end")
    trial.notes.append(trial.run.summary()["why"].replace(trial.name, "NAME"))
    trial.ended()
    trial.begin()


STOPPED = Journey("stop", [Fault("the run is ended by `flwr stop`", stopped)])


def second_run_on_the_same_folder(trial: Trial) -> None:
    trial.begin()
    trial.passes("server has put checkpoint adapter.safetensors in place")
    with trial.federation.run(trial.results, **trial.settings, resume=trial.name) as second:
        if not second.wait():
            raise BrokenError("a second run on the same folder was completed")
        if "still under way" not in second.said:
            raise BrokenError(f"the second run does not say why it is refused: {last_line(second.said)}")
        trial.notes.append(f"the second one: {last_line(second.said)}")


SECOND = Journey(
    "second", [Fault("a second run resumes a folder whose run goes on: it is refused", second_run_on_the_same_folder)]
)


def two_at_once(trial: Trial) -> None:
    trial.begin()
    with trial.federation.run(trial.results, **trial.settings) as other:
        trial.finish()
        if other.wait():
            raise BrokenError(f"the other run failed: {last_line(other.said)}")
        unlike = difference(result(other.folder), trial.federation.undisturbed(**trial.settings))
        if unlike:
            raise BrokenError(f"the other run's result is not the undisturbed one: {', '.join(unlike)}")


TWO = Journey("two", [Fault("two runs at once with the same sites and `results-dir`", two_at_once)])


def machine_fails(trial: Trial) -> None:
    """Everything at once; a line that was being written is left half written, and a temporary file beside the whole."""
    trial.points.hold("server has an answer", len(SITES) + 1)  # in round 2
    trial.begin()
    trial.stands("server has an answer")
    trial.federation.kill_all()
    trial.break_off()
    with (trial.run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 1, "se')
    (trial.run.folder / "checkpoint" / ".adapter.safetensors.0123456789abcdef").write_bytes(b"half")
    trial.federation.start_all()


MACHINE = Journey(
    "machine",
    [
        Fault(
            "the power fails: all processes are killed at once, a line of metrics.jsonl is half written", machine_fails
        )
    ],
)


def clock_jumps(where: str, machines: Sequence[str], hours: int, right_again: bool = True) -> Fault:
    """The clocks of these machines (the server's name is empty) jump while sites are at work."""

    def cause(trial: Trial) -> None:
        trial.next_round()
        for machine in machines:
            trial.federation.set_clock(hours * HOUR, machine)
        time.sleep(2 * PAUSE)
        for machine in machines if right_again else ():
            trial.federation.set_clock(0, machine)

    site = machines[0] if len(machines) == 1 else ""
    way = f"{abs(hours)} h {'forward' if hours > 0 else 'back'}"
    after = f", and is set right after {2 * PAUSE:.0f} s" if right_again else ""
    return Fault(f"the clock {where} jumps {way} in the middle of a round{after}", cause, site)


CLOCK = Journey(
    "clock",
    [
        clock_jumps("of a site", [CARTOON], 2),
        clock_jumps("of the server", [""], -2),
        clock_jumps("of the server", [""], 2),
        clock_jumps("of all machines", ["", *SITES], 2, right_again=False),
    ],
    {"num-server-rounds": 8},
    ends=True,
)
ALONE = (CLOCK,)
JOURNEYS = (
    SERVER_APP,
    SUPERLINK,
    SITES_KILLED,
    PAUSES,
    LEFT_BEHIND,
    RESULTS_FULL,
    RESULTS_READ_ONLY,
    SITE_FULL,
    SUPERLINK_FULL,
    STOPPED,
    SECOND,
    TWO,
    MACHINE,
)
