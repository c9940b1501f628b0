"""A relay passes on the sums of its group: the total is the flat one, and nothing is lost or counted twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedclip_flwr.base import tensorfile
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange.records import HELLO, may_leave
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning.one_round import SUMS
from fedclip_flwr.operations import forget
from fedclip_flwr.report import writing
from fedclip_flwr.runs import history, ledger
from fedclip_flwr.runs.relay import group_of
from fedclip_flwr.server import one_round
from tests.versions import CLASSES, Federation, images, tensors

GROUPS = {"west": ["a", "b"], "east": ["c", "d", "e"]}


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")  # it takes longer than all else
    return Federation(tmp_path, sites={site: images(30 + 9 * n, n) for n, site in enumerate("abcdef")})


def grouped(federation: Federation, groups: dict[str, list[str]] = GROUPS, **how: Any) -> list[str]:
    """Runs each group's federation; returns the sites of the federation above: relays, and sites in no group."""
    for relay, sites in groups.items():
        federation.relays[relay] = federation.run(f"of-{relay}", sites, **how)
    inside = {site for sites in groups.values() for site in sites}
    return [*groups, *(site for site in federation.sites if site not in inside)]


def trained(federation: Federation) -> list[str]:
    return [site for site, kind in federation.asked if kind == MessageType.TRAIN]


def wrapped(federation: Federation, wrap: Any) -> None:
    """Lets `wrap(site, node)` make another node of each."""
    plain = federation._node

    def node(site: str, config: Any) -> Node:
        made: Node = wrap(site, plain(site, config))
        return made

    federation._node = node  # type: ignore[method-assign]


@given(st.data())
@settings(max_examples=5)
@pytest.mark.parametrize("statistics", ["span", "full"])
def test_any_sites_in_any_groups_have_the_flat_total(
    tmp_path_factory: pytest.TempPathFactory, statistics: str, data: st.DataObject
) -> None:
    """Sites hold any rows, and a group may be one of two floors below the root."""
    owners = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=40, max_size=40)))
    floors = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    everything = images(400, 5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "at_end", lambda *_: "no report")
        of = {f"site-{n}": everything.rows((owners == n).repeat(10)) for n in range(6)}
        sites = {site: own for site, own in of.items() if len(own.labels)}
        federation = Federation(tmp_path_factory.mktemp("any"), sites=sites)
        how = {"statistics": statistics}
        flat = tensors(federation.run("flat", **how))
        within = {n: [f"site-{k}" for k in range(6) if floors[k] == n and f"site-{k}" in sites] for n in range(4)}
        groups = {f"group-{n}": within[n] for n in (1, 2) if within[n]}
        present = grouped(federation, groups, **how)
        lower = [name for name in present if name not in within[0]]
        if within[3] and lower:  # they and the two groups are a group, too
            federation.relays["upper"] = federation.run("of-upper", lower, **how)
            present = ["upper", *within[0]]
        assert tensors(federation.run("root", present, **how)) == flat


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_a_root_without_images_of_its_own_and_only_relays_has_the_flat_total(
    federation: Federation, statistics: str
) -> None:
    how: dict[str, Any] = {"statistics": statistics}
    flat = federation.run("flat", **how)
    groups = {**GROUPS, "north": ["f"]}
    made = federation.run("root", grouped(federation, groups, **how), **how, holdout="")
    assert tensors(made) == tensors(flat)
    summary = json.loads((made / "summary.json").read_text())
    assert summary["adapted"]["seen"] is None
    assert summary["adapted"]["sites"] == dict.fromkeys(groups)
    assert {site: images for site, (images, _) in summary["contributions"].items()} == {
        relay: sum(ledger.read_sites(federation.relays[relay])[site].images for site in sites)
        for relay, sites in groups.items()
    }
    writing.write(history.read(made))
    assert "north" in (made / "report.html").read_text()


def test_only_relays_whose_group_has_something_new_are_asked_again(federation: Federation) -> None:
    present = grouped(federation)
    federation.run("root", present)
    federation.run("root-again", update="root", connected=present)
    assert trained(federation) == []
    federation.sites["b"] = images(77, 33)
    assert federation.update("of-west", connected=["b"]).name == "of-west.2"
    made = federation.update("root", connected=present)
    assert trained(federation) == ["west"]
    assert tensors(made) == tensors(federation.run("flat", [*"abcdef"]))
    assert json.loads((made / "summary.json").read_text())["update"]["changed"] == ["west"]


def test_what_a_group_forgets_the_root_forgets_with_an_update(federation: Federation) -> None:
    present = grouped(federation)
    first = federation.run("root", present)
    forget.forget("of-east", "d", federation.results, False, lambda _: None)
    made = federation.update("root", connected=present)
    assert trained(federation) == ["east"]
    without = tensors(federation.run("flat", [*"abcef"]))
    assert tensors(made) == without
    forget.forget("root", "east", federation.results, True, lambda _: None)
    assert tensors(first) == tensors(federation.run("before", [*"abf"]))
    assert tensors(made) == without
    forget.forget("root", "west", federation.results, False, lambda _: None)
    assert tensors(made) == tensors(federation.run("left", [*"cef"]))


def test_a_relay_masks_the_sums_and_replaces_them_as_any_site(federation: Federation) -> None:
    """Below, one group has secure aggregation, too."""
    masked: dict[str, Any] = {"secure_aggregation": True}
    flat = tensors(federation.run("flat"))
    federation.relays["east"] = federation.run("of-east", ["c", "d", "e"], **masked)
    federation.relays["west"] = federation.run("of-west", ["a", "b"])
    made = federation.run("root", ["east", "west", "f"], **masked)
    assert tensors(made) == flat
    assert json.loads((made / "summary.json").read_text())["contributions"] == {}
    for site in "acf":
        federation.sites[site] = images(50, 90 + ord(site))
    federation.sites |= {"g": images(20, 70), "h": images(25, 71)}
    federation.update("of-west", connected=["a"])
    federation.update("of-east", connected=["c", "g", "h"], **masked)
    made = federation.update("root", connected=["east", "west", "f"], **masked)
    assert sorted(trained(federation)) == ["east", "f", "west"]
    assert tensors(made) == tensors(federation.run("again", [*"abcdefgh"]))


def test_a_relay_that_fails_in_the_middle_is_left_out_and_later_counts_once(federation: Federation) -> None:
    """With `min-sites` it is asked again; without, an update brings what it lacks."""
    flat, present, tries = tensors(federation.run("flat")), grouped(federation), []

    def flaky(site: str, answer: Node) -> Node:
        def answers(message: Message) -> Message:
            if (site, message.metadata.message_type) == ("west", MessageType.TRAIN):
                tries.append(answer(message))  # it has answered, but its answer is lost
                if len(tries) in (1, 3):
                    return Message(Error(1, "Node Unavailable"), reply_to=message)
            return answer(message)

        return answers

    wrapped(federation, flaky)
    assert tensors(federation.run("patient", present, min_sites=3)) == flat
    assert len(tries) == 2
    partial = federation.run("root", present)
    assert ledger.read_sites(partial).keys() == {"east", "f"}
    assert tensors(federation.update("root", connected=present)) == flat
    assert len(tries) == 4


def test_sums_that_change_after_the_hello_are_not_sent(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    present = grouped(federation)

    def between(site: str, answer: Node) -> Node:
        def answers(message: Message) -> Message:
            if (site, message.metadata.message_type) == ("west", MessageType.TRAIN):
                forget.forget("of-west", "b", federation.results, False, lambda _: None)
            return answer(message)

        return answers

    plain = federation._node
    wrapped(federation, between)
    made = federation.run("root", present)
    assert ledger.read_sites(made).keys() == {"east", "f"}
    said = capsys.readouterr().out
    assert "west is left out: the sums of this site's group have changed since its hello: the next update" in said
    federation._node = plain  # type: ignore[method-assign]
    made = federation.update("root", connected=present)
    assert tensors(made) == tensors(federation.run("flat", [*"acdef"]))


def test_a_root_that_asks_for_noise_gets_no_exact_sums(federation: Federation) -> None:
    present = grouped(federation)
    noises: list[dict[str, Any]] = [{"statistics": "gradient"}, {"dp": "local", "dp_unit": "image", "epsilon": 20.0}]
    for noise in noises:
        with pytest.raises(
            UserError, match=r"this site is a relay: its sums are exact, so the run can't have a gradient"
        ):
            federation.run("root", [one for one in present if one != "f"], **noise)
        assert trained(federation) == []
        shutil.rmtree(federation.results / "root")


def test_a_relay_goes_on_when_the_version_that_it_was_started_with_was_removed(federation: Federation) -> None:
    grouped(federation)
    federation.update("of-west", connected=["d"])
    shutil.rmtree(federation.results / "of-west")
    assert group_of({"site": "west", "group": str(federation.relays["west"])}).run.name == "of-west.2"
    with pytest.raises(UserError, match=r"of-west: there is no run of that name, but of-west\.2"):
        history.find("of-west", federation.results)
    (federation.results / "of-west.2" / "metrics.jsonl").write_text("half")
    with pytest.raises(UserError, match="metrics"):
        group_of({"site": "west", "group": str(federation.relays["west"])})


def test_a_group_may_lack_classes_and_have_them_in_another_order(federation: Federation) -> None:
    """With `full`, in which the directions depend on no list; a class that the root lacks is named."""
    how: dict[str, Any] = {"statistics": "full"}
    flat = federation.run("flat", ["a", "b", "f"], **how)
    other = ["dog", "ant", "cat", "bee"]
    for site in "ab":
        own = federation.sites[site]
        federation.sites[site] = own._replace(labels=torch.tensor([1, 3, 2, 0])[own.labels])
    federation.names = other
    federation.relays["west"] = federation.run("of-west", ["a", "b"], **how)
    federation.names = CLASSES
    assert tensors(federation.run("root", ["west", "f"], **how)) == tensors(flat)
    federation.names = ["ant", "bee", "cat", "eel"]
    federation.sites = {"x": images(30, 4, federation.names, of=[0, 1])}
    with pytest.raises(UserError, match=r"west: class-names lacks dog, of which this site's group has images: add it"):
        federation.run("less", ["west"], **how)


def test_directions_of_the_federation_above_are_taken_from_the_relay(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are so many images that the unit is larger; the group's own prompts have other directions."""
    with monkeypatch.context() as patched:
        patched.setattr(one_round, "bits_for", lambda images: 4)
        flat = federation.run("flat")
        federation.names = CLASSES[:4]
        federation.relays["west"] = federation.run("of-west", ["a", "b"])
        federation.names = CLASSES
        root = federation.run("root", ["west", *"cdef"])
    assert ledger.read_sites(root).keys() == {*"cdef"}
    said = capsys.readouterr().out.split("make a new run with directions=")[1].split()[0]
    federation.names = CLASSES[:4]
    again = federation.relays["west"] = federation.run("west-again", ["a", "b"], directions=said)
    federation.names = CLASSES
    made = federation.update("root", connected=["west", *"cdef"])
    assert tensors(made) == tensors(flat)
    assert int(load_file(again / "adapter.safetensors")["bits"]) == 4
    monkeypatch.setattr(one_round, "bits_for", lambda images: 3)
    with pytest.raises(UserError, match="too many images for the unit"):
        federation.run("", ["a"], directions=said)


@pytest.mark.parametrize("wrong", ["statistics", "model", "unit", "lacks", "missing", "damaged"])
def test_directions_that_do_not_fit_are_refused(federation: Federation, tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "given.safetensors"
    basis = torch.zeros(64, 90 if wrong == "model" else 80, dtype=torch.int32)
    given = {"basis": basis, "bits": torch.tensor(6 if wrong == "unit" else 5)}
    if wrong == "lacks":
        del given["bits"]
    if wrong != "missing":
        tensorfile.save(given, path, tensorfile.with_checksum({}, given))
    if wrong == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    expected = {"lacks": "lacks 'bits'", "missing": "can't be read", "damaged": r"can't be read \(checksum mismatch\)"}
    with pytest.raises(UserError, match=f"directions = .*{expected.get(wrong, 'they are for another model, or not')}"):
        federation.run("x", ["a"], directions=str(path), statistics="full" if wrong == "statistics" else "span")
    assert not (federation.results / "x").exists()


def test_what_leaves_a_relay_is_what_may_and_nothing_of_a_single_site(federation: Federation) -> None:
    left: list[Any] = []

    def noted(site: str, answer: Node) -> Node:
        def answers(message: Message) -> Message:
            reply = answer(message)
            if site == "west":
                left.append({name: dict(record) for name, record in reply.content.items()})
            return reply

        return answers

    present = grouped(federation)
    wrapped(federation, noted)
    made = federation.run("root", present, one_round_choose=True, personalize=True)
    allowed = may_leave(SUMS, by_class=False)
    assert all(record.keys() <= allowed[name] for content in left for name, record in content.items())
    hello, train, *evaluations = left
    assert hello["hello"].keys() == HELLO
    assert train["arrays"].keys() == {*SUMS}
    assert [one.keys() for one in evaluations] == [{"metrics"}] * 3
    images = ledger.read_sites(made)["west"].images
    assert {key: hello["hello"][key] for key in ("train", "validation", "test")} == {
        "train": images,
        "validation": 0,
        "test": 0,
    }
    assert all(one["metrics"]["num-examples"] == images and not any(one["metrics"]["test"]) for one in left[1:])


def test_a_relay_that_has_nothing_to_pass_on_says_so_in_one_line(
    federation: Federation, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    group = federation.run("group", ["a", "b"])
    trained_in_rounds = federation.run("rounds", ["a"], method="adapter", num_server_rounds=1)
    robust = federation.run("robust", ["a", "b"], strategy="fedmedian")
    killed = federation.run("killed", ["a"])
    summary = json.loads((killed / "summary.json").read_text())
    (killed / "summary.json").write_text(json.dumps({**summary, "status": "failed"}))
    other = federation.run("other", ["a"])
    facts = json.loads((other / "adapter.json").read_text())
    (other / "adapter.json").write_text(json.dumps({**facts, "templates": ["some {}"]}))
    cut = federation.run("cut", ["a"])
    save_file({"counts": torch.ones(2)}, cut / "adapter.safetensors")
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "no-such", {}, "there is no run in that folder"),
        (trained_in_rounds, {}, "rounds was trained in rounds: only the sums of method = 'one-round' can be passed on"),
        (robust, {}, "its result is not the sum of all images, which alone can be added; make it with strategy"),
        (killed, {}, "killed is not complete (failed): finish it, or start a new run"),
        (other, {}, "this site's group was made with another model or other prompts: sums of the two can't be added"),
        (cut, {}, "does not match adapter.json"),
        (group, {"method": "adapter"}, "this site is a relay: it has sums and no images, so it needs method"),
    ]
    for number, (run, how, why) in enumerate(refused):
        federation.relays["west"] = run
        federation.run(f"root-{number}", ["west", "f"], **how, num_server_rounds=1)
        said = capsys.readouterr().out
        assert why in said, said


def test_a_relay_has_no_images_of_its_own(federation: Federation) -> None:
    run = str(federation.run("group", ["a"]))
    assert str(group_of({"site": "west", "group": run, "secure-aggregation": True})) == "18 images of group"
    with pytest.raises(UserError, match="data, role in the node config: a relay has no images of its own; leave it"):
        group_of({"site": "west", "group": run, "role": "holdout", "data": "folder:/x"})
    with pytest.raises(UserError, match="this site has no name"):
        group_of({"group": run})
