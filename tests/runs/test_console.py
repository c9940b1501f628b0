from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.exchange.records import Hello, Report
from fedclip_flwr.features.base import Features
from fedclip_flwr.learning import OneRound
from fedclip_flwr.learning.metrics import BINS, Quality, Score
from fedclip_flwr.runs import console
from fedclip_flwr.server.nodes import Failure
from fedclip_flwr.server.results import RoundResult


def metrics(seen: float, unseen: float, **recall: float | None) -> dict[str, Any]:
    """All three figures behind accuracy, as for a seen mean and an unseen domain."""
    names = ("balanced_accuracy", "macro_f1", "calibration_error")
    figures = [{name: value + i / 100 for i, name in enumerate(names)} for value in (seen, unseen)]
    return {"seen": figures[0], "unseen": {**figures[1], "recall": recall}, "sites": {}}


SUMMARY: dict[str, Any] = {
    "rounds": 20,
    "zero_shot": {
        "seen": 0.5,
        "unseen": 0.4,
        "sites": {"a": 0.5},
        "holdout_sites": {},
        "metrics": metrics(0.3, 0.2),
    },
    "adapted": {
        "seen": 0.625,
        "unseen": 0.38,
        "sites": {"b": None, "a": 0.75},
        "holdout_sites": {},
        "round": 3,
        "blend": 0.75,
        "personal": None,
        "personal_metrics": None,
        "metrics": metrics(0.6, 0.1, cat=0.5, dog=None, emu=0.25, fox=0.75, gnu=1.0),
    },
    "traffic": {
        "down_bytes": 1000,
        "up_bytes": 500,
        "per_site_round_bytes": 250.0,
        "full_model_bytes": 1_000_000,
        "times_less": 4000.0,
    },
    "seconds": {"encode": 1.2, "rounds": 4.4, "total": 5.6},
    "failures": [
        {"round": 1, "site": "b", "why": "no answer"},
        {"round": 3, "site": "b", "why": "no answer"},
        {"round": 0, "site": "c", "why": "other code"},
        {"round": 2, "site": "d", "why": "too little memory"},
        {"round": 2, "site": "d", "why": "too little memory"},
    ],
}


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_closing_tables() -> None:
    text = console.closing(SUMMARY, Settings(blend="auto"), "sketch", True)
    table = rows(text)
    assert ["a", "50.0", "75.0", "+25.0"] in table
    assert ["b", "–", "–", "–"] in table
    assert ["mean", "of", "the", "seen", "50.0", "62.5", "+12.5"] in table
    assert ["sketch,", "unseen", "40.0", "38.0", "-2.0"] in table
    assert "Round 3 of 20 was selected by validation, with 0.75 of the adapted feature;" in text
    assert "250 B a site and round; FedAVG of the whole model: 1 MB, 4,000 times as much." in text
    assert "Left out: b: no answer (round 1 to 3, 2 times)" in text
    assert "Left out: c: other code (round 0)" in text
    assert "Left out: d: too little memory (round 2, 2 times)" in text


def test_the_other_figures_and_the_weakest_classes() -> None:
    table = rows(text := console.closing(SUMMARY, Settings(blend="auto"), "sketch", True))
    assert ["in", "%,", "means", "seen:", "zero-shot", "adapted", "unseen:", "zero-shot", "adapted"] in table
    assert ["balanced", "accuracy", "30.0", "60.0", "20.0", "10.0"] in table
    assert ["macro", "F1", "31.0", "61.0", "21.0", "11.0"] in table
    assert ["calibration", "error", "32.0", "62.0", "22.0", "12.0"] in table
    assert "Weakest in sketch: emu 25.0 %, cat 50.0 %, fox 75.0 %; all classes: summary.json." in text


def test_adapters_of_the_sites_own_have_a_column() -> None:
    own = {"personal": {"a": 0.8}, "personal_metrics": {"seen": {"accuracy": 0.8, "macro_f1": 0.7}, "sites": {}}}
    summary = {**SUMMARY, "adapted": {**SUMMARY["adapted"], **own}}
    table = rows(text := console.closing(summary, Settings(), "sketch", True))
    assert ["accuracy,", "%", "zero-shot", "adapted", "gain", "own"] in table
    assert ["a", "50.0", "75.0", "+25.0", "80.0"] in table
    assert ["b", "–", "–", "–", "–"] in table
    assert ["mean", "of", "the", "seen", "50.0", "62.5", "+12.5", "80.0"] in table
    assert ["sketch,", "unseen", "40.0", "38.0", "-2.0", "–"] in table
    assert ["macro", "F1", "31.0", "61.0", "70.0", "21.0", "11.0"] in table
    assert "Own: adapters that the sites personalised" in text


def test_sites_left_out_for_the_same_reason_share_a_line() -> None:
    assert console.left_out([Failure(0, f"a-{i}", "it holds no image") for i in range(20)]) == [
        f"Left out: {', '.join(f'a-{i}' for i in range(12))} and 8 more: it holds no image (round 0)"
    ]


def test_how_the_round_was_chosen_is_said() -> None:
    text = console.closing(SUMMARY, Settings(blend="auto"), None, False)
    assert "Round 3 of 20 is used, because no site has validation images" in text
    zero = {**SUMMARY, "adapted": {**SUMMARY["adapted"], "round": 0}}
    assert "no gain over zero-shot" in console.closing(zero, Settings(), None, True)
    closed = console.closing(SUMMARY, Settings(method="one-round"), None, True)
    assert "is the closed form of all sums: nothing was selected" in closed


def test_gains_are_those_of_the_figures_shown_and_sites_are_in_counting_order() -> None:
    adapted = {**SUMMARY["adapted"], "seen": 0.643, "sites": {"a-10": 0.6427, "b-1": 0.5, "a-2": 0.5}}
    zero = {**SUMMARY["zero_shot"], "seen": 0.6, "sites": {"a-10": 0.6213, "b-1": 0.5, "a-2": 0.5}}
    table = rows(console.closing({**SUMMARY, "zero_shot": zero, "adapted": adapted}, Settings(), None, True))
    at = table.index(["a-2", "50.0", "50.0", "+0.0"])
    assert table[at + 1] == ["a-10", "62.1", "64.3", "+2.2"]  # exactly 2.14
    assert table[at + 2][0] == "b-1"


def test_without_a_holdout_or_a_known_model_size() -> None:
    traffic = {**SUMMARY["traffic"], "full_model_bytes": None, "times_less": None}
    adapted = {**SUMMARY["adapted"], "unseen": None, "metrics": {**SUMMARY["adapted"]["metrics"], "unseen": None}}
    text = console.closing({**SUMMARY, "traffic": traffic, "adapted": adapted}, Settings(), None, True)
    assert "unseen" not in text
    assert "250 B a site and round, 1.5 kB in all." in text


def test_what_is_unseen_may_be_at_sites() -> None:
    zero = {**SUMMARY["zero_shot"], "holdout_sites": {"west": 0.3}}
    adapted = {**SUMMARY["adapted"], "holdout_sites": {"west": 0.36, "late": 0.4}}
    table = rows(console.closing({**SUMMARY, "zero_shot": zero, "adapted": adapted}, Settings(), None, True))
    at = table.index(["west,", "unseen", "30.0", "36.0", "+6.0"])
    assert table[at - 1] == ["late,", "unseen", "–", "40.0", "–"]
    assert table[at + 1] == ["mean", "of", "the", "unseen", "40.0", "38.0", "-2.0"]


def test_the_plan_says_where_the_unseen_images_are(drawn: Features) -> None:
    hellos = [Hello("b", "train", "photo", 6, 2, 2, [0, 1], ""), Hello("w", "holdout", "x-ray", 0, 0, 1200, [0], "")]
    table = rows(console.plan(Settings(), drawn, "sketch", hellos, {"w": torch.zeros(128)}, Path("/runs/x")))
    assert ["held", "out", "sketch,", "1,200", "images", "at", "w,", "1,500", "images", "here"] in table
    assert ["w", "x-ray,", "unseen", "0", "0", "1,200", "1"] in table
    alone = rows(console.plan(Settings(), drawn, None, hellos, {"w": torch.zeros(128)}, Path("/runs/x")))
    assert ["held", "out", "1,200", "images", "at", "w"] in alone


def quality(examples: int, correct: int) -> Quality:
    return Quality(Score(examples, correct, 1.0), 0.5, 0.5, [0.0] * BINS)


def test_a_line_is_under_its_headings() -> None:
    report = Report(5, Score(4, 3, 2.0), quality(8, 2))
    line = console.line(RoundResult(0, {"a": report}, {"sea": quality(1000, 123)}, 2_660_000, 0.26))
    assert line.split() == ["0", "25.0", "12.3", "75.0", "0.500", "1", "2.66", "MB", "0.3", "zero-shot"]
    assert line.index("0.500") + 5 == console.heading(Settings()).index("loss") + 4
    nothing = console.line(RoundResult(1, {}, {}, 0, 0.0))
    assert nothing.split() == ["1", "–", "–", "–", "–", "0", "0", "B", "0.0"]


def test_the_plan_says_what_will_be_done(drawn: Features) -> None:
    hellos = [Hello("b", "train", "photo", 6, 2, 2, [0, 1], ""), Hello("a", "train", "art", 1200, 400, 400, [0], "")]
    text = console.plan(
        Settings(num_server_rounds=1), drawn, "sketch", hellos, {"w": torch.zeros(128)}, Path("/runs/x")
    )
    table = rows(text)
    assert ["2", "sites", "domain", "train", "val", "test", "classes"] in table
    assert table[-2:] == [["a", "art", "1,200", "400", "400", "1"], ["b", "photo", "6", "2", "2", "2"]]
    assert "at no site  cartoon, class car, class cat, class chair, class cup" in text
    for part in ("sketch, 1,500 images", "128 numbers in 1 tensor, 0.01 %", "512 B to a site", "1 round of 1 epoch"):
        assert part in text
    assert "learning rate 0.0004 to 0.004, by size of the site" in text
    text = console.plan(Settings(codec="int8"), drawn, "sketch", hellos, {"w": torch.zeros(128)}, Path("/runs/x"))
    assert "132 B to a site and as much back in each round, differences in int8" in text


def test_the_plan_and_the_result_say_where_the_papers_recipe_lacks_the_length_of_features(drawn: Features) -> None:
    own, lacking = (Hello("a", "train", "art", 1200, 400, 400, [0], "", unit_length=unit) for unit in (False, True))

    def plan(*hellos: Hello, **settings: Any) -> str:
        return console.plan(Settings(**settings), drawn, "art+sketch", hellos, {"a": torch.zeros(1)}, Path("/runs/x"))

    assert "warning     this can't be the paper's result" in plan(own, lacking, recipe="paper")
    assert "3,000 images here" in plan(own, recipe="paper")
    for good in (plan(own, recipe="paper"), plan(lacking), plan(own, lacking, recipe="paper", feature_norm=10.0)):
        assert "paper's result" not in good
    assert "features scaled to length 10" in plan(own, lacking, recipe="paper", feature_norm=10.0)
    assert "paper's result" not in plan(lacking, recipe="paper", method="full-model")
    result = console.closing({**SUMMARY, "unknown_norm": True}, Settings(recipe="paper"), "sketch", True)
    assert "This is not the paper's result: its adapter expects features of CLIP's own length" in result
    assert "paper's result" not in console.closing(SUMMARY, Settings(recipe="paper"), "sketch", True)


@pytest.mark.parametrize(
    ("strategy", "how"), [("fedavg", "every image counts the same"), ("fedmedian", "fedmedian of")]
)
def test_the_plan_says_how_sums_are_added(drawn: Features, strategy: str, how: str) -> None:
    settings = Settings(method="one-round", strategy=strategy)
    hello = [Hello("a", "train", "art", 1200, 400, 400, [0], "")]
    state = OneRound.new("span", drawn.classes.text).state_dict()
    text = console.plan(settings, drawn, "sketch", hello, state, Path("/runs/x"))
    assert f"one round, in closed form; {how}" in text
    assert "secure aggregation" not in text


def test_the_plan_says_that_sums_are_masked(drawn: Features) -> None:
    settings = Settings(method="one-round", secure_aggregation=True)
    hello = [Hello("a", "train", "art", 1200, 400, 400, [0], "")]
    state = OneRound.new("span", drawn.classes.text).state_dict()
    text = console.plan(settings, drawn, "sketch", hello, state, Path("/runs/x"))
    assert "secure aggregation: the server sees only the total of the sites' sums" in text


def test_the_plan_names_the_full_model_fedprox_and_blends(drawn: Features) -> None:
    hello = [Hello("a", "train", "art", 1200, 400, 400, [0], "")]

    def plan(**settings: Any) -> str:
        tensors = {"a": torch.zeros(2, 2), "b": torch.zeros(1)}
        return console.plan(Settings(**settings), drawn, "sketch", hello, tensors, Path("/runs/x"))

    full = plan(method="full-model", recipe="paper", strategy="fedprox")
    for part in ("the whole model: 5 numbers in 2 tensors\n", "fedprox with mu 0.001", "learning rate 5e-05,"):
        assert part in full
    assert "blend chosen at the end" in plan(blend="auto")
    assert "blend 0.5" in plan(blend=0.5)
    assert "blend" not in plan()
