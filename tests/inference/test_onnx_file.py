"""The ONNX file: it answers as torch does, for every kind of model, and is used without torch as docs/using.md says."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.data import drawn
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.features import models
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.inference import export as exports
from fedclip_flwr.inference import onnx_file
from fedclip_flwr.inference.model import FedCLIP
from fedclip_flwr.learning.adapters import ADAPTERS, Adapter, make_adapter
from tests import models as small
from tests.extras import needs
from tests.models import small_clip, small_siglip, small_siglip2

pytestmark = needs("onnx")
DOCS = Path(__file__).parents[2] / "docs"
CLASSES = Vocabulary(("cat", "dog", "fish"), ("a picture of a {}", "a photo of a {}"))
BLOCKED = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'fedclip_flwr', 'onnx'))\n"


def made(name: str, kind: str = "", blend: float = 1.0, vocabulary: Vocabulary = CLASSES) -> FedCLIP:
    """With an adapter of that kind, in which every weight matters."""
    found = models.find(name)
    loaded = Clip(found, "cpu", "float32")
    adapter: Adapter | None = None
    if kind:
        adapter = make_adapter(kind, found.dim, blend=blend, identity=False)
        with torch.no_grad():
            for weight in adapter.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)), alpha=0.3)
    facts: dict[str, Any] = {"kind": kind, "model": name, "model_revision": "", "dim": found.dim, "blend": blend}
    facts |= {"rank": 4, "class_names": vocabulary.class_names, "templates": vocabulary.templates}
    return FedCLIP(loaded, vocabulary, adapter, facts)


def session_of(folder: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def run(folder: Path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    session = session_of(folder)
    found = session.run([*onnx_file.OUTPUTS], {"pixel_values": pixels.numpy()})
    return {name: torch.from_numpy(one) for name, one in zip(onnx_file.OUTPUTS, found, strict=True)}


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have one layer in each tower: the time to write one goes with their number."""
    for tower in (small.TEXT, small.VISION):
        monkeypatch.setitem(tower, "num_hidden_layers", 1)


class Written:
    """The bundled CLIP with an adapter, exported once for several tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = made("bundled", "attention", 0.5, Vocabulary(drawn.CLASSES, ("a picture of a {}",)))
        self.before = copy.deepcopy(self.model.state_dict())
        (self.line,) = exports.write(self.model, folder, onnx=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("onnx"))


def test_torch_and_the_file_find_the_same_in_hundreds_of_pictures(written: Written) -> None:
    images = [
        drawn.picture(0, domain, figure, number)[0]
        for domain in drawn.DOMAINS
        for figure in drawn.CLASSES
        for number in range(5)
    ]
    inputs = written.model.prepare(images)
    found = run(written.folder, inputs["pixel_values"])
    with torch.no_grad():
        logits = written.model(**inputs)
    assert len(images) == 200
    assert torch.equal(found["logits"].argmax(1), logits.argmax(1))
    assert len(logits.argmax(1).unique()) == 10
    assert torch.allclose(found["probabilities"], logits.softmax(1), rtol=0, atol=1e-4)
    assert torch.allclose(found["features"].norm(dim=1), torch.ones(200))
    assert "16 of 16 drawn pictures have the same class" in written.line
    assert 0 < float(written.line.split()[-1].rstrip(".")) < 1e-4  # the greatest difference


def test_any_number_of_images_goes_in_at_once(written: Written) -> None:
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = run(written.folder, pixels)["logits"]
    assert torch.allclose(together, torch.cat([run(written.folder, one[None])["logits"] for one in pixels]), atol=1e-4)


def test_the_example_in_the_docs_runs_without_torch_and_without_this_package(written: Written, tmp_path: Path) -> None:
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (DOCS / "using.md").read_text(), re.DOTALL)
        if "onnxruntime" in block
    )
    paths = []
    for number, size in enumerate([(64, 64), (150, 90), (91, 201), (30, 47)]):
        image = drawn.picture(1, "photo", drawn.CLASSES[number], 0)[0].resize(size, Image.Resampling.BICUBIC)
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    command = [sys.executable, "-c", BLOCKED + code, str(written.folder), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line, path, known in zip(done.stdout.splitlines(), paths, written.model.predict(paths), strict=True):
        assert line.split()[:2] == [path, known.label]
        assert float(line.split()[2]) == pytest.approx(known.probability, abs=2e-3)


def test_the_file_says_what_it_is_and_nothing_of_this_machine(written: Written) -> None:
    import onnx

    session = session_of(written.folder)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == [*drawn.CLASSES]
    assert json.loads(facts["prompts"])[0] == "a picture of a bird"
    assert (facts["model"], facts["adapter"], facts["image_size"]) == ("bundled", "attention", "[64, 64]")
    assert (facts["image_mean"], facts["image_std"]) == ("[0.5, 0.5, 0.5]", "[0.5, 0.5, 0.5]")
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.shape[1:], pixels.type) == ("pixel_values", [3, 64, 64], "tensor(float)")
    assert isinstance(pixels.shape[0], str)
    data = (written.folder / "model.onnx").read_bytes()
    assert not any(word in data for word in (b"site-packages", b"stack_trace", str(Path(__file__).parent).encode()))
    exported = ["README.md", "adapter.safetensors", "config.json"]
    names = sorted(path.name for path in written.folder.iterdir())
    assert names == [*exported, "model.onnx", "preprocessor_config.json"]
    onnx.checker.check_model(str(written.folder / "model.onnx"))


def test_the_model_stays_as_it_was(written: Written) -> None:
    now = written.model.state_dict()
    assert now.keys() == written.before.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in written.before.items())
    assert not written.model.training
    assert written.model.adapter is not None
    assert all(weight.requires_grad for weight in written.model.adapter.parameters())


@pytest.mark.parametrize(
    ("make", "kind", "blend", "most_bytes"),  # attention: above
    [
        *((small_clip, kind, 1.0, 1000) for kind in ADAPTERS if kind not in ("attention", "scale")),
        (small_siglip, "scale", 0.25, onnx_file.MOST_BYTES),
    ],
)
def test_clip_and_siglip_with_the_other_adapters_and_with_more_weights_than_fit_into_one_file(
    make: Any, kind: str, blend: float, most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shallow: None
) -> None:
    monkeypatch.setattr(onnx_file, "MOST_BYTES", most_bytes)
    model = made(str(make(tmp_path / "model")), kind, blend)
    onnx_file.write(model, tmp_path)
    assert [path.stat().st_size > 1000 for path in tmp_path.glob("model.onnx.data")] == [True] * (most_bytes == 1000)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = run(tmp_path, pixels)
    with torch.no_grad():
        logits = model(pixels)
    assert torch.allclose(found["logits"], logits, atol=1e-4)  # SigLIP's have a bias of -7
    assert torch.allclose(found["probabilities"], logits.softmax(1), atol=1e-5)
    how = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert ("do_center_crop" in how) == (make is small_clip)


def test_without_an_adapter_lower_precision_is_written_in_float32_and_twice_the_same(
    tmp_path: Path, shallow: None
) -> None:
    import onnx

    loaded = Clip(models.find(str(small_clip(tmp_path / "model"))), "cpu", "bfloat16")
    model = FedCLIP(loaded, CLASSES, None)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        onnx_file.write(model, tmp_path / name)
    data = (tmp_path / "one" / "model.onnx").read_bytes()
    assert data == (tmp_path / "two" / "model.onnx").read_bytes()
    kinds = {one.data_type for one in onnx.load_from_string(data).graph.initializer}
    assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert next(model.net.parameters()).dtype == torch.bfloat16


def test_a_model_that_takes_patches_is_refused(tmp_path: Path) -> None:
    model = made(str(small_siglip2(tmp_path / "model")))
    with pytest.raises(UserError, match="a siglip2 takes images of any shape as patches"):
        onnx_file.write(model, tmp_path)
    assert not (tmp_path / "model.onnx").exists()
