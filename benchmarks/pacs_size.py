"""How long the paper's protocol takes on features of PACS's size: every domain held out, 200 rounds, three sites.

    python -m benchmarks.pacs_size [--methods paper] [--rounds 200] [--jobs 0]

Features are random, of 512 dimensions, as many as PACS has images in each domain; times do not depend on their values.
They and the results go to a temporary folder. Prints the table that `fedclip sweep` prints, the time, and the memory of
the largest process.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import at_least, workplace
from fedclip_flwr.operations import simulation
from harness.features import write_features
from harness.machine import machine

IMAGES = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}


def timed(methods: str, rounds: int, jobs: int) -> tuple[float, str]:
    """The seconds of a sweep from start to end, and what it printed."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        features = write_features(place / "features", IMAGES, torch.float16)
        command = [str(Path(sys.executable).with_name("fedclip")), "sweep", "--data", f"features:{features}"]
        command += ["--seeds", "1", "--methods", methods, "--rounds", str(rounds), "--jobs", str(jobs)]
        begun = time.perf_counter()
        with simulation.started(command, {**os.environ, "FEDCLIP_HOME": str(place / "home")}, place / "log") as process:
            failed = process.wait()
        output = (place / "log").read_text()
        if failed:
            raise SystemExit(output)
        return time.perf_counter() - begun, output


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pacs_size", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="paper")
    parser.add_argument("--rounds", type=at_least(1), default=200)
    parser.add_argument("--jobs", type=at_least(0), default=0)
    given = parser.parse_args()
    seconds, output = timed(given.methods, given.rounds, given.jobs)
    print(output)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    print(f"{sum(IMAGES.values()):,} images, {seconds:.0f} s from start to end, {most:,.0f} MB at most; {machine()}")


if __name__ == "__main__":
    with workplace():
        main()
