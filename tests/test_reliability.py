"""The harness that breaks federations: one fault for real, and what it makes of results that are not as promised.

All of it: python -m reliability.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.relay import relayed
from fedclip_flwr.flower import lines
from reliability import __main__ as page
from reliability import faults, kills, trials
from reliability.federation import BrokenError, Federation, Result, difference, federation, until
from reliability.kills import Kill
from reliability.soak import Sample, Soak, Spoilt, flat, grown, named
from reliability.trials import Fault, Journey, Outcome, Trial

SETTINGS: dict[str, str | int | float] = {"num-server-rounds": 2}
WHILE_WRITING = "server puts checkpoint adapter.safetensors in place"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("reliability")) as one:
        one.undisturbed(**SETTINGS)  # with which others are compared
        yield one


@pytest.mark.federation
def test_a_server_app_killed_while_it_writes_the_checkpoint_resumes_to_the_same_result(real: Federation) -> None:
    said: list[str] = []
    killed = faults.server_app_killed("while it writes", WHILE_WRITING, 2)
    (outcome,) = trials.go(real, Journey("one", [killed], SETTINGS), said.append)
    assert outcome == Outcome("the ServerApp is killed while it writes", trials.SAME, True)
    assert said == ["one: the ServerApp is killed while it writes"]
    (folder,) = {path.resolve() for path in (real.place / "results" / "one").glob("*/settings.json")}
    starts = [line for line in real.points.passed() if line["point"] == "server has sent query"]
    assert len(starts) == 3  # the undisturbed run, the killed one, the resumed one
    assert json.loads((folder.parent / "summary.json").read_text())["rounds"] == 2


def test_what_never_ends_is_reported_for_each_fault() -> None:
    """Without a federation: nothing is begun."""

    def fails(trial: Trial) -> None:
        raise BrokenError("it burns")

    class Nothing:
        place = Path("nowhere")
        points = None

        def undisturbed(self, **_: object) -> None:
            return None

        def heal(self) -> None:
            return None

    journey = Journey("two", [Fault("first", lambda trial: None), Fault("second", fails), Fault("third", fails)])
    nothing: Any = Nothing()
    assert trials.go(nothing, journey, lambda _: None) == [
        Outcome("first", "its run came to no end", False),
        Outcome("second", "it burns", False),
        Outcome("third", "not reached: it burns", False),
    ]


RESULT = Result(
    "completed",
    "hash of the adapter",
    {"round": 1},
    {"inner.weight": "hash"},
    ({"round": 0, "val": 0.5}, {"round": 1, "val": 0.75}),
    {"adapted": {"round": 1}},
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"adapter": "another hash"}, ["adapter"]),
        ({"checkpoint": {"inner.weight": "another"}}, ["checkpoint"]),
        ({"status": "failed", "figures": {}}, ["status", "figures"]),
        ({"lines": ({"round": 0, "val": 0.5}, {"round": 1, "val": 0.7500001})}, ["line of round 1"]),
        ({"lines": RESULT.lines[:1]}, ["line of round 1"]),
        ({"lines": (*RESULT.lines, RESULT.lines[1])}, ["a round has two lines"]),
    ],
    ids=lambda given: ", ".join(given) or "nothing",
)
def test_each_difference_from_the_undisturbed_run_is_named(change: dict[str, Any], expected: list[str]) -> None:
    assert difference(RESULT._replace(**change), RESULT) == expected


def test_kills_are_drawn_again_from_their_seed() -> None:
    first = kills.drawn(7)
    assert first == kills.drawn(7)
    assert first != kills.drawn(8)
    assert len(first) == 10
    assert {one.variant for one in first} == {*kills.VARIANTS}
    assert {one.target for one in first} == {*kills.TARGETS}
    assert all(0 <= one.part < 1 for one in first)
    assert Kill("int8", "the SuperLink", 0.5).name == "int8: the SuperLink, after 50 % of the run"


def samples(*memory: float, handles: int = 20, process: int = 1) -> list[Sample]:
    return [Sample(number, process, int(100e6 * one), handles) for number, one in enumerate(memory)]


def test_a_process_that_stays_as_it_was_is_flat() -> None:
    steady = [1.0, 1.01] * 100
    assert flat(samples(*steady))
    assert flat(samples(*[0.5] * 20, *steady))  # it may grow while it warms up
    assert flat([*samples(*[5.0] * 50, process=1), *samples(*steady, process=2)])  # that of before is not compared


def test_a_leak_is_reported() -> None:
    leaking = samples(*(1 + 0.001 * number for number in range(200)))
    share, handles = grown(leaking)
    assert share == pytest.approx(0.001 * 130 / (1 + 0.001 * 44.5), rel=1e-3)
    assert handles == 0
    assert not flat(leaking)
    open_files = [one._replace(handles=20 + one.round // 20) for one in samples(*[1.0] * 200)]
    assert grown(open_files) == (0, 6)
    assert not flat(open_files)


def test_too_few_rounds_show_nothing() -> None:
    with pytest.raises(BrokenError, match="99 rounds"):
        grown(samples(*[1.0] * 119))


def test_who_spoilt_an_answer_must_be_named_and_nobody_else(tmp_path: Path) -> None:
    of = Soak(tmp_path, count=2)
    of.begun = [0, 10]
    of.spoilt = [Spoilt(5, "site-0", "error"), Spoilt(6, "site-1", "twice"), Spoilt(11, "site-0", "silent")]
    assert named(of, [{"round": 5, "site": "site-0"}]) == ([], [])  # in round 11 the process was new
    assert named(of, []).forgotten == [Spoilt(5, "site-0", "error")]
    assert named(of, [{"round": 5, "site": "site-0"}, {"round": 8, "site": "site-1"}]).wrongly == [(8, "site-1")]


def test_a_promise_that_did_not_hold_stands_on_the_page() -> None:
    part = page.of_outcomes([Outcome("a", "held", True), Outcome("b", "it did not", False)])
    assert part.broken == 1
    text = page.page(
        {"disk": part._replace(package="0123456789abcdef"), "kills": page.Part([["k", "held"]], "Seed 5.", 0)},
        {"disk": page.of_outcomes([Outcome("b", "it did here", True)])},
    )
    assert "| a | held | not done |\n| b | **FAILED**: it did not | it did here |" in text
    assert "Seed 5.\n\n| run, and what is killed | outcome, gRPC line | HTTP line |" in text
    assert "content of the package: 0123456789ab\n" in text
    assert all((f"**Not done: {name}.**" in text) == (name not in ("disk", "kills")) for name in page.NAMES)


REPORT = """
<testsuites><testsuite>
<testcase classname="tests.fuzz.test_images" name="test_files">
<properties><property name="inputs" value="10000"/><property name="refused" value="7993"/></properties></testcase>
<testcase classname="tests.fuzz.test_images" name="test_complete_ones_are_read[PNG]"/>
<testcase classname="tests.fuzz.test_settings" name="test_what_settings_open"><failure message="a crash"/>
<properties><property name="inputs" value="3609"/><property name="refused" value="3377"/></properties></testcase>
<testcase classname="tests.fuzz.test_settings" name="test_a_default"><error message="no fixture"/></testcase>
</testsuite></testsuites>
"""


def test_of_the_fuzz_tests_those_that_count_or_fail_are_reported(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert page.of_report(report).broken == 1  # pytest itself crashed
    report.write_text(REPORT)
    part = page.of_report(report)
    assert part.broken == 2
    assert part.rows == [
        ["images: files", "10,000", "7,993", "held"],
        ["settings: what settings open", "3,609", "3,377", "**FAILED**"],
        ["settings: a default", "0", "0", "**FAILED**"],
    ]
    report.write_text("<testsuites/>")
    assert page.of_report(report).broken == 1


def test_what_is_done_again_takes_the_place_of_what_was_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "FOUND", {name: tmp_path / f"{name}.json" for name in page.FOUND})
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    for text in ("it did not", "held at last"):
        page.keep("kills", page.of_outcomes([Outcome("b", text, True)]))
        page.keep("disk", page.of_outcomes([Outcome("a", "held", True)]))
    written = (tmp_path / "page.md").read_text()
    assert "held at last" in written
    assert "it did not" not in written
    assert re.search(r"\| a \|( not done \|)? held \|", written)
    assert [file.name for file in tmp_path.glob("*.json")] == [page.FOUND[lines.line().name].name]


def test_nothing_passes_a_relay_that_is_cut_until_it_is_mended() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        relayed(server.getsockname()[1]) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as site,
        server.accept()[0] as there,
    ):
        relay.cut()
        site.sendall(b"x")
        until(lambda: relay.bytes, "the byte at the relay")
        there.setblocking(False)
        with pytest.raises(BlockingIOError):
            there.recv(1)
        relay.mend()
        there.setblocking(True)
        assert there.recv(1) == b"x"
