"""Updates of a result of one round: who is asked, what is added, and that the sum is the one of a single round."""

from __future__ import annotations

import hmac
import json
import shutil
import stat
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip_flwr.base import files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.flower.grids import Node
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.one_round import SUMS, OneRound
from fedclip_flwr.learning.training import split
from fedclip_flwr.operations import forget
from fedclip_flwr.report import writing
from fedclip_flwr.runs import history, ledger, runlist
from fedclip_flwr.runs.folder import RunFolder, locked, saved_settings
from fedclip_flwr.runs.saved import load_adapter
from fedclip_flwr.site import context
from fedclip_flwr.site.holdings import divide, keyed_mark, mark_of_images
from tests.versions import CLASSES, Federation, files_with, images, tensors, write


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")  # it takes longer than all else
    return Federation(tmp_path, sites={"north": images(90, 1), "south": images(60, 2), "west": images(75, 3)})


def trained(federation: Federation) -> list[str]:
    """The sites that were asked for sums in the last run."""
    return [site for site, kind in federation.asked if kind == MessageType.TRAIN]


def test_a_site_that_comes_later_is_added_with_one_message_and_the_others_are_not_asked(
    federation: Federation,
) -> None:
    flat = federation.run("flat")
    federation.run("study", ["north", "south"])
    made = federation.update("study")
    assert made.name == "study.2"
    assert trained(federation) == ["west"]
    assert [site for site, kind in federation.asked if kind == MessageType.EVALUATE] == ["north", "south", "west"]
    assert tensors(made) == tensors(flat)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (made, flat))
    assert one["zero_shot"] == other["zero_shot"]  # of the sites that were not asked, too
    assert one["adapted"] == other["adapted"]
    assert one["contributions"] == other["contributions"]
    assert one["update"] == {"of": "study", "new": ["west"], "changed": [], "sites": 3}


def test_the_order_in_which_sites_come_changes_no_bit(federation: Federation) -> None:
    flat = tensors(federation.run("flat"))
    federation.run("a", ["west"])
    federation.update("a", connected=["south"])
    assert tensors(federation.update("a.2", connected=["north"])) == flat
    federation.run("b", ["north"])
    federation.update("b", connected=["west", "north"])
    assert tensors(federation.update("b.2", connected=["south"])) == flat


def test_sites_that_are_not_connected_still_count(federation: Federation) -> None:
    flat = tensors(federation.run("flat"))
    federation.run("study", ["north", "south"])
    made = federation.update("study", connected=["west"])
    assert tensors(made) == flat
    assert ledger.read_sites(made).keys() == {"north", "south", "west"}
    assert json.loads((made / "summary.json").read_text())["adapted"]["sites"].keys() == {"west"}


def test_a_site_that_deleted_images_or_has_new_ones_gives_other_sums_in_place_of_the_old(
    federation: Federation,
) -> None:
    federation.run("study")
    federation.sites["south"] = federation.sites["south"].rows(slice(10, None))
    more = images(50, 7)
    federation.sites["west"] = Examples(*map(torch.cat, zip(federation.sites["west"], more, strict=True)))
    made = federation.update("study")
    assert trained(federation) == ["south", "west"]
    assert tensors(made) == tensors(federation.run("flat"))
    assert json.loads((made / "summary.json").read_text())["update"]["changed"] == ["south", "west"]


def test_a_site_without_any_training_image_left_takes_back_what_it_gave(federation: Federation) -> None:
    federation.run("study")
    federation.sites["south"] = federation.sites["south"].rows(slice(0, 0))
    federation.sites["west"] = federation.sites["west"].rows(slice(0, 1))  # a single image is trained on
    made = federation.update("study", connected=["north", "west"])
    assert ledger.read_sites(made)["west"].images == 1
    assert ledger.read_sites(made)["south"].images == 36  # it was not connected


def test_without_anything_new_there_is_no_new_version(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    federation.run("study")
    capsys.readouterr()
    federation.run("", update="study")
    assert "No site has anything new since study: there is no new version." in capsys.readouterr().out
    assert {path.name for path in federation.results.iterdir()} == {"study", "latest"}
    assert (federation.results / "latest").resolve().name == "study"
    assert trained(federation) == []


@pytest.mark.parametrize("statistics", ["span", "full"])
@pytest.mark.parametrize("count", [6, 90])
def test_a_class_may_be_added_in_any_place_of_the_list(federation: Federation, statistics: str, count: int) -> None:
    """Of the other classes, the sums stay; the directions that are measured stay, too."""
    federation.run("study", statistics=statistics)
    before = load_adapter(federation.results / "study")[0].state_dict()
    names = ["aardvark", *CLASSES[:3], "cow", *CLASSES[3:], *(f"{number:03}" for number in range(count - 7))]
    numbers = [names.index(name) for name in CLASSES]
    federation.names = names
    federation.sites = {
        site: Examples(found.features, torch.tensor(numbers)[found.labels]) for site, found in federation.sites.items()
    }
    federation.sites["east"] = images(40, 8, names, of=[0, 4])
    made = federation.update("study", statistics=statistics)
    assert trained(federation) == ["east"]
    learner, facts = load_adapter(made)
    assert isinstance(learner, OneRound)
    assert facts["class_names"] == names
    after = learner.state_dict()
    assert torch.equal(after["basis"], before["basis"])
    assert torch.equal(after["counts"][numbers], before["counts"])
    assert torch.equal(after["sums"][numbers], before["sums"])
    assert after["counts"][[0, 4]].sum() == 24
    assert not torch.equal(after["moments"], before["moments"])
    federation.sites["north"] = images(70, 13, names, of=numbers[:4])
    again = federation.update(made.name, connected=["east", "north"], statistics=statistics, one_round_choose=True)
    assert trained(federation) == ["north"]
    whole = load_adapter(again)[0].state_dict()
    for name in SUMS:
        parts = [ledger.read_sums(again, site)[name] for site in ledger.read_sites(again)]
        assert torch.equal(whole[name], torch.stack(parts).sum(0))


def test_an_earlier_version_can_be_gone_back_to(federation: Federation) -> None:
    federation.run("study", ["north", "south"])
    federation.update("study")
    federation.sites["south"] = images(30, 9)
    third = federation.update("study", connected=["south"])
    assert third.name == "study.3"
    assert ledger.read_sites(third).keys() == {"north", "south"}
    assert tensors(third) == tensors(federation.run("flat", ["north", "south"]))
    found = history.versions(third)
    assert [(run.name, run.version, run.settings["update"]) for run in found] == [
        ("study", 1, ""),
        ("study.2", 2, "study"),
        ("study.3", 3, "study"),
    ]
    shown = runlist.show(["study", "study.3"], federation.results, False)
    assert "seen: gain" in shown
    assert "Version 3, from study: 0 new sites, 1 changed, 1 as before" in runlist.show([str(third)], None, False)


def test_a_next_version_gets_a_name_that_no_folder_has(federation: Federation) -> None:
    """One has the folder of an update that was killed before it wrote anything, the next a version of another run."""
    federation.run("study", ["north"])
    federation.update("study", connected=["north", "south"])
    shutil.rmtree(federation.results / "study")
    first = federation.run("study", ["west"])
    (federation.results / "study.3").mkdir()
    made = federation.update("study", connected=["west", "south"])
    assert (made.name, history.read(made).version) == ("study.4", 4)
    assert [run.path for run in history.versions(first)] == [first, made]
    (federation.results / "study.2" / "summary.json").write_text("{")  # it is none of these
    assert federation.update("study.4", connected=["north"]).name == "study.5"


@pytest.mark.parametrize("strategy", ["fedmedian", "fedtrimmedavg"])
def test_robust_sums_go_on_from_what_each_site_gave(federation: Federation, strategy: str) -> None:
    federation.run("study", ["north", "south"], strategy=strategy)
    made = federation.update("study", connected=["west"], strategy=strategy)
    assert tensors(made) == tensors(federation.run("flat", strategy=strategy))


def test_an_update_that_was_interrupted_resumes(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = federation.run("flat")
    federation.run("study", ["north", "south"])

    class PowerCutError(Exception):
        pass

    def cut(*_: Any) -> None:
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "finish", cut)
        with pytest.raises(PowerCutError):
            federation.update("study")
    federation.run("", update="study", resume="study.2")
    made = federation.results / "study.2"
    assert trained(federation) == []
    assert tensors(made) == tensors(flat)
    assert history.read(made).version == 2
    assert json.loads((made / "summary.json").read_text())["update"]["new"] == ["west"]


def test_sums_of_an_attempt_that_failed_do_not_count(federation: Federation) -> None:
    """In the first one, only one of two that are needed answers; in the second one, only the other two."""
    federation.run("flat", ["south", "west"])
    tries: list[str] = []
    plain = federation._node

    def node(site: str, config: Any) -> Any:
        answer = plain(site, config)

        def flaky(message: Any) -> Any:
            if message.metadata.message_type == MessageType.TRAIN:
                tries.append(site)
                first = tries.count(site) == 1
                if first == (site != "north"):
                    raise_here = config | {"seed": 1}  # other settings than the run's: it answers with an error
                    return plain(site, {**raise_here, "statistics": "none"})(message)
            return answer(message)

        return flaky

    federation._node = node  # type: ignore[method-assign]
    made = federation.run("study", min_sites=2)
    assert sorted(tries) == ["north", "north", "south", "south", "west", "west"]
    assert tensors(made) == tensors(federation.results / "flat")
    assert ledger.read_sites(made).keys() == {"south", "west"}
    assert not ledger.path_of(made, "north").exists()
    assert json.loads((made / "summary.json").read_text())["contributions"].keys() == {"south", "west"}


def test_what_can_not_be_updated_is_refused_in_one_line(federation: Federation) -> None:
    federation.run("study", ["north"])
    federation.run("trained", ["north"], method="adapter", num_server_rounds=1)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"update": "no-such"}, "update = 'no-such': there is no such run in .*; the latest are study, trained"),
        ({"update": "study", "seed": 1}, "that run has different settings; give the same: seed=0"),
        ({"update": "trained"}, "was trained in rounds, and has no sums to go on from"),
        ({"update": "study", "method": "adapter"}, "it is for method = 'one-round'"),
    ]
    for wrong, why in refused:
        with pytest.raises(UserError, match=why):
            federation.run("", ["north"], **wrong)
    federation.names = ["ant", "bee", "cat"]
    federation.sites = {"south": images(30, 4, federation.names, of=[0, 1])}
    with pytest.raises(UserError, match=r"class-names lacks dog, of which .* has images: add it"):
        federation.run("", update="study")
    assert {path.name for path in federation.results.iterdir()} == {"study", "trained", "latest"}


@pytest.mark.parametrize("damage", ["file", "index", "missing"])
def test_damaged_sums_are_reported_and_nothing_is_changed(federation: Federation, damage: str) -> None:
    federation.run("study")
    path = ledger.path_of(federation.results / "study", "south")
    if damage == "index":
        path = path.with_name(ledger.SITES)
        path.write_text("{}")
    elif damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    before = tensors(federation.results / "study")
    federation.sites["south"] = images(40, 11)
    with pytest.raises(UserError, match=f"{path} can't be read .*: restore a copy, or start a new run"):
        federation.run("", update="study")
    assert tensors(federation.results / "study") == before


@given(st.lists(st.integers(0, 3), min_size=40, max_size=40), st.permutations(range(4)))
@settings(max_examples=6)
def test_any_partition_added_in_any_order_is_the_flat_sum(
    tmp_path_factory: pytest.TempPathFactory, owners: list[int], order: list[int]
) -> None:
    place, rows, everything = tmp_path_factory.mktemp("any"), torch.tensor(owners), images(400, 5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "at_end", lambda *_: "no report")
        of = {f"site-{n}": everything.rows((rows == n).repeat(10)) for n in range(4)}
        federation = Federation(place, sites={site: own for site, own in of.items() if len(own.labels)})
        flat = tensors(federation.run("flat"))
        present = [f"site-{n}" for n in order if f"site-{n}" in federation.sites]
        made = federation.run("study", present[:1])
        for site in present[1:]:
            made = federation.update(made.name, connected=[site])
        assert tensors(made) == flat


def test_a_mark_of_images_changes_with_each_of_them_and_needs_the_machines_secret(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(found: Examples) -> str:
        return mark_of_images(divide("a", "", found, 0), CLASSES)

    own = images(30, 1)
    labels = own.labels.clone()
    labels[4] = (labels[4] + 1) % 4
    features = own.features.clone()
    features[7, 3] += 1e-6
    marks = {
        mark(own),
        mark(Examples(own.features, labels)),
        mark(Examples(features, own.labels)),
        mark(own.rows(slice(29))),
    }
    assert len(marks) == 4
    assert mark(own) in marks
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "elsewhere"))
    assert mark(own) not in marks
    assert (tmp_path / "elsewhere" / "secret").stat().st_mode & 0o777 == 0o600


def test_sites_that_make_their_machines_secret_at_the_same_time_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    begun = threading.Barrier(8)

    def mark(_: int) -> str:
        begun.wait()
        return keyed_mark([b"images"])

    with ThreadPoolExecutor(8) as pool:
        (made,) = {*pool.map(mark, range(8))}
    assert made == hmac.digest((tmp_path / "secret").read_bytes(), b"images", "sha256").hex()[:32]


MASKED: dict[str, Any] = {"secure_aggregation": True}


def test_masked_updates_are_exact_and_those_who_were_there_need_not_be(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three come later, two of them after others have changed; the server has no single site's sums."""
    federation.sites |= {"east": images(40, 4), "up": images(55, 5), "down": images(35, 6)}
    federation.run("study", ["north", "south", "west"], **MASKED)
    second = federation.update("study", connected=["east", "up", "down"], **MASKED)
    assert trained(federation) == ["east", "up", "down"]
    assert tensors(second) == tensors(federation.run("flat"))
    for site, count in (("north", 70), ("east", 50)):
        federation.sites[site] = images(count, 20 + count)
    federation.sites["south"] = federation.sites["south"].rows(slice(20, None))
    third = federation.update("study.2", **MASKED)
    assert sorted(trained(federation)) == ["east", "north", "south"]
    assert tensors(third) == tensors(federation.run("other"))
    assert json.loads((third / "summary.json").read_text())["update"]["changed"] == ["east", "north", "south"]
    assert [path.name for path in (third / "sums").iterdir()] == [ledger.SITES]
    assert json.loads((third / "summary.json").read_text())["contributions"] == {}


def test_fewer_than_three_changes_would_show_and_are_not_asked_for(federation: Federation) -> None:
    federation.run("study", **MASKED)
    federation.sites |= {"east": images(40, 4), "up": images(55, 5)}
    with pytest.raises(
        UserError, match="the new total, beside the earlier ones, would show the sums of east, up: wait"
    ):
        federation.run("", update="study", **MASKED)
    assert trained(federation) == []


def seven() -> dict[str, Examples]:
    return {f"s{n}": images(20 + n, 40 + n) for n in range(7)}


def test_no_two_versions_show_a_site_by_their_difference(federation: Federation) -> None:
    """Neither two that go on from the same one, nor the first and the last of three."""
    federation.sites = seven()
    names = [*federation.sites]
    federation.run("branch", names[:3], **MASKED)
    federation.update("branch", connected=names[:6], **MASKED)
    with pytest.raises(UserError, match="beside the earlier ones, would show the sums of s6: wait"):
        federation.run("", names, update="branch", **MASKED)
    federation.run("chain", names[:4], **MASKED)
    federation.update("chain", connected=names, leave="s3", **MASKED)
    with pytest.raises(UserError, match="beside the earlier ones, would show the sums of s3: wait"):
        federation.run("", names[:3] + names[4:], update="chain.2", leave="s4,s5,s6", **MASKED)


def test_who_changes_nothing_that_it_trains_with_hides_nobody(federation: Federation) -> None:
    federation.run("study", **MASKED)
    for site in ("north", "south", "west"):
        own = federation.sites[site]
        part = "train" if site == "west" else "validation"
        rows = split(len(own.labels), seed_of(0, "split", site))[0 if part == "train" else 1]
        features = own.features.clone()
        features[rows[0]] = images(1, 7).features
        federation.sites[site] = own._replace(features=features)
    with pytest.raises(UserError, match="beside the earlier ones, would show the sums of west: wait"):
        federation.run("", update="study", **MASKED)


def test_nothing_is_unmasked_if_too_few_are_left_beside_another_version(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are enough at the start."""
    federation.sites = seven() | {"s7": images(50, 9), "s8": images(30, 10)}
    names, plain = [*federation.sites], federation._node
    federation.run("study", names[:3], **MASKED)
    federation.update("study", connected=names[:6], **MASKED)

    def lost(site: str, config: Mapping[str, Any]) -> Node:
        answer = plain(site, config)

        def answers(message: Message) -> Message:
            if (site, message.metadata.message_type) == ("s8", MessageType.TRAIN):
                return Message(Error(0, "gone"), reply_to=message)
            return answer(message)

        return answers

    federation._node = lost  # type: ignore[method-assign]
    with pytest.raises(UserError, match="min-sites = 3 are needed"):
        federation.run("", names, update="study", **MASKED)
    assert "the total would show the sums of s6, s7: nothing is unmasked" in capsys.readouterr().out


def test_masked_updates_are_made_one_after_the_other(federation: Federation) -> None:
    federation.sites = seven()
    names = [*federation.sites]
    federation.run("study", names[:3], **MASKED)
    made = federation.update("study", connected=names[:6], **MASKED)
    path = made / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    with locked(made, "study.2"), pytest.raises(UserError, match=r"study\.2 is under way: .* one after the other"):
        federation.run("", names[:6], update="study", **MASKED)


def test_a_site_takes_back_what_it_gave_under_masks(federation: Federation) -> None:
    """Beside two that are new; the new version has nothing of it."""
    name = "kvzqx"
    federation.sites |= {name: images(45, 12), "east": images(40, 4), "up": images(55, 5)}
    federation.run("study", ["north", "south", name], **MASKED)
    made = federation.update("study", connected=[name, "east", "up"], leave=name, **MASKED)
    assert tensors(made) == tensors(federation.run("flat", ["north", "south", "east", "up"]))
    assert files_with(made, name.encode()) == []
    assert len(json.loads((made / "summary.json").read_text())["forgotten"]) == 1
    assert json.loads((made / "settings.json").read_text())["leave"] == ""
    said: list[str] = []
    forget.forget("study", name, federation.results, False, said.append)
    assert said == [f"study: removed, as only {name} itself could take its sums out"]
    with pytest.raises(UserError, match=r"first `fedclip update study\.2 leave=north`, which asks it to"):
        forget.forget("study.2", "north", federation.results, False, said.append)


@pytest.mark.parametrize("leave", ["nobody", "east", "south"])
def test_who_can_not_take_anything_back_is_named(federation: Federation, leave: str) -> None:
    federation.run("study", **MASKED)
    federation.sites |= {"east": images(40, 4), "up": images(55, 5), "down": images(35, 6)}
    with pytest.raises(UserError, match=f"leave = '{leave}': {leave} is not connected, or gave nothing to take back"):
        federation.run("", ["east", "up", "down"], update="study", leave=leave, **MASKED)
    assert not (federation.results / "study.2").exists()


def test_images_that_change_after_the_hello_are_not_sent_under_masks(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the server would remember them by the wrong mark, and the site could never replace them."""
    federation.sites |= {"east": images(40, 4)}
    plain, own = federation._node, federation.sites["west"]

    def changing(site: str, config: Mapping[str, Any]) -> Node:
        answer = plain(site, config)

        def answers(message: Message) -> Message:
            if (site, message.metadata.message_type) == ("west", MessageType.TRAIN):
                write(federation.place / "sites" / site, own=own._replace(labels=own.labels.roll(1)))
                context._context.cache_clear()  # as in a process of its own
                context._features.cache_clear()
            return answer(message)

        return answers

    federation._node = changing  # type: ignore[method-assign]
    made = federation.run("study", **MASKED)
    assert "west is left out: this site's images have changed since its hello" in capsys.readouterr().out
    assert ledger.read_sites(made).keys() == {"north", "south", "east"}


def test_a_damaged_total_is_noticed(federation: Federation) -> None:
    run = federation.run("study")
    whole = bytearray(tensors(run))
    whole[-1] ^= 1
    (run / "adapter.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"does not match adapter\.json: restore a copy, or start a new run"):
        federation.run("", update="study")


@pytest.mark.parametrize("masked", [False, True])
def test_an_update_needs_as_many_sites_as_the_run_only_where_they_hide_each_other(
    federation: Federation, masked: bool
) -> None:
    federation.run("study", secure_aggregation=masked, min_sites=3)
    given = Settings(update="study", results_dir=str(federation.results))
    assert saved_settings(given)[0].get("min-sites") == (3 if masked else None)


def test_what_a_site_gave_under_masks_is_for_its_user_only(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    folder = files.home() / "given" / "south"
    folder.mkdir(parents=True, mode=0o755)  # as earlier versions made it
    federation.run("study", **MASKED)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_a_site_that_has_lost_what_it_gave_says_so(federation: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    federation.run("study", **MASKED)
    shutil.rmtree(files.home() / "given" / "south")
    federation.sites = {site: images(40, 30 + n) for n, site in enumerate(federation.sites)}
    with pytest.raises(UserError, match="min-sites = 3 are needed"):
        federation.run("", update="study", **MASKED)
    assert "south is left out: this site no longer has what it gave before" in capsys.readouterr().out
