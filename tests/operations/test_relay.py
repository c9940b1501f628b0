"""`fedclip relay`: what it starts, what it refuses at once, and what doctor says of such a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

import client_app
import server_app
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.flower import pinned
from fedclip_flwr.flower.grids import RUN, local_grid
from fedclip_flwr.operations import outgoing, relay
from fedclip_flwr.operations.doctor import holdings
from fedclip_flwr.operations.doctor.findings import Examination
from fedclip_flwr.report import writing

NODE = "site='west'"


@pytest.fixture
def group(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of a group that has one site."""
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    given = {"data": f"folder:{tree}", "method": "one-round", "holdout": "", "name": "study"}
    config = Settings().as_run_config() | given
    context = Context(RUN, 1, {"site": "a", "data": f"folder:{tree}"}, RecordDict(), dict(config))
    server_app.serve(local_grid({2: lambda message: client_app.app(message, context)}), config)
    return tmp_path / "home" / "runs" / "study"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The options with which a SuperNode would have been started."""
    found: list[list[str]] = []
    monkeypatch.setattr(pinned, "start", found.append)
    return found


def test_the_site_of_a_run_is_started_with_the_options_that_were_given(group: Path, started: list[list[str]]) -> None:
    said: list[str] = []
    start: Any = relay.start  # here it returns
    for name in ("study", "latest", str(group)):
        start(name, None, NODE, ["--superlink", "fl.example.org:9092"], said.append)
    start("study", group.parent, f"{NODE} secure-aggregation=true", [], said.append)
    assert started[:3] == [["--superlink", "fl.example.org:9092", "--node-config", f"{NODE} group='{group}'"]] * 3
    assert started[3] == ["--node-config", f"{NODE} secure-aggregation=true group='{group}'"]
    assert {*said} == {"west passes on 14 images of study, and from then on the newest version of that run"}


@pytest.mark.parametrize(
    ("run", "node", "why"),
    [
        ("no-such", NODE, "no-such: there is no such run, .*; the latest in .* are study"),
        ("--superlink", NODE, "name the run first: fedclip relay RUN --superlink HOST:PORT"),
        ("study", "", "expected KEY=VALUE with strings in quotes"),
        ("study", "secure-aggregation=true", "this site has no name"),
        ("study", f"{NODE} data='folder:/x'", "data in the node config: a relay has no images of its own"),
        ("study", "site='west", "expected KEY=VALUE"),
    ],
)
def test_what_can_not_be_passed_on_is_refused_before_anything_is_started(
    group: Path, started: list[list[str]], run: str, node: str, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        relay.start(run, None, node, [], print)
    assert started == []


def test_doctor_says_what_a_relay_passes_on(group: Path) -> None:
    found: list[tuple[str, str, str]] = []
    for run in (group, group.with_name("gone")):
        ex = Examination(lambda _: None)
        assert holdings.examine_site(ex, Settings(), {"site": "west", "group": str(run)}) == 0
        found += [(state, what, text) for state, what, text, _ in ex.findings]
    assert found[0] == ("ok", "group", "west passes on 14 images of study")
    assert found[1][:2] == ("FAIL", "group")
    assert "there is no run in that folder" in found[1][2]


@pytest.mark.parametrize("masked", [False, True])
def test_what_leaves_a_relay_can_be_shown(group: Path, masked: bool) -> None:
    how: dict[str, Any] = {"data": "none", "class_names": "car,cat,fish", "holdout": "", "secure_aggregation": masked}
    said: list[str] = []
    run = Settings(method="one-round", **how)
    assert outgoing.show(run, {"site": "west", "group": str(group)}, "", said.append)
    text = "\n".join(said)
    assert "train        14" in text
    assert ("moments" in text, "masked " in text) == (not masked, masked)
