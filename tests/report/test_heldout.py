from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedclip_flwr.base import content
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.encoded import Encoded
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.learning.adapters import make_adapter
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.metrics import quality_of
from fedclip_flwr.learning.training import evaluate, logits_of
from fedclip_flwr.report import heldout, output, writing
from fedclip_flwr.report.heldout import Predictions
from fedclip_flwr.report.heldout_plots import calibration_error, confused, recalls
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs import history
from fedclip_flwr.runs.saved import load_adapter
from tests.extras import needs
from tests.report.made import a_run


def seen(found: list[int], confidence: list[float], truth: list[float]) -> Predictions:
    return Predictions(
        torch.tensor(found), torch.tensor(confidence, dtype=torch.double), torch.tensor(truth, dtype=torch.double)
    )


def test_an_analysis_agrees_with_scikit_learn_and_with_what_runs_report(plain: Path, drawn: Features) -> None:
    from sklearn.metrics import confusion_matrix, recall_score

    found = heldout.analyse(plain, Settings(), drawn, "sketch")
    examples, classes = drawn.examples("sketch").ready(), drawn.classes.ready()
    adapter, _ = load_adapter(plain)
    with torch.no_grad():
        answers = {
            "zero_shot": logits_of(None, examples, classes),
            "adapted": classes.logits(adapter(examples.features)),
        }
    for who, logits in answers.items():
        said = logits.argmax(dim=1)
        matrix = np.zeros((10, 10), int)
        for true, other, count in found[who]["confusion"]:
            matrix[true, other] = count
        assert (matrix == confusion_matrix(examples.labels, said)).all()
        expected = recall_score(examples.labels, said, average=None)
        assert [recalls(found, who)[number] for number in range(10)] == pytest.approx(list(expected))
        quality = quality_of(logits, examples.labels)
        assert found[who]["correct"] == quality.score.correct
        assert calibration_error(found, who) == pytest.approx(quality.calibration_error, abs=1e-5)
        assert sum(found[who]["bins"]["images"]) == found["images"] == 1500


def test_several_held_out_domains_are_analysed_together(plain: Path, drawn: Features) -> None:
    found = heldout.analyse(plain, Settings(), drawn, "photo+sketch")
    alone = [heldout.analyse(plain, Settings(), drawn, domain) for domain in ("photo", "sketch")]
    for who in ("zero_shot", "adapted"):
        assert found[who]["correct"] == sum(one[who]["correct"] for one in alone)
    assert (found["domain"], found["images"]) == ("photo+sketch", 3000)
    cards = [card for one in alone for kind in ("mended", "spoilt") for card in one[kind]]
    assert all(card in cards for card in found["mended"][:3])  # with the pictures of the right domain


def test_bins_and_confusion_of_a_few_images() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    counts = heldout.counts_of(seen([0, 1, 1, 2], [1.0, 0.5, 2 / 15, 0.51], [1.0, 0.3, 2 / 15, 0.51]), labels, 3)
    assert counts["correct"] == 3
    assert counts["confusion"] == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [2, 2, 1]]
    images = [0] * 15
    images[14] = images[1] = 1  # a bin includes its upper end
    images[7] = 2
    assert counts["bins"]["images"] == images
    assert counts["bins"]["confidence"][7] == pytest.approx(1.01)
    assert (counts["bins"]["correct"][7], counts["bins"]["correct"][1]) == (1, 1)
    assert confused({"adapted": counts}, "adapted") == {(0, 1): 1}


def test_images_that_changed_come_in_the_order_of_what_their_true_class_has_gained() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0])
    before = seen([1, 0, 0, 0, 1], [0.6, 0.9, 0.9, 0.7, 0.6], [0.4, 0.1, 0.9, 0.3, 0.4])
    after = seen([0, 1, 1, 0, 0], [0.7, 0.8, 0.6, 0.9, 0.7], [0.7, 0.8, 0.4, 0.1, 0.7])
    assert heldout.changed(before, after, labels) == [1, 0, 4]  # +0.7, and of two with +0.3 the first
    assert heldout.changed(after, before, labels) == [2]


def test_weights_are_doublings_over_the_mean_dimension_by_class() -> None:
    adapter = make_adapter("scale", 4)
    with torch.no_grad():
        adapter.log_scale.copy_(torch.log(torch.tensor([4.0, 1.0, 1.0, 1.0])))  # type: ignore[operator]
    found = heldout.weights(adapter, Examples(torch.eye(4)[:3], torch.tensor([0, 2, 2])), 3)
    assert found["classes"] == [0, 2]  # no image is of class 1
    assert found["dimensions"][0] == 0
    assert found["values"][1] == [1.5, -0.5, -0.5, -0.5]
    assert found["rising"][0][0] == [0, 1.5]
    assert found["falling"][0][0][1] == -0.5
    assert found["common"] == 1.0


def test_weights_of_attention_differ_by_image_and_are_averaged_by_class(drawn: Features) -> None:
    adapter = make_adapter("attention", 128, identity=False, seed=3)
    examples = drawn.examples("photo").rows(torch.arange(40))
    found = heldout.weights(adapter, examples, 10)
    features = examples.ready().features
    logs = adapter.weigh(torch.nn.functional.normalize(features, dim=1)).detach().double().log2()
    relative = (logs - logs.mean(dim=1, keepdim=True))[examples.labels == 3].mean(dim=0)
    at = [relative[dimension].item() for dimension in found["dimensions"]]
    assert found["values"][3] == pytest.approx(at, abs=1e-4)
    assert len(found["dimensions"]) == heldout.DIMENSIONS
    assert found["rising"][3][0][0] == int(relative.argmax())
    assert found["falling"][3][0][0] == int(relative.argmin())
    assert 0 < found["common"] < 1


def test_the_images_shown_are_those_that_are_described(plain: Path, drawn: Features) -> None:
    found = heldout.analyse(plain, Settings(), drawn, "sketch")
    assert isinstance(drawn, Encoded)
    card = found["mended"][0]
    assert card["zero_shot"][0] != card["true"] == card["adapted"][0]
    data = base64.b64decode(card["image"].removeprefix("data:image/jpeg;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("L"), float)
    own = [row for row, label in enumerate(drawn.examples("sketch").labels.tolist()) if label == card["true"]]
    seen = dict(drawn.pictures("sketch", own))
    near = min(own, key=lambda row: np.abs(np.asarray(seen[row].convert("L"), float) - shown).mean())
    logits = logits_of(None, drawn.examples("sketch").ready(), drawn.classes.ready())
    assert logits.softmax(dim=1)[near].max().item() == pytest.approx(card["zero_shot"][1], abs=1e-3)


def test_a_domain_without_a_readable_image_is_reported(tree: Path, plain: Path, tmp_path: Path, undrawn: None) -> None:
    for path in (tree / "photo").rglob("*.png"):
        path.write_bytes(b"no image")
    features = open_features(Settings(data=f"folder:{tree}"), progress=False)
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "run" / output.FILE).unlink(missing_ok=True)
    page = writing.write(history.read(tmp_path / "run"), opened=(features, "photo"))
    assert "There are no results by class: none of the images of photo can be read." in page.read_text()


def test_broken_images_do_not_shift_the_pictures_of_rows(tree: Path) -> None:
    features = open_features(Settings(data=f"folder:{tree}"), progress=False)
    assert isinstance(features, Encoded)
    first = next(features._source.pictures("photo", 0, 1)).name
    kept = [np.asarray(image) for _, image in features.pictures("photo", range(12))]
    (tree / first).write_bytes(b"no image")
    broken = open_features(Settings(data=f"folder:{tree}"), progress=False)
    assert isinstance(broken, Encoded)
    left = [pixels for row, pixels in enumerate(kept) if row]
    pictures = dict(broken.pictures("photo", [0, 10, 3]))
    assert len(broken.examples("photo").labels) == 11
    assert sorted(pictures) == [0, 3, 10]
    for image in pictures.values():
        assert any((np.asarray(image) == pixels).all() for pixels in left)
    labels = {row: int(broken.examples("photo").labels[row]) for row in pictures}
    names = {0: "car", 1: "cat", 2: "fish"}
    for row, image in pictures.items():
        files = (tree / "photo" / names[labels[row]]).glob("*.png")
        readable = [np.asarray(Image.open(file).convert("RGB")) for file in files if file != tree / first]
        assert any((np.asarray(image) == pixels).all() for pixels in readable)


def test_a_full_model_is_analysed_with_what_it_has_learnt(tmp_path: Path, tree: Path) -> None:
    settings = Settings(data=f"folder:{tree}", method="full-model", learning_rate=1e-3)
    path = a_run(tmp_path, method="full-model", data=f"folder:{tree}", learning_rate=1e-3, learning=1)
    features = open_features(settings, progress=False)
    found = heldout.analyse(path, settings, features, "photo")
    assert found["weights"] is None
    assert found["images"] == 12
    summary = history.read(path).summary
    assert found["adapted"]["correct"] / 12 == pytest.approx(summary["adapted"]["unseen"])
    assert found["zero_shot"]["correct"] / 12 == pytest.approx(summary["zero_shot"]["unseen"])
    assert Story(history.read(path)).what == "the whole model"


@needs("lora")
@pytest.mark.parametrize(
    ("where", "words", "name"),
    [
        ({"lora_layers": "last:1"}, "the last layer of the vision tower", "lora-2 last:1"),
        ({"lora_targets": "both", "lora_layers": "last:2"}, "the last 2 layers of both towers", "lora-2 both last:2"),
        ({"lora_targets": "text", "lora_train": "both"}, "the text tower", "lora-2 text"),
    ],
)
def test_lora_is_analysed_with_what_it_has_learnt(
    tmp_path: Path, hard_tree: Path, where: dict[str, Any], words: str, name: str
) -> None:
    given: dict[str, Any] = {"method": "lora", "lora_rank": 2, "data": f"folder:{hard_tree}", "learning_rate": 0.01}
    path = a_run(tmp_path, learning=1, blend=0.9, **given, **where)
    run = history.read(path)
    features = open_features(run.known, progress=False)
    found = heldout.analyse(path, run.known, features, "sketch")
    assert found["weights"] is None
    assert found["learnt"] == content.of_file(path / "adapter.safetensors")
    plain = open_features(Settings(data=f"folder:{hard_tree}"), progress=False)
    assert found["zero_shot"]["correct"] == evaluate(None, plain.examples("sketch"), plain.classes.ready()).correct
    for who in ("zero_shot", "adapted"):
        assert found[who]["correct"] / 24 == pytest.approx(run.summary[who]["unseen"])
    assert found["adapted"]["correct"] < found["zero_shot"]["correct"]  # too long a step: enough to tell them apart
    assert (Story(run).what, run.method) == (f"LoRA of rank 2 in {words}", name)
    assert Story(run).title == f"LoRA of rank 2 in {words} on hard, sketch unseen"
    assert f"LoRA of rank 2 in {words} of the bundled CLIP was trained at 3 sites" in Story(run).sentence
    with pytest.raises(UserError, match="has changed since the run"):
        heldout.trained(path, replace(run.known, lora_rank=3), features)


def test_what_is_kept_is_shown_only_for_the_adapter_that_it_is_of(plain: Path, drawn: Features, tmp_path: Path) -> None:
    run = a_run(tmp_path, drawn)
    found = heldout.analyse(run, Settings(), drawn, "sketch")
    (run / output.FILE).write_text(heldout.as_text(found))
    assert heldout.kept(run, "the disk is away") == (
        found,
        "This is an earlier analysis; it can't be repeated here: the disk is away",
    )
    (run / "adapter.safetensors").write_bytes(b"another")
    nothing, why = heldout.kept(run, "the disk is away")
    assert nothing is None
    assert why == "the disk is away; and held_out.json is of an earlier round"
    (run / output.FILE).write_text("{")
    assert "can't be read" in heldout.kept(run, "")[1]
    (run / output.FILE).write_text(json.dumps({"learnt": heldout.result_hash(run)}))
    assert heldout.kept(run, "") == (None, "; and held_out.json can't be read (it lacks domain)")


def test_data_that_are_no_longer_the_runs_are_reported(plain: Path, tree: Path) -> None:
    other = open_features(Settings(data=f"folder:{tree}"), progress=False)
    with pytest.raises(UserError, match="has changed since the run"):
        heldout.analyse(plain, Settings(), other, "photo")


def test_a_server_without_held_out_images_says_so() -> None:
    with pytest.raises(UserError, match="no images of its own"):
        heldout.open_held_out(Settings(data="none", class_names="cat,dog"))
    with pytest.raises(UserError, match="holds out no domain"):
        heldout.open_held_out(Settings(holdout=""))


def test_a_thumbnail_is_small_and_keeps_its_shape() -> None:
    data = heldout.thumbnail(Image.new("RGB", (4000, 1000), "red"))
    image = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    assert image.size == (96, 24)
    assert len(data) < 2000
    assert content.of_bytes(data.encode()) == content.of_bytes(
        heldout.thumbnail(Image.new("RGB", (4000, 1000), "red")).encode()
    )
