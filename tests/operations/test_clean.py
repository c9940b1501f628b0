from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedclip_flwr.base import content, store
from fedclip_flwr.base.content import DAY
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.growing import Growing
from fedclip_flwr.cli import app
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.encoded import Encoded
from fedclip_flwr.operations import clean

MODEL = "features/abc-float32"


def age(days: float, *paths: Path) -> None:
    """As if they had last been written to so many days ago."""
    for path in paths:
        os.utime(path, (time.time() - days * DAY,) * 2)


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of each kind, all of it last used ten days ago, and what must never be removed."""
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    for name in (f"{MODEL}/classes-1.safetensors", "partitions/1.safetensors"):
        store.load_or_make(home / name, lambda: ({"rows": torch.arange(3)}, {"model": "some/clip"}))
    digest = content.digest("x")
    for memory, names in (("contents", (digest, "session-1", "conversion-1")), ("sweeps/results", (digest,))):
        for name in names:
            content.remember(name, "text", home / memory)
    kept = ("bin/flwr-clientapp", "data/pacs/x.png", "keys/node.key", "runs/1/summary.json", "sweeps/1/table.md")
    for name in (
        *kept,
        "exchange/1/a.safetensors",
        "exchange/1/north/2.safetensors",
        *("personal/run/north/adapter.json", "given/north/1.safetensors", "given/north/2.safetensors"),
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("12345")
    for path in home.rglob("*"):
        age(10, *([path] if path.is_file() else []))
    return home


STAYS = {
    *("bin/flwr-clientapp", "data/pacs/x.png", "keys/node.key", "runs/1/summary.json", "sweeps/1/table.md"),
    *("contents/conversion-1", f"{MODEL}/classes-1.safetensors.lock", "partitions/1.safetensors.lock"),
}
OWN = {"personal/run/north/adapter.json"}
GIVEN = {"given/north/1.safetensors", "given/north/2.safetensors"}


def cleaned(*words: str) -> list[str]:
    result = CliRunner().invoke(app, ["clean", *words])
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def asked(home: Path, *kinds: str, yes: Iterable[str] = clean.KINDS, days: int | None = None) -> list[str]:
    """What is said to somebody who agrees to some of the questions, which are among it."""
    said: list[str] = []

    def ask(question: str) -> bool:
        said.append(question)
        return question.split()[1] in yes

    clean.clean(kinds, days, ask, said.append)
    return said


def test_what_there_is_is_shown_and_without_a_terminal_nothing_is_removed(home: Path) -> None:
    before = below(home)
    lines = cleaned()
    assert below(home) == before
    assert lines[0].split() == ["kind", "what", "last", "used", "size", "files"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if "days ago" in line]
    assert [row[:3] for row in rows] == [
        ["features", "some/clip, float32", "10 days ago"],
        ["contents", "hashes of files", "10 days ago"],
        ["contents", "sessions of runs", "10 days ago"],
        ["partitions", "the rows of simulated sites", "10 days ago"],
        ["exchange", "adapters of the session 1", "10 days ago"],
        ["sweeps", "results of sweeps", "10 days ago"],
    ]
    assert rows[4][3:] == ["10 B", "2"]
    assert lines[-2].startswith("7 files, ")
    assert "personal is only cleaned if you name personal" in lines[-2]
    assert "given is only cleaned if you name given" in lines[-2]
    assert lines[-1].startswith("Nothing was removed")
    assert "--yes" in lines[-1]


def test_with_yes_all_that_can_be_made_again_is_removed(home: Path) -> None:
    assert cleaned("--yes")[-1].startswith("Removed 7 files, ")
    assert below(home) == STAYS | OWN | GIVEN
    assert not (home / "exchange" / "1").exists()
    assert "There is nothing to remove in" in cleaned("--yes")[-1]


def test_what_is_chosen_is_removed(home: Path) -> None:
    before = below(home)
    said = asked(home, yes=["sweeps"])
    assert [line.partition(" (")[0] for line in said if line.startswith("Remove ")] == [
        f"Remove {kind}" for kind in ("features", "contents", "partitions", "exchange", "sweeps")
    ]
    (gone,) = before - below(home)
    assert gone.startswith("sweeps/results/")
    said = asked(home, "partitions", "exchange", yes=[])
    assert sum(line.startswith("Remove ") for line in said) == 2
    assert before - below(home) == {gone}


def test_a_sites_own_adapters_are_removed_only_if_they_are_named(home: Path) -> None:
    before = below(home)
    assert cleaned("personal", "--yes")[1].split()[:6] == ["personal", "a", "site's", "own", "adapter,", "run/north"]
    assert before - below(home) == OWN
    assert not (home / "personal" / "run").exists()


def test_what_a_site_gave_under_masks_is_removed_only_if_it_is_named_and_it_says_what_is_lost(home: Path) -> None:
    before = below(home)
    assert "what north gave under masks: without it, no update can replace that" in cleaned("given", "--yes")[1]
    assert before - below(home) == GIVEN
    assert not (home / "given" / "north").exists()


def test_what_was_used_since_stays(home: Path) -> None:
    """Of an entry of the store its lock says when it was used."""
    age(2, home / MODEL / "classes-1.safetensors.lock", home / "exchange" / "1" / "a.safetensors")
    assert asked(home, "features", "exchange", days=3)[0].startswith("There is nothing to remove in")
    age(4, home / MODEL / "classes-1.safetensors.lock")
    assert asked(home, "features", "exchange", days=3)[-1].startswith("Removed 1 file, ")
    assert not (home / MODEL / "classes-1.safetensors").exists()


def test_an_entry_that_another_process_makes_stays(home: Path) -> None:
    path = home / MODEL / "images-2.safetensors"
    with Growing(path, 2) as growing:
        growing.append(torch.ones(1, 2), [0], [])
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = asked(home, "features")
        assert said[-1].startswith("Removed 1 file, ")
        assert said[-1].endswith(" are in use and are kept.")
        assert {f".{path.name}.part", f".{path.name}.journal"} <= {file.name for file in path.parent.iterdir()}
        assert not (home / MODEL / "classes-1.safetensors").exists()
    assert asked(home, "features")[-1].startswith("Removed 2 files, ")
    assert not [file.name for file in path.parent.iterdir() if file.suffix != ".lock"]


def test_what_is_used_while_the_question_waits_stays(home: Path) -> None:
    def ask(_: str) -> bool:
        store.load_or_make(home / MODEL / "classes-1.safetensors", lambda: pytest.fail("made again"))
        return True

    said: list[str] = []
    clean.clean(["features"], None, ask, said.append)
    assert said[-1].startswith("Removed 0 files")
    assert (home / MODEL / "classes-1.safetensors").exists()


def test_what_a_run_may_be_using_stays(home: Path) -> None:
    age(1.5, home / "contents" / "session-1", home / "exchange" / "1" / "a.safetensors")
    half = home / "sweeps" / "results" / f".{content.digest('y')}.0123456789abcdef"
    half.write_text("half")
    lines = cleaned("--yes")
    assert "4 files, " in lines[-2]
    assert " may be in use by a run and are kept." in lines[-2]
    assert {"contents/session-1", "exchange/1/a.safetensors"} <= below(home)
    assert half.exists()
    age(3, half)
    cleaned("sweeps", "--yes")
    assert not half.exists()


def test_nothing_is_followed_out_of_the_folder(home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (home / "features").rename(outside)
    (home / "features").symlink_to(outside)
    (home / "exchange" / "1" / "link").symlink_to(outside)
    link = home / "contents" / content.digest("z")
    link.symlink_to(outside / "abc-float32" / "classes-1.safetensors")
    before = below(outside)
    lines = cleaned("--yes")
    assert lines[0] == f"{home / 'features'} is behind a link and is left alone: remove its files by hand."
    assert below(outside) == before
    assert link.is_symlink()
    assert (home / "exchange" / "1" / "link").is_symlink()


def test_what_cannot_be_removed_is_reported_and_the_others_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "contents":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"these can't be removed: .*session-1 \(Permission denied\); let this user"
    ) as error:
        clean.clean([], None, lambda _: True, said.append)
    assert "\n" not in str(error.value)
    assert said[-1].startswith("Removed 5 files")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["keys"], "'keys': expected some of features, contents, partitions, exchange, sweeps, personal, given"),
        (["--older-than", "-1"], "--older-than -1: expected a number of days from 0 to 36500"),
        (["--older-than", "9" * 400], "expected a number of days from 0 to 36500"),
    ],
)
def test_what_cannot_be_meant_is_reported_in_a_line(home: Path, words: list[str], expected: str) -> None:
    before = below(home)
    result = CliRunner().invoke(app, ["clean", *words, "--yes"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert below(home) == before


def test_without_a_home_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "nowhere"))
    assert cleaned() == [f"There is nothing to remove in {tmp_path / 'nowhere'}."]


def test_features_are_shown_by_the_name_of_their_model(features: Features) -> None:
    assert len(features.classes.text) == 3
    assert isinstance(features, Encoded)
    assert clean._by_model(features.folder.parent, f"{features.folder.name}/images-1.safetensors") == "bundled, float32"
