"""A round of three sites over gRPC, beside Flower's own FedAvg and beside Flower alone; and what a site needs for it.

    python -m benchmarks.deployed [--rounds 5] [--runs 2] [--bytes-rounds 3] [--single-rounds 8] [--rows 2000]

A SuperLink and three SuperNodes on this machine; each SuperNode has a feature folder of its own, with random features
of 512 dimensions. In turn on the same SuperNodes: this project's app, Flower's FedAvg with the same tensors, work and
rows, and an app that sends the same tensors back unchanged, imports neither torch nor this package at the sites, and
is asked once a round. A round is the time from one round's line to the next one's. To reach: at most 0.45 times
FedAvg's, and at most 2.5 s more than Flower alone.

Bytes on the wire are counted between the SuperNodes and the SuperLink, by a relay that passes on what it gets: they
hold all that gRPC and Flower add, also requests for messages when there are none.

The process in which a site answers is watched with one SuperNode alone, all but the first and the last of a run: how
much of it was in memory at most (VmHWM), and its life, from the start that the kernel noted until it was gone, of which
Flower's own imports, exchange with the SuperNode and end are a part. To reach: less than 350 MB and 2.2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.common import ECHO, STOCK, Run, at_least, middle, run_app, workplace
from deploy.processes import superlink, supernode
from deploy.relay import Relay, relayed
from fedclip_flwr.learning import make_adapter
from fedclip_flwr.operations import simulation
from harness.features import DIM, write_features
from harness.machine import OURS, machine, memory, processes, stat, table

SITES = 3
RATIO, ABOVE, MEGABYTES, SECONDS = 0.45, 2.5, 350, 2.2
"""What is to be reached: of FedAvg's round, above Flower alone, a site's memory, a site's process."""


@contextmanager
def deployment(place: Path, data: Sequence[Path]) -> Iterator[tuple[Mapping[str, str], Relay]]:
    """A SuperLink with a SuperNode for each feature folder: the environment for Flower's commands, and the relay."""
    with ExitStack() as stack:
        link = stack.enter_context(superlink(place / f"flower-{len(data)}"))
        relay = stack.enter_context(relayed(link.fleet))
        for number, folder in enumerate(data):
            config = f"site='site-{number}' data='features:{folder}'"
            stack.enter_context(supernode(link, f"site-{number}", config, port=relay.port))
        yield link.env, relay


def settings_of(app: Path, adapter: str, data: Sequence[Path], rounds: int) -> dict[str, str | int | float]:
    common: dict[str, str | int | float] = {"adapter": adapter, "num-server-rounds": rounds}
    if app == OURS:
        return common | {"data": f"features:{data[0]}", "holdout": "", "min-sites": len(data)}
    return common | {"sites": len(data)} | ({"data": f"features:{data[0]}"} if app == STOCK else {})


def rounds_table(env: Mapping[str, str], relay: Relay, data: Sequence[Path], rounds: int, runs: int) -> None:
    """Prints the times of the three apps."""
    names = {"ours, attention": OURS, "Flower's FedAvg": STOCK, "Flower alone": ECHO}
    found: dict[str, list[Run[int]]] = {name: [] for name in names}
    for _ in range(runs):
        for name, app in names.items():
            found[name].append(run_app(app, settings_of(app, "attention", data, rounds), env, lambda: relay.bytes))
    ours, stock, alone = (middle(found[name]) for name in names)
    rows = []
    for name in names:
        every, median_ = [seconds for run in found[name] for seconds in run.warm], middle(found[name])
        figures = [f"{median_:.1f} s", f"{min(every):.1f} to {max(every):.1f} s", f"{median_ / stock:.2f}"]
        rows.append([name, *figures, f"{median_ - alone:+.1f} s"])
    head = [f"a warm round of {len(data)} sites over gRPC", "median", "all", "of FedAvg's", "above Flower alone"]
    print(table(head, rows))
    print(
        f"\nTo reach: at most {RATIO} of FedAvg's and {ABOVE} s above Flower alone. Found: {ours / stock:.2f} and "
        f"{ours - alone:+.1f} s. {runs} runs of each in turn, {rounds} rounds.\n",
        flush=True,
    )


def bytes_table(env: Mapping[str, str], relay: Relay, data: Sequence[Path], rounds: int) -> None:
    """Prints the bytes of each adapter, three ways."""
    rows, whole = [], []
    for adapter in ("attention", "gate", "scale"):
        before = relay.bytes
        run = run_app(OURS, settings_of(OURS, adapter, data, rounds), env, lambda: relay.bytes)
        wire = relay.bytes - before
        tensors = 2 * sum(tensor.nbytes for tensor in make_adapter(adapter, DIM).state_dict().values())
        traffic = json.loads((run.folder / "summary.json").read_text())["traffic"]
        warm = median(after - before for before, after in pairwise(run.notes)) / len(data)
        rows.append([adapter, *(f"{number:,.0f}" for number in (tensors, traffic["per_site_round_bytes"], warm))])
        messages = traffic["down_bytes"] + traffic["up_bytes"]
        whole.append([adapter, *(f"{number:,.0f}" for number in (messages, listed(run.number, env), wire))])
    print(table(["bytes of a site and round, there and back", "tensors", "messages", "on the wire"], rows))
    print(f"\nThe same for all sites and a whole run of {rounds} rounds, with hellos and the closing evaluation:\n")
    print(table(["bytes of a run", "messages", "as `flwr list` tells", "on the wire"], whole) + "\n", flush=True)


def listed(number: str, env: Mapping[str, str]) -> int:
    """The bytes of a run that Flower itself counts."""
    command = ["flwr", "list", simulation.CONNECTION, "--run-id", number, "--format", "json"]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(json.loads(answer.stdout)["runs"][0]["network-traffic"]["total-bytes"])


class Watch(threading.Thread):
    """Watches the processes in which a lone site answers, one after the other: their lives, and their peaks."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark, self._over = mark, threading.Event()
        self.lives: list[float] = []
        self.peaks: list[int] = []

    def run(self) -> None:
        while not self._over.wait(0.05):
            for process in processes("flwr-clientapp", self._mark):
                self._follow(process)

    def _follow(self, process: int) -> None:
        peak, begun = 0, started_at(process)
        while now := memory(process, "VmHWM"):
            peak = now
            time.sleep(0.01)
        if peak:
            self.lives.append(time.clock_gettime(time.CLOCK_BOOTTIME) - begun)
            self.peaks.append(peak)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def started_at(process: int) -> float:
    """When the process was started, in seconds since the machine was."""
    after_name = stat(process)
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK") if after_name else time.clock_gettime(time.CLOCK_BOOTTIME)


def single_table(env: Mapping[str, str], data: Sequence[Path], rounds: int) -> None:
    """Prints what the process of a lone site takes."""
    rows = []
    for name, app in {"ours, attention": OURS, "Flower alone": ECHO}.items():
        with Watch(f"FLWR_HOME={env['FLWR_HOME']}") as watch:
            run_app(app, settings_of(app, "attention", data, rounds), env, lambda: None)
        lives, peaks = (found[1:-1] for found in (watch.lives, watch.peaks))  # neither hello nor closing
        if not lives:
            raise SystemExit("the processes of the sites were not to be seen")
        figures = [f"{max(peaks) / 1e6:.0f} MB", f"{median(lives):.2f} s", f"{min(lives):.2f} to {max(lives):.2f} s"]
        rows.append([name, *figures, str(len(lives))])
    print(table(["a site's process, alone on the machine", "memory, at most", "life", "all", "processes"], rows))
    print(f"\nTo reach with ours: less than {MEGABYTES} MB and {SECONDS} s.\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployed", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(2), default=5)
    parser.add_argument("--runs", type=at_least(1), default=2, help="of each app")
    parser.add_argument("--bytes-rounds", type=at_least(2), default=3, help="where bytes are counted")
    parser.add_argument("--rows", type=at_least(10), default=2000, help="of each site")
    parser.add_argument("--single-rounds", type=at_least(3), default=8, help="with one site")
    given = parser.parse_args()
    with workplace() as place:
        data = [write_features(place / f"site-{number}", {"all": given.rows}) for number in range(SITES)]
        with deployment(place, data) as (env, relay):
            rounds_table(env, relay, data, given.rounds, given.runs)
            bytes_table(env, relay, data, given.bytes_rounds)
        if Path("/proc/self/status").exists():
            with deployment(place, data[:1]) as (env, _):
                single_table(env, data[:1], given.single_rounds)
        else:
            print("A site's process is watched on Linux only.\n")
    print(f"{SITES} sites with {given.rows} images each; {machine()}")


if __name__ == "__main__":
    main()
