from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedclip_flwr.base import store
from fedclip_flwr.base.growing import Growing, encoded_count

FEATURES = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))


def some(growing: Growing, first: int, last: int) -> None:
    """Appends batches of three images, the second of which can't be read."""
    for row in range(first, last, 3):
        growing.append(FEATURES[[row, row + 2]], [row, row + 2], [f"image {row + 1}"])


def finished(path: Path) -> bytes:
    store.load_or_grow(path, 9, lambda growing: some(growing, growing.rows, 9))
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.safetensors"


def test_an_entry_that_grew_is_one_like_any_other(path: Path) -> None:
    tensors, facts = store.load_or_grow(path, 9, lambda growing: some(growing, 0, 9))
    rows = [0, 2, 3, 5, 6, 8]
    assert torch.equal(tensors["image_features"], FEATURES[rows])
    assert tensors["labels"].tolist() == rows
    assert facts == {"broken": "3", "names": "image 1, image 4, image 7"}
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == [path.name]


def test_an_entrys_progress_is_reported_while_it_is_made(path: Path) -> None:
    assert encoded_count(path) == 0
    with Growing(path, 9) as growing:
        assert encoded_count(path) == 0
        some(growing, 0, 6)
        assert encoded_count(path) == 6
    journal = path.with_name(f".{path.name}.journal")
    complete = journal.read_bytes()
    journal.write_bytes(complete + b'{"labels": [6, 8], "bro')
    assert encoded_count(path) == 6
    journal.write_bytes(b"nothing\n[]\n")
    assert encoded_count(path) == 0


def test_an_entry_without_images_keeps_its_shape(path: Path) -> None:
    tensors, facts = store.load_or_grow(path, 1, lambda growing: growing.append(torch.empty(0, 5), [], ["a"]))
    assert tensors["image_features"].shape == (0, 5)
    assert facts == {"broken": "1", "names": "a"}


@pytest.mark.parametrize("done", [0, 3, 6, 9])
def test_it_resumes_where_it_stopped_and_becomes_the_same(path: Path, done: int, tmp_path: Path) -> None:
    with Growing(path, 9) as growing:
        some(growing, 0, done)
    seen = []

    def grow(growing: Growing) -> None:
        seen.append(growing.rows)
        some(growing, growing.rows, 9)

    store.load_or_grow(path, 9, grow)
    assert seen == [done]
    assert path.read_bytes() == finished(tmp_path / "elsewhere" / path.name)


def cut(end: str, size: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        file = path.with_name(f".{path.name}.{end}")
        file.write_bytes(file.read_bytes()[:size])

    return spoil


def flip(end: str, where: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        file = path.with_name(f".{path.name}.{end}")
        data = bytearray(file.read_bytes())
        data[where] ^= 1
        file.write_bytes(data)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        (cut("journal", 0), 0),
        (cut("journal", -1), 3),
        (cut("journal", 5), 0),
        (cut("part", -1), 3),
        (cut("part", 0), 0),
        (flip("part", -1), 3),
        (flip("part", -4 * 5 * 3), 0),
        (flip("journal", 3), 0),
        (flip("journal", -4), 3),
        (lambda path: path.with_name(f".{path.name}.part").unlink(), 0),
        (lambda path: path.with_name(f".{path.name}.journal").write_text('{"format": 0}\n{}\n'), 0),
        (lambda path: path.with_name(f".{path.name}.journal").write_text("[]\n"), 0),
        (lambda path: path.with_name(f".{path.name}.journal").write_text("5\n"), 0),
    ],
)
def test_what_is_damaged_is_made_again(path: Path, spoil: Callable[[Path], None], kept: int, tmp_path: Path) -> None:
    with Growing(path, 9) as growing:
        some(growing, 0, 6)
    spoil(path)
    with Growing(path, 9) as growing:
        assert growing.rows == kept
    assert finished(path) == finished(tmp_path / "elsewhere" / path.name)


def test_what_was_begun_for_another_number_of_images_is_made_again(path: Path) -> None:
    with Growing(path, 8) as growing:
        some(growing, 0, 3)
    with Growing(path, 9) as growing:
        assert growing.rows == 0


def test_names_that_are_no_texts_or_endless_are_kept_as_far_as_they_go(path: Path) -> None:
    names = ["\udcff.png", "x" * 1000, *"abcdef"]
    _, facts = store.load_or_grow(path, 8, lambda growing: growing.append(torch.empty(0, 5), [], names))
    assert facts == {"broken": "8", "names": f"?.png, {'x' * 200}, a, b, c"}


def test_batches_of_different_kinds_do_not_go_together(path: Path) -> None:
    with Growing(path, 9) as growing:
        growing.append(FEATURES[:1], [0], [])
        with pytest.raises(ValueError, match="cannot follow"):
            growing.append(FEATURES[:1].half(), [0], [])


def test_an_entry_is_on_disk_before_it_takes_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_ino, path.exists())))
    finished(path)
    assert synced == [(path.stat().st_ino, False)]
