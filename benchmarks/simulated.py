"""A warm round of simulated sites, beside Flower's own FedAvg with the same tensors, the same work and the same rows.

    python -m benchmarks.simulated [--sites 10] [--rows 600] [--adapter attention] [--rounds 10] [--runs 2]

Each site has a domain of its own of random features of 512 dimensions, split into 60, 20 and 20 %. Both apps run in
turn on the same SuperLink, over Ray. A round is the time from one round's line to the next one's: FedAvg's has two
exchanges (train, evaluate), ours one. To reach: at most 0.6 times FedAvg's.
"""

from __future__ import annotations

import argparse

from benchmarks.common import STOCK, Run, at_least, middle, nothing, simulate, workplace
from fedclip_flwr.learning.adapters import ADAPTERS
from fedclip_flwr.operations import simulation
from harness.features import write_features
from harness.machine import OURS, machine, table

GOAL = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=at_least(1), default=10)
    parser.add_argument("--rows", type=at_least(10), default=600, help="of each site")
    parser.add_argument("--adapter", choices=ADAPTERS, default="attention")
    parser.add_argument("--rounds", type=at_least(2), default=10)
    parser.add_argument("--runs", type=at_least(1), default=2, help="of each app")
    given = parser.parse_args()
    runs: dict[str, list[Run[None]]] = {f"ours, {given.adapter}": [], "Flower's FedAvg": []}
    with workplace() as place, simulation.superlink(place) as env:
        features = write_features(place / "features", {f"d{number:03}": given.rows for number in range(given.sites)})
        common = {"data": f"features:{features}", "num-server-rounds": given.rounds, "adapter": given.adapter}
        own = {OURS: {"holdout": "", "min-sites": given.sites}, STOCK: {"sites": given.sites}}
        for _ in range(given.runs):
            for found, app in zip(runs.values(), (OURS, STOCK), strict=True):
                found.append(simulate(app, given.sites, common | own[app], env, nothing))
    ours, stock = map(middle, runs.values())
    rows = []
    for name, found in runs.items():
        every = [seconds for run in found for seconds in run.warm]
        ratio = f"{middle(found) / stock:.2f}"
        rows.append([name, f"{middle(found):.2f} s", f"{min(every):.2f} to {max(every):.2f} s", ratio])
    print(table([f"a warm round of {given.sites} sites", "median", "all", "of FedAvg's"], rows))
    print(f"\nTo reach: at most {GOAL} of FedAvg's. Found: {ours / stock:.2f}.")
    print(f"\n{given.runs} runs of each in turn, {given.rounds} rounds, {given.rows} images a site; {machine()}")


if __name__ == "__main__":
    main()
