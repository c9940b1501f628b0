"""The closed form in use: found in its folder, with other classes, evaluated, exported, as ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fedclip_flwr import FedCLIP
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.inference import onnx_file
from fedclip_flwr.inference.encode import encode
from fedclip_flwr.learning.one_round import OneRound
from fedclip_flwr.learning.sums import sums_of
from fedclip_flwr.learning.training import logits_of
from fedclip_flwr.operations import simulation
from fedclip_flwr.runs.saved import load_adapter, save_adapter
from tests.extras import needs

SETTINGS = Settings(method="one-round")
NAMES = ("car", "cat", "fish")


@pytest.fixture(autouse=True)
def signals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)


def learnt(features: Features) -> OneRound:
    """From the images of cartoons."""
    examples, classes = features.examples("cartoon").ready(), features.classes.ready()
    made = OneRound.new("span", classes.text)
    made.load_state_dict({**made.state_dict(), **sums_of(examples, made.basis, len(classes.text))})
    return made


@pytest.fixture
def one_round(tmp_path: Path, features: Features) -> Path:
    made = tmp_path / "one-round"
    made.mkdir()
    save_adapter(made, learnt(features).state_dict(), SETTINGS, features, 1)
    return made


def shares(model: FedCLIP, tree: Path, names: tuple[str, ...] = NAMES) -> Tensor:
    paths = [str(tree / picture.name) for picture in ImageFolder(tree).pictures("photo")]
    found = (dict(zip(*one, strict=True)) for one in model.predict(paths, top=99))
    return torch.tensor([[share[name] for name in names] for share in found], dtype=torch.float64)


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.output


def test_it_comes_back_as_it_was(one_round: Path, features: Features) -> None:
    adapter, facts = load_adapter(one_round)
    assert isinstance(adapter, OneRound)
    assert (facts["kind"], facts["statistics"], facts["round"]) == ("one-round", "span", 1)
    assert {name: tensor.tolist() for name, tensor in adapter.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in learnt(features).state_dict().items()
    }


def test_images_are_found_to_show_what_their_stored_features_say(
    one_round: Path, features: Features, tree: Path
) -> None:
    examples, classes = features.examples("photo").ready(), features.classes.ready()
    wanted = logits_of(learnt(features), examples, classes).softmax(dim=1)
    zero = logits_of(None, examples, classes).softmax(dim=1)
    found = shares(FedCLIP.from_pretrained(one_round, device="cpu"), tree)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - zero).abs().max() > 0.05


def test_other_classes_need_only_names_and_known_ones_keep_their_images(one_round: Path, tree: Path) -> None:
    model = FedCLIP.from_pretrained(one_round, device="cpu")
    found = shares(model, tree)
    turned = model.with_classes(["fish", "car", "cat"])
    torch.testing.assert_close(shares(turned, tree), found, rtol=0, atol=1e-9)
    more = model.with_classes(["submarine", "car", "fish"])
    assert more.head is not None
    assert more.head.seen.tolist() == [False, True, True]
    again = more.with_classes(NAMES)
    torch.testing.assert_close(shares(again, tree), found, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert more(**more.prepare(str(next(tree.glob("photo/*/*.png"))))).shape == (1, 3)


def test_an_export_predicts_the_same_also_with_other_classes(one_round: Path, tree: Path, tmp_path: Path) -> None:
    for classes, seen in (("", [True] * 3), ("boat,fish", [False, True])):
        out = tmp_path / f"out{len(classes)}"
        code, output = command("export", one_round, "--out", out, *(["--classes", classes] if classes else []))
        assert code == 0, output
        one = FedCLIP.from_pretrained(out, device="cpu")
        assert one.head is not None
        assert one.head.seen.tolist() == seen
        two = FedCLIP.from_pretrained(one_round, device="cpu").with_classes(one.class_names)
        names = one.class_names
        torch.testing.assert_close(shares(one, tree, names), shares(two, tree, names), rtol=0, atol=1e-9)
    text = (tmp_path / "out0" / "README.md").read_text()
    assert "closed form" in text
    assert "trained" not in text.partition("## Use")[0]


@needs("onnx")
def test_onnx_has_the_same_probabilities(one_round: Path, tmp_path: Path) -> None:
    found = onnx_file.write(FedCLIP.from_pretrained(one_round, device="cpu", precision="float32"), tmp_path)
    assert found.same == found.pictures
    assert found.difference < 1e-4


def test_it_is_evaluated_with_the_classes_in_any_order(one_round: Path, features: Features, tree: Path) -> None:
    examples, classes = features.examples("photo").ready(), features.classes.ready()
    right = logits_of(learnt(features), examples, classes).argmax(dim=1) == examples.labels
    code, output = command("evaluate", tree, "-a", one_round, "--json")
    assert code == 0, output
    assert json.loads(output)["domains"]["photo"]["adapted"]["accuracy"] == pytest.approx(float(right.double().mean()))
    code, other = command("evaluate", tree, "-a", one_round, "--json", "--classes", "fish,boat,car,cat")
    assert code == 0, other
    adapted = json.loads(other)["domains"]["photo"]["adapted"]
    assert {*adapted["recall"]} == {"fish", "boat", "car", "cat"}
    model = FedCLIP.from_pretrained(one_round, device="cpu").with_classes(["fish", "boat", "car", "cat"])
    found = model.predict([str(tree / picture.name) for picture in ImageFolder(tree).pictures("photo")])
    same = [one.label == NAMES[number] for one, number in zip(found, examples.labels, strict=True)]
    assert adapted["accuracy"] == pytest.approx(sum(same) / len(same))


def test_stored_features_are_predicted_without_a_clip(
    one_round: Path, features: Features, tree: Path, tmp_path: Path
) -> None:
    encode([f"data=folder:{tree}"], str(tmp_path / "stored"))
    code, output = command("predict", f"features:{tmp_path / 'stored'}", "-a", one_round, "--json")
    assert code == 0, output
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = [line["label"] for line in lines if line["image"].startswith("photo/")]
    wanted = logits_of(learnt(features), features.examples("photo").ready(), features.classes.ready()).argmax(dim=1)
    assert found == [NAMES[number] for number in wanted]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"statistics": "half"}, "its statistics is 'half', expected one of span, full"),
        ({"statistics": "full"}, "does not hold the one-round adapter"),
        ({"class_names": ["car", "cat"]}, "does not hold the one-round adapter"),
        ({"statistics": None}, "its statistics is None"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_line(one_round: Path, change: dict[str, Any], why: str) -> None:
    facts = json.loads((one_round / "adapter.json").read_text())
    (one_round / "adapter.json").write_text(json.dumps(facts | change))
    with pytest.raises(UserError, match=why):
        load_adapter(one_round)


@pytest.mark.parametrize("kind", ["span", "full"])
def test_a_siglip_with_its_bias_can_be_used(kind: str, tree: Path, tmp_path: Path) -> None:
    from tests.models import small_siglip

    settings = Settings(data=f"folder:{tree}", model=str(small_siglip(tmp_path / "siglip")), method="one-round")
    features = open_features(settings, progress=False)
    examples, classes = features.examples("photo").ready(), features.classes.ready()
    made = OneRound.new(kind, classes.text)
    made.load_state_dict({**made.state_dict(), **sums_of(examples, made.basis, 3)})
    found = logits_of(made, examples, classes)
    assert found.isfinite().all()
    assert (found.argmax(dim=1) == examples.labels).double().mean() >= 0.5
