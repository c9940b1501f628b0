"""`fedclip forget`: each version is then the result of a federation without the site, and has nothing of it."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip_flwr.base import content, files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features import Features
from fedclip_flwr.inference.card import card_of
from fedclip_flwr.learning import choosing
from fedclip_flwr.operations import forget as forgetting
from fedclip_flwr.report import writing
from fedclip_flwr.runs import checkpoint, history, ledger, runlist
from fedclip_flwr.runs.folder import locked, saved_settings
from fedclip_flwr.runs.saved import load_adapter
from fedclip_flwr.server.nodes import LETTER_FROM
from tests.versions import Federation, files_with, images, tensors

WEST = "kvzqx-west"
"""A name that is in no file by chance."""


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(writing, "at_end", lambda *_: "no report")  # it takes longer than all else
    return Federation(tmp_path, sites={"north": images(90, 1), "south": images(60, 2), WEST: images(75, 3)})


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "write", lambda *_: None)


def forget(federation: Federation, run: str, site: str = WEST, earlier: bool = False) -> list[str]:
    """Returns what was said meanwhile."""
    said: list[str] = []
    said.append(forgetting.forget(run, site, federation.results, earlier, said.append))
    return said


def total_of(run: Path) -> bytes:
    """Numbers of the result that no other result has by chance."""
    numbers: torch.Tensor = load_adapter(run)[0].state_dict()["moments"][:4]
    return numbers.numpy().tobytes()


def sums_in(run: Path, site: str) -> list[bytes]:
    """Numbers of the site's sums that no other file has by chance: of two classes, and of the moments."""
    sums = ledger.read_sums(run, site)
    rows = [sums["sums"][0, :4], sums["sums"][1, :4], sums["moments"][:4]]
    return [row.numpy().tobytes() for row in rows]


def test_every_version_is_the_result_without_the_site_and_keeps_nothing_of_it(federation: Federation) -> None:
    two = federation.run("two", ["north", "south"])
    one = federation.run("one", ["north"])
    first = federation.run("study", ["north", WEST], personalize=True)
    writing.write(history.read(first))
    second = federation.update("study", personalize=True)
    marks = [WEST.encode(), *sums_in(second, WEST)]
    marks += [total_of(run) for run in (first, second)]
    assert {"summary.json", "report.html", f"sums/{WEST}.safetensors"} < {*files_with(first, *marks)}

    said = forget(federation, "study")
    assert said[:2] == ["study: now the result of its other sites", "study.2: now the result of its other sites"]
    assert tensors(first) == tensors(one)
    assert tensors(second) == tensors(two)
    for run, flat in ((first, one), (second, two)):
        assert files_with(run, *marks) == []
        facts, expected = (json.loads((path / "adapter.json").read_text()) for path in (run, flat))
        assert facts == expected
        summary, other = (json.loads((path / "summary.json").read_text()) for path in (run, flat))
        assert summary["zero_shot"] == other["zero_shot"]
        assert summary["adapted"]["unseen"] == other["adapted"]["unseen"]
        assert summary["adapted"]["metrics"]["unseen"] == other["adapted"]["metrics"]["unseen"]
        assert (summary["adapted"]["seen"], summary["adapted"]["sites"]) == (None, {})
        assert summary["contributions"] == other["contributions"]
        assert summary["examples"] == other["examples"]
        load_adapter(run)
        assert (run / "report.html").exists()
    home = files.home()
    assert not list(home.glob(f"personal/*/{WEST}"))
    assert list(home.glob("personal/study-*/north"))


def test_report_card_and_list_say_that_and_when_something_was_forgotten(federation: Federation) -> None:
    run = federation.run("study")
    forget(federation, "study")
    when = json.loads((run / "summary.json").read_text())["forgotten"]
    assert [each["sites"] for each in when] == [1]
    day = when[0]["when"][:10]
    sentence = f"A site was forgotten, and this is the result without it ({day})"
    assert sentence in (run / "report.html").read_text()
    assert sentence in str(card_of(load_adapter(run)[1], run))
    assert sentence in runlist.show([str(run)], None, False)
    forget(federation, "study", "north")
    assert "2 sites were forgotten, and this is the result without them" in history.read(run).forgotten
    (line,) = json.loads(runlist.show([str(run)], None, True))
    assert len(line["forgotten"]) == 2
    assert line["seen"]["adapted"] is None
    summary = json.loads((run / "summary.json").read_text())
    summary["forgotten"][0]["sites"] = 2  # as of an update in which two leave
    (run / "summary.json").write_text(json.dumps(summary))
    assert "3 sites were forgotten" in history.read(run).forgotten


@pytest.mark.usefixtures("without_report")
def test_scores_come_back_with_an_update(federation: Federation) -> None:
    federation.run("study")
    forget(federation, "study")
    made = federation.update("study", connected=["north", "south"])
    assert [kind for _, kind in federation.asked].count("train") == 0
    summary = json.loads((made / "summary.json").read_text())
    flat = json.loads((federation.run("flat", ["north", "south"]) / "summary.json").read_text())
    assert summary["adapted"] == flat["adapted"]
    assert summary["zero_shot"] == flat["zero_shot"]
    assert summary["contributions"] == flat["contributions"]
    assert files_with(made, WEST.encode()) == []


@pytest.mark.usefixtures("without_report")
def test_images_that_a_site_has_deleted_are_taken_out_of_the_versions_before(federation: Federation) -> None:
    first = federation.run("study")
    deleted = [*sums_in(first, WEST), total_of(first)]
    federation.sites[WEST] = federation.sites[WEST].rows(slice(20, None))
    second = federation.update("study")
    newest = tensors(second)
    federation.update("study.2", connected=["north"], strategy="fedmedian")  # with the same images
    assert forget(federation, "study", earlier=True)[:-1] == ["study: now the result of its other sites"]
    assert tensors(second) == newest
    assert tensors(first) == tensors(federation.run("two", ["north", "south"]))
    for number in ("", ".2", ".3"):
        assert files_with(federation.results / f"study{number}", *deleted) == []
    with pytest.raises(UserError, match=f"{WEST}: no earlier version has other sums of it; the sites of study are"):
        forget(federation, "study", earlier=True)


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("strategy", ["fedmedian", "fedtrimmedavg"])
@pytest.mark.parametrize("statistics", ["span", "full"])
def test_robust_sums_forget_as_well(federation: Federation, strategy: str, statistics: str) -> None:
    run = federation.run("study", strategy=strategy, statistics=statistics)
    forget(federation, "study")
    assert tensors(run) == tensors(federation.run("flat", ["north", "south"], strategy=strategy, statistics=statistics))


@pytest.mark.usefixtures("without_report")
def test_constants_that_the_site_helped_to_choose_are_forgotten_too(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "best", lambda _: choosing.GRID[0])
    run = federation.run("study", one_round_choose=True)
    plain = tensors(federation.run("plain", ["north", "south"]))
    forget(federation, "study")
    assert tensors(run) == plain


@pytest.mark.usefixtures("without_report")
def test_forgetting_the_last_site_leaves_zero_shot(federation: Federation) -> None:
    run = federation.run("study", [WEST])
    forget(federation, "study")
    learner, _ = load_adapter(run)
    assert int(learner.state_dict()["counts"].sum()) == 0
    assert files_with(run, WEST.encode()) == []


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("moment", ["write_tensors", "write_records", "write_sites"])
def test_a_forget_that_was_interrupted_can_be_repeated(
    federation: Federation, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation.run("study")
    expected = tensors(federation.run("flat", ["north", "south"]))

    class PowerCutError(Exception):
        pass

    def cut(*_: Any, **__: Any) -> None:
        raise PowerCutError

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(ledger if moment == "write_sites" else forgetting, moment, cut)
        with pytest.raises(PowerCutError):
            forgetting.forget("study", WEST, federation.results, False, said.append)
    assert said == [f"{WEST} is not forgotten in study yet: run this again"]
    forget(federation, "study")
    assert tensors(run) == expected
    summary = json.loads((run / "summary.json").read_text())
    assert [each["sites"] for each in summary["forgotten"]] == [1]
    assert json.loads((run / "settings.json").read_text())["sites"] == 2
    assert files_with(run, WEST.encode()) == []


@pytest.mark.usefixtures("without_report")
def test_a_version_that_was_not_completed_is_removed(federation: Federation) -> None:
    federation.run("study")
    shutil.copytree(federation.results / "study", federation.results / "study.2")
    for name, change in (("settings.json", {"version": 2}), ("summary.json", {"status": "stopped"})):
        path = federation.results / "study.2" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = forget(federation, "study")
    assert said[:2] == ["study: now the result of its other sites", "study.2: removed, as it was not complete"]
    assert not (federation.results / "study.2").exists()


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("left", ["sums", "checkpoint", "damaged", "failure"])
def test_an_unfinished_version_alone_can_have_something_of_the_site(federation: Federation, left: str) -> None:
    """Before `forget` changes anything, no version may be under way."""
    first = federation.run("study", ["north", "south"])
    before, unfinished = tensors(first), federation.update("study")
    if left != "sums":
        shutil.rmtree(unfinished / "sums")
    if left != "checkpoint":
        shutil.rmtree(unfinished / "checkpoint")
    if left == "damaged":
        checkpoint.path_of(unfinished).parent.mkdir()
        checkpoint.path_of(unfinished).write_bytes(b"half")
    path = unfinished / "summary.json"
    failures = [{"round": 1, "site": "south", "why": f"{LETTER_FROM}{WEST}"}] if left == "failure" else []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "stopped", "failures": failures}))
    with locked(unfinished, "study.2"), pytest.raises(UserError, match=r"study\.2: that run is still under way"):
        forget(federation, "study")
    assert forget(federation, "study")[0] == "study.2: removed, as it was not complete"
    assert not unfinished.exists()
    assert tensors(first) == before
    with pytest.raises(UserError, match=f"{WEST}: no version of study has anything of it"):
        forget(federation, "study")


@pytest.mark.usefixtures("without_report")
def test_a_removal_that_was_killed_at_any_moment_can_be_repeated(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.run("study", ["north", "south"])
    unfinished = federation.update("study", personalize=True)
    path = unfinished / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "stopped"}))
    home, kept, left = files.home(), federation.place / "kept", 0

    class KilledError(BaseException):
        pass

    list_folder, remove_file, total = Path.iterdir, os.unlink, total_of(unfinished)

    def worst_first(path: Path) -> list[Path]:
        """First what shows that the version has something of the site."""
        return sorted(list_folder(path), key=lambda each: (each.name == "summary.json", not each.is_dir()))

    def unlink(*path: Any, **how: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        remove_file(*path, **how)

    shutil.copytree(federation.results, kept / "runs", symlinks=True)
    shutil.copytree(home / "personal", kept / "personal")
    for moment in range(99):
        left = moment
        try:
            with monkeypatch.context() as patched:
                patched.setattr(Path, "iterdir", worst_first)
                patched.setattr(os, "unlink", unlink)
                forget(federation, "study")
            break
        except KilledError:
            forget(federation, "study")
        assert files_with(federation.results, WEST.encode(), total) == []
        assert not list(home.glob(f"personal/*/{WEST}"))
        for name, place in (("runs", federation.results), ("personal", home / "personal")):
            shutil.rmtree(place)
            shutil.copytree(kept / name, place, symlinks=True)
    assert moment > 8


@pytest.mark.usefixtures("without_report")
def test_an_update_that_begins_meanwhile_is_noticed_by_one_of_the_two(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `forget` if the next version is there before it locks the others, and else by the update."""
    first = federation.run("study")
    before = tensors(first)

    def updates(path: Path, what: str) -> AbstractContextManager[None]:
        patched.undo()
        federation.update("study", connected=["north"], strategy="fedmedian")
        return locked(path, what)

    with monkeypatch.context() as patched:
        patched.setattr(forgetting, "locked", updates)
        with pytest.raises(UserError, match=r"study has just been changed by another process: run this again"):
            forget(federation, "study")
    assert tensors(first) == before

    open_earlier = ledger.Earlier.open

    def forgets(settings: Settings, features: Features) -> ledger.Earlier:
        opened = open_earlier(settings, features)
        forget(federation, "study")
        return opened

    monkeypatch.setattr(ledger.Earlier, "open", forgets)
    with pytest.raises(UserError, match="study has just been changed by another process: run this again"):
        federation.update("study", connected=["south"], strategy="fedmedian")
    assert files_with(federation.results, WEST.encode()) == []


@pytest.mark.usefixtures("without_report")
def test_a_version_in_whose_update_the_site_was_not_connected_says_so_too(federation: Federation) -> None:
    federation.run("study", ["north", WEST])
    second = federation.update("study", connected=["south"])
    forget(federation, "study")
    summary = json.loads((second / "summary.json").read_text())
    assert [each["sites"] for each in summary["forgotten"]] == [1]
    assert summary["update"]["sites"] == 2
    assert tensors(second) == tensors(federation.run("flat", ["north", "south"]))


@pytest.mark.usefixtures("without_report")
def test_a_site_that_only_tested_or_failed_leaves_no_name(federation: Federation) -> None:
    run = federation.run("study", ["north", "south"])
    before, path = tensors(run), run / "summary.json"
    summary = json.loads(path.read_text())
    summary["zero_shot"]["holdout_sites"][WEST] = 0.625
    summary["failures"] += [
        {"round": 0, "site": f"{WEST} (node 12)", "why": "there are two of this name"},
        {"round": 0, "site": "node 12", "why": f"{WEST}: it has no images"},
        {"round": 1, "site": "north", "why": f"{LETTER_FROM}{WEST}"},
        {"round": 0, "site": "south", "why": "no answer"},
    ]
    path.write_text(json.dumps(summary))
    forget(federation, "study")
    assert files_with(run, WEST.encode()) == []
    assert tensors(run) == before
    made = json.loads(path.read_text())
    assert [failure["site"] for failure in made["failures"]] == ["south"]
    assert made["zero_shot"]["unseen"] is made["adapted"]["unseen"] is None
    assert made["zero_shot"]["sites"].keys() == {"north", "south"}


@pytest.mark.usefixtures("without_report")
def test_a_version_is_rewritten_in_an_order_that_allows_to_repeat_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its summary alone says that this site, which only failed, was there."""
    run = federation.run("study", ["north", "south"])
    summary = json.loads((run / "summary.json").read_text())
    summary["failures"] = [{"round": 0, "site": WEST, "why": "no answer"}]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "report.html").write_text(WEST)
    write = forgetting.write_records

    def killed_afterwards(*given: Any) -> None:
        write(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, "write_records", killed_afterwards)
    with pytest.raises(KeyboardInterrupt):
        forget(federation, "study")
    assert files_with(run, WEST.encode()) == []


@pytest.mark.usefixtures("without_report")
def test_a_damaged_version_is_named_and_nothing_is_changed(federation: Federation) -> None:
    first = federation.run("study")
    second, before = federation.update("study", connected=["north"], strategy="fedmedian"), tensors(first)
    (second / "settings.json").write_text("half")
    with pytest.raises(UserError, match=r"study\.2"):
        forget(federation, "study")
    assert tensors(first) == before


@pytest.mark.usefixtures("without_report")
def test_a_damaged_version_with_a_name_of_its_own_is_named_and_other_runs_are_not(federation: Federation) -> None:
    first = federation.run("study", ["north", WEST])
    paper, before = federation.update("study", name="paper"), tensors(first)
    (federation.run("other", ["north"]) / "summary.json").write_text("{")
    kept = (paper / "summary.json").read_text()
    (paper / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"paper/summary\.json is damaged"):
        forget(federation, "study")
    assert tensors(first) == before

    (paper / "summary.json").write_text(kept)
    assert "can't be read" not in forget(federation, "study")[-1]
    (paper / "settings.json").write_text("half")
    unread = "The settings of paper can't be read: look there for versions of study, too"
    with pytest.raises(UserError, match=rf"no version of study has anything of it; .*\. {unread}$"):
        forget(federation, "study")
    assert forget(federation, "study", "north")[-1].endswith(f"replace them. {unread}.")


@pytest.mark.usefixtures("without_report")
def test_the_closing_line_speaks_of_scores_only_if_they_are_gone(federation: Federation) -> None:
    federation.run("study")
    federation.sites[WEST] = federation.sites[WEST].rows(slice(20, None))
    federation.update("study")
    assert "scores" not in forget(federation, "study", earlier=True)[-1]
    assert "The other sites' scores were of the earlier result" in forget(federation, "study")[-1]


@pytest.mark.usefixtures("without_report")
def test_of_simulated_sites_no_update_is_recommended(federation: Federation) -> None:
    """It would simulate as many sites as before, so each has the same images, the forgotten one too."""
    run = federation.run("study")
    assert (
        "Don't update study: its sites were simulated, and north would take" in forget(federation, "study", "north")[-1]
    )
    update = Settings(update="study", results_dir=str(federation.results))
    assert saved_settings(update)[1] == 3
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "simulated": None}))  # real sites
    assert "are gone, too: `fedclip update study` asks for new ones." in forget(federation, "study")[-1]
    assert saved_settings(update)[1] == 1


@pytest.mark.usefixtures("without_report")
def test_a_site_with_the_name_of_another_ones_file_keeps_its_own(federation: Federation) -> None:
    name = "St. Mary"
    other = content.file_name(name)
    federation.sites |= {name: images(40, 4), other: images(50, 5)}
    run = federation.run("study", [other, name, "north"])
    forget(federation, "study", name)
    assert tensors(run) == tensors(federation.run("flat", [other, "north"]))
    assert ledger.read_sums(run, other)
    ordinary = ["north", "Real World-0", "clinic-2024", "a-123456789"]
    found = [ledger.path_of(run, site).stem for site in ordinary]
    assert found == [content.file_name(site) for site in ordinary]  # as in earlier versions


@pytest.mark.usefixtures("without_report")
def test_what_can_not_be_forgotten_is_said_in_one_line(federation: Federation) -> None:
    federation.run("trained", ["north"], method="adapter", num_server_rounds=1)
    with pytest.raises(UserError, match=r"trained was trained in rounds: .* can't be taken out\. Train again without"):
        forget(federation, "trained", "north")
    run = federation.run("study", ["north", "south"])
    with pytest.raises(UserError, match=f"{WEST}: no version of study has anything of it; .* are north, south"):
        forget(federation, "study")
    with pytest.raises(UserError, match="there is no such run"):
        forget(federation, "no-such")
    shutil.rmtree(run / "sums")
    with pytest.raises(UserError, match="does not have the sums of its sites: an earlier version of this package"):
        forget(federation, "study")
    with locked(run, "study"), pytest.raises(UserError, match="study: that run is still under way"):
        forget(federation, "study", "north")


@given(st.lists(st.integers(0, 2), min_size=40, max_size=40))
@settings(max_examples=5)
def test_of_any_partition_a_sum_without_a_site_is_that_of_the_others(
    tmp_path_factory: pytest.TempPathFactory, owners: list[int]
) -> None:
    rows, everything = torch.tensor(owners), images(400, 5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "at_end", lambda *_: "no report")
        patched.setattr(writing, "write", lambda *_: None)
        of = {f"site-{n}": everything.rows((rows == n).repeat(10)) for n in range(3)}
        federation = Federation(
            tmp_path_factory.mktemp("any"), sites={site: own for site, own in of.items() if len(own.labels)}
        )
        first, *others = federation.sites
        run = federation.run("study")
        forget(federation, "study", first)
        if others:
            assert tensors(run) == tensors(federation.run("flat", others))
