from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedclip_flwr.bundled import pretrain
from fedclip_flwr.data.drawn import CLASSES, FIGURES, SEEDS
from fedclip_flwr.data.drawn.canvas import Rng
from fedclip_flwr.features import models
from fedclip_flwr.features.clip import Clip


def test_it_learns_from_no_sketch_and_no_seed_of_a_data_set() -> None:
    assert "sketch" not in pretrain.DECK
    assert pretrain.DECK.count("photo") > len(pretrain.DECK) / 2
    assert pretrain.SEED >= SEEDS
    assert len(FIGURES) >= 4 * len(CLASSES)


def test_captions_vary_and_name_the_figure() -> None:
    _, domain, scene = pretrain.scene_of(0)
    r = Rng("captions")
    captions = {pretrain.caption(domain, scene, r) for _ in range(200)}
    assert len(captions) > 20
    assert all(scene.figure in caption.split() for caption in captions)
    assert any(scene.colour in caption.split() for caption in captions)
    assert any(scene.place in caption for caption in captions)


def test_every_word_of_a_caption_is_one_token_and_any_text_can_be_read() -> None:
    vocabulary = pretrain.tokenizer()
    for text in ("a picture of a small red house in front of hills", "an umbrella among clouds"):
        assert len(vocabulary.tokenize(text)) == len(text.split())
    assert vocabulary.unk_token_id not in vocabulary("giraffe Ünïcode 象")["input_ids"][1:-1]


def made(folder: Path) -> Path:
    command = [sys.executable, "-m", "fedclip_flwr.bundled.pretrain", str(folder), "--steps=2", "--pictures=512"]
    assert "parameters" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return folder


@pytest.mark.soak
def test_the_script_makes_what_the_package_ships(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    assert {f.name for f in one.iterdir()} == {f.name for f in models.BUNDLED.iterdir()}
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (one / name).read_text() == (models.BUNDLED / name).read_text()
    assert Clip(models.find(str(one))).parameters == Clip(models.find("bundled")).parameters


@pytest.mark.soak
def test_the_script_makes_the_same_model_again(tmp_path: Path) -> None:
    one, two = (models.find(str(made(tmp_path / name))).content(tmp_path) for name in ("one", "two"))
    assert one == two
