from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from fedclip_flwr.base import content, files
from fedclip_flwr.base.errors import ReadError, UserError
from tests.failing import failing

PASSING: list[Exception] = [
    OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)
]
PASSING += [OSError("no number"), MemoryError()]


def test_parts_are_kept_apart() -> None:
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
    (known,) = (tmp_path / "memory").glob("[!.]*")
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
        files.write_atomic(path, fail)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_fails_for_a_moment_is_tried_again(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x")
    tries = failing(monkeypatch, "a", error, times=2)
    assert content.of_file(tmp_path / "a") == content.of_bytes(b"x")
    assert len(tries) == 3


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_keeps_failing_is_an_error_of_one_line_and_is_not_remembered(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x")
    intact = content.of_files(tmp_path, ["a"], tmp_path / "other memory")
    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "a", error)
        with pytest.raises(ReadError, match=r"a can't be read now \(.+\): check .*, then try again$") as raised:
            content.of_files(tmp_path, ["a"], tmp_path / "memory")
    assert "\n" not in str(raised.value)
    assert str(tmp_path) not in raised.value.unnamed
    assert not (tmp_path / "memory").exists()
    assert content.of_files(tmp_path, ["a"], tmp_path / "memory") == intact


def test_a_state_that_cannot_be_asked_for_now_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    state = content.state_of(tmp_path, ["a"])
    monkeypatch.setattr(files, "PAUSE", 0.0)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Path, "stat", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(ReadError):
            content.state_of(tmp_path, ["a"])
    assert content.state_of(tmp_path, ["a"]) == state


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENXIO])
def test_what_lasts_is_not_tried_again(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = failing(monkeypatch, "a", OSError(number, os.strerror(number)))
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert content.of_file(tmp_path / "a") == "unreadable"
    assert len(tries) == 1


def test_permission_that_is_denied_to_who_has_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's state does not show an expired ticket of a network share, so nothing may be remembered."""
    (tmp_path / "a").write_text("x")
    failing(monkeypatch, "a", PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(ReadError, match=r"can't be read now \(Permission denied at the moment\)"):
        content.of_file(tmp_path / "a")


def test_a_file_that_may_be_read_from_now_on_has_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times may be the same, such as after a user was added to a group."""
    (tmp_path / "a").write_text("x")
    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "a", PermissionError(errno.EACCES, "Permission denied"))
        meanwhile.setattr(os, "access", lambda *_, **__: False)
        forbidden = content.of_files(tmp_path, ["a"], tmp_path / "memory")
        assert content.of_files(tmp_path, ["a"], tmp_path / "memory") == forbidden
    assert content.of_files(tmp_path, ["a"], tmp_path / "memory") != forbidden


@pytest.mark.parametrize(
    ("header", "facts"),
    [
        (b'{"__metadata__":{"round":"3"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', {"round": "3"}),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', {}),
        (b"[]", {}),
    ],
)
def test_the_facts_in_a_header_are_read(header: bytes, facts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert files.read_header(tmp_path / "a") == facts


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, (10**5).to_bytes(8, "little") + b"[" * 10**5])
def test_a_header_that_cannot_be_read_is_an_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=r"Expecting value|decode|nested too deeply"):
        files.read_header(tmp_path / "a")


def aged(path: Path, days: float) -> float:
    """The file's time after it is set back by `days` days."""
    os.utime(path, (time.time() - days * content.DAY,) * 2)
    return path.stat().st_mtime


@pytest.mark.parametrize(("days", "marked"), [(0.5, False), (2, True)])
def test_what_is_recalled_is_marked_as_used_once_a_day(tmp_path: Path, days: float, marked: bool) -> None:
    content.remember("a", "text", tmp_path)
    before = aged(tmp_path / "a", days)
    assert content.recall("a", tmp_path) == "text"
    assert ((tmp_path / "a").stat().st_mtime > before) == marked


@pytest.mark.parametrize(("pruned", "goes"), [(2, True), (0.5, False), (None, False)])
def test_once_a_day_what_was_not_used_for_long_is_forgotten(tmp_path: Path, pruned: float | None, goes: bool) -> None:
    """Not the first time: entries of earlier versions do not record when they were used."""
    old, used = (content.digest(name) for name in ("old", "used"))
    for name, days in ((old, 91), (used, 89), ("session-1", 91), ("conversion-1", 91)):
        content.remember(name, "text", tmp_path)
        aged(tmp_path / name, days)
    if pruned:
        (tmp_path / content.PRUNED).touch()
        aged(tmp_path / content.PRUNED, pruned)
    assert content.remembered("new", lambda: "text", tmp_path) == "text"
    there = {path.name for path in tmp_path.iterdir()}
    assert {"new", used, "conversion-1", content.PRUNED} <= there
    assert {old, "session-1"} & there == (set() if goes else {old, "session-1"})
    assert time.time() - (tmp_path / content.PRUNED).stat().st_mtime < content.DAY


def test_the_hash_of_files_follows_their_names_and_bytes_and_not_their_place(tmp_path: Path) -> None:
    for folder, name, text in (("one", "a", "x"), ("two", "a", "x"), ("three", "b", "x"), ("four", "a", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    one, two, three, four = (
        content.of_files(tmp_path / folder, [name], tmp_path / "memory")
        for folder, name in (("one", "a"), ("two", "a"), ("three", "b"), ("four", "a"))
    )
    assert one == two
    assert len({one, three, four}) == 3


def test_a_file_may_hold_as_much_as_is_read_of_it_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"four")
    assert files.read_bytes(tmp_path / "a", 4) == b"four"
    with pytest.raises(OSError, match="it has more than 3 bytes") as error:
        files.read_bytes(tmp_path / "a", 3)
    assert error.value.errno == errno.EFBIG


def test_names_of_files_stay_apart_and_in_their_folder() -> None:
    assert content.file_name("north-1.a_b") == "north-1.a_b"
    texts = ("north_1", "north/1", "north 1", ".north_1", "../north_1", "..", "x" * 81, "x" * 82)
    names = [content.file_name(text) for text in texts]
    assert len({*names}) == len(texts)
    assert all("/" not in name and not name.startswith(".") and len(name) < 100 for name in names)


def test_a_file_is_on_disk_before_it_takes_its_place_and_the_place_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, str]] = []
    (tmp_path / "a").write_text("old")

    def sync(number: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(number).st_mode), (tmp_path / "a").read_text()))

    monkeypatch.setattr(os, "fsync", sync)
    files.write_atomic(tmp_path / "a", lambda part: part.write_text("new"))
    assert synced == [(False, "old"), (True, "new")]
