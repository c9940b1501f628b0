from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.experiments.simulate import Result, make_sites, simulate
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.operations import simulation
from tests.extras import needs


@pytest.fixture(autouse=True)
def signals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "stop_in_order", lambda word: None)


def encode(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["encode", *arguments])
    return result.exit_code, result.stdout + result.stderr * bool(result.exit_code)


def learnt(data: str) -> Result:
    features = open_features(Settings(data=data), progress=False)
    sites, unseen = make_sites(features, sites=2)
    return simulate(sites, features.classes, unseen, Settings(num_server_rounds=2))


def test_a_run_on_the_folder_is_the_run_on_the_images(tree: Path, tmp_path: Path) -> None:
    (tree / "photo" / "car" / "0.png").write_bytes(b"no picture")
    code, output = encode(f"data={tree}", "--out", str(tmp_path / "made"))
    assert code == 0
    assert "23 images in 3 classes: cartoon 12, photo 11; 1 more can't be read" in output
    assert output.splitlines()[-1] == f"Feature folder: {tmp_path / 'made'}"
    one, other = learnt(f"folder:{tree}"), learnt(f"features:{tmp_path / 'made'}")
    assert one.rounds == other.rounds
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_the_folder_has_the_names_and_prompts_that_were_asked_for(tree: Path, tmp_path: Path) -> None:
    code, _ = encode(f"data={tree}", "class-names=fish,cat,car", "prompt=a {}|the {}", "--out", str(tmp_path / "made"))
    assert code == 0
    images = open_features(
        Settings(data=f"folder:{tree}", class_names="fish,cat,car", prompt="a {}|the {}"), progress=False
    )
    made = open_features(Settings(data=f"features:{tmp_path / 'made'}"), progress=False)
    assert made.vocabulary == images.vocabulary
    assert made.parameters == images.parameters
    assert made.classes[1:] == images.classes[1:]
    assert torch.equal(made.classes.text, images.classes.text)
    for domain in images.domains:
        for one, other in zip(made.examples(domain), images.examples(domain), strict=True):
            assert torch.equal(one, other)


def test_the_same_may_be_written_again_and_an_unfinished_folder_is_completed(tree: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert encode(f"data={tree}", "--out", str(made))[0] == 0
    files = {file.name: file.read_bytes() for file in made.iterdir()}
    (made / "features.json").unlink()
    (made / "photo.safetensors").rename(made / ".photo.safetensors.0123")
    code, output = encode(f"data={tree}", "--out", str(made))
    assert (code, "stored already" in output) == (0, True)
    assert {file.name: file.read_bytes() for file in made.iterdir()} == files
    assert encode(f"data={tree}", "--out", str(made))[0] == 0


def test_a_folder_with_something_else_is_left_alone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert encode(f"data={tree}", "--out", str(tmp_path)) == (
        2,
        f"--out: {tmp_path} holds other files, such as letter.txt: name another folder\n",
    )
    made = tmp_path / "made"
    assert encode(f"data={tree}", "--out", str(made))[0] == 0
    before = load_file(made / "photo.safetensors")
    (tree / "photo" / "cat" / "0.png").unlink()
    code, output = encode(f"data={tree}", "--out", str(made))
    assert (code, "holds other features" in output) == (2, True)
    assert torch.equal(load_file(made / "photo.safetensors")["labels"], before["labels"])


def test_a_domain_that_cannot_be_a_file_is_named(tree: Path, tmp_path: Path) -> None:
    (tree / "photo").rename(tree / "classes")
    code, output = encode(f"data={tree}", "--out", str(tmp_path / "made"))
    assert (code, "'classes' can't be the name of a file" in output) == (2, True)
    assert encode(f"data={tree}")[0] == 0


def test_without_a_folder_the_features_are_stored(tree: Path, fedclip_home: Path) -> None:
    code, output = encode(f"data={tree}")
    assert code == 0
    folder = Path(output.splitlines()[-1].removeprefix("Stored in "))
    assert folder.parent == fedclip_home / "features"
    assert list(folder.glob("given-*.safetensors"))


def test_what_encoding_has_no_use_for_is_refused(tree: Path) -> None:
    code, output = encode(f"data={tree}", "adapter=gate", "precsion=float32", "oops")
    assert code == 2
    first, *others = output.splitlines()
    assert first.startswith("3 of the settings")
    assert "adapter: encoding does not use it; leave it out" in output
    assert "did you mean precision?" in output
    code, output = encode("data=features:/tmp")
    assert (code, "these are features already" in output) == (2, True)
    assert others


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (["method=full-model"], "pixels-*.safetensors"),
        pytest.param(
            ["method=lora", "lora-layers=last:1", "lora-modules=fc1"], "last1-*.safetensors", marks=needs("lora")
        ),
    ],
)
def test_what_a_tower_is_trained_on_is_stored_but_is_no_feature_folder(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], stored: str
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    assert encode(f"data={tree}", *given)[0] == 0
    assert len([*(tmp_path / "home").glob(f"features/*/{stored}")]) == 2
    code, output = encode(f"data={tree}", *given, "--out", "made")
    assert (code, "no features are made; leave it out" in output) == (2, True)


def test_a_folder_that_could_not_be_completed_does_not_say_that_it_is(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "made" / "photo.safetensors").mkdir(parents=True)
    code, output = encode(f"data={tree}", "--out", str(tmp_path / "made"))
    assert (code, "can't be written to" in output, "--out" in output) == (2, True, True)
    assert not (tmp_path / "made" / "features.json").exists()
