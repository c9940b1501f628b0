"""Whole runs of `fedclip run` on every kind of data, and with sites that hold little, or nothing that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.features import models
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.learning.training import evaluate
from fedclip_flwr.runs.saved import load_adapter
from tests.data.test_dataset import save_to_disk, table
from tests.features.test_encoded import write_folder
from tests.models import small_siglip
from tests.test_running import completed, fedclip, read, run_folder

pytestmark = pytest.mark.federation


def known_pictures() -> dict[str, Image.Image]:
    """For each class the first photo that CLIP recognises, by transformers' own forward pass."""
    net = CLIPModel.from_pretrained(models.BUNDLED, dtype=torch.float32).eval()
    texts = AutoTokenizer.from_pretrained(models.BUNDLED)(
        [f"a {c}" for c in CLASSES], padding=True, return_tensors="pt"
    )
    processor = AutoImageProcessor.from_pretrained(models.BUNDLED)
    found = {}
    for number, name in enumerate(CLASSES):
        photos = [picture(5, "photo", name, i)[0] for i in range(20)]
        with torch.no_grad():
            logits = net(**processor(photos, return_tensors="pt"), **texts).logits_per_image
        found[name] = photos[(logits.argmax(1) == number).nonzero()[0].item()]
    return found


def test_five_sites_of_which_one_lacks_classes_one_has_one_image_and_one_only_broken_ones(tmp_path: Path) -> None:
    """Every image is known to be recognised, or known not to be, whatever the split: so the table is known too."""
    known, root = known_pictures(), tmp_path / "images"

    def add(domain: str, label: str, shown: str, count: int) -> None:
        folder = root / domain / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            known[shown].save(folder / f"{shown}-{i}.png")

    for name in CLASSES:
        add("a", name, name, 5)  # all right
        add("b", name, CLASSES[CLASSES.index(name) - 1], 5)  # all wrong
        add("z", name, name, 1)  # held out: all right, but for those below
    for name in CLASSES[3:]:
        add("c", name, name, 10)  # all right, three classes fewer
    add("d", "cat", "cat", 1)
    add("z", "cat", "fish", 10)
    add("z", "car", "tree", 10)
    for name in CLASSES:
        (root / "e" / name).mkdir(parents=True)
        for i in range(3):
            (root / "e" / name / f"{i}.jpg").write_bytes(b"no picture")

    done = fedclip(
        *["run", "--nodes", "5", f"data=folder:{root}", f"results-dir={tmp_path}/runs", "num-server-rounds=2"],
        *["learning-rate=1e-12", "prompt=a {}"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["a-0", "a", "30", "10", "10", "10"] in rows
    assert ["c-0", "c", "42", "14", "14", "7"] in rows
    assert ["d-0", "d", "1", "0", "0", "1"] in rows
    assert "round 0: e-0 is left out: it has no readable image" in done.stdout
    assert "e: none of the 30 images can be read: " in done.stdout + done.stderr

    assert ["a-0", "100.0", "100.0", "+0.0"] in rows
    assert ["b-0", "0.0", "0.0", "+0.0"] in rows
    assert ["c-0", "100.0", "100.0", "+0.0"] in rows
    assert ["d-0", "–", "–", "–"] in rows
    assert ["mean", "of", "the", "seen", "66.7", "66.7", "+0.0"] in rows
    assert ["z,", "unseen", "33.3", "33.3", "+0.0"] in rows
    # recall: 8 classes 1, cat 1/11, car 1/11; F1: 6 classes 1, cat and car 2/12, fish and tree 2/12
    assert ["balanced", "accuracy", "66.7", "66.7", "81.8", "81.8"] in rows
    assert ["macro", "F1", "66.7", "66.7", "66.7", "66.7"] in rows
    assert "Weakest in z: car 9.1 %, cat 9.1 %, " in done.stdout
    assert "Left out: e-0: it has no readable image (round 0)" in done.stdout

    summary = read(run_folder(tmp_path / "runs"), "summary.json")
    assert [(f["site"], f["round"]) for f in summary["failures"]] == [("e-0", 0)]
    assert summary["adapted"]["sites"] == {"a-0": 1.0, "b-0": 0.0, "c-0": 1.0, "d-0": None}
    assert summary["adapted"]["metrics"]["sites"]["a-0"]["macro_f1"] == 1.0
    assert "recall" not in summary["adapted"]["metrics"]["sites"]["a-0"]
    assert summary["adapted"]["metrics"]["unseen"]["recall"]["cat"] == pytest.approx(1 / 11)
    assert summary["adapted"]["personal"] is None


@pytest.mark.soak
def test_a_bare_folder_of_classes_divided_by_dirichlet_with_names_from_a_file(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("automobile\nkitten\ntrout\n")
    settings = ["data=tree/photo", "class-names=names.txt", "partition=dirichlet", "alpha=5", "seed=1"]
    folder = completed(2, tmp_path / "runs", *settings, cwd=tree.parent)
    assert read(folder, "settings.json")["data"] == f"folder:{tree}/photo"
    assert read(folder, "adapter.json")["class_names"] == ["automobile", "kitten", "trout"]
    assert read(folder, "adapter.json")["prompts"][1] == "a picture of a kitten"
    summary = read(folder, "summary.json")
    assert summary["holdout"] is None
    assert summary["adapted"]["sites"].keys() == {"site-0", "site-1"}


def test_a_data_set_with_siglip_several_prompts_and_adapters_of_the_sites_own(
    tree: Path, tmp_path: Path, fedclip_home: Path
) -> None:
    save_to_disk(table(tree), tmp_path / "set")
    model = small_siglip(tmp_path / "siglip")
    settings = {"data": f"folder:{tmp_path}/set", "model": str(model), "prompt": "a {}|the {}", "learning-rate": 0.01}
    given = [f"{key}={value}" for key, value in settings.items()]
    folder = completed(2, tmp_path / "runs", "personalize=true", "holdout=", *given)
    facts = read(folder, "adapter.json")
    assert facts["bias"] == pytest.approx(-7)
    assert facts["templates"] == ["a {}", "the {}"]
    assert facts["prompts"] == ["a car", "a cat", "a fish", "the car", "the cat", "the fish"]
    summary = read(folder, "summary.json")
    assert summary["adapted"]["personal"].keys() == {"cartoon-0", "photo-0"}

    # what the sites have kept does as well as they have said, and is as good by validation as the run's adapter
    features = open_features(Settings.from_run_config(settings), progress=False)
    sites, _ = make_sites(features, "", 2)
    classes = features.classes.ready()
    shared, _ = load_adapter(folder)
    run = read(folder, "settings.json")["run"]
    for site in sites:
        own, _ = load_adapter(fedclip_home / "personal" / run / site.name)
        assert evaluate(own, site.test, classes).accuracy == summary["adapted"]["personal"][site.name]
        assert evaluate(own, site.validation, classes).loss <= evaluate(shared, site.validation, classes).loss + 1e-6


@pytest.mark.soak
def test_a_feature_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "made")
    for domain in ("a", "b"):
        tensors = {"image_features": torch.eye(20, 3), "labels": torch.arange(20) % 2}
        save_file(tensors, tmp_path / "made" / f"{domain}.safetensors")
    folder = completed(1, tmp_path / "runs", f"data=features:{tmp_path}/made")
    assert read(folder, "adapter.json")["model"] == "other/clip"
    assert read(folder, "summary.json")["holdout"] == "b"


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        pytest.param(
            "cartoon",
            "(cartoon-0: it has no readable image; cartoon-1: it has no readable image",
            marks=pytest.mark.soak,
        ),
        ("photo", "This run can't continue. photo is held out, but none of its images can be read"),
    ],
)
def test_fedclip_run_ends_with_an_error_when_the_run_fails(
    broken: str, expected: str, tree: Path, tmp_path: Path
) -> None:
    for image in (tree / broken).rglob("*.png"):
        image.write_bytes(b"no picture")
    done = fedclip("run", "--nodes", "2", f"data=folder:{tree}", f"results-dir={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert expected in done.stdout
    assert "finished:failed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    summary = read(run_folder(tmp_path / "runs"), "summary.json")
    assert summary["status"] == "failed"
    assert expected.removeprefix("This run can't continue. ") in summary["why"]
