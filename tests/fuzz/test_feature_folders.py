"""Feature folders of strangers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features.folder import FeatureFolder
from fedclip_flwr.features.opening import open_features
from fedclip_flwr.learning.training import logits_of
from tests.fuzz.hostile import Tried, json_bytes, tensor_bytes

FACTS: dict[str, Any] = {
    "model": "other/clip",
    "embedding_dim": 3,
    "logit_scale": 50.0,
    "logit_bias": -1.0,
    "parameters": 1000,
    "prompt": "a {}",
    "class_names": ["cat", "dog"],
    "domains": ["a", "b"],
}
EYE = struct.pack("<6f", 1, 0, 0, 0, 1, 0)
CLASSES = {"text_features": ("F32", [2, 3], EYE)}
DOMAIN = {
    "image_features": ("F16", [4, 3], struct.pack("<12e", *[0.5] * 12)),
    "labels": ("I64", [4], struct.pack("<4q", 0, 1, 1, 0)),
}


def whole(kinds: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, body = {}, b""
    for name, (kind, shape, data) in kinds.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "features.json").write_text(json.dumps(FACTS))
    (tmp_path / "classes.safetensors").write_bytes(whole(CLASSES))
    for domain in "ab":
        (tmp_path / f"{domain}.safetensors").write_bytes(whole(DOMAIN))
    return tmp_path


def assert_good(features: FeatureFolder) -> None:
    """All of it can be worked with."""
    names, templates = features.vocabulary
    assert len(set(names)) == len(names) >= 2
    assert templates
    assert 0 < features.classes.scale < math.inf
    assert len(features.classes.text) == len(names)
    assert len(features.content) == 32
    for domain in features.domains:
        labels = features.examples(domain).labels
        logits = logits_of(None, features.examples(domain).ready(), features.classes.ready())
        assert logits.shape == (len(labels), len(names))
        assert bool(logits.isfinite().all())
        assert bool((labels >= 0).all() and (labels < len(names)).all())


@given(data=json_bytes(FACTS))
def test_facts(folder: Path, tried: Tried, data: bytes) -> None:
    (folder / "features.json").write_bytes(data)
    with tried.one():
        features = open_features(Settings(data=f"features:{folder}"))
        assert isinstance(features, FeatureFolder)
        assert_good(features)


@given(data=tensor_bytes(DOMAIN))
def test_images(folder: Path, tried: Tried, data: bytes) -> None:
    (folder / "b.safetensors").write_bytes(data)
    with tried.one():
        assert_good(FeatureFolder(folder))


@given(data=tensor_bytes(CLASSES))
def test_classes(folder: Path, tried: Tried, data: bytes) -> None:
    (folder / "classes.safetensors").write_bytes(data)
    with tried.one():
        assert_good(FeatureFolder(folder))


ODD = [0.0, -0.0, 1e-45, 1e-30, 1e20, 3e38, -3e38, math.inf, -math.inf, math.nan]


@given(numbers=st.lists(st.sampled_from(ODD) | st.floats(width=32), min_size=18, max_size=18))
def test_numbers(folder: Path, tried: Tried, numbers: list[float]) -> None:
    (folder / "classes.safetensors").write_bytes(
        whole({"text_features": ("F32", [2, 3], struct.pack("<6f", *numbers[:6]))})
    )
    own = {**DOMAIN, "image_features": ("F32", [4, 3], struct.pack("<12f", *numbers[6:]))}
    (folder / "a.safetensors").write_bytes(whole(own))
    with tried.one():
        assert_good(FeatureFolder(folder))
        torch.testing.assert_close(
            FeatureFolder(folder).examples("a").features.flatten(), torch.tensor(numbers[6:]), rtol=0, atol=0
        )
