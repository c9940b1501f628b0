"""Runs the benchmarks that need no GPU and no network, and writes docs/benchmarks.md from what they print.

    python -m benchmarks [--only NAME...]

With `--only` the named ones are run and shown, and the page is left as it is. The page is written at the end, if none
failed. Beside other work the figures are too high: leave the machine alone for a quarter of an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedclip_flwr.operations import simulation
from harness.machine import OURS, machine

PAGE = OURS / "docs" / "benchmarks.md"


class Benchmark(NamedTuple):
    """A script of this folder with its options, and the heading and the text under which its tables stand."""

    name: str
    options: tuple[str, ...]
    title: str
    text: str

    @property
    def command(self) -> str:
        return " ".join(("python -m", f"benchmarks.{self.name}", *self.options))


BENCHMARKS = (
    Benchmark(
        "epoch",
        (),
        "Learning on stored features",
        "The released FedCLIP code runs the frozen CLIP in every step; here its features are stored once. Theirs is a\n"
        "plain writing of that step, with CLIP ViT-B/32's architecture and random weights.",
    ),
    Benchmark(
        "encoding",
        ("--turns", "5"),
        "Encoding",
        "What each image costs once. How many workers there are follows from what the first batch took: on two cores\n"
        "without a GPU the model takes far longer than reading the images, and none is started.",
    ),
    Benchmark(
        "predicting",
        ("--turns", "3"),
        "Predictions",
        "Of image files, beside transformers alone, which also opens and prepares them; of stored features; and from\n"
        "the ONNX file, beside torch on all drawn pictures.",
    ),
    Benchmark(
        "warm_epoch",
        (),
        "A site's work by its parts",
        "One epoch of the attention adapter over 1,200 stored features, in a new process each time, as a deployed\n"
        "site has it: Flower starts one for each message.",
    ),
    Benchmark(
        "simulated",
        ("--runs", "1"),
        "A simulated round",
        "Ten sites over Ray, each with as many images as if PACS without its sketches were cut in ten. FedAvg as\n"
        "Flower ships it has the same tensors, work and rows, and two exchanges a round. Both do the same learning.",
    ),
    Benchmark(
        "simulated",
        ("--runs", "1", "--adapter", "gate"),
        "The same with a small adapter",
        "Where there is less to learn and to send, more of the time is Flower's and Ray's.",
    ),
    Benchmark(
        "deployed",
        ("--rounds", "3", "--runs", "1", "--bytes-rounds", "2", "--single-rounds", "4"),
        "A deployed round",
        "A SuperLink and SuperNodes over gRPC on one machine, so their processes share its cores. `Flower alone` is\n"
        "an app that sends the tensors back and does nothing else: a SuperNode looks for messages every 3 seconds,\n"
        "and a process is started for each.",
    ),
    Benchmark(
        "messages",
        (),
        "The weight of messages",
        "There and back, by codec. Around the tensors, `ours` are names, types and shapes of arrays (with numpy's\n"
        "header of 128 bytes each), three lists of figures, and the keys of the session and of what the sites have.",
    ),
    Benchmark(
        "one_round",
        (),
        "One round beside twenty",
        "Of `method=one-round` what all messages of a run weigh, and how long all its computing takes, in one process.",
    ),
    Benchmark(
        "codecs",
        ("--seeds", "1"),
        "Predictions under the codecs",
        "Rounding is by chance and what it loses goes with the next round, so that predictions stay.",
    ),
    Benchmark(
        "many",
        (),
        "A thousand simulated sites",
        "`adapter=gate`, 40 rows a site. The machine's time for a site in a warm round, and the memory of the process\n"
        "in which the ServerApp runs.",
    ),
)


def printed(benchmark: Benchmark) -> str | None:
    """What the benchmark prints; none if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", *benchmark.options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate()
    finally:
        process.terminate()  # where this is stopped: it ends what it started
        process.wait()
    return None if process.returncode else output.strip()


def page(found: Sequence[tuple[Benchmark, str]], seconds: float) -> str:
    """The page with every benchmark's tables."""
    parts = [
        "# Benchmarks",
        "Times, bytes and memory. `make bench` writes this page: each table is what the command above it printed. How\n"
        "accurate adapters are, and figures of longer runs: [results.md](results.md).",
        f"```text\n{machine()}\nall of it: {seconds:.0f} s\n```",
    ]
    for benchmark, tables in found:
        parts += [f"## {benchmark.title}", benchmark.text, f"`{benchmark.command}`", tables]
    return "\n\n".join(parts) + "\n"


def run(benchmarks: Sequence[Benchmark], to: Path | None) -> list[str]:
    """Runs them one after the other and writes the page, if none failed; the names of those that did."""
    begun, found, failed = time.monotonic(), [], []
    for number, benchmark in enumerate(benchmarks, 1):
        print(f"{number} of {len(benchmarks)}: {benchmark.command}", flush=True)
        tables = printed(benchmark)
        if tables is None:
            failed.append(benchmark.name)
            continue
        found.append((benchmark, tables))
        print(f"\n{tables}\n\n{time.monotonic() - begun:.0f} s so far\n", flush=True)
    if to and not failed:
        to.write_text(page(found, time.monotonic() - begun))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    given = parser.parse_args()
    simulation.stop_in_order("Stopped: the page is as it was.")
    chosen = [benchmark for benchmark in BENCHMARKS if not given.only or benchmark.name in given.only]
    if failed := run(chosen, None if given.only else PAGE):
        raise SystemExit(f"Failed: {', '.join(failed)}. {PAGE.name} is as it was.")
    if not given.only:
        print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
