"""`make deploy-demo`: three sites over gRPC with TLS and node keys, and the same federation simulated.

    python -m deploy.demo [key=value …]

As with real sites, but on this machine: a certificate authority and keys, a SuperLink that accepts only registered
SuperNodes, three SuperNodes, each with a part of the drawn pictures. Then the simulation of three nodes with the same
seed, which must give the same adapter. Settings are those of `fedclip run`; num-server-rounds defaults to 5.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from deploy.processes import SuperLink, superlink, supernode
from fedclip_flwr.base import UserError
from fedclip_flwr.operations import keys, simulation

SITES = ("art-0", "cartoon-0", "photo-0")
"""The names of three simulated sites on the drawn pictures."""
DEFAULTS = {"num-server-rounds": "5", "min-sites": str(len(SITES))}
CLOSE = 1e-5
"""The largest difference allowed between the adapters' numbers: sums are made in another order."""


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def federation(place: Path, more: str = "") -> Iterator[SuperLink]:
    """Runs a SuperLink with TLS and three registered SuperNodes, with `more` in their node configs."""
    say(f"Keys and certificates for localhost and {', '.join(SITES)}")
    keys.make(place / "keys", "localhost", SITES)
    say("Starting a SuperLink with TLS and node authentication")
    with ExitStack() as stack:
        link = stack.enter_context(superlink(place / "flower", place / "keys"))
        say("Registering the sites' keys")
        link.register(*SITES)
        say("Starting three SuperNodes")
        nodes = [
            stack.enter_context(supernode(link, site, f"site='{site}' partition-id={number} num-partitions=3 {more}"))
            for number, site in enumerate(SITES)
        ]
        link.wait_for(nodes, say)
        yield link


class Outcome(NamedTuple):
    """A completed run: its folder, and its time, including start and end."""

    folder: Path
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary


def run(link: SuperLink | None, place: Path, given: Sequence[str]) -> Outcome:
    """Runs with these settings, on the SuperLink or (None) simulated; the run's folder is below `place`."""
    results, begun = place / ("simulated" if link is None else "deployed"), time.monotonic()
    given = [*given, f"results-dir={results}"]
    if link is None:
        code = simulation.run(len(SITES), given)
    else:
        settings, _, _ = simulation.prepared(len(SITES), given)
        code = simulation.submit(simulation.CONNECTION, settings, link.env, place)
    if code:
        raise UserError(f"the {results.name} run failed: the lines above say why")
    return Outcome((results / "latest").resolve(), time.monotonic() - begun)


def difference(one: Outcome, other: Outcome) -> float:
    """The greatest difference between the adapters' numbers."""
    first, second = (load_file(outcome.folder / "adapter.safetensors") for outcome in (one, other))
    if first.keys() != second.keys():
        raise UserError(f"the adapters have different tensors: {sorted(first.keys() ^ second.keys())}")
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def comparison(deployed: Outcome, simulated: Outcome) -> str:
    """A table of both runs side by side."""
    runs = (deployed, simulated)
    rows = [["", "over TLS", "simulated"]]
    for what in ("seen", "unseen", "round"):
        rows.append([what, *(f"{run.summary['adapted'][what]:.4g}" for run in runs)])
    rows.append(["seconds", *(f"{run.seconds:.1f}" for run in runs)])
    return "\n".join(f"{name:<8}{one:>10}{other:>11}" for name, one, other in rows)


def check(deployed: Outcome, simulated: Outcome) -> str:
    """Confirms that both adapters are the same; raises if they are not."""
    for run in (deployed, simulated):
        if run.summary["adapted"]["sites"].keys() != {*SITES}:
            raise UserError(
                f"expected the sites {', '.join(SITES)}, found {', '.join(run.summary['adapted']['sites'])}"
            )
    found = difference(deployed, simulated)
    if not found <= CLOSE:
        raise UserError(f"the adapters differ by up to {found:.2g}, expected at most {CLOSE:g}")
    return f"The same adapter: its numbers differ by at most {found:.2g} ({CLOSE:g} is allowed)."


def demo(place: Path, given: Sequence[str], more: str = "") -> tuple[Outcome, Outcome]:
    """Runs both, and prints their comparison. `more`: see `federation`."""
    named = {text.partition("=")[0] for text in given}
    given = [*given, *(f"{key}={value}" for key, value in DEFAULTS.items() if key not in named)]
    simulation.prepared(len(SITES), given)
    with federation(place, more) as link:
        say("All are connected. The run over TLS:\n")
        deployed = run(link, place, given)
    say("\nThe same run, simulated:\n")
    simulated = run(None, place, given)
    say(f"\n{comparison(deployed, simulated)}\n\n{check(deployed, simulated)}")
    return deployed, simulated


def main() -> None:
    simulation.stop_in_order("Stopped: all processes have ended.")
    try:
        with simulation.temporary() as place:
            demo(Path(place), sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
