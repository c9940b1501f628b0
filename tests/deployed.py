"""A federation of real SuperNodes over gRPC on this machine, some of which may have been changed from outside."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from deploy.processes import superlink, supernode
from fedclip_flwr.operations import simulation
from harness.features import write_features

PROJECT = Path(__file__).parent.parent


class Run(Protocol):
    def __call__(self, place: Path, **settings: Any) -> dict[str, Any]:
        """Runs the app, with its results in this place; the run's summary, with its log."""


@contextmanager
def federation(place: Path, sites: Mapping[str, Mapping[str, str]], rows: int, env: Mapping[str, str]) -> Iterator[Run]:
    """A federation of these sites, each with an environment of its own beside that of all."""
    others: dict[str, Any] = {**env}
    data = write_features(place / "features", {"art": rows, "sketch": 20})
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(simulation, "stop_in_order", lambda word: None)
        link = stack.enter_context(superlink(place / "link", None, **others))
        config = "site='{}' data='features:{}'"
        nodes = [
            stack.enter_context(supernode(link, site, config.format(site, data), **{**others, **own}))
            for site, own in sites.items()
        ]
        link.wait_for(nodes)

        def run(place: Path, **settings: Any) -> dict[str, Any]:
            settings = {"data": f"features:{data}", "results-dir": str(place / "results"), **settings}
            given = place / "settings.toml"
            given.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
            command = ["flwr", "run", str(PROJECT), simulation.CONNECTION, "--stream", "--run-config", str(given)]
            done = subprocess.run(command, env=link.env, capture_output=True, text=True)
            summary = place / "results" / "latest" / "summary.json"
            assert summary.exists(), done.stdout + done.stderr
            return {**json.loads(summary.read_text()), "log": done.stdout}

        yield run


def completed(
    place: Path, sites: Mapping[str, Mapping[str, str]], rows: int, env: Mapping[str, str], **settings: Any
) -> dict[str, Any]:
    """The summary of one run of such a federation, with its log."""
    with federation(place, sites, rows, env) as run:
        return run(place, **settings)
