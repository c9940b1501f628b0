from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedclip_flwr.features.base import Features
from fedclip_flwr.report import compare_plots, drawing, heldout_plots, output, plots
from fedclip_flwr.report.drawing import Plot, apart, styled
from fedclip_flwr.report.story import Story
from fedclip_flwr.report.theme import DARK, LIGHT
from fedclip_flwr.runs import history
from tests.report.made import a_run, many_classes


def drawn_as(make: Callable[[], Plot | None]) -> tuple[Plot, str]:
    """A plot, and its SVG."""
    with styled():
        plot = make()
        assert plot
        return plot, drawing.as_svg(plot)


def texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.fixture
def story(plain: Path) -> Story:
    return Story(history.read(plain))


def test_the_plot_of_rounds_names_its_lines_with_their_last_values(story: Story) -> None:
    plot, svg = drawn_as(lambda: plots.rounds(story))
    last = story.lines[-1]
    for key, name in (("seen", "seen"), ("unseen", "unseen"), ("val", "validation")):
        assert f"{name} {100 * last[key]:.1f}" in texts(svg)
    assert f"zero-shot {100 * story.lines[0]['unseen']:.1f}" in texts(svg)
    assert f"round {story.run.selected}" in plot.note


def test_nothing_is_drawn_of_a_run_without_rounds(story: Story) -> None:
    empty = Story(history.Run(story.run.path, story.run.settings, [], {"status": "running"}))
    with styled():
        assert plots.of_run(empty) == []


def test_of_many_sites_the_best_and_the_weakest_are_named_and_the_others_counted(
    tmp_path: Path, drawn: Features
) -> None:
    story = Story(history.read(a_run(tmp_path, drawn, sites=200, holdouts=["west"])))
    plot, svg = drawn_as(lambda: plots.sites(story))
    names = [text for text in texts(svg) if text.startswith("site-")]
    assert len(names) == plots.MOST_ROWS
    accuracies = [story.adapted["sites"][name] for name in names]
    everywhere = sorted(story.adapted["sites"].values())
    assert sorted(accuracies) == everywhere[:12] + everywhere[-12:]
    assert plot.heading == "The 12 best and the 12 weakest of 201 sites, %"
    assert plot.figure.get_size_inches()[1] * 72 < 600
    with styled():
        spread = plots.spread(story)
    assert spread
    assert spread.name == "spread"


def test_where_only_holdout_sites_have_results_the_others_are_not_spread(tmp_path: Path, drawn: Features) -> None:
    story = Story(history.read(a_run(tmp_path, drawn, sites=0, holdouts=[f"west-{number}" for number in range(30)])))
    with styled():
        assert plots.spread(story) is None


def test_few_sites_are_all_there_with_the_holdouts_marked(tmp_path: Path, drawn: Features) -> None:
    story = Story(history.read(a_run(tmp_path, drawn, sites=3, personal=True, holdouts=["west"])))
    plot, svg = drawn_as(lambda: plots.sites(story))
    assert {"site-0", "site-1", "site-2", "west, unseen"} <= {*texts(svg)}
    assert "the site’s own" in plot.note
    assert LIGHT["own"] in svg
    with styled():
        assert plots.spread(story) is None


def test_bytes_are_shown_beside_those_of_fedavg(story: Story) -> None:
    _, svg = drawn_as(lambda: plots.traffic(story))
    assert "88 kB adapter" in texts(svg)
    assert "792 kB adapter" in texts(svg)  # three sites in three rounds
    assert any(text.endswith("FedAVG") for text in texts(svg))


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (7, {"confusion-zero-shot", "confusion-adapted", "calibration", "recall"}),
        (65, {"confusion-zero-shot", "confusion-adapted", "pairs", "calibration", "recall"}),
        (1000, {"pairs", "calibration", "recall"}),
    ],
)
def test_confusion_is_readable_with_any_number_of_classes(classes: int, names: set[str], drawn: Features) -> None:
    found = many_classes(drawn, classes)
    with styled():
        made = heldout_plots.of_held_out(found)
        sizes = {plot.name: len(drawing.as_svg(plot)) for plot in made}
    assert {*sizes} == names
    assert max(sizes.values()) < 250_000
    rows = [text for plot in made if plot.name == "recall" for text in plot.figure.axes[0].get_yticklabels()]
    assert len(rows) == min(classes, plots.MOST_ROWS)


def test_of_many_classes_those_are_shown_that_change_most() -> None:
    count = plots.MOST_ROWS + 6
    before = [[number, number, 9] for number in range(count)]
    after = [*before[:-1], [count - 1, 0, 9]]  # only the last one has changed
    found = {
        "class_names": [f"c{n}" for n in range(count)],
        "zero_shot": {"confusion": before},
        "adapted": {"confusion": after},
    }
    _, svg = drawn_as(lambda: heldout_plots.recall(found))
    assert f"c{count - 1}" in texts(svg)


def test_cells_of_a_confusion_matrix_are_shares_of_their_row() -> None:
    counts = {"correct": 3, "confusion": [[0, 0, 3], [0, 1, 1], [1, 0, 2]], "bins": {}}
    found: dict[str, Any] = {"class_names": ["a", "b"], "images": 6, "zero_shot": counts}
    plot, svg = drawn_as(lambda: heldout_plots.confusion(found, "zero_shot"))
    assert [text for text in texts(svg) if text.isdigit()] == ["75", "25", "100"]
    assert plot.heading == "Confusion, zero-shot: 50.0 % right"


def test_the_most_confused_pairs_come_first() -> None:
    counts = [{"confusion": [[0, 1, 4], [1, 0, 9], [2, 2, 5]]}, {"confusion": [[0, 1, 12], [2, 0, 1]]}]
    found: dict[str, Any] = {"class_names": ["a", "b", "c"], "zero_shot": counts[0], "adapted": counts[1]}
    _, svg = drawn_as(lambda: heldout_plots.pairs(found))
    assert [text for text in texts(svg) if "→" in text] == ["c → a", "b → a", "a → b"]  # an axis begins below


def test_all_colours_in_the_page_follow_its_theme_and_each_has_one_role(pages: dict[str, Path]) -> None:
    assert len({*LIGHT.values()}) == len(LIGHT)
    assert LIGHT.keys() == DARK.keys()
    for page in pages.values():
        for svg in re.findall(r"<svg.*?</svg>", page.read_text(), re.S):
            assert not re.findall(r"#[0-9a-f]{6}\b", svg)
            assert "var(--" in svg


def test_ids_of_the_plots_are_not_those_of_others(pages: dict[str, Path]) -> None:
    for page in pages.values():
        text = page.read_text()
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len({*ids})
        for used in re.findall(r'(?:url\(#|href="#)([^")]+)', text):
            assert used in ids


def test_plots_are_files_too_that_can_be_read_alone(pages: dict[str, Path]) -> None:
    folder = pages["plain"].parent / output.PLOTS
    names = {path.stem for path in folder.glob("*.svg")}
    assert names == {path.stem for path in folder.glob("*.png")}
    assert {"rounds", "sites", "bytes", "confusion-adapted", "weights"} <= names
    for path in folder.glob("*.svg"):
        root = ET.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert "<text" in path.read_text()
    with Image.open(io.BytesIO((folder / "rounds.png").read_bytes())) as image:
        assert image.size == (880, 600)


def test_labels_are_moved_apart_as_little_as_is_needed() -> None:
    assert apart([0.0, 10.0], 5) == [0.0, 10.0]
    assert apart([4.0, 4.0], 2) == [3.0, 5.0]
    assert apart([10.0, 0.0, 10.0, 11.0], 4) == pytest.approx([10.333 - 4, 0.0, 10.333, 10.333 + 4], abs=1e-3)


def test_names_with_dollars_and_tags_are_drawn_as_they_are(tmp_path: Path, drawn: Features) -> None:
    story = Story(history.read(a_run(tmp_path, drawn, sites=1, holdouts=["<b>$x_1$</b>"])))
    plot, svg = drawn_as(lambda: plots.sites(story))
    assert "&lt;b&gt;$x_1$&lt;/b&gt;, uns…" in texts(svg)
    assert "<b>" not in drawing.inline(svg, plot.name, plot.says)


def test_runs_side_by_side_have_lines_of_their_own(plain: Path) -> None:
    story = Story(history.read(plain))
    stories = {f"run-{number}": story for number in range(9)}
    with styled():
        made = compare_plots.of_runs(stories)
    assert {plot.name for plot in made} == {"seen", "unseen", "runs-seen", "runs-unseen", "runs-bytes", "runs-time"}
    lines = made[0].figure.axes[0].lines
    looks = {(line.get_color(), str(getattr(line, "_dash_pattern"))) for line in lines}  # noqa: B009
    assert len(looks) == 9
