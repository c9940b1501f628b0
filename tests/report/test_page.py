from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.report import compare, page, writing
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs import history
from tests.extras import needs
from tests.report.made import many_classes

VOID = {"meta", "img", "br"}
REFERENCES = ("src", "href", "srcset", "action", "poster", "data", "xlink:href")


class Reader(HTMLParser):
    """What a page consists of, and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in REFERENCES]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in REFERENCES]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    assert not reader.open
    return reader


def words(path: Path) -> str:
    return " ".join(" ".join(read(path).words).split())


def test_a_page_is_complete_and_refers_to_nothing_outside(pages: dict[str, Path]) -> None:
    for path in pages.values():
        reader = read(path)
        assert all(used.startswith(("#", "data:image/jpeg;base64,")) for used in reader.references)
        assert not reader.tags & {"script", "link", "iframe", "object", "embed", "form"}
        text = path.read_text()
        assert not re.findall(r"https?:|@import|url\((?!#)", text)
        assert path.stat().st_size < 900_000


def test_what_sites_say_is_shown_as_it_is_and_never_obeyed(pages: dict[str, Path]) -> None:
    text = words(pages["many"])
    assert '<script>alert("1")</script> & ��' in text
    assert "site-11 and 18 more" in text
    assert "(round 1 to 2, 2 times)" in text


def test_the_first_lines_say_what_was_run_and_what_came_of_it(pages: dict[str, Path], plain: Path) -> None:
    text, summary = words(pages["plain"]), history.read(plain).summary
    zero, adapted = (100 * summary[key]["unseen"] for key in ("zero_shot", "adapted"))
    assert "An attention adapter for the bundled CLIP was trained at 3 sites in 3 rounds, with sketch held out." in text
    assert f"from {zero:.1f} to {adapted:.1f} % on sketch" in text
    assert f"{adapted - zero:+.1f} over zero-shot {zero:.1f}" in text
    assert "124 times less than FedAVG" in text or "123 times less than FedAVG" in text
    assert "unseen, adapted" in text
    assert "privacy" not in text


@needs("privacy")
def test_privacy_personal_adapters_and_holdout_sites_have_their_places(pages: dict[str, Path]) -> None:
    text = words(pages["many"])
    assert "privacy of a site: ε 3.20 at δ = 1e-05, against anyone but the server" in text
    assert "seen, own 80.0 79.0 78.0 10.0" in text
    assert "west, unseen 50.0 56.0 +6.0" in text
    assert "The 12 best and the 12 weakest of 201 sites" in text


def test_a_run_that_failed_has_a_report_of_what_is_there_and_why(pages: dict[str, Path]) -> None:
    text = words(pages["failed"])
    assert "This run failed: usable answers: 0." in text
    assert "2 rounds of 3" in text
    assert "Accuracy over rounds" in text
    assert "Held-out images: sketch" in text
    assert re.search(r"fedclip run resume=\S+ results-dir=/", text)
    assert "fedclip predict" not in text


def test_without_images_their_features_are_named(pages: dict[str, Path]) -> None:
    text = words(pages["features"])
    assert "Confusion, adapted" in text
    assert "<img" not in pages["features"].read_text()


@needs("privacy")
def test_settings_that_differ_are_set_apart_and_all_can_be_unfolded(pages: dict[str, Path]) -> None:
    text = words(pages["many"])
    assert "personalize true false" in text
    assert "dp central off" in text
    assert "package hash 0123456789abcdef" in text
    assert "server-learning-rate 0" in text
    assert "fedclip run --nodes 201 dp=central num-server-rounds=3 personalize=true" in text


def test_a_run_that_came_to_nothing_has_a_page_that_says_so(plain: Path, tmp_path: Path, undrawn: None) -> None:
    run = tmp_path / "20260101-000000"
    run.mkdir()
    shutil.copy(plain / "settings.json", run)
    (run / "summary.json").write_text(
        json.dumps({"status": "stopped", "why": "it was ended", "round": 0, "failures": []})
    )
    text = words(writing.write(history.read(run)))
    assert "This run was stopped: it was ended. It completed no round." in text
    assert "There are no results by class: the run completed no round." in text
    assert "in 0 rounds" in text


def test_a_killed_run_is_called_that(plain: Path, tmp_path: Path, undrawn: None) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "summary.json").write_text(json.dumps({"status": "running", "round": 2, "failures": []}))
    assert "This run was killed: its process is gone, and left no reason." in words(writing.write(history.read(run)))


def test_rounds_that_metrics_jsonl_has_lost_are_named(plain: Path, tmp_path: Path, undrawn: None) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    assert "metrics.jsonl lacks" not in words(writing.write(history.read(run)))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for left, lost in ((lines[:-1], "1 round"), ([], f"{len(lines)} rounds")):
        (run / "metrics.jsonl").write_text("".join(left))
        text = words(writing.write(history.read(run)))
        assert f"metrics.jsonl lacks the lines of {lost}: they are not shown." in text


def test_a_server_without_images_says_in_a_line_why_parts_are_missing(
    plain: Path, tmp_path: Path, undrawn: None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    facts = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**facts, "data": "none"}))
    path = writing.write(history.read(run))
    assert "There are no results by class: the server of this run has no images of its own." in words(path)
    assert 'id="confusion' not in path.read_text()


def test_class_names_and_images_of_an_analysis_that_came_from_elsewhere_can_not_leave_their_place(plain: Path) -> None:
    found: dict[str, Any] = many_classes(None, 3)  # type: ignore[arg-type]
    found["class_names"] = ["<img src=x>", '"><script>', "c&d"]
    card = {"true": 0, "zero_shot": [1, 0.6], "adapted": [0, 0.7]}
    found["mended"] = [{**card, "image": image} for image in ("data:image/jpeg;base64,AAAA", 'x" onerror="y', None)]
    found["changed"]["mended"] = 3
    text = page.of_run(Story(history.read(plain)), {}, found, "<i>")
    assert "<script>" not in text
    assert "onerror" not in text
    assert text.count("<img ") == 1
    assert "&lt;img src=x&gt;" in text
    assert "&lt;i&gt;" in text
    found["mended"] = [{**card, "image": None}]
    text = page.of_run(Story(history.read(plain)), {}, found, "")
    assert "adapted: 3. There are no images to show, because the data has only their features." in text


def test_an_adapter_that_changes_nothing_is_said_to(plain: Path) -> None:
    found: dict[str, Any] = many_classes(None, 3)  # type: ignore[arg-type]
    found["weights"] = {"of": 4, "values": [[0.0, 0.0]] * 3}
    text = page.of_run(Story(history.read(plain)), {}, found, "")
    assert "it changes nothing" in text


@pytest.mark.parametrize(
    ("zero", "adapted", "expected"),
    [
        (
            (0.5, 0.4),
            (0.6, 0.5),
            "Accuracy rose from 50.0 to 60.0 % on the sites’ own images and from 40.0 to 50.0 % on sketch.",
        ),
        (
            (0.5, 0.4),
            (0.6, 0.3),
            "Accuracy rose from 50.0 to 60.0 % on the sites’ own images and fell from 40.0 to 30.0 % on sketch.",
        ),
        ((0.5, None), (0.5, None), "Accuracy stayed at 50.0 % on the sites’ own images."),
        ((None, None), (None, None), "with sketch held out."),
    ],
)
def test_the_sentence_follows_the_figures(
    zero: tuple[float | None, ...], adapted: tuple[float | None, ...], expected: str, plain: Path
) -> None:
    run = history.read(plain)
    for key, values in (("zero_shot", zero), ("adapted", adapted)):
        run.summary[key] |= dict(zip(("seen", "unseen"), values, strict=True))
    assert Story(run).sentence.endswith(expected)
    run.summary["update"] = {"sites": 7}
    assert " at 7 sites in 3 rounds" in Story(run).sentence
    below = [tile.below for tile in page.tiles(Story(run))]
    assert sum("over zero-shot" in text for text in below) == sum(value is not None for value in adapted)


def test_the_head_says_where_the_papers_recipe_lacked_the_length_of_features(plain: Path) -> None:
    run = history.read(plain)
    assert "not the paper’s result" not in page.of_run(Story(run), {}, None, "")
    run.summary["unknown_norm"] = True
    assert "This is not the paper’s result: its adapter expects features of" in page.of_run(Story(run), {}, None, "")


def test_runs_of_other_numbers_of_sites_differ_in_that(plain: Path) -> None:
    one, other = Story(history.read(plain)), Story(history.read(plain))
    assert "The settings are the same." in compare.page({"a": one, "b": other}, {})
    other.run.settings["sites"] = 60
    text = compare.page({"a": one, "b": other}, {})
    assert ">sites<" in text
    assert ">60<" in text


def test_held_out_domains_are_not_counted_as_sites(plain: Path) -> None:
    run = history.read(plain)
    before = Story(run).sites
    run.summary["holdout"] = "photo+sketch"
    run.summary["adapted"]["holdout_sites"] = {"photo": 0.5, "sketch": 0.75}
    assert Story(run).sites == before


def test_a_blend_is_shown_with_the_weights(plain: Path) -> None:
    found: dict[str, Any] = many_classes(None, 3)  # type: ignore[arg-type]
    row = [[0, 1.0]]
    found["weights"] = {"of": 4, "common": 0.5, "values": [[1.0]], "classes": [2], "rising": [row], "falling": [row]}
    run = history.read(plain)
    assert "The blend takes" not in page.of_run(Story(run), {}, found, "")
    run.summary["adapted"]["blend"] = 0.25
    text = page.of_run(Story(run), {}, found, "")
    assert "The blend takes 25 % of the adapted feature" in text
    assert "<td>class 2</td><td>0</td><td>+1.00</td>" in text


@pytest.mark.parametrize(
    ("settings", "whom"),
    [
        ({"dp": "central"}, "anyone but the server"),
        ({"dp": "local"}, "anyone, including the server"),
        ({"dp": "central", "dp_unit": "image", "secure_aggregation": True}, "anyone, including the server"),
    ],
)
def test_it_says_against_whom_noise_protects(
    plain: Path, settings: dict[str, Any], whom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history.Run, "known", replace(Settings(), **settings))
    monkeypatch.setattr(history.Run, "epsilon", 1.0)
    tiles = page.tiles(Story(history.read(plain)))
    assert tiles[-1].below == f"at δ = 1e-05, against {whom}"


def test_a_version_is_not_repeated_but_followed_by_the_next(plain: Path) -> None:
    run = history.read(plain)
    assert [name for name, _ in page.next_steps(Story(run))][1] == "Repeat this run"
    run = replace(run, settings={**run.settings, "update": "study"})
    assert page.next_steps(Story(run))[1] == (
        "Make the next version",
        f"fedclip update {run.name} results-dir={run.path.parent}",
    )
