"""Three sites over gRPC with TLS and node keys, for real; and who is not let in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from deploy import demo
from deploy.demo import SITES, Outcome
from deploy.processes import SuperLink, SuperNode, supernode
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.features.base import Features
from fedclip_flwr.operations import keys, simulation
from tests.extras import needs
from tests.flower import parts
from tests.processes import alive, until_gone

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """A SuperLink with TLS, and the demonstration's three sites."""
    with demo.federation(tmp_path_factory.mktemp("deployed")) as link:
        yield link


class Seen(NamedTuple):
    """A federation that ran, and the same one simulated."""

    deployed: Outcome
    simulated: Outcome


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, drawn: Features) -> Seen:
    """`make deploy-demo` with a single round."""
    for domain in drawn.domains:  # encoded here, and not at each site in turn
        drawn.examples(domain)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(simulation, "stop_in_order", lambda word: None)
        return Seen(*demo.demo(tmp_path_factory.mktemp("demo"), ["num-server-rounds=1"]))


@needs("simulation")
def test_sites_over_tls_have_the_result_of_their_simulation(seen: Seen) -> None:
    assert demo.difference(seen.deployed, seen.simulated) == pytest.approx(0, abs=1e-6)
    assert "The same adapter" in demo.check(seen.deployed, seen.simulated)
    for run in (seen.deployed, seen.simulated):
        assert run.summary["status"] == "completed"
        assert run.summary["adapted"]["round"] == 1
        assert run.summary["failures"] == []
    assert "over TLS" in demo.comparison(seen.deployed, seen.simulated)


@pytest.mark.federation
def test_a_supernode_whose_key_nobody_registered_is_refused(link: SuperLink) -> None:
    assert link.keys
    keys.make(link.keys, sites=["stranger"])  # of this CA
    with supernode(link, "stranger", "site='stranger'") as stranger:
        assert stranger.process.wait(240) != 0
        assert parts.UNKNOWN_KEY in stranger.log.read_text()
    assert link.online() == len(SITES)


@pytest.mark.federation
def test_a_supernode_without_tls_is_refused(link: SuperLink) -> None:
    with supernode(link, "open", "site='open'", options=["--insecure"]) as other:
        deadline = time.monotonic() + 240
        while "attempt failed" not in other.log.read_text():
            assert time.monotonic() < deadline, other.log.read_text()
            time.sleep(0.1)
    assert link.online() == len(SITES)


@pytest.mark.federation
def test_a_site_runs_no_other_code_than_its_owners(link: SuperLink, tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "server_app.py", "client_app.py", "README.md"):
        shutil.copy(PROJECT / name, app)
    with (app / "client_app.py").open("a") as file:
        file.write("\nprint('what else is on this disk')\n")
    settings = f"min-sites=3 round-timeout=30 results-dir='{tmp_path}/results'"
    command = ["flwr", "run", str(app), simulation.CONNECTION, "--stream", "--run-config", settings]
    output = subprocess.run(command, env=link.env, capture_output=True, text=True, check=True).stdout
    number = output.split("Successfully started run ")[1].split()[0]
    assert simulation.status_of(number, link.env) == "finished:failed"
    why = json.loads((tmp_path / "results" / "latest" / "summary.json").read_text())["why"]
    assert why.count("differs from this site's in 'client_app.py'") == len(SITES)
    assert not any("what else is on this disk" in log.read_text() for log in link.folder.glob("*.log"))


@pytest.mark.soak
def test_a_site_that_is_turned_away_while_it_answers_ends(link: SuperLink, tmp_path: Path) -> None:
    """So that whoever starts it again does so: Flower's own SuperNode stays, and does nothing."""
    assert link.keys
    keys.make(link.keys, sites=["late"])
    known = node_ids(link)
    link.register("late")
    (own,) = node_ids(link) - known
    command = ["fedclip", "run", "--on", simulation.CONNECTION, "adapter=scale", f"results-dir={tmp_path}"]
    with ExitStack() as stack:
        late = stack.enter_context(supernode(link, "late", "site='late' data='drawn' domains='photo'"))
        run = stack.enter_context(simulation.started(command, link.env, tmp_path / "said"))
        stack.callback(stop_runs, link)
        while not at_work(late):
            assert run.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        link.ask("supernode", "unregister", own)
        late.process.wait(60)


def node_ids(link: SuperLink) -> set[str]:
    return {node["node-id"] for node in link.ask("supernode", "list")["nodes"]}


def stop_runs(link: SuperLink) -> None:
    for run in link.ask("list")["runs"]:
        if not run["status"].startswith("finished"):
            link.ask("stop", run["run-id"])


def at_work(node: SuperNode) -> bool:
    """Whether it has started a process that is to answer a message."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(process.name)) == node.process.pid and b"--token" in (process / "cmdline").read_bytes():
                return True
    return False


@needs("simulation")
def test_adapters_that_differ_are_reported(seen: Seen, tmp_path: Path) -> None:
    shutil.copytree(seen.deployed.folder, tmp_path / "other")
    path = tmp_path / "other" / "adapter.safetensors"
    state = load_file(path)
    state["inner.bias"][3] += 1e-3
    save_file(state, path)
    with pytest.raises(UserError, match=r"differ by up to 0\.001, expected at most 1e-05"):
        demo.check(Outcome(tmp_path / "other", 1.0), seen.simulated)
    state["inner.bias"][3] = float("nan")
    save_file(state, path)
    with pytest.raises(UserError, match="differ by up to nan"):
        demo.check(Outcome(tmp_path / "other", 1.0), seen.simulated)


@needs("simulation")
def test_wrong_settings_are_reported_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "min-sites=4"])
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)
    with pytest.raises(SystemExit, match="there are 3 sites"):
        demo.main()
    assert capsys.readouterr().out == ""


def test_make_passes_settings_on() -> None:
    command = ["make", "--dry-run", "--old-file=.venv/ready", "deploy-demo", "ARGS=num-server-rounds=1 seed=3"]
    env = {"PATH": os.environ["PATH"]}  # without that of a make that runs these tests
    output = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True).stdout
    assert output.split() == [".venv/bin/python", "-m", "deploy.demo", "num-server-rounds=1", "seed=3"]


@pytest.mark.soak
def test_the_demo_stopped_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path), "MARK": str(tmp_path)}
    command = [sys.executable, "-m", "deploy.demo"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=PROJECT, env=env, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        while "Starting three" not in process.stdout.readline():
            assert process.poll() is None
        folders = {Path(found["FLWR_HOME"]) for found in alive(f"MARK={tmp_path}") if "FLWR_HOME" in found}
        assert folders
        os.killpg(process.pid, signal.SIGINT)
        assert "Stopped" in process.stdout.read()
    assert process.returncode == 128 + signal.SIGINT
    until_gone(f"MARK={tmp_path}")
    assert not any(folder.exists() for folder in folders)
