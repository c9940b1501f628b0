"""The command `fedclip doctor` as an administrator gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy import processes
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.operations import simulation

APIS = ("fleet", "control", "serverappio")


def given(*words: str) -> tuple[int, str]:
    """The exit status, and what was said."""
    done = CliRunner().invoke(app, ["doctor", *words])
    return done.exit_code, done.output


def test_without_a_side_only_what_any_machine_needs_is_looked_at() -> None:
    status, said = given()
    assert status == 0
    assert [line.split()[1] for line in said.splitlines()[:2]] == ["Python", "packages"]
    assert "Fleet API" not in said
    assert "0 to fix" in said.splitlines()[-1]


def test_a_program_gets_the_findings_as_json() -> None:
    status, said = given("--json")
    found = json.loads(said)
    assert (status, [finding["what"] for finding in found[:2]]) == (0, ["Python", "packages"])
    assert {"state", "what", "found", "remedy"} == {*found[0]}
    status, said = given("site", "--json", "--root-certificates", "/nowhere", "--superlink", "localhost:1")
    assert status == 1
    assert [finding["state"] for finding in json.loads(said)].count("FAIL") > 0
    assert given("site", "--node-config", "site='a'", "--show-outgoing", "--json")[0] == 2


def test_a_site_that_is_ready_has_nothing_to_mend(secured: processes.SuperLink, tree: Path) -> None:
    features = open_features(Settings(data=f"folder:{tree}"), progress=False)
    for domain in features.domains:
        features.examples(domain)
    options = [*processes.credentials(secured.keys, "north"), "--superlink", f"localhost:{secured.fleet}"]
    status, said = given(
        "site", *options, "--node-config", f"site='north' data='folder:{tree}'", "class-names=car,cat,fish"
    )
    assert status == 0, said
    for line in ("ok    registration", "ok    site             north trains on cartoon, photo", "all 24 are stored"):
        assert line in said


def test_a_site_that_is_not_says_what_to_mend_and_ends_with_1(secured: processes.SuperLink, tree: Path) -> None:
    options = [*processes.credentials(secured.keys, "south"), "--superlink", f"localhost:{secured.fleet}"]
    status, said = given("site", *options, "--node-config", f"site='south' data='folder:{tree}'", "class-names=car,cat")
    assert status == 1
    assert [line.split()[1] for line in said.splitlines() if line.startswith("FAIL")] == ["registration", "classes"]
    assert "flwr supernode register" in said
    assert "2 to fix" in said.splitlines()[-1]


def test_a_server_reports_its_sites(secured: processes.SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(secured.folder))
    assert secured.keys
    own = secured.keys / "server"
    options = [f"--ssl-ca-certfile={own}/ca.crt", f"--ssl-certfile={own}/server.crt", f"--ssl-keyfile={own}/server.key"]
    for api, port in (("fleet", secured.fleet), ("control", secured.control), ("serverappio", secured.apps)):
        options.append(f"--{api}-api-address=127.0.0.1:{port}")
    status, said = given("server", *options, "--on", simulation.CONNECTION, "data=none", "class-names=car,cat")
    assert status == 1
    (failed,) = (line for line in said.splitlines() if line.startswith("FAIL"))
    assert failed.split()[1] == "south"
    assert "no images here, only at the sites" in said


@pytest.mark.parametrize(
    ("side", "what"),
    [("site", ["node key", "SuperLink", "data"]), ("server", ["certificates", "nodes", "run"])],
)
def test_what_was_not_named_is_reported(side: str, what: list[str]) -> None:
    """No SuperLink runs on the ports that it has unless others are named."""
    _, said = given(side, *(f"--{api}-api-address=localhost:1" for api in APIS if side == "server"))
    noted = [line.split("  ")[1].strip() for line in said.splitlines() if line.startswith("note")]
    assert [name for name in noted if name != "GPU"] == what


def test_a_site_without_data_is_reported() -> None:
    status, said = given("site", "--node-config", "site='north'")
    assert status == 1
    assert "this site's data is not set" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["site", "adaptor=gate"], "no such setting; did you mean adapter?"),
        (["client"], "client: name the side first"),
        (["data=pacs"], "data=pacs: name the side first"),
        (["site", "north"], "north: expected key=value"),
        (["--superlink", "localhost:9092"], "--superlink is for one side: fedclip doctor site"),
        (["site", "--on", "here"], "--on is for one side: fedclip doctor server"),
        (["site", "--superlink", "localhost"], "expected HOST:PORT"),
        (["site", "--node-config", "site=north"], "expected KEY=VALUE with strings in quotes"),
        (["site", "--node-config", "/nowhere.toml"], "expected KEY=VALUE with strings in quotes"),
        (["server", "--fleet-api-address", "9092"], "--fleet-api-address '9092': expected HOST:PORT"),
    ],
)
def test_options_that_can_not_be_used_end_it_with_2(words: list[str], expected: str) -> None:
    status, said = given(*words)
    assert status == 2
    assert expected in said
