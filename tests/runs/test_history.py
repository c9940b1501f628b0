from __future__ import annotations

import fcntl
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.runs import history
from fedclip_flwr.runs.folder import RunFolder
from tests.past import FAILURE, completed, line, make, summary


def test_a_run_is_found_by_its_name_by_its_path_and_as_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    first, last = (completed(tmp_path / "runs" / name) for name in ("20260101-000000", "20260102-000000"))
    (tmp_path / "runs" / "latest").symlink_to(first.name)  # it was gone on with
    elsewhere = completed(tmp_path / "elsewhere" / "20250101-000000")
    assert history.find("20260102-000000").path == last
    assert history.find(str(elsewhere)).path == elsewhere
    assert history.find("20250101-000000", tmp_path / "elsewhere").path == elsewhere
    assert history.find("latest").path == first
    monkeypatch.chdir(elsewhere.parent)
    assert history.find(elsewhere.name).path == elsewhere
    (tmp_path / "runs" / "latest").unlink()
    assert history.find("latest").path == last
    (tmp_path / "runs" / "latest").symlink_to("20240101-000000")  # which is gone
    assert history.find("latest").path == last


@pytest.mark.parametrize("name", ["nope", "~nobody/x", "a\0b", "../latest", "x" * 300])
def test_a_run_that_is_not_there_is_reported_with_those_that_are(name: str, tmp_path: Path) -> None:
    for day in range(1, 5):
        completed(tmp_path / f"2026010{day}-000000")
    with pytest.raises(UserError, match=r"no such run.*are 20260102-000000, 20260103-000000, 20260104-000000$"):
        history.find(name, tmp_path)
    with pytest.raises(UserError, match="there is no run in"):
        history.find("latest", tmp_path / "empty")


def test_runs_are_listed_by_age_and_other_folders_are_not(tmp_path: Path) -> None:
    names = ["20260102-000000", "20260101-000000", "20260101-000000-1", "20260101-000000-2", "20260101-000000-10"]
    before = 0.0
    for name in names:
        made = completed(tmp_path / name)
        while made.stat().st_ctime <= before:
            os.utime(made)  # until the file system's clock has gone on
        before = made.stat().st_ctime
    completed(tmp_path / "by-name")  # today, which is after all of these
    (tmp_path / "latest").symlink_to(names[0])
    (tmp_path / "half").mkdir()  # of a run that was killed before it wrote anything
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "settings.json").touch()
    (tmp_path / "file").touch()
    listed = history.names(tmp_path)
    assert listed == [names[1], names[2], names[3], names[4], names[0], "by-name"]  # as they were made
    assert history.names(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="can't be listed"):
        history.names(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("settings.json", "", "settings.json is damaged"),
        ("settings.json", "[]", "settings.json is damaged .expected an object"),
        ("settings.json", '{"seed": "3"}', "settings.json is damaged .seed is '3'"),
        ("settings.json", '{"blend": [1]}', "settings.json is damaged .blend is"),
        ("settings.json", "[" * 100_000, "settings.json is damaged"),
        ("metrics.jsonl", '{"round": 0', "metrics.jsonl is damaged"),
        ("metrics.jsonl", "3\n", "metrics.jsonl is damaged .expected an object"),
        ("metrics.jsonl", '{"round": 0}\n', "metrics.jsonl is damaged .invalid round record"),
        ("metrics.jsonl", json.dumps(line(0, seconds=None)), "metrics.jsonl is damaged .invalid round record"),
        ("metrics.jsonl", json.dumps(line(0, bytes=10**400)), "metrics.jsonl is damaged .invalid round record"),
        ("metrics.jsonl", json.dumps(line(0, seen=float("nan"))), "metrics.jsonl is damaged .invalid round record"),
        ("metrics.jsonl", json.dumps({**line(0), "round": 0.5}), "metrics.jsonl is damaged .invalid round record"),
        ("metrics.jsonl", json.dumps({**line(0), "seen": "much"}), "metrics.jsonl is damaged .invalid round record"),
        ("metrics.jsonl", "\ud800", "metrics.jsonl is damaged"),
        ("summary.json", '{"status": "comp', "summary.json is damaged"),
        ("summary.json", '{"failures": [3]}', "summary.json is damaged .failures"),
        ("summary.json", '{"failures": {}}', "summary.json is damaged .failures"),
        ("summary.json", '{"round": "3"}', "summary.json is damaged .expected a number of rounds"),
        ("summary.json", '{"privacy": [1]}', "summary.json is damaged .privacy"),
        ("summary.json", '{"status": "completed"}', "summary.json is damaged .a completed run's results"),
        (
            "summary.json",
            json.dumps({**summary(), "zero_shot": "x"}),
            "summary.json is damaged .a completed run's results",
        ),
        ("summary.json", json.dumps(summary(unseen=math.inf)), "summary.json is damaged .a completed run's results"),
        ("summary.json", json.dumps(summary(seconds=3)), "summary.json is damaged .a completed run's results"),
        ("summary.json", json.dumps(summary(traffic={})), "summary.json is damaged .a completed run's results"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str, why: str, tmp_path: Path) -> None:
    (completed(tmp_path / "run") / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=why) as error:
        history.find("run", tmp_path)
    assert "\n" not in str(error.value)


def test_rounds_whose_lines_are_lost_are_counted(tmp_path: Path) -> None:
    path = completed(tmp_path / "run")
    assert history.read(path).lost == 0
    (path / "metrics.jsonl").write_text("".join(json.dumps(line(number)) + "\n" for number in (0, 2)))
    assert history.read(path).lost == 2  # 1 and 3
    (path / "metrics.jsonl").unlink()
    assert history.read(path).lost == 4
    (path / "summary.json").write_text(json.dumps({"status": "stopped", "round": 2}))
    assert history.read(path).lost == 2  # the line of round 2 would have come with round 3
    (path / "summary.json").write_text(json.dumps({"status": "stopped", "round": 10**15}))
    assert history.read(path).lost == 10**15  # at once
    (path / "summary.json").unlink()
    assert history.read(path).lost == 0


@pytest.mark.parametrize(("recipe", "norm"), [("paper", 1.0), ("default", 0.0)])
def test_of_a_run_of_before_there_was_a_choice_the_papers_adapter_saw_unit_length(
    tmp_path: Path, recipe: str, norm: float
) -> None:
    path = completed(tmp_path / "run", recipe=recipe)
    settings = json.loads((path / "settings.json").read_text())
    assert history.read(path).known.feature_norm == 0.0
    del settings["feature-norm"]
    (path / "settings.json").write_text(json.dumps(settings))
    assert history.read(path).known.feature_norm == norm


@pytest.mark.parametrize("name", ["settings.json", "metrics.jsonl", "summary.json"])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    path = completed(tmp_path / "run") / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{name} can't be read"):
        history.read(tmp_path / "run")


def test_a_folder_that_is_written_for_the_first_time_is_a_run_already(tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    assert history.read(path).status == "killed"
    with locked(path):
        run = history.read(path)
        assert (run.status, run.metrics, run.done, run.wanted, run.failures) == ("running", [], 0, 3, [])


class locked:  # noqa: N801
    """As a run holds its folder."""

    def __init__(self, path: Path) -> None:
        self._folder = os.open(path, os.O_RDONLY)
        fcntl.flock(self._folder, fcntl.LOCK_EX)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)


def test_a_run_is_running_until_it_says_how_it_ended(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), RunFolder(Settings(results_dir=str(tmp_path), seed=5), "0123") as folder:
        run = history.find("latest", tmp_path)
        assert (run.status, run.completed, run.why, run.changed) == ("running", False, "", {"seed": 5})
        raise KeyboardInterrupt
    run = history.read(folder.path)
    assert (run.status, run.why) == ("stopped", "it was stopped from outside.")
    with pytest.raises(UserError), RunFolder(Settings(results_dir=str(tmp_path)), "0123") as folder:
        raise UserError("no sites")
    run = history.read(folder.path)
    assert (run.status, run.why) == ("failed", "no sites")


def test_a_killed_run_says_how_to_resume_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = {"status": "running", "round": 2, "failures": [FAILURE]}
    run = history.read(make(tmp_path / "run", [line(0), line(1, bytes=3000)], unfinished))
    assert (run.status, run.done) == ("killed", 2)
    assert run.why.endswith(f"Resume it after round 2 with resume=run results-dir={tmp_path}.")
    monkeypatch.setattr(history, "runs_folder", lambda: tmp_path)
    assert history.find("run").why.endswith("Resume it after round 2 with resume=run.")
    assert run.failures == [(2, "photo-0", "no answer")]
    assert run.bytes_per_site_round == 1500


def test_what_is_over_is_not_taken_for_killed_because_its_folder_was_read_before(tmp_path: Path) -> None:
    path = make(tmp_path / "run", [line(0)], {"status": "running", "round": 0, "failures": []})
    look = history.held

    def ends(folder: Path) -> bool:
        (folder / "summary.json").write_text(json.dumps(summary(rounds=0)))
        return look(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "held", ends)
        assert history.read(path).status == "completed"


def test_only_what_has_changed_is_read_again(tmp_path: Path) -> None:
    path = make(tmp_path / "run", [line(0)], {"status": "running", "round": 0, "failures": []})
    reader = history.Reader(path)
    first = reader.read()
    assert reader.read() is first
    (tmp_path / "new").write_text(json.dumps(line(0)) + "\n" + json.dumps(line(1)))
    (tmp_path / "new").replace(path / "metrics.jsonl")
    second = reader.read()
    assert [one["round"] for one in second.metrics] == [0, 1]
    assert second.settings is first.settings
    assert second.summary is first.summary


def test_round_0_is_called_as_the_run_calls_it(tmp_path: Path) -> None:
    started: list[tuple[dict[str, Any], str]] = [
        ({}, "zero-shot"),
        ({"recipe": "paper"}, "start"),
        ({"recipe": "paper", "adapter": "scale"}, "zero-shot"),
        ({"recipe": "paper", "method": "full-model"}, "zero-shot"),
    ]
    for settings, start in started:
        assert history.read(make(tmp_path / "run", **settings)).start == start


def test_a_method_is_named_in_a_word(tmp_path: Path) -> None:
    words: list[dict[str, Any]] = [
        {"adapter": "gate", "adapter-rank": 8},
        {"adapter": "scale"},
        {"method": "full-model"},
    ]
    assert [history.read(make(tmp_path / "run", **word)).method for word in words] == ["gate-8", "scale", "full-model"]
