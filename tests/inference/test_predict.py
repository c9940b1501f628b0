from __future__ import annotations

import csv
import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedclip_flwr import FedCLIP
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.cli import app
from fedclip_flwr.data.files import Files, find_images
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.inference import predict
from fedclip_flwr.inference.encode import encode
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.training import logits_of
from tests import forked
from tests.failing import failing
from tests.learnt import saved_adapter, strong_adapter

COMMAND = "from fedclip_flwr.cli import app; app()"


def run(*arguments: object, given: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], input=given)
    return result.exit_code, result.stdout, result.stderr


def evaluated(data: str, adapter: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["evaluate", data, "--adapter", str(adapter), "--json"])
    assert result.exit_code == 0, result.stderr
    domains: dict[str, Any] = json.loads(result.stdout)["domains"]
    return domains


def test_each_image_has_a_line_with_what_it_shows(folder: Path, tree: Path) -> None:
    code, lines, stderr = run(tree, "--adapter", folder, "--top", 2)
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert code == 0
    assert [row["image"] for row in rows] == find_images([str(tree)])
    wanted = FedCLIP.from_pretrained(folder).predict([row["image"] for row in rows], top=2)
    assert [(row["label"], row["label_2"]) for row in rows] == [found.labels for found in wanted]
    assert [float(row["probability_2"]) for row in rows] == pytest.approx(
        [found.probabilities[1] for found in wanted], abs=2e-6
    )
    assert {row["error"] for row in rows} == {""}
    assert stderr.splitlines()[-1].startswith("24 images in ")


def test_a_program_gets_json(folder: Path, tree: Path) -> None:
    code, lines, _ = run(tree / "photo" / "car", "--adapter", folder, "--top", 9, "--json")
    first, *_ = facts = [json.loads(line) for line in lines.splitlines()]
    assert (code, len(facts)) == (0, 4)
    assert first["image"] == str(tree / "photo" / "car" / "0.png")
    assert first["top"][0]["label"] == first["label"]
    assert {one["label"] for one in first["top"]} == {"car", "cat", "fish"}
    assert sum(one["probability"] for one in first["top"]) == pytest.approx(1, abs=1e-5)


def test_a_file_is_written_completely_or_not_at_all(
    folder: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, lines, stderr = run(tree, "-a", folder, "-o", tmp_path / "new" / "found.jsonl")
    assert (code, lines) == (0, "")
    assert stderr.splitlines()[-1] == f"Predictions: {tmp_path / 'new' / 'found.jsonl'}"
    assert len((tmp_path / "new" / "found.jsonl").read_text().splitlines()) == 24
    (tmp_path / "file").write_text("")
    before = (tmp_path / "new" / "found.jsonl").read_text()
    monkeypatch.setattr(FedCLIP, "_best", lambda *_: 1 / 0)  # in the middle of it
    assert run(tree, "-a", folder, "-o", tmp_path / "new" / "found.jsonl")[0] == 1
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == [before]
    for out, why in (
        (tmp_path / "file" / "found.csv", "--out"),
        (tmp_path / "found.txt", "expected a name that ends with .csv or .jsonl"),
    ):
        code, lines, stderr = run(tree, "-a", folder, "-o", out)
        assert (code, lines, len(stderr.splitlines())) == (2, "", 1)
        assert why in stderr


def test_what_cant_be_read_has_a_line_and_the_others_too(folder: Path, tree: Path) -> None:
    broken = tree / "photo" / "car" / "0.png"
    broken.write_bytes(b"no picture")
    code, lines, stderr = run(tree / "photo", "-a", folder)
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert code == 1
    assert [row["image"] for row in rows if row["error"]] == [str(broken)]
    assert [row["label"] for row in rows].count("") == 1
    assert f"1 can't be read: {broken}" in stderr.splitlines()[-1]
    _, lines, _ = run(broken, "-a", folder, "--json")
    assert json.loads(lines) == {"image": str(broken), "error": "can't be read"}


def test_one_that_cannot_be_read_now_has_a_line_too(folder: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "3.png", OSError(errno.EIO, "Input/output error"))
    code, lines, _ = run(tree / "photo" / "car", "-a", folder)
    assert code == 1
    assert [row["error"] for row in csv.DictReader(io.StringIO(lines))] == [""] * 3 + ["can't be read"]


def test_names_come_from_the_standard_input_too(folder: Path, tree: Path) -> None:
    names = [str(tree / "photo" / "car" / "1.png"), str(tree / "photo" / "cat")]
    code, lines, _ = run("-", "-a", folder, given="\n".join(names) + "\n\n")
    assert code == 0
    assert [row["image"] for row in csv.DictReader(io.StringIO(lines))] == find_images(names)
    code, lines, _ = run("-", "-a", folder, given=f"{names[0]}\nnowhere.png\n")
    assert code == 1
    assert [row["error"] for row in csv.DictReader(io.StringIO(lines))] == ["", "can't be read"]


def test_a_name_that_is_no_text_and_one_with_commas_come_through(folder: Path, tree: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    (tree / "photo" / "car" / "0.png").rename(odd / 'a, "b".png')
    (tree / "photo" / "car" / "1.png").rename(odd / "b\udcff.png")
    done = forked.run(COMMAND, "predict", str(odd), "-a", str(folder))
    rows = list(csv.reader(io.StringIO(done.stdout)))
    assert [row[0] for row in rows[1:]] == [str(odd / 'a, "b".png'), str(odd / "b\udcff.png")]
    assert done.returncode == 0


def test_names_on_the_standard_input_may_be_no_text(folder: Path, tree: Path) -> None:
    odd = tree / "photo" / "b\udcff.png"
    (tree / "photo" / "car" / "0.png").rename(odd)
    done = forked.run(COMMAND, "predict", "-", "-a", str(folder), given=str(odd))
    assert done.stdout.splitlines()[1].startswith(f"{odd},")


def test_whoever_has_seen_enough_may_go(folder: Path, tree: Path) -> None:
    names = [str(path) for path in tree.glob("*/*/*.png")] * 100
    with forked.Python(COMMAND, "predict", "-", "-a", str(folder)) as process:
        process.stdin.write("\n".join(names))
        process.stdin.close()
        assert process.stdout.readline().startswith("image,")
        process.stdout.close()
        stderr = process.stderr.read()
    assert "failed" not in stderr
    assert "BrokenPipe" not in stderr


def test_other_classes_by_words_alone(folder: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("tree\nfish\ncup\n")
    for words in ("tree,fish,cup", tmp_path / "words.txt"):
        code, lines, _ = run(tree / "photo" / "fish", "-a", folder, "--classes", words, "--prompt", "the {}", "-k", 3)
        assert code == 0
        row = next(csv.DictReader(io.StringIO(lines)))
        assert {row["label"], row["label_2"], row["label_3"]} == {"tree", "fish", "cup"}


def test_features_whose_prompts_are_named_in_a_word_are_learnt_from_predicted_and_evaluated(
    folder: Path, tree: Path, tmp_path: Path
) -> None:
    encode([f"data=folder:{tree}"], str(tmp_path / "made"))
    made, file = f"features:{tmp_path / 'made'}", tmp_path / "made" / "features.json"
    code, wanted, _ = run(made, "-a", folder)
    assert code == 0
    figures = evaluated(made, folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompt": "those of a list"}))
    saved_adapter(tmp_path / "other", open_features(Settings(data=made)))
    code, lines, _ = run(made, "-a", tmp_path / "other")
    assert code == 0
    assert lines == wanted
    assert evaluated(made, tmp_path / "other") == figures
    code, _, stderr = run(tree, "-a", tmp_path / "other")
    assert code == 2
    assert "prompt = 'those of a list': expected a template with one {}" in stderr


def test_stored_features_need_no_clip(folder: Path, tree: Path, tmp_path: Path, features: Features) -> None:
    encode([f"data=folder:{tree}"], str(tmp_path / "made"))
    facts = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**facts, "model": "/gone/bundled"}))
    code, lines, stderr = run(f"features:{tmp_path / 'made'}", "-a", folder)
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert (code, len(rows)) == (0, 24)
    examples = features.examples("photo").ready()
    wanted = logits_of(saved_adapter(folder, features), examples, features.classes.ready()).argmax(dim=1)
    labels = [row["label"] for row in rows if row["image"].startswith("photo/")]
    assert labels == [features.vocabulary.class_names[number] for number in wanted]
    assert rows[-1]["image"] == "photo/11"
    assert "24 images" in stderr
    (folder / "adapter.json").write_text(json.dumps({**facts, "model": "some/clip"}))
    code, lines, stderr = run(f"features:{tmp_path / 'made'}", "-a", folder)
    assert (code, lines) == (2, "")
    assert "were made by bundled and have 128 numbers; the adapter is for some/clip, with 128" in stderr


def test_the_papers_adapter_warns_of_features_whose_length_nobody_knows(
    tree: Path, tmp_path: Path, features: Features, caplog: pytest.LogCaptureFixture
) -> None:
    paper, made = Settings(recipe="paper"), tmp_path / "made"
    encode([f"data=folder:{tree}"], str(made))
    saved_adapter(tmp_path / "own", features, paper)
    code, wanted, _ = run(f"features:{made}", "-a", tmp_path / "own")
    assert (code, caplog.text) == (0, "")
    norms = {}
    for file in (made / "photo.safetensors", made / "cartoon.safetensors"):
        tensors = load_file(file)
        norms[file] = tensors["image_features"].norm(dim=1, keepdim=True)
        save_file({**tensors, "image_features": tensors["image_features"] / norms[file]}, file)
    assert run(f"features:{made}", "-a", tmp_path / "own")[0] == 0
    assert "its features have unit length, but the adapter needs them as CLIP gives them" in caplog.text
    caplog.clear()
    facts = json.loads((made / "features.json").read_text())
    norm = float(torch.cat([*norms.values()]).mean())
    (made / "features.json").write_text(json.dumps({**facts, "feature_norm": norm}))
    code, lines, _ = run(f"features:{made}", "-a", tmp_path / "own")
    labels = [[row["label"] for row in csv.DictReader(io.StringIO(text))] for text in (wanted, lines)]
    assert labels[0] == labels[1]  # lengths differ little from image to image
    assert caplog.text == ""
    (made / "features.json").write_text(json.dumps(facts))
    stored = open_features(Settings(data=f"features:{made}"))
    assert len(stored.examples("photo").labels)
    saved_adapter(tmp_path / "other", stored, paper)
    assert run(f"features:{made}", "-a", tmp_path / "other")[0] == 0
    assert caplog.text == ""  # it was made for unit length, and says so


def test_the_likeliest_are_those_of_all_at_once() -> None:
    features = torch.randn(2500, 16, generator=torch.Generator().manual_seed(0))
    examples = Examples(features, torch.zeros(2500, dtype=torch.int64))
    classes = Classes(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), 7.0).ready()
    adapter = strong_adapter(Settings(adapter="gate"), 16)
    values, numbers = predict.likeliest(adapter, examples, classes, 3)
    wanted = logits_of(adapter, examples.ready(), classes).softmax(dim=1)
    assert torch.equal(numbers, wanted.argsort(dim=1, descending=True)[:, :3])
    torch.testing.assert_close(values, wanted.gather(1, numbers).detach())
    assert predict.likeliest(adapter, examples.rows(slice(0, 0)), classes, 3)[1].shape == (0, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.png"], "nowhere.png: there is no such file or folder"),
        (["{empty}"], "no images (.jpg"),
        (["{tree}", "--top", "0"], "top = 0: expected a whole number, at least 1"),
        (["{tree}", "--classes", "one"], "there is no such file, and a list needs commas"),
        (["{tree}", "--classes", "a,a"], "a more than once"),
        (["{tree}", "--prompt", "no place"], "expected a template with one {}"),
        (["{tree}", "--json", "--out", "found.csv"], "expected a name that ends with .jsonl, or no --json"),
        (["{tree}", "--device", "cuda:77"], "device = 'cuda:77'"),
        (["{tree}", "--device", "gpu"], "device = 'gpu'"),
        (["{tree}", "--precision", "half"], "precision = 'half'"),
        (["{tree}", "--model", "nowhere/at-all"], "neither a folder here nor in the Hugging Face cache"),
        (["features:{empty}"], "features.json can't be read"),
        (["features:{empty}", "{tree}"], "expected images, or one folder of features alone"),
        (["features:{empty}", "--classes", "a,b"], "--classes: stored features have their own"),
        (["{tree}", "-a", "{empty}"], "holds no adapter"),
        (["{tree}", "-a", "no-run"], "there is no such run"),
    ],
)
def test_what_cant_be_done_is_reported_in_a_line(
    words: list[str], expected: str, folder: Path, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"tree": tree, "empty": tmp_path / "empty"}
    filled = [word if word == "no place" or "{}" in word else word.format(**places) for word in words]
    code, lines, error = run(*([] if "-a" in words else ["-a", folder]), *filled)
    assert (code, lines) == (2, "")
    assert expected in error
    assert len(error.splitlines()) == 1


def test_files_are_distinguished_by_their_content_and_their_order(tree: Path) -> None:
    one, other = (str(tree / "photo" / "car" / f"{number}.png") for number in range(2))
    known = Files([one, other]).content("files")
    assert known != Files([other, one]).content("files")
    Path(one).rename(f"{one}.png")
    assert known == Files([f"{one}.png", other]).content("files")
    Path(other).write_bytes(b"changed")
    assert known != Files([f"{one}.png", other]).content("files")


def test_folders_are_searched_to_their_ends(tmp_path: Path) -> None:
    for name in ("b/c/d/e.JPG", "a.png", "b/.hidden.png", ".git/x.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images([str(tmp_path)]) == [f"{tmp_path}/a.png", f"{tmp_path}/b/c/d/e.JPG"]
    assert find_images([f"{tmp_path}/b/notes.txt"]) == [f"{tmp_path}/b/notes.txt"]  # its name was given
    with pytest.raises(UserError, match="no such file or folder"):
        find_images([f"{tmp_path}/c"])
