from __future__ import annotations

import json
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score
from typer.testing import CliRunner

from fedclip_flwr import FedCLIP
from fedclip_flwr.cli import app
from fedclip_flwr.data.drawn import CLASSES, DOMAINS, picture
from fedclip_flwr.features.base import Features
from fedclip_flwr.inference.encode import encode
from fedclip_flwr.learning.training import logits_of
from fedclip_flwr.operations import simulation
from tests.learnt import saved_adapter, whole_model_run


@pytest.fixture(autouse=True)
def signals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_figures_are_those_of_others(folder: Path, features: Features, tree: Path) -> None:
    code, stdout, _ = run(tree, "-a", folder, "--json")
    facts = json.loads(stdout)
    assert (code, list(facts["domains"]), facts["learnt_from"]) == (0, ["cartoon", "photo"], [])
    adapter, names = saved_adapter(folder, features), features.vocabulary.class_names
    for domain, own in facts["domains"].items():
        examples = features.examples(domain).ready()
        for learner, key in ((None, "zero_shot"), (adapter, "adapted")):
            found = logits_of(learner, examples, features.classes.ready()).argmax(dim=1)
            figures = own[key]
            assert figures["accuracy"] == pytest.approx(accuracy_score(examples.labels, found))
            assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(examples.labels, found))
            assert figures["macro_f1"] == pytest.approx(f1_score(examples.labels, found, average="macro"))
            recalls = recall_score(examples.labels, found, average=None)
            assert figures["recall"] == pytest.approx(dict(zip(names, recalls, strict=True)))
        assert own["images"] == 12
    assert facts["domains"]["photo"]["zero_shot"] != facts["domains"]["photo"]["adapted"]


def test_the_table_shows_zero_shot_beside_adapted(folder: Path, tree: Path) -> None:
    code, stdout, _ = run(tree, "-a", folder, "--by-class")
    facts = json.loads(run(tree, "-a", folder, "--json")[1])["domains"]["photo"]
    zero, adapted = (100 * facts[key]["accuracy"] for key in ("zero_shot", "adapted"))
    row = next(line.split() for line in stdout.splitlines() if line.split()[:1] == ["photo"])
    both = json.loads(run(tree, "-a", folder, "--json")[1])["domains"].values()
    for title, name in (("mean", "accuracy"), ("balanced accuracy", "balanced_accuracy"), ("macro F1", "macro_f1")):
        means = [sum(one[key][name] for one in both) / 2 for key in ("zero_shot", "adapted")]
        shown = next(
            line.strip().removeprefix(title).split() for line in stdout.splitlines() if line.strip().startswith(title)
        )
        assert shown[:2] == [f"{100 * mean:.1f}" for mean in means]
    assert code == 0
    assert row[:5] == ["photo", "12", f"{zero:.1f}", f"{adapted:.1f}", f"{round(adapted, 1) - round(zero, 1):+.1f}"]
    assert [line.split()[0] for line in stdout.splitlines()[1:4]] == ["cartoon", "photo", "mean"]
    cat = next(line.split() for line in stdout.splitlines() if line.split()[:1] == ["cat"])
    assert cat[3:] == [f"{100 * facts[key]['recall']['cat']:.1f}" for key in ("zero_shot", "adapted")]
    assert stdout.splitlines()[-1] == f"{folder} on bundled; 3 classes; in %."


def test_a_folder_may_have_fewer_classes_but_no_others(folder: Path, tree: Path) -> None:
    for path in tree.glob("*/car/*"):
        path.unlink()
    for path in tree.glob("*/car"):
        path.rmdir()
    facts = json.loads(run(tree, "-a", folder, "--json")[1])
    assert facts["domains"]["photo"]["adapted"]["recall"]["car"] is None
    for path in tree.glob("*/cat"):
        path.rename(path.with_name("dog"))
    code, _, stderr = run(tree, "-a", folder)
    assert code == 2
    assert f"has classes that {folder} does not know: dog; name another run with --adapter, or names for all" in stderr
    code, stdout, _ = run(tree, "-a", folder, "--classes", "dog,fish,tree", "--prompt", "the {}", "--json")
    assert code == 0
    assert list(json.loads(stdout)["domains"]["photo"]["adapted"]["recall"]) == ["dog", "fish", "tree"]


def test_words_for_the_datas_own_classes_are_shown_beside_them(folder: Path, tree: Path) -> None:
    code, stdout, _ = run(tree, "-a", folder, "--classes", "automobile,kitten,seafood")
    assert code == 0
    words = "the names used for them: car = automobile, cat = kitten, fish = seafood."
    assert stdout.splitlines()[-1] == f"The data's classes, and {words}"
    assert "the names used for them" not in run(tree, "-a", folder, "--classes", "fish,cat,car")[1]


def test_features_made_elsewhere_have_the_same_result(folder: Path, tree: Path, tmp_path: Path) -> None:
    encode([f"data=folder:{tree}"], str(tmp_path / "made"))
    _, images, _ = run(tree, "-a", folder, "--json")
    code, made, _ = run(f"features:{tmp_path / 'made'}", "-a", folder, "--json")
    assert code == 0
    assert json.loads(made)["domains"] == json.loads(images)["domains"]
    encode([f"data=folder:{tree}", "class-names=car,cat,fish,tree"], str(tmp_path / "other"))
    code, _, stderr = run(f"features:{tmp_path / 'other'}", "-a", folder)
    assert code == 2
    assert "has the prompts of car, cat, fish, tree, the adapter is for car, cat, fish: make it again" in stderr


def test_a_full_model_is_beside_what_it_began_with(tree: Path, tmp_path: Path) -> None:
    place, learner, pixels = whole_model_run(tree, tmp_path, 0.05)
    code, stdout, _ = run(tree, "-a", place, "--json")
    assert code == 0
    found = logits_of(learner, pixels.examples("photo").ready(), pixels.classes).argmax(dim=1)
    facts = json.loads(stdout)
    right = accuracy_score(pixels.examples("photo").labels, found)
    assert facts["domains"]["photo"]["adapted"]["accuracy"] == pytest.approx(right)
    assert facts["domains"]["photo"]["zero_shot"]["accuracy"] > right
    assert facts["learnt_from"] == ["cartoon", "photo"]  # no summary says that one was held out
    summary = json.loads((place / "summary.json").read_text())
    (place / "summary.json").write_text(json.dumps({**summary, "holdout": "photo"}))
    assert json.loads(run(tree, "-a", place, "--json")[1])["learnt_from"] == ["cartoon"]
    other = tree.rename(tree.with_name("other"))
    assert json.loads(run(other, "-a", place, "--json")[1])["learnt_from"] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{tree}/nowhere"], "there is no such folder"),
        (["{tree}", "holdout=photo"], "holdout: expected columns, device or precision here; leave it out"),
        (["{tree}", "model=x"], "model: expected columns, device or precision here"),
        (["{tree}", "device=gpu"], "device = 'gpu': expected auto, cpu"),
        (["{tree}", "--prompt", "no place"], "expected a template with one {}"),
        (["{tree}", "--classes", "one,two"], "lacks car, cat, fish"),
        (["none"], "none"),
        (["features:{tree}"], "features.json can't be read"),
        (["{tree}", "-a", "no-run"], "there is no such run"),
    ],
)
def test_what_cant_be_done_is_reported(words: list[str], expected: str, folder: Path, tree: Path) -> None:
    filled = [word.replace("{tree}", str(tree)) for word in words]
    code, lines, error = run(*([] if "-a" in words else ["-a", folder]), *filled)
    assert (code, lines) == (2, "")
    assert expected in error
    assert "Traceback" not in error


def test_drawn_pictures_of_another_seed_than_the_runs(
    tmp_path: Path, drawn: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(tmp_path / "learnt", drawn)
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fedclip_flwr.data.drawn.PER_CLASS", 1)
    code, stdout, _ = run("drawn:77", "-a", tmp_path / "learnt", "--json")
    assert code == 0
    model = FedCLIP.from_pretrained(tmp_path / "learnt")
    figures = json.loads(stdout)["domains"]
    assert figures.keys() == DOMAINS.keys()
    for domain, own in figures.items():
        found = model.predict([picture(77, domain, name, 0)[0] for name in CLASSES])
        right = [one.label == name for one, name in zip(found, CLASSES, strict=True)]
        assert (own["images"], own["adapted"]["accuracy"]) == (len(CLASSES), pytest.approx(sum(right) / len(CLASSES)))
