from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_flwr import content
from fedclip_flwr.errors import UserError


def test_parts_are_told_apart() -> None:
    assert content.digest("ab", "c") != content.digest("a", "bc")
    assert content.digest("ab") == content.digest(b"ab")


def test_a_known_hash_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    first = content.of_files(tmp_path, ["a"], tmp_path / "memory")
    monkeypatch.setattr(content, "of_file", lambda path: pytest.fail(f"{path} was read again"))
    assert content.of_files(tmp_path, ["a"], tmp_path / "memory") == first


def test_a_damaged_memory_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    first = content.of_files(tmp_path, ["a"], tmp_path / "memory")
    (known,) = (tmp_path / "memory").iterdir()
    known.write_bytes(b"\xff" * 7)
    assert content.of_files(tmp_path, ["a"], tmp_path / "memory") == first


def test_a_hash_that_cannot_be_remembered_is_made_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    first = content.of_files(tmp_path, ["a"], tmp_path / "memory")
    assert content.of_files(tmp_path, ["a"], tmp_path / "a" / "no folder") == first


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"disk full.*make room"):
        content.write_whole(path, fail)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "old")]
