"""The sweep with processes of its own, on small feature folders and on images."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.experiments import comparison, printed
from fedclip_flwr.experiments.baselines import METHODS, Published
from fedclip_flwr.experiments.comparison import SweepOptions, compare, planned
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.experiments.sweep import Cell, Found, Plan, solve
from fedclip_flwr.experiments.tables import as_csv, markdown, rows
from fedclip_flwr.features.opening import open_features
from tests import forked

BIN = Path(sys.executable).parent
NAMES = ("cow", "elk", "fox")


def folder(root: Path, seed: int = 0, **facts: Any) -> Path:
    """Three domains of features that lie around their classes."""
    root.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(3, 8, generator=generator)
    save_file({"text_features": text}, root / "classes.safetensors")
    for domain in facts.get("domains", NAMES):
        labels = torch.arange(40) % 3
        features = text[labels] + 1.5 * torch.randn(40, 8, generator=generator)
        save_file({"image_features": features, "labels": labels}, root / f"{domain}.safetensors")
    described = {"model": "m", "embedding_dim": 8, "logit_scale": 10.0, "prompt": "a {}", "class_names": list("xyz")}
    (root / "features.json").write_text(json.dumps({**described, "domains": NAMES, "parameters": 1000, **facts}))
    return root


def options(data: str, *settings: str, **changed: Any) -> SweepOptions:
    given: dict[str, Any] = {
        "model": "bundled",
        "methods": "",
        "holdouts": "",
        "nodes": 0,
        "seeds": 2,
        "first_seed": 0,
        "rounds": 2,
        "full_model_rounds": 1,
        "full_model_seeds": 1,
        "jobs": 1,
        "out": "",
        "name": "",
        "against": "",
    }
    return SweepOptions(data=data, settings=settings, **{**given, **changed})


def test_a_plan_has_every_method_on_every_holdout_with_every_seed(tmp_path: Path) -> None:
    plan, _ = planned(options(f"features:{folder(tmp_path)}", "local-epochs=2", methods="gate,paper"))
    cells = plan.cells()
    assert len(cells) == len(set(cells)) == 3 * 3 * 2
    assert {cell.method for cell in cells} == {"zero-shot", "paper", "gate"}
    assert {(cell.settings.holdout, cell.settings.seed) for cell in cells} == {(d, s) for d in NAMES for s in (0, 1)}
    assert {cell.sites for cell in cells} == {2}  # one for each seen domain
    for cell in cells:
        how = cell.settings
        assert (how.num_server_rounds, how.local_epochs) == (2, 2)
        assert (how.adapter, how.recipe) == {"gate": ("gate", "default"), "paper": ("attention", "paper")}.get(
            cell.method, ("attention", "default")
        )


def test_the_full_model_has_rounds_and_seeds_of_its_own_and_comes_first(tree: Path) -> None:
    plan, features = planned(options(f"folder:{tree}", methods="fedavg,gate", seeds=3, full_model_seeds=2))
    cells = plan.cells()
    assert [cell.method for cell in cells[:4]] == ["fedavg"] * 4
    assert {cell.settings.seed for cell in cells if cell.method == "fedavg"} == {0, 1}
    assert {cell.settings.num_server_rounds for cell in cells if cell.method == "fedavg"} == {1}
    assert {cell.settings.num_server_rounds for cell in cells if cell.method == "gate"} == {2}
    assert set(features.domains) == {cell.settings.holdout for cell in cells}


def test_a_cell_has_the_result_of_the_federation(tmp_path: Path) -> None:
    data = f"features:{folder(tmp_path)}"
    features = open_features(Settings(data=data))
    settings = Settings(data=data, adapter="gate", holdout="fox", seed=5, num_server_rounds=3)
    sites, unseen = make_sites(features, "fox", 4, 5)
    line = simulate(sites, features.classes, unseen, settings).selected
    rounds = []
    found = solve(Cell("gate", settings, 4), features, lambda: rounds.append(1))
    assert found[:3] == (line.seen, line.unseen, line.round)
    assert len(rounds) == 3
    assert found.bytes
    assert found.bytes > 2 * 4 * (8 * 4 * 2 + 4 + 8)


def test_results_are_kept_and_taken_over_until_the_data_or_the_settings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: None
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("FEDCLIP_HOME", str(home))
    data = f"features:{folder(tmp_path / 'f')}"
    first = compare(options(data, methods="gate", jobs=2))
    assert "from earlier" not in first
    again = compare(options(data, methods="gate", jobs=2))
    assert "; 12 of 12 results from earlier" in again
    assert again.split("\n\n")[0] == first.split("\n\n")[0]
    assert "; 12 of 27 results from earlier" in compare(options(data, methods="gate,scale", seeds=3))
    assert "from earlier" not in compare(options(data, methods="gate", rounds=1))
    moved = Path(data.removeprefix("features:")).rename(tmp_path / "elsewhere")
    assert "; 12 of 12 results from earlier" in compare(options(f"features:{moved}", methods="gate"))
    folder(moved, seed=1)
    assert "from earlier" not in compare(options(f"features:{moved}", methods="gate"))
    for file in (home / "sweeps" / "results").iterdir():
        file.write_text(file.read_text()[:-3])
    assert "from earlier" not in compare(options(f"features:{moved}", methods="gate"))


@pytest.mark.soak
def test_one_process_or_two_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tables = f"features:{folder(tmp_path / 'f')}", []
    for jobs in (1, 2):
        monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / str(jobs)))
        compare(options(data, jobs=jobs, out=str(tmp_path / f"out-{jobs}")))
        text, figures = ((tmp_path / f"out-{jobs}" / name).read_text() for name in ("table.md", "table.csv"))
        tables.append((text.split("\n\n")[0], figures))
    assert tables[0] == tables[1]
    assert all(METHODS[name].label in tables[0][0] for name in METHODS if not METHODS[name].whole_model)


@pytest.mark.soak
def test_images_are_swept_with_the_full_model_beside(tree: Path, tmp_path: Path) -> None:
    given = options(
        f"folder:{tree}", methods="fedavg,fedprox,scale", holdouts="photo", jobs=2, out=str(tmp_path / "out")
    )
    table = compare(given)
    assert "FedAVG, whole model" in table
    assert "FedProx, whole model" in table
    line = next(line for line in table.splitlines() if "FedAVG" in line)
    assert "10.9 MB" in line  # 1,357,697 numbers there and back
    assert not list(tmp_path.glob("out/.*"))


HALF = Found(0.5, 0.25, 1, 2000)


def plan(*methods: str, holdouts: tuple[str, ...] = ("cow", "elk"), seeds: int = 2) -> Plan:
    return Plan(Settings(), methods, holdouts, range(seeds), 2, 5, 1)


def results(plan: Plan, **figures: Any) -> dict[Cell, Found]:
    """By method: a figure for each holdout and seed, in the order of the cells."""
    left = {method: iter(found) for method, found in figures.items()}
    return {cell: next(left[cell.method.replace("-", "_")]) for cell in plan.cells()}


def test_means_and_deviations_by_hand() -> None:
    swept = plan("zero-shot", "gate")
    zero = [Found(0.5, 0.2, 0, None), Found(0.7, 0.4, 0, None), Found(0.5, 0.4, 0, None), Found(0.9, 0.6, 0, None)]
    gate = [Found(0.6, 0.3, 2, 100), Found(0.8, 0.4, 2, 100), Found(0.8, 0.5, 2, 100), Found(0.8, 0.3, 2, 100)]
    made = {(row.method, row.held_out): row for row in rows(swept, results(swept, zero_shot=zero, gate=gate), 3)}
    # the first seed holds out cow, then elk; then the second seed
    cow, both = made["gate", "cow"], made["gate", "mean"]
    assert cow.seen == pytest.approx((70.0, math.sqrt(200)))
    assert cow.gain_seen == pytest.approx((20.0, math.sqrt(200)))
    assert cow.gain_unseen == pytest.approx((10.0, 0.0), abs=1e-9)
    assert cow.every == pytest.approx((100 * (1.5 + 2.1) / 6, 100 * math.sqrt(2) * 0.1))
    assert both.seen == pytest.approx((75.0, math.sqrt(50)))  # 70 and 80
    assert both.unseen == pytest.approx((37.5, math.sqrt(12.5)))  # 35 and 40
    assert both.gain_unseen == pytest.approx((-2.5, math.sqrt(112.5)))  # 5 and -10
    assert (both.rounds, both.seeds, both.bytes) == (20, 2, 100)
    assert made["zero-shot", "mean"].rounds == 0


def test_the_table_in_markdown_by_hand() -> None:
    swept = plan("zero-shot", "fedavg", "scale")
    made = rows(
        swept,
        results(
            swept, zero_shot=[HALF._replace(bytes=None)] * 4, fedavg=[HALF] * 2, scale=[HALF._replace(seen=0.75)] * 4
        ),
        3,
    )
    published = [Published("theirs", {"cow": 61.25}, 60.0, True), Published("others", {"elk": 44.5}, None)]
    assert markdown(made, published, 8_000_000).splitlines() == [
        "| held out | cow | elk | mean | gain | a site and round | times less | rounds | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| zero-shot | 50.0 ± 0.0 / 25.0 ± 0.0 / 41.7 ± 0.0 | 50.0 ± 0.0 / 25.0 ± 0.0 / 41.7 ± 0.0 | "
        "50.0 ± 0.0 / 25.0 ± 0.0 / 41.7 ± 0.0 | – | – | – | – | 2 |",
        "| FedAVG, whole model, as we read the paper | 50.0 / 25.0 / 41.7 | 50.0 / 25.0 / 41.7 | 50.0 / 25.0 / 41.7 | "
        "+0.0 / +0.0 | 2 kB | 4,000 | 5 | 1 |",
        "| ours, scale | 75.0 ± 0.0 / 25.0 ± 0.0 / 58.3 ± 0.0 | 75.0 ± 0.0 / 25.0 ± 0.0 / 58.3 ± 0.0 | "
        "75.0 ± 0.0 / 25.0 ± 0.0 / 58.3 ± 0.0 | +25.0 ± 0.0 / +0.0 ± 0.0 | 2 kB | 4,000 | 20 | 2 |",
        "| published: theirs | all 61.25 |  | all 60.00 |  |  |  |  |  |",
        "| published: others |  | unseen 44.50 |  |  |  |  |  |  |",
    ]


def test_the_table_as_csv_by_hand() -> None:
    swept = plan("zero-shot", "scale", holdouts=("",), seeds=1)
    nothing = Found(0.5, None, 0, None)
    made = rows(swept, results(swept, zero_shot=[nothing], scale=[nothing._replace(seen=0.6251, bytes=70)]), 1)
    assert as_csv(made, [Published("theirs, 2025", {}, 60.0)]).splitlines() == [
        "method,held_out,seeds,rounds,bytes,seen,seen_deviation,unseen,unseen_deviation,every,every_deviation,"
        "gain_seen,gain_seen_deviation,gain_unseen,gain_unseen_deviation,source",
        "zero-shot,,1,0,,50.00,,,,,,0.00,,,,measured",
        "scale,,1,20,70,62.51,,,,,,12.51,,,,measured",
        'published,mean,,,,,,60.00,,,,,,,,"theirs, 2025"',
    ]


def swept_by_hand() -> tuple[Plan, dict[Cell, Found]]:
    """Two methods, two held-out domains, two seeds; a tenth and a fifth more of each site's ten images."""
    swept = plan("zero-shot", "gate")
    zero = [Found(0.5, 0.2, 0, None, [("cow-0", 10, 5), (h, 10, 2)]) for _ in range(2) for h in ("cow", "elk")]
    gate = [Found(0.6, 0.4, 3, 90, [("cow-0", 10, 6), (h, 10, 4)]) for h in ("cow", "elk")]
    gate += [Found(0.8, 0.4, 4, 90, [("cow-0", 10, 8), (h, 10, 4), ("none", 0, 0)]) for h in ("cow", "elk")]
    return swept, results(swept, zero_shot=zero, gate=gate)


def test_each_site_with_each_seed_has_a_line() -> None:
    lines = printed.by_site(*swept_by_hand(), "mine").splitlines()
    assert lines[0] == printed.SITES
    assert len(lines) == 1 + 2 * 2 * 2 * 2
    assert lines[1] == "mine,zero-shot,cow,0,cow-0,0,10,5,0.500000,0.500000,0.000000,0,0,"
    assert lines[-4:] == [
        "mine,gate,cow,1,cow-0,0,10,8,0.800000,0.500000,0.300000,4,20,90",
        "mine,gate,cow,1,cow,1,10,4,0.400000,0.200000,0.200000,4,20,90",
        "mine,gate,elk,1,cow-0,0,10,8,0.800000,0.500000,0.300000,4,20,90",
        "mine,gate,elk,1,elk,1,10,4,0.400000,0.200000,0.200000,4,20,90",
    ]


def test_differences_are_over_the_seeds_by_hand() -> None:
    made = printed.differences(*swept_by_hand())
    assert {(one.held_out, one.measure) for one in made} == {
        (name, measure) for name in ("cow", "elk", "mean") for measure in ("seen", "unseen")
    }
    seen, unseen = (one.difference for one in made if one.held_out == "mean")
    half = 12.706204736 * 10  # of the t-distribution with one degree of freedom; 10 and 30 points have this error
    assert seen[:4] == pytest.approx((20.0, 2, 20 - half, 20 + half))
    assert seen.p == pytest.approx(0.2951672)
    assert unseen[:2] == pytest.approx((20.0, 2))
    assert unseen[2:] == (None, None, None)
    lines = printed.differences_csv(made, "").splitlines()
    assert lines[1] == ",cow,gate,zero-shot,seen,2,20.0000,-107.0620,147.0620,0.295"
    assert printed.differences_table(made, ["zero-shot"]).splitlines() == [
        "| points of accuracy | less zero-shot: seen | less zero-shot: unseen | pairs |",
        "| --- | --- | --- | --- |",
        "| ours, gate | +20.0 [-107.1, +147.1], p = 0.295 | +20.0 | 2 |",
    ]


def test_a_method_is_compared_with_one_that_stands_below_it_too() -> None:
    swept = plan("zero-shot", "paper", "gate", holdouts=("cow",))
    half, more = Found(0.5, 0.5, 1, 9), [Found(0.6, 0.5, 1, 9), Found(0.8, 0.5, 1, 9)]
    made = printed.differences(swept, results(swept, zero_shot=[half] * 2, paper=[half] * 2, gate=more))
    table = printed.differences_table(made, ["gate"]).splitlines()
    assert table[2] == "| FedCLIP, the paper's recipe | -20.0 [-147.1, +107.1], p = 0.295 | -0.0 | 2 |".replace(
        "-0.0", "-0.0"
    )


def test_one_metric_stands_in_a_cell_in_markdown_and_latex() -> None:
    swept, found = swept_by_hand()
    made = rows(swept, found, 3)
    cells = printed.accuracies(made, [Published("theirs, 5 % & more", {"cow": 61.25}, 60.0, True)])
    assert printed.as_markdown(cells).splitlines() == [
        "| held out | cow: seen | cow: unseen | cow: all | elk: seen | elk: unseen | elk: all | mean: seen | "
        "mean: unseen | mean: all |",
        "| --- |" + " ---: |" * 9,
        "| zero-shot |" + " 50.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 |" * 3,
        "| ours, gate |" + " 70.0 ± 14.1 | 40.0 ± 0.0 | 60.0 ± 9.4 |" * 3,
        "| published: theirs, 5 % & more |  |  | 61.25 |  |  |  |  |  | 60.00 |",
    ]
    latex = printed.as_latex(printed.accuracies(made, [Published("5 % & more_", {"cow": 61.25}, None)]), "mine")
    assert latex.splitlines() == [
        "% mine",
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"held out & \multicolumn{2}{c}{cow} & \multicolumn{2}{c}{elk} & \multicolumn{2}{c}{mean} \\",
        r" & seen & unseen & seen & unseen & seen & unseen \\",
        r"\midrule",
        "zero-shot" + r" & $50.0 \pm 0.0$ & $20.0 \pm 0.0$" * 3 + r" \\",
        "ours, gate" + r" & $70.0 \pm 14.1$ & $40.0 \pm 0.0$" * 3 + r" \\",
        r"published: 5 \% \& more\_ &  & $61.25$ &  &  &  &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_a_named_sweep_has_a_folder_of_its_own_with_all_that_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "sweep", lambda plan, jobs: (dict.fromkeys(plan.cells(), HALF), 0))
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    given = options(f"features:{folder(tmp_path / 'f')}", methods="zero-shot,paper,gate", name="mine", against="gate")
    text = compare(given)
    made = tmp_path / "home" / "sweeps" / "mine"
    files = {"table.md", "table.csv", "accuracy.md", "accuracy.tex", "results.csv", "differences.csv", "sweep.json"}
    plots = {"gains.svg", "gains.png", "bytes.svg", "bytes.png"}
    assert {path.name for path in made.iterdir()} == files | {"plots"}
    assert {path.name for path in (made / "plots").iterdir()} == plots
    assert f"Written to {made}: " in text
    assert "less gate: seen" in text
    assert "ours, gate" in (made / "plots" / "gains.svg").read_text()
    assert (made / "plots" / "gains.png").read_bytes().startswith(b"\x89PNG")
    compare(replace(given, jobs=2))
    with pytest.raises(UserError, match="--name mine: another sweep has this name"):
        compare(replace(given, rounds=7))
    compare(replace(given, rounds=7, out=str(made)))  # that is said plainly


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "../up"}, "--name ../up: expected letters"),
        ({"name": "results"}, "--name results: expected letters"),
        ({"against": "gate", "methods": "paper"}, "--against gate: expected one of the compared methods"),
        ({"against": "fedsum"}, "--against fedsum: expected one of the compared methods"),
    ],
)
def test_a_name_or_a_method_that_can_not_be_is_refused(tmp_path: Path, given: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        planned(options(f"features:{folder(tmp_path)}", **given))
    assert expected in str(error.value)


def test_where_the_length_of_features_is_unknown_the_papers_row_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "sweep", lambda plan, jobs: (dict.fromkeys(plan.cells(), HALF), 0))
    root = folder(tmp_path / "f")
    data = f"features:{root}"
    assert "can't be the paper's result" not in compare(options(data, out=str(tmp_path / "out")))
    for domain in NAMES:
        tensors = load_file(root / f"{domain}.safetensors")
        features = torch.nn.functional.normalize(tensors["image_features"], dim=1)
        save_file({**tensors, "image_features": features}, root / f"{domain}.safetensors")
    assert "can't be the paper's result" in compare(options(data, out=str(tmp_path / "out")))
    for good in (options(data, "feature-norm=10", out="out"), options(data, methods="gate", out="out")):
        assert "can't be the paper's result" not in compare(replace(good, out=str(tmp_path / "out")))


def test_several_domains_are_held_out_at_once(tmp_path: Path, forks: None) -> None:
    swept, features = planned(
        options(f"features:{folder(tmp_path)}", methods="gate", holdouts="fox + cow,elk", seeds=1)
    )
    assert swept.holdouts == ["cow+fox", "elk"]
    found = solve(swept.cells()[0], features)
    sites = {name: correct / examples for name, examples, correct in found.tests}
    assert found.unseen == pytest.approx((sites["cow"] + sites["fox"]) / 2)
    lines = printed.by_site(swept, {swept.cells()[0]: found}, "").splitlines()[1:]
    assert {line.split(",")[4]: line.split(",")[5] for line in lines} == {
        "elk-0": "0",
        "elk-1": "0",
        "cow": "1",
        "fox": "1",
    }
    assert sites.keys() == {"elk-0", "elk-1", "cow", "fox"}


def test_a_site_without_tests_has_no_accuracy(tmp_path: Path, forks: None) -> None:
    text = compare(
        options(f"features:{folder(tmp_path / 'f')}", methods="local,gate", nodes=60, seeds=1, holdouts="fox")
    )
    lines = text.partition("\n\n")[0].splitlines()[2:]
    assert len(lines) == 3
    assert all(line.split(" | ")[1].startswith("– / ") for line in lines)


def test_all_domains_are_reported_only_where_each_counts_the_same() -> None:
    for changed in ({"sites": 1}, {"settings": Settings(partition="iid")}):
        swept = replace(plan("zero-shot", seeds=1), **changed)
        assert {row.every for row in rows(swept, results(swept, zero_shot=[HALF] * 2), 3)} == {None}


def test_a_blend_for_all_is_refused_where_it_can_do_nothing(tmp_path: Path) -> None:
    data = f"features:{folder(tmp_path)}"
    swept, _ = planned(options(data, "blend=0.5"))
    assert "gate" in swept.methods
    assert "blend" not in swept.methods
    with pytest.raises(UserError, match="--methods blend: excludes the setting blend"):
        planned(options(data, "blend=0.5", methods="blend,gate"))


def test_no_sweep_overwrites_the_table_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "sweep", lambda plan, jobs: (dict.fromkeys(plan.cells(), HALF), 0))
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    data = f"features:{folder(tmp_path / 'f')}"
    for given in (options(data), options(data, jobs=2), options(data, "local-epochs=2"), options(data, rounds=3)):
        compare(given)
    assert len(list((tmp_path / "home" / "sweeps").iterdir())) == 3


def test_published_means_stand_only_beside_a_mean_over_all_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "sweep", lambda plan, jobs: (dict.fromkeys(plan.cells(), HALF), 0))
    names = ("Caltech101", "LabelMe", "SUN09")
    classes = ["bird", "car", "chair", "dog", "person"]
    root = folder(tmp_path / "f", class_names=classes, domains=names, model="openai/clip-vit-base-patch16")
    given = options(f"features:{root}", out=str(tmp_path / "out"))
    assert "published: " in compare(given)
    assert "published: " not in compare(replace(given, holdouts="SUN09,LabelMe"))


def test_data_of_a_preset_has_published_figures_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "sweep", lambda plan, jobs: (dict.fromkeys(plan.cells(), HALF), 0))
    classes, domains = ["bird", "car", "chair", "dog", "person"], ["Caltech101", "SUN09"]
    other = compare(options(f"features:{folder(tmp_path / 'f', class_names=classes, domains=domains)}"))
    assert "published: " not in other
    assert "Published figures for this data are for clip-vit-base-patch16, and are shown only beside results" in other
    model = "openai/clip-vit-base-patch16"
    root = folder(tmp_path / "g", class_names=classes, domains=domains, model=model)
    table = compare(options(f"features:{root}", out=str(tmp_path / "out")))
    assert "published: FedCLIP: ViT-B/16, as FedMVP" in table
    assert "unseen 82.70" in table
    assert "82.70" in (tmp_path / "out" / "table.csv").read_text()


def test_all_that_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    given = ("adapter=gate", "seed=3", "alpha=-1", "bach-size=3", "nonsense", "personalize=true")
    with pytest.raises(UserError) as error:
        planned(options(f"features:{folder(tmp_path)}", *given, methods="gate,fedsum", seeds=0, rounds=-3))
    message = str(error.value)
    for part in (
        "adapter: the methods differ in it; choose methods with --methods",
        "seed: a sweep takes it as --seeds",
        "alpha = -1.0: expected more than 0",
        "did you mean batch-size?",
        "nonsense: expected key=value",
        "personalize: it has no effect in a sweep",
        "--seeds 0: expected at least 1",
        "--rounds -3: expected at least 1",
        "--methods fedsum: expected some of zero-shot, local",
    ):
        assert part in message
    assert message.startswith("9 of the settings")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"methods": "fedavg"}, "--methods fedavg: needs images"),
        ({"first_seed": 2**63}, "seed = 9223372036854775809: expected at most"),
        ({"holdouts": "zebu"}, "--holdouts 'zebu': there is no such domain; the data has cow, elk, fox"),
    ],
)
def test_what_does_not_fit_the_data_is_reported(changed: dict[str, str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        planned(options(f"features:{folder(tmp_path)}", **changed))
    assert expected in str(error.value)


def workers(pid: int) -> list[int]:
    """The processes that do the sweep's work."""
    children = [
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    ]
    return [child for child in children if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


COMMAND = """
import multiprocessing, os, signal, time
from fedclip_flwr.experiments import sweep
from fedclip_flwr.cli import app

begin, count, most = sweep._begin, sweep._count, int(os.environ["MOST_ROUNDS"])
forks = multiprocessing.get_context("fork")

def begin_as_if_spawned(*given):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    begin(*given)

def count_or_wait():
    count()
    if sweep._rounds.value >= most:
        time.sleep(60)
        os.write(2, b"Nobody has ended this process.")
        os._exit(1)

sweep.get_context, sweep._begin, sweep._count = lambda _: forks, begin_as_if_spawned, count_or_wait
app()
"""
"""`fedclip` whose processes are forks, and wait to be ended once they have come to so many rounds together."""


class Sweeping:
    """`fedclip sweep` in a process of its own: 9 results of zero-shot and 9 of gate."""

    def __init__(self, tmp_path: Path, rounds: int) -> None:
        self.results = tmp_path / "home" / "sweeps" / "results"
        self.table = tmp_path / "out" / "table.csv"
        self.data = f"features:{folder(tmp_path / 'f')}"
        self.words = ["sweep", "--data", self.data, "--methods", "gate", "--seeds", "3", "--rounds", str(rounds)]
        self.words += ["--jobs", "2", "--out", str(self.table.parent)]
        self.env = {**os.environ, "FEDCLIP_HOME": str(tmp_path / "home")}

    def start(self, most_rounds: int = 10**9) -> forked.Python:
        return forked.Python(COMMAND, *self.words, env=self.env | {"MOST_ROUNDS": str(most_rounds)})

    def start_command(self) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([str(BIN / "fedclip"), *self.words], env=self.env, **pipes)

    def stop(self, process: forked.Python | subprocess.Popen[str]) -> None:
        """Once there are some results of gate, too."""
        busy = self.busy(process)
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert "The results so far are kept: the same command resumes from here." in errors
        assert "Traceback" not in errors
        assert "Nobody has ended" not in errors
        assert not any(map(alive, busy))

    def busy(self, process: forked.Python | subprocess.Popen[str]) -> list[int]:
        """The two processes that do its work, once there are some results of gate, too."""
        while not self.results.is_dir() or len(list(self.results.glob("[!.]*"))) < 11:
            assert alive(process.pid), process.communicate()
            time.sleep(0.01)
        found = workers(process.pid)
        assert len(found) == 2
        return found


def test_a_stopped_sweep_resumes_to_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: None
) -> None:
    sweeping = Sweeping(tmp_path, rounds=3)
    with sweeping.start(most_rounds=10) as process:
        sweeping.stop(process)
    with sweeping.start() as process:
        table, errors = process.communicate()
    assert process.returncode == 0, errors
    assert " of 18 results from earlier" in table
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "other"))
    compare(options(sweeping.data, methods="gate", seeds=3, rounds=3, jobs=2, out=str(tmp_path / "at-once")))
    assert sweeping.table.read_text() == (tmp_path / "at-once" / "table.csv").read_text()


def test_a_killed_process_is_reported_and_the_results_are_kept(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, rounds=3)
    with sweeping.start(most_rounds=10) as process:
        os.kill(sweeping.busy(process)[0], signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 2
    assert "was killed, possibly out of memory" in errors
    assert "Traceback" not in errors
    assert len(list(sweeping.results.glob("[!.]*"))) >= 11


@pytest.mark.federation
def test_the_command_with_its_own_processes_is_stopped_and_resumed(tmp_path: Path) -> None:
    sweeping = Sweeping(tmp_path, rounds=150)
    with sweeping.start_command() as process:
        sweeping.stop(process)
    with sweeping.start_command() as process:
        table, errors = process.communicate()
    assert process.returncode == 0, errors
    assert " of 18 results from earlier" in table


def test_a_folder_that_cannot_be_written_is_reported_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set --out to another folder"):
        compare(options(f"features:{folder(tmp_path / 'f')}", out=str(tmp_path / "file")))
