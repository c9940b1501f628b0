"""The containers of `docker/`, real ones: a server and three sites with TLS, keys and a network for each.

They take minutes and need a Docker engine: `pytest -m docker` runs them, a plain `pytest` leaves them out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import demo
import pytest
from demo import RUNS, SITES, Federation

SMALL = "adapter=scale"
LISTEN = "import socket; s = socket.create_server(('0.0.0.0', 8000)); [s.accept() for _ in range(9)]"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
SUPERNODE = "exec timeout -s KILL 60 flower-supernode --superlink superlink:9092 --max-retries 2"
"""Flower's own program, which may stay when it is refused; `fedclip site` ends."""
TRUST = "--root-certificates /etc/fedclip/ca.crt"
HTTP = "http" in os.environ.get("CONSTRAINTS", "")
"""True if the image has Flower's HTTP line."""

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("docker") / "log")
    try:
        made.build()
        made.up()
        yield made
    finally:
        made.down()


class Run:
    """A run under way, and what it has said so far."""

    def __init__(self, federation: Federation, said: Path, process: subprocess.Popen[bytes]) -> None:
        self._federation, self._said, self._process = federation, said, process

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Waits for that while the run goes on."""

        def come() -> bool:
            assert self._process.poll() is None, self.said
            return condition()

        until(what, come)

    def status(self) -> int:
        """The one it ends with."""
        try:
            return self._process.wait(300)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not completed within 300 s: {self.said}\n{self._federation.last_words(25)}")

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its metrics."""
        lines = self._file("metrics.jsonl").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _file(self, name: str) -> str:
        """One of its folder, if that is there already."""
        folder = re.search(rf"run folder +({RUNS}/\S+)", self.said)
        return self._federation.execute("superlink", "cat", f"{folder[1]}/{name}").stdout if folder else ""

    def lost(self, site: str, since: int) -> int | None:
        """The first round after that one in which the site did not answer."""
        failures = json.loads(self._file("summary.json"))["failures"]  # all of them: it says each reason but once
        rounds = (each["round"] for each in failures if each["site"] == site)
        return min((number for number in rounds if number > since), default=None)

    def most_sites_since(self, number: int) -> int:
        """As many as took part in a round after that one."""
        return max((line["sites"] for line in self.lines()[number:]), default=0)


@contextmanager
def endless_run(federation: Federation, said: Path, *settings: str) -> Iterator[Run]:
    """A run that has begun its second round, to be stopped afterwards."""
    before = {run["run-id"] for run in runs(federation)}
    with said.open("wb") as file:
        process = federation.start_run("num-server-rounds=1000", SMALL, *settings, output=file)
        run = Run(federation, said, process)
        try:
            run.until("it begins", lambda: bool(run.lines()))
            yield run
        finally:
            for started in {run["run-id"] for run in runs(federation)} - before:
                federation.flwr("stop", started)
            assert process.wait(180) == 1, run.said  # Flower may tell the end a minute late


def completed_run(federation: Federation, said: Path, *settings: str) -> None:
    """Returns once a run is completed."""
    with said.open("wb") as file:
        run = Run(federation, said, federation.start_run(*settings, output=file))
        assert run.status() == 0, run.said


def runs(federation: Federation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = federation.flwr("list")["runs"]
    return found


def until(what: str, condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)


def state(federation: Federation, service: str, path: str) -> str:
    """What `docker inspect` tells of the service's container."""
    return demo.quietly(["docker", "inspect", "--format", path, federation.container(service)]).stdout.strip()


def reaches(federation: Federation, service: str, host: str, port: int) -> bool:
    return not federation.execute(service, "python", "-c", CONNECT, host, str(port)).returncode


def test_the_image_is_small_and_complete_and_its_user_has_no_rights(federation: Federation) -> None:
    size, user = (
        demo.quietly(["docker", "image", "inspect", "--format", path, federation.image]).stdout.strip()
        for path in ("{{.Size}}", "{{.Config.User}}")
    )
    assert int(size) < 1.6e9
    assert user == "10001:10001"
    for service in ("superlink", *SITES):
        assert federation.execute(service, "id", "-u").stdout.strip() == "10001"
        assert federation.execute(service, "touch", "/opt/fedclip/x").returncode
        assert federation.execute(service, "fedclip", "doctor").returncode == 0
        assert re.search(r"CapEff:\s+0+$", federation.execute(service, "cat", "/proc/self/status").stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def first(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The first run, for which all have to encode what they hold."""
    said = tmp_path_factory.mktemp("first") / "said"
    with said.open("wb") as file:
        process = federation.start_run("num-server-rounds=2", output=file)
        try:
            yield Run(federation, said, process)
        finally:
            process.kill()
            process.wait()


def test_a_run_begins_with_its_plan(first: Run) -> None:
    first.until("the plan is printed", lambda: "run folder" in first.said)


def test_sites_encode_what_they_hold_and_try_zero_shot_on_it(first: Run) -> None:
    first.until("round 0 is written", lambda: bool(first.lines()))
    assert first.lines()[0]["sites"] == len(SITES)


def test_a_run_is_completed_and_its_folder_comes_out(first: Run, federation: Federation, tmp_path: Path) -> None:
    assert first.status() == 0, first.said
    assert "sketch, unseen" in first.said
    folder = federation.fetch(tmp_path / "out")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["adapted"]["sites"].keys() == set(SITES)
    assert summary["adapted"]["unseen"] is not None
    assert (folder / "adapter.safetensors").stat().st_uid == os.getuid()


def test_each_machine_has_its_own_keys_only(federation: Federation) -> None:
    held = {service: federation.execute(service, "ls", "/etc/fedclip").stdout.split() for service in SITES}
    assert all(names == ["ca.crt", "node.key", "node.pub"] for names in held.values())
    keys = {federation.execute(service, "cat", "/etc/fedclip/node.key").stdout for service in SITES}
    assert len(keys) == len(SITES)
    assert "node.key" not in federation.execute("superlink", "ls", "/etc/fedclip").stdout


def test_server_and_sites_become_healthy(federation: Federation) -> None:
    def healthy() -> bool:
        return all(state(federation, each, "{{.State.Health.Status}}") == "healthy" for each in ("superlink", *SITES))

    until("all are healthy", healthy)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (
            "fedclip keys /tmp/k --site photo >/dev/null && "
            f"{SUPERNODE} {TRUST} --auth-supernode-private-key /tmp/k/sites/photo/node.key",
            "Failed to activate SuperNode" if HTTP else "No SuperNode found with the given public key",
        ),
        (f"{SUPERNODE} {TRUST}", "All SuperNodes must be registered via the CLI"),
        (f"{SUPERNODE} --insecure", "Connection attempt failed" if HTTP else "StatusCode.UNAVAILABLE"),
    ],
    ids=["an unknown key", "no key", "no TLS"],
)
def test_a_stranger_is_refused(start: str, why: str, federation: Federation) -> None:
    words = ["run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "photo", "-c", start]
    done = demo.quietly(federation.command(*words), federation.env)
    assert done.returncode
    assert why in done.stdout + done.stderr
    assert "SuperNode ID" not in done.stdout + done.stderr
    assert len(federation.flwr("supernode", "list")["nodes"]) == len(SITES)


def test_sites_reach_nothing_but_the_servers_fleet_api(federation: Federation) -> None:
    art = state(federation, "art", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    listening = subprocess.Popen(["docker", "exec", federation.container("art"), "python", "-c", LISTEN])
    try:
        until("the server, which is in all networks, reaches it", lambda: reaches(federation, "superlink", art, 8000))
        assert not reaches(federation, "photo", art, 8000)
        assert not reaches(federation, "photo", "art", 8000)
    finally:
        listening.terminate()
        listening.wait()
    assert reaches(federation, "photo", "superlink", 9092)
    for port in (9090, 9091, 9093):  # health, ServerAppIo, Control
        assert reaches(federation, "superlink", "127.0.0.1", port)
        assert not reaches(federation, "photo", "superlink", port)
    for site in SITES:  # no way to the outside
        network = ["docker", "network", "inspect", "--format", "{{.Internal}}", f"{federation.name}_{site}"]
        assert demo.quietly(network).stdout.strip() == "true"


@pytest.fixture(scope="class")
def run(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    more = "round-timeout=35"  # Flower misses a site after 38 s or later: one that has answered is asked once more
    with endless_run(federation, tmp_path_factory.mktemp("lost") / "said", more) as run:
        yield run


class TestSitesThatAreLost:
    """One is killed in a round and started again, one is cut off from the server meanwhile."""

    KILLED, CUT_OFF = "photo", "art"

    def test_the_run_continues_without_them(self, run: Run, federation: Federation) -> None:
        killed, cut_off = federation.container(self.KILLED), federation.container(self.CUT_OFF)
        run.until("all take part", lambda: [line["sites"] for line in run.lines()[-1:]] == [len(SITES)])
        received = said_by(cut_off, "Received successfully")
        run.until("it works on a message", lambda: said_by(cut_off, "Received successfully") > received)
        since = len(run.lines())  # the last round that is over: that of the line is one less
        demo.quietly(["docker", "network", "disconnect", f"{federation.name}_{self.CUT_OFF}", cut_off])
        demo.quietly(["docker", "kill", killed])
        demo.quietly(["docker", "start", killed])  # is refused at first: the server takes it for connected
        both = self.KILLED, self.CUT_OFF
        run.until("both are left out", lambda: None not in [run.lost(site, since) for site in both])
        first = min(run.lost(site, since) or 0 for site in both)
        sites = [line["sites"] for line in run.lines()]
        assert max(sites[: first - 1]) == len(SITES) > sites[first - 1]

    def test_the_one_that_was_cut_off_takes_part_again(self, run: Run, federation: Federation) -> None:
        cut_off, now = federation.container(self.CUT_OFF), len(run.lines())
        demo.quietly(["docker", "network", "connect", f"{federation.name}_{self.CUT_OFF}", cut_off])
        run.until("there are two sites again", lambda: run.most_sites_since(now) > 1)
        assert state(federation, self.CUT_OFF, "{{.State.Running}}") == "true"

    def test_the_one_that_was_killed_rejoins(self, run: Run, federation: Federation) -> None:
        now = len(run.lines())
        run.until("all are there again", lambda: run.most_sites_since(now) == len(SITES))
        assert int(state(federation, self.KILLED, "{{.RestartCount}}")) > 0


def said_by(container: str, text: str) -> int:
    """How often the container has said so."""
    logs = demo.quietly(["docker", "logs", container])
    return (logs.stdout + logs.stderr).count(text)


def test_a_server_that_was_started_again_knows_its_state(federation: Federation, tmp_path: Path) -> None:
    nodes = {node["node-id"] for node in federation.flwr("supernode", "list")["nodes"]}
    before = {run["run-id"]: run["status"] for run in runs(federation)}
    assert "finished:completed" in before.values()
    demo.quietly(["docker", "restart", federation.container("superlink")])
    federation.wait_for_sites()
    assert {node["node-id"] for node in federation.flwr("supernode", "list")["nodes"]} == nodes
    assert {run["run-id"]: run["status"] for run in runs(federation)} == before
    completed_run(federation, tmp_path / "said", "num-server-rounds=1", SMALL)


def test_after_that_nothing_is_left(federation: Federation) -> None:
    assert {f"{federation.name}_photo", federation.image} <= set(federation.leftovers())
    federation.down()
    assert not federation.leftovers()
