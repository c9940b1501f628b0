"""The part of a page on one round: what sites gave, and what is predicted of classes that nobody has images of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedclip_flwr.base import tensorfile
from fedclip_flwr.features.base import Features
from fedclip_flwr.learning import OneRound
from fedclip_flwr.report import sums, writing
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs import history
from fedclip_flwr.runs.saved import load_adapter
from tests.report.made import a_run, feature_folder
from tests.report.test_page import words

WITHOUT = 3
"""The class that nobody has images of."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, drawn: Features) -> Path:
    root = tmp_path_factory.mktemp("sums")
    data = feature_folder(root / "data", drawn, each=400)
    for name in ("photo", "sketch"):
        path = data / f"{name}.safetensors"
        state = load_file(path)
        kept = state["labels"] != WITHOUT
        tensorfile.save({key: tensor[kept].clone() for key, tensor in state.items()}, path, {})
    return a_run(root / "runs", data=f"features:{data}", method="one-round")


def test_the_sites_and_their_shares(folder: Path) -> None:
    found = sums.of_run(Story(history.read(folder)))
    assert found
    assert found.sites == [
        ["site-0", "60", "25.0", "5"],
        ["site-1", "80", "33.3", "5"],
        ["site-2", "100", "41.7", "5"],
    ]


def test_the_class_without_images_and_its_nearest(folder: Path) -> None:
    found = sums.of_run(Story(history.read(folder)))
    assert found
    learner, facts = load_adapter(folder)
    assert isinstance(learner, OneRound)
    ((name, nearest, distance),) = found.without
    assert name == facts["class_names"][WITHOUT]
    fits = learner._solved()
    assert fits
    span = fits[0]
    whitened = span.means @ torch.linalg.cholesky(span.precision)
    apart = torch.cdist(whitened, whitened[WITHOUT : WITHOUT + 1])[:, 0]
    apart[WITHOUT] = math.inf
    assert nearest == facts["class_names"][int(apart.argmin())]
    assert distance == f"{apart.min():.1f}"
    assert found.seen == len(facts["class_names"]) - 1
    between = torch.cdist(whitened, whitened).fill_diagonal_(math.inf)[:, torch.arange(len(whitened)) != WITHOUT]
    usual = sorted(row.min() for number, row in enumerate(between) if number != WITHOUT)
    assert found.usual == f"{usual[len(usual) // 2]:.1f}"


@pytest.mark.usefixtures("undrawn")
def test_under_masks_the_page_says_that_sums_were_hidden(tmp_path: Path, drawn: Features) -> None:
    folder = a_run(tmp_path / "runs", drawn, method="one-round", secure_aggregation=True)
    found = sums.of_run(Story(history.read(folder)))
    assert found
    assert found.sites == []
    assert found.seen == 10
    text = words(writing.write(history.read(folder), tmp_path / "out"))
    assert "Secure aggregation has hidden what each site gave" in text
    assert "All 10 classes have images" in text


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_both(folder: Path, tmp_path: Path) -> None:
    text = words(writing.write(history.read(folder), tmp_path / "out"))
    assert "What the sites gave" in text
    assert "Classes without images: 1 of 10" in text
    assert "site-2 100 41.7 5" in text
    assert "Secure aggregation" not in text


def test_other_methods_have_no_sums(plain: Path) -> None:
    assert sums.of_run(Story(history.read(plain))) is None
