"""Shared by the benchmarks: their options, their first and last lines, their folder, Flower apps run and watched."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import torch

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.features import Features, open_features
from fedclip_flwr.operations import simulation
from harness.machine import machine

T = TypeVar("T")
APPS = Path(__file__).parent / "apps"
STOCK, ECHO = APPS / "stock", APPS / "echo"
"""The apps that are run beside this project's: Flower's FedAvg with the same work, and one that only sends messages.

Their modules have names of their own: Python would find this project's `client_app` first.
"""


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of some size."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least {least}")
        return int(text)

    return number


def opened(data: str) -> Features:
    """The features of the setting `data`, to work with in one thread: the matrices are small, more threads only wait
    for each other."""
    torch.set_num_threads(1)
    return open_features(Settings.from_run_config({"data": data}))


def finish(main: Callable[[], str]) -> None:
    """Runs a script; what it returns describes its figures, and is printed with the time and the machine."""
    begun = time.perf_counter()
    try:
        described = main()
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"{described}; {time.perf_counter() - begun:.0f} s; {machine()}")


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is gone afterwards, also when the benchmark is stopped; FEDCLIP_HOME is in it."""
    simulation.stop_in_order("Stopped: all that was started is ended.")
    with simulation.temporary() as name:
        os.environ["FEDCLIP_HOME"] = str(Path(name) / "home")
        yield Path(name)


class Run(NamedTuple, Generic[T]):
    """A run that was completed: when each round's line came, what was noted then, its number, its folder."""

    times: list[float]
    notes: list[T]
    number: str
    folder: Path

    @property
    def warm(self) -> list[float]:
        """The seconds of each round but the first."""
        return [after - before for before, after in pairwise(self.times)]


def run_app(
    app: Path,
    settings: Mapping[str, str | int | float],
    env: Mapping[str, str],
    note: Callable[[], T],
    *,
    federation: str = "",
) -> Run[T]:
    """Runs a Flower app and watches the lines that it writes, one for each round, to its run folder.

    Our own app's line of round r comes with the answers of round r + 1, and a last one with the closing evaluation,
    which is left out here: the time from line to line is always that of one whole round.
    """
    results = Path(tempfile.mkdtemp(dir=env["FLWR_HOME"]))
    given, log, lines = results / "settings.toml", results / "log", results / "latest" / "metrics.jsonl"
    config = {**settings, "results-dir": str(results)}
    given.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    command = ["flwr", "run", str(app), simulation.CONNECTION, "--stream", "--run-config", str(given)]
    command += ["--federation-config", federation] if federation else []
    times: list[float] = []
    notes: list[T] = []
    with simulation.started(command, env, log) as process:
        while process.poll() is None:
            with suppress(OSError):
                for _ in range(lines.read_bytes().count(b"\n") - len(times)):
                    times.append(time.perf_counter())
                    notes.append(note())
            time.sleep(0.01)
    output = log.read_text(errors="replace")
    number = re.search(r"Successfully started run (\d+)", output)
    status = simulation.status_of(number[1], env) if number else "not started"
    rounds = int(settings["num-server-rounds"])
    if number is None or status != "finished:completed" or len(times) < rounds:
        raise SystemExit(f"{app.name}: the run did not complete ({status}).\n{output[-2000:]}")
    return Run(times[:rounds], notes[:rounds], number[1], lines.parent)


def simulate(
    app: Path, nodes: int, settings: Mapping[str, str | int | float], env: Mapping[str, str], note: Callable[[], T]
) -> Run[T]:
    """The same with simulated sites, as `fedclip run` has them."""
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-log-to-driver=false"
    return run_app(app, settings, env, note, federation=federation)


def middle(runs: Iterable[Run[T]]) -> float:
    """The median of all warm rounds."""
    return median(seconds for run in runs for seconds in run.warm)


def nothing() -> None:
    """What is noted where only times matter."""
