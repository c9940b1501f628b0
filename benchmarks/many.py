"""What a simulated site costs where there are many: the machine's time in a warm round, and the server's memory.

    python -m benchmarks.many [--nodes 1000] [--rounds 10] [--alone-rounds 4] [--rows 40]

Four domains of random features of 512 dimensions in float16, `adapter=gate`. Beside it runs an app that sends the same
tensors back unchanged: what Flower and Ray cost themselves. A round is the time from one round's line to the next
one's. The memory is that of the process in which the ServerApp runs, and with it Flower's own part (VmRSS; on Linux).
To reach: at most 25 ms, and less than 10 % more memory after the last round than after the second.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common import ECHO, at_least, middle, simulate, workplace
from fedclip_flwr.operations import simulation
from harness.features import write_features
from harness.machine import OURS, machine, memory, processes, table

MILLISECONDS, GROWTH = 25, 10
DOMAINS = ("art", "cartoon", "photo", "sketch")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=at_least(4), default=1000)
    parser.add_argument("--rounds", type=at_least(2), default=10)
    parser.add_argument("--alone-rounds", type=at_least(2), default=4, help="of the app that does nothing")
    parser.add_argument("--rows", type=at_least(5), default=40, help="of each site")
    given = parser.parse_args()
    rows, found = [], {}
    with workplace() as place, simulation.superlink(place) as env:
        images = dict.fromkeys(DOMAINS, -(-given.nodes // len(DOMAINS)) * given.rows)
        features = write_features(place / "features", images, torch.float16)
        own = {"data": f"features:{features}", "holdout": "", "min-sites": given.nodes, "round-timeout": 3600.0}
        alone = {"sites": given.nodes, "num-server-rounds": given.alone_rounds}
        apps = {
            "ours, gate": (OURS, own | {"num-server-rounds": given.rounds}),
            "Flower and Ray alone": (ECHO, alone),
        }

        def server() -> int:
            return sum(memory(process, "VmRSS") for process in processes("flwr-simulation", f"FLWR_HOME={place}"))

        for name, (app, settings) in apps.items():
            run = simulate(app, given.nodes, settings | {"adapter": "gate"}, env, server)
            second, last = run.notes[1], run.notes[-1]
            growth = 100 * (last / second - 1) if second else 0.0
            found[name] = (1000 * middle([run]) / given.nodes, growth)
            figures = [f"{found[name][0]:.1f} ms", f"{second / 1e6:.0f} MB", f"{last / 1e6:.0f} MB", f"{growth:+.1f} %"]
            rows.append([name, *figures])
    head = [
        f"{given.nodes:,} simulated sites",
        "a site and warm round",
        "memory, round 2",
        "memory, last round",
        "growth",
    ]
    print(table(head, rows))
    milliseconds, growth = found["ours, gate"]
    print(f"\nTo reach: {MILLISECONDS} ms, less than {GROWTH} % growth. Found: {milliseconds:.1f} ms, {growth:+.1f} %.")
    print(
        f"\n{given.rows} rows a site, {given.rounds} rounds, {given.alone_rounds} of Flower and Ray alone; {machine()}"
    )


if __name__ == "__main__":
    main()
