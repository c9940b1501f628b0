"""What one round costs beside twenty: the bytes of a whole run, and the seconds of its computing.

    python -m benchmarks.one_round [--sites 10] [--features 2000] [--classes 57] [--dim 512]

Sites hold random features: nothing here depends on what they are. A whole run in one process with one thread, all
sites one after the other: hello, rounds, evaluation. The least of three runs counts. Below it a site's and the
server's own part of `one-round`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from benchmarks.common import at_least
from fedclip_flwr.base import Settings
from fedclip_flwr.base.settings import FORMS, ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.experiments.simulate import simulate
from fedclip_flwr.learning import Classes, Examples, OneRound
from fedclip_flwr.learning.sums import sums_of
from fedclip_flwr.site import Site
from harness.machine import machine, table

T = TypeVar("T")
RUNS = 3
AGAINST = "attention, 20 rounds"
METHODS: dict[str, dict[str, Any]] = {
    **{f"one-round, {form}": {"method": ONE_ROUND, "statistics": form} for form in FORMS},
    AGAINST: {"num_server_rounds": 20},
    "gate, 20 rounds": {"adapter": "gate", "num_server_rounds": 20},
}


def examples(count: int, classes: Classes, seed: int) -> Examples:
    chance = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(count, classes.dim, generator=chance), dim=1)
    return Examples(features, torch.randint(len(classes.text), (count,), generator=chance))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """The seconds that the fastest run takes, and what the last one returned."""
    seconds = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds), found


def whole_runs(sites: Sequence[Site], classes: Classes) -> str:
    """The table of all methods."""
    found = {}
    for name, how in METHODS.items():
        work = partial(simulate, sites, classes, None, Settings(**how), test_every_round=False)
        seconds, result = timed(work)
        found[name] = result.bytes / len(sites), seconds
    most, longest = found[AGAINST]
    rows = [
        [name, bytes_of(weight), f"{most / weight:,.1f}", f"{seconds:.2f} s", f"{longest / seconds:.1f}"]
        for name, (weight, seconds) in found.items()
    ]
    return table(["", "a site, whole run", "times less", "all computing", "times less"], rows)


def parts(site: Site, sites: int, classes: Classes) -> str:
    """The table of what a site and the server do."""
    rows = []
    for form in FORMS:
        start = OneRound.new(form, classes.text)
        at_site, sums = timed(partial(sums_of, site.train, start.basis, len(classes.text)))
        at_server, _ = timed(partial(solved, start, sums, sites, classes))
        weight = sum(tensor.nbytes for tensor in sums.values())
        rows.append([form, bytes_of(weight), f"{at_site:.2f} s", f"{at_server:.2f} s"])
    return table(
        ["statistics", "sums of a site", f"a site, {len(site.train.labels):,} features", "adding, solving"], rows
    )


def solved(start: OneRound, sums: State, sites: int, classes: Classes) -> None:
    """Adds as many sums as there are sites, and solves."""
    total = {name: tensor.clone() for name, tensor in sums.items()}
    for _ in range(1, sites):
        for name, tensor in sums.items():
            total[name] += tensor
    start.load_state_dict({**start.state_dict(), **total})
    start.head(classes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_round", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--features", type=at_least(10), default=2000, help="of each site, to train on")
    parser.add_argument("--classes", type=at_least(2), default=57)
    parser.add_argument("--dim", type=at_least(2), default=512)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    text = torch.randn(given.classes, given.dim, generator=torch.Generator().manual_seed(0))
    classes = Classes(text, 100.0).ready()
    sites = []
    for n in range(given.sites):
        train, validation, test = (
            examples(count, classes, 3 * n + k) for k, count in enumerate((given.features, 200, 200))
        )
        sites.append(Site(f"site-{n}", train, validation, test))
    print(whole_runs(sites, classes), parts(sites[0], given.sites, classes), sep="\n\n")
    shape = f"{given.sites} sites, {given.features:,} features each, {given.classes} classes, {given.dim} dimensions"
    print(f"\n{shape}; {machine()}")


if __name__ == "__main__":
    main()
