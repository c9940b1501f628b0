"""What several benchmarks need: the machine in words, tables, features of any size, Flower apps run and watched."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fedclip_flwr.operations import simulation

T = TypeVar("T")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DIM = 512
APPS = Path(__file__).parent / "apps"
OURS, STOCK, ECHO = APPS.parent.parent, APPS / "stock", APPS / "echo"
"""The apps that are run: this project's, Flower's FedAvg with the same work, and one that only exchanges messages.

Their modules have names of their own: Python would find this project's `client_app` first.
"""


def machine() -> str:
    """The machine and the versions, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "transformers"))
    return f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {versions}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of some size."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least {least}")
        return int(text)

    return number


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is gone afterwards, also when the benchmark is stopped; FEDCLIP_HOME is in it."""
    simulation.stop_in_order("Stopped: all that was started is ended.")
    with simulation.temporary() as name:
        os.environ["FEDCLIP_HOME"] = str(Path(name) / "home")
        yield Path(name)


def write_features(folder: Path, images: Mapping[str, int], dtype: torch.dtype = torch.float32) -> Path:
    """A feature folder with so many images in each domain, and classes a little easier than chance.

    Times do not depend on what the features are.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(len(CLASSES), DIM, generator=generator), dim=1)
    save_file({"text_features": text}, folder / "classes.safetensors")
    for domain, count in images.items():
        labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
        features = 0.1 * text[labels] + torch.randn(count, DIM, generator=generator) / DIM**0.5
        save_file({"image_features": features.to(dtype), "labels": labels}, folder / f"{domain}.safetensors")
    described = {"model": "random", "embedding_dim": DIM, "logit_scale": 100.0, "prompt": "a picture of a {}"}
    facts = {**described, "class_names": CLASSES, "domains": list(images), "parameters": 151_277_313}
    (folder / "features.json").write_text(json.dumps(facts))
    return folder


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
    told = log.read_text(errors="replace")
    number = re.search(r"Successfully started run (\d+)", told)
    status = simulation.status_of(number[1], env) if number else "not started"
    rounds = int(settings["num-server-rounds"])
    if number is None or status != "finished:completed" or len(times) < rounds:
        raise SystemExit(f"{app.name}: the run did not complete ({status}).\n{told[-2000:]}")
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


def processes(command: str, mark: str) -> list[int]:
    """The processes that run this command with the mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(Path(word).name == command for word in words[:2]):
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                found += [int(process.name)] * (mark in environment)
    return found


def cpu(process: int) -> float:
    """The seconds for which a process has computed so far; 0 where that is not to be known."""
    after_name = stat(process)
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK") if after_name else 0.0


def stat(process: int) -> list[str]:
    """What the kernel says of a process, from its state on; nothing where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def memory(process: int, what: str) -> int:
    """A process's memory in bytes: VmRSS now, VmHWM at most so far; 0 where that is not to be known."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return 1024 * int(line.split()[1])
    return 0
