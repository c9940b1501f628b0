"""Adapters of strangers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedclip_flwr.learning.adapters import ADAPTERS, make_adapter
from fedclip_flwr.runs.saved import load_adapter
from tests.fuzz.hostile import Tried, changed, json_bytes, tensor_bytes
from tests.fuzz.test_feature_folders import whole

FACTS: dict[str, Any] = {
    "kind": "gate",
    "rank": 2,
    "dim": 4,
    "blend": 1.0,
    "model": "bundled",
    "model_revision": "",
    "model_content": "0123",
    "class_names": ["cat", "dog"],
    "templates": ["a {}"],
    "prompts": ["a cat", "a dog"],
    "scale": 50.0,
    "bias": 0.0,
    "round": 3,
}


def tensors_of(kind: str) -> dict[str, tuple[str, list[int], bytes]]:
    state = make_adapter(kind, 4, rank=2, identity=False).state_dict()
    return {name: ("F32", list(t.shape), t.numpy().tobytes()) for name, t in state.items()}


TENSORS = {kind: tensors_of(kind) for kind in ADAPTERS}
WHOLE = {kind: whole(tensors) for kind, tensors in TENSORS.items()}


def assert_good(folder: Path) -> None:
    adapter, facts = load_adapter(folder)
    assert facts["kind"] in ADAPTERS
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.state_dict().values())
    adapted = adapter(F.normalize(torch.ones(2, facts["dim"]), dim=1))
    assert adapted.shape == (2, facts["dim"])
    assert facts["class_names"] is not None
    torch.save(adapter.state_dict(), io.BytesIO())  # none of it is only promised


@given(data=json_bytes(FACTS), kind=st.sampled_from(sorted(ADAPTERS)))
def test_facts(tmp_path: Path, tried: Tried, data: bytes, kind: str) -> None:
    (tmp_path / "adapter.json").write_bytes(data)
    (tmp_path / "adapter.safetensors").write_bytes(WHOLE[kind])
    with tried.one():
        assert_good(tmp_path)


@given(data=st.data(), kind=st.sampled_from(sorted(ADAPTERS)))
def test_tensors(tmp_path: Path, tried: Tried, data: st.DataObject, kind: str) -> None:
    (tmp_path / "adapter.json").write_text(json.dumps({**FACTS, "kind": kind}))
    (tmp_path / "adapter.safetensors").write_bytes(data.draw(tensor_bytes(TENSORS[kind])))
    with tried.one():
        assert_good(tmp_path)


@given(facts=changed(FACTS), kind=st.sampled_from(sorted(ADAPTERS)), dim=st.sampled_from([4, 10**5, 10**9, 2**40]))
def test_sizes(tmp_path: Path, tried: Tried, facts: dict[str, Any], kind: str, dim: int) -> None:
    """An adapter is as large as its tensors, whatever adapter.json says."""
    (tmp_path / "adapter.json").write_text(json.dumps({**facts, "kind": kind, "dim": dim}))
    (tmp_path / "adapter.safetensors").write_bytes(WHOLE[kind])
    with tried.one():
        assert_good(tmp_path)


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_complete_ones_are_taken(tmp_path: Path, kind: str) -> None:
    (tmp_path / "adapter.json").write_text(json.dumps({**FACTS, "kind": kind}))
    (tmp_path / "adapter.safetensors").write_bytes(WHOLE[kind])
    assert_good(tmp_path)
