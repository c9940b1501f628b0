"""Measures the same runs with several versions of Flower in turn: time, time until the first round, and CPU.

    python -m benchmarks.flower_lines .venv .venv-http [ENVIRONMENT]... [--runs 3] [--rounds 3]

Each environment has a Flower of its own, and what fedclip-flwr needs beside it; other versions than the supported ones
can be measured, too. Four kinds of runs: an app that only sends tensors back (no-op) and this project's own, each with
ten simulated sites, and with two SuperNodes of Flower's own, without TLS. CPU seconds are those of all processes that a
run has started, to the last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

from packaging.version import Version

from benchmarks.common import ECHO, at_least, nothing, run_app, simulate, workplace
from fedclip_flwr.flower import lines
from fedclip_flwr.operations import simulation
from fedclip_flwr.operations.ports import free_ports
from harness.features import write_features
from harness.machine import OURS, machine, table

SIMULATED, DEPLOYED, ROWS = 10, 2, 200
KINDS = ("no-op, simulated", "no-op, deployed", "own round, simulated", "own round, deployed")
ALL_HTTP = Version("1.40")
"""The first release whose SuperNodes speak HTTP, too."""
SUBREAPER = 36
"""The number by which Linux is asked to give a process all orphans among its descendants."""


@contextmanager
def deployment(place: Path, data: Path) -> Iterator[Mapping[str, str]]:
    """Flower's own SuperLink and two SuperNodes: the environment for Flower's commands."""
    control, fleet = free_ports(2)
    line = lines.line()
    options = lines.address(line.simulation_address, f"127.0.0.1:{control}")
    if Version(lines.installed()) >= ALL_HTTP:
        fleet = control
    else:
        options.append(f"--fleet-api-address=127.0.0.1:{fleet}")
    simulation.connect(place, control, "insecure = true")
    env, log = simulation.environment(place), place / "superlink.log"
    with ExitStack() as stack:
        command = ["flower-superlink", "--insecure", *options]
        link = stack.enter_context(simulation.started(command, env, log))
        for port in {control, fleet}:
            simulation.wait_for(port, link, log)
        for number in range(DEPLOYED):
            (own,) = free_ports(1)
            command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{fleet}"]
            command += lines.address(line.site_address, f"127.0.0.1:{own}")
            command += ["--node-config", f"site='site-{number}' data='features:{data}' domains='site-{number}'"]
            stack.enter_context(simulation.started(command, env, place / f"{number}.log"))
        yield env


def one(kind: str, rounds: int, data: Path, place: Path) -> dict[str, float]:
    """Seconds of a run, until its first round's line, and of CPU."""
    libc = ctypes.CDLL(None)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    ours, simulated = kind.startswith("own"), kind.endswith("simulated")
    sites, app = SIMULATED if simulated else DEPLOYED, OURS if ours else ECHO
    settings: dict[str, str | int | float] = {"adapter": "attention", "num-server-rounds": rounds}
    settings |= {"data": f"features:{data}", "holdout": "", "min-sites": sites} if ours else {"sites": sites}
    begun = time.perf_counter()
    with simulation.superlink(place) if simulated else deployment(place, data) as env:
        found = simulate(app, sites, settings, env, nothing) if simulated else run_app(app, settings, env, nothing)
    wall = time.perf_counter() - begun
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "start": found.times[0] - begun, "cpu": used.ru_utime + used.ru_stime}


def measured(environment: Path, kind: str, rounds: int, data: Path) -> dict[str, float]:
    """Runs `one` with that environment's Python, in a process of its own."""
    command = [str(environment / "bin" / "python"), "-m", "benchmarks.flower_lines", "--one", kind]
    command += ["--rounds", str(rounds), "--data", str(data)]
    done = subprocess.run(
        command, cwd=OURS, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(OURS)}
    )
    if done.returncode:
        raise SystemExit(f"{environment}, {kind}: {(done.stderr or done.stdout).strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{environment.name}, {kind}: {found['wall']:.1f} s", file=sys.stderr, flush=True)
    return found


def version_of(environment: Path) -> str:
    ask = "from importlib.metadata import version; print(version('flwr'))"
    try:
        done = subprocess.run([environment / "bin" / "python", "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(f"{environment}: expected a virtual environment with flwr in it") from None
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower_lines", description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", type=Path)
    parser.add_argument("--runs", type=at_least(1), default=3)
    parser.add_argument("--rounds", type=at_least(2), default=3)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with workplace() as place:
        if given.one:
            print(json.dumps(one(given.one, given.rounds, given.data, place)))
            return
        if not given.environments:
            parser.error("expected at least one environment, such as .venv")
        names = {environment: version_of(environment) for environment in given.environments}
        data = write_features(place / "features", {f"site-{number}": ROWS for number in range(SIMULATED)})
        runs = [(kind, path) for _ in range(given.runs) for kind in KINDS for path in names]
        found: dict[tuple[str, Path], list[dict[str, float]]] = {}
        for kind, path in runs:
            found.setdefault((kind, path), []).append(measured(path.absolute(), kind, given.rounds, data))
    rows = []
    for kind in KINDS:
        for path, version in names.items():
            every = found[kind, path]
            figures = {key: median(run[key] for run in every) for key in ("wall", "start", "cpu")}
            spread = f"{min(run['wall'] for run in every):.0f} to {max(run['wall'] for run in every):.0f} s"
            rows.append([kind, version, *(f"{seconds:.1f} s" for seconds in figures.values()), spread])
    print(table([f"a run of {given.rounds} rounds", "Flower", "in all", "first round after", "CPU", "all runs"], rows))
    print(f"\nMedians of {given.runs} runs in turn; {machine()}")


if __name__ == "__main__":
    main()
