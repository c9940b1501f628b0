"""A relay over gRPC: a real SuperLink, a site and a relay as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest

from deploy.processes import SuperLink, SuperNode, superlink, supernode
from fedclip_flwr.operations import keys, simulation
from fedclip_flwr.report import writing
from fedclip_flwr.runs import ledger
from tests.versions import Federation, images, tensors

pytestmark = pytest.mark.federation

INJECTED = Path(__file__).parent.parent / "reliability" / "injected"
SLOW = """
import pathlib, time
from onload import change

def slow(relay):
    def answer(*given):
        pathlib.Path({marker!r}).touch()
        time.sleep(100)
    relay.Relay.answer_train = answer

change({{"fedclip_flwr.runs.relay": slow}})
"""


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """Four sites, whose runs in this process say what is right."""
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")
    made = Federation(tmp_path, sites={site: images(30 + 9 * n, n) for n, site in enumerate("abcd")})
    made.run("flat")
    return made


def fedclip(link: SuperLink, command: str, federation: Federation, **how: Any) -> str:
    """What a run, or an update, prints that was completed on that SuperLink."""
    given: dict[str, Any] = {
        "data": f"features:{federation.place / 'server'}",
        "method": "one-round",
        "holdout": "apart",
    }
    given |= {"results-dir": federation.results, **{key.replace("_", "-"): value for key, value in how.items()}}
    words = ["fedclip", *command.split(), "--on", simulation.CONNECTION]
    done = subprocess.run(
        [*words, *(f"{key}={value}" for key, value in given.items())], env=link.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def data(federation: Federation, site: str) -> str:
    return f"site='{site}' data='features:{federation.place / 'sites' / site}'"


class Killed(NamedTuple):
    """A federation after the run in which its relay `west` was killed."""

    federation: Federation
    above: SuperLink
    west: SuperNode
    d: SuperNode
    group: Path
    printed: str


@pytest.fixture
def killed(federation: Federation) -> Iterator[Killed]:
    """With TLS and keys above; the relay is killed while it answers, and the run completed without it."""
    place, group = federation.place, federation.run("group", ["a", "b", "c"])
    env: dict[str, Any] = {"FEDCLIP_HOME": str(place / "fedclip"), "OMP_NUM_THREADS": "1"}
    keys.make(place / "keys", "localhost", ["west", "d"], None)
    marker = place / "answering"
    (place / "slow").mkdir()
    (place / "slow" / "sitecustomize.py").write_text(SLOW.format(marker=str(marker)))
    path = os.pathsep.join([str(place / "slow"), str(INJECTED), os.environ.get("PYTHONPATH", "")])
    with ExitStack() as stack:
        above = stack.enter_context(superlink(place / "above", place / "keys", **env))
        above.register("west", "d")
        west = stack.enter_context(supernode(above, "west", "site='west'", group=str(group), PYTHONPATH=path))
        d = stack.enter_context(supernode(above, "d", data(federation, "d")))
        above.wait_for([west, d])
        killer = Thread(target=kill_once, args=(marker, west.process))
        killer.start()
        printed = fedclip(above, "run", federation, name="root", round_timeout=240)
        killer.join()
        yield Killed(federation, above, west, d, group, printed)


def test_a_group_takes_part_and_its_relay_killed_while_it_answers_loses_nothing(killed: Killed) -> None:
    """What the killed relay has not given is added once it is back: Flower accepts it, as it has noticed its end."""
    federation, above = killed.federation, killed.above
    assert "west is left out: Error: Node Unavailable" in killed.printed
    assert "west passes on 69 images of group" in killed.west.log.read_text()
    with supernode(above, "west", "site='west'", group=str(killed.group)) as again:
        above.wait_for([again, killed.d])
        fedclip(above, "update root", federation, min_sites=2)
    assert ledger.read_sites(federation.results / "root").keys() == {"d"}
    sites = ledger.read_sites(federation.results / "root.2")
    assert {site: given.images for site, given in sites.items()} == {"west": 69, "d": 34}
    assert tensors(federation.results / "root.2") == tensors(federation.results / "flat")


def kill_once(marker: Path, process: subprocess.Popen[bytes]) -> None:
    """Ends the process, and what it has started, with SIGKILL as soon as there is the marker."""
    deadline = time.monotonic() + 300
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
