from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fedclip_flwr
from fedclip_flwr import FedCLIP
from fedclip_flwr.base import files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.features import clip, models
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.inference.model import Prediction
from fedclip_flwr.learning.training import logits_of
from fedclip_flwr.runs.folder import RunFolder
from tests.learnt import saved_adapter, whole_model_run
from tests.models import small_clip, small_siglip, small_siglip2


def paths_of(tree: Path, domain: str = "photo") -> list[str]:
    """The images in the order in which their features are stored."""
    return [str(tree / picture.name) for picture in ImageFolder(tree).pictures(domain)]


def expected(folder: Path, features: Features, domain: str = "photo") -> Tensor:
    """The probabilities, from the stored features and the adapter alone."""
    adapter = saved_adapter(folder, features)
    return logits_of(adapter, features.examples(domain).ready(), features.classes.ready()).softmax(dim=1).detach()


def table(found: Sequence[Prediction], names: Sequence[str]) -> Tensor:
    """Probabilities by class."""
    shares = [dict(zip(*one, strict=True)) for one in found]
    return torch.tensor([[share[name] for name in names] for share in shares])


def assert_same(found: Sequence[Prediction], wanted: Sequence[Prediction]) -> None:
    """But for the last bits, which depend on how many images are seen at once."""
    assert [one.labels for one in found] == [one.labels for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_clip_alone_needs_no_facts(features: Features, tree: Path) -> None:
    loaded = clip.Clip(models.find("bundled"), "cpu", "float32")
    model = FedCLIP(loaded, features.vocabulary)
    wanted = logits_of(None, features.examples("photo").ready(), features.classes.ready()).softmax(dim=1)
    found = table(model.predict(paths_of(tree), top=3), model.class_names)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_images_are_found_to_show_what_their_stored_features_say(folder: Path, features: Features, tree: Path) -> None:
    model, wanted = FedCLIP.from_pretrained(folder), expected(folder, features)
    found = model.predict(paths_of(tree), top=3)
    torch.testing.assert_close(table(found, model.class_names), wanted, rtol=0, atol=1e-5)
    assert [one.label for one in found] == [model.class_names[number] for number in wanted.argmax(dim=1)]
    assert all(list(one.probabilities) == sorted(one.probabilities, reverse=True) for one in found)
    assert [one.labels for one in model.predict(paths_of(tree), top=99)] == [one.labels for one in found]
    best = model.predict(paths_of(tree)[0])
    assert_same(best, [Prediction(found[0].labels[:1], found[0].probabilities[:1])])
    zero = logits_of(None, features.examples("photo").ready(), features.classes.ready()).softmax(dim=1)
    assert (table(found, model.class_names) - zero).abs().max() > 0.05  # the adapter does count


def test_paths_pictures_tensors_and_arrays_are_the_same(folder: Path, tree: Path) -> None:
    model, path = FedCLIP.from_pretrained(folder), paths_of(tree)[0]
    wanted = model.predict([path], top=3)
    image = Image.open(path)
    pixels = np.asarray(image.convert("RGB"))
    tensor = torch.tensor(pixels).movedim(-1, 0)
    several = torch.stack([tensor, tensor])
    for same in (path, Path(path), image, pixels, tensor, tensor / 255, (tensor / 255).double(), [image], iter([path])):
        assert_same(model.predict(same, top=3), wanted)
    assert model.predict(several, top=3) == model.predict([path, path], top=3)
    assert model.predict([]) == []


def test_a_picture_that_lies_on_its_side_is_turned(folder: Path, tree: Path) -> None:
    model, upright = FedCLIP.from_pretrained(folder), Image.open(paths_of(tree)[0]).convert("RGB")
    upright = upright.resize((64, 32))
    held, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    upright.rotate(90, expand=True).save(held, "PNG", exif=exif)
    assert model.predict(Image.open(held), top=3) == model.predict(upright, top=3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "missing.png: there is no such file"),
        (torch.zeros(1, 8, 8), r"pixels of shape \(8, 8, 1\): expected colours last"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\): expected colours last"),
        (torch.full((3, 8, 8), 2.0), "pixels outside 0 to 1"),
        (torch.full((3, 8, 8), float("nan")), "pixels outside 0 to 1"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "expected bytes"),
        (3, "is not an image"),
    ],
)
def test_what_is_no_image_is_reported(folder: Path, image: Any, message: str) -> None:
    model = FedCLIP.from_pretrained(folder)
    with pytest.raises(UserError, match=message):
        model.predict([image])


@pytest.mark.parametrize("top", [0, -1, "x", 1.0])
def test_impossible_numbers_of_classes_are_refused(folder: Path, tree: Path, top: Any) -> None:
    with pytest.raises(UserError, match="expected a whole number, at least 1"):
        FedCLIP.from_pretrained(folder).predict(paths_of(tree), top=top)


def test_what_is_here_has_no_revision(folder: Path) -> None:
    with pytest.raises(UserError, match="only the hub has revisions"):
        FedCLIP.from_pretrained(folder, revision="main")


def test_files_that_cant_be_read_are_left_out_and_reported(folder: Path, tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    model, (first, *others) = FedCLIP.from_pretrained(folder), paths_of(tree)
    names = [str(broken), first, str(broken), *others, *others * 20, str(broken)]  # more than one batch
    found = list(model.stream_files(names))
    assert [name for name, _ in found] == names
    assert [name for name, one in found if one is None] == [str(broken)] * 3
    assert found[1][1] is not None
    assert_same([found[1][1]], model.predict(first))
    with pytest.raises(UserError, match=r"broken\.png can't be read"):
        model.predict(names)


def test_a_stream_needs_no_more_than_a_batch_ahead(folder: Path, tree: Path) -> None:
    model, taken = FedCLIP.from_pretrained(folder), 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Image.open(paths_of(tree)[0])

    stream = model.stream(endless())
    assert_same([next(stream)], model.predict(paths_of(tree)[0]))
    assert taken <= clip.PART


def test_new_classes_need_only_words(folder: Path, features: Features, tree: Path) -> None:
    model = FedCLIP.from_pretrained(folder)
    other = model.with_classes(["tree", "fish", "cup", "house"], "a drawing of a {}|the {}")
    found = table(other.predict(paths_of(tree), top=4), other.class_names)
    settings = Settings(
        data=f"folder:{tree}", class_names="tree,fish,cup,house,car,cat", prompt="a drawing of a {}|the {}"
    )
    asked = open_features(settings, progress=False)
    adapter = saved_adapter(folder, features)
    logits = logits_of(adapter, asked.examples("photo").ready(), asked.classes.ready())[:, :4]
    torch.testing.assert_close(found, logits.softmax(dim=1).detach(), rtol=0, atol=1e-5)
    assert other.adapter is model.adapter
    assert model.class_names == ("car", "cat", "fish")
    again = model.with_classes(prompt="the {}")
    assert (again.class_names, again.vocabulary.templates) == (model.class_names, ("the {}",))


@pytest.mark.parametrize(
    ("names", "prompt", "message"),
    [
        (["a"], "", "expected at least two names, each once, found a"),
        (["a", "a"], "", "each once"),
        (["a", "A"], "", "would be two classes"),
        (["a", "b\n"], "", "give it a name of plain characters"),
        (["a", "b"], "no place", "expected a template with one {}"),
        ("zebra", "", "expected a list of names, found the text 'zebra'"),
        ([], "", "expected at least two names, each once, found none"),
        ([f"class {number}" for number in range(2**12)], "|".join(["a {}"] * 2**9), "prompts at most"),
    ],
)
def test_classes_that_cant_be_are_refused(folder: Path, names: list[str], prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FedCLIP.from_pretrained(folder).with_classes(names, prompt)


def test_it_is_a_module_through_which_the_adapter_learns(folder: Path, tree: Path) -> None:
    model = FedCLIP.from_pretrained(folder)
    inputs = model.prepare(paths_of(tree))
    logits = model.train()(**inputs)
    assert logits.shape == (12, 3)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(12, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.adapter is not None
    assert all(parameter.grad is not None for parameter in model.adapter.parameters())
    assert all(parameter.grad is None for parameter in model.net.parameters())
    assert not model.net.training


def test_it_moves_and_can_be_copied(folder: Path, tree: Path) -> None:
    model, path = FedCLIP.from_pretrained(folder), paths_of(tree)[0]
    wanted = model.predict(path, top=3)
    assert copy.deepcopy(model).predict(path, top=3) == wanted
    other = model.with_classes(["tree", "cup"])
    half = model.to(torch.bfloat16)
    assert len(other.predict(path)) == 1  # it has moved, too
    assert half.text.dtype == torch.bfloat16
    (found,) = half.predict(path, top=3)
    assert dict(zip(*found, strict=True)) == pytest.approx(dict(zip(*wanted[0], strict=True)), abs=0.1)
    assert half.to("meta").device.type == "meta"


def test_what_is_saved_comes_back(folder: Path, tree: Path, tmp_path: Path) -> None:
    model = FedCLIP.from_pretrained(folder)
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
    ]
    back = FedCLIP.from_pretrained(tmp_path / "out")
    assert back.predict(paths_of(tree), top=3) == model.predict(paths_of(tree), top=3)
    other = model.with_classes(["tree", "cup"])
    other.save_pretrained(tmp_path / "other")
    assert FedCLIP.from_pretrained(tmp_path / "other").class_names == ("tree", "cup")


def test_an_adapter_takes_the_place_of_a_full_model_and_back(folder: Path, tree: Path, tmp_path: Path) -> None:
    adapter = FedCLIP.from_pretrained(folder)
    full = FedCLIP(adapter.loaded, adapter.vocabulary, None, {**adapter.facts, "kind": "full-model"})
    for model in (full, adapter, full):
        model.save_pretrained(tmp_path / "out")
        back = FedCLIP.from_pretrained(tmp_path / "out")
        assert (back.adapter is None) == (model.adapter is None)
        assert_same(back.predict(paths_of(tree)), model.predict(paths_of(tree)))


def test_an_adapter_of_another_export_is_refused(folder: Path, tmp_path: Path) -> None:
    model = FedCLIP.from_pretrained(folder)
    model.save_pretrained(tmp_path / "out")
    assert model.adapter
    with torch.no_grad():
        next(model.adapter.parameters()).add_(1)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "adapter.safetensors").rename(tmp_path / "out" / "adapter.safetensors")
    with pytest.raises(UserError, match=r"does not match config\.json: export it again"):
        FedCLIP.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("make", [small_clip, small_siglip])
def test_other_models_do_too_wherever_they_have_gone(make: Any, tree: Path, tmp_path: Path) -> None:
    name = make(tmp_path / "model")
    features = open_features(Settings(data=f"folder:{tree}", model=str(name)), progress=False)
    wanted = expected(tmp_path / "learnt", features)
    model = FedCLIP.from_pretrained(tmp_path / "learnt")
    torch.testing.assert_close(
        table(model.predict(paths_of(tree), top=3), model.class_names), wanted, rtol=0, atol=1e-5
    )
    model.save_pretrained(tmp_path / "out")
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("[!a]*"))
    assert str(tmp_path) not in written
    name.rename(tmp_path / "moved")
    for left in ("learnt", "out"):
        with pytest.raises(UserError, match="give its location with model"):
            FedCLIP.from_pretrained(tmp_path / left)
        moved = FedCLIP.from_pretrained(tmp_path / left, model=str(tmp_path / "moved"))
        assert moved.predict(paths_of(tree)) == model.predict(paths_of(tree))


def test_images_in_another_form_are_no_hindrance(tree: Path, tmp_path: Path) -> None:
    name = small_siglip2(tmp_path / "model")
    features = open_features(Settings(data=f"folder:{tree}", model=str(name)), progress=False)
    wanted = expected(tmp_path / "learnt", features)
    model = FedCLIP.from_pretrained(tmp_path / "learnt")
    found = table(model.predict(paths_of(tree), top=3), model.class_names)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_another_model_than_the_adapters_is_refused(
    folder: Path, tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_clip(tmp_path / "other")
    facts = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**facts, "model": str(tmp_path / "other")}))
    with pytest.raises(UserError, match="was made for another version of"):
        FedCLIP.from_pretrained(folder)
    with pytest.raises(UserError, match=r"takes features of 128 numbers, those of .* have 12"):
        FedCLIP.from_pretrained(folder, model=str(tmp_path / "other"))
    assert "predictions may differ" in caplog.text


def test_a_full_model_is_its_own(tree: Path, tmp_path: Path) -> None:
    place, learner, pixels = whole_model_run(tree, tmp_path, 0.03)
    wanted = logits_of(learner, pixels.examples("photo").ready(), pixels.classes).softmax(dim=1)
    for path in (place, place / "model"):
        model = FedCLIP.from_pretrained(path)
        found = table(model.predict(paths_of(tree), top=3), model.class_names)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "out")
    assert FedCLIP.from_pretrained(tmp_path / "out").predict(paths_of(tree)) == model.predict(paths_of(tree))


def test_a_run_is_found_by_its_name(drawn: Features) -> None:
    with RunFolder(Settings(), "0123") as run:
        saved_adapter(run.path, drawn)
    assert FedCLIP.from_pretrained("latest").facts == FedCLIP.from_pretrained(run.path.name).facts
    assert run.path.parent == files.home() / "runs"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no such run, neither as a folder nor by name"),
        ("/nowhere/at/all", "there is no such run"),
        ("./nowhere", "there is no such run"),
        ("some/adapter", "neither a folder here nor in the Hugging Face cache"),
        ("some/thing/else", "nor a valid name on the Hugging Face hub"),
    ],
)
def test_what_is_not_there_is_reported(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FedCLIP.from_pretrained(name)


def test_a_folder_without_an_adapter_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        FedCLIP.from_pretrained(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "fedclip.json").write_text('{"kind": "full-model", "class_names": 3, "templates": []}')
    with pytest.raises(UserError, match=r"fedclip\.json can't be read \(its class_names must be a list of texts\)"):
        FedCLIP.from_pretrained(tmp_path)


def test_the_package_alone_brings_no_torch() -> None:
    code = "import fedclip_flwr, sys; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert output.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        fedclip_flwr.Other  # noqa: B018
