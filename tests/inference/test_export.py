"""The command `fedclip export`: what it writes, what it replaces and keeps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedclip_flwr import FedCLIP
from fedclip_flwr.base import hub
from fedclip_flwr.cli import app
from fedclip_flwr.inference import export as exports
from fedclip_flwr.inference import onnx_file
from fedclip_flwr.runs import history, saved
from tests.finished import CLASSES, finished

PICTURE = Image.new("RGB", (70, 90), "teal")


def export(run: Path | str, out: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["export", str(run), "--out", str(out), *words])


def refused(run: Path | str, out: Path, *words: str) -> str:
    """The line that is printed."""
    done = export(run, out, *words)
    assert done.exit_code == 2, done.output
    assert len(done.output.splitlines()) == 1, done.output
    return done.output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_written_and_used_elsewhere(tmp_path: Path) -> None:
    run, out = finished(tmp_path), tmp_path / "out"
    done = export(run, out)
    assert done.exit_code == 0, done.output
    assert names(out) == ["README.md", "adapter.safetensors", "config.json"]
    for name in names(out):
        assert name in done.output
    assert done.output.endswith(
        "from fedclip_flwr import FedCLIP\n"
        f'model = FedCLIP.from_pretrained("{out}")\n'
        'print(model.predict("image.jpg"))\n'
    )
    one, other = (FedCLIP.from_pretrained(place, device="cpu") for place in (run, out))
    assert other.class_names == tuple(CLASSES)
    assert one.predict(PICTURE) == other.predict(PICTURE)
    assert json.loads((out / "config.json").read_text())["blend"] == 0.5


def test_other_classes_are_in_the_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(finished(tmp_path), out, "--classes", "zebra,lion", "--prompt", "my {}").exit_code == 0
    facts = json.loads((out / "config.json").read_text())
    assert (facts["class_names"], facts["prompts"]) == (["zebra", "lion"], ["my zebra", "my lion"])
    assert "which differ from those above" in (out / "README.md").read_text()


def test_sites_are_named_only_if_that_is_said(tmp_path: Path) -> None:
    run, out = finished(tmp_path, data="folder:/srv/hospital/images"), tmp_path / "out"
    export(run, out)
    files = [path.read_bytes() for path in out.iterdir()]
    assert not any(word in data for data in files for word in (b"ward-0", b"lab-0", b"/srv", str(tmp_path).encode()))
    export(run, out, "--with-sites")
    assert "| ward-0 | 6 | 2 | 2 |" in (out / "README.md").read_text()
    assert "--with-sites: " in refused(out, tmp_path / "again", "--with-sites")


def test_an_older_export_is_replaced_and_hidden_files_stay(tmp_path: Path) -> None:
    run, out = finished(tmp_path), tmp_path / "out"
    export(run, out)
    (out / ".gitattributes").write_text("mine")
    (out / "model.onnx").write_text("of an older export")
    (out / "model").mkdir()
    (out / "model" / "fedclip.json").write_text("of an older export")
    (out / ".export-killed").mkdir()
    assert export(run, out, "--classes", "zebra,lion").exit_code == 0
    assert names(out) == [".gitattributes", "README.md", "adapter.safetensors", "config.json"]
    assert "zebra" in (out / "README.md").read_text()  # nobody had edited it
    assert FedCLIP.from_pretrained(out, device="cpu").class_names == ("zebra", "lion")


@pytest.mark.parametrize("edit", ["above", "below", "anew", "bytes"])
def test_a_card_that_was_edited_is_kept(edit: str, tmp_path: Path) -> None:
    run, out = finished(tmp_path), tmp_path / "out"
    export(run, out)
    card = out / "README.md"
    text = card.read_text()
    changed = {"above": text.replace("---\n", "---\nlicense: mit\n", 1), "below": text + "More.\n", "anew": "Mine."}
    card.write_bytes(changed[edit].encode() if edit in changed else b"\xff\n")
    before = card.read_bytes()
    done = export(run, out, "--classes", "zebra,lion")
    assert "README.md was edited and is kept" in done.output
    assert card.read_bytes() == before
    assert json.loads((out / "config.json").read_text())["class_names"] == ["zebra", "lion"]


def test_an_export_of_an_export_has_its_card(tmp_path: Path) -> None:
    run, one, two = finished(tmp_path), tmp_path / "one", tmp_path / "two"
    export(run, one)
    export(one, two)
    assert (one / "README.md").read_text() == (two / "README.md").read_text()
    assert "README.md was edited" not in export(one, two).output


@pytest.mark.parametrize("name", ["notes.txt", "model.onnx", "config.json", "model"])
def test_a_folder_that_holds_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"model_type": "clip"}')
    message = refused(finished(tmp_path), out)
    assert message == f"--out: {out} holds other files, such as {name}: name another folder\n"
    assert names(out) == [name]
    file = out / name
    assert "can't be written to" in refused(tmp_path / "20260102-030405", file)


def test_a_failure_leaves_the_older_export_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = finished(tmp_path), tmp_path / "out"
    export(run, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file, "check_installed", lambda: None)
    monkeypatch.setattr(onnx_file, "write", full)
    done = export(run, out, "--onnx", "--classes", "zebra,lion")
    assert done.exit_code == 2
    assert f"{out} can't be written to (No space left on device): make room there, or set --out" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_onnx_is_written_beside_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: FedCLIP, folder: Path) -> onnx_file.Agreement:
        assert model.class_names == tuple(CLASSES)
        (folder / "model.onnx").touch()
        (folder / "preprocessor_config.json").touch()
        return onnx_file.Agreement(16, 15, 2e-5)

    monkeypatch.setattr(onnx_file, "check_installed", lambda: None)
    monkeypatch.setattr(onnx_file, "write", write)  # tests/inference/test_onnx_file.py: its own
    out = tmp_path / "out"
    done = export(finished(tmp_path), out, "--onnx")
    assert done.exit_code == 0, done.output
    assert names(out) == ["README.md", "adapter.safetensors", "config.json", "model.onnx", "preprocessor_config.json"]
    assert "15 of 16 drawn pictures have the same class, and no probability differs by more than 2e-05" in done.output
    assert done.stderr == "writing and testing model.onnx …\n"


def test_onnx_without_its_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else object())
    message = refused("latest", tmp_path, "--onnx")
    assert "needs onnxruntime: pip install 'fedclip-flwr[onnx]'" in message


def test_a_fully_trained_model_is_in_the_export(tmp_path: Path) -> None:
    run, out = finished(tmp_path, method="full-model"), tmp_path / "out"
    facts = json.loads((run / saved.FACTS).read_text()) | {"kind": "full-model"}
    full = FedCLIP.from_pretrained(run, device="cpu", precision="float32")
    with torch.no_grad():
        full.net.visual_projection.weight += 0.1
    full.net.save_pretrained(run / "model")
    full.loaded.preparer().processor.save_pretrained(run / "model")
    for file in full.loaded.folder.glob("token*"):
        (run / "model" / file.name).write_bytes(file.read_bytes())
    saved.write_json(run / "model" / saved.WHOLE, facts)
    (run / saved.FACTS).unlink()
    (run / saved.TENSORS).unlink()
    done = export(run, out)
    assert done.exit_code == 0, done.output
    assert names(out) == ["README.md", "config.json", "model"]
    assert "model/model.safetensors" in done.output
    assert "A fully trained CLIP" in (out / "README.md").read_text()
    one, other = (FedCLIP.from_pretrained(place, device="cpu") for place in (run, out))
    assert one.predict(PICTURE) == other.predict(PICTURE) != full.predict(PICTURE)


def test_what_is_uploaded_is_the_folder_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = finished(tmp_path), tmp_path / "out"
    export(run, out)
    (out / "README.md").write_text("Mine.")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(hub, "check_upload", lambda name: None)

    def upload(folder: Path, name: str, files: list[str], message: str, private: bool | None) -> str:
        asked.append((folder, name, private, (folder / "README.md").read_text()))
        assert {"README.md", "config.json", "adapter.safetensors", "model.onnx", "model/*"} <= {*files}
        return f"https://huggingface.co/{name}"

    monkeypatch.setattr(hub, "upload", upload)
    done = export(run, out, "--push", "me/adapter", "--private")
    assert asked == [(out, "me/adapter", True, "Mine.")]
    assert "On the hub: https://huggingface.co/me/adapter\n" in done.output
    assert 'from_pretrained("me/adapter")' in done.output


def test_what_cannot_be_exported_is_reported_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    assert "there is no run in" in refused("latest", out)
    assert "holds no adapter" in refused(tmp_path, out)
    assert refused("latest", Path(), "--out", "") == "--out: name the folder that is to be written\n"
    assert "--private: nothing is uploaded without --push" in refused("latest", out, "--private")
    assert "uploads are disabled by HF_HUB_OFFLINE" in refused("latest", out, "--push", "me/adapter")
    assert "expected a valid name on the hub" in refused("latest", out, "--push", "me/my adapter")
    assert not out.exists()


def test_a_run_that_was_not_completed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = finished(tmp_path, status="stopped", summary={"round": 3}), tmp_path / "out"
    assert "The run was not completed (stopped): this is its best adapter up to round 3." in export(run, out).output
    monkeypatch.setattr(history, "held", lambda path: True)
    going = finished(tmp_path / "going", status="running")
    assert "is still running: wait until it ends, or stop it" in refused(going, tmp_path / "other")


def test_a_mark_is_known_again(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("A card.\n\n\n")
    for _ in range(2):
        exports._mark(card)
        assert exports._as_written(card)
        assert card.read_text().count("<!--") == 1
