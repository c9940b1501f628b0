"""Groups of groups: many sites in groups, each with a relay to one root, beside the same sites under one server.

    python -m benchmarks.groups [--sites 10000] [--groups 100] [--rows 20] [--statistics span]

Each site answers with its usual app, each server is the usual one with its run folder and report, and relays are those
of `fedclip relay`; all in one process with one thread, one after the other, without Flower's processes between them.
Features are random, of 512 dimensions. The memory is the most that the process has had (VmHWM; on Linux). The result of
the root must be the one of the flat federation, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict

import client_app
import server_app
from benchmarks.common import at_least, workplace
from fedclip_flwr.base import Settings, content
from fedclip_flwr.base.settings import FORMS, ONE_ROUND
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.flower.grids import RUN, Node, local_grid
from fedclip_flwr.flower.patching import replace
from fedclip_flwr.runs import history
from harness.features import write_features
from harness.machine import machine, memory, table


class Federations:
    """Runs with the same settings, one by one."""

    def __init__(self, place: Path, statistics: str) -> None:
        server = write_features(place / "server", {"none": 1})
        given = {"method": ONE_ROUND, "statistics": statistics, "holdout": ""}
        self._config = Settings().as_run_config() | given | {"data": f"features:{server}"}
        self._runs = place / "runs"

    def run(self, name: str, sites: Mapping[str, Mapping[str, Any]]) -> tuple[Path, float]:
        """The folder of a run of sites with these node configs, and its seconds."""
        folder = self._runs / name  # a group's server has no other group's runs
        config = {**self._config, "name": name, "results-dir": str(folder), "min-sites": len(sites)}
        grid = local_grid({number: node(site, own, config) for number, (site, own) in enumerate(sites.items(), 2)})
        begun = time.perf_counter()
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            server_app.serve(grid, config)
        return folder / name, time.perf_counter() - begun


def node(site: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> Node:
    context = Context(RUN, 1, {"site": site, **own}, RecordDict(), dict(config))

    def answer(message: Message) -> Message:
        return client_app.app(message, context)

    return answer


def members(place: Path, groups: int, size: int, rows: int) -> dict[str, dict[str, dict[str, str]]]:
    """For each group its sites' node configs, with the features on disk."""
    made = {}
    for number in range(groups):
        names = [f"site-{number}-{k}" for k in range(size)]
        folder = write_features(place / "sites" / str(number), dict.fromkeys(names, rows), torch.float16, number + 1)
        made[f"group-{number}"] = {name: {"data": f"features:{folder}", "domains": name} for name in names}
    return made


def show(what: str, seconds: float, run: Path) -> None:
    """Prints the figures of a run."""
    traffic = history.read(run).summary["traffic"]
    both = traffic["down_bytes"] + traffic["up_bytes"]
    figures = [what, f"{seconds:.1f} s", bytes_of(both), bytes_of(memory(os.getpid(), "VmHWM"))]
    print(f"| {' | '.join(figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.groups", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=at_least(1), default=10_000)
    parser.add_argument("--groups", type=at_least(1), default=100)
    parser.add_argument("--rows", type=at_least(5), default=20, help="of each site")
    parser.add_argument("--statistics", choices=FORMS, default="span")
    given = parser.parse_args()
    size = -(-given.sites // given.groups)
    torch.set_num_threads(1)
    package = content.of_package(content.memory())
    replace(content, of_package=lambda memory: package)  # a site's process looks once: here all sites share one
    print(table(["", "time", "all messages", "memory, the most so far"], []), flush=True)
    with workplace() as place:
        groups, federations = members(place, given.groups, size, given.rows), Federations(place, given.statistics)
        below = {name: federations.run(name, sites) for name, sites in groups.items()}
        seconds = [spent for _, spent in below.values()]
        last, _ = below[f"group-{given.groups - 1}"]
        show(f"a group of {size:,} sites (the mean of {given.groups:,})", sum(seconds) / len(seconds), last)
        root, spent = federations.run("root", {name: {"group": str(run)} for name, (run, _) in below.items()})
        show(f"the root, {given.groups:,} relays", spent, root)
        both = sum(seconds) + spent
        every = {name: own for sites in groups.values() for name, own in sites.items()}
        flat, spent = federations.run("flat", every)
        show(f"one server, {len(every):,} sites", spent, flat)
        same = (root / "adapter.safetensors").read_bytes() == (flat / "adapter.safetensors").read_bytes()
        images = sum(images for images, _ in history.read(root).summary["contributions"].values())
    print(
        f"\n{len(every):,} sites with {images:,} images to sum, statistics={given.statistics}; groups and root: "
        f"{both:.0f} s; the root's result is {'that' if same else 'NOT that'} of one server, to the bit; {machine()}"
    )
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
