from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedclip_flwr.base import tensorfile
from fedclip_flwr.base.tensorfile import TensorSpec

TENSORS = {
    "bytes": torch.arange(15, dtype=torch.uint8).reshape(3, 5),
    "half": torch.randn(7, 3).half(),
    "brain": torch.randn(2, 3, 4).bfloat16(),
    "whole": torch.tensor([-1, 2**40]),
    "alone": torch.tensor(2.5),
    "turned": torch.randn(5, 9).T,
    "empty": torch.empty(0, 6),
}


def test_what_is_written_piece_by_piece_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE", 8)
    tensorfile.save(TENSORS, tmp_path / "a", {"name": "Bär"})
    found = load_file(tmp_path / "a")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"name": "Bär"}


def test_a_header_may_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    made = tensorfile.header({"a": TensorSpec("F32", (1,))}, {}, 1000)
    assert len(made) == 1000
    (tmp_path / "a").write_bytes(made + b"\0\0\x80?")
    assert load_file(tmp_path / "a")["a"].tolist() == [1.0]


def test_the_checksum_of_a_file_is_that_of_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: (tensorfile.spec_of(tensor), tensorfile.crc_of(tensor)) for name, tensor in TENSORS.items()}
    expected = tensorfile.checksum({"x": "1"}, own)
    monkeypatch.setattr(tensorfile, "PIECE", 8)
    tensorfile.save(TENSORS, tmp_path / "a", {"x": "1"})
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "b", {"x": "1"})
    assert tensorfile.checksum_of_file(tmp_path / "a", {"x": "1"}) == expected
    assert tensorfile.checksum_of_file(tmp_path / "b", {"x": "1"}) == expected
    assert tensorfile.checksum_of_file(tmp_path / "b", {"x": "2"}) != expected


def test_all_numbers_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE", 8)
    for row in range(5):
        tensor = torch.zeros(5, 3)
        assert tensorfile.all_finite(tensor)
        tensor[row, 2] = float("nan")
        assert not tensorfile.all_finite(tensor)


def test_a_checksum_follows_all_that_a_header_says() -> None:
    kind = TensorSpec("F32", (2, 3))
    variants: list[tuple[dict[str, str], dict[str, tuple[TensorSpec, int]]]] = [
        ({"x": "1"}, {"a": (kind, 7)}),
        ({"x": "2"}, {"a": (kind, 7)}),
        ({"y": "1"}, {"a": (kind, 7)}),
        ({"x": "1"}, {"b": (kind, 7)}),
        ({"x": "1"}, {"a": (TensorSpec("I32", (2, 3)), 7)}),
        ({"x": "1"}, {"a": (TensorSpec("F32", (3, 2)), 7)}),
        ({"x": "1"}, {"a": (kind, 8)}),
    ]
    assert len({tensorfile.checksum(*one) for one in variants}) == len(variants)
