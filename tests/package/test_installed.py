"""The wheel with the oldest and with the newest dependencies that it allows, used as by somebody who installed it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.package.conftest import TREE, Environment, environment, lowest

pytestmark = pytest.mark.package

EXTRAS = {
    "oldest": ("simulation", "privacy", "lora"),
    "oldest for ONNX": ("simulation", "privacy", "onnx"),  # which asks for a newer torch
    "newest": ("simulation", "privacy", "onnx", "lora"),
}
TOOLS = ("hypothesis", "mypy", "pytest", "pytest-xdist")
TESTS = (
    "learning/test_adapters.py",
    "features/test_clip.py",
    "features/test_lora.py",
    "inference/test_lora.py",
    "cli/test_cli.py",
    "features/test_encoding.py",
    "learning/test_training.py",
    "inference/test_model.py",
    "inference/test_predict.py",
    "exchange/test_privacy.py",
    "runs/test_saved.py",
    "data/test_dataset.py",
    "data/test_folder.py",
    "data/test_images.py",
)
"""What uses torch, transformers, datasets and the others most."""


def needed(metadata: Distribution, *extras: str) -> list[Requirement]:
    """What the package declares that it needs, with these extras."""
    every = map(Requirement, metadata.requires or [])
    return [one for one in every if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras)]


@pytest.fixture(scope="module", params=EXTRAS)
def end(
    request: pytest.FixtureRequest, wheel: Path, metadata: Distribution, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    """With the wheel and its extras, and with what its tests need."""
    extras = EXTRAS[request.param]
    with environment(tmp_path_factory.mktemp(request.param.replace(" ", "-"))) as made:
        tools = [one for one in needed(metadata, "dev") if one.name in TOOLS]
        what = [
            f"fedclip-flwr[{','.join(extras)}] @ {wheel.as_uri()}",
            *(f"{one.name}{one.specifier}" for one in tools),
        ]
        if request.param != "newest":
            bounds = made.work / "bounds.txt"
            bounds.write_text("\n".join(lowest(needed(metadata, *extras) + tools)))
            what += ["--constraint", str(bounds)]
        made.install(*what)
        yield made


@pytest.fixture(scope="module")
def run(end: Environment) -> Path:
    """The folder of the federation that `fedclip run` simulates by itself."""
    assert "Warning" not in end.do("fedclip", "run", "results-dir=runs")
    return (end.work / "runs" / "latest").resolve()


def writes_onnx(end: Environment) -> bool:
    return end.run("python", "-c", "import onnxscript").returncode == 0


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_what_is_installed_fits_together(end: Environment) -> None:
    end.do("python", "-m", "pip", "check")
    where = end.do("python", "-c", "import fedclip_flwr; print(fedclip_flwr.__file__)")
    assert Path(where.strip()).is_relative_to(end.root)


def test_the_quick_start_makes_a_better_adapter(run: Path) -> None:
    summary = read(run / "summary.json")
    assert summary["status"] == "completed"
    assert summary["adapted"]["seen"] > summary["zero_shot"]["seen"]
    assert summary["adapted"]["unseen"] > summary["zero_shot"]["unseen"]


def test_what_was_learnt_is_shown_and_used(end: Environment, run: Path, tree: Path) -> None:
    (run / "report.html").unlink()
    end.do("fedclip", "report", run)
    assert "</html>" in (run / "report.html").read_text()
    predictions = [json.loads(line) for line in end.do("fedclip", "predict", tree, "-a", run, "--json").splitlines()]
    right = [Path(line["image"]).parent.name == line["label"] for line in predictions]
    assert len(right) == 24
    assert sum(right) > 12
    measured = json.loads(end.do("fedclip", "evaluate", f"folder:{tree}", "-a", run, "--json"))
    figures = measured["domains"]
    assert {domain: pair["images"] for domain, pair in figures.items()} == {"photo": 12, "cartoon": 12}
    assert sum(12 * pair["adapted"]["accuracy"] for pair in figures.values()) == pytest.approx(sum(right))


PREDICTED = """
import json, sys
from fedclip_flwr import FedCLIP
(found,) = FedCLIP.from_pretrained("adapter").predict([sys.argv[1]])
print(json.dumps([found.label, found.probabilities[0]]))
"""


def test_an_export_is_loaded_in_python(end: Environment, run: Path, tree: Path) -> None:
    end.do("fedclip", "export", run, "--out", "adapter", *(["--onnx"] if writes_onnx(end) else []))
    if writes_onnx(end):
        assert (end.work / "adapter" / "model.onnx").stat().st_size > 0
    image = tree / "photo" / "car" / "0.png"
    prediction = json.loads(end.do("fedclip", "predict", image, "-a", run, "--json"))
    label, probability = json.loads(end.do("python", "-c", PREDICTED, image))
    assert (label, probability) == (prediction["label"], pytest.approx(prediction["probability"], abs=1e-5))


PEFT = """
from peft import PeftModel
from transformers import AutoModel
from fedclip_flwr.features.models import BUNDLED
print(len(PeftModel.from_pretrained(AutoModel.from_pretrained(BUNDLED), "lora").peft_config))
"""


def test_lora_is_trained_and_read_by_peft(end: Environment) -> None:
    if end.run("python", "-c", "import peft").returncode:
        pytest.skip("without the extra lora")
    end.do("fedclip", "run", "method=lora", "lora-layers=last:1", "num-server-rounds=1", "results-dir=with-lora")
    end.do("fedclip", "export", "with-lora/latest", "--out", "lora")
    assert end.do("python", "-c", PEFT).split()[-1] == "1"


FLOWER = """
import subprocess, sys
from pathlib import Path
from fedclip_flwr.operations import simulation
with simulation.temporary() as folder, simulation.superlink(Path(folder)) as env:
    command = ["flwr", "run", ".", simulation.CONNECTION, "--stream", "--run-config", sys.argv[1]]
    sys.exit(subprocess.run([*command, "--federation-config", "num-supernodes=2"], env=env).returncode)
"""


def test_an_app_of_ones_own_runs_with_flowers_command(end: Environment) -> None:
    end.do("fedclip", "init", "study", "num-server-rounds=1")
    study = end.work / "study"
    end.do("flwr", "build", cwd=study)
    assert list(study.glob("*.fab"))
    end.do("python", "-c", FLOWER, f"results-dir='{study}/runs' seed=3", cwd=study)
    run = study / "runs" / "latest"
    assert read(run / "summary.json")["status"] == "completed"
    assert read(run / "summary.json")["adapted"]["sites"].keys() == {"art-0", "cartoon-0"}
    assert [read(run / "settings.json")[key] for key in ("num-server-rounds", "seed")] == [1, 3]


TYPED = """
from fedclip_flwr import FedCLIP
from fedclip_flwr.base.settings import Settings
reveal_type(FedCLIP.from_pretrained("latest"))
Settings(seed="x")
"""
WITHOUT = """
[mypy]
[mypy-torch.*,transformers.*,datasets.*,flwr.*]
follow_imports = skip
"""
"""What takes mypy a minute to read, and is not what is looked at."""


@pytest.mark.parametrize("end", ["newest"], indirect=True)
def test_its_types_are_seen(end: Environment) -> None:
    (end.work / "typed.py").write_text(TYPED)
    (end.work / "mypy.ini").write_text(WITHOUT)
    said = end.run("python", "-m", "mypy", "--strict", "typed.py").stdout
    assert 'Revealed type is "fedclip_flwr.inference.model.FedCLIP"' in said
    assert 'typed.py:5: error: Argument "seed" to "Settings" has incompatible type "str"; expected "int"' in said
    assert "Found 1 error in 1 file" in said


def test_its_own_tests_pass(end: Environment) -> None:
    place = end.work / "own"
    for name in ("docs", "tests"):
        shutil.copytree(TREE / name, place / name)
    shutil.copy(TREE / "pyproject.toml", place)
    names = [*TESTS, *(["inference/test_onnx_file.py"] if writes_onnx(end) else [])]
    end.do("python", "-m", "pytest", "-n", "2", *(f"tests/{name}" for name in names), cwd=place)
