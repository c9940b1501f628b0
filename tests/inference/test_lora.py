"""LoRA in use: predicted with, evaluated, exported for PEFT, and read back, without PEFT but for the export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from fedclip_flwr import FedCLIP
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.cli import app
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.features import models
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.lora import Lora
from fedclip_flwr.inference import learnt, onnx_file
from fedclip_flwr.inference.encode import encode
from fedclip_flwr.learning.training import examine, logits_of
from fedclip_flwr.runs import peft_folder, saved
from tests.extras import needs
from tests.learnt import lora_run
from tests.models import small_clip, small_siglip, small_siglip2

pytestmark = needs("lora")  # a run is made with it
PICTURE = Image.new("RGB", (70, 90), "teal")
PEFT = """
import sys
sys.modules["fedclip_flwr"] = None
import torch
from peft import PeftModel
from transformers import AutoModel
model, folder, inputs, out = sys.argv[1:]
net = PeftModel.from_pretrained(AutoModel.from_pretrained(model, dtype=torch.float32), folder).eval()
with torch.no_grad():
    torch.save(net(**torch.load(inputs)).logits_per_image, out)
"""
"""What a user does who has PEFT and not this package."""


def paths_of(tree: Path) -> list[str]:
    return [str(tree / picture.name) for picture in ImageFolder(tree).pictures("photo")]


def run(command: str, *words: object) -> str:
    done = CliRunner().invoke(app, [command, *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(command: str, *words: object) -> str:
    done = CliRunner().invoke(app, [command, *map(str, words)])
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def learner_off(learner: Lora) -> Lora:
    """The same, without its LoRA."""
    learner.blend = 0.0
    return learner


def table(model: FedCLIP, paths: list[str]) -> Tensor:
    shares = [dict(zip(*one, strict=True)) for one in model.predict(paths, top=9)]
    return torch.tensor([[share[name] for name in model.class_names] for share in shares])


@pytest.mark.parametrize("targets", ["vision", "text", "both"])
def test_images_are_found_to_show_what_the_learner_says(
    targets: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, learner, features = lora_run(tree, tmp_path, lora_targets=targets)
    monkeypatch.setitem(sys.modules, "peft", None)  # predicting needs none
    model, paths = FedCLIP.from_pretrained(place), paths_of(tree)
    with torch.no_grad():
        wanted = logits_of(learner, features.examples("photo").ready(), features.classes.ready()).softmax(dim=1)
    found = table(model, paths)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert model.adapter is None
    frozen = FedCLIP(Clip(learnt.find_learnt(str(place)).frozen(), "cpu", "float32"), model.vocabulary)
    assert (table(frozen, paths) - found).abs().max() > 0.01  # LoRA does count
    assert (model.text - frozen.text).abs().max() > 0.01 or targets == "vision"
    other = model.with_classes(["zebra", *model.class_names])
    torch.testing.assert_close(other.text[1:], model.text)
    assert other.loaded is model.loaded


def test_the_command_predicts_with_it_and_refuses_features(tree: Path, tmp_path: Path) -> None:
    place, _, _ = lora_run(tree, tmp_path)
    path = paths_of(tree)[0]
    line = next(line for line in run("predict", path, "-a", place).splitlines() if path in line)
    assert FedCLIP.from_pretrained(place).predict(path)[0].label in line
    encode([f"data=folder:{tree}"], str(tmp_path / "made"))
    for command in ("predict", "evaluate"):
        message = refused(command, f"features:{tmp_path / 'made'}", "-a", place)
        assert f"{place} is LoRA, which needs images; features:{tmp_path / 'made'} has only features" in message


def test_zero_shot_is_beside_it_and_neither_takes_the_others_features(tree: Path, tmp_path: Path) -> None:
    place, learner, features = lora_run(tree, tmp_path, lora_targets="both")
    with torch.no_grad():
        wanted = examine(learner, features.examples("photo").ready(), features.classes.ready())
        zero = examine(learner_off(learner), features.examples("photo").ready(), features.classes.ready())
    for _ in range(2):  # the second time everything is stored
        own = json.loads(run("evaluate", tree, "-a", place, "precision=float32", "--json"))["domains"]["photo"]
        assert own["zero_shot"]["accuracy"] == pytest.approx(zero.score.accuracy)
        assert own["adapted"]["accuracy"] == pytest.approx(wanted.score.accuracy)
        assert own["adapted"]["calibration_error"] == pytest.approx(wanted.calibration_error, abs=1e-3)
    assert own["adapted"] != own["zero_shot"]


def test_lora_for_another_model_is_refused_in_a_line(tree: Path, tmp_path: Path) -> None:
    place, _, _ = lora_run(tree, tmp_path / "run")
    other = small_clip(tmp_path / "other")
    with pytest.raises(UserError, match=r"LoRA does not fit \(.*\); name the model that it was made for") as caught:
        FedCLIP.from_pretrained(place, model=str(other))
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_tensors_are_refused_in_a_line(tree: Path, tmp_path: Path) -> None:
    place, learner, _ = lora_run(tree, tmp_path)
    every = {name: one.detach().clone() for name, one in learner.every.items()}
    first = min(every)
    for bad in (every[first].int(), every[first][:1], every[first] * float("nan")):
        saved.write_tensors(place / saved.TENSORS, {**every, first: bad}, 2, blend="0.5")
        with pytest.raises(UserError, match=r"adapter\.safetensors (can't be read|has numbers that are not finite)"):
            FedCLIP.from_pretrained(place)


@pytest.mark.parametrize(("wrong", "expected"), [({}, "lacks 'dim'"), ({"dim": "128"}, "its dim is '128'")])
def test_facts_without_a_dimension_are_refused_in_a_line(
    wrong: dict[str, Any], expected: str, tree: Path, tmp_path: Path
) -> None:
    place, _, _ = lora_run(tree, tmp_path)
    facts = json.loads((place / saved.FACTS).read_text())
    del facts["dim"]
    (place / saved.FACTS).write_text(json.dumps({**facts, **wrong}))
    with pytest.raises(UserError, match=rf"adapter\.json .*{expected}"):
        FedCLIP.from_pretrained(place)


def test_in_a_lower_precision_the_sum_is_rounded_once(tree: Path, tmp_path: Path) -> None:
    place, _, _ = lora_run(tree, tmp_path)
    full, low = (FedCLIP.from_pretrained(place, precision=name) for name in ("float32", "bfloat16"))
    weights = dict(full.net.named_parameters())
    assert all(torch.equal(one, weights[name].bfloat16()) for name, one in low.net.named_parameters())
    low.save_pretrained(tmp_path / "low")
    full.save_pretrained(tmp_path / "full")
    tensors = [(tmp_path / name / peft_folder.TENSORS).read_bytes() for name in ("low", "full")]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("make", "targets"), [(None, "both"), (None, "vision"), (small_siglip, "text"), (small_siglip2, "both")]
)
def test_peft_reads_an_export_without_this_package(make: Any, targets: str, tree: Path, tmp_path: Path) -> None:
    clip = str(make(tmp_path / "clip")) if make else "bundled"
    place, _, _ = lora_run(tree, tmp_path / "runs", model=clip, lora_targets=targets)
    out = tmp_path / "out"
    assert "adapter_config.json" in run("export", place, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "config.json")
    ]
    model = FedCLIP.from_pretrained(place, precision="float32")
    inputs = {**model.prepare(paths_of(tree)[:3]), **model.loaded.tokens(["a cat", "a dog"])}
    torch.save(inputs, tmp_path / "inputs")
    words = [str(models.find(clip).folder), str(out), str(tmp_path / "inputs"), str(tmp_path / "logits")]
    done = subprocess.run([sys.executable, "-c", PEFT, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = model.net(**inputs).logits_per_image
    torch.testing.assert_close(torch.load(tmp_path / "logits"), wanted, rtol=1e-4, atol=1e-4)
    again = FedCLIP.from_pretrained(out, model=clip, precision="float32")
    assert again.predict(PICTURE, top=3) == model.predict(PICTURE, top=3)


def test_what_is_exported_says_what_it_is_and_nothing_of_this_machine(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _, _ = lora_run(tree, tmp_path / "runs")
    out, again = tmp_path / "out", tmp_path / "again"
    run("export", place, "--out", out, "--classes", "zebra,cat")
    how = json.loads((out / peft_folder.CONFIG).read_text())
    assert (how["r"], how["lora_alpha"], how["base_model_name_or_path"]) == (2, 2, "bundled")  # half of an alpha of 4
    assert how["target_modules"] == sorted(how["target_modules"])
    assert how["auto_mapping"]["base_model_class"] == "CLIPModel"
    card = (out / "README.md").read_text()
    assert "# LoRA for CLIP" in card
    assert "LoRA of rank 2 in the image tower of the small CLIP that comes with fedclip-flwr" in card
    assert "PeftModel.from_pretrained(AutoModel.from_pretrained(" in card
    assert "zebra" in card
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in out.iterdir())
    run("export", out, "--out", again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in out.iterdir())
    (again / saved.TENSORS).write_text("of an older export")
    run("export", out, "--out", again)
    assert not (again / saved.TENSORS).exists()
    monkeypatch.setattr(peft_folder, "find_spec", lambda name: None)
    message = refused("export", place, "--out", tmp_path / "no")
    assert message == "LoRA is exported by peft: pip install 'fedclip-flwr[lora]'\n"
    assert not (tmp_path / "no").exists()


def test_the_hub_is_asked_for_what_peft_calls_it(tree: Path, tmp_path: Path) -> None:
    place, _, _ = lora_run(tree, tmp_path / "runs")
    out = tmp_path / "out"
    run("export", place, "--out", out)
    assert {path.name for path in out.iterdir()} <= {*learnt.FILES}
    assert learnt._lacks(out) is None
    (out / peft_folder.TENSORS).unlink()
    assert learnt._lacks(out) == peft_folder.TENSORS


@needs("onnx")
def test_lora_is_in_the_onnx_file(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    place, _, _ = lora_run(tree, tmp_path / "runs", lora_targets="both", model=str(small_clip(tmp_path / "clip")))
    model = FedCLIP.from_pretrained(place)
    onnx_file.write(model, tmp_path)
    inputs = model.prepare(paths_of(tree)[:4])
    session = onnxruntime.InferenceSession(tmp_path / onnx_file.FILE, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": inputs["pixel_values"].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**inputs), rtol=0, atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["adapter"] == "lora"
